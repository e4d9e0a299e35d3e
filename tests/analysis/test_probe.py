"""Probe scores against scikit-learn; no problem is scored by what was fitted on it (T30)."""

from typing import Any

import numpy as np
import pytest
import tiny
from scipy import stats
from sklearn import metrics

from backtrack_jax.analysis import probe
from backtrack_jax.analysis.dose import LEVEL
from backtrack_jax.analysis.results import Results


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


def noisy(n_traces: int = 30, D: int = 12, seed: int = 6) -> tuple[probe.SampledTokens, np.ndarray, np.ndarray]:
    """Two traces of each of 15 problems, whose windows hold a shared direction in much noise."""
    rng = np.random.default_rng(seed)
    v, own = rng.standard_normal(D), rng.standard_normal((n_traces, D))
    traces = np.repeat(np.arange(n_traces), 20)
    positive = rng.random(len(traces)) < 0.2
    activations = own[traces] + rng.standard_normal((len(traces), D)) + 0.5 * positive[:, None] * v
    windows = own + v + 1.5 * rng.standard_normal((n_traces, D))
    windows[4] = np.nan
    contrast = own + 0.2 * rng.standard_normal((n_traces, D))
    return probe.SampledTokens(activations.astype(np.float32), traces, positive), windows, contrast


def without(problem: str, problems: list[str], tokens: probe.SampledTokens) -> tuple[np.ndarray, probe.SampledTokens]:
    """Which traces are not of a problem, and the tokens of these."""
    kept = np.array(problems) != problem
    there = kept[tokens.traces]
    renumbered = (np.cumsum(kept) - 1)[tokens.traces[there]]
    return kept, probe.SampledTokens(tokens.activations[there], renumbered, tokens.positive[there])


def test_the_interval_is_that_of_fitting_every_fold_again_without_each_problem() -> None:
    """Directions, centres and tokens of the other problems alone, written out one problem at a time."""
    tokens, windows, contrast = noisy()
    problems = [f"p{i // 2:02d}" for i in range(30)]
    weights = np.arange(1, 31), np.arange(31, 1, -1)
    fold = probe.folds(problems, 4)
    scores, found = probe.refitted_score(tokens, windows, contrast, fold, problems, weights)
    np.testing.assert_allclose(scores, probe.direction_scores(tokens, windows, contrast, fold, weights))
    assert found.auc == pytest.approx(metrics.roc_auc_score(tokens.positive, scores), abs=1e-12)
    aucs = []
    for problem in sorted(set(problems)):
        kept, rest = without(problem, problems, tokens)
        of_rest = (weights[0][kept], weights[1][kept])
        refitted = probe.direction_scores(rest, windows[kept], contrast[kept], fold[kept], of_rest)
        aucs.append(metrics.roc_auc_score(rest.positive, refitted))
    error = np.sqrt(14 / 15 * np.sum((np.array(aucs) - np.mean(aucs)) ** 2))
    assert found.error == pytest.approx(error, rel=1e-3)
    assert (found.low, found.high) == pytest.approx(stats.t.interval(0.95, 14, found.auc, error), rel=1e-3)
    assert found.average_precision == pytest.approx(metrics.average_precision_score(tokens.positive, scores))


def test_a_problem_that_counts_twice_counts_twice() -> None:
    tokens, windows, contrast = noisy()
    fold, counts = np.arange(30) % 3, np.ones((2, 30))
    counts[1, 7] = 2
    once, twice = probe.direction_scores(tokens, windows, contrast, fold, None, counts)
    np.testing.assert_allclose(once, probe.direction_scores(tokens, windows, contrast, fold), rtol=1e-4, atol=1e-5)
    rows = np.append(np.arange(30), 7)
    more = np.append(tokens.traces, np.full(20, 30))
    places = np.append(np.arange(600), np.flatnonzero(tokens.traces == 7))
    doubled = probe.SampledTokens(tokens.activations[places], more, tokens.positive[places])
    expected = probe.direction_scores(doubled, windows[rows], contrast[rows], fold[rows])
    np.testing.assert_allclose(twice, expected[:600], rtol=1e-4, atol=1e-5)


