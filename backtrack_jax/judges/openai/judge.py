"""The online judge: an LLM behind any OpenAI-compatible endpoint labels the sentences of traces (step 3 of the paper).

Every trace ends in one of two states: labelled, or failed with a reason (`records.failure`). There is no default label:
an answer that cannot be used is a failure that is counted, and its raw text stays in the ledger.

    meter = label_traces(traces, OpenAISpec(model=...), folder / "ledger.jsonl", on_done=write_line)
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from backtrack_jax.config import OpenAISpec
from backtrack_jax.data.annotations import Reason, coverage
from backtrack_jax.data.records import FAILED, Annotation, Rejection, Section, Trace, failure
from backtrack_jax.data.text import sentence_spans
from backtrack_jax.judges.openai.client import ChatClient
from backtrack_jax.judges.openai.ledger import Ledger, content_key, read_entries
from backtrack_jax.judges.openai.prompts import JudgePrompt
from backtrack_jax.judges.openai.settings import (
    CallFailed,
    CallFault,
    Ending,
    JudgeStopped,
    Meter,
    cost_of,
    count,
    ending,
    request,
)

# Measured with the tokenizer of Llama-3.1 on the released chains; providers differ by some percent.
CHARACTERS_PER_TOKEN = 3.8
_TOKENS_PER_TAGGED_SENTENCE = 7.3
_TOKENS_PER_RUN = 10.0
_RUNS_PER_SENTENCE = 0.48

_MOST_CHARACTERS_PER_TOKEN = 7.0  # of a prompt that was read whole, whatever the vocabulary

LEAST_COVERAGE = 0.5
"""Share of a trace's sentences that an answer must label to count as one."""

NO_MAJORITY = "no_majority"
"""Reason of a rejected section that at most half of the votes have."""


class ReplyFault(StrEnum):
    """Why an answer that was paid for cannot be used; the faults of calls are `settings.CallFault`."""

    EMPTY = "empty_reply"
    TRUNCATED = "truncated_reply"
    """The answer reached max_tokens, or the context length of the model."""
    REFUSED = "refused"
    """The model or a content filter declined to answer."""
    UNLABELLED = "unlabelled_reply"
    """No labels in the form that was asked for: cut JSON, a chat, the instructions sent back."""
    INCOMPLETE = "incomplete_reply"
    """Labels for less than `LEAST_COVERAGE` of the sentences."""
    PROMPT_CUT = "prompt_cut"
    """The endpoint read far fewer tokens than it was sent, and labelled what it had not read."""
    MISLABELLED = "mislabelled_reply"
    """Labels, but none of the taxonomy, or not clear of which sentences of the trace."""


@dataclass(frozen=True)
class Labelled:
    """What the judge made of one trace.

    Attributes:
        annotation: the result: sections, or a failure (see `records.failure`).
        votes: the single answers; one, equal to `annotation`, unless several votes were asked for.
    """

    annotation: Annotation
    votes: tuple[Annotation, ...]


OnDone = Callable[[Labelled, Meter], None]
"""Called for each trace when it is done, in order of completion, with the meter as it then stands."""


@dataclass(frozen=True)
class Estimate:
    """What labelling would take.

    Attributes:
        calls: calls to be paid.
        reused: calls that the ledger answers.
        prompt_tokens: of the calls to be paid, about.
        completion_tokens: of their answers, about.
        cost: US dollars, without discounts for cached prompts; None without prices.
    """

    calls: int
    reused: int
    prompt_tokens: int
    completion_tokens: int
    cost: float | None

    def __str__(self) -> str:
        cost = "cost unknown: give input_price and output_price" if self.cost is None else f"about ${self.cost:.2f}"
        return (
            f"{self.calls} calls to pay, {self.reused} in the ledger; about {self.prompt_tokens:,} tokens of prompts "
            f"and {self.completion_tokens:,} of answers; {cost}"
        )


def judge_name(spec: OpenAISpec) -> str:
    """Name of the judge in its annotations: model, format, version of the prompt, votes."""
    name = f"openai:{spec.model}:{spec.format}:{JudgePrompt.of(spec).hash}"
    return name if spec.votes == 1 else f"{name}:{spec.votes}votes"


