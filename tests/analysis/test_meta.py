"""The mean over pairs against formulas written out here, and what its intervals cover."""

from typing import Any

import numpy as np
import pytest
from scipy import optimize, stats

from backtrack_jax.analysis import meta

CASES = [
    ([0.9, 0.2, 0.5, 0.1], [0.03, 0.02, 0.2, 0.1]),
    ([0.5, 0.52, 0.49], [0.1, 0.2, 0.15]),  # nothing between them
    ([-1.0, 4.0], [0.5, 0.1]),
    ([0.0, 0.0, 0.1], [1.0, 1.0, 2.0]),
]


def restricted(tau2: float, y: np.ndarray, s: np.ndarray) -> float:
    """Minus the restricted log-likelihood, as the density of contrasts that are free of the mean."""
    k = len(y)
    contrasts = np.eye(k)[:-1] - np.eye(k)[1:]
    covariance = contrasts @ np.diag(s**2 + tau2) @ contrasts.T
    density: Any = stats.multivariate_normal
    return -float(density(np.zeros(k - 1), covariance).logpdf(contrasts @ y))


@pytest.mark.parametrize(("estimates", "errors"), CASES)
def test_variance_between_pairs_maximises_the_likelihood_of_contrasts(estimates: list, errors: list) -> None:
    y, s = np.array(estimates), np.array(errors)
    found = meta.between_variance(y, s**2)
    ends: list[Any] = [
        optimize.minimize_scalar(restricted, bounds=bounds, args=(y, s), method="bounded")
        for bounds in ((0, 0.5), (0, 40))
    ]
    best = min(ends, key=lambda result: result.fun)
    assert restricted(found, y, s) <= best.fun + 1e-6
    np.testing.assert_allclose(found, best.x if best.x > 1e-4 else 0, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("estimates", "errors"), CASES)
def test_the_mean_and_its_intervals_are_those_of_weighted_least_squares(estimates: list, errors: list) -> None:
    y, s = np.array(estimates), np.array(errors)
    k, found = len(y), meta.random_effects(y, s, level=0.9)
    w = 1 / (s**2 + found.tau**2)
    fit = np.linalg.lstsq(np.sqrt(w)[:, None], np.sqrt(w) * y, rcond=None)
    np.testing.assert_allclose(found.mean, fit[0][0], atol=1e-12)
    error = np.sqrt(np.sum(w * (y - found.mean) ** 2) / (k - 1) / w.sum())  # the residual variance of that fit
    np.testing.assert_allclose((found.low, found.high), stats.t.interval(0.9, k - 1, found.mean, error), atol=1e-10)
    if k > 2:
        wide = np.sqrt(found.tau**2 + error**2)
        ends = stats.t.interval(0.9, k - 2, found.mean, wide)
        np.testing.assert_allclose((found.predicted_low, found.predicted_high), ends, atol=1e-10)
    else:
        assert np.isnan(found.predicted_low) and np.isnan(found.predicted_high)
    q = np.sum((y - np.average(y, weights=1 / s**2)) ** 2 / s**2)
    np.testing.assert_allclose(found.i_squared, max(0, 1 - (k - 1) / q) if q else 0)


@pytest.mark.parametrize(("k", "further"), [(3, (0.90, 1.0)), (10, (0.91, 0.98))])
def test_intervals_cover_what_they_say(k: int, further: tuple[float, float]) -> None:
    """Of the mean .95; of a further pair about that, for few pairs more."""
    rng, n, covered, predicted = np.random.default_rng(k), 400, 0, 0
    for _ in range(n):
        errors = rng.uniform(0.05, 0.3, k)
        truths = 0.4 + 0.3 * rng.standard_normal(k + 1)
        found = meta.random_effects(truths[:k] + errors * rng.standard_normal(k), errors)
        covered += found.low < 0.4 < found.high
        predicted += found.predicted_low < truths[k] < found.predicted_high
    assert 0.92 <= covered / n <= 0.985
    assert further[0] <= predicted / n <= further[1]


def test_problems_are_resampled_for_all_pairs_together() -> None:
    """Where all pairs go up and down with the problem, their mean is as uncertain as one of them."""
    rng = np.random.default_rng(0)
    easy = rng.standard_normal(100)
    pairs = [{f"p{i}": c + easy[i] for i in range(100)} for c in (0.0, 1.0, 2.0)]
    pairs[1]["alone"] = 100.0
    value, (low, high), n = meta.resampled_jointly(pairs)
    assert n == 100 and value == pytest.approx(1 + easy.mean())
    expected = stats.norm.interval(0.95, value, easy.std() / 10)
    np.testing.assert_allclose((low, high), expected, atol=0.03)
    value, ends, n = meta.resampled_jointly([{"a": 1.0}, {"b": 1.0}])
    assert np.isnan(value) and np.isnan(ends).all() and n == 0


@pytest.mark.parametrize(
    ("estimates", "errors"),
    [([1.0], [1.0]), ([1.0, 2.0], [1.0]), ([1.0, 2.0], [1.0, 0.0]), ([1.0, np.nan], [1.0, 1.0])],
)
def test_what_is_no_sample_of_pairs_is_refused(estimates: list, errors: list) -> None:
    with pytest.raises(ValueError, match="expected"):
        meta.random_effects(estimates, errors)
