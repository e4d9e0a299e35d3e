"""Stage 2: labelled sections of every trace.

    annotations.jsonl   sections placed in the original traces
    summary.txt         counts by label; what was rejected and why

The judge `openai` keeps every answer in a ledger outside of the stage's folder, so that neither a killed run nor
another config, nor a deleted result, makes the same question be paid for again.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from backtrack_jax import inputs, labelling
from backtrack_jax.config import Experiment
from backtrack_jax.data import annotations as labels
from backtrack_jax.data import records
from backtrack_jax.data.records import Annotation, Trace
from backtrack_jax.files import store
from backtrack_jax.files.console import say
from backtrack_jax.judges.base import Judge
from backtrack_jax.stages import estimates
from backtrack_jax.stages.base import Context, Settled, Stage
from backtrack_jax.stages.traces import TRACES

_ANNOTATIONS, _SUMMARY = "annotations.jsonl", "summary.txt"


class AnnotationsStage(Stage):
    """Labels the sections of every trace and reports what could not be placed."""

    name = "2-annotations"
    reads_vectors = False

    def inputs(self, e: Experiment) -> dict[str, Any]:
        """The judge, and what its labels depend on."""
        judge = labelling.judge_of(e)
        return {"annotations": {"judge": judge.name} | judge.inputs(e)}

    def settle(self, e: Experiment, own: dict[str, Any], found: Settled) -> dict[str, Any]:
        """Labels that may have gaps are other inputs than those without."""
        return labelling.judge_of(e).settle(e, own, found, _ANNOTATIONS)

    def prepare(self, context: Context) -> None:
        """What the judge needs, such as a key, before the first stage, which may take hours."""
        labelling.judge_of(context.experiment).prepare(context.experiment)

    def plan(self, context: Context) -> list[str]:
        """The judge's own estimate if it has one; else how much there is to label."""
        e = context.experiment
        judge = labelling.judge_of(e)
        if traces := _traces_to_label(context):
            lines = judge.plan(e, traces)
        else:
            asked = [(problem, sample) for problem in inputs.problems(e) for sample in range(e.traces.samples)]
            lines = estimates.judging(e, judge, asked, e.traces.max_new_tokens)
        if lines:
            return lines
        lengths = estimates.trace_lengths(e)
        return [f"{len(lengths)} traces, about {sum(lengths):,} tokens, by {judge.name}; no calls, no model is held"]

    def run(self, context: Context, folder: Path) -> None:
        """Has the judge label the traces."""
        e = context.experiment
        source = context.folder(TRACES)
        traces = TRACES.read(source)
        judge, came_with = labelling.judge_of(e), TRACES.read_labels(source)
        annotated = judge.annotate(e, traces) if came_with is None else judge.annotate_labelled(e, traces, came_with)
        records.pair_annotations(traces, annotated)  # raises where a span does not fit its trace
        _check_labels(judge, annotated)
        records.write_jsonl(folder / _ANNOTATIONS, annotated)
        table = labels.format_summary(labels.summarise(annotated)) + "\n" + _covered(traces, annotated)
        store.write_text(folder / _SUMMARY, table + "\n")
        say("\n".join("  " + line for line in table.split("\n")))

    def read(self, folder: Path) -> list[Annotation]:
        """The annotations in its folder."""
        return records.read_annotations(folder / _ANNOTATIONS)

    def read_summary(self, folder: Path) -> str:
        """Counts by label and reason, as text."""
        return (folder / _SUMMARY).read_text("utf-8")


ANNOTATIONS = AnnotationsStage()


def _check_labels(judge: Judge, annotated: Sequence[Annotation]) -> None:
    """ValueError for a label that the judge says it never gives: a config is checked against these."""
    given = {section.label for annotation in annotated for section in annotation.sections}
    if judge.labels is not None and (others := sorted(given - set(judge.labels))):
        raise ValueError(f"the judge {judge.name!r} gave the label {others[0]!r}, its labels are {judge.labels}")


def read_pairs(context: Context) -> list[tuple[Trace, Annotation]]:
    """The traces of a run with their annotations."""
    traces, annotated = TRACES.read(context.folder(TRACES)), ANNOTATIONS.read(context.folder(ANNOTATIONS))
    return records.pair_annotations(traces, annotated)


def _covered(traces: Sequence[Trace], annotated: Sequence[Annotation]) -> str:
    """How much of the traces is labelled, and where least is, in words."""
    shares = {
        trace.id: labels.coverage(trace, annotation)
        for trace, annotation in records.pair_annotations(traces, annotated)
        if records.failure(annotation) is None
    }
    if not shares:
        return "sentences labelled: none"
    least = min(shares, key=lambda name: shares[name])
    mean = sum(shares.values()) / len(shares)
    return (
        f"sentences labelled: {100 * mean:.1f} % on average over traces, at least {100 * shares[least]:.1f} % ({least})"
    )


def _traces_to_label(context: Context) -> list[Trace]:
    """The traces of stage 1, if they are there or can be imported; none if they are still to be sampled."""
    if folder := context.finished(TRACES):
        return TRACES.read(folder)
    return estimates.imported_traces(context.experiment) if context.experiment.traces.path else []
