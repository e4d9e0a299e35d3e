"""Whether two directions add up: an index of interaction, and the misfit of a surface that one index explains.

    D = f(a, b) - f(a, 0) - f(0, b) + f(0, 0)                                              [units of f, of one problem]

D is 0 where effects add up on the scale of f. That is not yet "two directions": where a saturating function of one sum
decides, f = s(alpha a + beta b), D has the sign of the curvature of s. So the surface f(a, b) is compared with the best
such function, s monotone, as well. What is left is what no single index explains.
"""

import dataclasses

import numpy as np
from numpy.typing import ArrayLike
from sklearn.isotonic import isotonic_regression

_ANGLES = np.linspace(-np.pi / 2, np.pi / 2, 37)


def index(both: ArrayLike, first: ArrayLike, second: ArrayLike, neither: ArrayLike) -> np.ndarray:
    """D of each problem, from f at the four corners, [P] each."""
    a, b, c, d = (np.asarray(values, np.float64) for values in (both, first, second, neither))
    return a - b - c + d


@dataclasses.dataclass(frozen=True)
class SingleIndex:
    """The best surface s(alpha a + beta b) with a monotone s.

    Attributes:
      alpha: weight of a, cos of an angle, >= 0.
      beta: weight of b, sin of that angle.
      fitted: its values at the points.
      misfit: mean of the squared residuals.
      p: share of surfaces of this kind, with the problems' own deviations resampled, that are fitted as badly; NaN for
        fewer than two problems.
    """

    alpha: float
    beta: float
    fitted: np.ndarray
    misfit: float
    p: float


def single_index(points: ArrayLike, values: ArrayLike, *, draws: int = 99, seed: int = 0) -> SingleIndex:
    """Fits a monotone function of one weighted sum to the mean surface of problems, and tests it.

    The test draws problems with replacement: their deviations from the mean surface are added to the fitted one, which
    gives surfaces that one index explains, and each of them is fitted as well.

    Args:
      points: [n, 2], (a, b).
      values: [P, n] of each problem at each point.
      draws: surfaces under the null.
      seed: of the draws.

    Returns:
      The fit. Angles are searched in steps of 5 degrees; s may rise or fall.

    Raises:
      ValueError: shapes that do not fit, or values that are not finite.
    """
    at, f = np.asarray(points, np.float64), np.asarray(values, np.float64)
    if at.ndim != 2 or at.shape[1] != 2 or f.ndim != 2 or f.shape[1] != len(at) or not np.isfinite(f).all():
        raise ValueError(f"points {at.shape} and values {f.shape}, expected [n, 2] and [P, n], all finite")
    sums = np.round(np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1) @ at.T, 9)  # ties are ties
    grouped = [np.unique(row, return_inverse=True, return_counts=True) for row in sums]

    def best(surface: np.ndarray) -> tuple[int, np.ndarray, float]:
        found = (0, surface, np.inf)
        for angle, (_, group, counts) in enumerate(grouped):
            means = np.bincount(group, surface) / counts
            for rising in (True, False):
                fitted = isotonic_regression(means, sample_weight=counts, increasing=rising)[group]
                misfit = float(np.mean((surface - fitted) ** 2))
                if misfit < found[2] - 1e-15:
                    found = (angle, fitted, misfit)
        return found

    mean = f.mean(0)
    angle, fitted, misfit = best(mean)
    p = np.nan
    if len(f) > 1:
        rng, deviations = np.random.default_rng(seed), f - mean
        drawn = [best(fitted + deviations[rng.integers(len(f), size=len(f))].mean(0))[2] for _ in range(draws)]
        p = (1 + np.sum(np.array(drawn) >= misfit)) / (1 + draws)
    return SingleIndex(float(np.cos(_ANGLES[angle])), float(np.sin(_ANGLES[angle])), fitted, misfit, float(p))
