"""Conditions of a sweep: their number, lengths, directions and noise."""

import dataclasses
import hashlib
import itertools
import random
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny

from backtrack_jax import checks, conditions, kinds
from backtrack_jax.conditions import Interventions, Readings
from backtrack_jax.config import UNITS, Experiment
from backtrack_jax.data.records import LABELS, UNSTEERED, Condition
from backtrack_jax.directions import Sections
from backtrack_jax.extract import WindowPlan, WindowSums
from backtrack_jax.generate import noise_key, row_key
from backtrack_jax.intervention import Intervention
from backtrack_jax.kinds import parse
from backtrack_jax.terms import Ablate, Add, Amplify, Noise
from backtrack_jax.vectors import SteeringVector

L, D = 3, 8
ROOT = Path(__file__).parents[1]
SOURCELESS = {"noise", "self-amplification", "random"}
KEY = row_key(0, "p", 0)
CONTROLS = ("overall-mean", "shuffled", *sorted(SOURCELESS))


@pytest.fixture
def readings() -> Readings:
    """Vectors of unlike norms, none of them 1."""
    rng = np.random.default_rng(0)
    vectors = {
        (role, kind): SteeringVector((3 + number) * rng.standard_normal((L, D)).astype(np.float32))
        for number, (role, kind) in enumerate(
            itertools.product(("base", "reasoning"), ("backtracking", "deduction", "overall-mean", "shuffled"))
        )
    }
    offsets = {
        ("reasoning", window): SteeringVector(rng.standard_normal((L, D)).astype(np.float32))
        for window in ("-1..-1", "0..0")
    }
    norms = {"base": np.array([2.0, 5.0, 7.0]), "reasoning": np.array([3.0, 11.0, 13.0])}
    return Readings(vectors, norms, offsets, {"mine.npz": SteeringVector(5 * rng.standard_normal((L, D)))})


def term(row: Intervention, kind: type[Any]) -> Any:
    """The one term that a row has, which is of that kind."""
    assert [type(term) for term in row.terms] == [kind]
    return row.terms[0]


def experiment(**steering: object) -> Experiment:
    """The tiny experiment with one sweep only, unless others are asked for."""
    e = tiny.get_config()
    alone: dict[str, Any] = {"baselines": (), "offsets": (), "layers": (), "grid_magnitudes": (), "grid_limit": 0}
    e.steering = dataclasses.replace(e.steering, **(alone | steering))
    return e


def test_make_and_count_agree_for_any_config(readings: Readings) -> None:
    """And with a count by hand: 1 + sources x magnitudes for each model."""
    rng = random.Random(0)
    kinds = ("backtracking", "deduction", *CONTROLS)
    for _ in range(200):
        e = experiment(
            kinds=tuple(rng.sample(kinds, rng.randint(1, len(kinds)))),
            magnitudes=tuple(rng.sample((-4.0, 0.0, -0.0, 1, 2.5, 8), rng.randint(1, 6))),
            unit=rng.choice(UNITS),
            layer=rng.randrange(L),
        )
        e.roles = tuple(rng.sample(("base", "reasoning"), rng.randint(1, 2)))
        steered = sum(1 if kind in SOURCELESS else len(e.roles) for kind in e.steering.kinds)
        nonzero = sum(magnitude != 0 for magnitude in e.steering.magnitudes)
        expected = len(e.roles) * (steered * nonzero + (0 in e.steering.magnitudes))
        made = conditions.make(e, readings)
        assert len(made) == len(set(made)) == len(conditions.planned(e)) == expected


def test_offsets_are_named_by_the_window_that_is_read_at_them(readings: Readings) -> None:
    e = experiment(kinds=("backtracking",), offsets=(-1, 0), magnitudes=(4.0,))
    e.vectors = dataclasses.replace(e.vectors, offset_window=(-2, 1))
    windows = [c.window for c in conditions.make(e, readings) if c.window not in ("", "-5..-2")]
    assert windows == ["-3..0", "-2..1"]