def test_shuffled_directions_are_scored_through_the_same_folds() -> None:
    tokens, windows, _ = noisy()
    fold, rng = np.arange(30) % 3, np.random.default_rng(8)
    directions = rng.standard_normal((3, 20, windows.shape[1]))
    kept, found = probe.shuffled_score(tokens, directions, fold)
    aucs = []
    for draw in range(20):
        scores = np.zeros(len(tokens.traces))
        for f in range(3):
            test = fold[tokens.traces] == f
            x = tokens.activations[test] - tokens.activations[~test].mean(0)
            scores[test] = x @ directions[f, draw] / np.linalg.norm(directions[f, draw])
        aucs.append(metrics.roc_auc_score(tokens.positive, scores))
    assert kept.all()
    assert found.auc == pytest.approx(np.mean(aucs), abs=1e-5)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(aucs, [0.025, 0.975])), abs=1e-4)
    nothing = probe.shuffled_score(tokens, np.full((3, 20, 12), np.nan), fold)
    assert not nothing[0].any() and np.isnan(nothing[1].auc)


@pytest.mark.slow
def test_the_interval_covers_where_one_of_scores_as_they_are_does_not() -> None:
    """The area that the procedure has on average over data sets, from 60 problems of which half have windows of D+."""
    R, P, D, aucs, intervals = 200, 60, 24, [], {"refitted": [], "as they are": []}
    v, traces = np.eye(D)[0], np.repeat(np.arange(P), 24)
    for seed in range(R):
        rng = np.random.default_rng(seed)
        own = 0.7 * rng.standard_normal((P, D))
        positive = rng.random(len(traces)) < rng.beta(1, 6, P)[traces]
        states = own[traces] + rng.standard_normal((len(traces), D)) + positive[:, None] * v
        windows = own + v + rng.standard_normal((P, D))
        windows[rng.random(P) < 0.5] = np.nan
        contrast = own + 0.1 * v + 0.4 * rng.standard_normal((P, D))
        tokens = probe.SampledTokens(states.astype(np.float32), traces, positive)
        problems = [f"{i:02d}" for i in range(P)]
        scores, found = probe.refitted_score(tokens, windows, contrast, probe.folds(problems, 5, seed), problems)
        plain = probe.score(scores, positive, [problems[i] for i in traces], n_resamples=200)
        aucs.append(found.auc)
        intervals["refitted"].append((found.low, found.high))
        intervals["as they are"].append((plain.low, plain.high))
    true = np.mean(aucs)
    covered = {name: np.mean([low <= true <= high for low, high in ends]) for name, ends in intervals.items()}
    assert 0.93 <= covered["refitted"] <= 1.0 and covered["as they are"] < 0.9


def results(**line: Any) -> Results:
    shuffled = {"method": "base-derived shuffled labels", "auc": 0.52, "low": 0.45, "high": 0.6}
    own = {"method": "base-derived direction", "auc": 0.65, "low": 0.6, "high": 0.7, "error": 0.03, "n_problems": 90}
    place = {"role": "reasoning", "layer": 1, "horizon": 13}
    return Results(tiny.get_config(), {}, {"probe": [place | own | line, place | shuffled]}, {}, [], "", {})


@pytest.mark.parametrize(
    ("line", "answer", "said"),
    [
        ({}, "holds", "directions of shuffled labels 0.520, middle 95 % 0.450 to 0.600"),
        ({"auc": 0.9}, "fails", ""),
        ({"auc": 0.53}, "undecided", ""),
        ({"n_problems": 79}, "undecided", "undecided on 79 problems"),
        ({"layer": 2}, "undecided", "keeps no means of sections at layer 1"),
    ],
)
def test_verdict_of_the_probe(line: dict[str, Any], answer: str, said: str) -> None:
    (claim,) = probe.PROBE.claims(results(**line))
    assert (claim.verdict, claim.name, claim.figure) == (answer, "probe", "probe")
    assert said in claim.note
    if "layer" not in line:
        n = line.get("n_problems", 90)
        ends = stats.t.interval(LEVEL, n - 1, line.get("auc", 0.65), 0.03)
        assert (claim.low, claim.high) == pytest.approx(ends)
