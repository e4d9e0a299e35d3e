"""Intervals over problems: against plain implementations and each other, and what they do where little is known."""

import math
from itertools import product
from typing import Any

import numpy as np
import pytest
from scipy import stats

from backtrack_jax.analysis.statistics import (
    Region,
    detectable,
    mean_interval,
    mean_ratio_interval,
    paired_interval,
    percentiles,
    rate_interval,
    ratio_interval,
    resampled,
    verdict,
)

RNG = np.random.default_rng(5)
WORDS = RNG.integers(60, 111, (3, 40)).astype(float)
MORE = RNG.gamma(1.0, 1.0, 40)  # what a problem does to all cells
HITS = np.stack([RNG.poisson(rate * words * MORE) for rate, words in zip((0.03, 0.05, 0.006), WORDS, strict=True)])
HITS = HITS.astype(float)


def effective_size(hits: np.ndarray, words: np.ndarray, level: float) -> float:
    """By loops."""
    problems, n, share = len(words), sum(words), sum(hits) / sum(words)
    between = sum((h - share * w) ** 2 for h, w in zip(hits, words, strict=True)) * problems / (problems - 1)
    burst = min(2, max(words))
    effect = (between + burst**2) / (n * share * (1 - share) + burst)
    tail = (1 + level) / 2
    return max(1.0, min(n, float(n / effect * (stats.t.ppf(tail, n - 1) / stats.t.ppf(tail, problems - 1)) ** 2)))


@pytest.mark.parametrize("level", [0.9, 0.95])
@pytest.mark.parametrize("cell", [0, 1, 2])
def test_a_rate_has_clopper_and_pearsons_interval_at_the_effective_size(cell: int, level: float) -> None:
    hits, words = HITS[cell], WORDS[cell]
    n = effective_size(hits, words, level)
    x = n * hits.sum() / words.sum()
    low, high = rate_interval(hits, words, level=level)
    # At the lower end as many hits or more, at the upper one as few or fewer, have the probability of one tail.
    assert stats.beta.cdf(low, x, n - x + 1) == pytest.approx((1 - level) / 2)
    assert stats.beta.sf(high, x + 1, n - x) == pytest.approx((1 - level) / 2)


def test_of_units_that_are_independent_it_is_the_plain_one() -> None:
    """300 problems of one unit each, a third of them hits: no clustering, and the variance is known well."""
    hits = np.arange(300) % 3 == 0
    plain = stats.binomtest(100, 300).proportion_ci(method="exact")
    assert rate_interval(hits, np.ones(300)) == pytest.approx((plain.low, plain.high), abs=2e-3)


def test_no_rate_has_an_interval_without_width() -> None:
    words = np.full(80, 90.0)
    zero = rate_interval(np.zeros(80), words)
    assert zero[0] == 0 and 3.7 / 7200 < zero[1] < 8 / 7200  # wider than the rule of three: hits may come in pairs
    one = rate_interval(np.eye(80)[0], words)
    assert one[1] > zero[1]
    assert rate_interval(words, words) == pytest.approx((1 - zero[1], 1.0))
    assert rate_interval(np.ones(9), np.ones(9))[0] == pytest.approx(0.025 ** (1 / 9))  # nine of nine, no clustering
    for hits, of in product(([0, 0], [3, 4], [0, 7], [7, 7]), ([7, 7], [9, 8])):
        low, high = rate_interval(hits, of)
        assert 0 <= low < high <= 1


def test_one_problem_says_next_to_nothing() -> None:
    assert rate_interval([0], [1000]) == pytest.approx((0, 0.975))
    low, high = rate_interval([100], [1000])
    assert low < 1e-3 and high > 0.9