def test_sweeps_over_offsets_and_layers(readings: Readings) -> None:
    """Fig. 2, 4 and B.1 on the model that writes the traces; what two sweeps share is one condition."""
    e = experiment(
        kinds=("backtracking",),
        baselines=("deduction", "noise", "shuffled"),
        offsets=(-1, 0),
        layers=(0, 1),
        magnitudes=(0.0, 4.0),
        grid_magnitudes=(4.0, 8.0),
        limit=5,
        grid_limit=2,
    )
    made = conditions.make(e, readings)
    found = [(c.target, c.kind, c.source, c.layer, c.window, c.magnitude, n) for c, n in made.items()]
    label, own = "backtracking", "-5..-2"
    assert found == [
        ("base", UNSTEERED, "", 1, "", 0.0, 5),
        ("base", label, "base", 1, own, 4.0, 5),
        ("base", label, "reasoning", 1, own, 4.0, 5),
        ("reasoning", UNSTEERED, "", 1, "", 0.0, 5),
        ("reasoning", label, "base", 1, own, 4.0, 5),
        ("reasoning", label, "reasoning", 1, own, 4.0, 5),
        ("reasoning", "deduction", "reasoning", 1, own, 4.0, 5),
        ("reasoning", "noise", "", 1, "", 4.0, 5),
        ("reasoning", "shuffled", "reasoning", 1, own, 4.0, 5),
        *(("reasoning", label, "reasoning", 1, w, m, 2) for w in ("-1..-1", "0..0") for m in (4.0, 8.0)),
        *(("reasoning", label, source, 0, own, m, 2) for source in ("base", "reasoning") for m in (4.0, 8.0)),
        *(("reasoning", label, source, 1, own, 8.0, 2) for source in ("base", "reasoning")),
    ]
    built = Interventions(readings, L, D, "all")
    for c in made:
        if c.window not in ("", own):
            direction = readings.offsets["reasoning", c.window].directions[1]
            np.testing.assert_allclose(
                term(built.row(c, KEY), Add).vector[1],
                c.length * direction / np.linalg.norm(direction),
                rtol=1e-5,
            )
    hashes = {c.window: built.vector_hash(c, KEY) for c in made if c.source == "reasoning" and c.kind == label}
    assert len(set(hashes.values())) == 3


def test_limits_of_shared_conditions(readings: Readings) -> None:
    """The larger number of problems; 0 is all of them."""
    for limit, grid_limit, expected in ((5, 2, 5), (2, 5, 5), (0, 2, 0), (3, 0, 3)):
        e = experiment(kinds=("backtracking",), layers=(1,), limit=limit, grid_limit=grid_limit)
        assert {n for c, n in conditions.make(e, readings).items() if c.target == "reasoning"} == {expected}


def test_every_pair_of_model_and_vector(readings: Readings) -> None:
    """Fig. 3: four pairs; controls without a source once per model; one unsteered condition per model."""
    made = conditions.make(experiment(kinds=("backtracking", "random"), magnitudes=(0.0, 4.0)), readings)
    assert [(c.target, c.kind, c.source, c.magnitude) for c in made] == [
        ("base", UNSTEERED, "", 0.0),
        ("base", "backtracking", "base", 4.0),
        ("base", "backtracking", "reasoning", 4.0),
        ("base", "random", "", 4.0),
        ("reasoning", UNSTEERED, "", 0.0),
        ("reasoning", "backtracking", "base", 4.0),
        ("reasoning", "backtracking", "reasoning", 4.0),
        ("reasoning", "random", "", 4.0),
    ]


@pytest.mark.parametrize("unit", UNITS)
def test_length_of_a_magnitude(unit: str, readings: Readings) -> None:
    e = experiment(unit=unit, magnitudes=(0.0, -2.0, 3.0), layer=1, kinds=("backtracking", "deduction", "noise"))
    for c in conditions.make(e, readings):
        if unit in ("absolute", "kl"):  # the second until the stage has found the length that costs so much
            expected = c.magnitude
        elif unit == "relative":  # of the steered model, wherever the vector comes from
            expected = c.magnitude * {"base": 5.0, "reasoning": 11.0}[c.target]
        else:  # of the experiment's own vector, so that kinds are compared at equal length
            vector = readings.vectors[c.source or c.target, "backtracking"].directions[1]
            expected = c.magnitude * np.linalg.norm(vector)
        assert c.length == pytest.approx(expected, rel=1e-6)


def rows(readings: Readings, e: Experiment, key: jax.Array) -> list[tuple[Condition, Intervention]]:
    built = Interventions(readings, L, D, e.steering.span)
    return [(c, built.row(c, key)) for c in conditions.make(e, readings)]


