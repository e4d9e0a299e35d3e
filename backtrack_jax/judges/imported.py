"""Labels from a file: somebody else's, or those of another run."""

from collections.abc import Sequence
from typing import Any

from backtrack_jax.config import Experiment
from backtrack_jax.data import records
from backtrack_jax.data.annotations import Reason
from backtrack_jax.data.problems import problems_at
from backtrack_jax.data.records import Annotation, Note, Rejection, Trace
from backtrack_jax.data.text import reasoning_end
from backtrack_jax.files import store
from backtrack_jax.files.console import say
from backtrack_jax.files.paths import data_path
from backtrack_jax.judges.base import Judge


class ImportJudge(Judge):
    """Takes the labels of a file of annotations."""

    name = "import"
    reads_text = False
    on_replies = False
    reads_path = True

    def faults(self, e: Experiment) -> list[str]:
        """No file."""
        if e.annotations.path:
            return []
        return ["annotations.path='', expected a .jsonl of annotations, for annotations.judge='import'"]

    def inputs(self, e: Experiment) -> dict[str, Any]:
        """The file by content."""
        return {"file": store.file_hash(data_path(e.annotations.path))}

    def annotate(self, e: Experiment, traces: Sequence[Trace]) -> list[Annotation]:
        """Labels of the traces that `traces.limit` took, those behind the end of the reasoning as rejections.

        Raises:
          ValueError: a label of a trace that is not among its source, or of what is not a span of its text.
        """
        annotated = records.read_annotations(data_path(e.annotations.path))
        taken = {trace.id for trace in traces}
        kept = [annotation for annotation in annotated if annotation.trace_id in taken]
        if len(kept) < len(annotated):
            _check_left_out(e, annotated, len(kept))
        pairs = records.pair_annotations(traces, kept)
        starts = [(trace.text, section.start) for trace, annotation in pairs for section in annotation.sections]
        if inside := sum(_splits_letters(text, start) for text, start in starts):
            say(f"  {inside} of {len(starts)} sections start inside a word; spans count characters, not bytes")
        return [_within_reasoning(trace, annotation) for trace, annotation in pairs]


JUDGE = ImportJudge()


def _splits_letters(text: str, position: int) -> bool:
    """Whether a position is between two letters that have upper and lower case.

    Scripts without them, such as Chinese, have no spaces between words: there a section may start anywhere.
    """
    return position > 0 and all(c.lower() != c.upper() for c in text[position - 1 : position + 1])


def _within_reasoning(trace: Trace, annotation: Annotation) -> Annotation:
    """The annotation with its sections behind the end of the reasoning, which no vector is made of, as rejections."""
    end = reasoning_end(trace.text, trace.end_marks)
    kept = [index for index, section in enumerate(annotation.sections) if section.start < end]
    return Annotation(
        annotation.trace_id,
        annotation.judge,
        tuple(annotation.sections[index] for index in kept),
        annotation.rejected
        + tuple(
            Rejection(Reason.AFTER_END, section.label, trace.text[section.start : section.stop])
            for section in annotation.sections
            if section.start >= end
        ),
        tuple(Note(note.code, kept.index(note.section)) for note in annotation.notes if note.section in kept),
    )


def _check_left_out(e: Experiment, annotated: Sequence[Annotation], n_kept: int) -> None:
    """Says how many annotations are left out; ValueError if one is of a trace that the source does not have."""
    source = _ids_at_source(e)
    if unknown := [annotation.trace_id for annotation in annotated if annotation.trace_id not in source]:
        raise ValueError(
            f"{e.annotations.path}: annotation of trace {unknown[0]!r}, which is not among the {len(source)} traces of "
            f"{e.traces.path or 'this sampling'}"
        )
    say(f"  {len(annotated) - n_kept} of {len(annotated)} annotations left out: traces.limit leaves out their traces")


def _ids_at_source(e: Experiment) -> set[str]:
    """Ids of all traces that `traces.limit` takes from, those that it leaves out too."""
    if e.traces.path:
        return {trace.id for trace in records.read_any_traces(data_path(e.traces.path))}
    problems = problems_at(e.traces.problems)
    return {f"{problem.id}/{sample}" for problem in problems for sample in range(e.traces.samples)}
