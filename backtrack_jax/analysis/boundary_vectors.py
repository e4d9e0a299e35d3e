"""Vectors of boundaries: weighted by how often they recur, of each fifth, and of the same in random order."""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from backtrack_jax.analysis import by_problem, log_odds, reliability
from backtrack_jax.analysis.base import Material
from backtrack_jax.analysis.boundaries import LABELLED, N_PARTS, THIRDS
from backtrack_jax.analysis.forced import REASONING_TRACES, Forced, given_text, texts_of
from backtrack_jax.analysis.statistics import NAN, percentiles
from backtrack_jax.config import Experiment
from backtrack_jax.data.text import sentence_spans
from backtrack_jax.files.tables import Table
from backtrack_jax.intervention import Intervention, add_vector, no_intervention

ALL, WEIGHTED = "all boundaries", "weighted by p"
"""Vectors beside those of the fifths."""

_SPLITS = 100


def fifth_name(fifth: int) -> str:
    """What tables call a fifth of the boundaries; 1 has the lowest p."""
    return f"fifth {fifth}"


DIFFERENCE = f"{fifth_name(N_PARTS)} - {fifth_name(1)}"
"""The primary contrast: the effect of the highest fifth's vector less that of the lowest's."""


@dataclasses.dataclass(frozen=True)
class Windows:
    """Window means of n boundaries, and of D in T traces, one below the other.

    Attributes:
      positive: [n + T, D], of the boundaries; NaN for traces.
      contrast: [n + T, D], of the traces; NaN for boundaries.
      of_contrast: [n + T], how much each trace counts.
      problems: problem of each.
    """

    positive: np.ndarray
    contrast: np.ndarray
    of_contrast: np.ndarray
    problems: Sequence[str]

    def sums(self, weights: np.ndarray) -> by_problem.ProblemSums:
        """Of the vector of the weighted boundaries ([n])."""
        return by_problem.of_traces(self.positive, self.contrast, self._weights(weights), self.problems)

    def split_half(self, weights: np.ndarray, seed: int) -> reliability.SplitHalf:
        """Its reliability."""
        given = (self.positive, self.contrast, self.problems)
        return reliability.split_half(*given, weights=self._weights(weights), n_splits=_SPLITS, seed=seed)

    def _weights(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.concatenate([weights, np.zeros(len(self.problems) - len(weights))]), self.of_contrast


def windows(material: Material, role: str, lines: Table) -> Windows:
    """Of the labelled boundaries, at the steered layer."""
    e, sums = material.experiment, material.sums[role]
    own = [line for line in lines if line["group"] == LABELLED]
    layer = e.steering.main_layer
    states = sums.section_means[[line["section"] for line in own], sums.plan.layers.index(layer)]
    traces = [trace for trace, _ in material.pairs]
    ids = [trace.id for trace in traces]
    _, contrast, (_, of_contrast) = material.means_by_trace(role, ids, e.vectors.label, layer)
    return Windows(
        np.concatenate([states, np.full_like(contrast, np.nan)]),
        np.concatenate([np.full_like(states, np.nan), contrast]),
        np.concatenate([np.zeros(len(own)), of_contrast]),
        [*(line["problem_id"] for line in own), *(trace.problem_id for trace in traces)],
    )


def weightings(lines: Table, n_random: int, seed: int) -> dict[tuple[str, int], np.ndarray]:
    """(name, 0) -> weights of the labelled boundaries; (name, r) -> the same weights in the r-th random order.

    What is drawn changes places within a third of the traces only, so that its weights are the same numbers, of one
    effective sample size, and no more of them early or late in the traces than of the sorted ones.
    """
    own = [line for line in lines if line["group"] == LABELLED]
    fifths = np.array([line["fifth"] for line in own])
    found = {(ALL, 0): np.ones(len(own)), (WEIGHTED, 0): np.array([line["shrunk"] for line in own])}
    if not np.isfinite(found[WEIGHTED, 0]).all():  # a judge that gave no label
        del found[WEIGHTED, 0]
    if fifths.all():
        found |= {(fifth_name(n), 0): (fifths == n).astype(np.float64) for n in range(1, N_PARTS + 1)}
    thirds = np.array([line["third"] for line in own])
    rng = np.random.default_rng(seed)
    drawn = [name for name in (WEIGHTED, fifth_name(1), fifth_name(N_PARTS)) if (name, 0) in found]
    for r in range(1, n_random + 1):
        order = np.arange(len(own))
        for third in THIRDS:
            inside = np.flatnonzero(thirds == third)
            order[inside] = rng.permutation(inside)
        found |= {(name, r): found[name, 0][order] for name in drawn}
    return found


def effects(material: Material, role: str, lines: Table, partial: Path) -> Table:
    """Change of the log-odds on each text under each vector, read from the other folds of the problems.

    The texts are those on which `log_odds` measures the model: one trace a problem.
    """
    e, q = material.experiment, material.experiment.questions.stability
    own = windows(material, role, lines)
    given = weightings(lines, q.random, e.seed)
    given = {name: weights for name, weights in given.items() if not (name[0] == WEIGHTED and name[1])}
    names = np.unique(np.asarray(own.problems, str)).tolist()
    fold_of = dict(zip(names, np.random.default_rng(e.seed).permutation(len(names)) % e.analysis.folds, strict=True))
    kept = [np.array([fold_of[problem] != fold for problem in names]) for fold in range(e.analysis.folds)]
    added = {
        (name, fold): row
        for name, weights in given.items()
        for sums in [own.sums(weights)]
        for fold, of_fold in enumerate(kept)
        if (row := _added(material, role, sums, of_fold)) is not None
    }
    _, n_layers, _, _, d_model = material.sums[role].sums.shape
    nothing = no_intervention(n_layers, d_model, e.steering.span)
    read: list[tuple[str, tuple[str, int] | None]] = []
    rows: list[Forced] = []
    for trace in texts_of(material)[REASONING_TRACES]:
        ids, prompt_length, starts = given_text(material, role, trace, sentence_spans(trace)[1:])
        fold = fold_of.get(trace.problem_id, 0)
        under = {None: nothing} | {name: added[name, fold] for name in given if (name, fold) in added}
        for name, row in under.items():
            read.append((trace.problem_id, name))
            rows.append(Forced(ids, prompt_length, starts, row))
    found = log_odds.resumed(material, role, rows, partial, f"texts under vectors of boundaries of the {role} model")
    of = dict(zip(read, found, strict=True))
    return [
        {"role": role, "vector": name[0], "draw": name[1], "problem_id": problem, "change": value - of[problem, None]}
        for (problem, name), value in of.items()
        if name is not None and math.isfinite(value - of[problem, None])
    ]


def _added(material: Material, role: str, sums: by_problem.ProblemSums, kept: np.ndarray) -> Intervention | None:
    """The vector of the problems that are kept, at the length of the setting; None if they have no window of it."""
    e, layer = material.experiment, material.experiment.steering.main_layer
    parts = ((sums.positive, sums.n_positive), (sums.contrast, sums.n_contrast))
    if any(not n[kept].sum() for _, n in parts):
        return None
    positive, contrast = (x[kept].sum(0) / n[kept].sum() for x, n in parts)
    unit = (positive - contrast) / np.linalg.norm(positive - contrast)
    n_layers = material.sums[role].sums.shape[1]
    added = jnp.asarray(unit, jnp.float32)
    return add_vector(added, layer, length(material, role), n_layers=n_layers, span=e.steering.span)


def magnitude(e: Experiment) -> float:
    """The magnitude of the setting, or the smallest positive one of the sweep."""
    return e.questions.stability.magnitude or min(m for m in e.steering.magnitudes if m > 0)


def length(material: Material, role: str) -> float:
    """Norm of what is added, in the scale of the residual stream."""
    e = material.experiment
    return material.length(role, e.steering.main_layer, magnitude(e))


def vectors(material: Material, role: str, lines: Table, changes: Table) -> Table:
    """The vectors of boundaries and of random orders of them; see the page on stability for the columns."""
    e, q = material.experiment, material.experiment.questions.stability
    own, run = (
        windows(material, role, lines),
        by_problem.of_label(material, role, e.vectors.label, e.steering.main_layer),
    )
    labelled = [line for line in lines if line["group"] == LABELLED]
    sort, score = (
        np.array([line[f"{name}_hits"] / line[f"{name}_draws"] if line[f"{name}_draws"] else NAN for line in labelled])
        for name in ("sort", "score")
    )
    given = weightings(lines, q.random, e.seed)
    drawn: dict[str, list[dict[str, float]]] = defaultdict(list)
    found: Table = []
    for (name, draw), weights in given.items():
        sums = own.sums(weights)
        half, cosines = own.split_half(weights, e.seed), by_problem.cosine(sums, run)
        effect = _changes_of(changes, name, draw)
        if draw:
            drawn[name].append({"cosine": float(cosines[0]), "reliability": half.cosine, "effect": _mean(effect)})
            continue
        ends = by_problem.cosine_interval(float(cosines[0]), by_problem.standard_error(cosines), sums.n_problems)
        total = weights.sum()
        # Weighted by the posterior mean, the mean of p is that of its posterior means.
        p = total and float((weights * (weights if name == WEIGHTED else np.nan_to_num(score))).sum() / total)
        line = {"vector": name, "draws": 0, "boundaries": int(np.count_nonzero(weights))}
        line |= {"effective": float(total**2 / (weights**2).sum()), "p": p}
        line |= {"p_sorted": float((weights * np.nan_to_num(sort)).sum() / total)}
        line |= {"norm": float(np.linalg.norm(sums.vectors()[0]))}
        line |= _three("cosine", float(cosines[0]), ends) | _three("reliability", half.cosine, (half.low, half.high))
        found.append(line | _three("effect", _mean(effect), log_odds.interval(effect)) | _n(effect))
    if (fifth_name(1), 0) in given:
        apart = differences(changes, 0)
        nulls = [_mean(differences(changes, r)) for r in range(1, q.random + 1)]
        larger = sum(null >= _mean(apart) for null in nulls)
        line = _blank(DIFFERENCE, 0) | _three("effect", _mean(apart), log_odds.interval(apart)) | _n(apart)
        found.append(line | {"p_value": (1 + larger) / (1 + len(nulls)) if len(apart) and nulls else NAN})
        drawn[DIFFERENCE] = [{"cosine": NAN, "reliability": NAN, "effect": null} for null in nulls]
    for name, of in drawn.items():
        line = _blank(f"random: {name}", len(of))
        for column in ("cosine", "reliability", "effect"):
            values = np.array([draw[column] for draw in of])
            values = values[np.isfinite(values)]
            line |= _three(column, _mean(values), percentiles(values))
        if of:
            found.append(line)
    return found


def _blank(name: str, draws: int) -> dict[str, Any]:
    """A line of the table of vectors without what single vectors have."""
    line = {"vector": name, "draws": draws, "boundaries": 0}
    line |= dict.fromkeys(("effective", "p", "p_sorted", "norm"), NAN)
    line |= _three("cosine", NAN, (NAN, NAN)) | _three("reliability", NAN, (NAN, NAN))
    return line | _three("effect", NAN, (NAN, NAN)) | {"problems": 0, "p_value": NAN}


def _three(name: str, value: float, ends: tuple[float, float]) -> dict[str, float]:
    return {name: value, f"{name}_low": ends[0], f"{name}_high": ends[1]}


def _n(values: np.ndarray) -> dict[str, Any]:
    return {"problems": len(values), "p_value": NAN}


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else NAN


def _changes_of(changes: Table, name: str, draw: int) -> np.ndarray:
    """Change of the log-odds under a vector, one a problem."""
    return np.array([line["change"] for line in changes if (line["vector"], line["draw"]) == (name, draw)])


def differences(changes: Table, draw: int) -> np.ndarray:
    """Change under the vector of the highest fifth less that under the lowest's, one a problem that has both."""
    high, low = (
        {line["problem_id"]: line["change"] for line in changes if (line["vector"], line["draw"]) == (name, draw)}
        for name in (fifth_name(N_PARTS), fifth_name(1))
    )
    return np.array([high[problem] - low[problem] for problem in high if problem in low])