def test_what_is_added_has_the_length_of_the_condition(readings: Readings) -> None:
    """A vector of norm 3 or 8, normalised once: T27. Other layers are untouched."""
    e = experiment(unit="relative", magnitudes=(0.0, -0.5, 2.0))
    for c, row in rows(readings, e, KEY):
        if c.kind == UNSTEERED:
            assert row.terms == ()
            continue
        found = term(row, {"noise": Noise, "self-amplification": Amplify}.get(c.kind, Add))
        others = [layer for layer in range(L) if layer != c.layer]
        assert not np.any(np.asarray(found.strength)[others])
        if c.kind in ("noise", "self-amplification"):
            assert found.strength[c.layer] == pytest.approx(c.length, rel=1e-6)
            continue
        added = np.asarray(found.strength[c.layer] * found.vector[c.layer])
        assert np.linalg.norm(added) == pytest.approx(abs(c.length), rel=1e-5)
        if c.source:
            direction = readings.vectors[c.source, c.kind].directions[c.layer]
            cosine = added @ direction / np.linalg.norm(direction) / c.length
            assert cosine == pytest.approx(1, abs=1e-6)


def test_raw_adds_the_vector_as_it_was_found(readings: Readings) -> None:
    e = experiment(unit="raw", kinds=("backtracking",), magnitudes=(1.0,), layer=2)
    for c, row in rows(readings, e, KEY):
        np.testing.assert_allclose(
            term(row, Add).vector[2], readings.vectors[c.source, "backtracking"].directions[2], rtol=1e-5
        )


def test_raw_adds_the_vector_of_every_offset_as_it_was_found(readings: Readings) -> None:
    e = experiment(unit="raw", kinds=("backtracking",), magnitudes=(1.0,), layer=2, offsets=(-1, 0))
    of_offsets = [(c, row) for c, row in rows(readings, e, KEY) if c.window in ("-1..-1", "0..0")]
    assert len(of_offsets) == 2
    for c, row in of_offsets:
        np.testing.assert_allclose(
            term(row, Add).vector[2], readings.offsets["reasoning", c.window].directions[2], rtol=1e-5
        )


def test_what_is_added_twice_is_one_condition(readings: Readings) -> None:
    """As where a command names the kinds of a config whose baselines hold one of them."""
    once = experiment(kinds=("backtracking", "noise"), baselines=("deduction",))
    twice = experiment(kinds=("backtracking", "noise"), baselines=("deduction", "noise"))
    assert conditions.make(once, readings) == conditions.make(twice, readings)
    assert once.steering.all_kinds == ("backtracking", "noise", "deduction")


def test_unsteered_is_no_intervention(readings: Readings) -> None:
    (c, row), *_ = rows(readings, experiment(), KEY)
    assert c.kind == UNSTEERED
    assert row.terms == ()


def test_noise_belongs_to_the_row_not_the_condition(readings: Readings) -> None:
    e = experiment(kinds=("noise", "backtracking"), magnitudes=(4.0, 8.0))
    one, other = row_key(0, "p", 0), row_key(0, "p", 1)
    keys = {jax.random.key_data(row.key).tobytes() for _, row in rows(readings, e, one)}
    assert keys == {jax.random.key_data(noise_key(one)).tobytes()}
    assert keys.isdisjoint({jax.random.key_data(row.key).tobytes() for _, row in rows(readings, e, other)})


def test_a_reply_has_a_random_direction_of_its_own(readings: Readings) -> None:
    """One for all magnitudes, models and layers; another problem, sample, seed or name gives another one."""
    e = experiment(kinds=("random",), magnitudes=(-4.0, 8.0), layer=(1, 2))
    for key in (KEY, row_key(0, "q", 0)):
        for c, row in rows(readings, e, key):
            added = np.asarray(term(row, Add).vector[c.layer]) / c.length
            np.testing.assert_allclose(added, conditions.random_direction(key, "random", D), rtol=1e-6)
    others = [row_key(0, "p", 0), row_key(0, "q", 0), row_key(0, "p", 1), row_key(1, "p", 0)]
    units = [*(conditions.random_direction(key, "random", D) for key in others)]
    units.append(conditions.random_direction(KEY, "other", D))
    cosines = np.array(units) @ np.array(units).T
    np.testing.assert_allclose(np.diag(cosines), 1, rtol=1e-6)
    assert np.all(np.abs(cosines[~np.eye(len(units), dtype=bool)]) < 0.99)
    built = Interventions(readings, L, D, "all")
    (c,) = (c for c in conditions.make(e, readings) if (c.target, c.layer, c.magnitude) == ("base", 1, 8.0))
    assert len({built.vector_hash(c, key) for key in others}) == len(others)


