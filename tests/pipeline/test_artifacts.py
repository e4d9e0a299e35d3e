"""What a finished run holds: artifacts that agree with each other, with the chains, and with formulas written anew."""

import ast
import csv
import dataclasses
import hashlib
import json
import os
import re
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from runs import (
    CELL,
    ROLES,
    STAGES,
    TINY,
    contents,
    lines_of,
    run,
)
from safetensors.numpy import load_file
from sklearn import metrics

import backtrack_jax
from backtrack_jax import conditions, extract, generate, pipeline
from backtrack_jax.analysis import activations, by_problem, probe, reliability, shuffles
from backtrack_jax.data import records
from backtrack_jax.files import tables
from backtrack_jax.models import prompts
from backtrack_jax.models.tokenizer import Tokenizer
from backtrack_jax.stages import analysis as stage_analysis
from backtrack_jax.stages import steering
from backtrack_jax.stages import vectors as stage_vectors

TABLES = ("replies", "rates", "effects", "similarity", "label_cosines", "reliability", "windows", "agreement")
PER_MODEL = ("log_odds.csv", "lens.csv", "lens_rise.csv", "lens_tokens.csv", "probe.csv", "projections.json")
FIGURES = ("fig1_trace", "fig2_offsets", "fig3_pairs", "cosine_by_layer", "fig4_baselines", "fig5_logit_lens")
FIGURES += (
    "log_odds",
    "probe",
    "figB1_layers",
    "metrics",
    "effects",
    "norms",
    "label_cosines",
    "reliability",
    "fig6_projection",
)
READ = ("adding-knowledge", "backtracking", "deduction", "uncertainty-estimation")  # `initializing` starts the reply


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
        "5-analysis/analyses.json",
        *(f"6-report/{name}.{suffix}" for name in FIGURES for suffix in ("csv", "pdf", "png")),
        *("6-report/claims.json", "6-report/summary.md", "6-report/report.html", "6-report/.stale.js"),
    ]
    assert sorted(contents(tiny_run / "results" / "tiny")) == sorted(expected)
    assert (tiny_run / "results" / "tiny").stat().st_nlink == 2 + len(stages)  # no other folder


def strings_in_code(path: Path) -> set[str]:
    """Strings and the fixed parts of f-strings; docstrings are none."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    docstrings = [node.value for node in nodes if isinstance(node, ast.Expr)]
    texts = [node for node in nodes if isinstance(node, ast.Constant) and node not in docstrings]
    return {node.value for node in texts if isinstance(node.value, str)}


def test_one_module_spells_the_name_of_a_stage_or_of_an_artifact(tiny_run: Path) -> None:
    files = {path.name for path in (tiny_run / "results" / "tiny").rglob("*") if path.is_file()}
    files |= {"judged.jsonl", "judge_agreement.csv", "base.replies.jsonl", "base.likelihoods.jsonl"}  # not in this run
    names = {
        *STAGES,
        *(re.sub(rf"^({'|'.join(ROLES)})(?=\.)", "", file) for file in files),
    }  # ".projections.json", of any role
    spelled: dict[str, list[str]] = {name: [] for name in names}
    for path in Path(backtrack_jax.__file__).parent.rglob("*.py"):
        for name in names & {text.rpartition("/")[2] for text in strings_in_code(path)}:
            spelled[name].append(path.name)
    assert not {name: modules for name, modules in spelled.items() if len(modules) > 1}
    assert {*STAGES, "DONE", "traces.jsonl", ".sums.safetensors", ".projections.json"} < {
        n for n in names if spelled[n]
    }


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


@pytest.mark.parametrize(("markers", "replacement"), [("keep", ""), ("drop", ""), ("replace", "#")])
def test_both_models_read_the_same_words(fresh: Path, markers: str, replacement: str) -> None:
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


@pytest.mark.parametrize("estimator", extract.ESTIMATORS)
def test_a_contrast_within_traces_leaves_out_traces_without_the_label(finished: Path, estimator: str) -> None:
    """The run's vector is that of the sections which were kept, at their layers; other labels' are against all."""
    e = tiny.get_config()
    e.vectors.contrast, e.vectors.estimator = "trace", estimator
    run(e, "vectors", "steering", "analysis")
    sums = extract.load_sums(finished / "3-vectors" / "base.sums.safetensors")
    label = sums.plan.labels.index("backtracking")
    own, every = [], []
    for number in range(len(sums.trace_ids)):
        here = (sums.section_traces == number) & (sums.section_positions > 0)
        here &= sums.section_labels != sums.plan.labels.index("shuffled")
        if (sums.section_labels[here] == label).any():
            own.append(sums.section_means[here & (sums.section_labels == label)].astype(np.float64))
            every.append(sums.section_means[here].astype(np.float64))
    assert 3 < len(own) < len(sums.trace_ids)
    if estimator == "trace_mean":
        own, every = ([x.mean(0, keepdims=True) for x in found] for found in (own, every))
    expected = np.concatenate(own).mean(0) - np.concatenate(every).mean(0)
    found = load_file(finished / "3-vectors" / "base.backtracking.safetensors")
    for at, layer in enumerate(sums.plan.layers):
        np.testing.assert_allclose(found[f"direction.{layer}"], expected[at], atol=1e-5)
    deduction = sums.mean("deduction", e.vectors.window, estimator) - sums.mean("all", e.vectors.window, estimator)
    other = load_file(finished / "3-vectors" / "base.deduction.safetensors")
    np.testing.assert_allclose(other["direction.0"], deduction[0], atol=1e-6)


def test_cosines_have_a_null_where_sections_were_kept(finished: Path) -> None:
    """The table is that of the functions, which are tested by themselves, on the run's own sections."""
    made = pipeline.Run(tiny.get_config())
    material = stage_analysis.gather(made.context)
    rows = [row for row in tables.read(finished / "5-analysis" / "similarity.csv") if row["label"] == "backtracking"]
    summary = json.loads((finished / "3-vectors" / "summary.json").read_text())
    assert [row["layer"] for row in rows] == [0, 1, 2]
    np.testing.assert_allclose([row["cosine"] for row in rows], summary["cosine"], atol=1e-6)
    assert rows[0]["n_problems"] == 0 and all(np.isnan(rows[0][name]) for name in ("low", "corrected", "shuffled_95"))
    ids = [trace.id for trace, _ in material.pairs]
    drawn = shuffles.shuffle(material.sums, ids, "backtracking", seed=made.experiment.seed)
    for row in rows[1:]:
        sums = {role: by_problem.of_label(material, role, "backtracking", row["layer"]) for role in ROLES}
        values = by_problem.cosine(sums["base"], sums["reasoning"])
        assert values[0] == pytest.approx(row["cosine"], abs=1e-5)
        n = sums["base"].n_problems
        ends = by_problem.cosine_interval(float(values[0]), by_problem.standard_error(values), n)
        assert row["n_problems"] == n == 11 and (row["low"], row["high"]) == pytest.approx(ends)
        group = np.zeros(len(ids), int)
        vectors = {
            role: shuffles.shuffled_sums(drawn, material, role, ids, "backtracking", row["layer"], group).vectors(
                np.array([True])
            )
            for role in ROLES
        }
        cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(*vectors.values(), strict=True)]
        assert row["shuffled_95"] == pytest.approx(np.quantile(cosines, 0.95), abs=1e-5) and len(cosines) == 200
        norm = np.quantile(np.linalg.norm(vectors["base"], axis=-1), 0.95)
        assert row["norm_base_95"] == pytest.approx(norm, rel=1e-5)


