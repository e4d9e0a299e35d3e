"""Noise: statistics against other code and known truth, exchanged runs against a mediator that is known."""

import dataclasses
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scipy import special, stats

from backtrack_jax import checks, conditions, pipeline
from backtrack_jax.analysis import log_odds, noise, noise_forced, noise_rows, noise_tables, statistics
from backtrack_jax.analysis.base import Material
from backtrack_jax.analysis.forced import Forced
from backtrack_jax.analysis.noise_forced import Exchanged
from backtrack_jax.config import Experiment
from backtrack_jax.data.records import UNSTEERED
from backtrack_jax.files import tables
from backtrack_jax.intervention import ablate, add_vector, gaussian_noise, key_of, no_intervention, stack_rows
from backtrack_jax.models.batching import right_pad
from backtrack_jax.models.decoder import Decoder
from backtrack_jax.stages.analysis import gather

LAYER, L, D = 1, 3, 16
WORDS = [tiny.word_id(" wait"), tiny.word_id(" hmm")]
RNG = np.random.default_rng(0)
TEXTS = [RNG.integers(65, 90, n).tolist() for n in (9, 14, 11)]
STARTS = [[4, 9], [3, 6, 14], [8]]


def experiment(**settings: Any) -> Experiment:
    """The tiny experiment with the question asked."""
    e = tiny.get_config()
    e.questions.ask = ("noise",)
    e.steering.max_new_tokens = 8
    q = e.questions.noise
    q.draws, q.seeds, q.ranks, q.burst, q.replies = 2, 2, (2, 5), 2, 3
    for name, value in settings.items():
        setattr(q, name, value)
    return e


