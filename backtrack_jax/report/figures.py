"""The paper's figures, each a `Plot` made from the tables of stage 5; one whose sweep was not run is left out."""

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from backtrack_jax.config import is_vector_file
from backtrack_jax.data.records import LABELS, UNSTEERED, window_name
from backtrack_jax.report.plots import COLOURS, MARKERS, Heat, Panel, Plot, Series, line_of
from backtrack_jax.report.results import Results, Rows

_NAN = float("nan")
_UNITS = {
    "absolute": "magnitude = norm added (mean residual norm {norm:.3g})",
    "relative": "magnitude, in mean residual norms (1 = {norm:.3g})",
    "raw": "magnitude, in raw vectors (mean residual norm {norm:.3g})",
}
# Columns of rates.csv with what stands at the axis, and the factor.
_MEASURES = (
    ("rate", "wait, hmm: % of words", 100),
    ("log_likelihood", "log-likelihood, nats/token", 1),
    ("repeated_3grams", "repeated 3-grams, % ", 100),
)


def all_figures(r: Results) -> list[Plot]:
    """Every figure that the results give, in the paper's order."""
    makers: list[Callable[[Results], Plot | None]] = [
        offsets, pairs, similarity, baselines, lens, probe, layers, metrics, effects, label_cosines, reliability,
    ]  # fmt: skip
    return [plot for maker in makers if (plot := maker(r)) is not None]


def unit_label(r: Results, role: str) -> str:
    """Label of a magnitude axis: its unit, and the mean residual norm."""
    s = r.experiment.steering
    return _UNITS[s.unit].format(norm=r.mean_norm(role, s.main_layer))


def _layer_unit(r: Results) -> str:
    """Label of a magnitude axis over several layers, whose norms differ."""
    units = {"absolute": "magnitude = norm added", "relative": "magnitude, in each layer's mean residual norm"}
    return units.get(r.experiment.steering.unit, "magnitude, in each layer's raw vector")


def counted(rows: Rows) -> str:
    """How many replies to how many problems a cell has."""
    return f"{_range(rows, 'n_replies')} replies to {_range(rows, 'n_problems')} problems a cell"


def _range(rows: Rows, name: str) -> str:
    values = [row[name] for row in rows]
    return f"{min(values)}" if min(values) == max(values) else f"{min(values)} to {max(values)}"


def _where(r: Results) -> str:
    s = r.experiment.steering
    return f"layer {s.main_layer}, span '{s.span}', window {r.window}, at most {s.max_new_tokens} new tokens"


_COHERENCE = (
    "Beside the rate (Eq. 1): mean log-likelihood of the reply under the unsteered model, and repeated 3-grams."
)
_INTERVAL = "Bars: 95 % bootstrap interval over problems"
# Of 3000 draws from the unsteered replies of configs/organism.py's reasoning model; other cells are alike.
TOO_NARROW = (
    "too narrow where these are few (drawn from the shipped run's unsteered replies, intervals of 24, 12, 8 and 4 "
    "problems held the true rate in .92, .90, .89 and .83 of cases)"
)
_RATE_INTERVAL = f"{_INTERVAL}, {TOO_NARROW}; a rate of 0 has none."


def _curve(label: str, cells: Rows, measure: str, factor: float, line: dict[str, Any], shift: float = 0.0) -> Series:
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


def pairs(r: Results) -> Plot | None:
    """Fig. 3: rate against magnitude for the pairs of steered model and source of the vector."""
    label = r.experiment.vectors.label
    if label not in r.experiment.steering.kinds:
        return None
    found = {(t, s): r.cells(t, label, s) for t in r.roles for s in r.roles}
    panels = []
    for measure, y_label, factor in _MEASURES:
        row = []
        for target in r.roles:
            series = [
                _curve(f"{s}-derived vector", found[target, s], measure, factor, line_of(r.roles.index(s), s))
                for s in r.roles
            ]
            title = f"{target} model" if measure == "rate" else ""
            row.append(Panel(title, unit_label(r, target), y_label, series, from_zero=measure == "rate"))
        panels.append(row)
    rows = [cell for cells in found.values() for cell in cells]
    rows = [row for i, row in enumerate(rows) if row not in rows[:i]]
    caption = f"{label} vectors, {_where(r)}; {counted(rows)}. {_RATE_INTERVAL} {_COHERENCE}"
    return Plot("fig3_pairs", "Fig. 3: model and vector", caption, panels, rows)