def label_traces(traces: Sequence[Trace], spec: OpenAISpec, ledger_path: Path | str, *, on_done: OnDone) -> Meter:
    """Labels traces. Blocks; in a notebook `await label(...)` instead, with the same arguments.

    Args:
        traces: what is to be labelled, up to `annotations.reasoning_end`. A trace without a sentence is labelled with
            no sections, without a call.
        spec: the question, the endpoint and the limits.
        ledger_path: the ledger; what it holds is not asked again. `spec.ledger` is not read.
        on_done: receives each trace when it is done.

    Returns:
        The meter of the run.

    Raises:
        ValueError: an invalid value of the spec.
        JudgeStopped: no call can succeed, or a limit was reached; the message says what to do. `on_done` had all traces
            that were done until then.
    """
    return asyncio.run(label(traces, spec, ledger_path, on_done=on_done))


async def label(traces: Sequence[Trace], spec: OpenAISpec, ledger_path: Path | str, *, on_done: OnDone) -> Meter:
    """`label_traces` as a coroutine."""
    if spec.votes < 1 or spec.reask < 0:
        raise ValueError(f"votes {spec.votes} must be at least 1 and reask {spec.reask} at least 0")
    with Ledger(ledger_path) as ledger:
        async with ChatClient(spec, ledger) as client:
            judge = _Judge(client, JudgePrompt.of(spec), judge_name(spec))

            async def run(trace: Trace) -> Exception | None:
                try:
                    on_done(await judge.label(trace), client.meter)
                except JudgeStopped as error:
                    return error
                except (
                    Exception
                ) as error:  # an error of ours: the calls in flight are paid for, so they are awaited too
                    client.stop(f"stopped by {type(error).__name__} at trace {trace.id!r}")
                    return error
                return None

            tasks = [asyncio.create_task(run(trace)) for trace in traces]
            try:
                with client.drained():
                    outcomes = await asyncio.gather(*tasks)
            except BaseException:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                raise
            stops = [outcome for outcome in outcomes if outcome is not None]
            for error in stops:
                if not isinstance(error, JudgeStopped):
                    raise error
            if stops:
                raise JudgeStopped(f"{stops[0]} [{len(traces) - len(stops)} of {len(traces)} traces are done]")
            return client.meter


@dataclass(frozen=True)
class _Judge:
    client: ChatClient
    prompt: JudgePrompt
    name: str

    async def label(self, trace: Trace) -> Labelled:
        if not sentence_spans(trace):
            nothing = Annotation(trace.id, self.name, ())
            return Labelled(nothing, (nothing,))
        # Gathered with their exceptions: when one vote is stopped, the others in flight are still awaited.
        answers = await asyncio.gather(
            *(self._vote(trace, vote) for vote in range(self.client.spec.votes)), return_exceptions=True
        )
        votes = []
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
            votes.append(answer)
        return Labelled(merge_votes(trace, votes), tuple(votes))

    async def _vote(self, trace: Trace, vote: int) -> Annotation:
        """One answer; asked for again, under a number of its own, while it cannot be used."""
        spec = self.client.spec
        annotation = Annotation(trace.id, self.name, ())
        for number in range(vote, vote + spec.votes * (1 + spec.reask), spec.votes):
            body = _request(trace, self.prompt, spec, number)
            try:
                entry = await self.client.complete(body, number, prompt=self.prompt.hash, trace=trace.id)
            except CallFailed as error:
                return _failed(trace, self.name, error.fault, str(error))
            # In a thread: while a long copy is placed, the other answers must not time out and be paid again.
            sent = sum(len(message["content"]) for message in body["messages"])
            annotation = await asyncio.to_thread(_read, trace, entry, self.prompt, self.name, sent)
            if failure(annotation) is None:
                break
        return annotation


def _request(trace: Trace, prompt: JudgePrompt, spec: OpenAISpec, number: int) -> dict[str, Any]:
    return request(spec, prompt.messages(trace), number, **prompt.request_fields())


