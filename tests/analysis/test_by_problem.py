"""Products of vectors without their noise: against random halves in plain numpy, and where the truth is known."""

from typing import Any

import numpy as np
import pytest
from scipy import stats

from backtrack_jax.analysis import by_problem
from backtrack_jax.analysis.by_problem import ProblemSums
from backtrack_jax.analysis.dose import LEVEL
from backtrack_jax.analysis.statistics import Region, verdict

Arrays = dict[str, Any]


def traces(n: int = 60, seed: int = 0) -> tuple[Arrays, Arrays, list[str]]:
    """Means of n traces of n // 2 problems under two models: unequal weights, absent windows, a long common mean."""
    rng = np.random.default_rng(seed)
    D, common = 12, 30 * rng.standard_normal(12)
    v, shared = rng.standard_normal(D), rng.standard_normal((n, D))
    has = rng.random(n) < 0.7
    weights = rng.integers(1, 5, n) * has, rng.integers(5, 12, n)
    models = []
    for direction in (v, v + 0.5 * rng.standard_normal(D)):
        contrast = common + 0.5 * shared + 0.3 * rng.standard_normal((n, D))
        positive = common + direction + shared + rng.standard_normal((n, D))
        positive[~has] = np.nan
        models.append({"positive": positive, "contrast": contrast, "weights": weights})
    return models[0], models[1], [f"p{i // 2}" for i in range(n)]


def difference(model: Arrays, kept: np.ndarray) -> np.ndarray:
    """MeanAct(D+) - MeanAct(D) of some traces, written once more."""
    means = []
    for name, weights in zip(("positive", "contrast"), model["weights"], strict=True):
        rows = kept & (weights > 0)
        means.append((weights[rows, None] * model[name][rows]).sum(0) / weights[rows].sum())
    return means[0] - means[1]


def sums(model: Arrays, problems: list[str], kept: np.ndarray | None = None) -> ProblemSums:
    rows = np.ones(len(problems), bool) if kept is None else kept
    weights = tuple(w[rows] for w in model["weights"])
    return by_problem.of_traces(
        model["positive"][rows],
        model["contrast"][rows],
        (weights[0], weights[1]),
        np.array(problems)[rows].tolist(),
    )


def test_vectors_are_those_of_all_problems_and_without_each() -> None:
    base, _, problems = traces()
    names = np.array(problems)
    found = sums(base, problems).vectors()
    np.testing.assert_allclose(found[0], difference(base, np.ones(len(names), bool)), rtol=1e-10)
    for number, name in enumerate(sorted(set(problems))):
        np.testing.assert_allclose(found[1 + number], difference(base, names != name), rtol=1e-10)
    assert sums(base, problems).n_problems == len(set(names[base["weights"][0] > 0]))


