"""The stages on disk: artifacts that agree with each other, and runs that go on, after any death, to the same bytes."""

import csv
import dataclasses
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file
from sklearn import metrics

from backtrack_jax import conditions, extract, generate, pipeline, vectors
from backtrack_jax.analysis import activations, probe, similarity
from backtrack_jax.config import UNITS, Experiment
from backtrack_jax.data import records
from backtrack_jax.files import store
from backtrack_jax.models import checkpoint, prompts
from backtrack_jax.models.tokenizer import Tokenizer
from backtrack_jax.stages import analysis as stage_analysis
from backtrack_jax.stages import steering
from backtrack_jax.stages import vectors as stage_vectors
from backtrack_jax.stages.base import Context

TINY = Path(tiny.__file__)
STAGES = tuple(stage.name for stage in pipeline.STAGES)
ROLES = ("base", "reasoning")
CELL = ("target", "kind", "source", "layer", "window", "magnitude")
TABLES = ("replies", "rates", "effects", "similarity", "label_cosines", "reliability", "windows", "agreement")
PER_MODEL = ("lens.csv", "lens_tokens.csv", "probe.csv", "projections.json")
FIGURES = ("fig1_trace", "fig2_offsets", "fig3_pairs", "cosine_by_layer", "fig4_baselines", "fig5_logit_lens")
FIGURES += ("probe", "figB1_layers", "metrics", "effects", "label_cosines", "reliability", "fig6_projection")
READ = ("adding-knowledge", "backtracking", "deduction", "uncertainty-estimation")  # `initializing` starts the reply


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]]


def contents(results: Path) -> dict[str, bytes]:
    """All artifacts by name. run.json is left out: the revision in it changes while one works on the source."""
    files = (path for path in results.rglob("*") if path.is_file() and path.name not in ("run.json", ".lock"))
    return {str(path.relative_to(results)): path.read_bytes() for path in files}


def run(e: Experiment, *stages: str) -> pipeline.Run:
    made = pipeline.Run(e, pipeline.stage_names(stages))
    made.run()
    return made


def done(made: pipeline.Run) -> list[str]:
    """Names of the stages that are complete."""
    return [stage.name for stage in made.stages if made.done(stage)]


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the models that were loaded since: no model, no model work."""
    names: list[str] = []
    load = checkpoint.load

    def counting(path: str, **kwargs: Any) -> Any:
        names.append(path)
        return load(path, **kwargs)

    monkeypatch.setattr(checkpoint, "load", counting)
    return names


# What a finished run holds


def test_the_artifacts_are_these(tiny_run: Path) -> None:
    """And nothing else: no partial and no temporary file."""
    files = [
        f"3-vectors/{role}.{kind}.safetensors" for role in ROLES for kind in (*READ, "overall-mean", "shuffled", "sums")
    ]
    stages = ["1-traces", "2-annotations", "3-vectors", "4-steering", "5-analysis", "6-report"]
    expected = [
        *(f"{stage}/{name}" for stage in stages for name in ("DONE", "inputs.json")),
        *("1-traces/traces.jsonl", "1-traces/labelled.jsonl", "2-annotations/annotations.jsonl"),
        *("2-annotations/summary.txt", "3-vectors/summary.json", *files, "4-steering/generations.jsonl"),
        *(f"5-analysis/{name}.csv" for name in TABLES),
        *(f"5-analysis/{role}.{name}" for role in ROLES for name in PER_MODEL),
        *(f"6-report/{name}.{suffix}" for name in FIGURES for suffix in ("csv", "pdf", "png")),
        *("6-report/summary.md", "6-report/report.html", "6-report/.stale.js"),
    ]
    assert sorted(contents(tiny_run / "results" / "tiny")) == sorted(expected)
    assert (tiny_run / "results" / "tiny").stat().st_nlink == 2 + len(stages)  # no other folder


def test_traces_and_annotations_are_those_of_the_file(tiny_run: Path) -> None:
    results = tiny_run / "results" / "tiny"
    traces = records.read_traces(results / "1-traces" / "traces.jsonl")
    assert [(t.problem_id, t.problem, t.text) for t in traces] == [
        (chain["task_id"], chain["problem"], chain["reasoning_chain"]) for chain in tiny.chains()
    ]
    annotated = records.read_annotations(results / "2-annotations" / "annotations.jsonl")
    for trace, annotation, chain in zip(traces, annotated, tiny.chains(), strict=True):
        written = re.findall(r'\["([\w-]+)"\](.*?)\["end-section"\]', chain["annotated_chain"])
        placed = [(section.label, trace.text[section.start : section.stop]) for section in annotation.sections]
        assert placed == [pair for pair in written if pair[1] in trace.text]
    rejected = [(a.trace_id, r.reason) for a in annotated for r in a.rejected]
    assert rejected == [("verbal_2/0", "not_found")]
    assert "not_found" in (results / "2-annotations" / "summary.txt").read_text()


@pytest.mark.parametrize(("markers", "replacement"), [("keep", -1), ("drop", -1), ("replace", ord("#"))])
def test_both_models_read_the_same_words(fresh: Path, markers: str, replacement: int) -> None:
    """T10: whatever stands in the place of R1's markers, a section starts at the same word, after the same words."""
    e = tiny.get_config()
    e.base.markers, e.base.marker_replacement = markers, replacement
    made = run(e, "1", "2")
    traces = records.read_traces(fresh / "1-traces" / "traces.jsonl")
    annotated = records.read_annotations(fresh / "2-annotations" / "annotations.jsonl")
    marks = set(prompts.r1_markers(made.context.tokenizer))
    for trace, annotation in records.pair_annotations(traces, annotated):
        base, reasoning = (made.context.token_trace(role, trace, annotation) for role in ROLES)
        assert len(base.starts) == len(reasoning.starts) == len(annotation.sections)
        assert base.ids[0] == reasoning.ids[0] == made.context.tokenizer.bos_id
        assert markers == "keep" or not marks.intersection(base.ids)
        for section, (label, b), (_, r) in zip(annotation.sections, base.starts, reasoning.starts, strict=True):
            assert label == section.label
            assert made.context.tokenizer.decode(base.ids[b : b + 2]).startswith(trace.text[section.start])
            if not marks.intersection(reasoning.ids[r - 5 : r + 1]):
                assert list(base.ids[b - 5 : b + 1]) == list(reasoning.ids[r - 5 : r + 1])
        for read in (base, reasoning):  # the reply, with or without its own <think>
            text = made.context.tokenizer.decode(read.ids[read.reply_start :], skip_markers=True).lstrip("#\n")
            assert trace.text.removeprefix("<think>").lstrip().startswith(text[:9])


def test_vectors_and_their_summary_agree(tiny_run: Path) -> None:
    folder = tiny_run / "results" / "tiny" / "3-vectors"
    summary = json.loads((folder / "summary.json").read_text())
    found = {role: load_file(folder / f"{role}.backtracking.safetensors") for role in ROLES}
    for layer in range(3):
        a, b = (found[role][f"direction.{layer}"].astype(np.float64) for role in ROLES)
        assert summary["cosine"][layer] == pytest.approx(a @ b / np.sqrt((a @ a) * (b @ b)), rel=1e-12)
        assert abs(summary["cosine"][layer]) < 0.99  # the models differ
    for role in ROLES:
        windows = summary[role]["windows"]
        labels = Counter(s.label for a in annotations(tiny_run) for s in a.sections)
        for label, count in labels.items():
            assert windows[label]["read"] + windows[label]["dropped"] == count
        assert windows["all"]["read"] == sum(windows[label]["read"] for label in labels)
        assert windows["rest"]["read"] == windows["all"]["read"] - windows["backtracking"]["read"]
        # Too near the start of the reply: the first section of every trace, which in one is a backtracking one.
        assert windows["backtracking"]["dropped"] == 1
        assert windows["initializing"]["read"] == 0


def annotations(tiny_run: Path) -> list[records.Annotation]:
    return records.read_annotations(tiny_run / "results" / "tiny" / "2-annotations" / "annotations.jsonl")


