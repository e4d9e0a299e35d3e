"""The online judge against a real server: every fault, every stop, and no reply paid twice."""

import asyncio
import email.utils
import json
import logging
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from zlib import crc32

import pytest
from fault_server import FATAL, PAID, UNPAID, FaultServer

from backtrack_jax.config import OpenAISpec
from backtrack_jax.data.records import (
    Annotation,
    Rejection,
    Section,
    Trace,
    failure,
    pair_annotations,
    read_released,
    write_jsonl,
)
from backtrack_jax.judges.openai.client import _retry_after
from backtrack_jax.judges.openai.judge import Labelled, estimate, judge_name, label, label_traces, merge_votes
from backtrack_jax.judges.openai.ledger import read_entries
from backtrack_jax.judges.openai.prompts import JudgePrompt
from backtrack_jax.judges.openai.settings import JudgeStopped, Meter, check

KEY = "sk-test-0123456789"
LABELS = ("initializing", "deduction", "backtracking", "deduction")


def make_trace(number: int) -> Trace:
    text = f"<think>\nOkay, case {number}.\n\nSo it is {number}. Wait, no.\n\nThen {number + 1}.\n</think>\n\n{number}"
    return Trace(f"p{number}/0", f"p{number}", "c", f"What follows {number}?", text)


TRACES = [make_trace(number) for number in range(200)]
SOME = TRACES[:40]


@pytest.fixture(params=[20, pytest.param(200, marks=pytest.mark.slow)])
def traces(request) -> list[Trace]:
    """Some traces for what is tried fault by fault; all of them in the slow run."""
    return TRACES[: request.param]


def true_sections(trace: Trace) -> tuple[Section, ...]:
    pieces = re.findall(r"Okay, case \d+\.|So it is \d+\.|Wait, no\.|Then \d+\.", trace.text)
    starts = [trace.text.index(piece) for piece in pieces]
    return tuple(
        Section(name, start, start + len(piece)) for name, start, piece in zip(LABELS, starts, pieces, strict=True)
    )


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server():
    with FaultServer() as running:
        yield running


@pytest.fixture
def ledger(tmp_path) -> Path:
    return tmp_path / "ledger.jsonl"


def spec_for(server: FaultServer, **changes: object) -> OpenAISpec:
    quick = OpenAISpec(
        model="judge-1", base_url=server.base_url, backoff=0.001, max_backoff=0.01, max_retries=12, request_timeout=20.0
    )
    return replace(quick, **changes)  # type: ignore[arg-type]


class Run:
    """One run of the judge, with what it handed over."""

    def __init__(self, traces: list[Trace], spec: OpenAISpec, ledger: Path) -> None:
        self.labelled: dict[str, Labelled] = {}
        self.order: list[str] = []
        self.error: JudgeStopped | None = None
        try:
            label_traces(traces, spec, ledger, on_done=self.on_done)
        except JudgeStopped as error:
            self.error = error

    def on_done(self, labelled: Labelled, meter: Meter) -> None:
        assert labelled.annotation.trace_id not in self.labelled
        self.labelled[labelled.annotation.trace_id] = labelled
        self.order.append(labelled.annotation.trace_id)
        self.meter = meter

    @property
    def annotations(self) -> list[Annotation]:
        return [labelled.annotation for labelled in self.labelled.values()]

    @property
    def failures(self) -> dict[str, str]:
        return {a.trace_id: why for a in self.annotations if (why := failure(a)) is not None}


def check_labels(run: Run, traces: list[Trace]) -> None:
    """Every trace that did not fail has exactly the true sections."""
    for trace, annotation in pair_annotations(traces, run.annotations):
        if trace.id not in run.failures:
            assert (annotation.sections, annotation.rejected) == (true_sections(trace), ()), trace.id


def struck(content: str, share: float) -> bool:
    """Whether a fault strikes this content: a fixed draw from it."""
    return crc32(content.encode()) / 2**32 < share


@pytest.mark.parametrize("format_", ["sentences", "inline"])
def test_traces_are_labelled_and_never_paid_again(server, ledger, format_):
    run = Run(TRACES, spec_for(server, format=format_), ledger)
    assert run.failures == {} and len(run.labelled) == 200
    check_labels(run, TRACES)
    assert set(server.paid.values()) == {1} and len(server.paid) == len(server.seen) == 200
    again = Run(TRACES, spec_for(server, concurrency=1, format=format_), ledger)
    assert again.labelled == run.labelled
    assert len(server.seen) == 200
    assert (again.meter.paid, again.meter.reused) == (0, 200)


