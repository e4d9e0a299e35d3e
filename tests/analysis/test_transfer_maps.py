"""Maps between models against scikit-learn and scipy, and on states that are known to be a rotation of each other."""

import numpy as np
import pytest
from scipy import linalg
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.model_selection import GroupKFold

from backtrack_jax.analysis import transfer_maps

D, E, N = 12, 9, 600
RNG = np.random.default_rng(0)
MIXED = RNG.standard_normal((D, D))
X = (RNG.standard_normal((N, D)) @ MIXED + 3).astype(np.float32)
Y = (X @ RNG.standard_normal((D, E)) + RNG.standard_normal((N, E)) - 1).astype(np.float32)
PROBLEMS = np.repeat([f"p{i}" for i in range(N // 20)], 20)
ROTATION = np.linalg.qr(RNG.standard_normal((D, D)))[0]
V = RNG.standard_normal(D)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("strength", [1e-3, 0.1, 10.0])
def test_ridge_is_that_of_scikit_learn(strength: float) -> None:
    x = X.astype(np.float64)
    alpha = strength * x.var(0).sum() * N / D
    theirs = Ridge(alpha=alpha).fit(x, Y.astype(np.float64))
    np.testing.assert_allclose(transfer_maps.ridge(X, Y, strength), theirs.coef_.T, rtol=1e-6, atol=1e-8)


def test_the_strength_is_the_one_that_scikit_learn_predicts_best_with() -> None:
    """On few noisy states, so that neither the weakest nor the strongest is best."""
    kept = np.arange(0, N, 12)
    x, y, groups = X[kept].astype(np.float64), Y[kept] + 20 * RNG.standard_normal((len(kept), E)), PROBLEMS[kept]
    missed, spread = [], 0.0
    for strength in transfer_maps.STRENGTHS:
        error = spread = 0.0
        for a, b in GroupKFold(4).split(x, y, groups):
            alpha = strength * x[a].var(0).sum() * len(a) / D
            predicted = Ridge(alpha=alpha).fit(x[a], y[a]).predict(x[b])
            error += ((y[b] - predicted) ** 2).sum()
            spread += ((y[b] - y[a].mean(0)) ** 2).sum()
        missed.append(error)
    found = transfer_maps.choose_strength(x, y, groups, 4)
    assert found.value == transfer_maps.STRENGTHS[int(np.argmin(missed))]
    assert transfer_maps.STRENGTHS[0] < found.value < transfer_maps.STRENGTHS[-1]
    assert found.r2 == pytest.approx(1 - min(missed) / spread)


def test_no_problem_is_on_both_sides_of_a_fold() -> None:
    """States that are alike within a problem and unrelated otherwise: nothing is predicted of another problem."""
    of_problem = RNG.standard_normal((len(set(PROBLEMS)), D)), RNG.standard_normal((len(set(PROBLEMS)), E))
    x, y = (np.repeat(states, 20, axis=0) for states in of_problem)
    assert transfer_maps.choose_strength(x, y, PROBLEMS, 5).r2 < 0.05
    assert transfer_maps.choose_strength(x, y, np.tile(PROBLEMS[::20], 20), 5).r2 > 0.2  # as if they were others
    with pytest.raises(ValueError, match=r"paired states of 1 problem\(s\), expected at least 2"):
        transfer_maps.choose_strength(x, y, np.full(N, "p"), 5)


def test_procrustes_is_that_of_scipy_after_the_principal_components_of_scikit_learn() -> None:
    rank = 5
    of_x, of_y = (PCA(rank).fit(states.astype(np.float64)) for states in (X, Y))
    rotation, _ = linalg.orthogonal_procrustes(of_x.transform(X), of_y.transform(Y))
    expected = np.asarray(of_x.components_).T @ rotation @ np.asarray(of_y.components_)
    np.testing.assert_allclose(transfer_maps.orthogonal(X, Y, rank), expected, atol=1e-4)


@pytest.mark.parametrize("wider", [0, 7])
def test_a_known_rotation_is_found(wider: int) -> None:
    """Between models of one width, and into a wider one, in which the other states span a subspace."""
    x = X.astype(np.float64)
    into = np.hstack([ROTATION, np.zeros((D, wider))])
    y = x @ into + 5 + 1e-6 * RNG.standard_normal((N, D + wider))
    np.testing.assert_allclose(transfer_maps.ridge(x, y, 1e-9), into, atol=1e-5)
    np.testing.assert_allclose(transfer_maps.orthogonal(x, y, D), into, atol=1e-5)
    np.testing.assert_allclose(transfer_maps.anchors(x, y, 50, D), into, atol=1e-3)
    assert cosine(V @ transfer_maps.orthogonal(x, y, 3), V @ into) < 0.95  # what the rank leaves out is lost


def test_of_shuffled_pairs_nothing_is_left() -> None:
    y = X.astype(np.float64) @ ROTATION
    drawn = transfer_maps.shuffled_pairs(X, y, 1e-5, V, n_draws=300, seed=1)
    mapped = V @ transfer_maps.ridge(X, y, 1e-5)
    assert cosine(mapped, V @ ROTATION) > 0.99
    cosines = np.array([cosine(one, V @ ROTATION) for one in drawn])
    assert abs(cosines.mean()) < 4 * cosines.std() / np.sqrt(len(cosines))
    assert transfer_maps.choose_strength(X, y[RNG.permutation(N)], PROBLEMS, 5).r2 < 0.01


def test_shuffled_pairs_are_ridge_on_them() -> None:
    order = np.random.default_rng(3).permutation(N)  # the first draw of the seed
    found = transfer_maps.shuffled_pairs(X, Y, 0.1, V, n_draws=1, seed=3)[0]
    np.testing.assert_allclose(found, V @ transfer_maps.ridge(X, Y[order], 0.1), rtol=1e-6)