def test_a_vector_says_where_it_comes_from(tiny_run: Path) -> None:
    from safetensors import safe_open

    folder = tiny_run / "results" / "tiny" / "3-vectors"
    with safe_open(folder / "base.backtracking.safetensors", "np") as file:
        metadata = file.metadata()
        norms = [float(np.linalg.norm(file.get_tensor(f"direction.{layer}"))) for layer in range(3)]
    provenance = json.loads(metadata["provenance"])
    assert (provenance["role"], provenance["model"], provenance["window"]) == ("base", "base", [-5, -2])
    assert (provenance["label"], provenance["contrast"], provenance["estimator"]) == (
        "backtracking",
        "all",
        "trace_mean",
    )
    assert provenance["inputs"] == (folder / "DONE").read_text().split()[0]
    assert provenance["counts"]["backtracking"] == {"windows": 17, "dropped": 1}
    assert json.loads(metadata["raw_norms"]) == pytest.approx(norms)
    assert not any(abs(norm - 1) < 1e-3 for norm in norms)  # as found, not normalised


def test_generations_are_conditions_times_problems_times_samples(tiny_run: Path) -> None:
    e = tiny.get_config()
    rows = lines_of(tiny_run / "results" / "tiny" / "4-steering" / "generations.jsonl")
    names = ["problem_id", "category", "problem", "sample", "model", "target", "kind", "source", "layer", "window"]
    names += ["magnitude", "length", "unit", "span", "vector_hash", "seed", "ids", "text", "finish_reason"]
    assert all(list(row) == names for row in rows)
    cells = Counter(
        records.Condition(**{f.name: row[f.name] for f in dataclasses.fields(records.Condition)}) for row in rows
    )
    planned = conditions.planned(e)
    assert {cell: 2 * limit for cell, limit in planned.items()} == cells
    assert len(cells) == 46 and Counter(planned.values()) == {3: 40, 2: 6}
    assert len({json.dumps({**row, "ids": 0, "text": 0, "finish_reason": 0}) for row in rows}) == len(rows) == 264
    problems = {chain["task_id"]: chain["problem"] for chain in tiny.chains()}
    assert {row["problem_id"] for row in rows} == {tiny.TASKS[0], tiny.TASKS[6], tiny.TASKS[11]}  # evenly spread
    for row in rows:
        assert row["problem"] == problems[row["problem_id"]]
        assert row["model"] == row["target"]  # the tiny models' folders are named like their roles
        assert (row["unit"], row["span"], row["seed"]) == ("absolute", "all", 0)
        assert row["layer"] == 1 or (row["kind"], row["target"]) == ("backtracking", "reasoning")
        assert bool(row["window"]) == bool(row["source"])
        assert row["length"] == row["magnitude"]


def test_texts_ids_and_finish_reasons_agree(tiny_run: Path) -> None:
    tokenizer = Tokenizer.load(tiny_run / "reasoning")
    (stop,) = tokenizer.stop_ids
    rows = lines_of(tiny_run / "results" / "tiny" / "4-steering" / "generations.jsonl")
    for row in rows:
        stopped = row["finish_reason"] == "stop"
        assert [i == stop for i in row["ids"]] == [False] * (len(row["ids"]) - stopped) + [True] * stopped
        assert stopped or len(row["ids"]) == 8
        assert row["text"] == tokenizer.decode(row["ids"][: len(row["ids"]) - stopped])
    assert {row["finish_reason"] for row in rows} == {"stop", "length"}
    assert len({row["text"] for row in rows}) > 150


def test_a_row_names_the_very_vector_that_was_added(tiny_run: Path) -> None:
    folder = tiny_run / "results" / "tiny"
    offsets = {}
    for row in lines_of(folder / "4-steering" / "generations.jsonl"):
        file = folder / "3-vectors" / f"{row['source']}.{row['kind']}.safetensors"
        if row["window"] not in ("", "-5..-2"):
            offsets[row["window"]] = row["vector_hash"]
        elif file.exists():
            tensor = load_file(file)[f"direction.{row['layer']}"]
            assert row["vector_hash"] == hashlib.sha256(tensor.tobytes()).hexdigest()[:16]
        else:
            assert row["kind"] in ("unsteered", "noise", "self-amplification", "random")
            assert bool(row["vector_hash"]) == (row["kind"] == "random")
    sums = extract.load_sums(folder / "3-vectors" / "reasoning.sums.safetensors")
    assert sorted(offsets) == ["-1..-1", "0..0"]
    for window, found in offsets.items():
        offset = int(window.split("..")[0])
        groups, w = list(sums.plan.groups), sums.plan.windows.index((offset, offset))
        means = [
            sums.sums[0, 1, g, w] / sums.counts[0, g, w] for g in (groups.index("backtracking"), groups.index("all"))
        ]
        difference = (means[0] - means[1]).astype(np.float32)
        assert found == hashlib.sha256(difference.tobytes()).hexdigest()[:16]


def test_sweeps_compile_once(fresh: Path) -> None:
    """Layers, offsets, kinds and magnitudes are values: one shape of prompts, one program for both models."""
    run(tiny.get_config(), "1", "2", "3")
    program: Any = generate.compiled_generate
    program.clear_cache()
    run(tiny.get_config(), "4")
    assert program._cache_size() == 1


def test_the_shuffled_vector_reads_as_many_sections_of_any_label(fresh: Path) -> None:
    made = run(tiny.get_config(), "1", "2")
    annotated = records.read_annotations(fresh / "2-annotations" / "annotations.jsonl")
    drawn = stage_vectors._drawn_sections(annotated, "backtracking")
    labels = Counter(a.sections[i].label for a, numbers in zip(annotated, drawn, strict=True) for i in numbers)
    assert sum(labels.values()) == 18 and len(labels) >= 4
    assert drawn == stage_vectors._drawn_sections(annotated, "backtracking")
    traces = records.read_traces(fresh / "1-traces" / "traces.jsonl")
    for trace, annotation, numbers in zip(traces, annotated, drawn, strict=True):
        starts = made.context.token_trace("base", trace, annotation, numbers).starts
        own = [at for label, at in starts if label != "shuffled"]
        assert [at for label, at in starts if label == "shuffled"] == [own[i] for i in sorted(numbers)]


def test_conditions_share_their_random_numbers_and_differ_by_what_is_added(tiny_run: Path) -> None:
    texts: dict[tuple[str, str, int], dict[tuple, str]] = {}
    for row in lines_of(tiny_run / "results" / "tiny" / "4-steering" / "generations.jsonl"):
        cell = (row["kind"], row["source"], row["layer"], row["window"], row["magnitude"])
        texts.setdefault((row["target"], row["problem_id"], row["sample"]), {})[cell] = row["text"]
    for by_cell in texts.values():
        unsteered = by_cell.pop(("unsteered", "", 1, "", 0.0))
        assert sum(text != unsteered for text in by_cell.values()) > len(by_cell) // 2


def test_rates_follow_from_the_generations(tiny_run: Path) -> None:
    """Eq. 1 written once more: the tiny models say few words beside those of the list."""
    results = tiny_run / "results" / "tiny"
    words: dict[tuple[str, ...], list[str]] = {}
    for row in lines_of(results / "4-steering" / "generations.jsonl"):
        cell = tuple(str(row[name]) for name in CELL)
        words.setdefault(cell, []).extend(re.findall(r"[^\W_]+", row["text"].lower()))
    with (results / "5-analysis" / "rates.csv").open(newline="") as file:
        rates = list(csv.DictReader(file))
    assert [tuple(r[name] for name in CELL) for r in rates] == list(words)
    for rate, said in zip(rates, words.values(), strict=True):
        hits = said.count("wait") + said.count("hmm")
        assert (int(rate["n_words"]), int(rate["n_hits"])) == (len(said), hits)
        assert float(rate["rate"]) == pytest.approx(hits / len(said) if said else 0.0)
        assert (rate["n_replies"], rate["n_problems"]) in (("6", "3"), ("4", "2"))
        assert float(rate["low"]) <= float(rate["rate"]) <= float(rate["high"])
    assert len({rate["rate"] for rate in rates}) > 10