def test_vector_hash_tells_vectors_apart(readings: Readings) -> None:
    built = Interventions(readings, L, D, "all")
    hashes = {}
    for c in conditions.make(experiment(), readings):
        hashes.setdefault((c.kind, c.source), set()).add(built.vector_hash(c, KEY))
    assert all(len(values) == 1 for values in hashes.values())  # whatever model and magnitude
    one = {key: values.pop() for key, values in hashes.items()}
    with_direction = [value for value in one.values() if value]
    assert len(set(with_direction)) == len(with_direction) == 7  # three kinds of two sources, and the random direction
    assert {kind for (kind, _), value in one.items() if not value} == {UNSTEERED, "noise", "self-amplification"}
    direction = readings.vectors["base", "deduction"].directions[1]
    assert one["deduction", "base"] == hashlib.sha256(direction.astype("<f4").tobytes()).hexdigest()[:16]


def unit(vector: np.ndarray) -> np.ndarray:
    return vector.astype(np.float64) / np.linalg.norm(vector.astype(np.float64))


@pytest.mark.parametrize("unit_of_magnitudes", UNITS)
def test_a_sum_is_of_unit_directions_and_as_long_as_any_kind(unit_of_magnitudes: str, readings: Readings) -> None:
    """By hand: files and the random direction weigh as much as labels, whatever their norms."""
    kind = "backtracking - 0.5 * deduction + 2e0*mine.npz + random"
    e = experiment(unit=unit_of_magnitudes, kinds=(kind, "backtracking"), magnitudes=(-2.0, 3.0), layer=1)
    lengths = {}
    for c, row in rows(readings, e, KEY):
        lengths.setdefault((c.target, c.source, c.magnitude), set()).add(c.length)
        if c.kind != kind:
            continue
        label, other = (unit(readings.vectors[c.source, name].directions[1]) for name in ("backtracking", "deduction"))
        summed = label - 0.5 * other + 2 * unit(readings.files["mine.npz"].directions[1])
        summed += conditions.random_direction(KEY, "random", D)
        vector = np.asarray(term(row, Add).vector)
        np.testing.assert_allclose(vector[1], c.length * summed / np.linalg.norm(summed), rtol=1e-5)
        assert not np.any(vector[[0, 2]])
    assert len(lengths) == 8 and all(len(of_kinds) == 1 for of_kinds in lengths.values())


def test_a_sum_without_a_source_is_run_once_per_model(readings: Readings) -> None:
    """And measured like other controls, also where a file alone is measured by its own norm."""
    kinds = ("random - mine.npz", "mine.npz")
    made = conditions.make(experiment(unit="raw", kinds=kinds, magnitudes=(1.0,), layer=2), readings)
    assert [(c.target, c.kind, c.source, c.window) for c in made] == [
        (target, kind, "", "") for target in ("base", "reasoning") for kind in kinds
    ]
    for c in made:
        measure = readings.files["mine.npz"] if c.kind == "mine.npz" else readings.vectors[c.target, "backtracking"]
        assert c.length == pytest.approx(np.linalg.norm(measure.directions[2]), rel=1e-6)


def test_a_sum_of_nothing_is_refused(readings: Readings) -> None:
    readings.vectors["base", "deduction"].directions[1] = 3 * readings.vectors["base", "backtracking"].directions[1]
    e = experiment(kinds=("backtracking - deduction",), magnitudes=(1.0,), layer=1)
    with pytest.raises(ValueError, match="'backtracking - deduction': the sum is zero at layer 1"):
        rows(readings, e, KEY)


