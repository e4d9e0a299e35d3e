"""Rows of whole sequences, side by side."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from backtrack_jax.models.attention import PAD

_OPEN_ROWS = 64  # rows that may still have room; older ones are not tried again


class Batch(NamedTuple):
    """Rows of packed sequences.

        ids        B h i . B y o u .
        positions  0 1 2 3 0 1 2 3 4      each sequence counts its own, and sees only itself
        weights    0 0 1 1 0 0 1 1 1      tokens that are predicted: here all but BOS and a prompt of one token

    Attributes:
      ids: [B, T] int32.
      positions: [B, T] int32, PAD at padding.
      weights: [B, T] float32, what a token counts in the loss when it is predicted from those before it.
    """

    ids: Any
    positions: Any
    weights: Any


@dataclasses.dataclass(frozen=True)
class Tokens:
    """One training text as tokens.

    Attributes:
      ids: token ids, BOS first.
      start: index of the first token that is learned; those before it (a prompt) are only read. At least 1.
    """

    ids: Sequence[int]
    start: int = 1


def pack(sequences: Sequence[Tokens], length: int) -> Batch:
    """Places whole sequences in rows, first fit, in the order given; no sequence is cut or sees another.

    Args:
      sequences: none longer than `length`.
      length: T.

    Returns:
      As many rows as it takes, padded at the end.

    Raises:
      ValueError: a sequence is longer than a row.
    """
    rows: list[list[Tokens]] = []
    free: list[int] = []
    open_rows: list[int] = []
    for i, sequence in enumerate(sequences):
        size = len(sequence.ids)
        if size > length:
            raise ValueError(f"sequence {i} has {size} tokens, a row holds {length}")
        row = next((r for r in open_rows if free[r] >= size), None)
        if row is None:
            row = len(rows)
            rows.append([])
            free.append(length)
            open_rows = [*open_rows[1 - _OPEN_ROWS :], row]
        rows[row].append(sequence)
        free[row] -= size
    shape = (len(rows), length)
    batch = Batch(np.zeros(shape, np.int32), np.full(shape, PAD, np.int32), np.zeros(shape, np.float32))
    for r, members in enumerate(rows):
        at = 0
        for sequence in members:
            stop = at + len(sequence.ids)
            batch.ids[r, at:stop] = sequence.ids
            batch.positions[r, at:stop] = np.arange(len(sequence.ids))
            batch.weights[r, at + max(sequence.start, 1) : stop] = 1
            at = stop
    return batch
