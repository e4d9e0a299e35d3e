"""The bootstrap over problems: in closed form, against drawing one by one, and on the same draws for all cells."""

import math
import random

import numpy as np
import pytest

from backtrack_jax.analysis.statistics import bootstrap_interval, contrast_interval, percentiles, resampled


def test_the_interval_of_two_problems_is_known_in_closed_form() -> None:
    # Draws of two from {0.1, 0.3}: 0.1, 0.2, 0.3 with probability 1/4, 1/2, 1/4.
    assert bootstrap_interval([1, 3], [10, 10], level=0.6) == pytest.approx((0.1, 0.3))
    assert bootstrap_interval([1, 3], [10, 10], level=0.4) == pytest.approx((0.2, 0.2))
    # Unequal lengths: the middle one is the pooled rate 4/40, not the mean of the rates.
    assert bootstrap_interval([1, 3], [10, 30], level=0.4) == pytest.approx((0.1, 0.1))


def test_the_interval_of_many_problems_is_that_of_the_delta_method() -> None:
    rng = np.random.default_rng(1)
    words = rng.integers(80, 120, size=400)
    hits = rng.binomial(words, rng.beta(2, 38, size=400))
    rate = hits.sum() / words.sum()
    error = math.sqrt(((hits - rate * words) ** 2).sum()) / words.sum()
    low, high = bootstrap_interval(hits, words, n_resamples=20_000)
    assert low == pytest.approx(rate - 1.96 * error, abs=0.05 * error + 2e-4)
    assert high == pytest.approx(rate + 1.96 * error, abs=0.05 * error + 2e-4)


def test_the_interval_is_that_of_drawing_problems_one_by_one() -> None:
    hits, words = [0, 4, 1, 9, 2, 0, 3], [50, 60, 10, 90, 40, 30, 45]
    rng = random.Random(3)
    rates = []
    for _ in range(20_000):
        drawn = [rng.randrange(7) for _ in range(7)]
        rates.append(sum(hits[i] for i in drawn) / sum(words[i] for i in drawn))
    rates.sort()
    low, high = bootstrap_interval(hits, words, level=0.9, n_resamples=20_000)
    assert low == pytest.approx(rates[1000], abs=2e-3)
    assert high == pytest.approx(rates[19_000], abs=2e-3)


def test_the_interval_depends_on_the_seed_alone() -> None:
    hits, words = np.arange(20), np.full(20, 100)
    assert bootstrap_interval(hits, words, seed=1) == bootstrap_interval(hits, words, seed=1)
    assert bootstrap_interval(hits, words, seed=1) != bootstrap_interval(hits, words, seed=2)


def test_what_has_no_interval_says_so() -> None:
    assert all(math.isnan(bound) for bound in bootstrap_interval([1], [10]))
    assert bootstrap_interval([0, 0], [0, 0]) == (0.0, 0.0)
    with pytest.raises(ValueError, match=r"hits \(2,\) and words \(3,\) must both have the shape \[P\]"):
        bootstrap_interval([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match=r"level 95 must lie between 0 and 1"):
        bootstrap_interval([1, 2], [1, 2], level=95)


def test_a_contrast_is_that_of_drawing_the_same_problems_for_all_cells() -> None:
    rng = np.random.default_rng(4)
    words = rng.integers(20, 60, size=(2, 9))
    hits = rng.binomial(words, np.array([[0.3], [0.1]]) * rng.uniform(0.2, 2, 9))
    drawn = []
    for _ in range(20_000):
        at = rng.integers(0, 9, 9)
        drawn.append(2 * hits[0, at].sum() / words[0, at].sum() - hits[1, at].sum() / words[1, at].sum())
    found = contrast_interval([(2, hits[0], words[0]), (-1, hits[1], words[1])], n_resamples=20_000)
    assert found == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=5e-3)


def test_what_cells_share_cancels() -> None:
    """Problems differ widely, and the second cell is the first with a tenth more of every rate."""
    words = np.full(12, 100.0)
    hits = np.arange(12.0)
    low, high = contrast_interval([(1, hits + 10, words), (-1, hits, words)])
    assert (low, high) == pytest.approx((0.1, 0.1))
    assert np.ptp(bootstrap_interval(hits, words)) > 0.02


def test_cells_of_a_contrast_have_the_same_problems() -> None:
    with pytest.raises(ValueError, match=r"hits \(3,\) and words \(3,\) must both have the shape \[P\], here \(2,\)"):
        contrast_interval([(1, [1, 2], [3, 4]), (-1, [1, 2, 3], [4, 5, 6])])


def test_a_statistic_in_parts_is_that_of_all_resamples() -> None:
    """With as many problems in each resample as there are, and the same ones whatever the number of parts."""
    whole = resampled(lambda draws: draws, 7, n_resamples=50, seed=3)
    assert whole.shape == (50, 7) and (whole.sum(1) == 7).all()
    np.testing.assert_array_equal(whole, resampled(lambda draws: draws, 7, n_resamples=50, seed=3, parts=9))
    assert percentiles(np.array([math.nan, 1.0, math.nan, 3.0]), (0, 1)) == (1, 3)
    assert all(math.isnan(bound) for bound in percentiles(np.array([math.nan])))
