"""A real HTTP server on loopback that speaks chat completions, labels honestly, and gives faults on demand.

It counts what a provider would bill: complete answers with HTTP 200. By itself it serves until standard input closes:

    python tests/judges/fault_server.py --latency=0.1      prints its base_url
"""

import argparse
import json
import random
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

UNPAID = (
    "429",
    "500",
    "503",
    "timeout",
    "drop",
    "cut_body",
    "half_body",
    "web_page",
    "error_200",
    "too_long",
    "filtered",
)
"""Faults in which the client gets no complete answer. `too_long` (HTTP 400) and `filtered` (HTTP 403, as for a wrong
key) are not worth another attempt."""

PAID = (
    "truncated_json",
    "length",
    "bad_labels",
    "echo",
    "empty",
    "null",
    "refusal",
    "chat",
    "no_such_sentence",
    "number",
    "taken_back",
    "no_choices",
)
"""Answers that are complete, and of no use. (`parts` and `no_usage` are good ones of another form.)"""

FATAL = {
    "wrong_key": (401, {"code": "invalid_api_key", "message": "Incorrect API key provided: {key}"}),
    "forbidden": (403, {"code": None, "message": "Country not supported"}),
    "unknown_model": (404, {"code": "model_not_found", "message": "The model does not exist"}),
    "quota": (429, {"code": "insufficient_quota", "message": "You exceeded your current quota"}),
    "payment_403": (403, {"code": "insufficient_quota", "message": "Free tier is used up"}),
    "payment": (402, {"code": None, "message": "Insufficient balance"}),
    "parameter": (400, {"code": "unsupported_value", "param": "temperature", "message": "Only 1 is supported"}),
}
"""Status and error of the faults after which no call can succeed."""

Plan = Callable[[str, int], str | None]
"""(the user's message, number of this attempt at it from 0 on) -> name of a fault, or None for an honest answer."""


@dataclass(frozen=True)
class Seen:
    """One request as it came in."""

    content: str
    attempt: int
    time: float
    body: dict[str, Any]


def honest_label(sentence: str) -> str:
    """The label that the server gives: by the first word."""
    first = re.findall(r"[a-z]+", sentence.lower())[:1]
    return {"wait": "backtracking", "okay": "initializing"}.get(first[0] if first else "", "deduction")


def honest_answer(messages: list[dict[str, str]]) -> str:
    """Labels of what the user's message shows, in the format that the system message asks for."""
    if '"problems"' in messages[0]["content"]:
        return honest_problems(messages[1]["content"])
    reasoning = messages[1]["content"].split("Reasoning to be labelled:\n", 1)[1]
    if '"runs"' not in messages[0]["content"]:
        pieces = re.findall(r"[^.!?]+[.!?]*\s*", reasoning)
        return "".join(f'["{honest_label(piece)}"]{piece}["end-section"]' for piece in pieces)
    labels = [honest_label(line.split(": ", 1)[1]) for line in reasoning.split("\n")]
    runs = [{"from": i + 1, "label": label} for i, label in enumerate(labels) if i == 0 or label != labels[i - 1]]
    return json.dumps({"runs": runs}, separators=(",", ":"))


def honest_problems(question: str) -> str:
    """As many problems as are asked for; the first of them is the same in every set of a category."""
    category = question.split("\n")[0]
    count = int(re.findall(r"Write (\d+) problems", question)[0])
    seeds = [category, *(f"{question} {i}" for i in range(1, count))]
    words = [
        f"{syllable}{end}" for syllable in ("ba", "do", "fi", "ku", "lo", "me", "pu") for end in ("rn", "st", "ll")
    ]
    problems = [" ".join(random.Random(seed).choices(words, k=20)).capitalize() + "?" for seed in seeds]
    return json.dumps({"problems": problems})


