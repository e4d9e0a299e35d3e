"""Probe scores against scikit-learn; no problem is scored by what was fitted on it (T30)."""

import numpy as np
import pytest
from sklearn import metrics

from backtrack_jax.analysis import probe


@pytest.fixture(params=["distinct", "ties"])
def ranking(request: pytest.FixtureRequest) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    positive = rng.random(300) < 0.1
    scores = rng.standard_normal(300) + positive
    return (np.round(scores) if request.param == "ties" else scores), positive


def test_auc_and_average_precision_are_those_of_scikit_learn(ranking: tuple[np.ndarray, np.ndarray]) -> None:
    scores, positive = ranking
    assert probe.roc_auc(scores, positive) == pytest.approx(metrics.roc_auc_score(positive, scores), abs=1e-12)
    expected = metrics.average_precision_score(positive, scores)
    assert probe.average_precision(scores, positive) == pytest.approx(expected, abs=1e-12)


def test_weighted_auc_is_that_of_scikit_learn(ranking: tuple[np.ndarray, np.ndarray]) -> None:
    scores, positive = ranking
    weights = np.random.default_rng(1).integers(0, 4, (5, 300))
    expected = [metrics.roc_auc_score(positive, scores, sample_weight=w) for w in weights]
    np.testing.assert_allclose(probe.roc_auc(scores, positive, weights), expected, atol=1e-12)


def test_one_kind_of_token_has_no_auc() -> None:
    scores = np.arange(4.0)
    assert np.isnan(probe.roc_auc(scores, np.zeros(4, bool))) and np.isnan(probe.roc_auc(scores, np.ones(4, bool)))
    assert np.isnan(probe.average_precision(scores, np.zeros(4, bool)))


def test_nothing_scored_has_no_score() -> None:
    """As where there is one problem: nothing is left to read a direction from."""
    found = probe.score(np.zeros(0), np.zeros(0, bool), [])
    assert np.isnan([found.auc, found.low, found.high, found.average_precision]).all()


def test_the_interval_is_that_of_drawing_problems_one_by_one(ranking: tuple[np.ndarray, np.ndarray]) -> None:
    scores, positive = ranking
    problems = np.arange(300) // 30
    rng = np.random.default_rng(2)
    drawn = []
    for _ in range(1500):
        rows = np.concatenate([np.flatnonzero(problems == p) for p in rng.integers(0, 10, 10)])
        drawn.append(metrics.roc_auc_score(positive[rows], scores[rows]))
    found = probe.score(scores, positive, [str(p) for p in problems], n_resamples=4000)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=0.02)
    assert found.low < found.auc < found.high


def test_starts_within_the_next_tokens() -> None:
    soon = probe.starts_soon([5, 9], np.arange(11), 3)
    assert np.flatnonzero(soon).tolist() == [2, 3, 4, 6, 7, 8]  # the start's own token is not ahead of itself
    assert not probe.starts_soon([], np.arange(3), 2).any()


def test_folds_keep_problems_whole() -> None:
    problems = [f"p{i % 13}" for i in range(100)]
    fold = probe.folds(problems, 5)
    sizes = [len({p for p, f in zip(problems, fold, strict=True) if f == k}) for k in range(5)]
    assert sum(sizes) == 13 and max(sizes) - min(sizes) <= 1
    for name in set(problems):
        assert len({f for p, f in zip(problems, fold, strict=True) if p == name}) == 1


def leaky(n_traces: int = 40, D: int = 200) -> tuple[probe.SampledTokens, np.ndarray, np.ndarray]:
    """Traces of which each is positive along a direction of its own: what is learnt on one says nothing of another."""
    rng = np.random.default_rng(3)
    own = rng.standard_normal((n_traces, D))
    positive = np.tile([False] * 9 + [True], n_traces)
    traces = np.repeat(np.arange(n_traces), 10)
    activations = rng.standard_normal((10 * n_traces, D)) + positive[:, None] * own[traces]
    return probe.SampledTokens(activations.astype(np.float32), traces, positive), own, np.zeros((n_traces, D))


@pytest.mark.parametrize("method", ["direction", "logistic"])
def test_nothing_leaks_from_the_scored_problem(method: str) -> None:
    tokens, own, contrast = leaky()

    def auc(fold: np.ndarray) -> float:
        if method == "direction":
            scores = probe.direction_scores(tokens, own, contrast, fold)
        else:
            scores = probe.logistic_scores(tokens, fold)
        return float(probe.roc_auc(scores, tokens.positive))

    honest = auc(probe.folds([str(i) for i in range(40)], 5))
    assert abs(honest - 0.5) < 0.12
    if method == "direction":  # in sample, as the steered vector is
        u = own.mean(0) / np.linalg.norm(own.mean(0))
        assert probe.roc_auc(tokens.activations @ u, tokens.positive) > 0.75


def test_a_shared_direction_is_found_by_both() -> None:
    rng = np.random.default_rng(4)
    v = rng.standard_normal(30)
    traces = np.repeat(np.arange(30), 20)
    positive = rng.random(600) < 0.2
    activations = 5 + rng.standard_normal((600, 30)) + positive[:, None] * v
    tokens = probe.SampledTokens(activations.astype(np.float32), traces, positive)
    windows = v + 0.1 * rng.standard_normal((30, 30))
    windows[7] = np.nan  # a trace without backtracking
    fold = probe.folds([str(i) for i in range(30)], 5)
    direction = probe.direction_scores(tokens, windows, np.zeros((30, 30)), fold)
    logistic = probe.logistic_scores(tokens, fold)
    for scores in (direction, logistic):
        assert metrics.roc_auc_score(positive, scores) > 0.95
    assert abs(direction.mean()) < 0.5  # centred: activations lie 5 away from the origin in every coordinate


def test_random_directions_tell_what_chance_reaches() -> None:
    """Around one half, but as far from it as the tokens' few directions allow; the mean over single ones."""
    rng = np.random.default_rng(5)
    positive = rng.random(400) < 0.3
    shifted = rng.standard_normal((400, 8)) + positive[:, None] * [4, 0, 0, 0, 0, 0, 0, 0]
    tokens = probe.SampledTokens(shifted.astype(np.float32), np.zeros(400, int), positive)
    single = probe.random_score(tokens, n_directions=1, seed=3)
    direction = np.random.default_rng(3).standard_normal((1, 8), np.float32)[0]
    assert single.auc == pytest.approx(metrics.roc_auc_score(positive, tokens.activations @ direction), abs=1e-6)
    found = probe.random_score(tokens, n_directions=400)
    assert found.auc == pytest.approx(0.5, abs=0.05)
    assert found.low < 0.2 and found.high > 0.8
    unshifted = probe.random_score(
        probe.SampledTokens(rng.standard_normal((400, 8), np.float32), tokens.traces, positive)
    )
    assert 0.35 < unshifted.low < unshifted.high < 0.65
