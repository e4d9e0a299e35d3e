"""How alike vectors are: those of two models (text 3.2), and those of two labels.

similarity.csv, at every layer, and with intervals and shuffles at the layers of `vectors.layers`:
  cosine, low, high                 of the two models' vectors of a label as they were read
  corrected, ..._low, ..._high      of their expectations, without the noise of having read so many problems (c*)
  corrected_error                   standard error of that
  shuffled, ..._low, ..._high       of vectors of sections drawn at random in the same traces: mean, middle 95 %
  shuffled_95                       95 % quantile of these
  norm_{role}, ..._shuffled, ..._95 length of a model's vector; mean and 95 % quantile of those of the same draws
  n_problems                        problems that have a window of the label
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from backtrack_jax import vectors
from backtrack_jax.analysis import by_problem, shuffles
from backtrack_jax.analysis.base import Analysis, Material
from backtrack_jax.analysis.claims import Claim, all_of, measured
from backtrack_jax.analysis.dose import LEVEL
from backtrack_jax.analysis.plots import COLOURS, Heat, Panel, Plot, Series, line_of
from backtrack_jax.analysis.results import PAPER_LABEL, Results
from backtrack_jax.analysis.statistics import NAN, Region, percentiles, verdict
from backtrack_jax.config import ROLES
from backtrack_jax.data.records import LABELS
from backtrack_jax.files.tables import Table

_ALIKE = Region(0.6, 0.95)
_MEASURED = (
    *("low", "high", "corrected", "corrected_low", "corrected_high", "corrected_error"),
    *("shuffled", "shuffled_low", "shuffled_high", "shuffled_95"),
)


class Similarity(Analysis):
    """Cosines of the difference-of-means vectors, at every layer."""

    name = "similarity"
    version = 2
    of_replies = False
    settings = ("seed",)
    tables = ("similarity", "label_cosines")

    def finish(self, material: Material, folder: Path) -> dict[str, Table]:
        """From the vectors, and from the means of single sections at the layers where these were kept."""
        return {"similarity": _between_models(material), "label_cosines": _between_labels(material)}

    def plots(self, r: Results) -> Sequence[Plot | None]:
        """Cosine by layer; labels beside their shuffles, and beside each other, at the steered layer."""
        return [by_layer(r), norms(r), label_cosines(r)]

    def sentences(self, r: Results) -> Sequence[str]:
        """The cosine of the models' vectors at the steered layer, beside its null."""
        found = _of_experiment(r)
        if not found or math.isnan(found[0]["cosine"]):
            return []
        line, paper = found[0], " (paper: 0.74)" if r.label == PAPER_LABEL else ""
        said = (
            f"Base- and reasoning-derived {r.label} vectors have cosine {line['cosine']:.3f} at layer {r.layer}{paper}"
        )
        return [f"{said}{_beside(line)}."]

    def reference(self, r: Results) -> dict[str, str]:
        """The same, and the norms."""
        found = {}
        for line in _of_experiment(r) if r.label == PAPER_LABEL else ():
            if not math.isnan(line["cosine"]):
                found["cosine"] = f"{line['cosine']:.3f} at layer {r.layer}{_beside(line)}"
            for role in r.roles:
                most = line[f"norm_{role}_95"]
                beside = "" if math.isnan(most) else f"; shuffled within traces up to {most:.3g}"
                found[f"norm_{role}"] = f"{line[f'norm_{role}']:.3g}{beside}"
        return found

    def claims(self, r: Results) -> Sequence[Claim]:
        """That the two vectors are alike, more than those of shuffled sections, but not the same."""
        if len(r.roles) < 2:
            return []
        line = next(iter(_of_experiment(r)), None)
        if line is None or math.isnan(line["corrected_error"]):
            kept = r.experiment.vectors.layers
            why = (
                f"vectors.layers={kept} keeps no means of sections at the steered layer {r.layer}"
                if r.layer not in kept
                else f"too few problems have windows of {r.label!r}, or their noise hides the vector"
            )
            return [_claim(r, NAN, (NAN, NAN), "undecided", int(line["n_problems"]) if line else 0, why)]
        n, note = int(line["n_problems"]), f"raw {line['cosine']:.3f}, shuffles below {line['shuffled_95']:.3f}"
        interval = by_problem.cosine_interval(line["corrected"], line["corrected_error"], n, LEVEL)
        above = _above_null(line)
        if above != "holds":
            note += ": no more alike than shuffled sections may be"
        found = all_of([verdict(*interval, _ALIKE, n), above])
        return [_claim(r, line["corrected"], interval, found, n, note)]


