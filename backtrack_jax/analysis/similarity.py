"""How alike vectors are: between labels, between models, and between halves of the data they were read from."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class SplitHalf(NamedTuple):
    """Agreement of vectors that were read from two halves of the problems.

    Attributes:
      cosine: mean cosine of the two halves' vectors over random splits; nan if no split could be made.
      low: 2.5 % quantile over splits.
      high: 97.5 % quantile.
      full: the reliability of the vector of all the data, 2 c / (1 + c) of the mean (Spearman and Brown).
      n_splits: splits of which both halves had windows of both groups.
    """

    cosine: float
    low: float
    high: float
    full: float
    n_splits: int


def cosine_matrix(directions: np.ndarray) -> np.ndarray:
    """Cosines of K vectors [K, D] with each other, [K, K] float64; nan where one of them is zero."""
    x = np.asarray(directions, np.float64)
    norms = np.linalg.norm(x, axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return x @ x.T / np.outer(norms, norms)


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
        return SplitHalf(np.nan, np.nan, np.nan, np.nan, 0)
    mean = float(cosines.mean())
    low, high = np.quantile(cosines, [0.025, 0.975])
    return SplitHalf(mean, float(low), float(high), 2 * mean / (1 + mean), len(cosines))


def _means(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted mean of the rows that have a value: [n, D] and [S, n] to [S, D] float64; nan where there is none."""
    has = np.all(np.isfinite(values), axis=-1)
    weights = np.where(has, weights, 0.0)
    sums = weights @ np.where(has[:, None], values, 0).astype(np.float64)
    count = weights.sum(-1, keepdims=True)
    return np.divide(sums, count, out=np.full_like(sums, np.nan), where=count > 0)
