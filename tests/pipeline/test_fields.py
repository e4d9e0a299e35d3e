"""Every field of a config: which stages' results depend on it, and that the work follows it.

Stages run with what samples and reads replaced by something that notes what it is given, so no model is compiled.
"""

import dataclasses
import json
import operator
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from runs import ROLES, STAGES

from backtrack_jax import conditions, extract, generate, pipeline, vectors
from backtrack_jax.config import Experiment
from backtrack_jax.data import records
from backtrack_jax.data.problems import spread
from backtrack_jax.files import store
from backtrack_jax.models import checkpoint
from backtrack_jax.stages import estimates
from backtrack_jax.stages.analysis import ANALYSIS
from backtrack_jax.stages.steering import STEERING, load_readings
from backtrack_jax.stages.traces import TRACES
from backtrack_jax.stages.vectors import VECTORS

KEYWORD = {"annotations.judge": "keyword", "steering.kinds": ("backtracking",)}
SAMPLED = KEYWORD | {"traces.path": "", "traces.problems": "problems.json", "traces.limit": 5}
OPENAI = {"annotations.judge": "openai"}

# Field -> what else is changed before it, its other value, and the first stage whose own inputs then differ.
CHANGES: dict[str, tuple[dict[str, Any], Any, str]] = {
    "name": ({}, "other", "6-report"),
    "seed": ({}, 7, "4-steering"),
    "roles": ({}, ("reasoning",), "3-vectors"),
    "tokenizer": ({}, "base", "3-vectors"),
    "prompt.format": ({}, "plain", "3-vectors"),
    "prompt.think": ({}, "none", "3-vectors"),
    "prompt.template_arguments": ({}, '{"enable_thinking": false}', "3-vectors"),
    "prompt.system": ({}, "Think.", "3-vectors"),
    "traces.path": (KEYWORD, "", "1-traces"),
    "traces.stand_in": (SAMPLED, tiny.CHAINS, "1-traces"),
    "traces.limit": ({}, 5, "1-traces"),
    "traces.end_marks": ({}, ("</reasoning>",), "1-traces"),
    "traces.problems": (SAMPLED, "", "1-traces"),
    "traces.samples": (SAMPLED, 2, "1-traces"),
    "traces.temperature": (SAMPLED, 0.3, "1-traces"),
    "traces.top_p": (SAMPLED, 0.9, "1-traces"),
    "traces.max_new_tokens": (SAMPLED, 7, "1-traces"),
    "annotations.judge": ({}, "keyword", "2-annotations"),
    "annotations.variant": (KEYWORD, "wait", "2-annotations"),
    "annotations.path": (
        {"annotations.judge": "import", "annotations.path": tiny.CHAINS},
        "problems.json",
        "2-annotations",
    ),
    "vectors.label": ({}, "deduction", "3-vectors"),
    "vectors.contrast": ({}, "rest", "3-vectors"),
    "vectors.estimator": ({}, "token_mean", "3-vectors"),
    "vectors.window": ({}, (-4, -3), "3-vectors"),
    "vectors.offsets": ({}, (-6, -1, 0), "3-vectors"),
    "vectors.offset_window": ({}, (-1, 1), "3-vectors"),
    "vectors.layers": ({}, (2,), "3-vectors"),
    "vectors.into_prompt": ({}, True, "3-vectors"),
    "vectors.batch_size": ({}, 2, "3-vectors"),  # sums over traces can only be resumed in the same batches
    "steering.kinds": ({}, ("backtracking", "noise"), "4-steering"),
    "steering.layer": ({}, (2,), "4-steering"),
    "steering.magnitudes": ({}, (0.0, 5.0), "4-steering"),
    "steering.baselines": ({}, ("random",), "4-steering"),
    "steering.baseline_magnitudes": ({}, (3.0,), "4-steering"),
    "steering.offsets": ({}, (0,), "4-steering"),
    "steering.layers": ({}, (2,), "4-steering"),
    "steering.grid_magnitudes": ({}, (6.0,), "4-steering"),
    "steering.grid_limit": ({}, 1, "4-steering"),
    "steering.unit": ({}, "relative", "4-steering"),
    "steering.span": ({}, "generated", "4-steering"),
    "steering.limit": ({}, 4, "4-steering"),
    "steering.samples": ({}, 1, "4-steering"),
    "steering.temperature": ({}, 0.3, "4-steering"),
    "steering.top_p": ({}, 0.9, "4-steering"),
    "steering.top_k": ({}, 5, "4-steering"),
    "steering.max_new_tokens": ({}, 7, "4-steering"),
    "analysis.judge": ({}, "grammar", "5-analysis"),
    "analysis.keywords": ({}, ("so",), "5-analysis"),
    "analysis.horizons": ({}, (2, 5), "5-analysis"),
    "analysis.positions": ({}, 9, "5-analysis"),
    "analysis.folds": ({}, 3, "5-analysis"),
    "analysis.shown": ({}, 2, "5-analysis"),
    "analysis.forced_texts": ({}, 2, "5-analysis"),
    "analysis.forced_sentences": ({}, 1, "5-analysis"),
    "analysis.examples": ({}, 1, "5-analysis"),
}
CHANGES |= {
    f"{role}.{field}": ({}, value, "3-vectors")
    for role, other in (("base", "reasoning"), ("reasoning", "base"))
    for field, value in (
        *(("path", other), ("revision", "abc"), ("dtype", "bfloat16")),
        *(("markers", "replace"), ("marker_replacement", " so")),
    )
}
CHANGES |= {
    f"annotations.openai.{field}": (OPENAI, value, "2-annotations")
    for field, value in {
        **{"model": "m", "format": "inline", "backtracking": "change", "response_format": "none", "votes": 3},
        **{"reask": 1, "temperature": 0.5, "seed": 4, "max_tokens": 99, "extra_body": '{"a": 1}'},
    }.items()
}
WITHOUT = {  # fields on which no result depends, with the reason
    **{"workdir": "where results go", "data_parallel": "how work is divided", "model_parallel": "how work is divided"},
    **dict.fromkeys(("traces.batch_size", "steering.batch_size", "analysis.batch_size"), "how work is divided"),
    **{f"annotations.openai.{name}": "where the judge is asked" for name in ("base_url", "key_variable", "ledger")},
    **{
        f"annotations.openai.{name}": "how fast and at what cost the judge is asked"
        for name in (
            *("concurrency", "request_timeout", "call_timeout", "run_timeout", "max_retries", "backoff", "max_backoff"),
            *("input_price", "cached_price", "output_price", "max_cost"),
        )
    },
    "annotations.openai.allow_unanswered": "where labels have gaps alone, see tests/judges/test_label_stage.py",
}


