"""Differences of means as sums over problems: vectors that leave one problem out, and products without its own noise.

Traces of one problem are alike, so the problem is the unit. A vector that was read from them is its expectation plus
noise, and the product of two such vectors holds the product of their noises, which biases every cosine. The product of
two *different* problems' parts does not, whether two models have the noise of a text in common or not: the mean over
all pairs of different problems, which the mean over random splits into halves comes to, estimates the product of the
expectations without bias.

    E[u] . E[v]  ~  sum_{i != j} u_i . v_j / sum_{i != j} n_i m_j
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy import stats

from backtrack_jax.analysis.base import Material
from backtrack_jax.analysis.statistics import NAN


@dataclasses.dataclass(frozen=True)
class ProblemSums:
    """v = sum(positive) / sum(n_positive) - sum(contrast) / sum(n_contrast), both less the mean of the contrast.

    Attributes:
      positive: [P, D] float64, sum over each problem's traces of weighted means of D+.
      contrast: [P, D] float64, likewise of D.
      n_positive: [P] float64, sums of these weights.
      n_contrast: [P] float64, likewise.
    """

    positive: np.ndarray
    contrast: np.ndarray
    n_positive: np.ndarray
    n_contrast: np.ndarray

    @property
    def n_problems(self) -> int:
        """Problems that have a window of D+."""
        return int(np.sum(self.n_positive > 0))

    def vectors(self) -> np.ndarray:
        """The vector and, after it, the vectors without the first, second, ... problem: [1 + P, D] float64."""
        return _means(self.positive, self.n_positive) - _means(self.contrast, self.n_contrast)


def of_traces(
    positive: np.ndarray, contrast: np.ndarray, weights: tuple[np.ndarray, np.ndarray], problems: Sequence[str]
) -> ProblemSums:
    """Sums over the traces of each problem, problems in alphabetical order.

    Args:
      positive: [n, D], each trace's mean over its windows of D+; NaN where it has none.
      contrast: [n, D], likewise of D.
      weights: [n] each, how much a trace counts in the mean of D+ and in that of D.
      problems: problem of each trace.
    """
    names, group = np.unique(np.asarray(problems, str), return_inverse=True)
    sums = []
    for values, of_trace in zip((positive, contrast), weights, strict=True):
        has = np.all(np.isfinite(values), axis=-1)
        n = np.where(has, of_trace, 0.0)
        x = np.zeros((len(names), values.shape[-1]))
        np.add.at(x, group, n[:, None] * np.where(has[:, None], values, 0))
        sums.append((x, np.bincount(group, n, len(names))))
    (p, n), (c, m) = sums
    # Both less the mean of D, which is far longer than their difference: what is left is of the vector's own size.
    centre = c.sum(0) / m.sum() if m.sum() else np.full(c.shape[-1], np.nan)
    return ProblemSums(p - n[:, None] * centre, c - m[:, None] * centre, n, m)


def of_label(material: Material, role: str, label: str, layer: int) -> ProblemSums:
    """Sums of the run's vector of a label; ValueError if the layer is not one of `vectors.layers`."""
    traces = [trace for trace, _ in material.pairs]
    ids, problems = [trace.id for trace in traces], [trace.problem_id for trace in traces]
    return of_traces(*material.means_by_trace(role, ids, label, layer), problems)


def product(a: ProblemSums, b: ProblemSums) -> np.ndarray:
    """Unbiased E[a] . E[b] of two vectors over the same problems, and without each problem in turn: [1 + P]."""
    terms = [((a.positive, a.n_positive), 1), ((a.contrast, a.n_contrast), -1)]
    others = [((b.positive, b.n_positive), 1), ((b.contrast, b.n_contrast), -1)]
    return sum(
        (sign * other_sign * _over_pairs(*x, *y) for x, sign in terms for y, other_sign in others),
        np.zeros(1 + len(a.positive)),
    )


def cosine(a: ProblemSums, b: ProblemSums) -> np.ndarray:
    """Cosine of two vectors as they are, noise included, and without each problem in turn: [1 + P]."""
    x, y = a.vectors(), b.vectors()
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.sum(x * y, -1) / np.sqrt(np.sum(x * x, -1) * np.sum(y * y, -1))


def corrected_cosine(a: ProblemSums, b: ProblemSums) -> tuple[float, float]:
    """Cosine of the expectations of two vectors, and its standard error over problems.

    Both are NaN unless the squared length of either expectation is at least twice its own standard error: with less,
    noise decides the quotient, which may be of any size.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        lengths = [product(x, x) for x in (a, b)]
        values = product(a, b) / np.sqrt(lengths[0] * lengths[1])
        if not all(length[0] > 2 * standard_error(length) for length in lengths):
            return NAN, NAN
    return float(values[0]), standard_error(values)


def standard_error(values: np.ndarray) -> float:
    """By the jackknife, of a statistic [1 + P] of all problems and without each of them; NaN if one is not defined."""
    left_out = values[1:]
    if len(left_out) < 2 or not np.isfinite(values).all():
        return NAN
    return float(np.sqrt((len(left_out) - 1) * np.mean((left_out - left_out.mean()) ** 2)))


def interval(estimate: float, error: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """Of an estimate with a standard error over n problems, by Student's t; (nan, nan) for fewer than two."""
    if n < 2:
        return NAN, NAN
    half = float(stats.t.ppf((1 + level) / 2, n - 1)) * error
    return estimate - half, estimate + half


def cosine_interval(value: float, error: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """The same of a cosine on Fisher's scale, where it is less skewed: between -1 and 1, but for an estimate beyond 1.

    What has lost its noise may have a cosine of 1 or more. It is taken to be half an error below 1, which makes the
    interval rather too wide.
    """
    if n < 2 or not np.isfinite([value, error]).all():
        return NAN, NAN
    inside = min(value, 1 - min(error, 1.0) / 2)
    low, high = interval(float(np.arctanh(inside)), error / (1 - inside**2), n, level)
    return float(np.tanh(low)), max(float(np.tanh(high)), value)


def _means(sums: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Mean of all and without each: [P, D] and [P] to [1 + P, D]; nan where nothing is left."""
    total = np.concatenate([sums.sum(0, keepdims=True), sums.sum(0) - sums])
    count = np.concatenate([[n.sum()], n.sum() - n])[:, None]
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


def _over_pairs(x: np.ndarray, n: np.ndarray, y: np.ndarray, m: np.ndarray) -> np.ndarray:
    """sum_{i != j} x_i . y_j / sum_{i != j} n_i m_j, over all problems and without each of them: [1 + P]."""
    values = []
    for left, right in ((x, y), (n[:, None], m[:, None])):
        own, of_left, of_right = np.sum(left * right, -1), left.sum(0), right.sum(0)
        every = of_left @ of_right - own.sum()
        without = every - left @ of_right - right @ of_left + 2 * own
        values.append(np.concatenate([[every], without]))
    numerator, count = values
    return np.divide(numerator, count, out=np.full_like(numerator, np.nan), where=count > 1e-9 * max(1.0, count[0]))
