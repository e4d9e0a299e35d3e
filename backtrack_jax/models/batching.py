"""Padded batches out of sequences of unequal length, in a short list of shapes so that little is compiled."""

from collections.abc import Sequence

import numpy as np

from backtrack_jax.models.llama import PAD


def left_pad(sequences: Sequence[Sequence[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and positions, [B, length] int32 each, with padding before the tokens (for generation).

    B h i -> ids 0 0 B h i, positions -1 -1 0 1 2. All rows end in the last column, where the next token is sampled.

    Raises:
      ValueError: if a sequence is empty or longer than `length`.
    """
    ids, positions = _blank(sequences, length)
    for row, sequence in enumerate(sequences):
        ids[row, length - len(sequence) :] = sequence
        positions[row, length - len(sequence) :] = np.arange(len(sequence))
    return ids, positions


def right_pad(sequences: Sequence[Sequence[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and positions, [B, length] int32 each, with padding after the tokens, so that column t holds token t.

    B h i -> ids B h i 0 0, positions 0 1 2 -1 -1.

    Raises:
      ValueError: if a sequence is empty or longer than `length`.
    """
    ids, positions = _blank(sequences, length)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = sequence
        positions[row, : len(sequence)] = np.arange(len(sequence))
    return ids, positions


def bucket(length: int, step: int = 64) -> int:
    """The padded length for `length` tokens: a multiple of `step`, beyond 8 steps of 1/8 of the power of two below.

    Padding stays under an eighth of long sequences, and a data set of any spread needs few shapes.
    """
    if length > 8 * step:
        step = max(step, 1 << (length - 1).bit_length() - 4)
    return -(-length // step) * step


def check_ids(ids: Sequence[int], vocab_size: int, name: str) -> None:
    """ValueError if token ids are none that a model knows; JAX would take the last row of its embedding for them."""
    if not len(ids):
        raise ValueError(f"{name} has no token, expected at least one")
    if unknown := [token for token in (min(ids), max(ids)) if not 0 <= token < vocab_size]:
        raise ValueError(
            f"{name} has the token id {unknown[0]}, expected 0 to {vocab_size - 1}; is it another model's tokenizer?"
        )


def _blank(sequences: Sequence[Sequence[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    for row, sequence in enumerate(sequences):
        if not 0 < len(sequence) <= length:
            raise ValueError(f"sequence {row} has {len(sequence)} tokens, expected 1 to {length}")
    shape = (len(sequences), length)
    return np.zeros(shape, np.int32), np.full(shape, PAD, np.int32)