def baselines(r: Results) -> Plot | None:
    """Fig. 4: the experiment's vector against other directions, on the model that writes the traces."""
    s, author = r.experiment.steering, r.author
    kinds = [kind for kind in s.all_kinds if r.cells(author, kind, author) or r.cells(author, kind, "")]
    found = {}
    for kind in kinds:
        own = [row for row in r.cells(author, kind, author) if row["kind"] == kind]
        cells = r.cells(author, kind, author if own else "")
        if any(cell["kind"] == kind for cell in cells):
            found[kind] = cells
    if not set(found) - {r.experiment.vectors.label}:
        return None
    names = [Path(kind).name if is_vector_file(kind) else kind for kind in found]
    names = [name if names.count(name) == 1 else kind for name, kind in zip(names, found, strict=True)]
    magnitudes = [cell["magnitude"] for cells in found.values() for cell in cells]
    aside = 0.006 * (max(magnitudes) - min(magnitudes))  # so that intervals do not hide each other
    lines = [
        (name, cells, line_of(i, "base"), aside * (i - (len(found) - 1) / 2))
        for i, (name, cells) in enumerate(zip(names, found.values(), strict=True))
    ]
    panels = [
        [
            Panel(
                "",
                unit_label(r, author),
                y_label,
                [_curve(name, cells, measure, factor, line, shift) for name, cells, line, shift in lines],
                from_zero=measure == "rate",
            )
        ]
        for measure, y_label, factor in _MEASURES
    ]
    rows = [cell for cells in found.values() for cell in cells]
    rows = [row for i, row in enumerate(rows) if row not in rows[:i]]
    files = " or as a file has them" if s.vector_files else ""
    equal = "" if s.unit == "raw" and s.vector_files else ", all of equal norm at a magnitude"
    caption = (
        f"{author} model, directions from its own activations{files}{equal}; {_where(r)}; "
        f"{counted(rows)}. noise: fresh at every position and step; random: one fixed direction; shuffled: D+ drawn "
        f"from all sections. {_RATE_INTERVAL} Points of one magnitude stand side by side. {_COHERENCE}"
    )
    return Plot("fig4_baselines", f"Fig. 4: baselines on the {author} model", caption, panels, rows)


def _grid(cells: Rows, row_of: Callable[[dict[str, Any]], Any], rows: Sequence[Any], columns: Sequence[float],
          measure: str, factor: float) -> list[list[float]]:  # fmt: skip
    """[rows][columns] of a measure; the unsteered cell fills the column of magnitude 0."""
    values = {(row_of(c), c["magnitude"]): factor * c[measure] for c in cells if c["kind"] != UNSTEERED}
    plain = next((factor * c[measure] for c in cells if c["kind"] == UNSTEERED), _NAN)
    return [[plain if m == 0 else values.get((row, m), _NAN) for m in columns] for row in rows]


def offsets(r: Results) -> Plot | None:
    """Fig. 2: rate by offset of the window and magnitude, reasoning-derived vectors on the reasoning model."""
    e, author = r.experiment, r.author
    names = {window_name(e.vectors.window_at(offset)): offset for offset in e.steering.offsets}
    if not names:
        return None
    cells = r.offset_cells()
    magnitudes = e.steering.grid_magnitudes or e.steering.magnitudes
    panels = [[
        Panel(
            "", unit_label(r, author), "offset from the section's start, tokens" if not i else "",
            heat=Heat(
                [f"{m:g}" for m in magnitudes],
                [str(offset) for offset in names.values()],
                _grid(cells, lambda c: c["window"], list(names), magnitudes, measure, factor),
                y_label,
            ),
        )
        for i, (measure, y_label, factor) in enumerate(_MEASURES[:2])
    ]]  # fmt: skip
    drawn = [cell for cell in cells if cell["magnitude"] in magnitudes]
    first, last = e.vectors.offset_window
    read = "single positions" if first == last == 0 else f"positions offset{first:+d} to offset{last:+d}"
    caption = (
        f"{author}-derived {e.vectors.label} vectors read at one offset each ({read}), added to the {author} model; "
        f"layer {e.steering.main_layer}, span '{e.steering.span}'; {counted(drawn)}, the same ones in every cell. "
        "Right: mean log-likelihood under the unsteered model."
    )
    return Plot("fig2_offsets", "Fig. 2: offset of the window", caption, panels, cells)