@pytest.mark.parametrize(
    ("source", "estimator"), [(role, "trace_mean") for role in ROLES] + [("reasoning", "token_mean")]
)
def test_the_direction_is_scored_on_problems_that_it_was_not_read_from(
    finished: Path, source: str, estimator: str
) -> None:
    """T30, from the chains on: each fold's direction is read anew from the other folds' chains alone."""
    wanted = tiny.get_config()
    wanted.vectors.estimator = estimator
    if estimator != tiny.get_config().vectors.estimator:
        run(wanted, "vectors", "steering", "analysis")
    made = pipeline.Run(wanted)
    e, layer = made.experiment, made.experiment.steering.main_layer
    traces = records.read_traces(finished / "1-traces" / "traces.jsonl")
    pairs = records.pair_annotations(traces, annotations(finished.parents[1]))
    sums = extract.load_sums(finished / "3-vectors" / f"{source}.sums.safetensors")
    if source == "reasoning":  # else a mistaken order would not be seen
        assert sums.trace_ids != [trace.id for trace, _ in pairs]
    fold = probe.folds([trace.problem_id for trace, _ in pairs], e.analysis.folds, e.seed)
    tokens = {role: [made.context.token_trace(role, *pair) for pair in pairs] for role in ROLES}
    rng = np.random.default_rng(e.seed)
    replies = [np.arange(trace.reply_start, len(trace.ids)) for trace in tokens["reasoning"]]
    at = [np.sort(rng.choice(reply, min(e.analysis.positions, len(reply)), replace=False)) for reply in replies]
    batches = activations.read(made.context.model("reasoning"), tokens["reasoning"], at, [layer], batch_size=len(pairs))
    states = dict(pair for batch in batches for pair in batch)
    scores, soon = [], []
    for held_out in range(e.analysis.folds):
        inside, outside = (np.flatnonzero(mask).tolist() for mask in (fold == held_out, fold != held_out))
        others = [tokens[source][i] for i in outside]
        read = extract.window_sums(made.context.model(source), others, sums.plan, batch_size=3)
        positive, contrast = (read.mean(group, e.vectors.window, estimator)[layer] for group in ("backtracking", "all"))
        v = positive - contrast
        centre = np.concatenate([states[i] for i in outside])[:, 0].mean(0)
        for i in inside:
            starts = [s for label, s in tokens["reasoning"][i].starts if label == "backtracking"]
            scores += ((states[i][:, 0] - centre) @ v / np.linalg.norm(v)).tolist()
            soon += [any(1 <= s - t <= e.analysis.horizons[0] for s in starts) for t in at[i]]
    with (finished / "5-analysis" / "reasoning.probe.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["method"] == f"{source}-derived direction"]
    (row,) = (r for r in rows if (int(r["layer"]), int(r["horizon"])) == (layer, e.analysis.horizons[0]))
    assert float(row["auc"]) == pytest.approx(metrics.roc_auc_score(soon, scores), abs=1e-4)
    assert float(row["average_precision"]) == pytest.approx(metrics.average_precision_score(soon, scores), abs=1e-3)


@pytest.mark.parametrize("estimator", extract.ESTIMATORS)
def test_halves_are_weighted_like_the_vectors(finished: Path, estimator: str) -> None:
    """Split-half reliability is that of the run's vectors: under token_mean a trace counts by its positions."""
    e = tiny.get_config()
    e.vectors.estimator = estimator
    if estimator != tiny.get_config().vectors.estimator:
        run(e, "vectors", "steering", "analysis")
    made = pipeline.Run(e)
    traces = records.read_traces(finished / "1-traces" / "traces.jsonl")
    pairs = records.pair_annotations(traces, annotations(finished.parents[1]))
    sums = extract.load_sums(finished / "3-vectors" / "base.sums.safetensors")
    read = [made.context.token_trace("base", *pair) for pair in pairs]
    counts = np.array([extract.count_windows(t, sums.plan, len(t.ids))[0][:, 0].sum(-1) for t in read])
    own = counts[:, sums.plan.labels.index("backtracking")]
    every = counts.sum(-1)  # none is drawn as `shuffled` here
    assert len(set(own)) > 2
    weights = (own, every) if estimator == "token_mean" else (np.ones(len(own)), np.ones(len(own)))
    ids, problems = [trace.id for trace, _ in pairs], [trace.problem_id for trace, _ in pairs]
    positive, contrast = (sums.means_by_trace(ids, group, 1) for group in ("backtracking", "all"))
    expected = similarity.split_half(positive, contrast, problems, weights=weights)
    with (finished / "5-analysis" / "reliability.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if (row["role"], row["layer"]) == ("base", "1")]
    (row,) = (row for row in rows if row["label"] == "backtracking")
    assert float(row["cosine"]) == pytest.approx(expected.cosine, abs=1e-6)


def test_problems_are_counted_where_tokens_are_scored(finished: Path) -> None:
    """If one problem alone has windows of the label, nothing is left to score that problem's fold by."""
    made = pipeline.Run(tiny.get_config())
    e = made.experiment
    traces = records.read_traces(finished / "1-traces" / "traces.jsonl")
    sums = extract.load_sums(finished / "3-vectors" / "base.sums.safetensors")
    only, group = traces[0].problem_id, list(sums.plan.groups).index("backtracking")
    others = [number for number, name in enumerate(sums.trace_ids) if name != traces[0].id]
    sums.trace_means[others, :, group] = np.nan
    rng = np.random.default_rng(0)
    states = rng.standard_normal((2 * len(traces), sums.trace_means.shape[-1]), np.float32)
    tokens = probe.Tokens(states, np.repeat(np.arange(len(traces)), 2), np.arange(2 * len(traces)) % 2 == 0)
    rows = stage_analysis._probe_rows(made.context, "base", 2, 13, tokens, traces, {"base": sums})
    found = {row["method"]: (row["n_problems"], row["n_tokens"]) for row in rows}
    fold = probe.folds([trace.problem_id for trace in traces], e.analysis.folds, e.seed)
    left_out = fold == fold[[trace.problem_id for trace in traces].index(only)]
    problems = {trace.problem_id for trace, out in zip(traces, left_out, strict=True) if not out}
    assert found["base-derived direction"] == (len(problems), 2 * int((~left_out).sum()))
    assert found["random directions"] == (len({trace.problem_id for trace in traces}), 2 * len(traces))


def test_every_stage_keeps_what_it_was_computed_with(tiny_run: Path) -> None:
    import jax

    for name in STAGES:
        described = json.loads((tiny_run / "results" / "tiny" / name / "run.json").read_text())
        # Through JSON, where tuples are lists.
        assert described["config"] == json.loads(json.dumps(dataclasses.asdict(tiny.get_config())))
        assert described["versions"]["jax"] == jax.__version__
        assert {"backtrack-jax", "numpy", "python", "safetensors"} <= described["versions"].keys()
        assert described["device"]["platform"] == jax.devices()[0].platform
        assert described["xla_flags"] == os.environ.get("XLA_FLAGS", "").split()
        assert "earlier" not in described
        assert re.fullmatch(r"[0-9a-f]{40}(\+changes)?|unknown", described["git_revision"])


def test_no_artifact_holds_a_place_or_a_secret(fresh: Path, tiny_run: Path) -> None:
    secrets = {"OPENAI_API_KEY": "sk-a3f9c1", "HF_TOKEN": "hf_77ab12", "USER": "somebody-7c1e"}
    ended = command("--stages=1,2", env={**os.environ, **secrets})
    assert ended.returncode == 0, ended.stderr
    shutil.copytree(tiny_run / "results" / "tiny", fresh / "whole")
    places = [
        str(fresh.parents[2]),
        str(tiny_run),
        str(Path.home()),
        str(TINY.parents[1]),
        sys.prefix,
        os.uname().nodename,
    ]
    for name, content in contents(fresh).items() | {("run", (fresh / "1-traces" / "run.json").read_bytes())}:
        for forbidden in (*secrets.values(), *(place for place in places if len(place) > 4)):
            assert forbidden.encode() not in content, name


def command(*arguments: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """The program, as its own process, in the working directory."""
    return subprocess.run(
        [sys.executable, "-m", "backtrack_jax.run", f"--config={TINY}", *arguments],
        capture_output=True,
        text=True,
        **kwargs,
    )


# What is done again, and what is not


def test_a_second_run_does_nothing(finished: Path, loaded: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(finished)
    times = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    started = time.monotonic()
    run(tiny.get_config())
    assert time.monotonic() - started < 5
    assert not loaded
    assert contents(finished) == before
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == times
    assert capsys.readouterr().err.count("done before") == 6


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("1-traces/labelled.jsonl", b""),
        ("2-annotations/annotations.jsonl", None),
        ("3-vectors/base.sums.safetensors", b"half"),
        ("4-steering/generations.jsonl", b"half"),
        ("5-analysis/replies.csv", b"half"),
        ("5-analysis/base.lens.csv", None),
        ("5-analysis/reasoning.projections.json", None),
        ("6-report/report.html", None),
    ],
)
def test_a_file_that_is_gone_or_cut_off_is_made_again(
    finished: Path, capsys: pytest.CaptureFixture[str], name: str, damage: bytes | None
) -> None:
    before = contents(finished)
    path, stage = finished / name, name.partition("/")[0]
    path.unlink() if damage is None else path.write_bytes(damage)
    made = pipeline.Run(tiny.get_config())
    assert done(made) == [name for name in STAGES if name != stage]
    made.run()
    said = capsys.readouterr().err
    assert f"{stage}: runs again, since {path.name} is missing or not as it was written" in said
    assert said.count("done before") == 5
    after = contents(finished)
    assert after.pop(f"{name}.damaged", None) == damage
    assert after == before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("3-vectors/base.sums.safetensors", b"", r"base\.sums\.safetensors: not whole \(.*\); delete it to read again"),
        ("3-vectors/base.sums.safetensors", b"half" * 99, r"base\.sums\.safetensors: not whole"),
        ("3-vectors/run.json", b"{", r"run\.json: damaged"),
        ("5-analysis/base.likelihoods.jsonl", b'{"row": 0,\n', r"base\.likelihoods\.jsonl, line 1: damaged"),
    ],
)
def test_a_damaged_file_of_an_unfinished_stage_is_named(
    finished: Path, name: str, content: bytes, message: str
) -> None:
    path = finished / name
    (path.parent / "DONE").unlink()
    (finished / "5-analysis" / "replies.csv").unlink()
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        run(tiny.get_config())


