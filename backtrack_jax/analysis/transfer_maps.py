"""Linear maps from one model's residual stream into another's, fitted on states that both have at the same characters.

Rows of x [n, D] and y [n, E] are states of the two models with which they have read the same text. Every map is a
matrix W [D, E]: a direction v of the first model, which is a difference, becomes v W, without any offset.

    ridge        W = (Xc'Xc + a I)^-1 Xc'Yc, both centred; a by cross-validation, with folds of problems
    orthogonal   W = P R Q', principal components P and Q of either model, R the rotation of Procrustes between them
    anchors      W = A' (B+)', rows of A and B the centred states at n anchors, of norm 1: that direction of the second
                 model whose products with its anchors are those of v with the first one's (arXiv 2209.15430)
"""

import dataclasses

import numpy as np
from scipy import linalg
from sklearn.model_selection import GroupKFold

STRENGTHS = tuple(10.0**k for k in range(-6, 3))
"""Ridge strengths that are tried, in units of the mean variance of a coordinate of the centred x."""


@dataclasses.dataclass(frozen=True)
class Strength:
    """The ridge strength that predicts states of other problems best.

    Attributes:
      value: one of `STRENGTHS`.
      r2: 1 - squared error / squared distance from the mean, of states in problems that were not fitted.
    """

    value: float
    r2: float


def ridge(x: np.ndarray, y: np.ndarray, strength: float) -> np.ndarray:
    """Ridge regression of centred y on centred x, [D, E] float64.

    Args:
      x: [n, D].
      y: [n, E].
      strength: a / (trace(Xc'Xc) / D), > 0.
    """
    x, y = _centred(x), _centred(y)
    return linalg.solve(_penalised(x, strength), x.T @ y, assume_a="pos")


def choose_strength(x: np.ndarray, y: np.ndarray, problems: np.ndarray, folds: int) -> Strength:
    """Cross-validates `STRENGTHS`, all states of a problem in one fold.

    Args:
      x: [n, D].
      y: [n, E].
      problems: [n], the problem of each state.
      folds: number of folds; fewer if there are fewer problems.

    Raises:
      ValueError: fewer than two problems.
    """
    n_problems = len(np.unique(problems))
    if n_problems < 2:
        raise ValueError(f"paired states of {n_problems} problem(s), expected at least 2 to cross-validate a map")
    missed, spread = np.zeros(len(STRENGTHS)), 0.0
    for fitted, left in GroupKFold(min(folds, n_problems)).split(x, y, problems):
        mean_x, mean_y = x[fitted].mean(0, dtype=np.float64), y[fitted].mean(0, dtype=np.float64)
        own, other = x[fitted] - mean_x, x[left] - mean_x
        values, axes = linalg.eigh(own.T @ own)
        seen, shown, wanted = axes.T @ (own.T @ (y[fitted] - mean_y)), other @ axes, y[left] - mean_y
        for i, strength in enumerate(STRENGTHS):
            predicted = (shown / (values + strength * values.sum() / len(values))) @ seen
            missed[i] += ((wanted - predicted) ** 2).sum()
        spread += (wanted**2).sum()
    best = int(np.argmin(missed))
    return Strength(STRENGTHS[best], float(1 - missed[best] / spread))


def shuffled_pairs(
    x: np.ndarray, y: np.ndarray, strength: float, direction: np.ndarray, *, n_draws: int, seed: int
) -> np.ndarray:
    """What `ridge` makes of a direction if every x is paired with a y at random, [R, E] float64.

    Args:
      x: [n, D].
      y: [n, E].
      strength: of the ridge.
      direction: [D].
      n_draws: R, number of random pairings.
      seed: of the pairings.
    """
    x, y = _centred(x), _centred(y)
    weights = x @ linalg.solve(_penalised(x, strength), direction.astype(np.float64), assume_a="pos")
    rng = np.random.default_rng(seed)
    return np.stack([weights @ y[rng.permutation(len(y))] for _ in range(n_draws)])


def orthogonal(x: np.ndarray, y: np.ndarray, rank: int) -> np.ndarray:
    """Orthogonal Procrustes between the leading principal components of either model, [D, E] float64.

    Args:
      x: [n, D].
      y: [n, E].
      rank: number of components, at most D and E.
    """
    x, y = _centred(x), _centred(y)
    rank = min(rank, x.shape[1], y.shape[1])
    of_x, of_y = _components(x, rank), _components(y, rank)
    rotation, _ = linalg.orthogonal_procrustes(x @ of_x, y @ of_y)
    return of_x @ rotation @ of_y.T


def anchors(x: np.ndarray, y: np.ndarray, n: int, rank: int) -> np.ndarray:
    """Directions by their products with the states at n rows, evenly spread, [D, E] float64.

    Args:
      x: [n, D].
      y: [n, E].
      n: number of anchors.
      rank: number of singular values of the anchors of y that are inverted; the others are noise.
    """
    rows = np.linspace(0, len(x) - 1, min(n, len(x))).round().astype(int)
    of_x, of_y = (_units(_centred(states)[rows]) for states in (x, y))
    left, values, right = linalg.svd(of_y, full_matrices=False)
    kept = values[:rank] > 1e-9 * values[0]
    return ((of_x.T @ left[:, :rank][:, kept]) / values[:rank][kept]) @ right[:rank][kept]


def _penalised(x: np.ndarray, strength: float) -> np.ndarray:
    products = x.T @ x
    products[np.diag_indices_from(products)] += strength * np.trace(products) / len(products)
    return products


def _components(x: np.ndarray, rank: int) -> np.ndarray:
    """Principal components of centred states as columns, [D, rank], the largest first."""
    width = x.shape[1]
    return linalg.eigh(x.T @ x, subset_by_index=(width - rank, width - 1))[1][:, ::-1]


def _centred(x: np.ndarray) -> np.ndarray:
    return x - x.mean(0, dtype=np.float64)


def _units(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)
