"""Composition: the index of interaction on known truth, directions by scipy, and a whole run recomputed."""

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scipy import linalg, special

from backtrack_jax import checks, pipeline
from backtrack_jax.analysis import composition, composition_rows, composition_tables, interaction, log_odds
from backtrack_jax.analysis.base import Material
from backtrack_jax.analysis.composition_rows import ALONE, NEGATIVE, OWN, RANDOM, SPAN, SYMMETRIC, WITHOUT, Directions
from backtrack_jax.config import Experiment
from backtrack_jax.data.records import UNSTEERED
from backtrack_jax.files import tables
from backtrack_jax.intervention import stack_rows
from backtrack_jax.report.stage import read_results
from backtrack_jax.stages.analysis import gather

LAYER = 1


def experiment(**settings: Any) -> Experiment:
    e = tiny.get_config()
    e.questions.ask = ("composition",)
    small: dict[str, Any] = {"random": 3, "subspaces": 4, "ranks": (1, 2), "ablated_texts": 2, "components": 1}
    e.questions.composition = dataclasses.replace(e.questions.composition, **(small | settings))
    return e


@pytest.fixture(scope="module")
def material(tiny_run: Path) -> Iterator[Material]:
    with contextlib.chdir(tiny_run):
        yield gather(pipeline.Run(experiment()).context)


@pytest.mark.parametrize(("truth", "power"), [(0.0, 0.0), (0.8, 0.8), (-0.8, 0.8)])
def test_the_index_on_simulated_counts(truth: float, power: float) -> None:
    """40 problems of 60 sentences, whose log-odds of a keyword differ: effects add up, or do more or less together."""
    rng = np.random.default_rng(1)
    effects = np.array([1.0, 0.6])
    population = rng.normal(-2.0, 0.7, 200_000)
    means = [special.expit(population + a * effects[0] + b * effects[1] + a * b * truth).mean() for a, b in CORNERS]
    on_rates = float(interaction.index(*means))
    held, decided = {"rates": 0, "log-odds": 0}, 0
    for _ in range(500):
        level = rng.normal(-2.0, 0.7, 40)
        odds = [level + a * effects[0] + b * effects[1] + a * b * truth for a, b in CORNERS]
        hits = [rng.binomial(60, special.expit(of)) for of in odds]
        low, high = log_odds.interval(interaction.index(*[n / 60 for n in hits]))
        held["rates"] += low <= on_rates <= high
        read = [of + rng.normal(0, 0.4, 40) for of in odds]  # as read off the model, on sentences of one text
        low, high = log_odds.interval(interaction.index(*read))
        held["log-odds"] += low <= truth <= high
        decided += not low <= 0 <= high
    assert all(0.92 <= n / 500 <= 0.98 for n in held.values()), held
    assert decided / 500 >= power if power else decided / 500 <= 0.08
    assert abs(on_rates) > 0.01 or truth  # rates of effects that add up on log-odds do not add up


CORNERS = ((1, 1), (1, 0), (0, 1), (0, 0))


def test_one_weighted_sum_explains_what_it_explains() -> None:
    """A saturating function of one sum is rarely refused, although its index is not 0; what has two parts is."""
    # A grid so fine, and noise so large, that not even the true surface is fitted without a misfit.
    points = [(a, b) for a in composition_rows.GRID for b in composition_rows.GRID]
    at, rng = np.array(points), np.random.default_rng(2)
    sum_ = at @ (0.8, 0.6)
    surfaces = {"one": special.expit(4 * sum_ - 3), "two": special.expit(4 * sum_ - 3) + at[:, 0] * (1 - at[:, 1])}
    refused = {}
    for name, surface in surfaces.items():
        values = [surface + rng.normal(0, 0.2, (30, 1)) * sum_ + rng.normal(0, 0.3, (30, 25)) for _ in range(20)]
        refused[name] = np.mean([interaction.single_index(points, one, draws=19).p <= 0.05 for one in values])
    assert refused["one"] <= 0.1 and refused["two"] >= 0.9
    fit = interaction.single_index(points, np.tile(surfaces["one"], (3, 1)), draws=3)
    order = np.argsort(at @ (fit.alpha, fit.beta), kind="stable")
    assert fit.misfit < 1e-4 and (np.diff(surfaces["one"][order]) >= -0.02).all()
    with pytest.raises(ValueError, match=r"points \(25, 2\) and values \(3, 8\)"):
        interaction.single_index(points, np.zeros((3, 8)))


