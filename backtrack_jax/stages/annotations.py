"""Stage 2: labelled sections of every trace.

The judge `openai` keeps every answer in a ledger outside of the stage's folder, so that neither a killed run nor
another config, nor a deleted result, makes the same question be paid for again.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from backtrack_jax.config import Experiment
from backtrack_jax.data import annotations as labels
from backtrack_jax.data import records
from backtrack_jax.data.records import OTHER, Annotation, Note, Rejection, Trace, failure
from backtrack_jax.files import store
from backtrack_jax.files.console import Progress, say
from backtrack_jax.inputs import data_path
from backtrack_jax.judges import keyword
from backtrack_jax.judges.openai.settings import UNANSWERED, JudgeStopped, Meter
from backtrack_jax.organism import judge as grammar
from backtrack_jax.stages.traces import ids_at_source

if TYPE_CHECKING:
    from backtrack_jax.pipeline import Run


def ledger_path(e: Experiment) -> Path:
    """File of the online judge's answers; the same for all experiments of a `workdir` unless one is named."""
    named = e.annotations.openai.ledger
    return Path(named).expanduser() if named else Path(e.workdir).expanduser() / "judge-ledger.jsonl"


def annotate(run: "Run", folder: Path) -> None:
    """Stage 2: labels the sections of every trace and reports what could not be placed."""
    e, source = run.experiment, run.folder("1-traces")
    traces = records.read_traces(source / "traces.jsonl")
    if e.judge == "import":
        annotated = _imported(e, traces)
    elif e.judge == "released":
        annotated = _released(e, traces, source / "labelled.jsonl")
    else:
        annotated = judged(e, e.judge, traces)
    records.pair_annotations(traces, annotated)  # raises where a span does not fit its trace
    records.write_jsonl(folder / "annotations.jsonl", annotated)
    table = labels.format_summary(labels.summarise(annotated))
    store.write_text(folder / "summary.txt", table + "\n")
    say("\n".join("  " + line for line in table.split("\n")))


def judged(e: Experiment, judge: str, traces: Sequence[Trace]) -> list[Annotation]:
    """Traces as a judge that reads them labels them: `keyword`, `grammar` or `openai`, as the experiment sets it up."""
    if judge == "keyword":
        return [keyword.annotate(trace, e.annotations.variant) for trace in traces]
    if judge == "grammar":
        found = [grammar.annotate(trace) for trace in traces]
        if not any(section.label != OTHER for annotation in found for section in annotation.sections):
            raise ValueError(
                f"judge='grammar': no sentence of {len(traces)} texts is one of the small pair's, and it knows no "
                "others; expected another judge, such as 'keyword' or 'openai'"
            )
        return found
    return _ask(e, traces)


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
    end = labels.reasoning_end(trace.text)
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


def _released(e: Experiment, traces: Sequence[Trace], file: Path) -> list[Annotation]:
    if not file.exists():
        raise ValueError(f"annotations.judge='released', but {e.traces.path} holds traces without labels")
    labelled = {line["trace_id"]: line["annotated"] for line in store.read_lines(file)}
    return [labels.align(trace, labelled[trace.id]) for trace in traces]


def _ask(e: Experiment, traces: Sequence[Trace]) -> list[Annotation]:
    """Labels by the online judge, in the order of the traces."""
    from backtrack_jax.judges.openai.judge import Labelled, label_traces  # its package takes a second to import

    spec = e.annotations.openai
    done: dict[str, Annotation] = {}
    tokens = 0
    with Progress(f"  asking {spec.model}", len(traces)) as progress:

        def on_done(labelled: Labelled, meter: Meter) -> None:
            nonlocal tokens
            done[labelled.annotation.trace_id] = labelled.annotation
            before, tokens = tokens, meter.prompt_tokens + meter.completion_tokens
            cost = "" if meter.cost is None else f"${meter.cost:.4f}"
            progress.update(1, tokens - before, note=cost, earlier=not meter.paid)

        meter = label_traces(
            traces, spec.prompt(), spec.settings(), ledger_path(e), votes=spec.votes, reask=spec.reask, on_done=on_done
        )
    say(f"  {meter}")
    annotated = [done[trace.id] for trace in traces]
    _check_answered(annotated, spec.allow_unanswered)
    return annotated


def _check_answered(annotated: Sequence[Annotation], allowed: bool) -> None:
    """Stops where no trace is labelled, and where calls got no answer, for which nothing was paid.

    A single request that was refused as such will be refused again: its trace stays without labels.
    """
    failed = [(why, annotation.rejected[0].text) for annotation in annotated if (why := failure(annotation))]
    unanswered = [(why, text) for why, text in failed if why in UNANSWERED]
    if failed and len(failed) == len(annotated):
        raise JudgeStopped(
            f"the judge labelled none of {len(annotated)} traces ({_counts(failed)}); its first answer or error: "
            f"{failed[0][1]!r}. Check its model, format and limits; what was paid for is kept"
        )
    if unanswered and not allowed:
        raise JudgeStopped(
            f"{len(unanswered)} of {len(annotated)} traces got no answer from the judge ({_counts(unanswered)}). The "
            "others are kept: the same command asks for these alone, or goes on without them, counted as failed, with "
            "--config.annotations.openai.allow_unanswered=True"
        )


def _counts(failed: Sequence[tuple[str, str]]) -> str:
    return ", ".join(f"{count} {why}" for why, count in Counter(why for why, _ in failed).most_common())
