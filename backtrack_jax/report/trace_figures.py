"""Fig. 1 and Fig. 6: a trace token by token, as a picture and as a table."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from backtrack_jax.analysis.results import Results
from backtrack_jax.data.text import KEYWORDS
from backtrack_jax.files import tables
from backtrack_jax.report.static import save

_COLUMNS, _LINES = 92, 26  # characters and lines that are shown
_GREEN, _RED = "#7FC97F", "#D55E00"


@dataclasses.dataclass(frozen=True)
class Token:
    """One token of a reply.

    Attributes:
      text: its text.
      read: whether a window of the experiment's label reads it.
      start: label of the section that starts with it, or empty.
      projection: of its centred activation, or NaN.
    """

    text: str
    read: bool
    start: str
    projection: float


def write_figures(r: Results, folder: Path) -> None:
    """The first shown trace, with its windows (Fig. 1), and shaded by the projection on the direction (Fig. 6)."""
    shown = r.projections[r.author]
    vector = 0  # the experiment's label, from the base model where it takes part
    at = shown["layers"].index(r.layer)
    values = [trace["values"][at][vector] for trace in shown["traces"]]
    trace = shown["traces"][0]
    written = tokens(trace, values[0], r.label)
    about = f"Reply {trace['id']}, read by the {r.author} model."
    write(
        written,
        r.label,
        folder / "fig1_trace",
        "Fig. 1: what is read",
        f"{about} Green: tokens of the read window {r.window}; red: first token of a {r.label} section.",
        None,
    )
    scale = 2.5 * float(np.sqrt(np.mean(np.square(np.concatenate(values)))))
    source = shown["vectors"][vector]["source"]
    write(
        written,
        r.label,
        folder / "fig6_projection",
        "Fig. 6: projection on the direction",
        f"{about} Shade: projection of the centred layer-{r.layer} activation on the {source}-derived {r.label} "
        f"vector, deepest at {scale:.3g}. Framed: Wait, Hmm (black), other starts of {r.label} sections (red).",
        scale or 1.0,
    )


def start_labels(starts: Sequence[tuple[str, int]], label: str) -> dict[int, str]:
    """Which section starts at a token; of several the one with the experiment's label, else the first."""
    return {at: name for name, at in sorted(reversed(starts), key=lambda start: start[0] == label)}


def tokens(trace: dict[str, Any], values: Sequence[float], label: str) -> list[Token]:
    """Tokens of a shown trace, with a projection of each; `label` is the experiment's."""
    read = set(trace["read"])
    starts = start_labels(trace["starts"], label)
    return [
        Token(text, i in read, starts.get(i, ""), value)
        for i, (text, value) in enumerate(zip(trace["tokens"], values, strict=True))
    ]


def write(shown: Sequence[Token], label: str, path: Path, title: str, caption: str, scale: float | None) -> None:
    """Writes the picture (PNG, PDF) and the table (CSV) of a trace.

    Args:
      shown: its tokens.
      label: whose starts are marked.
      path: of the files, without suffix.
      title: above the picture.
      caption: below it.
      scale: projection of the deepest shade; None marks the windows instead of shading (Fig. 1).
    """
    rows = [
        {"token": i, "text": t.text, "label": t.start, "read": int(t.read), "projection": t.projection}
        for i, t in enumerate(shown)
    ]
    tables.write(path.with_suffix(".csv"), rows)
    save(draw(shown, label, title, caption, scale), path)


def draw(shown: Sequence[Token], label: str, title: str, caption: str, scale: float | None) -> Figure:
    """The picture; a long trace is cut so that its first marked start stays in view."""
    placed, lines = _layout(shown, label)
    height = 0.19 * lines + 0.75
    figure = Figure(figsize=(8.6, height))
    axis = figure.add_axes((0.01, 0.4 / height, 0.98, 1 - 0.75 / height))
    axis.set_xlim(0, _COLUMNS)
    axis.set_ylim(lines, 0)
    axis.axis("off")
    shades = colormaps["RdBu_r"]
    for token, column, line, piece in placed:
        marked = token.start == label
        if scale is None:
            ground = _RED if marked else _GREEN if token.read else None
        else:
            ground = shades(0.5 + 0.5 * max(-1.0, min(1.0, token.projection / scale)) * 0.85)
        word = scale is not None and token.text.strip().casefold() in KEYWORDS
        edge = "black" if word else _RED if marked and scale is not None else "none"
        if ground is not None or edge != "none":
            box = Rectangle(
                (column, line + 0.06), len(piece), 0.88, facecolor=ground or "none", edgecolor=edge, linewidth=1
            )
            axis.add_patch(box)
        colour = "white" if scale is None and marked else "black"
        for i, character in enumerate(piece):  # on a grid, so that boxes fit whatever font there is
            if not character.isspace():
                axis.text(column + i + 0.5, line + 0.5, _safe(character), ha="center", va="center", fontsize=7.5, family="monospace", color=colour)  # fmt: skip  # noqa: E501
    figure.text(0.01, 1 - 0.08 / height, title, fontsize=10, va="top")
    figure.text(0.01, 0.08 / height, caption, fontsize=7.5, color="0.25", va="bottom", wrap=True)
    return figure


def _safe(character: str) -> str:
    """`$` would start a formula, and a character that no font here has would warn and draw a box."""
    return "\\$" if character == "$" else character if ord(character) < 0x2600 else "\u25a1"


def _layout(shown: Sequence[Token], label: str) -> tuple[list[tuple[Token, int, int, str]], int]:
    """(token, column, line, piece of its text without line breaks) of the tokens in view, and the number of lines."""
    placed: list[tuple[Token, int, int, str]] = []
    column = line = 0
    for token in shown:
        for n, piece in enumerate(token.text.split("\n")):
            if n:
                column, line = 0, line + (1 if column else 0)
            if column + len(piece) > _COLUMNS and piece.strip():
                column, line, piece = 0, line + 1, piece.lstrip(" ")
            piece = piece[:_COLUMNS]
            if piece:
                placed.append((token, column, line, piece))
                column += len(piece)
    first = next((line for token, _, line, _ in placed if token.start == label), 0)
    last = placed[-1][2] if placed else 0
    top = max(0, min(first - _LINES // 2, last + 1 - _LINES))
    kept = [(token, column, line - top, piece) for token, column, line, piece in placed if 0 <= line - top < _LINES]
    return kept, max((line for _, _, line, _ in kept), default=0) + 1