SIMILARITY = Similarity()


def cosine_matrix(directions: np.ndarray) -> np.ndarray:
    """Cosines of K vectors [K, D] with each other, [K, K] float64; nan where one of them is zero."""
    x = np.asarray(directions, np.float64)
    norms = np.linalg.norm(x, axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return x @ x.T / np.outer(norms, norms)


def _between_models(material: Material) -> Table:
    """Norms of every label's vectors, and the cosine of the two models' ones, at every layer."""
    roles = material.experiment.roles
    lines = []
    for label in material.labels:
        if not all((role, label) in material.vectors for role in roles):
            continue
        found = {role: material.vectors[role, label] for role in roles}
        cosines = vectors.cosine(found["base"], found["reasoning"]) if len(found) == len(ROLES) else None
        kept = _at_kept_layers(material, label)
        for layer in range(len(next(iter(found.values())).directions)):
            cosine = NAN if cosines is None else float(cosines[layer])
            line = {"label": label, "layer": layer, "cosine": cosine} | dict.fromkeys(_MEASURED, NAN)
            for role, vector in found.items():
                line |= {
                    f"norm_{role}": float(vector.norms[layer]),
                    f"norm_{role}_shuffled": NAN,
                    f"norm_{role}_95": NAN,
                }
            lines.append(line | {"n_problems": 0} | kept.get(layer, {}))
    return lines


def _at_kept_layers(material: Material, label: str) -> dict[int, dict[str, Any]]:
    """Layer -> what is known where the means of sections were kept."""
    roles, layers = material.experiment.roles, material.experiment.vectors.layers
    if not layers:
        return {}
    ids = [trace.id for trace, _ in material.pairs]
    drawn = shuffles.shuffle(material.sums, ids, label, seed=material.experiment.seed)
    together = np.zeros(len(ids), int)
    found: dict[int, dict[str, Any]] = {}
    for layer in layers:
        sums = {role: by_problem.of_label(material, role, label, layer) for role in roles}
        null = {
            role: shuffles.shuffled_sums(drawn, material, role, ids, label, layer, together).vectors(np.array([True]))
            for role in roles
        }
        found[layer] = line = {}
        for role in roles:
            lengths = np.linalg.norm(null[role], axis=-1)
            line[f"norm_{role}_shuffled"] = float(lengths.mean())
            line[f"norm_{role}_95"] = float(np.quantile(lengths, 0.95))
        line["n_problems"] = min(of_role.n_problems for of_role in sums.values())
        if len(roles) == len(ROLES):
            line |= _cosines(sums["base"], sums["reasoning"]) | _null(null["base"], null["reasoning"])
    return found


def _cosines(a: by_problem.ProblemSums, b: by_problem.ProblemSums) -> dict[str, float]:
    """Intervals of the raw cosine, and the corrected one."""
    n, raw = min(a.n_problems, b.n_problems), by_problem.cosine(a, b)
    low, high = by_problem.cosine_interval(float(raw[0]), by_problem.standard_error(raw), n)
    corrected, error = by_problem.corrected_cosine(a, b)
    bounds = by_problem.cosine_interval(corrected, error, n)
    return {
        **{"low": low, "high": high, "corrected": corrected},
        **{"corrected_low": bounds[0], "corrected_high": bounds[1], "corrected_error": error},
    }


def _null(base: np.ndarray, reasoning: np.ndarray) -> dict[str, float]:
    """Cosines of the models' vectors of the same sections, [R, D] each."""
    lengths = np.linalg.norm(base, axis=-1) * np.linalg.norm(reasoning, axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosines = np.sum(base * reasoning, -1, dtype=np.float64) / lengths
    low, high = percentiles(cosines)
    _, most = percentiles(cosines, (0.5, 0.95))
    return {"shuffled": float(cosines.mean()), "shuffled_low": low, "shuffled_high": high, "shuffled_95": most}


def _between_labels(material: Material) -> Table:
    """Cosines of every two labels' vectors of one model at every layer."""
    lines = []
    for role in material.experiment.roles:
        found = {label: material.vectors[role, label] for of, label in material.vectors if of == role}
        labels = [label for label in dict.fromkeys([*LABELS, *sorted(found)]) if label in found]
        for layer in range(material.sums[role].sums.shape[1]):
            matrix = cosine_matrix(np.stack([found[label].at(layer) for label in labels]))
            lines += [
                {"role": role, "layer": layer, "label": a, "other": b, "cosine": float(matrix[i, j])}
                for i, a in enumerate(labels)
                for j, b in enumerate(labels)
            ]
    return lines


def _of_experiment(r: Results) -> Table:
    return [line for line in r.tables["similarity"] if (line["label"], line["layer"]) == (r.label, r.layer)]


def _beside(line: dict[str, Any]) -> str:
    """What a raw cosine is to be read against, as far as it is known."""
    said = ""
    if not math.isnan(line["corrected"]):
        ends = (line["corrected_low"], line["corrected_high"])
        bounds = "" if math.isnan(ends[0]) else f" ({ends[0]:.3f} to {ends[1]:.3f})"
        said += f"; corrected for noise {line['corrected']:.3f}{bounds}"
    if not math.isnan(line["shuffled"]):
        most = line["shuffled_95"]
        said += f"; sections shuffled within traces have {line['shuffled']:.3f}, 95 % of draws below {most:.3f}"
    return said


def _above_null(line: dict[str, Any]) -> str:
    """A randomisation test of the raw cosine at 5 %; it fails where its whole interval is below the null's quantile."""
    if line["cosine"] > line["shuffled_95"]:
        return "holds"
    return "fails" if line["high"] < line["shuffled_95"] else "undecided"


def _claim(r: Results, estimate: float, interval: tuple[float, float], found: str, n: int, note: str) -> Claim:
    return measured(
        "cosine",
        f"Base- and reasoning-derived {r.label} vectors are alike, but not the same.",
        figure="cosine_by_layer",
        where="section 3.2",
        rule=(
            f"c*, the cosine corrected for noise, lies between {_ALIKE.low:g} and {_ALIKE.high:g}, and the raw cosine "
            "above the 95 % quantile of vectors of sections shuffled within their traces"
        ),
        estimate=estimate,
        interval=interval,
        unit=f"cosine at layer {r.layer}",
        region=_ALIKE,
        n=n,
        note=note,
        given=found,
    )


def by_layer(r: Results) -> Plot | None:
    """Text 3.2: cosine of base- and reasoning-derived vectors, by label and layer, corrected, and of shuffles."""
    table = r.tables["similarity"]
    if len(r.roles) < 2 or not table:
        return None
    labels, series = r.labels(table), []
    for i, label in enumerate(labels):
        own = [line for line in table if line["label"] == label]
        x, y = ([line[name] for line in own] for name in ("layer", "cosine"))
        series.append(Series(label, x, y, **line_of(i, "base")))
    panels = [Panel("as read", "layer", "cosine", series, whole=True)]
    caption = (
        f"Cosine of base- and reasoning-derived difference-of-means vectors of each label, window {r.window}. The "
        "paper gives about 0.74 for backtracking at layer 10 of Llama-3.1-8B."
    )
    kept = r.experiment.vectors.layers
    if kept:
        layer = _kept_layer(r)
        at = {line["label"]: line for line in table if line["layer"] == layer}
        of_label = [at[label] for label in labels]
        own = [line for line in table if line["label"] == labels[0] and line["layer"] in kept]
        if len(own) > 1:
            of_layers = _beside_null(own, [x["layer"] for x in own], 0.1)
            panels.append(Panel(labels[0], "layer", "cosine", of_layers, whole=True))
        x = list(range(len(labels)))
        panels.append(Panel(f"layer {layer}", "", "cosine", _beside_null(of_label, x, 0.2), categories=labels))
        caption += (
            f" As read: with the noise of so many problems ({of_label[0]['n_problems']} with {labels[0]}), which the "
            "models have in part in common. Corrected (c*): from products of different problems alone. Intervals: "
            "95 %, over problems. Shuffled: vectors of as many sections, drawn at random in the same traces, mean and "
            f"middle 95 % of {shuffles.N_DRAWS} draws: what any sections of these traces reach."
        )
    title = "Section 3.2: base- against reasoning-derived vectors"
    return Plot("cosine_by_layer", title, caption, [panels], table, place=3.2)


def _kept_layer(r: Results) -> int:
    """The steered layer if the means of its sections were kept, else the last one of which they were."""
    kept = r.experiment.vectors.layers
    return r.layer if r.layer in kept else max(kept)


def _beside_null(lines: Table, x: Sequence[float], apart: float) -> list[Series]:
    """Cosines as read, corrected, and of shuffles, side by side."""
    kinds = (
        ("as read", ("cosine", "low", "high"), "o"),
        ("corrected (c*)", ("corrected", "corrected_low", "corrected_high"), "s"),
        ("shuffled within traces", ("shuffled", "shuffled_low", "shuffled_high"), "^"),
    )
    return [
        Series(
            label,
            [at + apart * (i - 1) for at in x],
            *([line[name] for line in lines] for name in names),
            colour=COLOURS[i],
            style="",
            marker=marker,
        )
        for i, (label, names, marker) in enumerate(kinds)
    ]


def norms(r: Results) -> Plot | None:
    """Length of every label's vector beside those of shuffled sections."""
    if not r.experiment.vectors.layers or not r.tables["similarity"]:
        return None
    layer = _kept_layer(r)
    lines = [line for line in r.tables["similarity"] if line["layer"] == layer]
    labels = r.labels(lines)
    of_label = {line["label"]: line for line in lines}
    panels = []
    for role in r.roles:
        series = [
            Series(
                label,
                [n + 0.1 * (2 * i - 1) for n in range(len(labels))],
                [of_label[name][f"norm_{role}{column}"] for name in labels],
                colour=COLOURS[i],
                style="",
                marker="o^"[i],
            )
            for i, (label, column) in enumerate(
                (("of the label", ""), ("shuffled within traces, 95 % quantile", "_95"))
            )
        ]
        panels.append(Panel(f"{role}-derived", "", "norm", series, categories=labels, from_zero=True))
    caption = (
        f"Norm of the difference-of-means vector of each label at layer {layer}, window {r.window}, beside the length "
        f"below which 95 % of {shuffles.N_DRAWS} vectors lie that were read from as many sections, drawn at random in "
        "the same traces."
    )
    return Plot("norms", "Length of the vectors", caption, [panels], lines)


def label_cosines(r: Results) -> Plot | None:
    """Cosines of the labels' vectors with each other, at the steered layer."""
    lines = [line for line in r.tables["label_cosines"] if line["layer"] == r.layer]
    labels = r.labels(lines)
    if len(labels) < 2:
        return None
    value = {(line["role"], line["label"], line["other"]): line["cosine"] for line in lines}
    matrices = {role: [[value.get((role, a, b), NAN) for b in labels] for a in labels] for role in r.roles}
    panels = [
        Panel(f"{role}-derived", "", "", heat=Heat(labels, labels, matrices[role], "cosine", True)) for role in r.roles
    ]
    caption = f"Cosines of the labels' difference-of-means vectors at layer {r.layer}, window {r.window}."
    return Plot("label_cosines", "Vectors of the labels", caption, [panels], lines)
