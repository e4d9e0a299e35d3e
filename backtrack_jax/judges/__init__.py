"""Judges: who says which part of a trace is backtracking."""