@pytest.mark.parametrize("unit_of_magnitudes", UNITS)
def test_an_ablation_removes_a_share_from_its_layer_on(unit_of_magnitudes: str, readings: Readings) -> None:
    """In any unit, and along the very direction that the kind without `ablate:` adds."""
    of_sum = "deduction + 0.5 * random"
    kinds = ("ablate:backtracking", f"ablate: {of_sum}", "ablate:random", of_sum)
    e = experiment(unit=unit_of_magnitudes, kinds=kinds, magnitudes=(0.0, -0.5, 1.0), layer=1)
    added = {(c.target, c.source, c.kind): row for c, row in rows(readings, e, KEY) if c.kind == of_sum}
    counts: dict[str, int] = {}
    for c, row in rows(readings, e, KEY):
        if not c.kind.startswith("ablate:"):
            continue
        counts[c.kind] = counts.get(c.kind, 0) + 1
        found = term(row, Ablate)
        assert c.length == c.magnitude
        np.testing.assert_array_equal(found.strength, [0.0, c.magnitude, c.magnitude])
        assert found.directions.shape == (L, 1, D)
        if c.kind == "ablate:backtracking":
            expected = unit(readings.vectors[c.source, "backtracking"].directions[1])
        elif c.kind == "ablate:random":
            expected = conditions.random_direction(KEY, "random", D)
        else:
            expected = unit(np.asarray(term(added[c.target, c.source, of_sum], Add).vector[1]))
        for layer in (1, 2):  # the direction is that of the condition's layer, up to its sign
            cosine = np.asarray(found.directions[layer, 0]) @ expected
            assert abs(cosine) == pytest.approx(1, abs=1e-6)
    assert counts == {kinds[0]: 8, kinds[1]: 8, kinds[2]: 4}


def test_kinds_are_done_at_every_layer_and_baselines_at_the_first(readings: Readings) -> None:
    """Each with the direction and the norms of its layer; unsteered once per model."""
    e = experiment(
        kinds=("backtracking", "noise"), baselines=("random",), magnitudes=(0.0, 2.0), unit="relative", layer=(2, 0)
    )
    made = conditions.make(e, readings)
    assert [(c.target, c.kind, c.source, c.layer) for c in made] == [
        ("base", UNSTEERED, "", 2),
        *(("base", "backtracking", source, layer) for layer in (2, 0) for source in ("base", "reasoning")),
        *(("base", "noise", "", layer) for layer in (2, 0)),
        ("reasoning", UNSTEERED, "", 2),
        *(("reasoning", "backtracking", source, layer) for layer in (2, 0) for source in ("base", "reasoning")),
        *(("reasoning", "noise", "", layer) for layer in (2, 0)),
        ("reasoning", "random", "", 2),
    ]
    for c, row in rows(readings, e, KEY):
        if c.kind == "backtracking":
            assert c.length == pytest.approx(2 * readings.mean_norm[c.target][c.layer])
            expected = c.length * unit(readings.vectors[c.source, c.kind].directions[c.layer])
            np.testing.assert_allclose(term(row, Add).vector[c.layer], expected, rtol=1e-5)
    raw = conditions.make(dataclasses.replace(e, steering=dataclasses.replace(e.steering, unit="raw")), readings)
    for c in raw:
        if c.magnitude:
            vector = readings.vectors[c.source or c.target, "backtracking"].directions[c.layer]
            assert c.length == pytest.approx(2 * np.linalg.norm(vector), rel=1e-6)
    assert conditions.planned(e).values() and len(conditions.planned(e)) == len(made)


def test_hash_of_a_sum_is_that_of_its_direction(readings: Readings) -> None:
    built = Interventions(readings, L, D, "all")
    kinds = ("backtracking + deduction", "deduction + backtracking", "backtracking - deduction", "backtracking")
    e = experiment(kinds=(*kinds, "ablate:backtracking", "ablate:backtracking - deduction"), magnitudes=(1.0,), layer=1)
    made = [c for c in conditions.make(e, readings) if c.target == c.source == "base"]
    hashes = {c.kind: built.vector_hash(c, KEY) for c in made}
    assert hashes[kinds[0]] == hashes[kinds[1]]
    assert hashes["backtracking"] == hashes["ablate:backtracking"]
    assert hashes["backtracking - deduction"] == hashes["ablate:backtracking - deduction"]
    assert len(set(hashes.values())) == 3
    units = [unit(readings.vectors["base", name].directions[1]) for name in ("backtracking", "deduction")]
    (sum_of_both,) = (c for c in made if c.kind == kinds[0])
    added = np.asarray(term(built.row(sum_of_both, KEY), Add).vector[1])
    np.testing.assert_allclose(added, unit(units[0] + units[1]), rtol=1e-5)


