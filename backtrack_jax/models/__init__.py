"""Llama-architecture models: configuration, forward pass, checkpoints, tokenizer, sharding."""
