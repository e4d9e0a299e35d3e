"""Stages one by one, from other sources of traces and labels, and with vectors of one's own."""

import csv
import dataclasses
import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import toys
from runs import (
    STAGES,
    contents,
    csv_rows,
    done,
    edit_chains,
    few_conditions,
    lines_of,
    run,
)
from safetensors.numpy import load_file

from backtrack_jax import pipeline, plan, vectors
from backtrack_jax.config import ROLES, UNITS
from backtrack_jax.data import records
from backtrack_jax.models import prompts
from backtrack_jax.stages.annotations import ANNOTATIONS, read_pairs


def test_stage_names() -> None:
    assert pipeline.stage_names([]) == STAGES
    assert pipeline.stage_names(["vectors", "1", "6-report", "1-traces"]) == ("1-traces", "3-vectors", "6-report")
    with pytest.raises(ValueError, match=r"\['7', ''\] unknown; accepted: 1-traces, 2-annotations"):
        pipeline.stage_names(["7", "", "2"])


def test_marks_that_end_a_reasoning(fresh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """T8: one that is not known is named; in the config, it ends labels and tokens as `</think>` does."""

    def answered(chain: dict[str, str]) -> None:
        for field, answer in (
            ("reasoning_chain", "It is so, wait."),
            ("annotated_chain", '["deduction"]It is so, wait.'),
        ):
            chain[field] += f"\n</reasoning>\n{answer}"
        chain["annotated_chain"] += '["end-section"]'

    edit_chains(answered)
    e = tiny.get_config()
    run(e, "1", "2")
    n = len(tiny.TASKS)
    warning = f"WARNING: {n - 1} of {n} traces hold '</reasoning>', which is not known to end a reasoning"
    assert warning in capsys.readouterr().err  # one of the chains ends before it
    traces = fresh / "1-traces" / "traces.jsonl"
    assert "end_marks" not in traces.read_text("utf-8")
    e.traces.end_marks = ("</reasoning>",)
    made = run(e, "1", "2")
    assert "WARNING" not in capsys.readouterr().err
    for trace, annotation in records.pair_annotations(
        records.read_traces(traces), ANNOTATIONS.read(fresh / ANNOTATIONS.name)
    ):
        assert trace.end_marks == ("</reasoning>",)
        assert all("It is so, wait" not in trace.text[s.start : s.stop] for s in annotation.sections)
        assert "after_end" in {rejection.reason for rejection in annotation.rejected}
        for role in ROLES:
            read = made.context.token_trace(role, trace, annotation)
            assert "reasoning>" not in made.context.tokenizer.decode(read.ids)


def test_any_list_of_stages_runs(fresh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The pipeline knows order, fingerprints and folders; what a stage is called, reads and writes, it does not."""
    e = tiny.get_config()
    e.traces.limit, e.seed = 3, 4
    made = pipeline.Run(e, stages=toys.TOYS)
    assert plan.describe(made).splitlines()[1:] == [
        "1-words        to do",
        "  3 words",
        "2-count        to do",
        "  a sum",
        "3-page         to do",
        "  a line",
    ]
    assert not fresh.exists()
    made.run()
    assert capsys.readouterr().err.endswith("results are in results/tiny/3-page/page.txt\n")
    assert sorted(path.name for path in fresh.iterdir() if path.is_dir()) == ["1-words", "2-count", "3-page"]
    assert (fresh / "3-page" / "page.txt").read_text() == "7 words"
    assert done(made) == ["1-words", "2-count", "3-page"]
    e.seed = 5
    made = pipeline.Run(e, stages=toys.TOYS)
    assert done(made) == ["1-words"]
    made.run()
    said = capsys.readouterr().err
    assert "1-words: done before" in said and "2-count: runs again, since seed changed" in said
    assert (fresh / "3-page" / "page.txt").read_text() == "8 words"


def test_a_list_of_stages_is_chosen_from_like_that_of_the_paper(fresh: Path) -> None:
    e = tiny.get_config()
    with pytest.raises(ValueError, match="3-page builds on 1-words, which is not done for this config"):
        pipeline.Run(e, ("3-page",), stages=toys.TOYS).run()
    assert pipeline.stage_names(["count", "1"], toys.TOYS) == ("1-words", "2-count")
    with pytest.raises(ValueError, match=r"\['steering'\] unknown; accepted: 1-words, 2-count, 3-page"):
        pipeline.stage_names(["steering"], toys.TOYS)
    pipeline.Run(e, ("1-words", "2-count"), stages=toys.TOYS).run()
    assert not (fresh / "3-page").exists()


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


def test_the_probe_takes_no_label_for_no_backtracking(fresh: Path) -> None:
    unlabelled = {"verbal_1", "verbal_3", "spatial_2"}
    edit_chains(lambda chain: chain["task_id"] in unlabelled and chain.update(annotated_chain=""))
    run(few_conditions(), "1", "2", "3", "4", "5")
    for row in csv_rows("reasoning.probe.csv"):
        assert row["method"] != "random directions" or int(row["n_problems"]) == len(tiny.TASKS) - len(unlabelled)


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
        e.steering.magnitudes = (0.0, -0.01, 0.03) if unit == "kl" else (0.0, -4.0, 8.0)
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
    e.steering.unit, e.steering.magnitudes = "raw", (0.0, -4.0, 8.0)
    run(e)
    assert "mine.npz" in (finished / "6-report" / "fig4_baselines.csv").read_text()
    vectors.save(-vector, Path("mine.npz"))  # another content under the same name
    assert done(pipeline.Run(e)) == ["1-traces", "2-annotations", "3-vectors"]


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


@pytest.mark.slow
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
    assert "probe and reliability cover vectors.layers=(1, 2) only; add steering.layer=0 to it" in said
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


def test_a_model_is_not_read_beyond_its_context_silently(fresh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Qwen2.5-Math was trained to 4,096 positions, its distill to 131,072."""
    path = Path("base") / "config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {"max_position_embeddings": 20}))
    e = tiny.get_config()
    assert "the base model was trained for 20 positions" in plan.describe(pipeline.Run(e))
    path.write_text(json.dumps(fields | {"max_position_embeddings": 100}))
    made = run(e, "1", "2", "3")
    said = [line for line in capsys.readouterr().err.splitlines() if "trained for" in line]
    assert len(said) == 1
    lengths = [len(made.context.token_trace("base", *pair).ids) for pair in read_pairs(made.context)]
    over = [length for length in lengths if length > 100]
    assert 0 < len(over) < len(lengths)
    assert f"100 positions; {len(over)} of {len(lengths)} sequences are longer, up to {max(over)} tokens" in said[0]