def test_the_corrected_cosine_is_that_of_random_halves() -> None:
    """c* = mean (b_A . r_B + b_B . r_A) / 2 over sqrt(mean b_A . b_B  mean r_A . r_B), over splits of the problems."""
    base, reasoning, problems = traces()
    names, rng = np.array(problems), np.random.default_rng(1)
    products = []
    for _ in range(3000):
        first = np.isin(names, rng.permutation(sorted(set(problems)))[: len(set(problems)) // 2])
        b, r = ([difference(model, half) for half in (first, ~first)] for model in (base, reasoning))
        products.append([(b[0] @ r[1] + b[1] @ r[0]) / 2, b[0] @ b[1], r[0] @ r[1]])
    between, of_base, of_reasoning = np.mean(products, axis=0)
    found, _ = by_problem.corrected_cosine(sums(base, problems), sums(reasoning, problems))
    assert found == pytest.approx(between / np.sqrt(of_base * of_reasoning), abs=5e-3)
    assert abs(found - by_problem.cosine(sums(base, problems), sums(reasoning, problems))[0]) > 0.01


def test_the_standard_error_is_that_of_leaving_each_problem_out() -> None:
    base, reasoning, problems = traces()
    names, without = np.array(problems), []
    for name in sorted(set(problems)):
        kept = names != name
        without.append(by_problem.corrected_cosine(sums(base, problems, kept), sums(reasoning, problems, kept))[0])
    n = len(without)
    expected = np.sqrt((n - 1) / n * np.sum((np.array(without) - np.mean(without)) ** 2))
    _, error = by_problem.corrected_cosine(sums(base, problems), sums(reasoning, problems))
    assert error == pytest.approx(expected, rel=1e-3)
    low, high = by_problem.interval(0.3, 0.1, 20, 0.9)
    assert (low, high) == pytest.approx(stats.t.interval(0.9, 19, 0.3, 0.1))


def test_what_noise_hides_has_no_corrected_cosine() -> None:
    rng = np.random.default_rng(0)
    noise = [rng.standard_normal((30, 40)) for _ in range(2)]
    weights = np.ones(30), np.ones(30)
    a, b = (by_problem.of_traces(x, np.zeros((30, 40)), weights, [str(i) for i in range(30)]) for x in noise)
    assert np.isnan(by_problem.corrected_cosine(a, b)).all()
    assert np.isfinite(by_problem.cosine(a, b)).all()


def test_intervals_of_cosines_are_on_fishers_scale() -> None:
    low, high = by_problem.cosine_interval(0.8, 0.05, 40, 0.9)
    half = stats.t.ppf(0.95, 39) * 0.05 / (1 - 0.8**2)
    assert (np.arctanh(low), np.arctanh(high)) == pytest.approx((np.arctanh(0.8) - half, np.arctanh(0.8) + half))
    beyond = by_problem.cosine_interval(1.02, 0.05, 40)
    assert beyond[1] == 1.02 and beyond[0] == pytest.approx(by_problem.cosine_interval(0.975, 0.05, 40)[0])
    assert np.isnan(by_problem.cosine_interval(0.8, np.nan, 40)).all()
    assert np.isnan(by_problem.cosine_interval(0.8, 0.1, 1)).all()


def test_one_problem_has_no_interval() -> None:
    one = by_problem.of_traces(np.ones((2, 3)), np.zeros((2, 3)), (np.ones(2), np.ones(2)), ["a", "a"])
    assert np.isnan(by_problem.standard_error(by_problem.cosine(one, one)))
    assert np.isnan(by_problem.interval(0.5, 0.1, 1)).all()
    assert np.isnan(by_problem.product(one, one)).all()


def simulated(rng: np.random.Generator, n: int, c: float, noise: float, shared: float) -> tuple[ProblemSums, ...]:
    """Two vectors of length 1 and cosine c, from n problems of which .6 have D+; noise along few directions.

    `shared` is the share of the noise's variance that is the same under both models.
    """
    D = 48
    q = np.linalg.qr(rng.standard_normal((D, D)))[0]
    scale = np.exp(-np.arange(D) / 8)
    mixed = np.linalg.qr(rng.standard_normal((D, D)))[0] * scale / np.sqrt(np.sum(scale**2))
    common = [rng.standard_normal((n, D)) @ mixed.T for _ in range(2)]
    has, mean = rng.random(n) < 0.6, 5 * rng.standard_normal(D)
    found = []
    for v in (q[0], c * q[0] + np.sqrt(1 - c**2) * q[1]):
        of_model = [np.sqrt(shared) * x + np.sqrt(1 - shared) * rng.standard_normal((n, D)) @ mixed.T for x in common]
        contrast = mean + 0.6 * noise * of_model[1]
        positive = contrast + v + 0.8 * noise * of_model[0]
        positive[~has] = np.nan
        found.append(by_problem.of_traces(positive, contrast, (np.ones(n), np.ones(n)), [f"{i:03d}" for i in range(n)]))
    return tuple(found)


@pytest.mark.slow
@pytest.mark.parametrize("common", [0.0, 0.6])
@pytest.mark.parametrize(("n", "noise"), [(80, 2.0), (80, 3.5), (240, 5.0)])
def test_the_corrected_cosine_is_true_and_its_interval_covers(n: int, noise: float, common: float) -> None:
    """Within .02 whether the models' noise is shared or not; the jackknife is rather too wide than too narrow."""
    rng, c, R = np.random.default_rng(5), 0.8, 600
    values, covered, raw = [], {0.9: 0, 0.95: 0}, []
    for _ in range(R):
        base, reasoning = simulated(rng, n, c, noise, common)
        value, error = by_problem.corrected_cosine(base, reasoning)
        values.append(value)
        raw.append(by_problem.cosine(base, reasoning)[0])
        for level in covered:
            low, high = by_problem.cosine_interval(value, error, base.n_problems, level)
            covered[level] += low <= c <= high
    assert np.mean(values) == pytest.approx(c, abs=0.02)
    assert 0.88 <= covered[0.9] / R <= 0.98 and 0.93 <= covered[0.95] / R <= 0.995
    if not common:
        assert np.mean(raw) < c - 0.03  # which is what is corrected


@pytest.mark.slow
@pytest.mark.parametrize("c", [0.6, 0.95])
@pytest.mark.parametrize(("n", "noise"), [(80, 1.0), (80, 3.5), (240, 3.5)])
def test_at_a_bound_the_verdict_on_the_corrected_cosine_errs_in_at_most_one_case_of_twenty(
    n: int, noise: float, c: float
) -> None:
    rng, R, region = np.random.default_rng(6), 600, Region(0.6, 0.95)
    found = []
    for _ in range(R):
        base, reasoning = simulated(rng, n, c, noise, 0.3)
        value, error = by_problem.corrected_cosine(base, reasoning)
        found.append(verdict(*by_problem.cosine_interval(value, error, base.n_problems, LEVEL), region, n))
    assert found.count("holds") / R <= 0.06 and found.count("fails") / R <= 0.06