def test_a_changed_sweep_runs_the_later_stages_and_can_be_taken_back(
    finished: Path, loaded: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(finished)
    e = tiny.get_config()
    e.steering.layer, e.steering.kinds = (2,), ("backtracking",)
    e.steering.baselines = e.steering.offsets = e.steering.layers = ()
    run(e)
    said = capsys.readouterr().err
    assert "3-vectors: done before" in said
    assert (
        "4-steering: runs again, since steering.baselines, steering.kinds, steering.layer, steering.layers, "
        "steering.offsets changed; old results are in superseded/" in said
    )
    assert loaded == ["base", "reasoning", "base"]  # the analysis begins with the model that is held
    changed = contents(finished)
    for name, content in before.items():
        if name[0] in "123":
            assert changed[name] == content
        elif name.endswith(("inputs.json", "DONE", "rates.csv", "fig3_pairs.png", "summary.md", ".html", ".jsonl")):
            assert changed[name] != content
    assert len(lines_of(finished / "4-steering" / "generations.jsonl")) == 2 * 5 * 6
    loaded.clear()
    run(tiny.get_config())
    assert not loaded
    assert {name: c for name, c in contents(finished).items() if not name.startswith("superseded")} == before


@pytest.mark.parametrize(
    ("change", "stage", "named"),
    [
        (lambda e: set_at(e.vectors, "window", (-4, -1)), "3-vectors", "vectors.window"),
        (lambda e: set_at(e.vectors, "contrast", "rest"), "3-vectors", "vectors.contrast"),
        (lambda e: set_at(e.base, "markers", "keep"), "3-vectors", "models.base.markers"),
        (lambda e: set_at(e.prompt, "think", "none"), "3-vectors", "prompt.think"),
        (lambda e: set_at(e.annotations, "judge", "keyword"), "2-annotations", "annotations.judge annotations.variant"),
        (lambda e: set_at(e.traces, "limit", 6), "1-traces", "traces.limit"),
        (lambda e: set_at(e, "seed", 1), "4-steering", "seed"),
        (lambda e: set_at(e.steering, "span", "generated"), "4-steering", "steering.span"),
    ],
)
def test_a_changed_config_reaches_the_stages_that_it_affects(
    finished: Path, change: Callable[[Experiment], None], stage: str, named: str
) -> None:
    e = tiny.get_config()
    change(e)
    made = pipeline.Run(e)
    assert done(made) == [name for name in STAGES if name < stage]
    assert store.StageFolder(finished, stage, made.inputs[stage]).changed == named.split()


def set_at(holder: object, name: str, value: object) -> None:
    setattr(holder, name, value)


@pytest.mark.parametrize(
    ("name", "stage"),
    [(tiny.CHAINS, "1-traces"), ("base/model.safetensors", "3-vectors"), ("reasoning/tokenizer.json", "3-vectors")],
)
def test_a_file_with_other_content_is_another_input(finished: Path, name: str, stage: str) -> None:
    """Moving or touching it is not."""
    e = tiny.get_config()
    path = Path(name)
    path.touch()
    shutil.copytree("base", "moved")
    e.base.path = "moved"
    assert done(pipeline.Run(e)) == list(STAGES)
    e.base.path = "base"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    made = pipeline.Run(e)
    assert done(made) == [name for name in STAGES if name < stage]


@pytest.mark.parametrize(
    ("name", "stage", "named"),
    [
        ("base/model.safetensors", "3-vectors", "models.base.weights"),
        ("reasoning/model.safetensors", "5-analysis", "models.reasoning.weights"),
        (tiny.CHAINS, "1-traces", "traces.file"),
    ],
)
def test_a_file_that_changes_while_a_stage_works_stops_the_run(
    finished: Path, monkeypatch: pytest.MonkeyPatch, name: str, stage: str, named: str
) -> None:
    """What was computed of two versions is nobody's: the old file does not bring it back."""
    (finished / stage / "DONE").unlink()
    original = Path(name).read_bytes()
    (working,) = (made for made in pipeline.STAGES if made.name == stage)
    body = working.run

    def replaced(context: Context, folder: Path) -> None:
        body(context, folder)
        Path(name).write_bytes(original[:-3] + bytes([original[-3] ^ 1]) + original[-2:])

    with monkeypatch.context() as patch:
        patch.setattr(working, "run", replaced)
        with pytest.raises(ValueError, match=f"{named}.* has changed since this run began; run it again"):
            run(tiny.get_config())
    Path(name).write_bytes(original)
    assert stage not in done(pipeline.Run(tiny.get_config())) and not (finished / stage).exists()


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_hub_id_that_moves_is_not_mixed_with_itself(
    finished: Path, monkeypatch: pytest.MonkeyPatch, loaded: list[str], interrupted: bool
) -> None:
    """A folder stands for the hub id: a fingerprint has its name alone, whatever the hub gives for it."""
    commits = {"base": "a" * 40}
    monkeypatch.setattr(checkpoint, "hub_commit", lambda path, revision: commits.get(path))
    e = tiny.get_config()
    shutil.rmtree(finished / "4-steering")
    for stage in ("1-traces", "3-vectors"):
        path = finished / stage / "run.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"hub_commits": commits}))
    if interrupted:
        (finished / "3-vectors" / "DONE").unlink()
    commits["base"] = "b" * 40
    message = f"base.path=base is at commit {'b' * 40}, 3-vectors in .* was computed with {'a' * 40}; set base.revision"
    with pytest.raises(ValueError, match=message):
        run(e)
    assert not loaded
    commits["base"] = "a" * 40
    run(e)


def test_the_same_numbers_written_differently_are_the_same_inputs(finished: Path) -> None:
    e = tiny.get_config()
    e.steering.magnitudes, e.steering.grid_magnitudes = (0, -4, 8.0), (0, 8)
    e.steering.temperature = e.steering.top_p = 1
    assert done(pipeline.Run(e)) == list(STAGES)


def test_hidden_files_beside_a_model_do_not_matter(finished: Path) -> None:
    """As `git fetch` in a cloned repository and the hub's cache change them."""
    for name in ("base/.git/index", "base/.cache/huggingface/model.safetensors.metadata", "base/.gitattributes"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("changes by itself")
    assert done(pipeline.Run(tiny.get_config())) == list(STAGES)


def test_a_folder_is_one_runs_at_a_time(finished: Path) -> None:
    e = tiny.get_config()
    e.steering.limit = 2
    with store.locked(finished):
        with pytest.raises(BlockingIOError, match="results/tiny is in use by another run; wait for it"):
            run(e)
        assert "4-steering" in done(pipeline.Run(tiny.get_config()))  # nothing was moved
    run(e, "4")


def test_settings_of_sampling_do_not_matter_to_imported_traces(finished: Path) -> None:
    e = tiny.get_config()
    e.traces.temperature, e.traces.batch_size, e.traces.samples = 0.1, 3, 5
    assert done(pipeline.Run(e)) == list(STAGES)


def test_seeds_change_texts_and_batch_mates_do_not(finished: Path) -> None:
    """The same rows with another neighbourhood: one kind, two problems, one sample."""
    before = {key(row): row["text"] for row in lines_of(finished / "4-steering" / "generations.jsonl")}
    e = tiny.get_config()
    e.steering.baselines = e.steering.offsets = e.steering.layers = ()
    e.steering.kinds, e.steering.limit, e.steering.samples = ("noise", "deduction"), 2, 1
    run(e, "4")
    rows = lines_of(finished / "4-steering" / "generations.jsonl")
    assert len(rows) == 2 * 7 * 2
    assert all(before[key(row)] == row["text"] for row in rows)
    e.seed = 1
    run(e, "4")
    reseeded = lines_of(finished / "4-steering" / "generations.jsonl")
    assert sum(before[key(row)] == row["text"] for row in reseeded) < len(rows) // 4


def key(row: dict[str, Any]) -> tuple:
    return tuple(row[name] for name in (*CELL, "problem_id", "sample"))


@pytest.mark.slow
def test_batch_size_does_not_change_texts(finished: Path) -> None:
    """Another program is compiled for it."""
    before = lines_of(finished / "4-steering" / "generations.jsonl")
    e = tiny.get_config()
    e.steering.batch_size = 5
    run(e, "4")
    assert lines_of(finished / "4-steering" / "generations.jsonl") == before


def test_strength_zero_is_unsteered(finished: Path) -> None:
    """T29: every kind at length 0 gives the unsteered tokens, through the same compiled program as all other rows."""
    made = pipeline.Run(tiny.get_config())
    e = made.experiment
    readings = steering.load_readings(made.context)
    built = conditions.Interventions(readings, 3, 16, "all", e.seed)
    cells = [c for c in conditions.make(e, readings) if c.target == "reasoning" and c.magnitude > 0]
    assert {c.layer for c in cells} == {0, 1, 2} and len({c.window for c in cells}) == 4
    chain = tiny.chains()[0]
    ids, _ = made.context.for_role(
        "reasoning", prompts.prompt_ids(made.context.tokenizer, chain["problem"], made.context.prompt)
    )
    row_key = generate.row_key(e.seed, chain["task_id"], 0)
    rows = [
        generate.Row(ids, row_key, built.row(dataclasses.replace(c, magnitude=0.0, length=0.0), row_key)) for c in cells
    ]
    sampling = generate.Sampling(e.steering.temperature, e.steering.top_p, e.steering.top_k)
    batches = generate.generate_rows(
        made.context.model("reasoning"),
        rows,
        sampling=sampling,
        stop_ids=made.context.tokenizer.stop_ids,
        max_new_tokens=e.steering.max_new_tokens,
        batch_size=e.steering.batch_size,
    )
    replies = [reply for batch in batches for _, reply in batch]
    (unsteered,) = (
        row
        for row in lines_of(finished / "4-steering" / "generations.jsonl")
        if (row["target"], row["kind"], row["problem_id"], row["sample"])
        == ("reasoning", "unsteered", chain["task_id"], 0)
    )
    assert len(replies) == 16
    assert {reply.ids for reply in replies} == {tuple(unsteered["ids"])}


# Stages


def test_stage_names() -> None:
    assert pipeline.stage_names([]) == STAGES
    assert pipeline.stage_names(["vectors", "1", "6-report", "1-traces"]) == ("1-traces", "3-vectors", "6-report")
    with pytest.raises(ValueError, match=r"\['7', ''\] unknown; there are 1-traces, 2-annotations"):
        pipeline.stage_names(["7", "", "2"])


def test_stages_one_by_one_give_the_same(fresh: Path, tiny_run: Path) -> None:
    for stages in (("1",), ("2", "3"), ("steering",), ("5-analysis", "6")):
        run(tiny.get_config(), *stages)
    assert contents(fresh) == contents(tiny_run / "results" / "tiny")


def test_a_stage_whose_ground_is_missing_is_refused(fresh: Path, loaded: list[str]) -> None:
    with pytest.raises(ValueError, match="4-steering builds on 1-traces, which is not done for this config"):
        run(tiny.get_config(), "4")
    assert not fresh.exists()
    run(tiny.get_config(), "1", "2")
    with pytest.raises(ValueError, match="5-analysis builds on 3-vectors"):
        run(tiny.get_config(), "4", "5")
    assert not loaded


def test_a_later_stage_alone_stands_on_its_own_config(finished: Path) -> None:
    """The vectors in place are of another window; those of this config lie in superseded/ and are brought back."""
    own = load_file(finished / "3-vectors" / "base.backtracking.safetensors")["direction.1"]
    other = tiny.get_config()
    other.vectors.window = (-4, -1)
    run(other, "1", "2", "3")
    assert not np.array_equal(load_file(finished / "3-vectors" / "base.backtracking.safetensors")["direction.1"], own)
    e = tiny.get_config()
    e.steering.kinds, e.steering.limit = ("backtracking",), 1
    e.steering.baselines = e.steering.offsets = e.steering.layers = ()
    run(e, "4")
    (used,) = {
        row["vector_hash"] for row in lines_of(finished / "4-steering" / "generations.jsonl") if row["source"] == "base"
    }
    assert used == hashlib.sha256(own.tobytes()).hexdigest()[:16]


def test_sampled_traces(fresh: Path, loaded: list[str]) -> None:
    """Stage 1 samples them from the reasoning model; ids are kept, and a second run samples nothing."""
    problems = [{"id": f"p{i}", "category": "verbal", "problem": f"Add {i} and two."} for i in range(5)]
    Path("problems.json").write_text(json.dumps(problems))
    e = tiny.get_config()
    e.traces.path, e.traces.problems, e.traces.limit, e.traces.samples = "", "problems.json", 3, 2
    e.traces.temperature, e.traces.max_new_tokens, e.traces.batch_size = 1.0, 8, 32
    e.annotations.judge = "keyword"
    made = run(e, "1", "2")
    traces = records.read_traces(fresh / "1-traces" / "traces.jsonl")
    assert [trace.id for trace in traces] == [f"p{i}/{sample}" for i in (0, 2, 4) for sample in range(2)]
    assert len({trace.text for trace in traces}) == 6
    for trace in traces:
        encoded = prompts.encode_trace(
            made.context.tokenizer, trace.problem, trace.text, made.context.prompt, token_ids=trace.token_ids
        )
        assert trace.token_ids is not None
        # The reasoning ends before a stop token and before `</think>`, whichever was sampled first.
        ends = {*made.context.tokenizer.stop_ids, prompts.r1_markers(made.context.tokenizer).end_think}
        end = next((at for at, i in enumerate(trace.token_ids) if i in ends), len(trace.token_ids))
        assert encoded.ids[encoded.reply_start :] == trace.token_ids[:end]
    assert loaded == ["reasoning"]
    assert sorted(path.name for path in (fresh / "1-traces").iterdir()) == [
        "DONE",
        "inputs.json",
        "run.json",
        "traces.jsonl",
    ]
    run(e, "1", "2")
    assert loaded == ["reasoning"]
    problems[0]["problem"] = "Add."
    Path("problems.json").write_text(json.dumps(problems))
    assert "1-traces" not in done(pipeline.Run(e))
    e.roles, e.base.markers = ("base",), "keep"  # the base model alone writes its own traces
    run(e, "1")
    assert loaded == ["reasoning", "base"]


# Death


class Killed(BaseException):
    """Stands for SIGKILL in the process of the tests: after it, nothing reaches the disk."""


class Disk:
    """Lets `left` changes through, then tears what is being written and dies, again at every later change."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left = 0
        self._change(monkeypatch, Path, "replace")
        self._change(monkeypatch, Path, "unlink")
        self._change(monkeypatch, os, "truncate")
        fsync = os.fsync

        def torn_fsync(descriptor: int) -> None:
            if self.left <= 0:
                os.ftruncate(descriptor, os.fstat(descriptor).st_size * 2 // 3)
                raise Killed
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", torn_fsync)

    def _change(self, monkeypatch: pytest.MonkeyPatch, holder: Any, name: str) -> None:
        original = getattr(holder, name)

        def change(*args: Any, **kwargs: Any) -> Any:
            if self.left <= 0:
                raise Killed
            self.left -= 1
            return original(*args, **kwargs)

        monkeypatch.setattr(holder, name, change)


def test_death_at_any_change_on_disk(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that dies again and again, after a few changes each time, comes to the artifacts of one that does not."""
    e = tiny.get_config()
    e.steering.kinds, e.steering.limit = ("backtracking", "noise"), 2  # two batches for each model
    e.steering.baselines = e.steering.offsets = e.steering.layers = ()
    with monkeypatch.context() as patch:
        disk = Disk(patch)
        rng = random.Random(0)
        deaths = 0
        while deaths < 200:
            disk.left = rng.randint(2, 9 + deaths)  # grows: stage 3 writes its vectors anew each time
            try:
                run(e)
                break
            except Killed:
                deaths += 1
        assert 10 < deaths < 200
    died = contents(fresh)
    shutil.rmtree(fresh)
    run(e)
    assert {name: content for name, content in died.items() if not name.endswith(".tmp")} == contents(fresh)


KILLER = """
import os, runpy, signal, sys
from backtrack_jax.files import store
name, calls = sys.argv.pop(1), int(sys.argv.pop(1))
original = getattr(store, name)
def killing(path, *args):
    global calls
    original(path, *args)
    calls -= path.name.endswith(("sums.safetensors", "replies.jsonl"))
    if calls == 0:
        os.kill(os.getpid(), signal.SIGKILL)
setattr(store, name, killing)
runpy.run_module("backtrack_jax.run", run_name="__main__")
"""


def test_sigkill_in_the_long_stages(fresh: Path, tiny_run: Path) -> None:
    """After one batch of stage 3, then after two of stage 4, from where smaller ones go on to the same bytes."""
    for name, calls in (("write_safetensors", 1), ("append_lines", 2)):
        started = [sys.executable, "-c", KILLER, name, str(calls), f"--config={TINY}"]
        assert subprocess.run(started, capture_output=True).returncode == -signal.SIGKILL
    partial = fresh / "4-steering" / "base.replies.jsonl"
    assert len(lines_of(partial)) == 2 * 32
    with partial.open("a") as file:
        file.write('{"row": 64, "ids": [1')  # torn, as by a loss of power
    (fresh / "4-steering" / ".generations.jsonl.tmp").write_text("{")
    ended = command("--config.steering.batch_size=7")
    assert ended.returncode == 0, ended.stderr
    assert "3-vectors: done before" in ended.stderr
    assert re.search(r"base model: 114 of 114 rows, ", ended.stderr)
    resumed, whole = contents(fresh), contents(tiny_run / "results" / "tiny")
    for page in (resumed, whole):
        page.pop("6-report/report.html")  # where the settings stand
        page.pop("6-report/DONE")  # which has its size
    assert resumed == whole
    described = json.loads((fresh / "4-steering" / "run.json").read_text())
    assert described["config"]["steering"]["batch_size"] == 7
    assert [before["config"]["steering"]["batch_size"] for before in described["earlier"]] == [32]


@pytest.mark.slow
def test_sigkill_at_random_moments(fresh: Path, tiny_run: Path) -> None:
    rng = random.Random(0)
    died_in = set()
    for _ in range(40):
        process = subprocess.Popen(
            [sys.executable, "-m", "backtrack_jax.run", f"--config={TINY}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            assert process.wait(timeout=rng.uniform(2, 9)) == 0
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            died_in.add(sum(1 for name in STAGES if (fresh / name / "DONE").exists()))
    else:
        assert command().returncode == 0
    assert len(died_in) > 1
    whole = {name: content for name, content in contents(fresh).items() if not name.endswith(".tmp")}
    assert whole == contents(tiny_run / "results" / "tiny")


# What cannot run stops before the long work


def test_a_broken_checkpoint_of_either_model_stops_before_the_first_is_read(fresh: Path, loaded: list[str]) -> None:
    weights = Path("reasoning/model.safetensors")
    whole = weights.read_bytes()
    for broken in (b"", whole[:100], whole[:-1]):
        weights.write_bytes(broken)
        with pytest.raises(ValueError, match=r"reasoning/model\.safetensors"):
            run(tiny.get_config())
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="reasoning"):
        run(tiny.get_config())
    assert not loaded


def edit_json(path: str, **changes: Any) -> None:
    Path(path).write_text(json.dumps(json.loads(Path(path).read_text()) | changes))


def test_an_unknown_field_of_a_models_config(fresh: Path) -> None:
    edit_json("base/config.json", sliding_window=512)
    with pytest.raises(ValueError, match=r"base/config\.json.*\n.*unknown field sliding_window=512"):
        pipeline.Run(tiny.get_config())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: set_at(e.steering, "layer", 3), r"steering\.layer=3 is no block of the base model.*0\.\.2"),
        (lambda e: set_at(e.steering, "layers", (1, 5)), r"steering\.layers=5 is no block"),
        (lambda e: set_at(e.vectors, "layers", (0, 7)), r"vectors\.layers=7 is no block"),
        (lambda e: set_at(e.traces, "path", "nowhere.json"), r"nowhere\.json: no such file"),
        (lambda e: set_at(e.base, "path", "nowhere/at/all"), "nowhere/at/all"),
        (lambda e: set_at(e.base, "path", "package:llm_nothing/x.gguf"), "llm_nothing is not installed"),
    ],
)
def test_what_does_not_fit_stops_before_anything_is_written(
    fresh: Path, change: Callable[[Experiment], None], message: str
) -> None:
    e = tiny.get_config()
    change(e)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(e)
    assert not fresh.exists()


