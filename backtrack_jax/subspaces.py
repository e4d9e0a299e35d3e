"""Directions and subspaces made of other directions, in float64 on the host: what else than a vector can be steered by.

Directions are rows. Difference-of-means vectors of labels against all sections have the overall mean subtracted
already; nothing here subtracts it again.
"""

import numpy as np
from numpy.typing import ArrayLike

from backtrack_jax.terms import orthonormal


def ordered(vectors: ArrayLike) -> np.ndarray:
    """Gram-Schmidt: each vector [n, D] without its projection on those before it, scaled to norm 1, [n, D].

    Raises:
      ValueError: a vector lies in the span of those before it.
    """
    vectors = _rows(vectors)
    found: list[np.ndarray] = []
    for number, vector in enumerate(vectors):
        left = _without(_unit(vector, f"vector {number} is zero"), found)
        found.append(_unit(left, f"vector {number} lies in the span of those before it"))
    return np.stack(found)


def symmetric(vectors: ArrayLike) -> np.ndarray:
    """Loewdin: the orthonormal rows [n, D] nearest to the vectors [n, D] scaled to norm 1, in squared distance.

    Raises:
      ValueError: the vectors do not span n dimensions.
    """
    units = np.stack([_unit(vector, "a vector is zero") for vector in _rows(vectors)])
    u, singular, vt = np.linalg.svd(units, full_matrices=False)
    if singular[-1] < 1e-6 * singular[0]:
        raise ValueError(f"the {len(units)} vectors span fewer dimensions, so none of them has a part of its own")
    return u @ vt


def own(vectors: ArrayLike, number: int) -> np.ndarray:
    """What one of several vectors [n, D] has to itself: it without its projection on the span of the others, [D].

    Its length is what is left, so that it can be compared with the vector's.

    Raises:
      ValueError: nothing is left.
    """
    vectors = _rows(vectors)
    _, singular, vt = np.linalg.svd(np.delete(vectors, number, axis=0), full_matrices=False)
    left = _without(vectors[number], vt[singular > 1e-10 * singular.max(initial=0)])
    _unit(left / np.linalg.norm(vectors[number]), f"vector {number} lies in the span of the others")
    return left


def principal_components(x: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Principal components of activations.

    Args:
      x: [n, D], centred here; rows that are not finite are left out.

    Returns:
      Directions [R, D], orthonormal, that of the largest variance first, R = min(n - 1, D); variances [R].

    Raises:
      ValueError: fewer than two rows are left.
    """
    x = np.asarray(x, np.float64)
    x = x[np.isfinite(x).all(axis=1)]
    if len(x) < 2:
        raise ValueError(f"{len(x)} rows, expected at least 2 to have principal components")
    _, singular, vt = np.linalg.svd(x - x.mean(0), full_matrices=False)
    rank = min(len(x) - 1, x.shape[1])
    return vt[:rank], singular[:rank] ** 2 / (len(x) - 1)


def energy(basis: np.ndarray, x: np.ndarray) -> float:
    """Share of the variance of x [n, D] that lies in the span of orthonormal rows [R, D]."""
    centred = x.astype(np.float64) - x.mean(0)
    return float(np.sum((centred @ basis.T) ** 2) / np.sum(centred**2))


def random_subspace(rng: np.random.Generator, rank: int, d_model: int) -> np.ndarray:
    """Orthonormal rows [rank, D] of a subspace drawn uniformly."""
    return np.linalg.qr(rng.standard_normal((d_model, rank)))[0].T


def matched_subspace(
    rng: np.random.Generator, rank: int, components: np.ndarray, variances: np.ndarray, share: float
) -> np.ndarray:
    """A random subspace that holds a given share of activations' variance.

    A subspace drawn uniformly holds rank / D of it, far less than one that activations differ along, and its removal
    does less for that reason alone. Here directions are drawn from N(0, sum_i variance_i^p component_i component_i^T),
    and p is found by bisection for the share.

    Args:
      rng: draws the numbers, which are the same for every p.
      rank: R of the subspace.
      components: [n, D], orthonormal, such as `principal_components` gives.
      variances: [n], along each of them.
      share: of their sum, that the subspace is to hold.

    Returns:
      Orthonormal rows [rank, D].

    Raises:
      ValueError: no subspace of this rank drawn in this way holds so much or so little.
    """
    z = rng.standard_normal((rank, len(components)))
    weights = variances / variances.sum()

    def subspace(power: float) -> np.ndarray:
        scaled = z * (variances / variances.max()) ** (power / 2)
        return orthonormal(scaled).astype(np.float64)

    def held(power: float) -> float:
        return float(np.sum(subspace(power) ** 2 @ weights))

    low, high = -4.0, 8.0
    if not held(low) <= share <= held(high):
        raise ValueError(
            f"share={share:.3g} of the variance, expected {held(low):.3g} to {held(high):.3g} for {rank} dimensions"
        )
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if held(middle) < share else (low, middle)
    return subspace((low + high) / 2) @ components


def _rows(vectors: ArrayLike) -> np.ndarray:
    vectors = np.asarray(vectors, np.float64)
    if vectors.ndim != 2 or not len(vectors) or not np.isfinite(vectors).all():
        raise ValueError(f"vectors have shape {vectors.shape}, expected [n, D], finite, at least one")
    return vectors


def _without(vector: np.ndarray, basis: ArrayLike) -> np.ndarray:
    """The vector [D] less its projection on orthonormal rows."""
    for _ in range(2):  # once leaves what rounding made of nearly equal directions
        for direction in np.asarray(basis).reshape(-1, len(vector)):
            vector = vector - direction * (direction @ vector)
    return vector


def _unit(vector: np.ndarray, fault: str) -> np.ndarray:
    norm = np.linalg.norm(vector)
    if norm < 1e-6:
        raise ValueError(f"{fault}, expected one with a part of its own")
    return vector / norm