def layers(r: Results) -> Plot | None:
    """Fig. B.1: rate by layer and magnitude, for vectors of either model."""
    e, author = r.experiment, r.author
    if not e.steering.layers:
        return None
    magnitudes = e.steering.grid_magnitudes or e.steering.magnitudes
    used, panels = r.layer_cells(), []
    for source in r.roles:
        cells = [cell for cell in used if cell["source"] in ("", source)]
        panels.append([
            Panel(
                f"{source}-derived", _layer_unit(r), "layer" if not i else "",
                heat=Heat(
                    [f"{m:g}" for m in magnitudes],
                    [str(layer) for layer in e.steering.layers],
                    _grid(cells, lambda c: c["layer"], e.steering.layers, magnitudes, measure, factor),
                    y_label,
                ),
            )
            for i, (measure, y_label, factor) in enumerate(_MEASURES[:2])
        ])  # fmt: skip
    drawn = [cell for cell in used if cell["magnitude"] in magnitudes]
    norms = [r.mean_norm(author, layer) for layer in e.steering.layers]
    caption = (
        f"{e.vectors.label} vectors of each layer added at that layer of the {author} model, window {r.window}, span "
        f"'{e.steering.span}'; {counted(drawn)}, the same ones in every cell. Mean residual norms of these layers: "
        f"{min(norms):.3g} to {max(norms):.3g}. Right: mean log-likelihood under the unsteered model."
    )
    return Plot("figB1_layers", "Fig. B.1: layer", caption, panels, used)


def lens(r: Results) -> Plot | None:
    """Fig. 5: mean logit of the keyword items of each layer's vector, Eq. 2, through either unembedding."""
    rows = r.tables["lens"]
    panels = []
    for final_norm, title in ((0, "W_U v (Eq. 2)"), (1, "with the final norm")):
        series = [
            Series(
                f"{source}-derived, {head} unembedding",
                [row["layer"] for row in found],
                [row["score"] for row in found],
                colour=COLOURS[r.roles.index(source)],
                style="-" if head == "base" else "--",
                marker=MARKERS[r.roles.index(source)],
            )
            for source in r.roles
            for head in r.roles
            for found in [
                [x for x in rows if (x["source"], x["unembedding"], x["final_norm"]) == (source, head, final_norm)]
            ]
        ]
        panels.append(Panel(title, "layer", "mean logit of the keywords", series, level=0.0, whole=True))
    words = ", ".join(f'"{word}"' for word in r.experiment.analysis.keywords)
    caption = (
        f"Mean logit of vocabulary items whose text contains {words} (any case) for the {r.experiment.vectors.label} "
        f"vector of each layer, as found (not normalised), window {r.window}. The final norm takes the vector's length "
        "away."
    )
    return Plot("fig5_logit_lens", "Fig. 5: logit lens", caption, [panels], rows)


def similarity(r: Results) -> Plot | None:
    """Text 3.2: cosine of base- and reasoning-derived vectors, by label and layer."""
    rows = r.tables["similarity"]
    if len(r.roles) < 2 or not rows:
        return None
    labels = _ordered({row["label"] for row in rows}, r.experiment.vectors.label)
    series = [
        Series(
            label,
            [row["layer"] for row in rows if row["label"] == label],
            [row["cosine"] for row in rows if row["label"] == label],
            **line_of(i, "base"),
        )
        for i, label in enumerate(labels)
    ]
    panel = Panel("", "layer", "cosine", series, whole=True)
    caption = (
        f"Cosine of base- and reasoning-derived difference-of-means vectors of each label, window {r.window}. The "
        "paper gives about 0.74 for backtracking at layer 10 of Llama-3.1-8B."
    )
    return Plot("cosine_by_layer", "Section 3.2: base- against reasoning-derived vectors", caption, [[panel]], rows)