def test_models_that_do_not_fit_each_other(fresh: Path) -> None:
    shutil.rmtree("base")
    tiny.write_model(Path("base"), vocab_size=tiny.VOCAB_SIZE, seed=3, d_model=24)
    with pytest.raises(ValueError, match=r"base \(3, 24\), reasoning \(3, 16\)"):
        pipeline.Run(tiny.get_config())


def test_a_replacement_beyond_the_vocabulary(fresh: Path) -> None:
    e = tiny.get_config()
    e.base.markers, e.base.marker_replacement = "replace", 27370
    with pytest.raises(ValueError, match=r"base\.marker_replacement=27370 is no token"):
        pipeline.Run(e)


def test_keywords_that_no_token_contains_stop_before_a_model_is_loaded(fresh: Path, loaded: list[str]) -> None:
    e = tiny.get_config()
    e.analysis.keywords = ("zzzz",)
    with pytest.raises(ValueError, match=r"analysis\.keywords=\('zzzz',\): .* no token contains any of zzzz"):
        run(e)
    assert not loaded and not fresh.exists()
    run(e, "1", "2", "3")  # which read no keywords


def test_token_ids_beyond_the_embedding(fresh: Path, loaded: list[str]) -> None:
    """A gather out of range reads another row without a word. Markers that the base model drops may be beyond it."""
    shutil.rmtree("base")
    tiny.write_model(Path("base"), vocab_size=tiny.VOCAB_SIZE - 4, seed=1)
    run(tiny.get_config(), "1", "2")
    e = tiny.get_config()
    e.base.markers = "keep"
    with pytest.raises(ValueError, match=f"token ids up to {tiny.VOCAB_SIZE - 1}, the base model embeds"):
        run(e)
    run(tiny.get_config(), "3")
    assert loaded == ["base", "reasoning"]
    run(few_conditions(), "4", "5")  # the lens, which takes its items from the tokenizer
    items = {int(row["token"]) for row in csv_rows("base.lens_tokens.csv")}
    assert items and max(items) < tiny.VOCAB_SIZE - 4


