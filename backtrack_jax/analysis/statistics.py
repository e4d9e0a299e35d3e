"""The bootstrap over problems: intervals of a rate, of any contrast of rates, and of any other statistic.

Replies to one problem are alike, and so are tokens of one trace, so the problem is the unit that is drawn. Everything
that is measured on the same number of problems is measured on the same draws.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike

NAN = float("nan")


def resampled(
    statistic: Callable[[np.ndarray], np.ndarray], n: int, *, n_resamples: int = 2000, seed: int = 0, parts: int = 1
) -> np.ndarray:
    """A statistic of n problems, drawn anew with replacement.

    Args:
      statistic: of how often each problem counts, [R, n] float64, in each of R resamples; gives [R, ...].
      n: number of problems.
      n_resamples: number of resamples.
      seed: of the random generator; the same arguments give the same resamples.
      parts: number of parts in which the resamples are computed, for when all at once would not fit into memory.

    Returns:
      [n_resamples, ...].
    """
    return np.concatenate([statistic(part) for part in np.array_split(_draws(n, n_resamples, seed), parts)])


def percentiles(values: np.ndarray, tails: Sequence[float] = (0.025, 0.975)) -> tuple[float, float]:
    """Quantiles of the values [R] that are defined; (nan, nan) if none is."""
    values = values[np.isfinite(values)]
    if not len(values):
        return NAN, NAN
    low, high = np.quantile(values, tails)
    return float(low), float(high)


def tails(level: float) -> tuple[float, float]:
    """The quantiles between which an interval of this coverage lies.

    Raises:
      ValueError: the level is not between 0 and 1.
    """
    if not 0 < level < 1:
        raise ValueError(f"level {level} must lie between 0 and 1")
    return (1 - level) / 2, (1 + level) / 2


def contrast_interval(
    cells: Sequence[tuple[float, ArrayLike, ArrayLike]],
    *,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a sum of factors times pooled rates, sum_c f_c sum(hits_c) / sum(words_c).

    The same problems are drawn for all cells, so that what they share cancels: (1, a) and (-1, b) is the paired
    difference of two conditions. A resample without any word counts as rate 0.

    Args:
      cells: of each cell its factor; numerators, [P], one per problem; and denominators, [P], >= 0. Problems stand in
        the same order in all of them; sum over the replies to each problem first.
      level: coverage of the interval, between 0 and 1.
      n_resamples: number of resamples.
      seed: of the random generator.

    Returns:
      Lower and upper bound; (nan, nan) for fewer than two problems, where it is not defined.

    Raises:
      ValueError: shapes differ or are not [P], or the level is not between 0 and 1.
    """
    arrays = [(factor, np.asarray(hits, np.float64), np.asarray(words, np.float64)) for factor, hits, words in cells]
    n = len(np.atleast_1d(arrays[0][1]))
    for _, hits, words in arrays:
        if not hits.shape == words.shape == (n,):
            raise ValueError(f"hits {hits.shape} and words {words.shape} must both have the shape [P], here {(n,)}")
    bounds = tails(level)
    if n < 2:
        return NAN, NAN

    def statistic(draws: np.ndarray) -> np.ndarray:
        total = np.zeros(len(draws))
        for factor, hits, words in arrays:
            of_words = draws @ words
            total += factor * np.divide(draws @ hits, of_words, out=np.zeros(len(draws)), where=of_words > 0)
        return total

    return percentiles(resampled(statistic, n, n_resamples=n_resamples, seed=seed), bounds)


def bootstrap_interval(
    hits: ArrayLike, words: ArrayLike, *, level: float = 0.95, n_resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Interval of one pooled rate sum(hits) / sum(words), in its unit; arguments and errors of `contrast_interval`."""
    return contrast_interval([(1.0, hits, words)], level=level, n_resamples=n_resamples, seed=seed)


@functools.lru_cache(maxsize=4)
def _draws(n: int, n_resamples: int, seed: int) -> np.ndarray:
    """How often each of n problems is drawn, [n_resamples, n] float64; the same for all measures of all conditions."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_resamples).astype(np.float64)
