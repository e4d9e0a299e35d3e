"""Split-half reliability where its value is known."""

import numpy as np
import pytest

from backtrack_jax.analysis.reliability import split_half


def test_reliability_of_a_known_signal_in_known_noise() -> None:
    """v + noise of variance s^2 / n per half: the cosine of the halves is about |v|^2 / (|v|^2 + D s^2 / n)."""
    rng = np.random.default_rng(1)
    n, D, noise = 200, 400, 1.0
    v = rng.standard_normal(D)
    positive = v + noise * rng.standard_normal((n, D))
    contrast = np.zeros((n, D))
    found = split_half(positive, contrast, [str(i) for i in range(n)])
    expected = (v @ v) / (v @ v + D * noise**2 / (n / 2))
    assert found.cosine == pytest.approx(expected, abs=0.01)
    assert found.low < found.cosine < found.high and found.n_splits == 200
    assert found.full == pytest.approx((v @ v) / (v @ v + D * noise**2 / n), abs=0.01)
    unrelated = split_half(rng.standard_normal((n, D)), contrast, [str(i) for i in range(n)])
    assert abs(unrelated.cosine) < 0.1


def test_traces_of_one_problem_are_never_in_both_halves() -> None:
    """Each problem has a direction of its own: with traces split, halves would agree; split by problem, they cannot."""
    rng = np.random.default_rng(2)
    directions = rng.standard_normal((6, 500))
    positive = np.repeat(directions, 20, axis=0)
    problems = [str(i // 20) for i in range(120)]
    contrast = np.zeros_like(positive)
    assert abs(split_half(positive, contrast, problems).cosine) < 0.1
    assert split_half(positive, contrast, [str(i) for i in range(120)]).cosine > 0.8


def test_a_split_by_hand_with_absent_windows() -> None:
    positive = np.array([[1.0, 0], [np.nan, np.nan], [0, 1]])
    contrast = np.array([[0.0, 0], [0, 0], [0, 0]])
    found = split_half(positive, contrast, ["a", "a", "b"])
    assert found.cosine == pytest.approx(0) and found.n_splits == 200
    nothing = split_half(positive[:2], contrast[:2], ["a", "b"])  # one half has no window at all
    assert np.isnan(nothing.cosine) and nothing.n_splits == 0


def test_weights_make_the_mean_of_traces_one_of_positions() -> None:
    """Two problems are one split: a half is the two traces of `a`, of 3 positions and of 1, or the one of `b`."""
    positive = np.array([[1.0, 0], [0, 1], [1, 0]])
    weights = np.array([3, 1, 2]), np.array([1, 1, 1])
    found = split_half(positive, np.zeros((3, 2)), ["a", "a", "b"], weights=weights)
    assert found.cosine == pytest.approx(3 / 10**0.5)
    assert split_half(positive, np.zeros((3, 2)), ["a", "a", "b"]).cosine == pytest.approx(1 / 2**0.5)


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="do not match"):
        split_half(np.zeros((3, 2)), np.zeros((3, 2)), ["a", "b"])