def few_conditions() -> Experiment:
    """The tiny experiment with one reply of each model."""
    e = tiny.get_config()
    e.steering.kinds, e.steering.magnitudes = ("backtracking",), (-4.0,)
    e.steering.limit = e.steering.samples = 1
    e.steering.baselines = e.steering.offsets = e.steering.layers = ()
    return e


def csv_rows(name: str) -> list[dict[str, str]]:
    with Path("results/tiny/5-analysis", name).open() as file:
        return list(csv.DictReader(file))


def edit_chains(change: Callable[[dict[str, str]], Any]) -> None:
    chains = json.loads(Path(tiny.CHAINS).read_text())
    for chain in chains:
        change(chain)
    Path(tiny.CHAINS).write_text(json.dumps(chains))


def test_the_probe_takes_no_label_for_no_backtracking(fresh: Path) -> None:
    unlabelled = {"verbal_1", "verbal_3", "spatial_2"}
    edit_chains(lambda chain: chain["task_id"] in unlabelled and chain.update(annotated_chain=""))
    run(few_conditions())
    for row in csv_rows("reasoning.probe.csv"):
        assert row["method"] != "random directions" or int(row["n_problems"]) == len(tiny.TASKS) - len(unlabelled)


def test_sections_of_one_label_make_no_difference(fresh: Path, loaded: list[str]) -> None:
    text = "First, wait. I add two and two, so it is four."
    labelled = f'["backtracking"]{text}["end-section"]'
    edit_chains(lambda chain: chain.update(reasoning_chain=text, annotated_chain=labelled))
    with pytest.raises(ValueError, match="every section is labelled 'backtracking'"):
        run(few_conditions())
    assert not loaded


