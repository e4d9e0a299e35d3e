"""The online judge as an experiment sets it up: its faults, what it depends on and costs, and labels with gaps.

Without the package that makes the calls, which takes a second to import, until there is something to ask.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from backtrack_jax.config import Experiment
from backtrack_jax.data import records
from backtrack_jax.data.records import LABELS, Annotation, Trace, failure
from backtrack_jax.files.console import Progress, say
from backtrack_jax.judges.base import Judge
from backtrack_jax.judges.openai import settings
from backtrack_jax.judges.openai.ledger import read_entries
from backtrack_jax.judges.openai.prompts import JudgePrompt
from backtrack_jax.judges.openai.settings import UNANSWERED, JudgeStopped, Meter


class OpenAIJudge(Judge):
    """Asks a language model behind an OpenAI-compatible endpoint."""

    name = "openai"
    labels = LABELS
    paid = True

    def title(self, e: Experiment) -> str:
        """The model that is asked."""
        return e.annotations.openai.model

    def faults(self, e: Experiment) -> list[str]:
        """Of the question, the endpoint and the limits."""
        spec = e.annotations.openai
        faults = [
            f"annotations.openai.{field}={getattr(spec, field)!r}, expected at least {least}"
            for field, least in (("votes", 1), ("reask", 0))
            if getattr(spec, field) < least
        ]
        for check in (JudgePrompt.of, settings.check):
            try:
                check(spec)
            except ValueError as error:
                faults.append(f"annotations.openai: {error}")
        return faults

    def inputs(self, e: Experiment) -> dict[str, Any]:
        """What is asked; not where, how fast or for how much."""
        spec = e.annotations.openai
        asked = ("model", "temperature", "seed", "max_tokens", "extra_body", "votes", "reask")
        values = {name: getattr(spec, name) for name in asked}
        return {"openai": values | {"prompt": JudgePrompt.of(spec).hash}}

    def prepare(self, e: Experiment) -> None:
        """The key is there, and the ledger can be read."""
        settings.check(e.annotations.openai)
        settings.read_key(e.annotations.openai)
        read_entries(ledger_path(e))

    def plan(self, e: Experiment, traces: Sequence[Trace]) -> list[str]:
        """Calls, tokens and cost."""
        from backtrack_jax.judges.openai.judge import estimate  # its package takes a second to import

        spec = e.annotations.openai
        head = f"judge: {spec.model} at {spec.base_url}, {spec.votes} vote(s) a trace, format {spec.format}"
        return [head, str(estimate(traces, spec, ledger_path(e)))]

    def settle(
        self, e: Experiment, own: dict[str, Any], found: Callable[[Mapping[str, Any]], Path | None], file: str
    ) -> dict[str, Any]:
        """Inputs under which labels may have gaps, where that is allowed or results without gaps are there.

        So `allow_unanswered` changes nothing where every call was answered, and without it the gaps are asked for, and
        whatever was read off traces with gaps is read anew.
        """
        if found(own):
            return own
        with_gaps = own | {"unanswered": "allowed"}
        folder = found(with_gaps)
        allowed = e.annotations.openai.allow_unanswered or (folder and not _has_gaps(folder / file))
        return with_gaps if allowed else own

    def annotate(self, e: Experiment, traces: Sequence[Trace]) -> list[Annotation]:
        """Labels by the model; what was asked before is in the ledger.

        Raises:
          ValueError: an invalid value of `annotations.openai`.
          JudgeStopped: no call can succeed, a limit was reached, no trace was labelled, or calls that are not allowed
            to stay unanswered were; the message says what to do.
        """
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

            meter = label_traces(traces, spec, ledger_path(e), on_done=on_done)
        say(f"  {meter}")
        annotated = [done[trace.id] for trace in traces]
        _check_answered(annotated, spec.allow_unanswered)
        return annotated


JUDGE = OpenAIJudge()


def ledger_path(e: Experiment) -> Path:
    """File of the answers; the same for all experiments of a `workdir` unless one is named."""
    named = e.annotations.openai.ledger
    return Path(named).expanduser() if named else Path(e.workdir).expanduser() / "judge-ledger.jsonl"


def _has_gaps(file: Path) -> bool:
    """Whether a call about a trace got no answer that a later one may get."""
    return any(failure(annotation) in UNANSWERED for annotation in records.read_annotations(file))


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
            "others are kept: the same command asks for these alone, or continues without them, counted as failed, "
            "with --config.annotations.openai.allow_unanswered=True"
        )


def _counts(failed: Sequence[tuple[str, str]]) -> str:
    return ", ".join(f"{count} {why}" for why, count in Counter(why for why, _ in failed).most_common())
