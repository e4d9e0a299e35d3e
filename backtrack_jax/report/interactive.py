"""Figures for the page: a `Plot` as a plotly figure, whose colours of text and ground the page sets."""

import html
import json
import math
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from backtrack_jax.analysis.plots import Panel, Plot
from backtrack_jax.report.static import colour_range

_DASHES = {"-": "solid", "--": "dash", ":": "dot", "": "solid"}
_SYMBOLS = {"o": "circle", "s": "square", "^": "triangle-up", "D": "diamond"}


def figure(plot: Plot) -> dict[str, Any]:
    """Data and layout of a plotly figure, as JSON values."""
    rows, columns = len(plot.panels), max(len(row) for row in plot.panels)
    heats = any(panel.heat for row in plot.panels for panel in row)
    titles = [panel.title for row in plot.panels for panel in [*row, *[_BLANK] * (columns - len(row))]]
    # Titles stand below the tool bar, which is there all the time where nothing can hover.
    top = 56 if any(panel.title for panel in plot.panels[0]) else 30
    labelled = any(series.label for row in plot.panels for panel in row for series in panel.series)
    between = max((_room_below(panel, columns) for row in plot.panels[:-1] for panel in row), default=0)
    area = sum(max(_height(panel) for panel in row) for row in plot.panels) + between * (rows - 1)
    last = max(_room_below(panel, columns) for panel in plot.panels[-1]) - _NEXT_TITLE
    bottom = max(last, 60) + (50 if labelled else 0)
    made = make_subplots(
        rows,
        columns,
        subplot_titles=[html.escape(title) for title in titles],
        horizontal_spacing=(0.3 if heats else 0.2) / columns if columns > 1 else 0,
        vertical_spacing=between / area,
    )
    named: set[str] = set()
    for r, row in enumerate(plot.panels):
        below = plot.panels[r + 1] if r + 1 < rows else ()
        for c, panel in enumerate(row):
            _heat(made, plot, panel, r + 1, c + 1) if panel.heat else _curves(made, panel, r + 1, c + 1, named)
            _label_axes(made, panel, row[0], c >= len(below) or below[c].x_label != panel.x_label, r + 1, c + 1)
            if angle := _angle(panel, columns):
                made.update_xaxes(tickangle=angle, row=r + 1, col=c + 1)
    made.update_layout(
        template=None,
        height=top + area + bottom,
        margin={"l": 60, "r": 20, "t": top, "b": bottom},
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": "rgba(128,128,128,0.6)", "activecolor": "rgb(128,128,128)"},
        legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        hovermode="closest",
    )
    made.update_annotations(font_size=13)
    return json.loads(str(made.to_json()))


def _label_axes(made: go.Figure, panel: Panel, first: Panel, lowest: bool, row: int, column: int) -> None:
    """Titles where they are not those of a neighbour; curves of one measure share their scale along a row."""
    if lowest:
        made.update_xaxes(title_text=html.escape(panel.x_label), row=row, col=column)
    if panel.whole:
        made.update_xaxes(tickformat="d", row=row, col=column)
    same = panel is not first and panel.y_label == first.y_label
    if not same:
        made.update_yaxes(title_text=html.escape(panel.y_label), row=row, col=column)
    if panel.heat and first.heat and panel is not first and panel.heat.y == first.heat.y:
        made.update_yaxes(title_text="", showticklabels=False, row=row, col=column)
    elif same:
        leader: Any = made.get_subplot(row, 1)
        made.update_yaxes(matches=leader.yaxis.plotly_name.replace("axis", ""), row=row, col=column)


_BLANK = Panel("", "", "")


def _height(panel: Panel) -> int:
    return max(250, 110 + 20 * len(panel.heat.y)) if panel.heat else 250


_NEXT_TITLE = 30  # pixels that the title of the panel below takes
_LETTER, _LINE = 6.5, 19  # pixels


def _angle(panel: Panel, columns: int) -> int:
    """Degrees by which the names of categories are turned: not, where they fit side by side; upright, where many."""
    width, names = 900 / columns, panel.categories
    if sum(len(name) + 2 for name in names) * _LETTER < width:
        return 0
    return -40 if len(names) * _LINE < width else -90


def _room_below(panel: Panel, columns: int) -> int:
    """Pixels for what stands below a panel: names or numbers, the axis' title, and the next panel's title."""
    names = 18
    if angle := _angle(panel, columns):
        names = 12 + int(max(map(len, panel.categories)) * _LETTER * abs(math.sin(math.radians(angle))))
    return names + (42 if panel.x_label else 8) + _NEXT_TITLE


def _curves(made: go.Figure, panel: Panel, row: int, column: int, named: set[str]) -> None:
    for s in panel.series:
        bars = None
        if len(s.low):
            above = [_gap(high, y) for y, high in zip(s.y, s.high, strict=True)]
            below = [_gap(y, low) for y, low in zip(s.y, s.low, strict=True)]
            bars = {"type": "data", "array": above, "arrayminus": below, "thickness": 1, "width": 3}
        made.add_trace(
            go.Scatter(
                x=list(s.x),
                y=[None if math.isnan(y) else y for y in s.y],
                error_y=bars,
                name=html.escape(s.label),
                legendgroup=s.label,
                showlegend=bool(s.label) and s.label not in named,
                mode="lines+markers" if s.style else "markers",
                line={"color": _shown(s.colour), "dash": _DASHES[s.style], "width": 2},
                marker={"symbol": _SYMBOLS[s.marker], "size": 7, "color": _shown(s.colour)},
                opacity=1 if s.style else 0.6,
            ),
            row=row,
            col=column,
        )
        named.add(s.label)
    if panel.categories:  # as numbers, so that points side by side stay there
        names = [html.escape(name) for name in panel.categories]
        made.update_xaxes(tickvals=list(range(len(names))), ticktext=names, row=row, col=column)
    if panel.level is not None:
        line: dict[str, Any] = {"dash": "dash", "width": 1, "color": "gray"}
        made.add_shape(
            type="line", x0=0, x1=1, xref="x domain", y0=panel.level, y1=panel.level, line=line, row=row, col=column
        )
    if panel.from_zero:
        made.update_yaxes(rangemode="tozero", row=row, col=column)


def _heat(made: go.Figure, plot: Plot, panel: Panel, row: int, column: int) -> None:
    heat = panel.heat
    assert heat is not None
    low, high = colour_range(plot, heat)
    subplot: Any = made.get_subplot(row, column)
    across, down = subplot.xaxis.domain, subplot.yaxis.domain
    made.add_trace(
        go.Heatmap(
            x=list(heat.x),
            y=list(heat.y),
            z=[[None if math.isnan(v) else v for v in values] for values in heat.values],
            zmin=low,
            zmax=high,
            colorscale="RdBu" if heat.diverging else "Viridis",
            reversescale=heat.diverging,
            colorbar={
                "title": {"text": html.escape(heat.label), "side": "right"},
                "x": across[1] + 0.005,
                "xanchor": "left",
                "y": sum(down) / 2,
                "len": down[1] - down[0],
                "thickness": 10,
            },
            hovertemplate="%{y}, %{x}: %{z:.3g}<extra></extra>",
            hoverongaps=False,
        ),
        row=row,
        col=column,
    )
    made.update_xaxes(type="category", row=row, col=column)
    made.update_yaxes(type="category", autorange="reversed", row=row, col=column)


def _shown(colour: str) -> str:
    """Black would be lost on the dark page."""
    return "#808080" if colour == "#000000" else colour


def _gap(upper: float, lower: float) -> float:
    return 0.0 if math.isnan(upper - lower) else max(0.0, upper - lower)