def test_a_section_begins_behind_a_marker_that_a_model_does_not_read(fresh: Path) -> None:
    made = pipeline.Run(tiny.get_config())
    trace = records.read_released(tiny.CHAINS)[0][0]
    assert trace.text.startswith("<think>\nTask")
    spans = [("initializing", 0, 20), ("deduction", 0, 8), ("backtracking", 25, 30)]
    annotation = records.Annotation(trace.id, "me", tuple(records.Section(*span) for span in spans))
    read = {role: made.context.token_trace(role, trace, annotation) for role in ROLES}
    (first, *_), (of_base, *_) = read["reasoning"].starts, read["base"].starts
    ids = {role: read[role].ids[read[role].starts[0][1]] for role in ROLES}
    assert (
        made.context.tokenizer.decode([ids["reasoning"]]) == "<think>"
        and made.context.tokenizer.decode([ids["base"]]) == "T"
    )
    assert first[0] == of_base[0] == "initializing"
    assert [label for label, _ in read["base"].starts] == ["initializing", "backtracking"]  # none of the second is read


def test_what_else_is_in_a_folder_of_chains_does_not_count(fresh: Path) -> None:
    folder = Path("chains")
    folder.mkdir()
    Path(tiny.CHAINS).rename(folder / "tiny_annotated_chains.json")
    e = tiny.get_config()
    e.traces.path = shutil.copy(folder / "tiny_annotated_chains.json", "one.json")
    alone = pipeline.Run(e).inputs
    e.traces.path = shutil.copy("one.json", "renamed.json")
    assert pipeline.Run(e).inputs == alone  # where a file lies, and its name, do not enter
    e.traces.path = "chains"
    before = pipeline.Run(e).inputs
    (folder / ".git").mkdir()
    (folder / ".git" / "index").write_text("changes at every command")
    (folder / "results.json").write_text("{}")
    assert pipeline.Run(e).inputs == before
    (folder / "more_annotated_chains.json").write_text("[]")
    assert pipeline.Run(e).inputs != before


def overflow(model: str) -> None:
    """Makes the logits of a model infinite, and nothing else of it."""
    file = Path(model) / "model.safetensors"
    weights = load_file(file)
    weights["lm_head.weight"][:] = np.finfo(np.float32).max
    store.write_safetensors(file, weights, {"format": "pt"})


def test_a_sampled_row_without_finite_logits_is_named(fresh: Path) -> None:
    Path("problems.json").write_text(json.dumps([{"id": "p0", "category": "verbal", "problem": "Add two."}]))
    overflow("reasoning")
    e = tiny.get_config()
    e.annotations.judge, e.traces.path, e.traces.problems = "keyword", "", "problems.json"
    with pytest.raises(FloatingPointError, match="problem 'p0', sample 0: logits are not finite"):
        run(e, "1")


def test_a_steered_row_without_finite_logits_is_named(finished: Path) -> None:
    overflow("base")
    e = tiny.get_config()
    e.roles, e.steering.kinds, e.steering.magnitudes, e.steering.limit = ("base",), ("backtracking",), (-4.0,), 1
    e.steering.baselines = e.steering.offsets = e.steering.layers = ()
    condition = re.escape("backtracking of the base model (window -5..-2) at layer 1 of the base model, magnitude -4")
    with pytest.raises(FloatingPointError, match=f"problem 'verbal_0', sample 0, {condition}: logits"):
        run(e)


def test_a_vector_of_the_wrong_width_or_depth(finished: Path, loaded: list[str]) -> None:
    e = tiny.get_config()
    e.steering.layer = (0,)
    file = finished / "3-vectors" / "base.backtracking.safetensors"
    stage = store.StageFolder(finished, "3-vectors", pipeline.Run(e).inputs["3-vectors"])
    for shape in ((3, 15), (4, 16)):
        rows = {f"direction.{layer}": np.ones(shape[1], np.float32) for layer in range(shape[0])}
        metadata = {"layer_convention": "block_output_0based", "n_layers": str(shape[0]), "provenance": "{}"}
        store.write_safetensors(file, rows, metadata)
        stage.finish()
        message = rf"backtracking vector of the base model has directions of shape \({shape[0]}, {shape[1]}\) "
        with pytest.raises(ValueError, match=message + r".*takes \(3, 16\)"):
            run(e, "4")
    assert not loaded


def test_a_vector_that_is_not_there(finished: Path, loaded: list[str]) -> None:
    e = tiny.get_config()
    e.steering.kinds, e.steering.layers = ("initializing",), ()  # its windows were all dropped
    with pytest.raises(ValueError, match=r"no 'initializing' vector of the base model was read; there are \['adding-"):
        run(e, "4")
    assert not loaded


def test_a_vector_file_steers_like_the_vector_in_it(finished: Path) -> None:
    """In any format, under every unit: the same replies as the kind that it was copied from."""
    e = tiny.get_config()
    vector = vectors.load(finished / "3-vectors" / "base.backtracking.safetensors")
    vectors.save(vector, Path("mine.npz"))
    e.steering = dataclasses.replace(
        e.steering, kinds=("backtracking", "mine.npz"), baselines=(), offsets=(), layers=(), grid_limit=0
    )
    for unit in UNITS:
        e.steering.unit = unit
        lines = lines_of(run(e, "4").workdir / "4-steering" / "generations.jsonl")
        found = {
            name: [
                (x["target"], x["magnitude"], x["problem_id"], x["sample"], x["length"], x["vector_hash"], x["ids"])
                for x in lines
                if (x["kind"], x["source"]) == of
            ]
            for name, of in (("kind", ("backtracking", "base")), ("file", ("mine.npz", "")))
        }
        assert found["file"] and found["file"] == found["kind"]
    run(e)
    assert "mine.npz" in (finished / "6-report" / "fig4_baselines.csv").read_text()
    vectors.save(-vector, Path("mine.npz"))  # another content under the same name
    assert done(pipeline.Run(e)) == ["1-traces", "2-annotations", "3-vectors"]


def test_a_vector_file_that_changes_while_a_run_waits_is_refused(finished: Path, loaded: list[str]) -> None:
    e = tiny.get_config()
    vector = vectors.load(finished / "3-vectors" / "base.backtracking.safetensors")
    vectors.save(vector, Path("mine.npz"))
    e.steering.baselines = ("mine.npz",)
    begun = pipeline.Run(e)
    vectors.save(-vector, Path("mine.npz"))
    with pytest.raises(ValueError, match=r"mine\.npz has changed since this run began"):
        begun.run()
    assert not loaded


def test_the_order_of_roles_changes_nothing(finished: Path) -> None:
    """Conditions are numbered in their order, and a resumed stage goes by the numbers."""
    e = tiny.get_config()
    e.roles = ("reasoning", "base")
    turned = pipeline.Run(e)
    assert turned.experiment.roles == ROLES and turned.inputs == pipeline.Run(tiny.get_config()).inputs
    assert done(turned) == list(STAGES)


