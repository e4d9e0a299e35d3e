"""The figure of the question of noise: a panel for each explanation."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from backtrack_jax.analysis.log_odds import AXIS, interval
from backtrack_jax.analysis.noise_contrasts import share_of
from backtrack_jax.analysis.noise_rows import (
    COVARIANCE,
    NOISE,
    PROMPT,
    RANDOM,
    VECTOR,
    magnitude,
    primary,
)
from backtrack_jax.analysis.noise_tables import (
    LAGS,
)
from backtrack_jax.analysis.plots import COLOURS, Panel, Plot, Series
from backtrack_jax.analysis.results import Results
from backtrack_jax.analysis.statistics import NAN
from backtrack_jax.data.records import UNSTEERED


def plot(r: Results) -> Plot | None:
    """A panel for each explanation."""
    if not r.tables["noise_contrasts"]:
        return None
    upper = [_projection_panel(r), _shift_panel(r)]
    lower = [_mediation_panel(r), _hazard_panel(r), _state_panel(r)]
    panels = [[panel for panel in row if panel.series] for row in (upper, lower)]
    panels = [row for row in panels if row]
    shown = [
        {"panel": panel.title, "series": series.label, "x": x, "y": y}
        | {"low": series.low[i] if len(series.low) else NAN, "high": series.high[i] if len(series.high) else NAN}
        for row in panels
        for panel in row
        for series in panel.series
        for i, (x, y) in enumerate(zip(series.x, series.y, strict=True))
    ]
    problems = max(line["problems"] for line in r.tables["noise_effects"])
    q = r.experiment.questions.noise
    caption = (
        f"Noise at magnitude {magnitude(r.experiment):g} ({r.experiment.steering.unit}) at layer {r.layer}, on given "
        f"text of {problems} problems, {q.draws} draws of the noise each. Effects: change of the log-odds of wait or "
        "hmm at sentence starts. Mediated: share of the effect that components at later layers carry, exchanged "
        "between runs with and without noise, position by position. Intervals of 95 % over problems (and seeds, of "
        "what is frozen for the run); p is Holm's over all contrasts but the primary one, "
        f"{primary(r.label)}, by equivalence."
    )
    return Plot("noise", "What noise does, and through what", caption, panels, shown, place=7.5)


def _series(name: str, x: Sequence[float], lines: Sequence[Mapping[str, Any]], column: str, **look: Any) -> Series:
    low, high = (f"{column}_low", f"{column}_high") if column != "estimate" else ("low", "high")
    y, low_ends, high_ends = ([line[of] for line in lines] for of in (column, low, high))
    return Series(name, x, y, low_ends, high_ends, **look)


def _look(i: int, style: str = "") -> dict[str, Any]:
    return {"colour": COLOURS[i], "style": style, "marker": "os^D"[i % 4]}


def _short(kind: str, label: str) -> str:
    """A name that fits below a panel."""
    for long, short in ((f":{label}", ":v"), ("noise-", ""), ("part-within", "part"), (COVARIANCE, "covariance")):
        kind = kind.replace(long, short)
    return kind.replace("matched-noise:", "").replace("noise keeping norm", "norm kept")


def _projection_panel(r: Results) -> Panel:
    """Effect of each row on both models."""
    found = {(line["role"], line["kind"]): line for line in r.tables["noise_effects"]}
    kinds = list(dict.fromkeys(line["kind"] for line in r.tables["noise_effects"] if line["kind"] != r.label))
    series = []
    for i, role in enumerate(reversed(r.roles)):
        own = [kind for kind in kinds if (role, kind) in found]
        x = [kinds.index(kind) + 0.2 * i - 0.1 for kind in own]
        if own:
            series.append(_series(f"{role} model", x, [found[role, kind] for kind in own], "effect", **_look(i)))
    shown = [_short(kind, r.label) for kind in kinds]
    return Panel("Projection and norm", "", AXIS, series, categories=shown, level=0.0)


def _shift_panel(r: Results) -> Panel:
    """Mean shift along each later layer's vector, under noise and under the vector, in mean residual norms."""
    series = []
    for i, (role, kind) in enumerate((role, kind) for role in reversed(r.roles) for kind in (NOISE, r.label)):
        own = [line for line in r.tables["noise_shift"] if (line["role"], line["added"]) == (role, kind)]
        lines = []
        for layer in sorted({line["layer"] for line in own}):
            values = np.array([line["shift"] for line in own if line["layer"] == layer]) / r.mean_norm(role, layer)
            low, high = interval(values) if len(values) > 1 else (NAN, NAN)
            lines.append({"layer": layer, "shift": float(values.mean()), "shift_low": low, "shift_high": high})
        if lines:
            name = "noise" if kind == NOISE else "vector"
            look = _look(i, ("-", "--")[kind != NOISE])
            series.append(_series(f"{name}, {role} model", [line["layer"] for line in lines], lines, "shift", **look))
    label = "shift along the vector, mean norms"
    return Panel("Downstream shift", "layer", label, series, level=0.0, whole=True)


def _mediation_panel(r: Results) -> Panel:
    """Shares that pass through the components."""
    series, names = [], [NOISE, r.label]
    for i, along in enumerate((VECTOR, RANDOM)):
        lines, x = [], []
        for n, added in enumerate(names):
            found = share_of(r.tables, added, along)
            if found is not None and all(map(math.isfinite, found[1])):
                x.append(n + 0.2 * i - 0.1)
                lines.append({"share": found[0], "share_low": found[1][0], "share_high": found[1][1]})
        if lines:
            series.append(_series(f"along {along}", x, lines, "share", **_look(i + 4)))
    return Panel("Mediation", "", "mediated share", series, categories=["noise", "vector added"], level=0.0)


def _hazard_panel(r: Results) -> Panel:
    """First keywords behind the burst."""
    series = []
    kinds = list(dict.fromkeys(line["kind"] for line in r.tables["noise_hazard"]))
    bins = [f"{first}-{stop - 1}" for first, stop in LAGS]
    for i, kind in enumerate(kinds):
        own = [line for line in r.tables["noise_hazard"] if line["kind"] == kind]
        own = [line for line in own if (line["first_lag"], line["last_lag"] + 1) in LAGS]
        x = [LAGS.index((line["first_lag"], line["last_lag"] + 1)) + 0.12 * (i - 1.5) for line in own]
        name = {UNSTEERED: "no noise", NOISE: "noise throughout", PROMPT: "in the prompt"}.get(kind, "burst")
        series.append(_series(name, x, own, "hazard", **_look(i)))
    title = "Errors: first keyword after a burst"
    return Panel(title, "tokens after the burst", "% per token", series, categories=bins, from_zero=True)


def _state_panel(r: Results) -> Panel:
    """Text by state, and the temperature of equal entropy."""
    of = {line["contrast"]: line for line in r.tables["noise_contrasts"]}
    names = {
        "text under noise less text without, read without noise": "its text",
        "noise less none, on text without noise": "its state, clean text",
        "noise less none, on text under noise": "its state, own text",
        "temperature of equal entropy less none": "its entropy",
        "noise less temperature of equal entropy": "less entropy",
    }
    own = [name for name in names if name in of]
    series = [_series("", range(len(own)), [of[n] for n in own], "estimate", **_look(0))] if own else []
    return Panel("Errors and entropy", "", AXIS, series, categories=[names[name] for name in own], level=0.0)