def faulty_choice(fault: str | None, messages: list[dict[str, str]]) -> dict[str, Any]:
    """The choice of a complete answer, honest or one of `PAID`."""
    honest, inline = honest_answer(messages), '"runs"' not in messages[0]["content"]
    content: Any = {
        "truncated_json": honest[: len(honest) // 2].rsplit("}", 1)[0],
        "length": honest[:-9],
        "bad_labels": re.sub("deduction|initializing|backtracking", "verification", honest),
        "echo": messages[0]["content"] + "\n" + messages[1]["content"],
        "empty": " \n",
        "null": None,
        "refusal": None,
        "number": 7,
        "parts": [{"type": "thinking", "thinking": "Let me see."}, {"type": "text", "text": honest}],
        "chat": "I would rather not label this. Is there anything else?",
        "no_such_sentence": '{"runs":[{"from":999,"label":"deduction"}]}'
        if not inline
        else '["deduction"]Something else altogether, which nobody said.["end-section"]',
    }.get(fault or "", honest)
    refusal = "I cannot help with that." if fault == "refusal" else None
    message = {"role": "assistant", "content": content, "refusal": refusal}
    return {"index": 0, "message": message, "finish_reason": "length" if fault == "length" else "stop"}


class FaultServer(ThreadingHTTPServer):
    """The server; a context manager that serves from a thread of its own.

    Attributes:
        plan: which request gets which fault; may be replaced while it runs.
        latency: seconds before every answer.
        change: given the number of the request and a complete answer, may change it before it is sent.
        retry_after: value of the header that 429 and 503 carry; None for none.
        seen: all requests.
        paid: complete answers by content.
        max_in_flight: most requests that were open at the same time.
    """

    request_queue_size = 256
    daemon_threads = True

    def __init__(self, plan: Plan = lambda content, attempt: None, latency: float = 0.0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.plan, self.latency = plan, latency
        self.change: Callable[[int, dict[str, Any]], object] = lambda number, answer: None
        self.retry_after: str | None = None
        self.on_paid: Callable[[int], None] = lambda count: None
        self.seen: list[Seen] = []
        self.paid: Counter[str] = Counter()
        self.attempts: Counter[str] = Counter()
        self.in_flight = self.max_in_flight = 0
        self.lock = threading.Lock()
        self.closing = threading.Event()

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away (it timed out, or was killed) is no error of the server."""

    def __enter__(self) -> "FaultServer":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:
        pass

    @property
    def faults(self) -> FaultServer:
        assert isinstance(self.server, FaultServer)
        return self.server

    def do_POST(self) -> None:
        server = self.faults
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        content = body["messages"][-1]["content"]
        with server.lock:
            attempt = server.attempts[content]
            server.attempts[content] += 1
            server.seen.append(Seen(content, attempt, time.monotonic(), body))
            server.in_flight += 1
            server.max_in_flight = max(server.max_in_flight, server.in_flight)
        try:
            fault = server.plan(content, attempt)
            if server.latency:
                server.closing.wait(server.latency)
        finally:
            with server.lock:
                server.in_flight -= 1
        self.answer(fault, body, content)

    def answer(self, fault: str | None, body: dict[str, Any], content: str) -> None:
        if fault in FATAL:
            status, error = FATAL[fault]
            key = self.headers.get("Authorization", "").removeprefix("Bearer ")
            self.send(status, json.dumps({"error": error | {"message": error["message"].format(key=key)}}))
        elif fault in ("429", "500", "503"):
            key = self.headers["Authorization"]
            self.send(int(fault), json.dumps({"error": {"message": f"try later, {key}", "code": None}}))
        elif fault == "too_long":
            error = {"message": "maximum context length", "code": "context_length_exceeded", "param": "messages"}
            self.send(400, json.dumps({"error": error}))
        elif fault == "filtered":
            self.send(403, json.dumps({"error": {"message": "flagged by moderation", "code": None}}))
        elif fault == "timeout":
            self.faults.closing.wait(30)
            self.close_connection = True
        elif fault == "drop":
            self.close_connection = True
        elif fault == "web_page":
            self.send(200, "<html><body>Welcome</body></html>", kind="text/html")
        elif fault in ("error_200", "payment_200"):
            code = {"error_200": 503, "payment_200": 402}[fault]
            self.send(200, json.dumps({"error": {"code": code, "message": "Provider returned error"}}))
        else:
            self.complete(fault, body, content)

    def complete(self, fault: str | None, body: dict[str, Any], content: str) -> None:
        choice = faulty_choice(fault, body["messages"])
        answer = {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 1,
            "model": body["model"] + "-snapshot",
            "system_fingerprint": "fp_1",
            "choices": [choice],
            "usage": {
                "prompt_tokens": 1000,
                "completion_tokens": 100,
                "total_tokens": 1100,
                "prompt_tokens_details": {"cached_tokens": 400},
            },
        }
        if fault == "taken_back":  # by a content filter
            choice |= {"message": None, "finish_reason": "content_filter"}
        if fault == "no_choices":
            answer["choices"] = []
        if fault == "no_usage":
            del answer["usage"]
        self.faults.change(len(self.faults.seen), answer)
        text = json.dumps(answer)
        if fault == "half_body":
            self.send(200, text[: len(text) // 2])
        elif fault == "cut_body":
            self.send(200, text[: len(text) // 2], length=len(text))
            self.close_connection = True
        else:
            with self.faults.lock:
                self.faults.paid[content] += 1
                count = self.faults.paid.total()
            self.send(200, text)
            self.faults.on_paid(count)

    def send(self, status: int, text: str, *, kind: str = "application/json", length: int | None = None) -> None:
        data = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        if status in (429, 503) and self.faults.retry_after is not None:
            self.send_header("Retry-After", self.faults.retry_after)
        self.end_headers()
        self.wfile.write(data)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latency", type=float, default=0.0, help="seconds before every answer")
    with FaultServer(latency=parser.parse_args().latency) as running:
        print(running.base_url, flush=True)
        sys.stdin.read()