@pytest.mark.parametrize(
    ("directions", "message"),
    [
        (None, r"mine\.npz: no such file"),
        (np.ones((3, 15), np.float32), r"mine\.npz has directions of width 15; the base model takes 16"),
        (np.ones((4, 16), np.float32), r"mine\.npz: 4 layers, expected 3"),
        (
            np.eye(3, 16, dtype=np.float32) * [[1], [0], [1]],
            r"mine\.npz: the vector is zero at layer 1.*steering\.layer",
        ),
        (np.full((3, 16), np.nan, np.float32), r"mine\.npz: the vector has no finite direction at layer 1"),
    ],
)
def test_a_vector_file_that_does_not_fit_stops_the_plan(
    fresh: Path, directions: np.ndarray | None, message: str
) -> None:
    e = tiny.get_config()
    e.steering.baselines = ("mine.npz",)
    if directions is not None:
        vectors.save(vectors.SteeringVector(directions), Path("mine.npz"))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        pipeline.Run(e)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: set_at(e.steering, "kinds", ("example-testing",)), "no section is labelled 'example-testing'"),
        (lambda e: set_at(e.steering, "kinds", ("initializing",)), r"no window \(-5, -2\) of 'initializing'"),
        (lambda e: set_at(e.vectors, "window", (-300, -290)), r"no window \(-300, -290\) of"),
        (lambda e: set_at(e.vectors, "offset_window", (-300, -290)), r"no window \(-301, -291\) of"),
    ],
)
def test_windows_that_nobody_can_read_stop_before_a_model_is_loaded(
    fresh: Path, loaded: list[str], change: Callable[[Experiment], None], message: str
) -> None:
    e = tiny.get_config()
    change(e)
    with pytest.raises(ValueError, match=message):
        run(e)
    assert not loaded


@pytest.mark.parametrize(
    ("chain", "message"),
    [
        ({"reasoning_chain": ""}, "entry 1.*'reasoning_chain' is empty"),
        ({"reasoning_chain": None}, "entry 1.*'reasoning_chain' must be a string"),
        ({"problem": f"{tiny.BOS}Add."}, "trace 'verbal_1/0': the problem holds the BOS text"),
        ({"reasoning_chain": f"{tiny.BOS}Wait."}, "trace 'verbal_1/0': the reply holds the BOS text"),
    ],
)
def test_a_chain_that_cannot_be_read(fresh: Path, loaded: list[str], chain: dict[str, Any], message: str) -> None:
    chains = tiny.chains()
    chains[1] |= chain
    Path(tiny.CHAINS).write_text(json.dumps(chains))
    with pytest.raises(ValueError, match=message):
        run(tiny.get_config())
    assert not loaded


def test_a_chain_that_the_judge_left_unlabelled_is_counted_not_fatal(fresh: Path) -> None:
    chains = tiny.chains()
    chains[1]["annotated_chain"] = ""
    Path(tiny.CHAINS).write_text(json.dumps(chains))
    run(tiny.get_config(), "1", "2")
    assert "no_sections" in (fresh / "2-annotations" / "summary.txt").read_text()


def test_annotated_chains_may_stand_one_a_line(fresh: Path, tiny_run: Path) -> None:
    Path("chains.jsonl").write_text("".join(json.dumps(chain) + "\n" for chain in tiny.chains()))
    e = tiny.get_config()
    e.traces.path, e.annotations.judge = "chains.jsonl", "released-or-keyword"
    run(e, "1", "2")
    for name in ("1-traces/traces.jsonl", "2-annotations/annotations.jsonl"):
        assert (fresh / name).read_bytes() == (tiny_run / "results" / "tiny" / name).read_bytes()


@pytest.mark.parametrize("into_prompt", [False, True])
def test_tokens_are_marked_as_read_where_a_window_is(fresh: Path, into_prompt: bool) -> None:
    """One chain backtracks at its very start: what its window would read there is not read."""
    e = tiny.get_config()
    e.vectors.into_prompt, e.analysis.shown = into_prompt, 12
    e.steering = dataclasses.replace(
        e.steering, kinds=("noise",), baselines=(), offsets=(), layers=(), magnitudes=(8.0,), grid_limit=0
    )
    made = run(e, "1", "2", "3", "4", "5")
    traces = records.read_traces(made.workdir / "1-traces" / "traces.jsonl")
    annotated = records.read_annotations(made.workdir / "2-annotations" / "annotations.jsonl")
    pairs = {trace.id: (trace, annotation) for trace, annotation in records.pair_annotations(traces, annotated)}
    plan = extract.WindowPlan(records.LABELS, {"all": records.LABELS}, ((-5, -2),), layers=(), into_prompt=into_prompt)
    row = records.LABELS.index("backtracking")
    shown = json.loads((made.workdir / "5-analysis" / "reasoning.projections.json").read_text())["traces"]
    assert len(shown) > 8
    for trace in shown:
        tokens = made.context.token_trace("reasoning", *pairs[trace["id"]])
        counts, _ = extract.count_windows(tokens, plan, len(tokens.ids))
        assert trace["read"] == np.flatnonzero(counts[row, 0, tokens.reply_start :]).tolist()


def test_a_first_try_goes_all_the_way_and_what_would_mislead_is_said(
    fresh: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One trace, so that what takes a second one is empty; a magnitude in the wrong unit; a layer without a probe."""
    e = tiny.get_config()
    e.traces.limit = e.steering.limit = 1
    e.steering.kinds, e.steering.layer, e.steering.magnitudes = ("backtracking",), (0,), (0.0, 500.0)
    e.steering.baselines = e.steering.offsets = e.steering.layers = ()
    run(e)
    said = capsys.readouterr().err
    assert re.search(r"magnitude 500 adds \d+\.?\d* times the mean residual norm; see steering\.unit", said)
    assert "probe and reliability are of vectors.layers=(1, 2); add steering.layer=0 there to have it" in said
    assert said.rstrip().endswith("results are in results/tiny/6-report/report.html")
    with (fresh / "5-analysis" / "reasoning.probe.csv").open() as file:
        aucs = [row["auc"] for row in csv.DictReader(file) if row["method"] != "random directions"]
    assert aucs and set(aucs) <= {"", "nan"}


def test_traces_without_labels_need_a_judge(fresh: Path) -> None:
    traces, _ = records.read_released(tiny.CHAINS)
    records.write_jsonl("traces.jsonl", traces)
    e = tiny.get_config()
    e.traces.path = "traces.jsonl"
    with pytest.raises(ValueError, match=r"traces\.jsonl holds traces without labels"):
        run(e, "1", "2")
    e.annotations.judge = "keyword"
    run(e, "1", "2")
    e.annotations.judge, e.annotations.path = "import", "labels.jsonl"
    shutil.copy(fresh / "2-annotations" / "annotations.jsonl", "labels.jsonl")
    run(e, "1", "2")
    assert (fresh / "2-annotations" / "annotations.jsonl").read_bytes() == Path("labels.jsonl").read_bytes()


@pytest.mark.parametrize("source", ["chains", "traces", "sampled"])
def test_imported_labels_under_a_limit(fresh: Path, source: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As with the labels that came with chains, those of traces that are not taken are left out; no other ones are."""
    e = tiny.get_config()
    if source == "traces":
        records.write_jsonl("traces.jsonl", records.read_released(tiny.CHAINS)[0])
        e.traces.path = "traces.jsonl"
    elif source == "sampled":
        problems = [{"id": task, "category": "verbal", "problem": f"Add {task}."} for task in tiny.TASKS]
        Path("problems.json").write_text(json.dumps(problems))
        e.traces.path, e.traces.problems, e.traces.max_new_tokens, e.traces.batch_size = "", "problems.json", 8, 32
    e.annotations.judge = "keyword"
    run(e, "1", "2")
    shutil.copy(fresh / "2-annotations" / "annotations.jsonl", "labels.jsonl")
    e.annotations.judge, e.annotations.path, e.traces.limit = "import", "labels.jsonl", 5
    capsys.readouterr()
    run(e, "1", "2")
    assert "7 of 12 annotations left out" in capsys.readouterr().err
    taken = [trace.id for trace in records.read_traces(fresh / "1-traces" / "traces.jsonl")]
    kept = records.read_annotations(fresh / "2-annotations" / "annotations.jsonl")
    assert [annotation.trace_id for annotation in kept] == taken and len(taken) == 5
    text = Path("labels.jsonl").read_text().replace(f"{tiny.TASKS[1]}/0", "spatial_99/0")
    Path("labels.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"labels\.jsonl: annotation of trace 'spatial_99/0'.* the 12 traces of"):
        run(e, "1", "2")


def test_spread() -> None:
    from backtrack_jax.inputs import spread

    for n in range(1, 30):
        for limit in range(1, n + 1):
            chosen = spread(range(n), limit)
            assert len(set(chosen)) == limit and chosen == sorted(chosen) and chosen[0] == 0
            assert limit == 1 or chosen[-1] == n - 1
    assert spread([1, 2], 0) == spread([1, 2], 9) == [1, 2]
