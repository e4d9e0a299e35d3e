"""The figure of the question of composition: directions, the grid of the pair, and what is left without subspaces."""

import math

import numpy as np

from backtrack_jax.analysis.composition_rows import (
    ALONE,
    APART,
    GRID,
    NEGATIVE,
    ORDERED,
    OWN,
    RANDOM,
    SPAN,
    SYMMETRIC,
    WITHOUT,
    magnitude,
)
from backtrack_jax.analysis.log_odds import AXIS
from backtrack_jax.analysis.plots import COLOURS, Panel, Plot, Series
from backtrack_jax.analysis.results import Results
from backtrack_jax.analysis.statistics import NAN
from backtrack_jax.files.tables import Table

_ABSURD = 1e3  # times the vector's effect
_SHORT = {OWN: "own", WITHOUT: "+", NEGATIVE: "−", "reasoning less base": "difference", "difference of problems": "SV"}


def plot(r: Results) -> Plot | None:
    """Directions above, the pair and the subspaces below."""
    lines = [line for line in r.tables["composition"] if math.isfinite(line["share"])]
    if not lines:
        return None
    upper = [_by_cosine(lines), _apart(lines, r.label)]
    lower = [panel for panel in (_grid(r), _interaction(r), _necessity(r)) if panel.series]
    own = next(line for line in lines if (line["direction"], line["form"]) == (r.label, ALONE))
    pair = next((f"{one['direction']}, {one['form']}" for one in r.tables["composition_grid"]), "none")
    e = r.experiment
    caption = (
        f"Directions of the {r.author} model added at layer {r.layer} and magnitude {magnitude(e):g} "
        f"({e.steering.unit}) while it reads given text of {own['problems']} problems. Shares are of the effect of the "
        f"{r.label} vector v, {own['effect']:.2f} nats ({own['effect_low']:.2f} to {own['effect_high']:.2f}), on the "
        "log-odds of wait or hmm at sentence starts; the dashed diagonal is what a direction's part along v would do. "
        f"The pair is v and {pair}, chosen on the other half of the texts; the index of interaction is f(a,b) - f(a,0) "
        "- f(0,b) + f(0,0). Left: v is added and a subspace removed from all later layers, beside random subspaces of "
        f"the same variance (middle 95 % of {e.questions.composition.subspaces}). Intervals of 95 % over problems."
    )
    return Plot("composition", "Other directions", caption, [upper, lower] if lower else [upper], lines, place=7.2)


def _series(label: str, x: list[float], lines: Table, column: str, i: int, ends: tuple[str, str]) -> Series:
    y, low, high = ([_drawn(line[name]) for line in lines] for name in (column, *ends))
    return Series(label, x, y, low, high, colour=COLOURS[i], style="", marker="os^D"[i % 4])


def _drawn(value: float) -> float:
    """What can be drawn: a share of an effect that cannot be told from 0 has no bounds, or absurd ones."""
    return value if abs(value) < _ABSURD else NAN


def _by_cosine(lines: Table) -> Panel:
    series = [Series("part along v alone", [-1.0, 0.0, 1.0], [-1.0, 0.0, 1.0], colour="#888888", style="--")]
    for i, (label, forms) in enumerate(
        {"as it is": (ALONE,), "orthogonalised": (ORDERED, SYMMETRIC), "without the others": APART}.items()
    ):
        own = [line for line in lines if line["form"] in forms]
        series.append(_series(label, [x["cosine"] for x in own], own, "share", i, ("share_low", "share_high")))
    return Panel("Effect and cosine with v", "cosine with v", "share of v's effect", series, level=0.0)


def _apart(lines: Table, label: str) -> Panel:
    own = [line for line in lines if line["form"] in APART and line["direction"] != label]
    own += [line for line in lines if line["direction"] == RANDOM]
    names = [_name(line) for line in own]
    x = [float(i) for i in range(len(own))]
    series = [_series("", x, own, "share", 2, ("share_low", "share_high"))] if own else []
    return Panel("No part along v", "", "share of v's effect", series, categories=names, level=0.0)


def _name(line: dict) -> str:
    name = line["direction"]
    for long, short in _SHORT.items():
        name = name.replace(long, short)
    return name if line["form"] == ALONE else f"{name} {_SHORT[line['form']]}"


def _grid(r: Results) -> Panel:
    """Change of the mean log-odds along v, for each strength of the other direction."""
    lines = [line for line in r.tables["composition_grid"] if line["pair"] == "direction"]
    if not lines:
        return Panel("", "", "")
    mean = {
        (a, b): np.mean([line["log_odds"] for line in lines if (line["a"], line["b"]) == (a, b)])
        for a in GRID
        for b in GRID
    }
    series = [
        Series(
            f"b = {b:g}", GRID, [float(mean[a, b] - mean[0.0, 0.0]) for a in GRID], colour=COLOURS[i], marker="os^Do"[i]
        )
        for i, b in enumerate(GRID)
    ]
    return Panel("v (a) and the other (b)", "a, share of the magnitude", AXIS, series, level=0.0)


def _interaction(r: Results) -> Panel:
    lines = [line for line in r.tables["composition_interaction"] if line["scale"] == "log-odds"]
    own = [line for line in lines if not line["pair"].startswith(RANDOM)]
    if not own:
        return Panel("", "", "")
    names = ["pair" if line["pair"] == "direction" else "v and v" for line in own]
    series = [_series("", [float(i) for i in range(len(own))], own, "estimate", 0, ("low", "high"))]
    drawn = [line["estimate"] for line in lines if line["pair"].startswith(RANDOM)]
    if drawn:
        series.append(Series("", [float(len(own))] * len(drawn), drawn, colour=COLOURS[6], style="", marker="o"))
        names.append("v and random")
    return Panel("Interaction", "", "index, nats", series, categories=names, level=0.0)


def _necessity(r: Results) -> Panel:
    lines = r.tables["composition_necessity"]
    if not lines:
        return Panel("", "", "")
    names = [line["removed"].replace(f"{SPAN}, ", "span of ") for line in lines]
    x = [float(i) for i in range(len(lines))]
    series = [_series("removed", [at - 0.12 for at in x], lines, "left", 1, ("left_low", "left_high"))]
    drawn = [(at + 0.12, line) for at, line in zip(x, lines, strict=True) if line["draws"]]
    if drawn:
        of, ends = [line for _, line in drawn], ("random_low", "random_high")
        series.append(_series("random, same variance", [at for at, _ in drawn], of, "random", 6, ends))
    return Panel("Removed from later layers", "", "share of v's effect left", series, categories=names, level=1.0)
