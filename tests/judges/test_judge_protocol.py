"""What counts as an answer: of a server that breaks off, reads less, sends elsewhere, or is interrupted."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from fault_server import FaultServer

from backtrack_jax.config import OpenAISpec
from backtrack_jax.data.annotations import Reason, align, coverage
from backtrack_jax.data.records import Annotation, Section, Trace, failure
from backtrack_jax.judges.openai import client, judge
from backtrack_jax.judges.openai.judge import label_traces
from backtrack_jax.judges.openai.ledger import Ledger, read_entries
from backtrack_jax.judges.openai.prompts import JudgePrompt
from backtrack_jax.judges.openai.settings import Ending, JudgeStopped, ending

KEY = "sk-secret-0123456789"
TRACES = [
    Trace(f"p{i}/0", f"p{i}", "c", f"What follows {i}?", " ".join(f"Step {k} of {i} is done." for k in range(8)))
    for i in range(6)
]


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def spec_of(url: str, **changes: Any) -> OpenAISpec:
    spec = OpenAISpec(model="judge-1", base_url=url, backoff=0.001, max_backoff=0.01, max_retries=3, request_timeout=20)
    return replace(spec, **changes)


def labelled(spec: OpenAISpec, ledger: Path, traces: list[Trace] = TRACES) -> dict[str, Annotation]:
    found: dict[str, Annotation] = {}

    def keep(one: Any, meter: Any) -> None:
        found[one.annotation.trace_id] = one.annotation

    label_traces(traces, spec, ledger, on_done=keep)
    return found


@pytest.fixture
def changed() -> Iterator[Any]:
    """Serves answers that a function of (number of the request, body) has changed."""
    with FaultServer() as server:

        def start(change: Any) -> FaultServer:
            server.change = change
            return server

        yield start


def choice(**changes: Any) -> Any:
    return lambda number, body: body["choices"][0].update(changes)


@pytest.mark.parametrize("format_", ["sentences", "inline"])
@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"finish_reason": "error"}, "broken_off"),
        ({"finish_reason": "abort"}, "broken_off"),
        ({"finish_reason": "insufficient_system_resource"}, "broken_off"),
        ({"finish_reason": "something new"}, "broken_off"),
        ({"finish_reason": None}, "broken_off"),
        ({"finish_reason": 7}, "broken_off"),
        ({"finish_reason": "error", "error": {"code": 502, "message": "up"}, "message": {"content": ""}}, "broken_off"),
        ({"error": {"code": 502, "message": "up"}}, "broken_off"),
        ({"finish_reason": "MAX_TOKENS"}, "truncated_reply"),
        ({"finish_reason": "model_length"}, "truncated_reply"),
        ({"finish_reason": "SAFETY"}, "refused"),
    ],
)
def test_an_answer_that_did_not_end_is_none(
    change: dict[str, Any], why: str, format_: str, changed: Any, tmp_path: Path
) -> None:
    """What broke off is asked again, within the run and by the next one; what was cut would be cut again."""
    server = changed(choice(**change))
    found = labelled(spec_of(server.base_url, format=format_), tmp_path / "ledger.jsonl", TRACES[:2])
    assert {failure(one) for one in found.values()} == {why} and not any(one.sections for one in found.values())
    entries = read_entries(tmp_path / "ledger.jsonl")
    assert len(entries) == (0 if why == "broken_off" else 2)
    assert set(server.attempts.values()) == {4 if why == "broken_off" else 1}


def test_what_broke_off_once_is_labelled_and_its_tokens_are_counted(changed: Any, tmp_path: Path) -> None:
    server = changed(lambda n, body: body["choices"][0].update(finish_reason="abort" if n <= 6 else "stop"))
    meters = []
    label_traces(
        TRACES, spec_of(server.base_url), tmp_path / "l.jsonl", on_done=lambda one, meter: meters.append(meter)
    )
    assert (meters[-1].paid, meters[-1].broken, meters[-1].prompt_tokens) == (6, 6, 12_000)
    assert "6 answers that broke off" in str(meters[-1])


@pytest.mark.parametrize("reason", ["stop", "STOP", " end_turn", "eos_token"])
def test_reasons_of_other_providers_are_complete(reason: str, changed: Any, tmp_path: Path) -> None:
    found = labelled(spec_of(changed(choice(finish_reason=reason)).base_url), tmp_path / "ledger.jsonl")
    assert all(failure(one) is None for one in found.values()) and ending(reason) == Ending.COMPLETE


def test_an_entry_that_an_earlier_version_took_for_an_answer_is_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with FaultServer() as server:
        labelled(spec_of(server.base_url), path, TRACES[:2])
        entries = list(read_entries(path).values())
        entries[0] |= {"finish_reason": "error"}
        path.write_text("".join(json.dumps(one) + "\n" for one in entries))
        found = labelled(spec_of(server.base_url), path, TRACES[:2])
        assert all(failure(one) is None for one in found.values()) and sorted(server.paid.values()) == [1, 2]


@pytest.mark.parametrize("format_", ["sentences", "inline"])
def test_labels_of_few_sentences_are_a_failure(format_: str, tmp_path: Path) -> None:
    trace, prompt = TRACES[0], JudgePrompt(format_)
    pieces = [f"Step {k} of 0 is done." for k in range(8)]
    for n, why in ((3, "incomplete_reply"), (4, None), (8, None)):
        inline = "".join(f'["deduction"]{piece}["end-section"]' for piece in pieces[:n])
        runs = [{"from": 1, "label": "deduction"}, {"from": n + 1, "label": "nonsense"}]
        answer = inline if format_ == "inline" else json.dumps({"runs": runs[: 1 + (n < 8)]})
        entry = {"answer": answer, "finish_reason": "stop", "refusal": None, "usage": {}}
        found = judge._read(trace, entry, prompt, "judge")
        assert failure(found) == why
        if why:
            assert f"labels for {n} of 8 sentences" in found.rejected[0].text
    assert coverage(trace, Annotation("", "", (Section("deduction", 0, 30),))) == 2 / 8


@pytest.mark.parametrize(
    ("tokens", "why"), [(12, "prompt_cut"), (200, "prompt_cut"), (1000, None), (0, None), (None, None)]
)
def test_a_server_that_read_less_than_it_was_sent(tokens: Any, why: str | None, changed: Any, tmp_path: Path) -> None:
    server = changed(lambda n, body: body["usage"].update(prompt_tokens=tokens))
    found = labelled(spec_of(server.base_url), tmp_path / "ledger.jsonl", TRACES[:2])
    assert {failure(one) for one in found.values()} == {why}
    if why:
        assert f"read {tokens} tokens of about" in found["p0/0"].rejected[0].text


@pytest.mark.parametrize(
    "answer",
    [
        '<think>Perhaps {"runs":[{"from":1,"label":"deduction"}]}',
        '[THINK]{"runs":[{"from":1,"label":"deduction"}]}',
        '{"runs":[{"from":1,"label":"deduction"}],"runs":[{"from":1,"label":"other"}]}',
        '{"runs":[{"from":1,"from":2,"label":"deduction"}]}',
        '{"runs":[{"from":1,"to":2,"label":"deduction"}]}',
        '{"runs":[{"start":1,"end":3,"from":1,"label":"deduction"}]}',
        '{"runs":[{"from":1,"label":"deduction"}],"draft":true}',
        '{"runs":[{"from":1.0,"label":"deduction"}]}',
        '{"runs":[{"from":true,"label":"deduction"}]}',
    ],
)
def test_what_is_not_the_answer_is_not_read_as_one(answer: str) -> None:
    found = JudgePrompt("sentences").read(TRACES[0], answer, "judge")
    assert not found.sections and found.rejected[0].reason == Reason.NO_SECTIONS


@pytest.mark.parametrize(
    "label", ["bac\u212atracking", "dedu\u0441tion", "deduct\u0131on", "\uff44eduction", "back\u00adtracking"]
)
def test_letters_that_only_look_like_a_label_are_none(label: str) -> None:
    answer = json.dumps({"runs": [{"from": 1, "label": label}]}, ensure_ascii=False)
    found = JudgePrompt("sentences").read(TRACES[0], answer, "judge")
    assert not found.sections and found.rejected[0].reason == Reason.UNKNOWN_LABEL
    chain = f'["{label}"]Step 0 of 0 is done.["end-section"]["deduction"]Step 1 of 0 is done.["end-section"]'
    placed = align(TRACES[0], chain)
    assert [section.label for section in placed.sections] == ["deduction"] and placed.sections[0].start > 10


def test_a_redirect_is_not_followed(tmp_path: Path) -> None:
    """Not to another port of this machine either: the trace is sent to base_url alone."""
    received: list[str] = []

    class Other(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(self.path)

        def log_message(self, format: str, *args: object) -> None: ...

    class First(Other):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(self.server.status)  # type: ignore[attr-defined]
            self.send_header("Location", f"http://127.0.0.1:{other.server_port}/v1/chat/completions")
            self.send_header("Content-Length", "0")
            self.end_headers()

    other, first = ThreadingHTTPServer(("127.0.0.1", 0), Other), ThreadingHTTPServer(("127.0.0.1", 0), First)
    for server in (other, first):
        Thread(target=server.serve_forever, daemon=True).start()
    for first.status in (301, 302, 307, 308):  # type: ignore[attr-defined]
        with pytest.raises(JudgeStopped, match=rf"sends requests on to http://127.0.0.1:{other.server_port}/v1"):
            labelled(spec_of(f"http://127.0.0.1:{first.server_port}/v1"), tmp_path / "ledger.jsonl", TRACES[:2])
    assert not received
    for server in (other, first):
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("secret", [KEY, "k-1234", 'sk-"quote\\and/slash'])
def test_a_key_in_any_spelling_reaches_no_file(
    secret: str, changed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer holds it, as JSON writes it and with every character escaped."""
    monkeypatch.setenv("OPENAI_API_KEY", secret)
    server = changed(lambda n, body: body.update(system_fingerprint=f"a {secret} b", id=[secret, {secret: secret}]))
    labelled(spec_of(server.base_url), tmp_path / "ledger.jsonl", TRACES[:1])
    text = (tmp_path / "ledger.jsonl").read_text()
    assert json.dumps(secret)[1:-1] not in text and secret not in text and "a [key] b" in text
    with Ledger(tmp_path / "other.jsonl") as ledger:
        redact = client.ChatClient(spec_of(server.base_url), ledger)._redact
    for spelling in (json.dumps(secret), "".join(f"\\u{ord(c):04X}" for c in secret), secret.replace("/", "\\/")):
        assert redact(f"error: {spelling} is wrong").count("[key]") == 1