def sections(readings: Readings, role: str) -> Sections:
    """Sections of five traces at every layer, four of which have the experiment's label."""
    rng = np.random.default_rng(3)
    n, ids = 20, [f"t{i}" for i in range(5)]
    plan = WindowPlan(
        ("backtracking", "deduction"),
        {"backtracking": ("backtracking",), "all": ("backtracking", "deduction")},
        ((-5, -2),),
        tuple(range(L)),
    )
    sums = dataclasses.replace(
        WindowSums.zeros(plan, L, D),
        trace_ids=ids,
        section_means=rng.standard_normal((n, L, D)).astype(np.float32),
        section_traces=np.repeat(np.arange(5), 4),
        section_labels=np.tile([0, 1, 1, 0], 5),
        section_starts=np.tile([0, 5, 10, 15], 5),
        section_positions=np.full(n, 4),
    )
    found = {name: vector for (of, name), vector in readings.vectors.items() if of == role and name[0] in "bd"}
    return Sections("backtracking", "all", found, sums, [f"p{i}" for i in range(5)])


def test_every_direction_and_operation_can_be_done(readings: Readings) -> None:
    """One row for each line of the tables of `kinds`, with a hash where there is a direction."""
    directed, alone = [], []
    for name, operation in kinds.OPERATIONS.items():
        (directed if operation.directed else alone).append(name)
    examples = {"label": "deduction", "number": "2"}
    named = {
        f"{name}({', '.join(examples[kind] for kind in d.takes)})" if d.takes else name: d
        for name, d in kinds.DIRECTIONS.items()
    }
    entries = [
        f"{operation}:{name}" if operation else name
        for name, d in named.items()
        for operation in ("", *directed)
        if not d.subspace or (operation and kinds.OPERATIONS[operation].subspace)
    ]
    readings = dataclasses.replace(readings, sections=lambda role: sections(readings, role))
    built = Interventions(readings, L, D, "all")
    for c in conditions.make(experiment(kinds=(*entries, *alone), magnitudes=(1.0,)), readings):
        assert len(built.row(c, KEY).terms) == 1
        assert bool(c.source) == parse(c.kind).read and bool(built.vector_hash(c, KEY)) == (c.kind not in alone)


def test_directions_are_made_of_what_was_read(readings: Readings) -> None:
    """Each by its definition, at the layer of the condition, from the source's activations."""
    readings = dataclasses.replace(readings, sections=lambda role: sections(readings, role))
    read = sections(readings, "base")
    v, w = (read.vectors[name].directions[1].astype(np.float64) for name in ("backtracking", "deduction"))
    means = read.sums.section_means[:, 1].astype(np.float64)
    own = means[read.sums.section_labels == 0]
    principal = np.linalg.svd(own - own.mean(0))[2]
    everything = np.linalg.svd(means - means.mean(0))[2]
    expected = {
        "own(deduction)": unit(w - v * (v @ w) / (v @ v)),
        "ordered(deduction)": unit(w - v * (v @ w) / (v @ v)),
        "ordered(backtracking)": unit(v),
        "pc(2)": principal[1],
        "ablate:labels(1)": unit(v)[None],
        "ablate:pcs(3)": everything[:3],
        "ablate:last-pcs(2)": everything[-2:],
    }
    built = Interventions(readings, L, D, "all")
    for c in conditions.make(experiment(kinds=tuple(expected), magnitudes=(1.0,), layer=(1,)), readings):
        if c.source != "base":
            continue
        one: Any = built.row(c, KEY).terms[0]
        found = np.asarray(one.vector[1][None] if isinstance(one, Add) else one.directions[1], np.float64)
        wanted = np.atleast_2d(expected[c.kind])
        np.testing.assert_allclose(found.T @ found, wanted.T @ wanted, atol=1e-5, err_msg=c.kind)


