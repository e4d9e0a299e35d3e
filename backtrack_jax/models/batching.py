"""Padded batches out of sequences of unequal length, in a short list of shapes so that little is compiled."""

import itertools
from collections.abc import Sequence

import numpy as np

from backtrack_jax.models.attention import PAD


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


def batches(lengths: Sequence[int], batch_size: int) -> list[tuple[int, list[int]]]:
    """Groups rows into (padded length, row numbers) of at most `batch_size` rows of similar length, longest first.

    What does not fill a batch joins the next longer bucket, since an incomplete batch takes as long as a full one and
    a bucket of its own takes a compilation. The longest come first, so that what does not fit into memory fails at once
    and not after hours.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}, expected at least 1")
    order = sorted(range(len(lengths)), key=lambda row: bucket(lengths[row]))
    groups = []
    waiting: list[int] = []
    for padded, rows in itertools.groupby(order, key=lambda row: bucket(lengths[row])):
        waiting += rows
        while len(waiting) >= batch_size:
            groups.append((padded, waiting[:batch_size]))
            waiting = waiting[batch_size:]
    if waiting:
        groups.append((bucket(lengths[waiting[-1]]), waiting))
    return sorted(groups, key=lambda group: -group[0])
