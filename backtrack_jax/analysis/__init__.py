"""Measurements on replies, activations and vectors."""