def _ordered(labels: set[str], first: str) -> list[str]:
    """The experiment's label first, then the paper's order, then any other."""
    order = [first, *LABELS, *sorted(labels)]
    return [label for label in dict.fromkeys(order) if label in labels]


def label_cosines(r: Results) -> Plot | None:
    """Cosines of the labels' vectors with each other, at the steered layer."""
    layer = r.experiment.steering.main_layer
    rows = [row for row in r.tables["label_cosines"] if row["layer"] == layer]
    labels = _ordered({row["label"] for row in rows}, r.experiment.vectors.label)
    if len(labels) < 2:
        return None
    value = {(row["role"], row["label"], row["other"]): row["cosine"] for row in rows}
    matrices = {role: [[value.get((role, a, b), _NAN) for b in labels] for a in labels] for role in r.roles}
    panels = [
        Panel(f"{role}-derived", "", "", heat=Heat(labels, labels, matrices[role], "cosine", True)) for role in r.roles
    ]
    caption = f"Cosines of the labels' difference-of-means vectors at layer {layer}, window {r.window}."
    return Plot("label_cosines", "Vectors of the labels", caption, [panels], rows)


def reliability(r: Results) -> Plot | None:
    """Split-half reliability of every label's vector."""
    rows = r.tables["reliability"]
    kept = sorted({row["layer"] for row in rows})
    if not kept:
        return None
    layer = r.experiment.steering.main_layer if r.experiment.steering.main_layer in kept else kept[-1]
    rows = [row for row in rows if row["layer"] == layer]
    labels = [*_ordered({row["label"] for row in rows} - {"shuffled"}, r.experiment.vectors.label), "shuffled"]
    read = {(w["role"], w["label"]): w["read"] for w in r.tables["windows"] if w["window"] == r.window}
    series = []
    for i, role in enumerate(r.roles):
        found = {row["label"]: row for row in rows if row["role"] == role}
        series.append(
            Series(
                f"{role}-derived",
                [n + 0.12 * (2 * i - 1) * (len(r.roles) > 1) for n, label in enumerate(labels) if label in found],
                *([found[label][name] for label in labels if label in found] for name in ("cosine", "low", "high")),
                colour=COLOURS[i],
                style="",
                marker=MARKERS[i],
            )
        )
    names = [f"{label} ({read.get((r.author, label), 0)})" for label in labels]
    splits = _range([row for row in rows if row["n_splits"]] or rows, "n_splits")  # a label of no split has no point
    caption = (
        f"Cosine of the vectors of two random halves of the problems at layer {layer}: mean and 2.5 to 97.5 % of "
        f"{splits} splits. In brackets: windows read. shuffled: D+ drawn at random from all sections."
    )
    panel = Panel("", "", "split-half cosine", series, categories=names, level=0.0)
    return Plot("reliability", "Split-half reliability of the vectors", caption, [[panel]], rows)


def probe(r: Results) -> Plot | None:
    """Text 4.2: how well projections tell that a section begins within the next tokens."""
    rows = r.tables["probe"]
    kept = sorted({row["layer"] for row in rows})
    if not kept:
        return None
    layer = r.experiment.steering.main_layer if r.experiment.steering.main_layer in kept else kept[-1]
    mine = [row for row in rows if row["layer"] == layer]
    methods = list(dict.fromkeys(row["method"] for row in mine))
    series: dict[str, list[Series]] = {"auc": [], "average_precision": []}
    keys = [(role, horizon) for role in r.roles for horizon in r.experiment.analysis.horizons]
    for i, (role, horizon) in enumerate(keys):
        found = [row for row in mine if (row["role"], row["horizon"]) == (role, horizon)]
        x = [methods.index(row["method"]) + 0.24 * (i - (len(keys) - 1) / 2) / max(1, len(keys) - 1) for row in found]
        label = f"{role} model, next {horizon} tokens"
        line: dict[str, Any] = {"colour": COLOURS[i % len(COLOURS)], "style": "", "marker": MARKERS[i % 4]}
        ends = ([row["low"] for row in found], [row["high"] for row in found])
        series["auc"].append(Series(label, x, [row["auc"] for row in found], *ends, **line))
        series["average_precision"].append(Series(label, x, [row["average_precision"] for row in found], **line))
    counted_on = [row for row in mine if (row["role"], row["method"]) == (r.author, "random directions")]
    shares = {row["horizon"]: row["n_positive"] / max(1, row["n_tokens"]) for row in counted_on}
    chance = next(iter(shares.values())) if len(shares) == 1 else None
    panels = [
        Panel("", "", "ROC-AUC", series["auc"], categories=methods, level=0.5),
        Panel(
            "", "", "average precision", series["average_precision"], categories=methods, level=chance, from_zero=True
        ),
    ]
    positive = ", ".join(f"{100 * share:.1f} % within {horizon}" for horizon, share in shares.items())
    caption = (
        f"Does a {r.experiment.vectors.label} section start within the next tokens? Layer {layer}; "
        f"{_range(mine, 'n_tokens')} tokens of {_range(mine, 'n_problems')} problems, positive: {positive}; every "
        f"problem is scored by what was fitted on others. {_INTERVAL}. Random directions: mean and middle 95 % of 50. "
        "Dashed: chance."
    )
    return Plot("probe", "Section 4.2: the direction as a probe", caption, [panels], rows)