def _read(trace: Trace, entry: Mapping[str, Any], prompt: JudgePrompt, name: str, sent: int = 0) -> Annotation:
    """Sections from an entry of the ledger, or the failure that it is; `sent` are the characters of the prompt."""
    answer: str = entry["answer"]
    ended = ending(entry["finish_reason"])
    if entry["refusal"] or ended == Ending.WITHHELD:
        return _failed(trace, name, ReplyFault.REFUSED, str(entry["refusal"] or answer))
    if ended == Ending.CUT:
        return _failed(trace, name, ReplyFault.TRUNCATED, "the answer is cut: raise max_tokens of the judge")
    if not answer.strip():
        return _failed(trace, name, ReplyFault.EMPTY, "")
    if ended == Ending.BROKEN_OFF:
        return _failed(trace, name, CallFault.BROKEN_OFF, f"finish_reason={entry['finish_reason']!r}")
    read = count(entry.get("usage"), "prompt_tokens")
    if read and read * _MOST_CHARACTERS_PER_TOKEN < sent:
        detail = f"the endpoint read {read} tokens of about {sent / CHARACTERS_PER_TOKEN:.0f}: raise its context length"
        return _failed(trace, name, ReplyFault.PROMPT_CUT, detail)
    annotation = prompt.read(trace, answer, name)
    if annotation.sections:
        n = len(sentence_spans(trace))
        if (covered := coverage(trace, annotation)) < LEAST_COVERAGE:
            detail = f"labels for {round(covered * n)} of {n} sentences"
            return _failed(trace, name, ReplyFault.INCOMPLETE, detail, annotation.rejected)
        return annotation
    if annotation.rejected[0].reason == Reason.NO_SECTIONS:
        return _failed(trace, name, ReplyFault.UNLABELLED, answer)
    return _failed(trace, name, ReplyFault.MISLABELLED, answer, annotation.rejected)


def _failed(trace: Trace, name: str, why: str, detail: str, rejected: Sequence[Rejection] = ()) -> Annotation:
    return Annotation(trace.id, name, (), (Rejection(FAILED + why, "", detail[:300]), *rejected))


def merge_votes(trace: Trace, votes: Sequence[Annotation]) -> Annotation:
    """One annotation from several of the same trace by the same judge.

    Args:
        trace: the trace.
        votes: annotations of it; failures among them support no section.

    Returns:
        The single vote unchanged; else the sections that more than half of all votes have, as `label_traces` says, and
        the others as rejections `no_majority`. A failure, with the most frequent reason, where half of the votes or
        more failed or no section has a majority.
    """
    first = votes[0]
    if len(votes) == 1:
        return first
    whys = [why for vote in votes if (why := failure(vote)) is not None]
    if 2 * len(whys) >= len(votes):
        why, count = Counter(whys).most_common(1)[0]
        return _failed(trace, first.judge, why, f"{count} of {len(votes)} votes failed so")
    stops: dict[tuple[int, str], list[int]] = {}
    for vote in votes:
        for section in vote.sections:
            stops.setdefault((section.start, section.label), []).append(section.stop)
    sections: list[Section] = []
    rejected: list[Rejection] = []
    for (start, label_), ends in sorted(stops.items()):
        # Two sections with a majority share a vote, in which they do not overlap: up to the earliest end none does.
        if 2 * len(ends) > len(votes):
            sections.append(Section(label_, start, min(ends)))
        else:
            rejected.append(Rejection(NO_MAJORITY, label_, trace.text[start : min(ends)]))
    if not sections:
        return _failed(
            trace, first.judge, NO_MAJORITY, f"no section is in more than half of {len(votes)} votes", rejected
        )
    return Annotation(trace.id, first.judge, tuple(sections), tuple(rejected))


def estimate(traces: Sequence[Trace], spec: OpenAISpec, ledger_path: Path | str) -> Estimate:
    """What `label_traces` would ask and pay, from the length of the texts; asks for no key and sends nothing.

    Args:
        traces: as in `label_traces`.
        spec: as in `label_traces`.
        ledger_path: as in `label_traces`; is only read.

    Returns:
        Calls, tokens and cost, without those for unusable answers that are asked for again.
    """
    prompt = JudgePrompt.of(spec)
    known = read_entries(ledger_path)
    keys: set[str] = set()
    reused, prompt_characters, completion_tokens = 0, 0, 0.0
    for trace in traces:
        spans = sentence_spans(trace)
        for number in range(spec.votes if spans else 0):
            body = _request(trace, prompt, spec, number)
            key = content_key(body, number)
            if key in known or key in keys:
                reused += 1
                continue
            keys.add(key)
            prompt_characters += sum(len(message["content"]) for message in body["messages"])
            if prompt.format == "inline":
                copied = sum(stop - start for start, stop in spans) / CHARACTERS_PER_TOKEN
                completion_tokens += copied + _TOKENS_PER_TAGGED_SENTENCE * len(spans)
            else:
                completion_tokens += _TOKENS_PER_RUN * max(1.0, _RUNS_PER_SENTENCE * len(spans))
    prompt_tokens = round(prompt_characters / CHARACTERS_PER_TOKEN)
    cost = cost_of(spec, prompt_tokens, round(completion_tokens))
    return Estimate(len(keys), reused, prompt_tokens, round(completion_tokens), cost)
