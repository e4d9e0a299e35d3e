"""Figures for paper: PNG, PDF and CSV of a `Plot`."""

import io
import textwrap
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from backtrack_jax.analysis.plots import Heat, Panel, Plot
from backtrack_jax.files import store, tables

_WIDTH, _HEIGHT = 3.9, 2.6  # inches of a panel
_LINE = 0.17  # inches of a line of the caption
_TURNED: dict[str, Any] = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"}  # of long names at an axis


def write(plot: Plot, folder: Path) -> None:
    """Writes `{name}.png`, `.pdf` and `.csv`; equal plots give equal bytes."""
    tables.write(folder / f"{plot.name}.csv", plot.rows)
    with as_text():
        save(draw(plot), folder / plot.name)


def as_text() -> AbstractContextManager[None]:
    """In it, text that is drawn is text: a dollar sign in an id, a label or a path begins no mathematics."""
    return matplotlib.rc_context({"text.parse_math": False})


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as `path` with the suffixes .png and .pdf."""
    for suffix, metadata in (("png", None), ("pdf", {"CreationDate": None})):
        drawn = io.BytesIO()
        figure.savefig(drawn, format=suffix, dpi=170, metadata=metadata)
        store.write_bytes(path.with_name(f"{path.name}.{suffix}"), drawn.getbuffer())


def draw(plot: Plot) -> Figure:
    """The figure: panels, one legend beside them, caption below."""
    rows, columns = len(plot.panels), max(len(row) for row in plot.panels)
    heats = any(panel.heat for row in plot.panels for panel in row)
    labels = list(dict.fromkeys(s.label for row in plot.panels for panel in row for s in panel.series))
    legend = 0.0 if len(labels) < 2 else 0.5 + 0.065 * max(map(len, labels))
    width = max(columns * (_WIDTH + 0.3 * heats) + legend, 5.2)
    caption = textwrap.wrap(plot.caption, int(width * 15.5))
    tallest = [max(_height(panel) for panel in row) for row in plot.panels]
    height = sum(tallest) + 0.4 + _LINE * len(caption)
    # A figure of its own, not pyplot's: no window system is looked for, nothing is kept after it is written.
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, height_ratios=tallest)
    for number, (row, panels) in enumerate(zip(axes, plot.panels, strict=True)):
        for axis in row[len(panels) :]:
            axis.set_visible(False)
        below = plot.panels[number + 1] if number + 1 < rows else ()
        for column, (axis, panel) in enumerate(zip(row, panels, strict=False)):
            if column and not panel.heat and panel.y_label == panels[0].y_label:
                axis.sharey(row[0])
            _draw_heat(figure, axis, plot, panel) if panel.heat else _draw_curves(axis, panel)
            axis.set_title(panel.title, fontsize=9)
            axis.tick_params(labelsize=8)
            if column >= len(below) or below[column].x_label != panel.x_label:
                axis.set_xlabel(panel.x_label, fontsize=8)
            if not column or panel.y_label != panels[0].y_label:
                axis.set_ylabel(panel.y_label, fontsize=8)
    for row, panels in zip(axes, plot.panels, strict=True):
        for axis in (axis for axis, panel in zip(row, panels, strict=False) if panel.from_zero):
            # Only now: a limit that is set no longer grows with the panels that share the axis.
            bottom, top = axis.get_ylim()
            axis.set_ylim(min(bottom, -0.03 * top), top)
    if legend:
        found = {
            text: handle for axis in axes.flat for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)
        }
        figure.legend(found.values(), found.keys(), loc="outside right upper", frameon=False, fontsize=8)
    figure.suptitle(plot.title, fontsize=10, x=0.01, ha="left")
    figure.supxlabel("\n".join(caption), fontsize=7.5, x=0.01, ha="left", color="0.25")
    return figure


def _height(panel: Panel) -> float:
    return _HEIGHT if not panel.heat else max(_HEIGHT, 0.22 * len(panel.heat.y) + 1.0)


def _draw_curves(axis: Axes, panel: Panel) -> None:
    for s in panel.series:
        line = {"color": s.colour, "linestyle": s.style or "none", "marker": s.marker, "ms": 4, "linewidth": 1.4}
        if len(s.low):
            y = np.asarray(s.y, float)
            ends = np.nan_to_num([y - np.asarray(s.low, float), np.asarray(s.high, float) - y])
            axis.errorbar(s.x, y, yerr=np.maximum(ends, 0), label=s.label, capsize=2, elinewidth=0.8, **line)
        else:
            axis.plot(s.x, s.y, label=s.label, alpha=1 if s.style else 0.55, **line)
    if panel.level is not None:
        axis.axhline(panel.level, color="0.5", linewidth=0.8, linestyle=(0, (4, 3)))
    if panel.categories:
        many = len(panel.categories) > 4
        names = [name if many else "\n".join(textwrap.wrap(name, 13)) for name in panel.categories]
        axis.set_xticks(range(len(names)), names, fontsize=8, **(_TURNED if many else {}))
        axis.set_xlim(-0.6, len(names) - 0.4)
    elif panel.whole:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25, linewidth=0.6)


def _draw_heat(figure: Figure, axis: Axes, plot: Plot, panel: Panel) -> None:
    heat = panel.heat
    assert heat is not None
    values = np.ma.masked_invalid(np.array(heat.values, float))
    low, high = colour_range(plot, heat)
    image = axis.imshow(values, aspect="auto", cmap="RdBu_r" if heat.diverging else "viridis", vmin=low, vmax=high)
    axis.set_facecolor("0.9")
    axis.set_xticks(range(len(heat.x)), heat.x, **(_TURNED if max(map(len, heat.x)) > 5 else {}))
    axis.set_yticks(range(len(heat.y)), heat.y)
    if len(heat.x) <= 12:
        _write_cells(axis, values, low, high, heat.diverging)
    bar = figure.colorbar(image, ax=axis, shrink=0.9, pad=0.02)
    bar.set_label(heat.label, fontsize=8)
    bar.ax.tick_params(labelsize=7)


def _write_cells(axis: Axes, values: np.ma.MaskedArray, low: float, high: float, diverging: bool) -> None:
    for (row, column), value in np.ndenumerate(values.filled(np.nan)):
        if np.isfinite(value):
            share = (value - low) / (high - low or 1)
            dark = abs(share - 0.5) > 0.35 if diverging else share < 0.6
            text = f"{value:.2f}" if abs(value) < 9.95 else f"{value:.0f}"
            axis.text(column, row, text, ha="center", va="center", fontsize=6.5, color="white" if dark else "black")


def colour_range(plot: Plot, heat: Heat) -> tuple[float, float]:
    """Lowest and highest value of the colour scale, one for all heat maps of a figure that show the same measure."""
    if heat.diverging:
        return -1.0, 1.0
    same = [p.heat for row in plot.panels for p in row if p.heat and p.heat.label == heat.label]
    finite = [v for other in same for row in other.values for v in row if np.isfinite(v)] or [0.0]
    low = 0.0 if min(finite) >= 0 else min(finite)
    return low, max(finite) if max(finite) > low else low + 1