def test_an_address_without_encryption_is_warned_of() -> None:
    assert "not encrypted" in str(client.sent_in_the_open("http://judge.example:8000/v1"))
    for url in ("https://judge.example/v1", "http://localhost:8000/v1", "http://127.0.0.1/v1", "http://[::1]:1/v1"):
        assert client.sent_in_the_open(url) is None


def test_a_full_disk_loses_no_answer_that_is_in_flight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From some answer on there is only the room that was reserved: the calls in flight fit, no further one is made."""
    write, path = os.write, tmp_path / "ledger.jsonl"
    reserve = path.with_name(".ledger.jsonl.reserve")
    written = Counter()

    def filling(file: int, data: Any) -> int:
        if bytes(data).startswith(b'{"key"'):
            written["entries"] += 1
            if written["entries"] > 2 and reserve.exists():
                raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, data)

    with FaultServer() as server:
        server.latency = 0.1
        with (
            monkeypatch.context() as patch,
            pytest.raises(JudgeStopped, match="the disk is full: what was paid for is"),
        ):
            patch.setattr(os, "write", filling)
            labelled(spec_of(server.base_url, concurrency=2), path)
        assert len(read_entries(path)) == server.paid.total() < 6 and not reserve.exists()
        server.latency = 0.0
        found = labelled(spec_of(server.base_url), path)
        assert all(failure(one) is None for one in found.values()) and set(server.paid.values()) == {1}


PROGRAM = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
sys.path[:0] = [{tests!r}]
from test_judge_protocol import TRACES, labelled, spec_of
from pathlib import Path
print("begun", flush=True)
labelled(spec_of({url!r}, concurrency=3), Path({ledger!r}))
print("all labelled")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_drains(number: signal.Signals, tmp_path: Path) -> None:
    """What is in flight is paid for, so it is recorded; no further call is made, and the signal acts then."""
    path = tmp_path / "ledger.jsonl"
    with FaultServer() as server:
        server.latency = 1.0
        program = PROGRAM.format(tests=str(Path(__file__).parent), url=server.base_url, ledger=str(path))
        with subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            deadline = time.monotonic() + 60
            while server.in_flight < 3 and time.monotonic() < deadline:
                time.sleep(0.01)
            process.send_signal(number)
            out, _ = process.communicate(timeout=60)
        assert process.returncode not in (0, None) and "all labelled" not in out and "end first" in out
        assert len(read_entries(path)) == server.paid.total() == 3
        server.latency = 0.0
        found = labelled(spec_of(server.base_url), path)
        assert all(failure(one) is None for one in found.values()) and set(server.paid.values()) == {1}