def test_several_edits_are_one_row(readings: Readings) -> None:
    """Each with its weight, operation and span; the gate and the norm are those of the row."""
    kind = "backtracking & 0.5 * ablate:deduction during generated[1:3] & 2 * noise when tokens so|Wait keeping norm"
    e = experiment(kinds=(kind, "backtracking when deduction > 0.25"), magnitudes=(4.0,))
    texts = (" wait", " hmm", " so", "x", "Wait ")
    built = Interventions(readings, L, D, "generated", lambda: texts)
    both, gated = (
        next(c for c in conditions.make(e, readings) if (c.kind, c.source, c.target) == (k, "base", "reasoning"))
        for k in e.steering.kinds
    )
    row: Any = built.row(both, KEY)
    found: dict[str, Any] = {type(term).__name__: term for term in row.terms}
    assert list(found) == ["Ablate", "Add", "Noise"]
    vector = readings.vector("base", "backtracking").unit(1)
    np.testing.assert_allclose(found["Add"].vector[1], 4 * vector, rtol=1e-5)
    np.testing.assert_allclose(found["Ablate"].strength, [0, 0.5, 0.5])
    np.testing.assert_allclose(found["Noise"].strength, [0, 8, 0])
    spans = {name: term.during[1].tolist() for name, term in found.items()}
    assert spans == {"Ablate": [-2, -4], "Add": [-1, np.iinfo(np.int32).max], "Noise": [-1, np.iinfo(np.int32).max]}
    np.testing.assert_array_equal(row.token_gate.tokens, [True, False, True, False, True])
    assert bool(row.keeps_norm) and row.component_gate is None
    row = built.row(gated, KEY)
    assert row.token_gate is None and row.keeps_norm is None
    np.testing.assert_allclose(row.component_gate.threshold, 0.25 * 11.0)
    np.testing.assert_allclose(row.component_gate.direction[1], readings.vector("base", "deduction").unit(1), rtol=1e-5)
    with pytest.raises(ValueError, match="no token of the vocabulary is 'never'"):
        conditions.token_set(["never"], texts)
    ends = [". ", "e.g", "!\n\n", "\n\n", "a"]
    assert conditions.token_set(["sentence-ends"], ends) == [0, 2]
    assert conditions.token_set(["paragraph-breaks"], ends) == [2, 3]


def test_a_new_term_takes_one_line_to_be_in_a_config(
    readings: Readings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As docs/howto says; with the strength that its line asks for."""
    code = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "howto" / "term.md").read_text(), re.DOTALL)
    (tmp_path / "cap_of_the_docs.py").write_text(code[0])
    monkeypatch.syspath_prepend(tmp_path)
    line = code[1].replace("backtrack_jax.intervention", "cap_of_the_docs")
    monkeypatch.setattr(kinds, "OPERATIONS", kinds.OPERATIONS | eval(f"{{{line}}}", {"Operation": kinds.Operation}))
    kinds.parse.cache_clear()
    e = experiment(kinds=("cap:backtracking - deduction",), magnitudes=(2.0,), unit="relative")
    assert not checks.kind_faults("steering.kinds", e.steering.kinds, LABELS)
    made = {c for c in conditions.make(e, readings) if c.target == "base"}
    assert {c.length for c in made} == {2 * 5.0}
    built = Interventions(readings, L, D, "all")
    for c in made:
        cap: Any = built.row(c, KEY).terms[0]
        np.testing.assert_allclose(cap.value, [0, 2 * 5.0, 0])
        parts = [readings.vector(c.source, kind).unit(1) for kind in ("backtracking", "deduction")]
        np.testing.assert_allclose(cap.direction[1], unit(parts[0] - parts[1]), rtol=1e-5)
    (fault,) = checks.kind_faults("steering.kinds", ("crp:backtracking",), LABELS)
    assert "ablate:..., clamp:..., " in fault and ", self-amplification, cap:..., " in fault


def test_needed_vectors() -> None:
    e = experiment(kinds=("deduction", *CONTROLS))
    assert conditions.needed_vectors(e) == {"deduction", "overall-mean", "shuffled"}
    assert conditions.needed_labels(e) == {"deduction"}
    e.steering.unit = "raw"  # lengths are measured by the experiment's own vector
    assert conditions.needed_vectors(e) == {"deduction", "overall-mean", "shuffled", "backtracking"}
    assert conditions.needed_vectors(experiment(kinds=("noise",), layers=(1,))) == {"backtracking"}
    e = experiment(kinds=("deduction - shuffled + a/b.npz",), baselines=("ablate:initializing + random",))
    assert conditions.needed_vectors(e) == {"deduction", "shuffled", "initializing"}
    assert conditions.needed_labels(e) == {"deduction", "initializing"}
    assert e.steering.vector_files == ("a/b.npz",)


def test_a_vector_that_was_not_read_is_named(readings: Readings) -> None:
    with pytest.raises(ValueError, match=r"no 'initializing' vector of the base model.*'backtracking', 'deduction'"):
        readings.vector("base", "initializing")
