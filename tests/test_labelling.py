"""The list of judges: what a config may name, and a judge of one's own, which takes a class and a line there."""

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny

from backtrack_jax import checks, labelling, pipeline, plan
from backtrack_jax.config import Experiment
from backtrack_jax.data.records import OTHER, Annotation, Trace
from backtrack_jax.judges.base import Judge
from backtrack_jax.stages import estimates
from backtrack_jax.stages.annotations import ANNOTATIONS

ROOT = Path(__file__).parents[1]
STAGES = ("1-traces", "2-annotations")


class DearJudge(Judge):
    """One that says what it costs, and labels nothing."""

    name = "dear"
    reads_text = False

    def faults(self, e: Experiment) -> list[str]:
        return first_word().faults(e)

    def plan(self, e: Experiment, traces: Sequence[Trace]) -> list[str]:
        return [f"{self.name}, by the word {e.annotations.variant}", f"${len(traces)}"]

    def annotate(self, e: Experiment, traces: Sequence[Trace]) -> list[Annotation]:
        return [Annotation(trace.id, self.name, ()) for trace in traces]


@functools.cache
def first_word() -> Judge:
    """The judge that the documentation adds."""
    (code, *_) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "howto" / "judge.md").read_text(), re.DOTALL)
    namespace: dict[str, Any] = {}
    exec(compile(code, "judge.md", "exec"), namespace)
    return namespace["JUDGE"]


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """The two are in the list; the experiment names the first."""
    monkeypatch.chdir(tmp_path_factory.mktemp("place"))
    tiny.write(Path.cwd())
    monkeypatch.setattr(labelling, "JUDGES", (*labelling.JUDGES, first_word(), DearJudge()))
    e = tiny.get_config()
    e.annotations.judge, e.annotations.variant = "first-word", "Wait"
    e.steering.kinds, e.steering.baselines = ("backtracking",), ("noise",)
    return e


def test_names_that_a_config_may_hold() -> None:
    alone = tuple(judge.name for judge in labelling.JUDGES)
    combined = tuple(f"released-or-{judge.name}" for judge in labelling.JUDGES if judge.reads_text)
    assert labelling.trace_judges() == (*alone, *combined)
    assert set(alone) >= {"released", "keyword", "grammar", "openai", "import"}
    assert {"released-or-released", "released-or-import"}.isdisjoint(combined) and "released-or-keyword" in combined
    assert {"", "grammar", "openai"} <= set(labelling.reply_judges()) and "keyword" not in labelling.reply_judges()
    e = tiny.get_config()
    for name, resolved in (*zip(alone, alone, strict=True), *((name, "released") for name in combined)):
        e.annotations.judge = name
        assert labelling.judge_of(e).name == resolved
    e.analysis.judge = "grammar"
    assert (judge := labelling.judge_of_replies(e)) and judge.name == "grammar"
    e.annotations.judge = "human"
    with pytest.raises(ValueError, match=f"unknown judge 'human'; accepted: {', '.join(alone)}"):
        labelling.judge_of(e)


def test_a_new_judge_is_checked_as_any_other(registered: Experiment) -> None:
    e = registered
    checks.check(e)
    e.analysis.judge = "dear"
    checks.check(e)
    e.annotations.judge, e.traces.path = "released-or-first-word", ""
    checks.check(e)
    assert labelling.judge_of(e).name == "first-word"
    for name, value, message in (
        ("annotations.judge", "released-or-dear", "released-or-openai, .*released-or-first-word$"),  # it reads no text
        ("annotations.judge", "second-word", "import, .*first-word, dear, released-or-keyword"),
        ("annotations.variant", "", r"annotations\.variant='', expected a word"),
        ("annotations.path", "x.jsonl", r"annotations\.path='x\.jsonl', expected '', or .*'import'"),
        ("steering.kinds", ("deduction",), r"steering\.kinds='deduction', expected one of backtracking, other, "),
        ("analysis.judge", "keyword", "expected one of , .*grammar, openai, .*first-word, dear$"),
    ):
        spec, field = name.split(".")
        before = getattr(getattr(e, spec), field)
        setattr(getattr(e, spec), field, value)
        with pytest.raises(ValueError, match=message) as error:
            checks.check(e)
        assert len(str(error.value).splitlines()) == 2, str(error.value)  # once, though `dear` has the same faults
        setattr(getattr(e, spec), field, before)


def test_a_new_judge_labels_in_stage_2(registered: Experiment) -> None:
    e = registered
    run = pipeline.Run(e, STAGES)
    assert "12 traces, about " in plan.describe(run) and "by first-word; no calls, no model is held" in plan.describe(
        run
    )
    run.run()
    labelled = ANNOTATIONS.read(run.context.folder(ANNOTATIONS))
    assert len(labelled) == 12 and {annotation.judge for annotation in labelled} == {"first-word"}
    assert {section.label for annotation in labelled for section in annotation.sections} == {"backtracking", OTHER}
    assert run.inputs["2-annotations"]["annotations"] == {"judge": "first-word", "word": "Wait"}
    e.annotations.variant = "So"
    assert not pipeline.Run(e, STAGES).done(ANNOTATIONS)


def test_what_a_new_judge_takes_is_in_the_plan(registered: Experiment) -> None:
    e = registered
    e.annotations.judge = e.analysis.judge = "dear"
    text = plan.describe(pipeline.Run(e))
    before, of_traces, of_replies = text.split("  dear, by the word Wait\n")
    assert before.endswith("2-annotations  to do\n") and of_traces.startswith("  $12\n")
    assumed = f"  as if every reply were {e.steering.max_new_tokens} tokens of reasoning, the most it can be:\n"
    assert of_replies.startswith(f"{assumed}  ${sum(estimates.steered_rows(e).values())}\n")
    e.traces.path, e.traces.samples, e.traces.limit = "", 2, 5
    text = plan.describe(pipeline.Run(e, STAGES))
    assert f"as if every reply were {e.traces.max_new_tokens} tokens of reasoning, the most it can be:\n  $10" in text


def test_the_results_tell_the_new_judge_from_others(registered: Experiment) -> None:
    """Labels of one judge are not taken for another's, and both are kept."""
    e = registered
    pipeline.Run(e, STAGES).run()
    e.annotations.judge = "keyword"
    e.annotations.variant = "wait"
    other = pipeline.Run(e, STAGES)
    assert not other.done(ANNOTATIONS)
    other.run()
    e.annotations.judge, e.annotations.variant = "first-word", "Wait"
    assert pipeline.Run(e, STAGES).done(ANNOTATIONS)
