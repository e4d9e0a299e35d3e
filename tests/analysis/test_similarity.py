"""Cosines of vectors."""

import numpy as np
import pytest

from backtrack_jax.analysis.similarity import cosine_matrix


def test_cosine_matrix() -> None:
    x = np.random.default_rng(0).standard_normal((4, 7)).astype(np.float32)
    x[3] = 0
    found = cosine_matrix(x)
    for i in range(3):
        for j in range(3):
            a, b = x[i].astype(float), x[j].astype(float)
            assert found[i, j] == pytest.approx(sum(a * b) / (sum(a * a) * sum(b * b)) ** 0.5)
    assert np.isnan(found[3]).all() and np.isnan(found[:, 3]).all()
