"""Texts that mark the end of a reasoning or a reply. Imports nothing, since configs and records need it too."""

END_MARKERS = ("</think>", "<｜end▁of▁sentence｜>", "<|end_of_text|>", "<|eot_id|>", "<|endoftext|>", "<|im_end|>")
"""Texts that end the reasoning or the reply, for tokenizers that have no such token too; no reasoning follows."""
