"""Shares that vary between things which are each tried a few times: hits of n draws, whose chance is a beta's.

    p ~ Beta(alpha, beta),  hits ~ Binomial(n, p)

Few draws spread observed shares further than the chances are: of things whose chance is .5, one in twenty is hit in at
least 8 of 10 draws. The prior, fitted to all of them together, tells how much of the spread is that of the chances.
"""

import dataclasses

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, special, stats

_WIDEST = 8.0  # of the logarithms of both parameters: chances that do not vary have an infinite sum of them
_N_REPLICATES = 199


@dataclasses.dataclass(frozen=True)
class BetaPrior:
    """Distribution of the chances, Beta(alpha, beta)."""

    alpha: float
    beta: float

    def shrunk(self, hits: ArrayLike, draws: ArrayLike) -> np.ndarray:
        """Posterior mean of each chance, (alpha + hits) / (alpha + beta + draws), float64."""
        return (self.alpha + np.asarray(hits, np.float64)) / (self.alpha + self.beta + np.asarray(draws, np.float64))

    def expected(self, n_draws: int) -> np.ndarray:
        """Probability of 0, 1, ... hits in so many draws, [n_draws + 1] float64."""
        return stats.betabinom.pmf(np.arange(n_draws + 1), n_draws, self.alpha, self.beta)

    def above(self, chance: float) -> float:
        """Share of things whose chance is at least so high."""
        return float(stats.beta.sf(chance, self.alpha, self.beta))


def fit(hits: ArrayLike, draws: ArrayLike) -> BetaPrior:
    """The prior under which the hits are most likely (maximum likelihood).

    Args:
      hits: [n], of each thing.
      draws: [n], how often it was tried; things that were never tried say nothing.

    Returns:
      The prior; its parameters lie between e^-8 and e^8, which they reach where chances do not vary, or are all 0 or 1.

    Raises:
      ValueError: shapes differ, hits are not between 0 and the draws, or nothing was tried.
    """
    k, n = np.asarray(hits, np.float64), np.asarray(draws, np.float64)
    if k.ndim != 1 or k.shape != n.shape or not n.any() or np.any((k < 0) | (k > n)):
        raise ValueError(f"hits {k.shape} and draws {n.shape} must be [n] each, hits between 0 and draws, some above 0")
    pairs, times = np.unique(np.stack([k, n]), axis=1, return_counts=True)
    k, n = pairs

    def loss(logs: np.ndarray) -> tuple[float, np.ndarray]:
        a, b = np.exp(logs)
        value = times @ (special.betaln(k + a, n - k + b) - special.betaln(a, b))
        common = special.digamma(a + b) - special.digamma(n + a + b)
        slopes = [
            x * (times @ (special.digamma(at + x) - special.digamma(x) + common)) for x, at in ((a, k), (b, n - k))
        ]
        return -value, -np.array(slopes)

    share = (times @ k + 0.5) / (times @ n + 1)
    starts = [np.log([size * share, size * (1 - share)]) for size in (0.5, 5.0, 500.0)]
    bounds = [(-_WIDEST, _WIDEST)] * 2
    found = [
        optimize.minimize(loss, np.clip(start, -_WIDEST, _WIDEST), jac=True, bounds=bounds, method="L-BFGS-B")
        for start in starts
    ]
    alpha, beta = np.exp(min(found, key=lambda result: result.fun).x)
    return BetaPrior(float(alpha), float(beta))


def misfit(prior: BetaPrior, counts: ArrayLike, *, seed: int = 0, n_replicates: int = _N_REPLICATES) -> float:
    """How often counts that the prior makes fit it, once it is fitted to them, as badly as the observed ones.

    By Pearson's sum of (observed - expected)^2 / expected over the numbers of hits; its distribution is simulated,
    since many of the expected counts are small.

    Args:
      prior: fitted to the counts.
      counts: [draws + 1], things with 0, 1, ... hits.
      seed: of the simulation.
      n_replicates: number of simulated sets.

    Returns:
      A p-value, at least 1 / (n_replicates + 1); a small one says that chances are not distributed as a beta.
    """
    observed = np.asarray(counts, np.float64)
    n_draws, n = len(observed) - 1, int(observed.sum())
    hits = np.arange(n_draws + 1)

    def distance(of: np.ndarray, prior: BetaPrior) -> float:
        expected = n * prior.expected(n_draws)
        return float(((of - expected) ** 2 / np.maximum(expected, 1e-9)).sum())

    rng = np.random.default_rng(seed)
    made = rng.multinomial(n, prior.expected(n_draws) / prior.expected(n_draws).sum(), n_replicates)
    worse = 0
    for of in made:
        again = fit(np.repeat(hits, of), np.full(n, n_draws))
        worse += distance(of, again) >= distance(observed, prior)
    return (1 + worse) / (1 + n_replicates)
