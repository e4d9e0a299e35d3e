"""What is done again after a change of config, files or seed, and what is not."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import toys
from runs import CELL, ROLES, STAGES, contents, done, lines_of, run, set_at

from backtrack_jax import inputs, pipeline, plan
from backtrack_jax.config import Experiment
from backtrack_jax.files import store
from backtrack_jax.models import checkpoint
from backtrack_jax.stages.base import Context
from backtrack_jax.stages.traces import TRACES


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
        ("3-vectors/base.sums.safetensors", b"", r"base\.sums\.safetensors: damaged \(.*\); delete it to read again"),
        ("3-vectors/base.sums.safetensors", b"half" * 99, r"base\.sums\.safetensors: damaged"),
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


@pytest.mark.slow
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


def test_fields_that_were_not_there_leave_earlier_results_as_they_are(fresh: Path) -> None:
    """Their defaults are in no fingerprint, and no replacement is still what it was while it was an id."""
    e = tiny.get_config()
    assert inputs.model_inputs(e, "base").items() >= {"markers": "drop", "marker_replacement": -1}.items()
    assert inputs.prompt_inputs(e).keys() == {"format", "think", "system", "tokenizer"}
    assert TRACES.inputs(e)["traces"].keys() == {"file", "limit"}
    e.traces.path = ""
    sampling = {"samples", "temperature", "top_p", "max_new_tokens", "problems"}
    assert TRACES.inputs(e)["traces"].keys() == sampling
    e.base.markers, e.base.marker_replacement = "replace", " so"
    e.prompt.template_arguments, e.traces.end_marks = "{}", ("</reasoning>",)
    assert inputs.model_inputs(e, "base")["marker_replacement"] == " so"
    assert "template_arguments" in inputs.prompt_inputs(e) and "end_marks" in TRACES.inputs(e)["traces"]


@pytest.mark.parametrize(
    ("change", "stage", "named"),
    [
        (lambda e: set_at(e.vectors, "window", (-4, -1)), "3-vectors", "vectors.window"),
        (lambda e: set_at(e.vectors, "contrast", "rest"), "3-vectors", "vectors.contrast"),
        (lambda e: set_at(e.base, "markers", "keep"), "3-vectors", "models.base.markers"),
        (lambda e: set_at(e.traces, "end_marks", ("</reasoning>",)), "1-traces", "traces.end_marks"),
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


def test_the_order_of_roles_changes_nothing(finished: Path) -> None:
    """Conditions are numbered in their order, and a resumed stage goes by the numbers."""
    e = tiny.get_config()
    e.roles = ("reasoning", "base")
    turned = pipeline.Run(e)
    assert turned.experiment.roles == ROLES and turned.inputs == pipeline.Run(tiny.get_config()).inputs
    assert done(turned) == list(STAGES)


# What is stale: results that stand on others than those that are in place


def toy_run(seed: int, *wanted: str) -> pipeline.Run:
    e = tiny.get_config()
    e.traces.limit, e.seed = 3, seed
    made = pipeline.Run(e, wanted, stages=toys.TOYS)
    made.run()
    return made


def test_a_stage_that_runs_alone_leaves_later_ones_stale_until_they_run(
    fresh: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toy_run(4)
    page = fresh / "3-page"
    before = contents(page)
    assert before.keys() == {"DONE", "inputs.json", "page.txt"}
    capsys.readouterr()
    made = toy_run(5, "2-count")
    reason = "made from results of 2-count that have been replaced"
    said = f"stale, {reason}: 3-page; bring up to date with --stages=3\n"
    assert said in capsys.readouterr().err
    assert done(made) == ["1-words", "2-count"]
    # What the stale results are, and of which inputs, stays as it was.
    assert contents(page) == before | {"STALE": f"{reason}\n".encode(), ".notice": reason.encode()}
    toy_run(5, "1-words")
    assert said in capsys.readouterr().err  # as long as it is so
    assert contents(page)["STALE"]
    toy_run(5, "3-page")
    assert "stale" not in capsys.readouterr().err
    assert (page / "page.txt").read_text() == "8 words" and contents(page).keys() == before.keys()


def test_stale_results_whose_ground_comes_back_are_done_before(fresh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy_run(4)
    page = fresh / "3-page"
    before = contents(page)
    toy_run(5, "2-count")
    assert contents(page)["STALE"]
    capsys.readouterr()
    made = toy_run(4, "2-count")
    assert "stale" not in capsys.readouterr().err
    assert contents(page) == before | {".notice": b""}
    assert done(made) == ["1-words", "2-count", "3-page"]
    toy_run(4)
    assert capsys.readouterr().err.count("done before") == 3


def test_all_that_stands_on_replaced_results_is_stale(fresh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy_run(4)
    e = tiny.get_config()
    e.traces.limit, e.seed = 9, 4
    pipeline.Run(e, ("1-words",), stages=toys.TOYS).run()
    reason = "made from results of 1-words that have been replaced"
    assert f"stale, {reason}: 2-count, 3-page; bring up to date with --stages=2,3\n" in capsys.readouterr().err
    for stage in ("2-count", "3-page"):
        assert (fresh / stage / "STALE").read_text() == f"{reason}\n"
    pipeline.Run(e, ("2-count",), stages=toys.TOYS).run()  # and then the page is of another count
    assert not (fresh / "2-count" / "STALE").exists()
    assert "2-count that have been replaced" in (fresh / "3-page" / "STALE").read_text()


def test_stale_results_that_were_set_aside_come_back_without_the_mark(fresh: Path) -> None:
    toy_run(4)
    before = contents(fresh / "3-page")
    toy_run(5, "2-count")
    toy_run(5, "3-page")  # sets the stale page aside
    assert not (fresh / "3-page" / "STALE").exists()
    toy_run(4)
    assert contents(fresh / "3-page") == before | {".notice": b""}


def test_a_changed_sweep_alone_marks_analysis_and_page(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(finished)
    e = tiny.get_config()
    e.steering.layers = ()
    run(e, "4")
    reason = "made from results of 4-steering that have been replaced"
    assert f"stale, {reason}: 5-analysis, 6-report; bring up to date with --stages=5,6" in capsys.readouterr().err
    marks = {"5-analysis/STALE", "6-report/STALE", "6-report/.stale.js"}
    stale = contents(finished)
    assert {name for name in stale if name.endswith("STALE")} == marks - {"6-report/.stale.js"}
    # The page looks for this file beside it.
    assert stale["6-report/.stale.js"].decode() == f'window.staleReason = "{reason}";\n'
    assert b'<script src=".stale.js"></script>' in stale["6-report/report.html"]
    later = [name for name in before if name[0] in "56" and name not in marks]
    assert later and all(stale[name] == before[name] for name in later)
    run(tiny.get_config(), "4")
    assert "stale" not in capsys.readouterr().err
    assert {name: content for name, content in contents(finished).items() if name[0] in "123456"} == before


def test_a_run_of_another_name_takes_over_what_is_the_same(
    finished: Path, loaded: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Stages 1 to 3 of a run with another sweep, though the sweep alone is asked for."""
    e = tiny.get_config()
    e.name, e.steering.magnitudes = "other", (0.0, 5.0)
    before = contents(finished)
    made = pipeline.Run(e, STAGES[3:])
    assert done(made) == list(STAGES[:3])
    text = plan.describe(made)
    for stage in STAGES[:3]:
        assert f"{stage:<14} done: taken over from {finished.name}/{stage}\n" in text
    made.run()
    said = capsys.readouterr().err
    assert said.count("taken over from") >= 3 and said.count("done before") == 3
    other = finished.parent / "other"
    for stage in STAGES[:3]:
        assert contents(other / stage) == contents(finished / stage)
    assert contents(finished) == before
    (other / STAGES[0] / "traces.jsonl").unlink(missing_ok=True)
    assert contents(finished) == before