LASTING = ("too_long", "filtered")  # never retried
REASONS = {
    "429": "rate_limited",
    "500": "server_error",
    "503": "server_error",
    "timeout": "timed_out",
    "drop": "disconnected",
    "cut_body": "disconnected",
    "half_body": "not_a_completion",
    "web_page": "not_a_completion",
    "error_200": "server_error",
    "too_long": "bad_request",
    "filtered": "forbidden",
    "truncated_json": "unlabelled_reply",
    "length": "truncated_reply",
    "bad_labels": "mislabelled_reply",
    "echo": "unlabelled_reply",
    "empty": "empty_reply",
    "null": "empty_reply",
    "refusal": "refused",
    "chat": "unlabelled_reply",
    "no_such_sentence": "mislabelled_reply",
    "number": "empty_reply",
    "taken_back": "refused",
    "no_choices": "empty_reply",
}


def test_every_fault_of_the_server_has_a_reason():
    assert set(REASONS) == {*UNPAID, *PAID}


@pytest.mark.parametrize("fault", [fault for fault in UNPAID if fault not in LASTING])
def test_faults_that_pass_lose_nothing_and_pay_once(server, ledger, traces, fault):
    share = 0.1 if fault == "timeout" else 0.3
    server.retry_after = "0.02"
    server.plan = lambda content, attempt: fault if attempt < 2 and struck(content, share) else None
    run = Run(traces, spec_for(server, request_timeout=1.0 if fault == "timeout" else 20.0), ledger)
    assert run.failures == {} and len(run.labelled) == len(traces)
    check_labels(run, traces)
    assert set(server.paid.values()) == {1} and len(server.paid) == len(traces)
    assert run.meter.retries == len(server.seen) - len(traces) >= 2


@pytest.mark.parametrize("fault", UNPAID)
def test_faults_that_stay_end_in_their_reason_and_the_next_run_asks_again(server, ledger, traces, fault):
    Run(TRACES[-1:], spec_for(server), ledger)  # so the key is good
    server.plan = lambda content, attempt: fault
    quick = spec_for(server, max_retries=1, request_timeout=0.1 if fault == "timeout" else 20.0)
    traces = [trace for trace in traces if trace != TRACES[-1]]
    run = Run(traces, quick, ledger)
    assert set(run.failures.values()) == {REASONS[fault]} and len(run.failures) == len(traces)
    assert run.meter.failed == {REASONS[fault]: len(traces)}
    assert server.paid.total() == len(read_entries(ledger)) == 1
    assert run.meter.retries == (0 if fault in LASTING else len(traces))
    with FaultServer() as mended:  # a new one: of those given up, some requests may not have reached the old one yet
        again = Run(traces, spec_for(mended), ledger)
        assert again.failures == {} and set(mended.paid.values()) == {1} and len(mended.paid) == len(traces)
    check_labels(again, traces)


@pytest.mark.parametrize(
    ("fault", "format_"),
    # Cut answers of the inline format, which is no JSON, are those of the fault `length`.
    [
        (fault, name)
        for fault in PAID
        for name in ("sentences", "inline")
        if (fault, name) != ("truncated_json", "inline")
    ],
)
def test_answers_of_no_use_are_failures_and_are_not_asked_again(server, ledger, traces, fault, format_):
    server.plan = lambda content, attempt: fault if struck(content, 0.3) else None
    prompt = JudgePrompt(format_)
    run = Run(traces, spec_for(server, format=format_), ledger)
    expected = {t.id for t in traces if struck(prompt.messages(t)[1]["content"], 0.3)}
    # An echo of the inline question holds one tag, of a label that does not exist.
    reason = "mislabelled_reply" if (format_, fault) == ("inline", "echo") else REASONS[fault]
    assert run.failures == dict.fromkeys(expected, reason) and 0 < len(expected) < 0.6 * len(traces)
    check_labels(run, traces)
    again = Run(traces, spec_for(server, format=format_), ledger)
    assert again.labelled == run.labelled
    assert set(server.paid.values()) == {1} and len(server.seen) == len(traces)


@pytest.mark.parametrize("fault", ["taken_back", "no_choices"])
def test_answers_without_a_message_count_as_paid(server, ledger, fault):
    server.plan = lambda content, attempt: fault
    # 100 tokens of prompt (40 of them cached) and 10 of answer.
    prices = {"input_price": 1.0, "cached_price": 0.5, "output_price": 2.0}
    run = Run(SOME, spec_for(server, concurrency=2, max_cost=0.005, **prices), ledger)
    assert run.error is not None and "max_cost of $0.005 is reached" in str(run.error)
    assert len(server.seen) == server.paid.total() == len(read_entries(ledger)) <= 7


def test_an_error_under_http_200_stops_like_its_code(server, ledger):
    server.plan = lambda content, attempt: "payment_200"
    run = Run(SOME, spec_for(server, concurrency=2), ledger)
    assert run.error is not None and "is out of money" in str(run.error) and len(server.seen) <= 2