def test_generations_are_conditions_times_problems_times_samples(tiny_run: Path) -> None:
    e = tiny.get_config()
    rows = lines_of(tiny_run / "results" / "tiny" / "4-steering" / "generations.jsonl")
    names = ["problem_id", "category", "problem", "sample", "model", "target", "kind", "source", "layer", "window"]
    names += ["magnitude", "length", "unit", "span", "vector_hash", "seed", "ids", "text", "finish_reason", "dtype"]
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
    expected = reliability.split_half(positive, contrast, problems, weights=weights)
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
    only, label = traces[0].problem_id, sums.plan.labels.index("backtracking")
    others = [number for number, name in enumerate(sums.trace_ids) if name != traces[0].id]
    sums.section_positions[np.isin(sums.section_traces, others) & (sums.section_labels == label)] = 0
    rng = np.random.default_rng(0)
    states = rng.standard_normal((2 * len(traces), sums.section_means.shape[-1]), np.float32)
    tokens = probe.SampledTokens(states, np.repeat(np.arange(len(traces)), 2), np.arange(2 * len(traces)) % 2 == 0)
    material = dataclasses.replace(stage_analysis.gather(made.context), sums={"base": sums})
    rows = probe.score_directions(material, "base", 2, 13, tokens, traces)
    found = {row["method"]: (row["n_problems"], row["n_tokens"], row["n_positive"]) for row in rows}
    fold = probe.folds([trace.problem_id for trace in traces], e.analysis.folds, e.seed)
    left_out = fold == fold[[trace.problem_id for trace in traces].index(only)]
    problems = {trace.problem_id for trace, out in zip(traces, left_out, strict=True) if not out}
    assert found["base-derived direction"] == (len(problems), 2 * int((~left_out).sum()), int((~left_out).sum()))
    assert found["random directions"] == (len({trace.problem_id for trace in traces}), 2 * len(traces), len(traces))


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


def test_no_artifact_holds_a_place_or_a_secret(fresh: Path, tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {"OPENAI_API_KEY": "sk-a3f9c1", "HF_TOKEN": "hf_77ab12", "USER": "somebody-7c1e"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    run(tiny.get_config(), "1", "2", "3")
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


def test_strength_zero_is_unsteered(finished: Path) -> None:
    """T29: every kind at length 0 gives the unsteered tokens, through the same compiled program as all other rows."""
    made = pipeline.Run(tiny.get_config())
    e = made.experiment
    readings = steering.load_readings(made.context)
    built = conditions.Interventions(readings, 3, 16, "all")
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
