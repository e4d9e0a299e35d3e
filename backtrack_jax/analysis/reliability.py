"""How alike the vectors of two halves of the problems are: split-half reliability."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from backtrack_jax.analysis import by_problem
from backtrack_jax.analysis.base import Analysis, Material
from backtrack_jax.analysis.plots import COLOURS, MARKERS, Panel, Plot, Series
from backtrack_jax.analysis.results import Results, extent
from backtrack_jax.analysis.statistics import NAN
from backtrack_jax.config import CONTRASTS
from backtrack_jax.files.tables import Table


class Reliability(Analysis):
    """Of every label's vector, at the layers where the means of sections were kept."""

    name = "reliability"
    version = 2
    of_replies = False
    settings = ("seed",)
    tables = ("reliability",)

    def finish(self, material: Material, folder: Path) -> dict[str, Table]:
        """From the means of single traces."""
        e = material.experiment
        traces = [trace for trace, _ in material.pairs]
        problems, ids = [trace.problem_id for trace in traces], [trace.id for trace in traces]
        lines = []
        for role, sums in material.sums.items():
            for layer in sums.plan.layers:
                for label in (name for name in sums.plan.groups if name not in CONTRASTS):
                    positive, contrast, weights = material.means_by_trace(role, ids, label, layer)
                    found = split_half(positive, contrast, problems, weights=weights, seed=e.seed)
                    lines.append({"role": role, "layer": layer, "label": label} | found._asdict())
        return {"reliability": lines}

    def plots(self, r: Results) -> Sequence[Plot | None]:
        """At the steered layer."""
        return [reliability(r)]


RELIABILITY = Reliability()


class SplitHalf(NamedTuple):
    """Agreement of vectors that were read from two halves of the problems.

    Attributes:
      cosine: mean cosine of the two halves' vectors over random splits; nan if no split could be made.
      low: lower end of its 95 % interval over problems; nan where too few problems have windows.
      high: upper end.
      full: the reliability of the vector of all the data, 2 c / (1 + c) of the mean (Spearman and Brown).
      n_splits: splits of which both halves had windows of both groups.
    """

    cosine: float
    low: float
    high: float
    full: float
    n_splits: int


def split_half(
    positive: np.ndarray,
    contrast: np.ndarray,
    problems: Sequence[str],
    *,
    weights: tuple[np.ndarray, np.ndarray] | None = None,
    n_splits: int = 200,
    seed: int = 0,
) -> SplitHalf:
    """Split-half reliability of a difference of means, with all traces of a problem in one half.

    Args:
      positive: [n, D], each trace's mean over its windows of D+; NaN where it has none.
      contrast: [n, D], likewise of D.
      problems: problem of each trace.
      weights: [n] each, how much a trace counts in the mean of D+ and in that of D; default once.
      n_splits: number of random splits.
      seed: of the splits.

    Returns:
      Cosine of the halves' vectors over the splits.

    Raises:
      ValueError: arrays of unlike shapes, or not one problem per trace.
    """
    if positive.shape != contrast.shape or len(positive) != len(problems):
        raise ValueError(f"positive {positive.shape}, contrast {contrast.shape}, {len(problems)} problems do not match")
    names, group = np.unique(np.asarray(problems, str), return_inverse=True)
    rng = np.random.default_rng(seed)
    ranks = np.argsort(rng.random((n_splits, len(names))), axis=-1)
    first = (ranks < len(names) // 2)[:, group]  # [splits, n]: the trace is in the first half
    of_positive, of_contrast = weights or (np.ones(len(problems)), np.ones(len(problems)))
    halves = [_means(positive, half * of_positive) - _means(contrast, half * of_contrast) for half in (first, ~first)]
    dot = np.sum(halves[0] * halves[1], axis=-1)
    cosines = dot / (np.linalg.norm(halves[0], axis=-1) * np.linalg.norm(halves[1], axis=-1))
    cosines = cosines[np.isfinite(cosines)]
    if not len(cosines):
        return SplitHalf(NAN, NAN, NAN, NAN, 0)
    mean = float(cosines.mean())
    sums = by_problem.of_traces(positive, contrast, (of_positive, of_contrast), problems)
    low, high = by_problem.cosine_interval(mean, by_problem.standard_error(_halves_cosine(sums)), sums.n_problems)
    return SplitHalf(mean, low, high, 2 * mean / (1 + mean), len(cosines))


def _halves_cosine(sums: by_problem.ProblemSums) -> np.ndarray:
    """What the mean cosine of halves comes to, of all problems and without each of them: [1 + P].

    With E the squared length of the expected vector and N the noise in the squared length of the vector that was read,
    halves have a cosine of E / (E + 2 N).
    """
    read = sums.vectors()
    expected, length = by_problem.product(sums, sums), np.sum(read * read, axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return expected / (2 * length - expected)


def _means(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted mean of the rows that have a value: [n, D] and [S, n] to [S, D] float64; nan where there is none."""
    has = np.all(np.isfinite(values), axis=-1)
    weights = np.where(has, weights, 0.0)
    sums = weights @ np.where(has[:, None], values, 0).astype(np.float64)
    count = weights.sum(-1, keepdims=True)
    return np.divide(sums, count, out=np.full_like(sums, np.nan), where=count > 0)


def reliability(r: Results) -> Plot | None:
    """Split-half reliability of every label's vector."""
    layer = r.probed_layer("reliability")
    if layer is None:
        return None
    lines = [line for line in r.tables["reliability"] if line["layer"] == layer]
    labels = [*(label for label in r.labels(lines) if label != "shuffled"), "shuffled"]
    read = {(w["role"], w["label"]): w["read"] for w in r.tables["windows"] if w["window"] == r.window}
    series = []
    for i, role in enumerate(r.roles):
        found = {line["label"]: line for line in lines if line["role"] == role}
        there = [(n, found[label]) for n, label in enumerate(labels) if label in found]
        series.append(
            Series(
                f"{role}-derived",
                [n + 0.12 * (2 * i - 1) * (len(r.roles) > 1) for n, _ in there],
                *([line[name] for _, line in there] for name in ("cosine", "low", "high")),
                colour=COLOURS[i],
                style="",
                marker=MARKERS[i],
            )
        )
    names = [f"{label} ({read.get((r.author, label), 0)})" for label in labels]
    splits = extent([line for line in lines if line["n_splits"]] or lines, "n_splits")  # a label of none has no point
    caption = (
        f"Cosine of the vectors of two random halves of the problems at layer {layer}: mean of {splits} splits, with "
        "its 95 % interval over problems. In brackets: windows read. shuffled: D+ drawn at random from all sections."
    )
    panel = Panel("", "", "split-half cosine", series, categories=names, level=0.0)
    return Plot("reliability", "Split-half reliability of the vectors", caption, [[panel]], lines)