def test_an_error_of_the_program_loses_no_answer_in_flight(server, ledger):
    server.plan = lambda content, attempt: time.sleep(0 if attempt == 0 and "follows 0?" in content else 0.3)

    def on_done(labelled: Labelled, meter: Meter) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        label_traces(SOME, spec_for(server, concurrency=4), ledger, on_done=on_done)
    assert 1 <= len(server.seen) == server.paid.total() == len(read_entries(ledger)) <= 8


def test_a_long_answer_that_is_being_read_holds_up_no_other(server, ledger, monkeypatch):
    """Reading takes longer than an answer may: nothing times out, and nothing is paid twice."""
    read = JudgePrompt.read

    def slow(self: JudgePrompt, *arguments: object) -> Annotation:
        time.sleep(0.6)
        return read(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(JudgePrompt, "read", slow)
    server.plan = lambda content, attempt: time.sleep(0.1 if "follows 0?" in content else 0.3)
    run = Run(TRACES[:3], spec_for(server, request_timeout=0.5), ledger)
    assert run.failures == {} and run.meter.retries == 0 and set(server.paid.values()) == {1}


@pytest.mark.parametrize("usage", [{"prompt_tokens": float("nan"), "completion_tokens": 3}, {"prompt_tokens": 1e999}])
def test_a_count_of_tokens_that_is_no_number_counts_as_none(usage):
    meter = Meter(OpenAISpec())
    meter.add(usage)
    assert (meter.paid, meter.prompt_tokens) == (1, 0)


def test_a_retry_after_that_no_clock_reaches_asks_for_nothing():
    for value in ("Fri, 31 Dec 99999999999 23:59:59 GMT", "Mon, 01 Jan 2024 00:00:00 -9999999999", "inf", "nan"):
        assert _retry_after({"retry-after": value}) == 0.0


def test_an_answer_in_parts_is_read_and_paid_once(server, ledger):
    server.plan = lambda content, attempt: "parts"
    run = Run(SOME, spec_for(server), ledger)
    assert run.failures == {} and set(server.paid.values()) == {1}
    check_labels(run, SOME)


def test_a_storm_of_all_faults_ends_with_every_trace_labelled_or_failed(server, ledger):
    # Without the slow one, and the one that is a wrong key as long as nothing was answered.
    faults = [fault for fault in (*UNPAID, *PAID) if fault not in ("timeout", "filtered")]

    def plan(content: str, attempt: int) -> str | None:
        rng = random.Random(f"{content}{attempt}")
        return rng.choice(faults) if rng.random() < 0.6 else None

    server.plan, server.retry_after = plan, "0.001"
    run = Run(TRACES, spec_for(server), ledger)
    assert len(run.labelled) == 200 and 20 < len(run.failures) < 190
    check_labels(run, TRACES)
    assert max(server.paid.values()) == 1
    assert len(server.paid) == len(read_entries(ledger)) == run.meter.paid
    unpaid = Counter(why for why in run.failures.values() if why in {REASONS[fault] for fault in UNPAID})
    assert run.meter.failed == unpaid and len(server.paid) == 200 - unpaid.total()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("wrong_key", r"refuses the key in the environment variable OPENAI_API_KEY .*Set it to a key that may use"),
        ("forbidden", r"refuses the key .*'judge-1'"),
        ("unknown_model", r"has no model 'judge-1'.*Check model and base_url"),
        ("quota", r"out of money or over its quota .*Add credit"),
        ("payment", r"out of money .*Add credit"),
        ("payment_403", r"out of money .*Add credit"),
        ("parameter", r"does not accept the judge's temperature .*Change it or leave it out"),
    ],
)
def test_when_no_call_can_succeed_the_run_stops_and_keeps_what_was_paid(server, ledger, fault, message):
    late = fault in ("wrong_key", "unknown_model", "quota", "payment", "payment_403")
    server.latency = 0.01
    server.plan = lambda content, attempt: fault if not late or server.paid.total() > 9 else None
    run = Run(SOME, spec_for(server, concurrency=8), ledger)
    assert run.error is not None and re.search(message, str(run.error))
    assert "run the same command again" in str(run.error)
    assert f"[{len(run.labelled)} of 40 traces are done]" in str(run.error)
    assert KEY not in str(run.error) and fault in FATAL
    # Nothing new was begun: those in flight at the stop are all that came after it.
    assert len(server.seen) <= server.paid.total() + 8
    assert len(run.labelled) == len(server.paid) == len(read_entries(ledger)) >= (10 if late else 0)
    server.plan, server.latency = lambda content, attempt: None, 0.0
    again = Run(SOME, spec_for(server), ledger)
    assert again.failures == {} and set(server.paid.values()) == {1}
    check_labels(again, SOME)