def names_of(spec: Any, prefix: str = "") -> Iterator[str]:
    for field in dataclasses.fields(spec):
        value, name = getattr(spec, field.name), prefix + field.name
        yield from names_of(value, f"{name}.") if dataclasses.is_dataclass(value) else [name]


def experiment(**fields: Any) -> Experiment:
    """The tiny experiment with other values of some fields, by their dotted names."""
    e = tiny.get_config()
    for name, value in fields.items():
        holder, _, last = name.rpartition(".")
        setattr(operator.attrgetter(holder)(e) if holder else e, last, value)
    return e


def test_every_field_is_in_one_of_the_lists() -> None:
    names = [name for name in names_of(Experiment()) if not name.startswith("questions.")]  # below
    assert sorted([*CHANGES, *WITHOUT]) == sorted(names)


def test_every_field_of_a_question_changes_what_depends_on_it_where_it_is_asked(with_problems: Path) -> None:
    plain = own_inputs(experiment())
    for question in Experiment().questions.known:
        asked = {"questions.ask": (question,)}
        assert own_inputs(experiment(**asked)) != plain, question
        for field in names_of(getattr(Experiment().questions, question), f"questions.{question}."):
            value = other_value(operator.attrgetter(field)(experiment()))
            assert own_inputs(experiment(**{field: value})) == plain, field
            assert own_inputs(experiment(**asked, **{field: value})) != own_inputs(experiment(**asked)), field


@pytest.fixture
def with_problems(finished: Path) -> Path:
    problems = [{"id": f"p{i}", "category": "c" * (1 + i % 2), "problem": f"Add {i} and two."} for i in range(7)]
    Path("problems.json").write_text(json.dumps(problems))
    return finished


def own_inputs(e: Experiment) -> dict[str, str]:
    e = e.for_vectors()
    return {stage.name: store.fingerprint(stage.inputs(e)) for stage in pipeline.STAGES}


def test_a_field_changes_the_inputs_of_its_stage_and_of_none_before(with_problems: Path) -> None:
    for name, (others, value, stage) in CHANGES.items():
        before, after = (own_inputs(experiment(**fields)) for fields in (others, others | {name: value}))
        changed = [stage for stage in STAGES if before[stage] != after[stage]]
        assert changed and changed[0] == stage, name


