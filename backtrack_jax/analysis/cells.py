"""What figures, sentences and tables say of cells, the conditions of a sweep with their rates."""

import hashlib
import math
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any, NamedTuple

from backtrack_jax.analysis import replies
from backtrack_jax.analysis.plots import Series
from backtrack_jax.analysis.results import Cell, Results, extent
from backtrack_jax.analysis.statistics import NAN
from backtrack_jax.data.records import UNSTEERED, Condition
from backtrack_jax.files.tables import Table
from backtrack_jax.kinds import parse

MEASURES = (
    ("rate", "wait, hmm: % of words", 100),
    ("log_likelihood", "log-likelihood, nats/token", 1),
    ("repeated_3grams", "repeated 3-grams, % ", 100),
)
"""Columns of rates.csv with what stands at the axis, and the factor."""

RATE_INTERVAL = "Bars: 95 % intervals over problems (Clopper-Pearson at the effective sample size)."
TOO_FEW = "fewer than 4 problems"
"""Said in place of a maximum where there are too few problems for two halves."""

_UNITS = {
    "absolute": "magnitude = norm added (mean residual norm {norm:.3g})",
    "relative": "magnitude, in mean residual norms (1 = {norm:.3g})",
    "raw": "magnitude, in raw vectors (mean residual norm {norm:.3g})",
    "kl": "magnitude = cost, nats per token",
}


class Highest(NamedTuple):
    """The cell that was chosen for its rate, measured on problems that did not choose it.

    Attributes:
      cell: over the problems of the second half.
      unsteered: the unsteered cell of the same model, over the same problems; None if it was not sampled.
    """

    cell: Cell
    unsteered: Cell | None


def highest(r: Results, cells: Sequence[Cell], *, either_way: bool = False) -> Highest | None:
    """The steered cell that has the highest rate, without the luck that made it the highest.

    Of many cells that are equal in truth the highest shows a multiple of their rate. So the problems that all cells
    have, and the unsteered cell of their model, are split in halves; the first chooses, the second measures.

    Args:
      r: the results.
      cells: lines of rates.csv, of one steered model.
      either_way: whether negative magnitudes count too, as they have to where a direction's sign means nothing: noise,
        random directions, and whatever a vector is compared with. Else cells steered along the direction alone do.

    Returns:
      The cell; of ties, the most steered. None if there is none, or fewer than two problems in a half.
    """
    tried = steered(cells, either_way=either_way)
    if not tried:
        return None
    plain = r.unsteered(tried[0]["target"])
    of_cell = replies.by_cell(r.tables["replies"])
    members = {Condition.of(cell): of_cell[Condition.of(cell)] for cell in [*tried, *([plain] if plain else [])]}
    first, second = halves(set.intersection(*({line["problem_id"] for line in of} for of in members.values())))
    if len(first) < 2 or len(second) < 2:
        return None
    measured = [
        {Condition.of(cell): cell for cell in _over(half, members.values())} for half in (set(first), set(second))
    ]
    names = [Condition.of(cell) for cell in tried]
    best = max(names, key=lambda name: (measured[0][name]["rate"], abs(name.magnitude)))
    return Highest(measured[1][best], measured[1][Condition.of(plain)] if plain else None)


def steered(cells: Sequence[Cell], *, either_way: bool = False) -> list[Cell]:
    """The cells that are steered along the direction, or either way."""
    return [c for c in cells if c["kind"] != UNSTEERED and (c["magnitude"] > 0 or either_way)]


def halves(problems: Iterable[str]) -> tuple[list[str], list[str]]:
    """Two halves of some problems, the same ones whenever the problems are; the first is the larger one.

    By turns, in the order of a hash of the names, so that categories that follow one another are in both.
    """
    order = sorted(problems, key=lambda name: hashlib.sha256(name.encode()).digest())
    return order[::2], order[1::2]


def _over(problems: Container[str], members: Iterable[Sequence[replies.Line]]) -> Table:
    return replies.summarise([line for of in members for line in of if line["problem_id"] in problems])


def under_own_vectors(r: Results, target: str) -> list[Cell]:
    """Cells of a model under the experiment's vector from either model, with the unsteered one."""
    return [cell for source in r.roles for cell in r.cells(target, r.label, source)]


