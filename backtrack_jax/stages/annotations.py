"""Stage 2: labelled sections of every trace.

    annotations.jsonl   sections placed in the original traces
    summary.txt         counts by label; what was rejected and why

The judge `openai` keeps every answer in a ledger outside of the stage's folder, so that neither a killed run nor
another config, nor a deleted result, makes the same question be paid for again.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from backtrack_jax import inputs, labelling
from backtrack_jax.config import Experiment
from backtrack_jax.data import annotations as labels
from backtrack_jax.data import records
from backtrack_jax.data.records import Annotation, Note, Rejection, Trace
from backtrack_jax.data.text import reasoning_end
from backtrack_jax.files import store
from backtrack_jax.files.console import say
from backtrack_jax.inputs import data_path
from backtrack_jax.stages import estimates
from backtrack_jax.stages.base import Context, Settled, Stage
from backtrack_jax.stages.traces import TRACES, ids_at_source

_ANNOTATIONS, _SUMMARY = "annotations.jsonl", "summary.txt"


class AnnotationsStage(Stage):
    """Labels the sections of every trace and reports what could not be placed."""

    name = "2-annotations"
    reads_vectors = False

    def inputs(self, e: Experiment) -> dict[str, Any]:
        """The judge, and what its labels depend on."""
        return {"annotations": {"judge": e.judge} | labelling.judge_inputs(e, e.judge)}

    def settle(self, e: Experiment, own: dict[str, Any], found: Settled) -> dict[str, Any]:
        """Labels that may have gaps are other inputs than those without; see `settle_gaps`."""
        return settle_gaps(e, e.judge, own, found, _ANNOTATIONS)

    def prepare(self, context: Context) -> None:
        """Key and ledger of the online judge, before the first stage, which may take hours."""
        labelling.prepare(context.experiment, context.experiment.judge)

    def plan(self, context: Context) -> list[str]:
        """Calls, tokens and cost of asking a judge; of the others, how much there is to label."""
        e = context.experiment
        if e.judge != "openai":
            lengths = estimates.trace_lengths(e)
            return [f"{len(lengths)} traces, about {sum(lengths):,} tokens, by {e.judge}; no calls, no model is held"]
        if traces := _traces_to_label(context):
            return labelling.asking(e, traces)
        sampled = [(problem, sample) for problem in inputs.problems(e) for sample in range(e.traces.samples)]
        return labelling.asking_unsampled(e, sampled, e.traces.max_new_tokens)

    def run(self, context: Context, folder: Path) -> None:
        """Labels, or places labels that came with the traces."""
        e = context.experiment
        source = context.folder(TRACES)
        traces = TRACES.read(source)
        if e.judge == "import":
            annotated = _imported(e, traces)
        elif e.judge == "released":
            annotated = _released(e, traces, TRACES.read_labels(source))
        else:
            annotated = labelling.judged(e, e.judge, traces)
        records.pair_annotations(traces, annotated)  # raises where a span does not fit its trace
        records.write_jsonl(folder / _ANNOTATIONS, annotated)
        table = labels.format_summary(labels.summarise(annotated))
        store.write_text(folder / _SUMMARY, table + "\n")
        say("\n".join("  " + line for line in table.split("\n")))

    def read(self, folder: Path) -> list[Annotation]:
        """The annotations in its folder."""
        return records.read_annotations(folder / _ANNOTATIONS)

    def read_summary(self, folder: Path) -> str:
        """Counts by label and reason, as text."""
        return (folder / _SUMMARY).read_text("utf-8")


ANNOTATIONS = AnnotationsStage()


def read_pairs(context: Context) -> list[tuple[Trace, Annotation]]:
    """The traces of a run with their annotations."""
    traces, annotated = TRACES.read(context.folder(TRACES)), ANNOTATIONS.read(context.folder(ANNOTATIONS))
    return records.pair_annotations(traces, annotated)


def settle_gaps(e: Experiment, judge: str, own: dict[str, Any], found: Settled, file: str) -> dict[str, Any]:
    """Inputs under which labels may have gaps, where that is allowed or results without gaps are there.

    So `allow_unanswered` changes nothing where every call was answered, and without it the gaps are asked for, and
    whatever was read off traces with gaps is read anew.

    Args:
      e: the experiment.
      judge: who labels.
      own: inputs of labels without gaps.
      found: folder of results that are complete under given inputs.
      file: of the annotations in it.
    """
    if judge != "openai" or found(own):
        return own
    with_gaps = own | {"unanswered": "allowed"}
    folder = found(with_gaps)
    allowed = e.annotations.openai.allow_unanswered or (folder and not labelling.has_gaps(folder / file))
    return with_gaps if allowed else own


def _traces_to_label(context: Context) -> list[Trace]:
    """The traces of stage 1, if they are there or can be imported; none if they are still to be sampled."""
    if folder := context.finished(TRACES):
        return TRACES.read(folder)
    return estimates.imported_traces(context.experiment) if context.experiment.traces.path else []


def _imported(e: Experiment, traces: Sequence[Trace]) -> list[Annotation]:
    """Labels of the file for the traces that `traces.limit` took, those behind the end of the reasoning as rejections.

    ValueError where a trace is not among its source, or a span is none of its trace.
    """
    annotated = records.read_annotations(data_path(e.annotations.path))
    taken = {trace.id for trace in traces}
    kept = [annotation for annotation in annotated if annotation.trace_id in taken]
    if len(kept) < len(annotated):
        _check_left_out(e, annotated, len(kept))
    pairs = records.pair_annotations(traces, kept)
    starts = [(trace.text, section.start) for trace, annotation in pairs for section in annotation.sections]
    if inside := sum(_inside_word(text, start) for text, start in starts):
        say(f"  {inside} of {len(starts)} sections start inside a word; spans count characters, not bytes")
    return [_within_reasoning(trace, annotation) for trace, annotation in pairs]


def _inside_word(text: str, position: int) -> bool:
    # Letters with upper and lower case: scripts without, such as Chinese, have no spaces between words.
    return position > 0 and all(c.lower() != c.upper() for c in text[position - 1 : position + 1])


def _within_reasoning(trace: Trace, annotation: Annotation) -> Annotation:
    """The annotation with its sections behind the end of the reasoning, which no vector is made of, as rejections."""
    end = reasoning_end(trace.text)
    kept = [index for index, section in enumerate(annotation.sections) if section.start < end]
    return Annotation(
        annotation.trace_id,
        annotation.judge,
        tuple(annotation.sections[index] for index in kept),
        annotation.rejected
        + tuple(
            Rejection(labels.Reason.AFTER_END, section.label, trace.text[section.start : section.stop])
            for section in annotation.sections
            if section.start >= end
        ),
        tuple(Note(note.code, kept.index(note.section)) for note in annotation.notes if note.section in kept),
    )


def _check_left_out(e: Experiment, annotated: Sequence[Annotation], n_kept: int) -> None:
    """Says how many annotations are left out; ValueError where one is of no trace of the source."""
    source = ids_at_source(e)
    if unknown := [annotation.trace_id for annotation in annotated if annotation.trace_id not in source]:
        raise ValueError(
            f"{e.annotations.path}: annotation of trace {unknown[0]!r}, which is not among the {len(source)} traces of "
            f"{e.traces.path or 'this sampling'}"
        )
    say(f"  {len(annotated) - n_kept} of {len(annotated)} annotations left out: of traces that traces.limit left out")


def _released(e: Experiment, traces: Sequence[Trace], labelled: Mapping[str, str] | None) -> list[Annotation]:
    if labelled is None:
        raise ValueError(f"annotations.judge='released', but {e.traces.path} holds traces without labels")
    return [labels.align(trace, labelled[trace.id]) for trace in traces]
