"""What figures, sentences and tables say of cells, the conditions of a sweep with their rates."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from backtrack_jax.analysis.plots import Series
from backtrack_jax.analysis.results import Cell, Results, extent
from backtrack_jax.analysis.statistics import NAN
from backtrack_jax.data.records import UNSTEERED
from backtrack_jax.kinds import parse

MEASURES = (
    ("rate", "wait, hmm: % of words", 100),
    ("log_likelihood", "log-likelihood, nats/token", 1),
    ("repeated_3grams", "repeated 3-grams, % ", 100),
)
"""Columns of rates.csv with what stands at the axis, and the factor."""

INTERVAL = "Bars: 95 % bootstrap interval over problems"
# Of 3000 draws from the unsteered replies of configs/organism.py's reasoning model; other cells are alike.
TOO_NARROW = (
    "too narrow where these are few (drawn from the shipped run's unsteered replies, intervals of 24, 12, 8 and 4 "
    "problems held the true rate in .92, .90, .89 and .83 of cases)"
)
RATE_INTERVAL = f"{INTERVAL}, {TOO_NARROW}; a rate of 0 has none."

_UNITS = {
    "absolute": "magnitude = norm added (mean residual norm {norm:.3g})",
    "relative": "magnitude, in mean residual norms (1 = {norm:.3g})",
    "raw": "magnitude, in raw vectors (mean residual norm {norm:.3g})",
}


def highest(cells: Sequence[Cell], *, either_way: bool = False) -> Cell | None:
    """The steered cell that has the highest rate; of ties, the most steered.

    Args:
      cells: lines of rates.csv.
      either_way: whether negative magnitudes count too, as they have to where a direction's sign means nothing: noise,
        random directions, and whatever a vector is compared with. Else cells steered along the direction alone do.
    """
    steered = (c for c in cells if c["kind"] != UNSTEERED and (c["magnitude"] > 0 or either_way))
    return max(steered, key=lambda cell: (cell["rate"], abs(cell["magnitude"])), default=None)


def under_own_vectors(r: Results, target: str) -> list[Cell]:
    """Cells of a model under the experiment's vector from either model, with the unsteered one."""
    return [cell for source in r.roles for cell in r.cells(target, r.label, source)]


def interval(cell: Cell) -> str:
    """95 % interval of a cell's rate in % of words; empty where there is none.

    Problems without a hit, drawn again, never have one: there the bootstrap would be sure of 0. The rule of three says
    how high the rate may be: 3 / words.
    """
    if cell["n_words"] and not cell["n_hits"]:
        return f"no hit in {cell['n_words']} words: at most {min(100, 300 / cell['n_words']):.2f}"
    return "" if math.isnan(cell["low"]) else f"{100 * cell['low']:.2f} to {100 * cell['high']:.2f}"


def rate(cell: Cell) -> str:
    """Rate of a cell in % of words, with its interval where there is one."""
    bounds = interval(cell)
    return percent(cell["rate"]) + (f" ({bounds})" if bounds else "")


def percent(share: float) -> str:
    """A share in %, or `-` where it is not defined."""
    return "-" if math.isnan(share) else f"{100 * share:.2f}"


def at_magnitude(cell: Cell) -> str:
    """Rate of a cell, and the magnitude that it was reached at."""
    return f"{rate(cell)} at magnitude {cell['magnitude']:g}"


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
    units = {"absolute": "magnitude = norm added", "relative": "magnitude, in each layer's mean residual norm"}
    return _with_shares(units.get(r.experiment.steering.unit, "magnitude, in each layer's raw vector"), kinds)


def _with_shares(label: str, kinds: Sequence[str]) -> str:
    shares = [parse(kind).operation for kind in kinds if parse(kind).what.strength == "share"]
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