def test_what_is_redone_is_computed_again_and_what_was_there_is_kept(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(finished)
    made = pipeline.Run(tiny.get_config(), redo=["4-steering"])
    assert done(made) == list(STAGES[:3])
    assert "4-steering     to do: --redo; results so far are kept in superseded/" in plan.describe(made)
    made.run()
    assert capsys.readouterr().err.count("is redone; the results so far are in superseded/") == 3
    after = contents(finished)
    kept = {name: data for name, data in after.items() if "-redone-1/" in name}
    assert len({name.split("/")[1] for name in kept}) == 3
    assert {name: data for name, data in after.items() if name not in kept} == before
    assert done(pipeline.Run(tiny.get_config())) == list(STAGES)
    with pytest.raises(ValueError, match="--redo=1-traces is not among the stages that are run; add it to --stages"):
        pipeline.Run(tiny.get_config(), STAGES[3:], redo=["1-traces"])


def test_a_plan_says_why_a_stage_is_to_be_done(finished: Path) -> None:
    e = tiny.get_config()
    e.steering.top_k = 3
    text = plan.describe(pipeline.Run(e))
    assert "4-steering     to do: steering.top_k changed; the results that are there go to superseded/" in text
    assert "5-analysis     to do: an earlier stage changed; the results that are there go to superseded/" in text
    (finished / "6-report" / "report.html").unlink()
    text = plan.describe(pipeline.Run(tiny.get_config()))
    assert "6-report       to do: unfinished or damaged; it resumes where it left off" in text
