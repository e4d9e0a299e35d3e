"""Several pairs of models together: the mean of their effects, whose second factor is which pairs there are.

Each pair gives an estimate and its standard error over problems; pairs differ by more than that. A mean with the normal
approximation (DerSimonian and Laird) covers .86 instead of .95 at three pairs. Here the variance between pairs is
estimated by restricted maximum likelihood, and the interval is that of Hartung and Knapp.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, special

from backtrack_jax.analysis.statistics import NAN, percentiles, tails


@dataclasses.dataclass(frozen=True)
class RandomEffects:
    """Mean of the effects of k pairs.

    Attributes:
      mean: weighted by the inverse of both variances.
      low: lower end of its interval (Hartung and Knapp, Statistics in Medicine 20 (2001)): t with k - 1 degrees.
      high: upper end.
      predicted_low: lower end of the interval for a further pair (Higgins, Thompson and Spiegelhalter, Journal of the
        Royal Statistical Society A 172 (2009)): t with k - 2 degrees; NaN below three pairs.
      predicted_high: upper end.
      tau: standard deviation between pairs.
      i_squared: share of the spread of estimates that is not their errors'.
      k: number of pairs.
    """

    mean: float
    low: float
    high: float
    predicted_low: float
    predicted_high: float
    tau: float
    i_squared: float
    k: int


def random_effects(estimates: ArrayLike, errors: ArrayLike, *, level: float = 0.95) -> RandomEffects:
    """The mean effect of pairs of models, each of which is one draw of what pairs there could be.

    Args:
      estimates: [k], one a pair.
      errors: [k], their standard errors over problems, > 0.
      level: coverage of both intervals.

    Raises:
      ValueError: fewer than two pairs, or an error that is not a positive number.
    """
    y, errors = np.asarray(estimates, np.float64), np.asarray(errors, np.float64)
    if y.ndim != 1 or len(y) < 2 or y.shape != errors.shape:
        raise ValueError(f"estimates have shape {y.shape}, errors {errors.shape}; expected one of each, at least 2")
    if not (np.isfinite(y).all() and np.isfinite(errors).all() and (errors > 0).all()):
        raise ValueError(f"estimates={y.tolist()}, errors={errors.tolist()}, expected numbers, and errors above 0")
    k, variances = len(y), errors**2
    tau2 = between_variance(y, variances)
    weights = 1 / (variances + tau2)
    mean = float(weights @ y / weights.sum())
    error = float(np.sqrt(weights @ (y - mean) ** 2 / (k - 1) / weights.sum()))
    tail, _ = tails(level)
    half = -float(special.stdtrit(k - 1, tail)) * error
    further = -float(special.stdtrit(k - 2, tail)) * np.sqrt(tau2 + error**2) if k > 2 else NAN
    fixed = 1 / variances
    spread = float(fixed @ (y - fixed @ y / fixed.sum()) ** 2)
    i_squared = max(0.0, (spread - (k - 1)) / spread) if spread else 0.0
    return RandomEffects(
        mean,
        low=mean - half,
        high=mean + half,
        predicted_low=float(mean - further),
        predicted_high=float(mean + further),
        tau=float(np.sqrt(tau2)),
        i_squared=i_squared,
        k=k,
    )


def between_variance(estimates: np.ndarray, variances: np.ndarray) -> float:
    """Variance between pairs by restricted maximum likelihood, >= 0."""

    def minus_likelihood(tau2: float) -> float:
        total = variances + tau2
        weights = 1 / total
        mean = weights @ estimates / weights.sum()
        return float(np.log(total).sum() + np.log(weights.sum()) + weights @ (estimates - mean) ** 2) / 2

    # The maximum may lie at 0, and there may be more than one: the best of a grid is refined.
    most = float(np.ptp(estimates) ** 2 + variances.max())
    grid = np.concatenate([[0.0], np.geomspace(1e-6 * most, 10 * most, 60)])
    best = int(np.argmin([minus_likelihood(value) for value in grid]))
    low, high = grid[max(0, best - 1)], grid[min(len(grid) - 1, best + 1)]
    found = optimize.minimize_scalar(minus_likelihood, bounds=(low, high), method="bounded", options={"xatol": 1e-10})
    return 0.0 if minus_likelihood(0.0) <= found.fun else float(found.x)


def resampled_jointly(
    effects: Sequence[dict[str, float]], *, n_resamples: int = 2000, seed: int = 0
) -> tuple[float, tuple[float, float], int]:
    """The plain mean over these pairs, with problems as the only factor, drawn for all pairs together.

    Args:
      effects: of each pair, problem -> effect.
      n_resamples: draws.
      seed: of the draws.

    Returns:
      Mean over pairs of their means over the problems that all of them have, its 95 % percentile interval, and how many
      problems these are; NaN where there are fewer than two.
    """
    shared = sorted(set.intersection(*(set(found) for found in effects)))
    if len(shared) < 2:
        return NAN, (NAN, NAN), len(shared)
    values = np.array([[found[name] for name in shared] for found in effects]).mean(0)
    draws = np.random.default_rng(seed).integers(len(shared), size=(n_resamples, len(shared)))
    return float(values.mean()), percentiles(values[draws].mean(1)), len(shared)
