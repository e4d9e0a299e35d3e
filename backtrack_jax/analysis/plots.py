"""What a figure shows, apart from how it is drawn: `report` draws it once for paper and once for the page.

One style everywhere: Okabe and Ito's colours, which any colour vision tells apart, without the yellow that is lost on
white. The colour (and beyond seven kinds, the marker) tells what is added, the line style which model it comes from.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

# Okabe and Ito's, told apart by the colour-blind too; brown instead of their yellow, which is faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C510A")
MARKERS = ("o", "s", "^", "D")
STYLES = {"base": "-", "reasoning": "--", "": ":"}


@dataclasses.dataclass(frozen=True)
class Series:
    """Points of one curve.

    Attributes:
      label: in the legend.
      x: coordinates, or category numbers where the panel has categories.
      y: values; NaN leaves a gap.
      low: lower ends of intervals, or empty.
      high: upper ends of intervals, or empty.
      colour: of points and line.
      style: matplotlib's name of the line style; empty for points alone.
      marker: matplotlib's name of the marker.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    colour: str = COLOURS[0]
    style: str = "-"
    marker: str = "o"


@dataclasses.dataclass(frozen=True)
class Heat:
    """Cells of a heat map.

    Attributes:
      x: column names.
      y: row names, top row first.
      values: [rows][columns]; NaN where a cell was not measured.
      label: of the colour bar.
      diverging: colours that meet at 0, from -1 to 1; else from 0, or from the lowest value up.
    """

    x: Sequence[str]
    y: Sequence[str]
    values: Sequence[Sequence[float]]
    label: str
    diverging: bool = False


@dataclasses.dataclass(frozen=True)
class Panel:
    """One pair of axes with curves or a heat map.

    Attributes:
      title: above it.
      x_label: with the unit.
      y_label: with the unit.
      series: curves.
      heat: a heat map in their place.
      categories: names of x = 0, 1, ... where x counts things.
      level: height of a dashed line of reference, or None.
      whole: whether x are whole numbers (layers).
      from_zero: whether the y axis starts at 0.
    """

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series] = ()
    heat: Heat | None = None
    categories: Sequence[str] = ()
    level: float | None = None
    whole: bool = False
    from_zero: bool = False


@dataclasses.dataclass(frozen=True)
class Plot:
    """A figure.

    Attributes:
      name: of its files.
      title: what it is, with the paper's number where it has one.
      caption: conditions, unit, n and interval.
      panels: rows of panels.
      rows: the table that it was drawn from, for its CSV.
      place: number of the paper's figure, or where among them it belongs; those without one come last.
    """

    name: str
    title: str
    caption: str
    panels: Sequence[Sequence[Panel]]
    rows: Sequence[Mapping[str, Any]]
    place: float = math.inf


def line_of(number: int, source: str) -> dict[str, Any]:
    """Colour, style and marker of the `number`-th kind from a source."""
    colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number // len(COLOURS) % len(MARKERS)]
    return {"colour": colour, "style": STYLES[source], "marker": marker}