def interval(cell: Cell) -> str:
    """95 % interval of a cell's rate in % of words; empty where there are no words."""
    return "" if math.isnan(cell["low"]) else f"{100 * cell['low']:.2f} to {100 * cell['high']:.2f}"


def rate(cell: Cell) -> str:
    """Rate of a cell in % of words, with its interval."""
    bounds = interval(cell)
    return percent(cell["rate"]) + (f" ({bounds})" if bounds else "")


def percent(share: float) -> str:
    """A share in %, or `-` where it is not defined."""
    return "-" if math.isnan(share) else f"{100 * share:.2f}"


def at_magnitude(cell: Cell) -> str:
    """Rate of a cell, and the magnitude that it was reached at."""
    return f"{rate(cell)} at magnitude {cell['magnitude']:g}"


def by_halves(found: Highest) -> str:
    """Of how many problems the highest rate is, to be appended."""
    return f", {found.cell['n_problems']} problems that did not choose it"


def on_fewer(r: Results, cell: Cell) -> str:
    """How many problems a cell has, to be appended where it has fewer than the run."""
    return f", {cell['n_problems']} problems" if cell["n_problems"] < r.n_problems else ""


def counted(cells: Sequence[Cell]) -> str:
    """How many replies to how many problems a cell has."""
    return f"{extent(cells, 'n_replies')} replies to {extent(cells, 'n_problems')} problems a cell"


def setting(r: Results) -> str:
    """Where, and on how many tokens, what is added acts."""
    s = r.experiment.steering
    return f"layer {r.layer}, span '{s.span}', window {r.window}, at most {s.max_new_tokens} new tokens"


def unit_label(r: Results, role: str, kinds: Sequence[str] = ()) -> str:
    """Label of the magnitude axis of these kinds (none: directions that are added): unit and mean residual norm."""
    return _with_shares(_UNITS[r.experiment.steering.unit].format(norm=r.mean_norm(role, r.layer)), kinds)


def unit_of_layers(r: Results, kinds: Sequence[str] = ()) -> str:
    """Label of the magnitude axis of these kinds over several layers, whose norms differ."""
    units = _UNITS | {
        "absolute": "magnitude = norm added",
        "relative": "magnitude, in each layer's mean residual norm",
        "raw": "magnitude, in each layer's raw vector",
    }
    return _with_shares(units[r.experiment.steering.unit], kinds)


def _with_shares(label: str, kinds: Sequence[str]) -> str:
    shares = [parse(kind).edits[0].operation for kind in kinds if parse(kind).what.strength == "share"]
    if not shares:
        return label
    return "magnitude = share" if len(shares) == len(kinds) else f"{label}\n{', '.join(dict.fromkeys(shares))}: share"


def curve(
    label: str, cells: Sequence[Cell], measure: str, factor: float, line: dict[str, Any], shift: float = 0.0
) -> Series:
    """A measure of cells against their magnitude, with its interval.

    Args:
      label: in the legend.
      cells: of one curve.
      measure: column of rates.csv.
      factor: that it is multiplied by.
      line: colour, style and marker, see `plots.line_of`.
      shift: of the steered points to the right.
    """
    prefix = "" if measure == "rate" else f"{measure}_"
    low, high = ([factor * cell[prefix + end] for cell in cells] for end in ("low", "high"))
    return Series(
        label,
        [cell["magnitude"] + (shift if cell["magnitude"] else 0) for cell in cells],
        [factor * cell[measure] for cell in cells],
        low,
        high,
        **line,
    )


def grid(
    cells: Sequence[Cell],
    row_of: Callable[[Cell], Any],
    rows: Sequence[Any],
    magnitudes: Sequence[float],
    measure: str,
    factor: float,
) -> list[list[float]]:
    """[rows][magnitudes] of a measure; the unsteered cell fills the column of magnitude 0."""
    values = {(row_of(c), c["magnitude"]): factor * c[measure] for c in cells if c["kind"] != UNSTEERED}
    plain = next((factor * c[measure] for c in cells if c["kind"] == UNSTEERED), NAN)
    return [[plain if m == 0 else values.get((row, m), NAN) for m in magnitudes] for row in rows]


def unique(cells: Sequence[Cell]) -> list[Cell]:
    """The cells without repetitions, in order."""
    return [cell for at, cell in enumerate(cells) if cell not in cells[:at]]
