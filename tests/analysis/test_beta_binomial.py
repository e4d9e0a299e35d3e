"""The beta prior of chances: its optimum is scipy's, it finds what made the hits, and its fit is judged fairly."""

import numpy as np
import pytest
from scipy import optimize, stats

from backtrack_jax.analysis import beta_binomial

RNG = np.random.default_rng(0)


def drawn(
    alpha: float, beta: float, n: int, draws: np.ndarray | int = 10, rng: np.random.Generator = RNG
) -> np.ndarray:
    return rng.binomial(draws, rng.beta(alpha, beta, n))


@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 2.0), (3.0, 1.0), (8.0, 8.0)])
def test_the_fit_is_the_optimum_of_scipys_likelihood(alpha: float, beta: float) -> None:
    """By another optimiser, without derivatives; things are tried unequally often, and some never."""
    draws = RNG.integers(0, 15, 300)
    hits = drawn(alpha, beta, 300, draws)

    def loss(logs: np.ndarray) -> float:
        return -stats.betabinom.logpmf(hits, draws, *np.exp(logs)).sum()

    best = optimize.minimize(loss, [0.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-7, "fatol": 1e-9})
    found = beta_binomial.fit(hits, draws)
    np.testing.assert_allclose([found.alpha, found.beta], np.exp(best.x), rtol=1e-3)
    assert loss(np.log([found.alpha, found.beta])) <= best.fun + 1e-6


@pytest.mark.parametrize(("alpha", "beta"), [(0.4, 3.0), (2.0, 2.0), (5.0, 1.0)])
def test_known_parameters_are_recovered(alpha: float, beta: float) -> None:
    found = beta_binomial.fit(drawn(alpha, beta, 20000), np.full(20000, 10))
    np.testing.assert_allclose([found.alpha, found.beta], [alpha, beta], rtol=0.08)


def test_shrunk_shares_are_nearer_to_the_chances_than_raw_ones_and_unbiased_where_these_are_chosen() -> None:
    p = RNG.beta(1.0, 4.0, 5000)
    hits, draws = RNG.binomial(10, p), np.full(5000, 10)
    prior = beta_binomial.fit(hits, draws)
    shrunk = prior.shrunk(hits, draws)
    np.testing.assert_allclose(shrunk, (prior.alpha + hits) / (prior.alpha + prior.beta + 10))
    assert np.mean((shrunk - p) ** 2) < 0.85 * np.mean((hits / 10 - p) ** 2)
    top = np.argsort(hits)[-1000:]
    assert (
        shrunk[top].mean() == pytest.approx(p[top].mean(), abs=0.01) and (hits[top] / 10).mean() > p[top].mean() + 0.04
    )


def test_what_the_prior_expects_is_scipys() -> None:
    prior = beta_binomial.BetaPrior(0.7, 2.5)
    np.testing.assert_allclose(prior.expected(6), stats.betabinom.pmf(np.arange(7), 6, 0.7, 2.5))
    assert prior.expected(6).sum() == pytest.approx(1)
    assert prior.above(0.8) == pytest.approx(np.mean(RNG.beta(0.7, 2.5, 200_000) >= 0.8), abs=3e-3)


def test_chances_that_do_not_vary_have_their_limits() -> None:
    for share in (0.0, 1.0):
        found = beta_binomial.fit(np.full(8, 10 * share), np.full(8, 10))
        assert found.shrunk(10 * share, 10) == pytest.approx(share, abs=1e-3)
    level = beta_binomial.fit(np.full(50, 5), np.full(50, 10))
    assert level.alpha > 1000 and level.shrunk(8, 10) == pytest.approx(0.5, abs=0.01)


def test_the_fit_is_rejected_where_chances_are_no_betas() -> None:
    """But two kinds of things, at .2 and .8."""
    two_kinds = np.bincount(RNG.binomial(10, RNG.choice([0.2, 0.8], 300)), minlength=11)
    prior = beta_binomial.fit(np.repeat(np.arange(11), two_kinds), np.full(300, 10))
    assert beta_binomial.misfit(prior, two_kinds, seed=1, n_replicates=39) <= 0.05
    again = beta_binomial.misfit(prior, two_kinds, seed=1, n_replicates=39)
    assert again == beta_binomial.misfit(prior, two_kinds, seed=1, n_replicates=39)


@pytest.mark.slow
def test_the_fit_is_seldom_rejected_where_chances_are_betas() -> None:
    """In about one of twenty sets."""
    p_values = []
    for seed in range(40):
        hits = drawn(0.6, 2.0, 100, rng=np.random.default_rng(seed))
        prior, counts = beta_binomial.fit(hits, np.full(100, 10)), np.bincount(hits, minlength=11)
        p_values.append(beta_binomial.misfit(prior, counts, seed=seed, n_replicates=19))
    assert np.mean(np.array(p_values) <= 0.05) <= 0.15 and 0.35 < np.mean(p_values) < 0.65


@pytest.mark.parametrize(("hits", "draws"), [([3], [2]), ([-1], [2]), ([1, 2], [3]), ([0, 0], [0, 0]), ([[1]], [[2]])])
def test_impossible_counts_are_refused(hits: list, draws: list) -> None:
    with pytest.raises(ValueError, match=r"hits between 0 and draws"):
        beta_binomial.fit(hits, draws)