def test_directions_are_those_of_scipy(material: Material) -> None:
    found = Directions(material, "reasoning")
    of = {(d.name, d.form): d.vector for d in found.of}
    v = material.vectors["reasoning", "backtracking"].unit(LAYER).astype(np.float64)
    np.testing.assert_allclose(of["backtracking", ALONE], v, atol=1e-12)
    assert found.labels[0] == "backtracking" and len(found.labels) > 2
    kept = np.stack([of[name, ALONE] for name in found.labels])
    polar = linalg.polar(kept)[0]
    for n, name in enumerate(found.labels):
        np.testing.assert_allclose(of[name, SYMMETRIC], polar[n], atol=1e-6)
        others = np.delete(kept, n, axis=0)
        left = kept[n] - others.T @ np.linalg.lstsq(others.T, kept[n], rcond=None)[0]
        np.testing.assert_allclose(of[name, OWN], left / np.linalg.norm(left), atol=1e-6)
        if n:
            assert abs(of[name, OWN] @ v) < 1e-6
    parts = [d for d in found.of if d.form in (composition_rows.WITHIN, composition_rows.OUTSIDE)]
    np.testing.assert_allclose(sum(d.length * d.vector for d in parts), v, atol=1e-6)
    difference = v - material.vectors["base", "backtracking"].unit(LAYER)
    np.testing.assert_allclose(of["reasoning less base", ALONE], difference / np.linalg.norm(difference), atol=1e-6)
    sums = material.sums["reasoning"]
    states = sums.section_means[sums.members("backtracking"), sums.plan.layers.index(LAYER)].astype(np.float64)
    first = linalg.svd(states - states.mean(0))[2][0]
    assert abs(of["component 1", ALONE] @ first) == pytest.approx(1, abs=1e-6) and of["component 1", ALONE] @ v >= 0
    for (name, form), vector in of.items():
        assert np.linalg.norm(vector) == pytest.approx(1)
        if form in (WITHOUT, NEGATIVE):
            assert abs(vector @ v) < 1e-9 and vector @ of[name, ALONE] * (1 if form == WITHOUT else -1) > 0


def test_rows_do_what_they_say(material: Material) -> None:
    """Added at the layer at the length of the magnitude; removed from all later ones, and from no earlier one."""
    found, model = Directions(material, "reasoning"), material.model("reasoning")
    ids, positions = jnp.asarray([[3, 4, 5, 6]] * 3), jnp.tile(jnp.arange(4), (3, 1))
    w, basis = found.random(0), found.removed()[f"{SPAN}, 2"]
    edits = stack_rows([found.added((found.v, 0.5), (w, 0.25)), found.without(basis, 1.0), found.added((w, 0.0))])
    states = np.asarray(model(ids, positions, intervention=edits, capture=lambda out: out.resid_post).captured)
    at_layer = states[LAYER].astype(np.float64)
    change = at_layer[0, 1:] - at_layer[2, 1:]
    np.testing.assert_allclose(change, np.tile((0.5 * found.v + 0.25 * w) * found.length, (3, 1)), atol=1e-4)
    np.testing.assert_allclose(at_layer[1, 1:] - at_layer[2, 1:], np.tile(found.v * found.length, (3, 1)), atol=1e-4)
    assert np.abs(states[LAYER + 1 :, 1, 1:] @ basis.T).max() < 1e-3 < np.abs(states[LAYER, 1, 1:] @ basis.T).max()
    assert abs(w @ found.v) < 1e-9 and np.abs(found.random(1) @ w) < 0.99


