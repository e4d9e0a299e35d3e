"""Rows that are measured once, whatever a killed run has left of them."""

from collections.abc import Container, Iterator
from pathlib import Path

import pytest

from backtrack_jax.analysis import resumable

BATCHES = ([(3, 0.3), (0, 0.0)], [(1, 0.1), (2, 0.2)], [(4, 0.4)])
TOKENS = [5, 6, 7, 8, 9]


def measure(done: Container[int], killed_after: int = 9) -> Iterator[list[tuple[int, float]]]:
    for number, batch in enumerate(BATCHES):
        if all(row in done for row, _ in batch):
            continue
        if number == killed_after:
            raise KeyboardInterrupt
        yield batch


def test_a_killed_run_resumes_with_the_batch_that_it_lost(tmp_path: Path) -> None:
    partial, asked = tmp_path / "x.jsonl", []

    def once(done: Container[int]) -> Iterator[list[tuple[int, float]]]:
        asked.append([row for row in range(5) if row in done])
        return measure(done, killed_after=2)

    with pytest.raises(KeyboardInterrupt):
        resumable.values(partial, "value", "measuring", TOKENS, once)
    partial.write_text(partial.read_text()[:-9])  # the last line was cut
    assert resumable.values(partial, "value", "measuring", TOKENS, measure) == [0.0, 0.1, 0.2, 0.3, 0.4]
    assert asked == [[]]
    lines = partial.read_text().splitlines()
    assert len(lines) == len({line for line in lines}) == 5  # no row twice


def test_what_is_done_is_not_measured(tmp_path: Path) -> None:
    partial = tmp_path / "x.jsonl"
    first = resumable.values(partial, "value", "measuring", TOKENS, measure)

    def never(done: Container[int]) -> Iterator[list[tuple[int, float]]]:
        raise AssertionError("a model would be loaded")

    assert resumable.values(partial, "value", "measuring", TOKENS, never) == first