def other_value(value: Any) -> Any:
    if isinstance(value, tuple):
        return (*value, other_value(value[-1])) if value else ("x",)
    return not value if isinstance(value, bool) else value + 1 if isinstance(value, int | float) else f"{value}x"


def test_fields_on_which_nothing_depends_change_no_inputs(with_problems: Path) -> None:
    for others in ({}, SAMPLED, OPENAI):
        e = experiment(**others)
        for name in WITHOUT:
            changed = experiment(**(others | {name: other_value(operator.attrgetter(name)(e))}))
            assert own_inputs(changed) == own_inputs(e), name


class Sampled:
    """What `generate.generate_rows` was given, in place of sampling; its replies are the numbers of the rows."""

    def __init__(self) -> None:
        self.rows: list[generate.Row] = []
        self.given: list[dict[str, Any]] = []

    def __call__(self, model: Any, rows: list[generate.Row], **given: Any) -> Iterator[list[Any]]:
        self.rows += rows
        self.given.append({"model": model, **{name: value for name, value in given.items() if name != "done"}})
        stop = given["stop_ids"][0]
        made = [generate.Completion((65 + number % 26, stop), "stop") for number in range(len(rows))]
        return iter([list(enumerate(made))])

    def digest(self) -> str:
        """Of everything that was given."""
        rows = [
            (row.prompt, jax.random.key_data(row.key), *map(_plain, jax.tree.leaves(row.intervention)))
            for row in self.rows
        ]
        return repr([np.array2string(np.asarray(x), threshold=10**9) for row in rows for x in row] + self.given)