def test_what_has_no_interval_says_so() -> None:
    assert all(math.isnan(end) for end in rate_interval([0, 0], [0, 0]))
    for of in (paired_interval(HITS[:, :1], WORDS[:, :1], [1, -1, 0]), mean_interval([3.0], [1.0])):
        assert all(math.isnan(end) for end in of)
    assert all(math.isnan(end) for end in mean_interval([2.0, 2.0, 4.0], [1, 1, 2]))  # all means are equal
    nothing = np.stack([WORDS[0], 0 * WORDS[0]])
    assert all(math.isnan(end) for end in ratio_interval(0 * nothing, nothing, [1, 0], [0, 1]))
    with pytest.raises(ValueError, match=r"hits \(2,\) and words \(3,\) must both have the shape \[P\]"):
        rate_interval([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match=r"hits \(2,\) and words \(2,\) must both have the shape \[C, P\]"):
        paired_interval([1, 2], [1, 2], [1, 1])
    with pytest.raises(ValueError, match=r"factors \(2,\) must be one for each of 3 cells"):
        paired_interval(HITS, WORDS, [1, -1])
    with pytest.raises(ValueError, match=r"level 95 must lie between 0 and 1"):
        rate_interval([1, 2], [1, 2], level=95)


def contrast_by_loops(hits: np.ndarray, words: np.ndarray, factors: list[float], level: float) -> tuple[float, float]:
    cells, problems = range(len(factors)), range(hits.shape[1])
    total = [sum(words[c]) for c in cells]
    rate = [sum(hits[c]) / total[c] for c in cells]
    part = [sum(factors[c] * (hits[c][i] - rate[c] * words[c][i]) / total[c] for c in cells) for i in problems]
    variance = np.var(part, ddof=1) * len(part) + sum((factors[c] / total[c]) ** 2 for c in cells)
    alone = [sum(factors[c] ** k * sum(hits[c]) / total[c] ** k for c in cells) for k in (2, 3)]
    skewness = alone[1] / alone[0] / variance**0.5
    t, z = float(stats.t.ppf((1 + level) / 2, len(part) - 1)), float(stats.norm.ppf((1 + level) / 2))
    middle = sum(factors[c] * rate[c] for c in cells) + variance**0.5 * skewness * (2 * z**2 + 1) / 6
    return float(middle - t * variance**0.5), float(middle + t * variance**0.5)


@pytest.mark.parametrize("factors", [[1.0, -1.0, 0.0], [1.0, 0.5, -1.5], [0.0, 0.0, 1.0]])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_a_contrast_is_that_of_loops(factors: list[float], level: float) -> None:
    assert paired_interval(HITS, WORDS, factors, level=level) == pytest.approx(
        contrast_by_loops(HITS, WORDS, factors, level)
    )


def test_with_many_hits_a_contrast_is_the_paired_t_interval() -> None:
    words = np.full((2, 40), 1000.0)
    hits = np.random.default_rng(0).binomial(1000, np.array([[0.3], [0.4]]) * np.clip(MORE, 0.5, 2))
    plain = stats.ttest_rel(hits[0] / 1000, hits[1] / 1000).confidence_interval()
    width = plain.high - plain.low
    assert paired_interval(hits, words, [1, -1]) == pytest.approx((plain.low, plain.high), abs=0.01 * width)


def test_what_cells_share_cancels() -> None:
    """Problems differ widely, and the first cell is the second with a tenth more of every rate."""
    words = np.full(12, 100.0)
    hits = np.arange(12.0)
    low, high = paired_interval([hits + 10, hits], [words, words], [1, -1])
    assert low < 0.1 < high and high - low < 0.006
    assert np.ptp(rate_interval(hits, words)) > 0.02


def test_cells_without_a_hit_have_a_difference_that_is_not_certain() -> None:
    low, high = paired_interval(0 * HITS, WORDS, [1, -1, 0])
    assert low == -high and 1 / WORDS[0].sum() < high < 4 / WORDS[0].sum()


@pytest.mark.parametrize(
    ("above", "below"),
    [([1, 0, -1], [0, 1, -1]), ([1, 0, 0], [0, 0, 1]), ([1, 0, -1], [0, -1, 1]), ([0, 0, 1], [0, 1, 0])],
)
def test_a_ratio_holds_what_the_contrast_does_not_exclude(above: list[float], below: list[float]) -> None:
    low, high = ratio_interval(HITS, WORDS, above, below, level=0.9)
    middle = np.array(above) @ (HITS.sum(1) / WORDS.sum(1)) / (np.array(below) @ (HITS.sum(1) / WORDS.sum(1)))
    assert low < middle < high
    for ratio in np.linspace(low - 2, high + 2, 401):
        if abs(ratio - low) > 1e-6 < abs(ratio - high):
            first, last = paired_interval(HITS, WORDS, np.array(above) - ratio * np.array(below), level=0.9)
            assert (first <= 0 <= last) == (low < ratio < high)


def test_ratios_of_what_may_be_zero_are_unbounded() -> None:
    hits = HITS.copy()
    hits[2] = 0
    low, high = ratio_interval(hits, WORDS, [1, 0, 0], [0, 0, 1])  # at least so many times a rate of zero
    assert 10 < low < hits[0].sum() and high == math.inf
    assert ratio_interval(hits, WORDS, [0, 0, 1], [1, 0, 0])[0] == 0
    assert 0 < ratio_interval(hits, WORDS, [0, 0, 1], [1, 0, 0])[1] < 0.1
    assert ratio_interval(0 * hits, WORDS, [1, 0, 0], [0, 0, 1]) == (0, math.inf)
    same = np.stack([HITS[0], HITS[0], HITS[0]])
    assert ratio_interval(same, WORDS, [1, 0, -1], [0, 1, -1]) == (-math.inf, math.inf)  # no effect to divide by


def test_a_mean_has_students_interval() -> None:
    values = np.random.default_rng(1).normal(size=(2, 30))
    alone = stats.ttest_1samp(values[0], 0).confidence_interval(0.9)
    assert mean_interval(values[0], np.ones(30), level=0.9) == pytest.approx((alone.low, alone.high))
    pair = stats.ttest_rel(*values).confidence_interval()
    assert mean_interval(values, np.ones((2, 30)), [1, -1]) == pytest.approx((pair.low, pair.high))
    # Two replies count as two: the mean is pooled, and the problem stays the unit.
    counts = np.where(np.arange(30) < 10, 2, 1)
    low, high = mean_interval(values[0] * counts, counts)
    mean = (values[0] * counts).sum() / 40
    error = math.sqrt(30 / 29 * (((values[0] - mean) * counts) ** 2).sum()) / 40
    assert (low, high) == pytest.approx((mean - 2.045 * error, mean + 2.045 * error), abs=1e-4)


def test_verdicts() -> None:
    region = Region(0.67, 1.5)
    assert verdict(0.7, 1.4, region, 80) == "holds"
    assert verdict(0.6, 1.4, region, 80) == verdict(0.7, 1.6, region, 80) == "undecided"
    assert verdict(1.5, 1.6, region, 80) == verdict(0.1, 0.67, region, 80) == "fails"
    assert verdict(0.7, 1.4, region, 79) == verdict(math.nan, math.nan, region, 80) == "undecided"
    assert verdict(2.1, math.inf, Region(low=2), 80) == "holds"
    assert verdict(2.0, math.inf, Region(low=2), 80) == "undecided"  # bounds do not belong to it
    assert verdict(-math.inf, math.inf, Region(low=2), 80) == "undecided"
    assert verdict(-math.inf, -0.1, Region(high=0), 80) == "holds"
    assert detectable(1.0, 3.0) == 1 and math.isnan(detectable(1.0, math.inf)) and math.isnan(detectable(math.nan, 1))


def test_a_statistic_in_parts_is_that_of_all_resamples() -> None:
    """With as many problems in each resample as there are, and the same ones whatever the number of parts."""
    whole = resampled(lambda draws: draws, 7, n_resamples=50, seed=3)
    assert whole.shape == (50, 7) and (whole.sum(1) == 7).all()
    np.testing.assert_array_equal(whole, resampled(lambda draws: draws, 7, n_resamples=50, seed=3, parts=9))
    assert percentiles(np.array([math.nan, 1.0, math.nan, 3.0]), (0, 1)) == (1, 3)
    assert all(math.isnan(bound) for bound in percentiles(np.array([math.nan])))


@pytest.mark.parametrize("level", [0.5, 0.92])
def test_the_ratio_of_two_means_is_every_ratio_that_student_s_t_does_not_reject(level: float) -> None:
    """Against scipy's test of one sample, on a grid of ratios."""
    rng = np.random.default_rng(0)
    below = rng.normal(1.3, 0.8, 40)
    above = 0.4 * below + rng.normal(0, 0.5, 40)
    low, high = mean_ratio_interval(above, below, level=level)
    for ratio, kept in ((low + 1e-4, True), (high - 1e-4, True), (low - 1e-4, False), (high + 1e-4, False)):
        test: Any = stats.ttest_1samp(above - ratio * below, 0)
        assert (test.pvalue > 1 - level) == kept
    assert mean_ratio_interval(above, below - below.mean(), level=level) == (-math.inf, math.inf)
    assert all(map(math.isnan, mean_ratio_interval([1.0], [2.0])))
    with pytest.raises(ValueError, match=r"above \(2,\) and below \(3,\) must both have the shape \[P\]"):
        mean_ratio_interval([1, 2], [1, 2, 3])