@pytest.fixture(scope="module")
def material(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Material]:
    folder = tmp_path_factory.mktemp("noise") / "tiny"
    shutil.copytree(tiny_run, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield gather(pipeline.Run(experiment(replies=0)).context)


@pytest.fixture(scope="module")
def model(material: Material) -> Decoder:
    return material.model("reasoning")


def linear(model: Decoder, reads: np.ndarray) -> Decoder:
    """The model whose blocks add nothing, and in which keywords read one direction of the stream."""
    copy = jax.tree.map(lambda leaf: leaf, model)
    for weight in (copy.layers.self_attn.o_proj.weight, copy.layers.mlp.down_proj.weight):
        weight[...] = jnp.zeros_like(weight[...])
    head = np.zeros(copy.lm_head.weight.shape, np.float32)
    head[WORDS] = reads
    copy.lm_head.weight[...] = jnp.asarray(head)
    return copy


def forced(row: Any, number: int = 0) -> Forced:
    return Forced(TEXTS[number], 2, STARTS[number], row)


def values(found: Any, n: int) -> list[Any]:
    of = {row: value for batch in found for row, value in batch}
    return [of[row] for row in range(n)]


def units(seed: int = 1) -> np.ndarray:
    e = np.random.default_rng(seed).standard_normal((L, D))
    return (e / np.linalg.norm(e, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.slow
def test_measures_are_those_of_the_whole_pass(model: Decoder) -> None:
    """Against logits and states that are kept, in numpy, with noise and without in one call."""
    edits = [no_intervention(L, D), gaussian_noise(LAYER, 3.0, key_of(5), n_layers=L, d_model=D)]
    rows = [forced(edit, number) for number in range(3) for edit in edits]
    window, v = (-3, -2), units()
    found = values(noise_forced.measure(model, rows, WORDS, v, layer=LAYER, window=window, batch_size=4), len(rows))
    reference = values(log_odds.keyword_log_odds(model, rows, WORDS, batch_size=4), len(rows))
    for row, one, expected in zip(rows, found, reference, strict=True):
        assert np.mean(one["log_odds"]) == pytest.approx(expected, abs=1e-4)
        ids = jnp.asarray([row.ids])
        edit = jax.tree.map(lambda leaf: leaf[None], row.intervention)
        out = model(ids, jnp.arange(len(row.ids))[None], intervention=edit, capture=lambda block: block.resid_post)
        p = special.softmax(np.asarray(model.logits(out.resid), np.float64)[0], axis=-1)
        components = np.einsum("ltd,ld->lt", np.asarray(out.captured, np.float64)[:, 0], v)
        for i, start in enumerate(row.starts):
            assert one["entropy"][i] == pytest.approx(stats.entropy(p[start - 1]), abs=1e-4)
            np.testing.assert_allclose(one["components"][i], components[:, start - 1], atol=1e-4)
            inside = components[LAYER, max(0, start + window[0]) : start + window[1] + 1]
            assert one["sums"][i] == pytest.approx(inside.sum(), abs=1e-4)


def test_exchange_with_itself_changes_nothing_and_with_nothing_ablates(model: Decoder) -> None:
    edit = gaussian_noise(LAYER, 3.0, key_of(5), n_layers=L, d_model=D)
    later = (units() * (np.arange(L) > LAYER)[:, None]).astype(np.float32)
    plain = [forced(edit, number) for number in range(3)]
    own = values(noise_forced.exchange(model, [Exchanged(t, edit, later) for t in plain], WORDS, batch_size=2), 3)
    gone = values(noise_forced.exchange(model, [Exchanged(t, None, later) for t in plain], WORDS, batch_size=2), 3)
    ablated = [forced(edit + ablate(jnp.asarray(later[2]), [2], n_layers=L), number) for number in range(3)]
    np.testing.assert_allclose(own, values(log_odds.keyword_log_odds(model, plain, WORDS, batch_size=3), 3), atol=1e-4)
    expected = values(log_odds.keyword_log_odds(model, ablated, WORDS, batch_size=3), 3)
    np.testing.assert_allclose(gone, expected, atol=1e-4)
    assert np.abs(np.subtract(gone, own)).max() > 1e-3


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_share_of_a_known_mediator_is_found(model: Decoder, share: float) -> None:
    """A linear model: blocks add nothing, keywords read a direction of which `share` of the effect lies along v.

    What is added along v and across it is chosen so that the share of either is known; the last norm hardly bends it.
    """
    v, across = np.linalg.qr(np.random.default_rng(2).standard_normal((D, 2)))[0].T.astype(np.float32)
    toy = linear(model, v + across)
    added = 0.01 * (share * v + (1 - share) * across)
    edit = add_vector(jnp.asarray(added), LAYER, 1.0, n_layers=L)
    nothing = no_intervention(L, D)
    at = np.tile(v, (L, 1)) * (np.arange(L) > LAYER)[:, None]
    texts = [(forced(nothing, n), forced(edit, n)) for n in range(3)]
    plain = values(
        noise_forced.measure(
            toy, [t for pair in texts for t in pair], WORDS, units(), layer=LAYER, window=(-2, -1), batch_size=6
        ),
        6,
    )
    odds = np.array([np.mean(one["log_odds"]) for one in plain]).reshape(3, 2)
    rows = [Exchanged(clean, edit, at) for clean, _ in texts] + [Exchanged(own, nothing, at) for _, own in texts]
    inserted, removed = np.reshape(values(noise_forced.exchange(toy, rows, WORDS, batch_size=6), 6), (2, 3))
    parts = noise_tables.mediated(odds[:, 0], odds[:, 1], inserted, removed)
    assert parts[:, 0].sum() / parts[:, 1].sum() == pytest.approx(share, abs=0.03)
    assert np.abs(parts[:, 1]).min() > 1e-4


def test_the_mediated_share_halves_an_interaction() -> None:
    """y = c x + b m + d x m with m = a x: inserted gives ab, removed ab + ad, whole c + ab + ad."""
    a, b, c, d = 0.7, 2.0, 0.5, 0.4
    y = lambda x, m: c * x + b * m + d * x * m  # noqa: E731
    parts = noise_tables.mediated([y(0, 0)], [y(1, a)], [y(0, a)], [y(1, 0)])
    np.testing.assert_allclose(parts, [[a * b + a * d / 2, c + a * b + a * d]])


def test_the_temperature_matches_the_entropy(model: Decoder) -> None:
    rows = [forced(no_intervention(L, D), number) for number in range(3)]
    x = noise_forced.states(model, rows, batch_size=2)
    assert [len(of) for of in x] == [len(starts) for starts in STARTS]
    logits = [np.asarray(model.logits(jnp.asarray(of)), np.float64) for of in x]

    def by_hand(t: float) -> tuple[list[float], list[float]]:
        p = [special.softmax(of / t, axis=-1) for of in logits]
        odds = [float(np.mean(special.logit(of[:, WORDS].sum(1)))) for of in p]
        return odds, [float(np.mean(stats.entropy(of, axis=1))) for of in p]

    for t in (0.6, 1.7):
        np.testing.assert_allclose(noise_forced.at_temperature(model, x, WORDS, t), by_hand(t), rtol=1e-4)
    target = float(np.mean(by_hand(1.3)[1]))
    found = noise_forced.matching_temperature(
        lambda t: float(noise_forced.at_temperature(model, x, WORDS, t)[1].mean()), target
    )
    assert found == pytest.approx(1.3, rel=1e-3)
    assert math.isnan(noise_forced.matching_temperature(lambda t: min(t, 1.0), 2.0))


def test_equivalence_and_difference_are_t_tests() -> None:
    x = np.random.default_rng(3).normal(0.02, 0.2, 40)
    error = x.std(ddof=1) / 40**0.5
    expected = max(stats.t.sf((x.mean() + 0.1) / error, 39), stats.t.cdf((x.mean() - 0.1) / error, 39))
    assert noise_tables.equivalence_p(x, 0.1) == pytest.approx(expected)
    assert noise_tables.difference_p(x) == pytest.approx(2 * stats.t.sf(abs(x.mean()) / error, 39))
    assert math.isnan(noise_tables.equivalence_p([1.0], 0.1)) and math.isnan(noise_tables.difference_p([]))


def test_holm_is_the_step_down_of_its_definition() -> None:
    p = [0.01, 0.04, math.nan, 0.03, 0.005, 0.9]
    order, worst, expected = sorted((v, i) for i, v in enumerate(p) if v == v), 0.0, dict.fromkeys([2], math.nan)
    for rank, (value, i) in enumerate(order):
        worst = max(worst, min(1.0, (len(order) - rank) * value))
        expected[i] = worst
    np.testing.assert_allclose(statistics.holm(p), [expected[i] for i in range(6)])
    lines = [{"contrast": "first", "p": 0.02}, {"contrast": "a", "p": 0.01}, {"contrast": "b", "p": 0.5}]
    found = noise_tables.with_holm(lines, "first")
    assert [line["p_holm"] for line in found] == [0.02, 0.02, 0.5]


def test_crossed_intervals_cover_where_those_over_problems_alone_do_not() -> None:
    rng = np.random.default_rng(4)
    both, alone = 0, 0
    for _ in range(400):
        x = rng.normal(0, 0.3, (30, 1)) + rng.normal(0, 0.3, 10) + rng.normal(0, 0.3, (30, 10))
        low, high, p = noise_tables.crossed_interval(x)
        both += low <= 0 <= high
        assert (p >= 0.05) == (low <= 0 <= high)
        low, high = log_odds.interval(x.mean(1))
        alone += low <= 0 <= high
    assert both / 400 >= 0.93 and alone / 400 < 0.85
    assert all(map(math.isnan, noise_tables.crossed_interval(np.ones((1, 5)))))


def test_slopes_are_those_of_least_squares_with_a_level_for_every_text_and_place() -> None:
    """And texts that differ in both, which a slope over problems would take for an effect, do not matter."""
    rng = np.random.default_rng(5)
    level = rng.normal(0, 5, (20, 1, 3))
    x = level + rng.normal(size=(20, 4, 3))
    y = 3 * level + 0.5 * x + rng.normal(0, 0.1, (20, 4, 3))
    sums = [noise_tables.within(*one) for one in zip(x, y, strict=True)]
    lines: list[dict[str, Any]] = [{"xx": xx, "xy": xy, "yy": yy} for xx, xy, yy in sums]
    found = noise_tables.slope(lines)
    dummies = np.eye(60)[np.repeat(np.arange(60).reshape(20, 1, 3), 4, axis=1).ravel()]
    fitted = np.linalg.lstsq(np.column_stack([x.ravel(), dummies]), y.ravel(), rcond=None)[0]
    assert found["slope"] == pytest.approx(fitted[0]) == pytest.approx(0.5, abs=0.02)
    assert found["low"] < 0.5 < found["high"] and found["p"] < 1e-6 and found["explained"] > 0.9
    assert np.polyfit(x.mean((1, 2)), y.mean((1, 2)), 1)[0] > 3
    assert math.isnan(noise_tables.slope(lines[:1])["slope"])


def test_first_keywords_behind_a_burst() -> None:
    """Token by token, against the definition."""
    rng = np.random.default_rng(6)
    for _ in range(200):
        length = int(rng.integers(1, 100))
        positions = np.flatnonzero(rng.random(length) < 0.05).tolist()
        hits = np.zeros((4, 2), int)
        for at in range(5, length):
            for i, (low, high) in enumerate(noise_tables.LAGS):
                if low <= at - 5 < high:
                    hits[i] += (at in positions, 1)
            if at in positions:
                break
        assert noise_tables.first_after(positions, 5, length) == [tuple(of) for of in hits.tolist()]


def test_p_is_where_the_interval_ends_at_zero() -> None:
    x = np.random.default_rng(7).normal(0.1, 0.3, 30)
    p = noise_tables.interval_p(lambda level: log_odds.interval(x, level))
    assert p == pytest.approx(stats.ttest_1samp(x, 0)[1], rel=1e-4)
    assert noise_tables.interval_p(lambda level: log_odds.interval(x + 50, level)) == 1e-9
    assert math.isnan(noise_tables.interval_p(lambda level: (math.nan, math.nan)))


def test_rows_are_of_one_length_and_without_what_they_are_named_for(material: Material) -> None:
    """The change of the stream at the layer where noise is added, for every kind, by its draw."""
    rows = noise_rows.Rows(material, "reasoning")
    v, model = rows.vector.unit(LAYER), material.model("reasoning")
    assert 1 < rows.rank <= len(material.labels)
    asked = [(kind, 0) for _, kind, _ in rows.kinds(0)] + [("noise", 0), ("noise", 1), (UNSTEERED, 0)]
    edits = stack_rows([rows.row(kind, "verbal_0", draw) for kind, draw in asked])
    ids, positions = map(jnp.asarray, right_pad([TEXTS[1]] * len(asked), len(TEXTS[1])))
    found = np.asarray(model(ids, positions, intervention=edits, stop_at_layer=LAYER + 1).resid, np.float64)
    changes = found - found[-1]
    without = ("noise-outside:backtracking", f"noise-outside:labels({rows.rank})")
    for (kind, _), x in zip(asked[:-1], changes, strict=False):
        if not kind.startswith("noise-part") and "norm" not in kind:
            np.testing.assert_allclose(np.linalg.norm(x, axis=1), rows.length, rtol=1e-3, err_msg=kind)
        assert (np.abs(x @ v).max() < 1e-3 * rows.length) == (kind in without), kind
    of = {name: changes[[kind for kind, _ in asked].index(name)] for name in ("noise", "frozen-noise")}
    first, again, second = of["noise"], changes[-3], changes[-2]
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - second).max() > 0.1
    assert np.ptp(of["frozen-noise"], axis=0).max() < 1e-3 < np.ptp(first, axis=0).max()
    norms = np.linalg.norm(found[[kind for kind, _ in asked].index("noise keeping norm")], axis=1)
    np.testing.assert_allclose(norms, np.linalg.norm(found[-1], axis=1), rtol=1e-4)


def test_ranks_beyond_the_windows_are_refused(material: Material) -> None:
    e = experiment(ranks=(2, 99))
    with pytest.raises(ValueError, match=re.escape("questions.noise.ranks=(2, 99), but the reasoning model's")):
        noise_rows.Rows(dataclasses.replace(material, experiment=e), "reasoning")


def test_a_config_that_cannot_be_asked_is_refused() -> None:
    for change, message in (
        ({"draws": 1}, "questions.noise.draws=1, expected at least 2"),
        ({"seeds": 1}, "questions.noise.seeds=1, expected at least 2"),
        ({"burst": 7}, "questions.noise.burst=7, expected less than steering.max_new_tokens=8"),
        ({"ranks": (0,)}, "questions.noise.ranks=(0,), expected integers >= 1"),
        ({"margin": 0.0}, "questions.noise.margin=0.0, expected a number of nats above 0"),
        ({"magnitude": -1.0}, "questions.noise.magnitude=-1.0, expected a number above 0"),
        ({"replies": -1}, "questions.noise.replies=-1, expected at least 0"),
    ):
        e = experiment(**change)
        with pytest.raises(ValueError, match=re.escape(message)):
            checks.check(e)
        e.questions.ask = ()
        checks.check(e)
    assert noise_rows.magnitude(experiment()) == 8.0 and noise_rows.magnitude(experiment(magnitude=3.0)) == 3.0


def test_what_is_sampled_is_asked_for_once() -> None:
    found = [c for c in conditions.planned(experiment()) if c.target == "reasoning"]
    kinds = [c.kind for c in found if c.magnitude == 8.0]
    for kind in ("noise", "noise-outside:backtracking", "noise-outside:random", "noise during generated[0:2]"):
        assert kinds.count(kind) == 1, kind
    assert not any("outside" in c.kind for c in conditions.planned(experiment(replies=0)))


@pytest.mark.slow
def test_a_run_that_asks_has_its_tables_figure_and_sentence(finished: Path) -> None:
    """Nothing half done is left, and the tables hang together."""
    pipeline.Run(experiment()).run()
    folder = finished / "5-analysis"
    own = noise.NOISE_QUESTION
    expected = {*(f"{role}.{name}.csv" for role in ("base", "reasoning") for name in own.role_tables)}
    assert {path.name for path in folder.glob("*noise*")} == expected | {f"{name}.csv" for name in own.tables}
    lines = tables.read(folder / "reasoning.noise_log_odds.csv")
    rates = {line["contrast"]: line for line in tables.read(folder / "noise_contrasts.csv")}
    found: dict[tuple[str, str], list[float]] = {}
    for line in lines:
        if line["text"] == "traces":
            found.setdefault((line["kind"], line["problem_id"]), []).append(line["log_odds"])
    problems = {problem for kind, problem in found if kind == "noise"}
    mean = {key: float(np.mean(value)) for key, value in found.items()}
    apart = [mean["noise-outside:backtracking", p] - mean["noise-outside:random", p] for p in problems]
    line = rates["noise-outside:backtracking less noise-outside:random"]
    assert line["estimate"] == pytest.approx(np.mean(apart), abs=1e-6) and line["problems"] == len(problems)
    assert line["p"] == line["p_holm"] == pytest.approx(noise_tables.equivalence_p(apart, 0.02))
    assert (finished / "6-report" / "noise.png").exists()
    for shown in ("summary.md", "report.html"):
        assert "Gaussian noise at magnitude 8 changes" in (finished / "6-report" / shown).read_text()