def _plain(leaf: Any) -> np.ndarray:
    return np.asarray(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> Sampled:
    found = Sampled()
    monkeypatch.setattr(generate, "generate_rows", found)
    monkeypatch.setattr(checkpoint, "load", lambda path, revision, dtype, mesh: (path, revision, dtype, mesh))
    return found


def steered(folder: Path, sampled: Sampled, fields: dict[str, Any]) -> tuple[str, pipeline.Run]:
    """Stage 4 with few conditions, without sampling."""
    few = {"steering.kinds": ("backtracking",), "steering.baselines": ("noise",), "steering.grid_limit": 2}
    few |= {"steering.offsets": (-1,), "steering.layers": (0,), "steering.magnitudes": (0.0, 8.0)}
    made = pipeline.Run(experiment(**(few | fields)))
    folder.mkdir()
    STEERING.run(made.context, folder)
    found = sampled.digest()
    sampled.given.clear()
    return found, made


def test_every_field_of_the_sweep_changes_what_is_sampled(finished: Path, tmp_path: Path, sampled: Sampled) -> None:
    plain, _ = steered(tmp_path / "plain", sampled, {})
    fields = {name: value for name, (_, value, _) in CHANGES.items() if name.startswith("steering.")}
    fields |= {"seed": 7, "steering.batch_size": 5, "reasoning.revision": "abc", "base.dtype": "float16"}
    for name, value in fields.items():
        sampled.rows.clear()
        assert steered(tmp_path / name, sampled, {name: value})[0] != plain, name


def test_rows_are_those_of_the_conditions(finished: Path, tmp_path: Path, sampled: Sampled) -> None:
    """Prompt, key and intervention of every reply by another loop; under a unit that the models differ in."""
    _, made = steered(
        tmp_path / "4",
        sampled,
        {"seed": 5, "steering.unit": "relative", "steering.span": "generated", "steering.limit": 4},
    )
    e, context = made.experiment, made.context
    traces = TRACES.read(context.folder(TRACES))
    readings = load_readings(context)
    replies = STEERING.read(tmp_path / "4")
    assert len(replies) == len(sampled.rows)
    expected = []
    for role in ROLES:
        built = conditions.Interventions(readings, 3, 16, e.steering.span)
        for condition, limit in conditions.make(e, readings).items():
            if condition.target == role:
                for trace in spread(spread(traces, 4), limit):
                    for sample in range(2):
                        key = generate.row_key(5, trace.problem_id, sample)
                        expected.append((condition, trace, sample, context.prompt_ids(role, trace.problem), key, built))
    assert len({trace.problem_id for _, trace, *_ in expected}) == 4
    for row, reply, (condition, trace, sample, prompt, key, built) in zip(sampled.rows, replies, expected, strict=True):
        assert (reply.condition, reply.problem_id, reply.sample) == (condition, trace.problem_id, sample)
        assert (reply.category, reply.problem, reply.seed) == (trace.category, trace.problem, 5)
        assert (reply.model, reply.unit, reply.span) == (condition.target, "relative", "generated")
        assert list(row.prompt) == prompt
        for leaf, other in zip(
            jax.tree.leaves((row.key, row.intervention)), jax.tree.leaves((key, built.row(condition, key))), strict=True
        ):
            np.testing.assert_array_equal(_plain(leaf), _plain(other))
        assert reply.vector_hash == built.vector_hash(condition, key)
        assert len(reply.text) == 1  # without its stop token
    lengths = {
        reply.condition.target: reply.condition.length / 8
        for reply in replies
        if reply.condition.magnitude == 8 and reply.condition.layer == 1
    }
    summary = VECTORS.read_summary(context.folder(VECTORS))
    assert lengths == {role: pytest.approx(summary[role]["mean_norm"][1]) for role in ROLES}


def traced(folder: Path, sampled: Sampled, fields: dict[str, Any]) -> tuple[str, list[records.Trace], pipeline.Run]:
    """Stage 1 without sampling."""
    made = pipeline.Run(experiment(**(SAMPLED | {"traces.samples": 2} | fields)), ("1-traces",))
    folder.mkdir()
    sampled.rows.clear()
    sampled.given.clear()
    TRACES.run(made.context, folder)
    return sampled.digest(), TRACES.read(folder), made


def test_every_field_of_traces_changes_what_is_sampled(with_problems: Path, tmp_path: Path, sampled: Sampled) -> None:
    plain, traces, made = traced(tmp_path / "plain", sampled, {})
    assert [(t.problem_id, t.category, t.sample, t.id) for t in traces] == [
        (f"p{i}", "c" * (1 + i % 2), sample, f"p{i}/{sample}") for i in (0, 2, 3, 4, 6) for sample in range(2)
    ]
    for row, trace in zip(sampled.rows, traces, strict=True):
        assert list(row.prompt) == made.context.prompt_ids("reasoning", trace.problem) and not row.intervention.terms
        key = generate.row_key(made.experiment.seed, trace.problem_id, trace.sample)
        np.testing.assert_array_equal(_plain(row.key), _plain(key))
    fields = {
        name: value for name, (others, value, _) in CHANGES.items() if name.startswith("traces.") and others is SAMPLED
    }
    del fields["traces.stand_in"]  # for later stages
    fields |= {"seed": 7, "traces.samples": 3, "traces.limit": 4, "traces.batch_size": 5, "prompt.system": "Think."}
    fields |= {"prompt.think": "none", "reasoning.dtype": "bfloat16", "roles": ("base",)}
    for name, value in fields.items():
        assert traced(tmp_path / name, sampled, {name: value})[0] != plain, name


class Summed:
    """What `extract.add_traces` was given, in place of reading a model: it gives sums at random, other ones a call."""

    def __init__(self) -> None:
        self.given: list[tuple[Any, ...]] = []

    def __call__(
        self, total: extract.WindowSums, model: Any, traces: list[extract.TokenTrace], *, batch_size: int
    ) -> Iterator[list[str]]:
        self.given.append((model.path, total.plan, traces, batch_size))
        rng = np.random.default_rng(len(self.given))
        total.sums += rng.standard_normal(total.sums.shape)
        total.counts += rng.integers(3, 50, total.counts.shape)
        total.read += rng.integers(10, 60, total.read.shape)
        total.dropped += rng.integers(60, 99, total.dropped.shape)
        total.norm_sum += rng.random(total.norm_sum.shape) * 50
        total.n_tokens += 7
        total.trace_ids += [trace.id for trace in traces]
        yield list(total.trace_ids)


class Model:
    """What stage 3 asks of a model besides reading it."""

    def __init__(self, path: str, **options: Any) -> None:
        self.path = (path, options)
        self.config = checkpoint.read_config(Path(path))


@pytest.fixture
def summed(monkeypatch: pytest.MonkeyPatch) -> Summed:
    found = Summed()
    monkeypatch.setattr(extract, "add_traces", found)
    monkeypatch.setattr(checkpoint, "load", Model)
    return found


def read_vectors(folder: Path, summed: Summed, fields: dict[str, Any]) -> pipeline.Run:
    """Stage 3 without reading."""
    made = pipeline.Run(experiment(**fields))
    folder.mkdir()
    summed.given.clear()
    VECTORS.run(made.context, folder)
    return made


def test_every_field_of_vectors_changes_what_is_read_or_written(finished: Path, tmp_path: Path, summed: Summed) -> None:
    def done(name: str, fields: dict[str, Any]) -> str:
        made = read_vectors(tmp_path / name, summed, fields)
        found = [
            VECTORS.load(tmp_path / name, role, made.experiment.vectors.label).directions.tolist() for role in ROLES
        ]
        return repr([found, summed.given])

    plain = done("plain", {})
    fields = {name: value for name, (_, value, _) in CHANGES.items() if name.startswith("vectors.")}
    for name, value in (
        fields | {"base.markers": "keep", "prompt.think": "none", "reasoning.dtype": "bfloat16"}
    ).items():
        more = {"steering.offsets": ()} if name == "vectors.offsets" else {}
        assert done(name, {name: value} | more) != plain, name


@pytest.mark.parametrize(("estimator", "contrast"), [("token_mean", "rest"), ("trace_mean", "trace")])
def test_vectors_and_summary_are_those_of_the_sums(
    finished: Path, monkeypatch: pytest.MonkeyPatch, summed: Summed, estimator: str, contrast: str
) -> None:
    """Every vector, those of offsets too, of sums in which no two numbers are alike; each of its own model."""
    folder = finished / "3-vectors"
    folder.rename(finished / "before")
    fields = {"vectors.estimator": estimator, "vectors.contrast": contrast, "vectors.offset_window": (-1, 1)}
    made = read_vectors(folder, summed, fields)
    summary = VECTORS.read_summary(folder)
    assert [path for (path, _), *_ in summed.given] == list(ROLES)
    labels = summary["labels"]
    at = extract.ESTIMATORS.index(estimator)
    for role, (_, plan, traces, batch_size) in zip(ROLES, summed.given, strict=True):
        assert batch_size == 4 and [window for window in plan.windows] == [(-5, -2), (-7, -5), (-2, 0), (-1, 1), (0, 2)]
        assert plan.groups["rest"] == tuple(name for name in labels if name != "backtracking")
        assert sum(label == "shuffled" for trace in traces for label, _ in trace.starts) == 18
        sums = VECTORS.read_sums(folder, role)

        def mean(group: str, window: int, sums: extract.WindowSums = sums) -> np.ndarray:
            g = list(sums.plan.groups).index(group)
            return sums.sums[at, :, g, window] / sums.counts[at, g, window]

        for label in (*labels, "shuffled"):
            other = contrast if label == "backtracking" else "all"
            found = VECTORS.load(folder, role, label)
            np.testing.assert_allclose(found.directions, mean(label, 0) - mean(other, 0), rtol=1e-5, atol=1e-6)
            assert found.provenance["role"] == role and found.provenance["contrast"] == other
        np.testing.assert_allclose(VECTORS.load(folder, role, "overall-mean").directions, mean("all", 0), rtol=1e-5)
        for g, label in enumerate(sums.plan.groups):
            counts = {"read": sums.read[g, 0], "dropped": sums.dropped[g, 0]}
            assert summary[role]["windows"][label] == counts
        np.testing.assert_allclose(summary[role]["mean_norm"], sums.norm_sum / sums.n_tokens)
        if role == "reasoning":
            offsets = load_readings(made.context).offsets
            assert sorted(offsets) == [("reasoning", "-1..1"), ("reasoning", "-2..0")]
            for window, number in (("-2..0", 2), ("-1..1", 3)):
                expected = mean("backtracking", number) - mean(contrast, number)
                np.testing.assert_allclose(offsets[role, window].directions, expected, rtol=1e-5, atol=1e-6)
    both = [VECTORS.load(folder, role, "backtracking") for role in ROLES]
    np.testing.assert_allclose(summary["cosine"], vectors.cosine(*both))
    readings = load_readings(made.context)
    for role in ROLES:
        np.testing.assert_allclose(readings.mean_norm[role], summary[role]["mean_norm"])


def test_estimates_count_every_sample_and_the_system_text(with_problems: Path) -> None:
    sampled = SAMPLED | {"traces.samples": 3, "traces.max_new_tokens": 50, "prompt.system": "X" * 40}
    expected = [16 + (40 + len(f"Add {i} and two.")) // 4 + 50 for i in (0, 2, 3, 4, 6) for _ in range(3)]
    assert estimates.trace_lengths(experiment(**sampled)) == expected


def test_what_the_judge_of_replies_depends_on_reaches_all_that_reads_its_labels(finished: Path) -> None:
    found = []
    for votes in (1, 3):
        made = pipeline.Run(experiment(**{"analysis.judge": "openai", "annotations.openai.votes": votes}))
        found.append(ANALYSIS._fingerprints(made.context))
    assert {name for name, own in found[0].items() if found[1][name] != own} == {"judged", "rates", "agreement"}
