"""Who labels: the judges of traces and of steered replies, as an experiment sets them up."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from backtrack_jax.config import Experiment
from backtrack_jax.data import records
from backtrack_jax.data.records import OTHER, Annotation, Trace, failure
from backtrack_jax.files import store
from backtrack_jax.files.console import Progress, say
from backtrack_jax.inputs import data_path
from backtrack_jax.judges import keyword
from backtrack_jax.judges.openai.ledger import read_entries
from backtrack_jax.judges.openai.settings import UNANSWERED, JudgeStopped, Meter, read_key
from backtrack_jax.organism import judge as grammar

CHARACTERS_PER_TOKEN = 4  # of English text, for estimates only
_CHARACTERS_PER_SENTENCE = 69  # measured on the released chains


def ledger_path(e: Experiment) -> Path:
    """File of the online judge's answers; the same for all experiments of a `workdir` unless one is named."""
    named = e.annotations.openai.ledger
    return Path(named).expanduser() if named else Path(e.workdir).expanduser() / "judge-ledger.jsonl"


def judge_inputs(e: Experiment, judge: str) -> dict[str, Any]:
    """What the labels depend on: of the online judge what is asked, not where, how fast or for how much."""
    spec = e.annotations
    if judge == "import":
        return {"file": store.file_hash(data_path(spec.path))}
    if judge == "keyword":
        return {"variant": spec.variant}
    if judge == "openai":
        asked = ("model", "temperature", "seed", "max_tokens", "extra_body", "votes", "reask")
        values = {name: getattr(spec.openai, name) for name in asked}
        return {"openai": values | {"prompt": spec.openai.prompt().hash}}
    return {}


def prepare(e: Experiment, judge: str) -> None:
    """Refuses what would stop the judge, before stages that may take hours."""
    if judge == "openai":
        read_key(e.annotations.openai.settings())
        read_entries(ledger_path(e))


def has_gaps(file: Path) -> bool:
    """Whether a call about a trace got no answer that a later one may get."""
    return any(failure(annotation) in UNANSWERED for annotation in records.read_annotations(file))


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


def asking(e: Experiment, traces: Sequence[records.Trace]) -> list[str]:
    """Calls, tokens and cost of asking the online judge about traces."""
    from backtrack_jax.judges.openai.judge import estimate  # its package takes a second to import

    spec = e.annotations.openai
    planned = estimate(traces, spec.prompt(), spec.settings(), ledger_path(e), spec.votes)
    head = f"judge: {spec.model} at {spec.base_url}, {spec.votes} vote(s) a trace, format {spec.format}"
    return [head, str(planned)]


def asking_unsampled(e: Experiment, sampled: Sequence[tuple[records.Problem, int]], tokens: int) -> list[str]:
    """The same for replies that are not sampled yet: as if each were as long as it can be, in usual sentences."""
    n = round(tokens * CHARACTERS_PER_TOKEN / _CHARACTERS_PER_SENTENCE)
    sentence = "X" * (_CHARACTERS_PER_SENTENCE - 2) + ". "
    head, planned = asking(
        e,
        [
            records.Trace(f"{p.id}-{i}/{sample}", p.id, p.category, p.problem, f"{i} {sample} {sentence * n}", sample)
            for i, (p, sample) in enumerate(sampled)
        ],
    )
    return [head, f"as if every reply were {tokens} tokens of reasoning, the most it can be:", planned]