def test_a_run_that_asks(finished: Path) -> None:
    """Tables recomputed from what was read on each text; the pair is chosen on other texts than it is measured on."""
    e = experiment()
    checks.check(e)
    pipeline.Run(e).run()
    folder = finished / "5-analysis"
    effects, grid, ablated = (tables.read(folder / f"reasoning.{t}.csv") for t in composition.COMPOSITION.role_tables)
    assert not tables.read(folder / "base.composition_grid.csv") and not list(folder.glob("*.jsonl"))
    at = {(x["direction"], x["form"], x["problem_id"]): x for x in effects}
    problems = list(dict.fromkeys(x["problem_id"] for x in effects))
    assert len(problems) == 3

    def change(name: str, form: str, of: list[str], column: str = "log_odds") -> np.ndarray:
        return np.array([at[name, form, p][column] - at[UNSTEERED, "", p][column] for p in of])

    table = {(x["direction"], x["form"]): x for x in tables.read(folder / "composition.csv")}
    own = change("backtracking", ALONE, problems)
    for (name, form), line in table.items():
        values = change(name, form, problems)
        assert line["effect"] == pytest.approx(values.mean()) and line["share"] == pytest.approx(
            values.mean() / own.mean()
        )
        assert line["effect_probability"] == pytest.approx(change(name, form, problems, "share").mean())
    assert (RANDOM, ALONE) in table and table["backtracking", ALONE]["share"] == 1

    chosen = {(x["direction"], x["form"]) for x in grid}
    apart = [key for key in table if key[1] in composition_rows.APART and key[0] != "backtracking"]
    assert chosen == {max(apart, key=lambda key: change(*key, problems[::2]).mean())}
    assert {x["problem_id"] for x in grid} == set(problems[1::2])
    f = {(x["pair"], x["a"], x["b"]): x["log_odds"] for x in grid}
    assert len(f) == 25 + 3 + 2 + 2 * 3 == len(grid)
    name, form = next(iter(chosen))
    assert f["direction", 0, 1] == pytest.approx(at[name, form, problems[1]]["log_odds"], abs=1e-4)
    assert (
        f["direction", 1, 0]
        == f["v itself", 0, 1]
        == pytest.approx(at["backtracking", ALONE, problems[1]]["log_odds"], abs=1e-4)
    )
    lines = {(x["pair"], x["scale"]): x for x in tables.read(folder / "composition_interaction.csv")}
    drawn = []
    for pair in ("direction", "v itself", "random 0", "random 1", "random 2"):
        d = f[pair, 1, 1] - f["direction", 1, 0] - f[pair, 0, 1] + f["direction", 0, 0]
        assert lines[pair, "log-odds"]["estimate"] == pytest.approx(d)
        drawn += [abs(d)] if RANDOM in pair else []
    line = lines["direction", "log-odds"]
    assert line["p_random"] == pytest.approx((1 + sum(d >= abs(line["estimate"]) for d in drawn)) / 4)

    left: dict[tuple[str, int, int], dict[int, float]] = {}
    for x in ablated:
        of = left.setdefault((x["removed"], x["rank"], x["draw"]), {0: 0.0, 1: 0.0})
        of[x["added"]] += x["log_odds"]
    whole = left["nothing", 0, -1][1] - left["nothing", 0, -1][0]
    share = {key: (of[1] - of[0]) / whole for key, of in left.items()}
    necessity = {x["removed"]: x for x in tables.read(folder / "composition_necessity.csv")}
    assert {f"{SPAN}, 1", f"{SPAN}, 2"} < necessity.keys()
    for key, line in necessity.items():
        assert line["left"] == pytest.approx(share[key, line["rank"], -1])
        random = [value for (name, rank, _), value in share.items() if (name, rank) == (RANDOM, line["rank"])]
        assert line["draws"] == len(random)
        if random and SPAN in key:
            assert line["random"] == pytest.approx(np.median(random))
            assert line["p"] == pytest.approx((1 + sum(value <= line["left"] for value in random)) / (1 + len(random)))

    r = read_results(e, finished)
    (claim,), (sentence,) = composition.COMPOSITION.claims(r), composition.COMPOSITION.sentences(r)
    best = max(apart, key=lambda key: table[key]["share"])
    assert claim.where == ", ".join(best) and claim.verdict == "undecided" and f"({', '.join(best)})" in sentence
    assert (finished / "6-report" / "composition.png").exists()


def test_the_claim_is_of_all_directions() -> None:
    """It holds if all lie below half, fails if one lies above it by a corrected interval; n decides whether at all."""
    rng = np.random.default_rng(3)
    for extra, verdict in ((0.1, "holds"), (0.5, "undecided"), (0.9, "fails")):
        lines = []
        for number in range(100):
            level = rng.normal()
            for name, form, size in (("", "", 0.0), ("v", ALONE, 1.0), ("a", OWN, 0.05), ("b", OWN, extra)):
                direction = name or UNSTEERED
                value = level + size + rng.normal(0, 0.1) * bool(size)
                lines.append({"direction": direction, "form": form, "cosine": 0.0, "length": 1.0, "role": "reasoning"})
                lines[-1] |= {"problem_id": f"p{number}", "log_odds": value, "share": special.expit(value)}
        r: Any = Findings(lines)
        (claim,) = composition.COMPOSITION.claims(r)
        assert claim.verdict == verdict, extra
        assert claim.estimate == pytest.approx(extra, abs=0.1)


class Findings:
    """What the claim reads of `Results`."""

    def __init__(self, lines: list[dict[str, Any]]):
        self.label, self.experiment = "v", experiment()
        self.tables = {
            "composition_effects": lines,
            "composition": composition_tables.directions(lines, "v"),
            "composition_necessity": [],
        }


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"ranks": (0,)}, "questions.composition.ranks=(0,), expected different numbers of at least 1"),
        ({"ranks": (2, 2)}, "questions.composition.ranks=(2, 2)"),
        ({"random": -1}, "questions.composition.random=-1, expected at least 0"),
        ({"magnitude": -1.0}, "questions.composition.magnitude=-1.0, expected a number above 0"),
    ],
)
def test_settings_are_refused(changed: dict[str, Any], message: str) -> None:
    e = experiment(**changed)
    with pytest.raises(ValueError, match=re.escape(message)):
        checks.check(e)
    e.questions.ask = ()
    checks.check(e)


def test_a_pair_that_is_not_there_is_named(material: Material) -> None:
    found = Directions(dataclasses.replace(material, experiment=experiment(pair="nothing, own part")), "reasoning")
    with pytest.raises(ValueError, match=r"questions.composition.pair='nothing, own part' is not among .* \| "):
        composition.choice(found, [], [])
    assert math.isclose(composition_rows.magnitude(experiment()), 8.0)