def test_without_a_key_nothing_is_sent(server, ledger, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    run = Run(SOME, spec_for(server), ledger)
    assert run.error is not None and "OPENAI_API_KEY is not set" in str(run.error)
    monkeypatch.setenv("OTHER_KEY", "   ")
    other = Run(SOME, spec_for(server, key_variable="OTHER_KEY"), ledger)
    assert other.error is not None and "OTHER_KEY is not set" in str(other.error)
    assert server.seen == [] and estimate(SOME, spec_for(server), ledger).calls == 40


@pytest.mark.parametrize("extra", ["\n", "\t", "\u2026", "\x7f"])
def test_a_key_that_cannot_be_sent_is_not_shown(server, ledger, monkeypatch, extra):
    monkeypatch.setenv("OPENAI_API_KEY", KEY + extra + KEY)
    run = Run(SOME, spec_for(server), ledger)
    assert run.error is not None and "OPENAI_API_KEY holds a line break or another character" in str(run.error)
    assert KEY not in str(run.error) and server.seen == [] and run.labelled == {}


def test_without_an_endpoint_the_run_stops_at_once(ledger):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spec = OpenAISpec(base_url=f"http://127.0.0.1:{port}/v1", backoff=0.05)
    began = time.monotonic()
    run = Run(TRACES, spec, ledger)
    assert run.error is not None and re.search(r"cannot be reached .*Check base_url", str(run.error))
    assert time.monotonic() - began < 10 and run.labelled == {}


def test_an_endpoint_that_goes_away_and_comes_back_loses_nothing(server, ledger):
    """Once it has answered, refused connections are retried; those that stay so are failures, asked again next time."""
    server.plan = lambda content, attempt: "drop" if attempt == 0 else None
    server.on_paid = lambda count: count == 10 and server.socket.close()
    away = Run(SOME, spec_for(server, concurrency=4, max_retries=3), ledger)
    assert away.error is None and len(away.labelled) == 40
    assert set(away.failures.values()) <= {"unreachable", "disconnected"} and "unreachable" in away.failures.values()
    with FaultServer() as other:
        back = Run(SOME, spec_for(other), ledger)
        assert back.failures == {} and len(server.paid) + len(other.paid) == 40
    check_labels(back, SOME)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_url": ""}, r"base_url '' is not an address; accepted: http"),
        ({"base_url": "localhost:8000"}, "is not an address"),
        ({"base_url": "http://me:secret@host/v1"}, r"holds credentials .*; the key belongs in \$OPENAI_API_KEY"),
        ({"base_url": "https://host/v1?key=secret"}, "or a query .*is written into results"),
        ({"model": " "}, "model is empty"),
        ({"concurrency": 0}, "concurrency 0 must be at least 1"),
        ({"max_retries": -1}, "max_retries -1 must be at least 0"),
        ({"request_timeout": 0}, "request_timeout 0 must be more than 0 seconds"),
        ({"max_cost": 1.0}, "max_cost of the judge needs input_price and output_price"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        check(OpenAISpec(**changes))
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("kind", ["seconds", "date"])
def test_retry_after_is_honoured_by_all_calls(server, ledger, kind):
    server.plan = lambda content, attempt: "429" if len(server.seen) <= 4 and attempt == 0 else None
    wait = 0.4
    # A date has whole seconds: two seconds ahead is at least one second away.
    server.retry_after = str(wait) if kind == "seconds" else email.utils.formatdate(time.time() + 2, usegmt=True)
    run = Run(TRACES[:12], spec_for(server, concurrency=4), ledger)
    assert run.failures == {} and len(server.seen) == 16
    refused, later = server.seen[:4], server.seen[4:]
    assert {seen.attempt for seen in refused} == {0}
    pause = min(seen.time for seen in later) - max(seen.time for seen in refused)
    assert pause >= (wait if kind == "seconds" else 0.9) - 0.05


def test_backoff_grows_and_varies(server, ledger):
    server.plan = lambda content, attempt: "500" if attempt < 4 else None
    Run(TRACES[:4], spec_for(server, backoff=0.05, max_backoff=0.2), ledger)
    waits: list[list[float]] = [[], [], [], []]
    for content in server.paid:
        times = [seen.time for seen in server.seen if seen.content == content]
        for number in range(4):
            waits[number].append(times[number + 1] - times[number])
    for number, least in enumerate((0.025, 0.05, 0.1, 0.1)):  # half of 0.05, 0.1, 0.2 and 0.2 (the limit)
        assert min(waits[number]) >= least - 0.005
        assert len({round(wait, 4) for wait in waits[number]}) > 1


def test_a_call_is_given_up_when_it_would_wait_too_long(server, ledger):
    server.retry_after = "3600"
    server.plan = lambda content, attempt: "429" if struck(content, 0.3) else None
    began = time.monotonic()
    run = Run(SOME, spec_for(server, call_timeout=5.0), ledger)
    assert time.monotonic() - began < 5
    assert set(run.failures.values()) == {"rate_limited"} and max(server.attempts.values()) == 1
    assert len(server.paid) == 40 - len(run.failures)


def test_the_limits_of_a_run_stop_it_and_keep_what_was_paid(server, ledger):
    server.latency = 0.05
    timed = Run(SOME, spec_for(server, concurrency=2, run_timeout=0.3), ledger)
    assert timed.error is not None and "run_timeout of 0.3 s has passed" in str(timed.error)
    assert 0 < len(timed.labelled) == server.paid.total() < 40
    # 1000 tokens of prompt (400 cached) and 100 of answer: 600 x 1 + 400 x 0.5 + 100 x 2 = 1000 micro-dollars a call.
    prices = {"input_price": 1.0, "cached_price": 0.5, "output_price": 2.0}
    before = server.paid.total()
    dear = Run(SOME, spec_for(server, concurrency=4, max_cost=0.01, **prices), ledger)
    assert dear.error is not None and "max_cost of $0.01 is reached" in str(dear.error)
    assert 10 <= server.paid.total() - before <= 13
    assert dear.meter.cost == pytest.approx(1e-3 * dear.meter.paid)
    server.latency = 0.0
    assert Run(SOME, spec_for(server), ledger).failures == {}
    assert set(server.paid.values()) == {1}


def test_a_limit_of_money_is_not_passed_by_an_endpoint_that_counts_no_tokens(server, ledger):
    server.plan = lambda content, attempt: "no_usage"
    prices = {"input_price": 1.0, "output_price": 2.0}
    run = Run(SOME, spec_for(server, concurrency=4, max_cost=5.0, **prices), ledger)
    assert run.error is not None and "max_cost cannot be enforced" in str(run.error)
    assert "without counts of tokens, $0.0000" in str(run.error)
    assert 1 <= len(read_entries(ledger)) == server.paid.total() <= 8  # those in flight
    assert Run(SOME, spec_for(server), ledger).failures == {} and set(server.paid.values()) == {1}


def test_calls_in_flight_are_bounded(server, ledger):
    server.latency = 0.02
    Run(SOME, spec_for(server, concurrency=6), ledger)
    assert server.max_in_flight == 6


def test_the_ledger_is_asked_before_the_gate(server, ledger):
    """With the only place taken by a call that hangs, everything that is paid for is still handed over."""
    Run(SOME[1:], spec_for(server), ledger)
    release = threading.Event()
    server.plan = lambda content, attempt: None if release.wait(10) else "500"
    done: list[str] = []

    def on_done(labelled: Labelled, meter: Meter) -> None:
        done.append(labelled.annotation.trace_id)
        if len(done) == 39:
            release.set()

    label_traces(SOME, spec_for(server, concurrency=1), ledger, on_done=on_done)
    assert release.is_set() and done[-1] == SOME[0].id and len(done) == 40


def test_the_same_text_under_two_ids_is_paid_once(server, ledger):
    twins = [replace(trace, id=f"{trace.problem_id}/{sample}", sample=sample) for trace in SOME for sample in (0, 1)]
    run = Run(twins, spec_for(server), ledger)
    check_labels(run, twins)
    assert len(run.labelled) == 80 and set(server.paid.values()) == {1} and len(server.seen) == 40


def test_a_trace_without_a_sentence_needs_no_call(server, ledger):
    empty = [replace(make_trace(0), text=text) for text in ("", "</think>\n\nTwelve.", "<think>\n ...")]
    for trace in empty:
        run = Run([trace], spec_for(server), ledger)
        assert run.annotations == [Annotation(trace.id, run.annotations[0].judge, ())] and run.failures == {}
    assert server.seen == []


def test_what_was_sent_and_answered_is_on_record(server, ledger):
    run = Run(TRACES[:1], spec_for(server, seed=5, extra_body='{"top_p": 1}'), ledger)
    prompt = JudgePrompt()
    body = server.seen[0].body
    assert body == {
        "model": "judge-1",
        "messages": prompt.messages(TRACES[0]),
        "temperature": 0.0,
        "seed": 5,
        "max_tokens": 4096,
        "top_p": 1,
        **prompt.request_fields(),
    }
    entry = next(iter(read_entries(ledger).values()))
    assert entry["answer"] == '{"runs":[{"from":1,"label":"initializing"},{"from":2,"label":"deduction"},' + (
        '{"from":3,"label":"backtracking"},{"from":4,"label":"deduction"}]}'
    )
    assert (entry["requested_model"], entry["model"]) == ("judge-1", "judge-1-snapshot")
    assert (entry["system_fingerprint"], entry["finish_reason"], entry["refusal"]) == ("fp_1", "stop", None)
    assert (entry["prompt"], entry["trace"], entry["vote"]) == (prompt.hash, "p0/0", 0)
    assert entry["parameters"] == {k: v for k, v in body.items() if k not in ("model", "messages")}
    assert entry["usage"]["prompt_tokens"] == 1000 and re.fullmatch(r"[\d-]+T[\d:]+Z", entry["time"])
    assert run.annotations[0].judge == f"openai:judge-1:sentences:{prompt.hash}"


def test_what_is_left_out_is_not_sent(server, ledger):
    Run(
        TRACES[:1],
        spec_for(server, seed=-1, temperature=-1.0, max_tokens=0, format="inline"),
        ledger,
    )
    assert set(server.seen[0].body) == {"model", "messages"}


def test_the_meter_counts_tokens_and_money(server, ledger):
    prices = {"input_price": 2.5, "output_price": 10.0}
    run = Run(TRACES[:20], spec_for(server, **prices), ledger)
    meter = run.meter
    assert (meter.prompt_tokens, meter.cached_tokens, meter.completion_tokens) == (20000, 8000, 2000)
    assert meter.cost == pytest.approx((20000 * 2.5 + 2000 * 10) / 1e6)
    assert str(meter) == "20 paid, 0 from the ledger, 20,000 + 2,000 tokens, $0.0700"
    cheaper = replace(meter, spec=spec_for(server, cached_price=1.25, **prices))
    assert cheaper.cost == pytest.approx((12000 * 2.5 + 8000 * 1.25 + 2000 * 10) / 1e6)
    assert replace(meter, spec=spec_for(server)).cost is None
    meter.add({})
    assert (meter.paid, meter.without_usage) == (21, 1)


def test_the_estimate_is_what_a_run_then_asks(server, ledger):
    prices = {"input_price": 2.0, "output_price": 8.0}
    spec, prompt, some = spec_for(server, **prices), JudgePrompt(), TRACES[10:50]
    Run(some[:10], spec, ledger)
    planned = estimate([*some, some[0]], replace(spec, votes=2), ledger)
    assert (planned.calls, planned.reused) == (70, 12)
    assert len(server.seen) == 10
    shown = sum(len(message["content"]) for trace in some for message in prompt.messages(trace))
    assert planned.prompt_tokens == pytest.approx(shown / 3.8 * 70 / 40, rel=0.01)
    assert planned.cost == pytest.approx((planned.prompt_tokens * 2 + planned.completion_tokens * 8) / 1e6)
    assert "70 calls to pay, 12 in the ledger" in str(planned) and "about $" in str(planned)
    Run([*some, replace(some[0], id="twin")], replace(spec, votes=2), ledger)
    assert len(server.seen) == 10 + 70
    assert estimate(some, spec, ledger).calls == 0
    unknown = estimate(some, spec_for(server, votes=2), ledger)
    assert unknown.cost is None and "give input_price and output_price" in str(unknown)


def test_the_estimate_of_answers_fits_the_released_ones(ward2025, ledger):
    traces, annotated = read_released(ward2025)
    inline = estimate(traces, OpenAISpec(format="inline"), ledger)
    released = sum(len(answer) for answer in annotated) / 3.886  # characters per token of Llama-3.1, measured on them
    assert inline.completion_tokens == pytest.approx(released, rel=0.15)
    sentences = estimate(traces, OpenAISpec(), ledger)
    assert 0.15 < sentences.completion_tokens / released < 0.25  # a fifth of the output


def test_votes_are_asked_with_seeds_of_their_own_and_the_majority_stays(server, ledger):
    server.plan = lambda content, attempt: "bad_labels" if attempt == 1 and struck(content, 0.5) else None
    some = TRACES[:20]
    run = Run(some, spec_for(server, seed=7, concurrency=1, votes=3), ledger)
    assert run.failures == {} and len(server.seen) == 60
    assert {seen.body["seed"] for seen in server.seen} == {7, 8, 9}
    check_labels(run, some)
    failed = Counter(sum(failure(vote) is not None for vote in labelled.votes) for labelled in run.labelled.values())
    assert set(failed) == {0, 1} and {len(labelled.votes) for labelled in run.labelled.values()} == {3}
    assert run.annotations[0].judge.endswith(":3votes")
    # One vote more is all that is paid when a single answer was there before.
    server.plan = lambda content, attempt: None
    Run(some, spec_for(server, seed=7, votes=4), ledger)
    assert len(server.seen) == 80


def votes_of(*answers: list[tuple[str, int, int]] | str) -> list[Annotation]:
    """Annotations of one trace: lists of sections, or reasons of failures."""
    return [
        Annotation("p0/0", "j", (), (Rejection(f"judge_failed:{answer}", "", ""),))
        if isinstance(answer, str)
        else Annotation("p0/0", "j", tuple(Section(*section) for section in answer))
        for answer in answers
    ]


@pytest.mark.parametrize(
    ("answers", "sections", "rejected"),
    [
        # Two of three agree on the start; the section ends where the first of them ends it.
        (
            ([("deduction", 8, 40)], [("deduction", 8, 30)], [("backtracking", 8, 50)]),
            [("deduction", 8, 30)],
            [("no_majority", "backtracking", (8, 50))],
        ),
        # Two of four are no majority.
        (
            ([("deduction", 8, 20)], [("deduction", 8, 20)], [("deduction", 9, 20)], [("deduction", 9, 20)]),
            "no_majority",
            [("no_majority", "deduction", (8, 20)), ("no_majority", "deduction", (9, 20))],
        ),
        # A failed vote supports nothing, and does not lower the majority either.
        (([("deduction", 8, 20)], [("deduction", 8, 20)], "empty_reply"), [("deduction", 8, 20)], []),
        (
            ([("deduction", 8, 20)], [("deduction", 9, 20)], "empty_reply"),
            "no_majority",
            [("no_majority", "deduction", (8, 20)), ("no_majority", "deduction", (9, 20))],
        ),
        (([("deduction", 8, 20)], "empty_reply", "timed_out", "timed_out"), "timed_out", []),
        (([("deduction", 8, 20)], "refused"), "refused", []),
    ],
)
def test_majorities(answers, sections, rejected):
    merged = merge_votes(TRACES[0], votes_of(*answers))
    text = TRACES[0].text
    expected = [(reason, name, text[slice(*span)]) for reason, name, span in rejected]
    found = [(r.reason, r.label, r.text) for r in merged.rejected if not r.reason.startswith("judge_failed")]
    assert found == expected
    if isinstance(sections, str):
        assert failure(merged) == sections
    else:
        assert failure(merged) is None
        assert [(s.label, s.start, s.stop) for s in merged.sections] == sections


def test_merged_sections_never_overlap():
    rng = random.Random(0)
    for _ in range(300):
        votes = []
        for _ in range(5):
            cuts = sorted(rng.sample(range(8, 30), 4))
            votes.append([(rng.choice(LABELS[:2]), a, b) for a, b in zip(cuts[::2], cuts[1::2], strict=True)])
        merged = merge_votes(TRACES[0], votes_of(*votes))
        spans = [(s.start, s.stop) for s in merged.sections]
        assert all(stop <= start for (_, stop), (start, _) in pairwise(spans))
        for section in merged.sections:
            assert sum((section.label, section.start) in {v[:2] for v in vote} for vote in votes) >= 3


def test_answers_of_no_use_are_asked_for_again_on_request(server, ledger):
    server.plan = lambda content, attempt: "empty" if attempt < 2 and struck(content, 0.3) else None
    some = TRACES[:30]
    once = Run(some, spec_for(server), ledger)
    assert 0 < len(once.failures) < 15
    again = Run(some, spec_for(server, reask=2), ledger)
    assert again.failures == {} and len(server.seen) == 30 + 2 * len(once.failures)
    check_labels(again, some)
    assert Run(some, spec_for(server, reask=2), ledger).labelled == again.labelled
    assert len(server.seen) == 30 + 2 * len(once.failures)


def test_votes_out_of_range_are_refused(server, ledger):
    with pytest.raises(ValueError, match="votes 0 must be at least 1 and reask 0 at least 0"):
        Run(TRACES, spec_for(server, votes=0), ledger)


def test_the_key_is_in_the_header_and_nowhere_else(server, tmp_path, caplog):
    """Also where the endpoint sends it back: in errors, and in an answer (an echo of a problem that holds it)."""
    caplog.set_level(logging.DEBUG)
    ledger = tmp_path / "ledger.jsonl"
    some = [replace(trace, problem=f"{trace.problem} {KEY}") for trace in TRACES[:8]]
    server.plan = lambda content, attempt: "500" if attempt == 0 else "echo"
    run = Run(some, spec_for(server), ledger)
    assert set(run.failures.values()) == {"unlabelled_reply"}
    server.plan = lambda content, attempt: "500"
    failed = Run(some, spec_for(server, max_retries=0, model="judge-2"), ledger)
    assert set(failed.failures.values()) == {"server_error"}
    server.plan = lambda content, attempt: "wrong_key"
    stopped = Run(some, spec_for(server, model="judge-3"), ledger)
    ours = [str(stopped.error), repr(run.labelled), repr(failed.labelled), str(run.meter), ledger.read_text()]
    logs = [record.getMessage() for record in caplog.records if record.name.startswith("backtrack_jax")]
    assert not any(KEY in text for text in ours + logs)
    assert all("[key]" in text for text in (ours[0], ours[2], ours[4]))
    headers = [record.getMessage() for record in caplog.records]
    assert not any(f"Bearer {KEY}" in text for text in headers)


def test_the_key_of_a_local_server_may_be_any_word(server, ledger, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "deduction")
    run = Run(SOME, spec_for(server), ledger)
    assert run.failures == {}
    check_labels(run, SOME)


def test_a_notebook_can_await_it(server, ledger):
    async def cell() -> int:
        done: list[Labelled] = []
        meter = await label(TRACES[:3], spec_for(server), ledger, on_done=lambda one, _: done.append(one))
        assert meter.paid == 3
        return len(done)

    assert asyncio.run(cell()) == 3


def test_an_error_of_the_caller_ends_the_run(server, ledger):
    def on_done(labelled: Labelled, meter: Meter) -> None:
        raise OSError("disk full")

    server.latency = 0.05
    with pytest.raises(OSError, match="disk full"):
        label_traces(SOME, spec_for(server, concurrency=4), ledger, on_done=on_done)
    assert len(server.seen) <= 12
    server.latency = 0.0
    paid_before = set(server.paid) & {seen.content for seen in server.seen}
    run = Run(SOME, spec_for(server), ledger)
    assert run.failures == {} and run.meter.reused >= 1 and len(paid_before) <= 12


def test_the_name_of_the_judge_tells_model_and_prompt():
    named = (OpenAISpec(), OpenAISpec(format="inline"), OpenAISpec(votes=3))
    names = {judge_name(spec) for spec in named}
    assert names == {
        f"openai:gpt-4o-2024-08-06:sentences:{JudgePrompt().hash}",
        f"openai:gpt-4o-2024-08-06:inline:{JudgePrompt('inline').hash}",
        f"openai:gpt-4o-2024-08-06:sentences:{JudgePrompt().hash}:3votes",
    }


WORKER = """
import sys
from backtrack_jax.config import OpenAISpec
from backtrack_jax.data.records import read_traces
from backtrack_jax.judges.openai.judge import label_traces

spec = OpenAISpec(model="judge-1", base_url=sys.argv[1], concurrency=8, backoff=0.001, max_backoff=0.01)
traces = read_traces(sys.argv[2])
label_traces(traces, spec, sys.argv[3], on_done=lambda one, meter: print(one.annotation.trace_id))
"""


def test_a_killed_run_pays_again_for_nothing_but_calls_in_flight(server, ledger):
    rng = random.Random(time.time_ns())
    server.latency = 0.02
    server.plan = lambda content, attempt: "500" if attempt == 0 and struck(content, 0.2) else None
    write_jsonl(ledger.with_name("traces.jsonl"), TRACES)
    command = [sys.executable, "-c", WORKER, server.base_url, str(ledger.with_name("traces.jsonl")), str(ledger)]
    lost, killed_at, asked = 0, 0, 0
    known: set[str] = set()
    for _ in range(2):
        killed_at = rng.randint(killed_at + 1, killed_at + 90)
        reached = threading.Event()
        server.on_paid = lambda count, at=killed_at, event=reached: event.set() if count >= at else None
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        assert reached.wait(30)
        process.kill()
        process.wait()
        time.sleep(0.1)  # for what was in flight to be answered, into the void
        with server.lock:
            paid, asked = server.paid.total(), len(server.seen)
        recorded = read_entries(ledger)
        assert 0 <= paid - lost - len(recorded) <= 8  # calls in flight when it was killed
        lost = paid - len(recorded)
        known = {entry["trace"] for entry in recorded.values()}
    server.on_paid = lambda count: None
    finished = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert sorted(finished.stdout.split()) == sorted(trace.id for trace in TRACES)
    assert server.paid.total() == 200 + lost
    contents = {JudgePrompt().messages(trace)[1]["content"]: trace.id for trace in TRACES}
    assert not known & {contents[seen.content] for seen in server.seen[asked:]}
    run = Run(TRACES, spec_for(server), ledger)
    assert run.failures == {} and (run.meter.paid, run.meter.reused) == (0, 200)
    check_labels(run, TRACES)
    assert len([json.loads(line) for line in ledger.read_text().splitlines()]) == 200


@pytest.mark.parametrize(
    ("usage", "counted"),
    [
        ({"prompt_tokens": 5, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 3}}, (5, 2, 3, 0)),
        ({"prompt_tokens": "5", "completion_tokens": "2", "prompt_tokens_details": None}, (5, 2, 0, 0)),
        ({"prompt_tokens": None, "completion_tokens": [], "prompt_tokens_details": "none"}, (0, 0, 0, 1)),
        ({}, (0, 0, 0, 1)),
    ],
)
def test_tokens_are_counted_however_an_endpoint_writes_them(usage, counted):
    """The call is paid for by then; nothing in its count may stop the run."""
    meter = Meter(OpenAISpec(model="m"))
    meter.add(usage)
    found = (meter.prompt_tokens, meter.completion_tokens, meter.cached_tokens, meter.without_usage)
    assert (meter.paid, found) == (1, counted)
