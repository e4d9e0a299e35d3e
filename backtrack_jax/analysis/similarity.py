"""How alike vectors are: those of two models (text 3.2), and those of two labels."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from backtrack_jax import vectors
from backtrack_jax.analysis.base import Analysis, Material
from backtrack_jax.analysis.plots import Heat, Panel, Plot, Series, line_of
from backtrack_jax.analysis.results import PAPER_LABEL, Results
from backtrack_jax.analysis.statistics import NAN
from backtrack_jax.config import ROLES
from backtrack_jax.data.records import LABELS
from backtrack_jax.files.tables import Table


class Similarity(Analysis):
    """Cosines of the difference-of-means vectors, at every layer."""

    name = "similarity"
    of_replies = False
    tables = ("similarity", "label_cosines")

    def finish(self, material: Material, folder: Path) -> dict[str, Table]:
        """From the vectors alone."""
        return {"similarity": _between_models(material), "label_cosines": _between_labels(material)}

    def plots(self, r: Results) -> Sequence[Plot | None]:
        """Cosine by layer, and the labels beside each other at the steered layer."""
        return [by_layer(r), label_cosines(r)]

    def sentences(self, r: Results) -> Sequence[str]:
        """The cosine of the models' vectors at the steered layer."""
        found = [line["cosine"] for line in _of_experiment(r)]
        if not found or math.isnan(found[0]):
            return []
        paper = " (paper: 0.74)" if r.label == PAPER_LABEL else ""
        return [f"Base- and reasoning-derived {r.label} vectors have cosine {found[0]:.3f} at layer {r.layer}{paper}."]

    def reference(self, r: Results) -> dict[str, str]:
        """The same, and the norms."""
        found = {}
        for line in _of_experiment(r) if r.label == PAPER_LABEL else ():
            if not math.isnan(line["cosine"]):
                found["cosine"] = f"{line['cosine']:.3f} at layer {r.layer}"
            found |= {f"norm_{role}": f"{line[f'norm_{role}']:.3g}" for role in r.roles}
        return found


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
        for layer in range(len(next(iter(found.values())).directions)):
            cosine = NAN if cosines is None else float(cosines[layer])
            norms = {f"norm_{role}": float(vector.norms[layer]) for role, vector in found.items()}
            lines.append({"label": label, "layer": layer, "cosine": cosine} | norms)
    return lines


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


def by_layer(r: Results) -> Plot | None:
    """Text 3.2: cosine of base- and reasoning-derived vectors, by label and layer."""
    table = r.tables["similarity"]
    if len(r.roles) < 2 or not table:
        return None
    series = []
    for i, label in enumerate(r.labels(table)):
        own = [line for line in table if line["label"] == label]
        x, y = ([line[name] for line in own] for name in ("layer", "cosine"))
        series.append(Series(label, x, y, **line_of(i, "base")))
    panel = Panel("", "layer", "cosine", series, whole=True)
    caption = (
        f"Cosine of base- and reasoning-derived difference-of-means vectors of each label, window {r.window}. The "
        "paper gives about 0.74 for backtracking at layer 10 of Llama-3.1-8B."
    )
    title = "Section 3.2: base- against reasoning-derived vectors"
    return Plot("cosine_by_layer", title, caption, [[panel]], table, place=3.2)


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
