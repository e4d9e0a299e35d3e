"""The magnitude that claims are read at: chosen by coherence, so that rates play no part in the choice."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from backtrack_jax.analysis import cells, replies
from backtrack_jax.analysis.claims import number
from backtrack_jax.analysis.replies import Line
from backtrack_jax.analysis.results import Cell, Results
from backtrack_jax.analysis.statistics import NAN, mean_interval
from backtrack_jax.data.records import Condition

LEVEL = 0.92
"""Coverage of the intervals that decide claims. At .90 some of them err in .056 of cases at the edge of a region."""

COHERENT = 0.9
"""What a token must still be likely, in units of the unsteered replies' tokens."""

RULE = "at the dose"
"""Said in the rule of every claim that is read there."""

DEFINITION = (
    f"The dose is the largest magnitude that keeps replies coherent: tokens at least {COHERENT:g} times as likely "
    "under the unsteered model as those of unsteered replies. Rates play no part in the choice."
)
"""Said once beside the claims; see `choose`."""

NONE = "read at the smallest magnitude, as none keeps replies coherent for sure"
"""Said in the note of every claim where this is so."""


class Coherence(NamedTuple):
    """Geometric mean probability of a token under the unsteered model, over that of unsteered replies."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{number(self.value)} ({number(self.low)} to {number(self.high)})"


class Dose(NamedTuple):
    """A steered cell at the magnitude that the rule gives, with its coherence."""

    cell: Cell
    coherence: Coherence

    @property
    def coherent(self) -> bool:
        """Whether it is coherent for sure."""
        return self.coherence.low >= COHERENT


def coherence(of_cell: Mapping[Condition, Sequence[Line]], cell: Cell, plain: Cell) -> Coherence:
    """Coherence of a cell, with its interval over the problems that it shares with the unsteered one."""
    sums = [_likelihoods(of_cell[Condition.of(one)]) for one in (cell, plain)]
    problems = sorted(set(sums[0]) & set(sums[1]))
    if not problems:
        return Coherence(NAN, NAN, NAN)
    totals, counts = np.array([[of[name] for name in problems] for of in sums]).transpose(2, 0, 1)
    difference = float((totals.sum(1) / counts.sum(1)) @ [1, -1])
    ends = mean_interval(totals, counts, [1, -1], level=LEVEL)
    return Coherence(*(math.exp(value) for value in (difference, *ends)))


def _likelihoods(lines: Sequence[Line]) -> dict[str, tuple[float, int]]:
    """Problem -> sum of its replies' log-likelihoods, and how many have one."""
    sums: dict[str, tuple[float, int]] = {}
    for line in lines:
        if math.isfinite(line["log_likelihood"]):
            total, count = sums.get(line["problem_id"], (0.0, 0))
            sums[line["problem_id"]] = total + line["log_likelihood"], count + 1
    return sums


def choose(of_cell: Mapping[Condition, Sequence[Line]], curve: Sequence[Cell], plain: Cell) -> Dose | None:
    """The cell of one curve that claims are read at.

    Magnitudes are tried from the smallest up, until one is not coherent for sure: in this order no test has to be
    corrected for the others.

    Args:
      of_cell: replies of each condition.
      curve: cells of one vector at one place, of which those steered along it are tried.
      plain: the unsteered cell of the same model.

    Returns:
      The dose; that of the smallest magnitude where not even this is coherent; None if there is no steered cell.
    """
    found = None
    for cell in sorted(cells.steered(curve), key=lambda cell: cell["magnitude"]):
        tried = Dose(cell, coherence(of_cell, cell, plain))
        if not tried.coherent:
            return found or tried
        found = tried
    return found


def of_run(r: Results) -> Dose | None:
    """The dose of the run's own vector: the base-derived one on the model that writes the traces, if both take part."""
    plain = r.unsteered(r.author)
    if plain is None:
        return None
    return choose(replies.by_cell(r.tables["replies"]), r.cells(r.author, r.label, r.roles[0]), plain)
