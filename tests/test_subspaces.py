"""Directions made of other directions, against their definitions, scipy and scikit-learn."""

from collections.abc import Callable

import numpy as np
import pytest
import scipy.linalg
import sklearn.decomposition

from backtrack_jax import subspaces

D = 12
RNG = np.random.default_rng(0)
VECTORS = RNG.standard_normal((4, D)) * [[1.0], [30.0], [0.1], [4.0]]


def test_ordered_directions_are_those_of_qr() -> None:
    found = subspaces.ordered(VECTORS)
    q, r = np.linalg.qr(VECTORS.T)
    np.testing.assert_allclose(found, (q * np.sign(np.diag(r))).T, atol=1e-12)
    np.testing.assert_allclose(found @ VECTORS.T * (np.tri(4).T == 0), 0, atol=1e-12)


def test_symmetric_directions_are_the_nearest_orthonormal_ones() -> None:
    units = VECTORS / np.linalg.norm(VECTORS, axis=1, keepdims=True)
    found = subspaces.symmetric(VECTORS)
    expected = np.real(scipy.linalg.inv(scipy.linalg.sqrtm(units @ units.T))) @ units
    np.testing.assert_allclose(found, expected, atol=1e-10)
    np.testing.assert_allclose(found @ found.T, np.eye(4), atol=1e-10)
    for _ in range(50):  # no rotation of them is nearer
        turn = scipy.linalg.expm(0.1 * (a := RNG.standard_normal((4, 4))) - 0.1 * a.T)
        assert np.sum((turn @ found - units) ** 2) >= np.sum((found - units) ** 2)


def test_what_a_vector_has_to_itself_is_the_residual_of_a_regression_on_the_others() -> None:
    for number in range(4):
        others = np.delete(VECTORS, number, axis=0)
        weights = np.linalg.lstsq(others.T, VECTORS[number], rcond=None)[0]
        np.testing.assert_allclose(subspaces.own(VECTORS, number), VECTORS[number] - weights @ others, atol=1e-10)
    np.testing.assert_array_equal(subspaces.own(VECTORS[:1], 0), VECTORS[0])


@pytest.mark.parametrize("n", [5, 40])
def test_principal_components_are_those_of_scikit_learn(n: int) -> None:
    x = RNG.standard_normal((n, D)) @ np.diag(np.arange(1, D + 1)) + 7
    found, variances = subspaces.principal_components(np.concatenate([x, np.full((1, D), np.nan)]))
    fitted = sklearn.decomposition.PCA(n_components=min(n - 1, D)).fit(x)
    np.testing.assert_allclose(variances, fitted.explained_variance_, rtol=1e-8)
    np.testing.assert_allclose(np.abs(np.sum(found * fitted.components_, axis=1)), 1, rtol=1e-8)
    share = subspaces.energy(found[:2], x)
    np.testing.assert_allclose(share, fitted.explained_variance_ratio_[:2].sum(), rtol=1e-8)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
def test_a_matched_subspace_holds_the_share_and_is_another_one_each_time(share: float) -> None:
    x = RNG.standard_normal((300, D)) @ np.diag(np.arange(1, D + 1)) + 7
    components, variances = subspaces.principal_components(x)
    drawn = [subspaces.matched_subspace(RNG, 3, components, variances, share) for _ in range(4)]
    for basis in drawn:
        np.testing.assert_allclose(basis @ basis.T, np.eye(3), atol=1e-6)
        np.testing.assert_allclose(subspaces.energy(basis, x), share, rtol=1e-4)
    angles = scipy.linalg.subspace_angles(drawn[0].T, drawn[1].T)
    assert angles.max() > 0.2


def test_random_subspaces_are_uniform() -> None:
    found = np.stack([subspaces.random_subspace(RNG, 3, D) for _ in range(2000)])
    np.testing.assert_allclose(found[0] @ found[0].T, np.eye(3), atol=1e-12)
    projectors = np.einsum("nrd,nre->de", found, found) / len(found)
    np.testing.assert_allclose(projectors, 3 / D * np.eye(D), atol=0.03)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: subspaces.ordered([VECTORS[0], 2 * VECTORS[0]]), "vector 1 lies in the span of those before it"),
        (lambda: subspaces.own([VECTORS[0], VECTORS[1], VECTORS[0] - VECTORS[1]], 2), "lies in the span of the others"),
        (lambda: subspaces.symmetric([VECTORS[0], VECTORS[0]]), "the 2 vectors span fewer dimensions"),
        (lambda: subspaces.symmetric(np.zeros((1, D))), "a vector is zero"),
        (lambda: subspaces.principal_components(VECTORS[:1]), "1 rows, expected at least 2"),
        (lambda: subspaces.ordered(VECTORS[0]), r"vectors have shape \(12,\), expected \[n, D\]"),
        (
            lambda: subspaces.matched_subspace(RNG, 1, np.eye(3), np.array([2.0, 1.0, 1.0]), 0.9999999),
            "share=1 of the variance, expected",
        ),
    ],
)
def test_what_cannot_be_made_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
