"""What was measured of many rows, kept on disk batch by batch, so that a killed run does not measure it again."""

from collections.abc import Callable, Container, Iterable, Iterator
from pathlib import Path
from typing import Any

from backtrack_jax.files import store
from backtrack_jax.files.console import Progress

Batch = list[tuple[int, float]]
"""(row number, value) of each row of a batch."""


def values(
    partial: Path,
    column: str,
    title: str,
    tokens: list[int],
    measure: Callable[[Container[int]], Iterable[Batch]],
) -> list[float]:
    """The value of every row, measured or taken from what an earlier run has left.

    Args:
      partial: file of the rows that are done, one a line.
      column: of the values in it.
      title: of the progress.
      tokens: of every row, for the progress.
      measure: gives the batches that have a row which is not among the given ones. Not called if all are done.

    Returns:
      One value a row, in their order.
    """

    def named(done: Container[int]) -> Iterator[list[tuple[int, dict[str, float]]]]:
        for batch in measure(done):
            yield [(row, {column: value}) for row, value in batch]

    return [line[column] for line in lines(partial, title, tokens, named)]


def lines(
    partial: Path,
    title: str,
    tokens: list[int],
    measure: Callable[[Container[int]], Iterable[list[tuple[int, dict[str, Any]]]]],
) -> list[dict[str, Any]]:
    """As `values`, of rows that have several values each, by name; `row` is taken."""
    found = {line["row"]: line for line in store.recover_lines(partial)}
    if len(found) < len(tokens):
        with Progress(title, len(tokens), len(found)) as progress:
            for batch in measure(frozenset(found)):
                new = {row: {"row": row} | line for row, line in batch if row not in found}
                store.append_lines(partial, new.values())
                found |= new
                progress.update(len(new), sum(tokens[row] for row in new))
    return [found[row] for row in range(len(tokens))]