def metrics(r: Results) -> Plot | None:
    """Variants of the metric on the experiment's own vector."""
    label, author = r.experiment.vectors.label, r.author
    if label not in r.experiment.steering.kinds:
        return None
    cells = r.cells(author, label, author)
    names = {
        "rate": "words of the reply (Eq. 1)",
        "substring_rate": "substrings, prompt + reply (released)",
        "token_rate": "keyword tokens",
        "sentence_rate": "sentences with a keyword",
    }
    judged = ""
    if any(c["judge_rate"] == c["judge_rate"] for c in cells):
        judged = f", of which the judge labelled {_range(cells, 'n_judged')}"
        names["judge_rate"] = f"sentences that backtrack, by {_reply_judge(r)}"
    curves = [_curve(text, cells, n, 100, line_of(i, "base")) for i, (n, text) in enumerate(names.items())]
    panels = [
        Panel("", unit_label(r, author), y_label, series, from_zero=True)
        for y_label, series in (("% of words, tokens", curves[:3]), ("% of sentences", curves[3:]))
    ]
    caption = (
        f"The same replies, counted in {len(names)} ways: {author}-derived vector on the {author} model, {_where(r)}; "
        f"{counted(cells)}{judged}. {_RATE_INTERVAL}"
    )
    return Plot("metrics", "The metric and its variants", caption, [panels], cells)


def _reply_judge(r: Results) -> str:
    judge = r.experiment.analysis.judge
    return r.experiment.annotations.openai.model if judge == "openai" else f"the {judge}"


def effects(r: Results) -> Plot | None:
    """Effect on every problem: does the vector work on each, or on a few?"""
    label, author, layer = r.experiment.vectors.label, r.author, r.experiment.steering.main_layer
    rows = [
        row
        for row in r.tables["effects"]
        if (row["target"], row["kind"], row["layer"], row["window"]) == (author, label, layer, r.window)
    ]
    if not rows:
        return None
    problems = sorted({row["problem_id"] for row in rows})
    counts = Counter((row["source"], row["magnitude"]) for row in rows)
    magnitudes = sorted({row["magnitude"] for row in rows})
    lane = 0.38 * min((b - a for a, b in itertools.pairwise(magnitudes)), default=1.0)  # of a source, at a magnitude
    place = {problem: lane * (n + 0.5) / len(problems) for n, problem in enumerate(problems)}

    series = [
        Series(
            f"{source}-derived vector",
            [
                row["magnitude"] + lane * (i - len(r.roles) / 2) + place[row["problem_id"]]
                for row in rows
                if row["source"] == source
            ],
            [100 * row["effect"] for row in rows if row["source"] == source],
            colour=COLOURS[i],
            style="",
            marker=MARKERS[i],
        )
        for i, source in enumerate(r.roles)
    ]
    panel = Panel("", unit_label(r, author), "change of the rate, % of words", series, level=0.0)
    points = _range([{"points": count} for count in counts.values()], "points")
    caption = (
        f"Rate under steering less the unsteered rate, one point per problem ({points}), side by side in one order at "
        f"each magnitude; {author} model, {_where(r)}."
    )
    return Plot("effects", "Effect on single problems", caption, [[panel]], rows)
