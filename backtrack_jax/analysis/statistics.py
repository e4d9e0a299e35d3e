"""Intervals over problems: of rates, of contrasts and ratios of rates, of means; and the verdicts that rest on them.

Replies to one problem are alike, and so are tokens of one trace, so the problem is the unit: every variance is one
between problems, and cells that are compared have the same problems. Below, `hits` and `words` hold one number per
problem (sum over the replies to it first); a rate is the pooled one, sum(hits) / sum(words).

Coverage and errors are measured in tests/analysis/test_coverage.py. With few problems, or few hits, or a handful of
problems that hold most hits, intervals of rates are rather too wide than too narrow.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, special

NAN = float("nan")

FEWEST_PROBLEMS = 80
"""Below this number of problems nothing is called decided: intervals of fewer do not hold what they promise."""

_BURST = 2.0


@dataclasses.dataclass(frozen=True)
class Region:
    """Where a number must lie for a claim to hold: between both bounds, which do not belong to it."""

    low: float = -math.inf
    high: float = math.inf


def verdict(low: float, high: float, region: Region, n: int) -> str:
    """What an interval of 92 % says of a claim, so that either answer errs in at most one case of twenty.

    Args:
      low: lower end of the interval; NaN where there is none.
      high: its upper end.
      region: where the number lies if the claim is true.
      n: number of problems.

    Returns:
      "holds" if the whole interval lies inside the region, "fails" if all of it lies outside, else "undecided", as
      with fewer than `FEWEST_PROBLEMS` problems.
    """
    if n < FEWEST_PROBLEMS or math.isnan(low) or math.isnan(high):
        return "undecided"
    above = region.low == -math.inf or region.low < low
    below = region.high == math.inf or high < region.high
    if above and below:
        return "holds"
    return "fails" if high <= region.low or region.high <= low else "undecided"


def detectable(low: float, high: float) -> float:
    """Half the width of an interval: what lies this far from a bound of its region would have been told from it.

    NaN where an end is not finite.
    """
    return (high - low) / 2 if math.isfinite(low) and math.isfinite(high) else NAN


def rate_interval(hits: ArrayLike, words: ArrayLike, *, level: float = 0.95) -> tuple[float, float]:
    """Interval of a pooled rate: Clopper and Pearson's, at the effective sample size.

    Korn and Graubard, Survey Methodology 24 (1998): as many independent words as would give the rate the variance that
    it has between problems, corrected for the degrees of freedom of that variance, and no more than there are. The
    variance is that of the problems and of one more burst of two hits: a design effect cannot be told from a hit or
    two, and with none at all there would be no clustering. (Of keywords that come in threes, at four expected hits,
    intervals without the burst held the true rate in .74 of cases instead of .95; with 20 hits it does not matter.)

    Args:
      hits: [P], one per problem.
      words: [P], >= 0.
      level: coverage, between 0 and 1.

    Returns:
      Lower and upper end, never equal; (nan, nan) only where there are no words. One problem counts as a single word,
      as it shows no variance between problems: the interval then says next to nothing.

    Raises:
      ValueError: shapes differ or are not [P], or the level is not between 0 and 1.
    """
    hits, words = _checked(hits, words, 1)
    n = words.sum()
    if not n:
        return NAN, NAN
    share = hits.sum() / n
    if share > 1:  # several hits in a word, as substrings may be
        return paired_interval([hits], [words], [1], level=level)
    return share_interval(share, hits - share * words, n, burst=min(_BURST, words.max()), most=n, level=level)


def share_interval(
    share: float, residuals: np.ndarray, n: float, *, burst: float, most: float = math.inf, level: float = 0.95
) -> tuple[float, float]:
    """`rate_interval` of any share between 0 and 1 whose deviation is a sum over problems.

    Args:
      share: the share.
      residuals: [P], of each problem its part in (share - true share) * n, to first order.
      n: number of units that the share is of.
      burst: hits that may come together.
      most: upper bound of the effective sample size.
      level: coverage.
    """
    tail, _ = tails(level)
    P, rare = len(residuals), n * share * (1 - share)
    effective = 1.0
    if P > 1 and n > 1:
        effect = (P / (P - 1) * (residuals**2).sum() + burst**2) / (rare + burst)
        effective = n / effect * (special.stdtrit(n - 1, tail) / special.stdtrit(P - 1, tail)) ** 2
    effective = max(1.0, min(most, effective))
    hits = share * effective
    low = special.betaincinv(hits, effective - hits + 1, tail) if hits > 0 else 0.0
    high = special.betaincinv(hits + 1, effective - hits, 1 - tail) if hits < effective else 1.0
    return float(low), float(high)


def paired_interval(
    hits: ArrayLike, words: ArrayLike, factors: ArrayLike, *, level: float = 0.95
) -> tuple[float, float]:
    """Student's t interval of a sum of factors times pooled rates of cells over the same problems.

    (1, -1) is the paired difference of two conditions: what a problem does to both cancels. The variance is that
    between problems of the linearised contrast, and of one hit more in each cell, so that cells without any have an
    interval too. Its centre is moved for skewness, as Johnson (JASA 73, 1978) does for a mean; but third over second
    moment are those of single hits, sum (factor / words)^k hits, since a third moment that is estimated from a few
    problems makes intervals worse than none.

    Args:
      hits: [C, P], of each cell and problem.
      words: [C, P], >= 0.
      factors: [C].
      level: coverage, between 0 and 1.

    Returns:
      Lower and upper end; (nan, nan) for one problem or a cell without words, where it is not defined.

    Raises:
      ValueError: shapes differ or are not [C, P], or the level is not between 0 and 1.
    """
    return _Rates(hits, words).interval(np.asarray(factors, np.float64), level)


def ratio_interval(
    hits: ArrayLike, words: ArrayLike, above: ArrayLike, below: ArrayLike, *, level: float = 0.95
) -> tuple[float, float]:
    """Interval of the ratio of two contrasts of cells over the same problems, by Fieller's theorem.

    All ratios R for which `paired_interval` of above - R * below holds 0. So (1, 0) over (0, 1) is the ratio of two
    rates, and (1, 0, -1) over (0, 1, -1) that of two effects with one unsteered cell.

    Args:
      hits: [C, P], of each cell and problem.
      words: [C, P], >= 0.
      above: [C], factors of the numerator.
      below: [C], factors of the denominator.
      level: coverage, between 0 and 1.

    Returns:
      Lower and upper end. Where the denominator cannot be told from 0 they are -inf and inf; but the ratio of two rates
      (no negative factor) still has its lower end, and never one below 0. (nan, nan) as in `paired_interval`.

    Raises:
      ValueError: as `paired_interval`.
    """
    rates = _Rates(hits, words)
    above, below = np.asarray(above, np.float64), np.asarray(below, np.float64)
    low, high = rates.interval(below, level)
    if math.isnan(low):
        return NAN, NAN
    positive = bool((above >= 0).all() and (below >= 0).all())
    if low <= 0 <= high and not positive:
        return -math.inf, math.inf
    if high < 0:
        above, below = -above, -below

    def lower(ratio: float) -> float:
        return rates.interval(above - ratio * below, level)[0]

    def upper(ratio: float) -> float:
        return rates.interval(above - ratio * below, level)[1]

    bounded = not low <= 0 <= high
    start = float(rates.rates @ above / (rates.rates @ below)) if bounded else 0.0
    if not bounded:
        return (_crossing(lower, 0.0, 1.0) if lower(0.0) > 0 else 0.0), math.inf
    first, last = _crossing(lower, start, -1.0), _crossing(upper, start, 1.0)
    return (max(0.0, first) if positive else first), last


def mean_interval(
    sums: ArrayLike, counts: ArrayLike, factors: ArrayLike = (1.0,), *, level: float = 0.95
) -> tuple[float, float]:
    """Student's t interval of a mean over replies, or of a sum of factors times means, over the same problems.

    Args:
      sums: [C, P] (or [P]), sum over the replies to each problem, in each cell.
      counts: of the same shape, the number of replies.
      factors: [C].
      level: coverage, between 0 and 1.

    Returns:
      Lower and upper end; (nan, nan) for one problem, a cell without replies, or values that are all equal, which say
      nothing of how they vary.

    Raises:
      ValueError: shapes differ or are not [C, P], or the level is not between 0 and 1.
    """
    sums, counts = _checked(np.atleast_2d(sums), np.atleast_2d(counts), 2)
    _, high = tails(level)
    P, totals = sums.shape[1], counts.sum(1)
    if P < 2 or not totals.all():
        return NAN, NAN
    means = sums.sum(1) / totals
    parts = np.asarray(factors, np.float64) @ ((sums - means[:, None] * counts) / totals[:, None])
    half = special.stdtrit(P - 1, high) * math.sqrt(P / (P - 1) * (parts**2).sum())
    value = np.asarray(factors, np.float64) @ means
    return (float(value - half), float(value + half)) if half > 1e-12 * max(1.0, abs(value)) else (NAN, NAN)


def mean_ratio_interval(above: ArrayLike, below: ArrayLike, *, level: float = 0.95) -> tuple[float, float]:
    """Interval of the ratio of two means of paired values, one of each a problem, by Fieller's theorem.

    All ratios R for which Student's t interval of the mean of above - R * below holds 0.

    Args:
      above: [P], of the numerator.
      below: [P], of the denominator.
      level: coverage, between 0 and 1.

    Returns:
      Lower and upper end; (-inf, inf) where the denominator cannot be told from 0, (nan, nan) for one problem.

    Raises:
      ValueError: shapes differ or are not [P], or the level is not between 0 and 1.
    """
    x, y = np.asarray(above, np.float64), np.asarray(below, np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"above {x.shape} and below {y.shape} must both have the shape [P]")
    _, high = tails(level)
    if len(x) < 2:
        return NAN, NAN
    t2 = special.stdtrit(len(x) - 1, high) ** 2 / len(x)
    (xx, xy), (_, yy) = np.cov(x, y)
    # (mean x - R mean y)^2 = t^2 / P * var(x - R y), a quadratic equation of R
    a, b, c = y.mean() ** 2 - t2 * yy, x.mean() * y.mean() - t2 * xy, x.mean() ** 2 - t2 * xx
    if a <= 0:
        return -math.inf, math.inf
    root = math.sqrt(max(0.0, b * b - a * c))
    return (b - root) / a, (b + root) / a


class _Rates:
    """Pooled rates of cells over the same problems, and what makes up their covariance."""

    def __init__(self, hits: ArrayLike, words: ArrayLike):
        self.hits, self.words = _checked(hits, words, 2)
        self.total = self.words.sum(1)
        self.defined = self.words.shape[1] > 1 and bool(self.total.all())
        if self.defined:
            self.rates = self.hits.sum(1) / self.total
            self.parts = (self.hits - self.rates[:, None] * self.words) / self.total[:, None]  # [C, P]

    def interval(self, factors: np.ndarray, level: float) -> tuple[float, float]:
        """See `paired_interval`."""
        _, high = tails(level)
        if factors.shape != (len(self.hits),):
            raise ValueError(f"factors {factors.shape} must be one for each of {len(self.hits)} cells")
        if not self.defined:
            return NAN, NAN
        P = self.words.shape[1]
        variance = P / (P - 1) * ((factors @ self.parts) ** 2).sum() + (factors**2 / self.total**2).sum()
        t = special.stdtrit(P - 1, high)
        # Third over second moment of the contrast, were each hit on its own; bursts lengthen both alike.
        second, third = ((factors**k * self.rates / self.total ** (k - 1)).sum() for k in (2, 3))
        moved = third / second * (1 + 2 * special.ndtri(high) ** 2) / 6 if second else 0.0
        centre, half = factors @ self.rates + moved, t * math.sqrt(variance)
        return float(centre - half), float(centre + half)


def _crossing(of: Callable[[float], float], start: float, step: float) -> float:
    """Where a function of a ratio changes its sign, from `start` on in the direction of `step`."""
    sign, at = of(start) > 0, start
    while (of(at + step) > 0) == sign:
        at, step = at + step, 2 * step
        if not math.isfinite(at):
            return at
    return float(optimize.root_scalar(of, bracket=(at, at + step)).root)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p of several tests (Scandinavian Journal of Statistics 6, 1979); NaN do not count."""
    values = np.array(p, np.float64)
    tested = np.flatnonzero(np.isfinite(values))
    order = tested[np.argsort(values[tested], kind="stable")]
    steps = values[order] * (len(order) - np.arange(len(order)))
    values[order] = np.minimum(1, np.maximum.accumulate(steps)) if len(order) else steps
    return values.tolist()


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


def _checked(hits: ArrayLike, words: ArrayLike, dimensions: int) -> tuple[np.ndarray, np.ndarray]:
    hits, words = np.asarray(hits, np.float64), np.asarray(words, np.float64)
    if hits.ndim != dimensions or hits.shape != words.shape:
        shape = "[P]" if dimensions == 1 else "[C, P]"
        raise ValueError(f"hits {hits.shape} and words {words.shape} must both have the shape {shape}")
    return hits, words


@functools.lru_cache(maxsize=4)
def _draws(n: int, n_resamples: int, seed: int) -> np.ndarray:
    """How often each of n problems is drawn, [n_resamples, n] float64; the same for all measures of all conditions."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_resamples).astype(np.float64)
