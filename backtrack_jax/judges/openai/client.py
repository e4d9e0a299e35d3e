"""Calls to an OpenAI-compatible chat endpoint: bounded, retried, metered, and paid for once.

`ChatClient.complete` is one call. It is looked up in the ledger before it waits for anything; else it takes one of
`concurrency` places, and is retried with exponential backoff and jitter, never sooner than the endpoint's Retry-After,
until it is answered or given up. The two kinds of faults are those of `settings`.

The key is read from the environment and goes nowhere but into the request's header: not into the ledger, an error
message or a log, even where the endpoint sends it back.
"""

import asyncio
import contextlib
import email.utils
import json
import math
import random
import re
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from types import FrameType, TracebackType
from typing import Any
from urllib.parse import urlsplit

import openai

from backtrack_jax.config import OpenAISpec
from backtrack_jax.files.console import say
from backtrack_jax.judges.openai.ledger import Entry, Ledger, content_key
from backtrack_jax.judges.openai.settings import (
    CallFailed,
    CallFault,
    Ending,
    JudgeStopped,
    Meter,
    check,
    ending,
    read_key,
)

_SHORTEST_SECRET, _LONGEST_WORD = 4, 16
_CONNECT_ATTEMPTS = 3


class _Retry(Exception):
    """A fault that may pass; `wait`: seconds that the endpoint asks for."""

    def __init__(self, fault: CallFault, detail: str, wait: float = 0.0) -> None:
        super().__init__(detail)
        self.fault = fault
        self.wait = wait


class ChatClient:
    """An open connection to the endpoint. Use it as an asynchronous context manager.

    Args:
        spec: endpoint and limits.
        ledger: where paid calls are looked up and recorded.

    Raises:
        ValueError: an invalid endpoint or limit.
        JudgeStopped: the key is not set, or cannot be one.
    """

    def __init__(self, spec: OpenAISpec, ledger: Ledger) -> None:
        check(spec)
        self.spec = spec
        self.meter = Meter(spec)
        self._ledger = ledger
        self._key = read_key(spec)
        self._client = openai.AsyncOpenAI(
            api_key=self._key,
            base_url=spec.base_url,
            max_retries=0,
            # A redirect would take the trace, and on the same host the key, to an address that nobody named.
            http_client=openai.DefaultAsyncHttpxClient(follow_redirects=False, timeout=spec.request_timeout),
        )
        if (warning := sent_in_the_open(spec.base_url)) is not None:
            say(warning)
        self._places = asyncio.Semaphore(spec.concurrency)
        self._stop = asyncio.Event()
        self._stopped: JudgeStopped | None = None
        self._reached = False  # whether the endpoint has ever answered
        self._resume_at = 0.0  # no attempt starts before: the last Retry-After, for all calls
        self._started_at = time.monotonic()

    async def __aenter__(self) -> "ChatClient":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.close()

    async def complete(self, request: Mapping[str, Any], vote: int = 0, **about: Any) -> Entry:
        """One call, answered from the ledger or by the endpoint.

        Args:
            request: body of the request, see `settings.request`.
            vote: number of the answer among several to the same request; part of the key.
            about: more to record beside the answer, e.g. the hash of the prompt.

        Returns:
            The ledger's entry: `answer` (text, possibly empty), `finish_reason`, `refusal`, `model` and
            `system_fingerprint` as the endpoint gave them, `usage`, the request's parameters, `vote`, `time`.

        Raises:
            CallFailed: no answer after all retries.
            JudgeStopped: no call can succeed, or a limit was reached.
        """
        try:
            entry, reused = await self._ledger.fetch(
                content_key(request, vote), lambda: self._pay(request, {"vote": vote, **about}), _is_answer
            )
        except CallFailed as error:
            self.meter.failed[error.fault] += 1
            raise
        if reused:
            self.meter.reused += 1
        else:
            self.meter.add(entry["usage"])
        return entry

    async def _pay(self, request: Mapping[str, Any], about: Mapping[str, Any]) -> Entry:
        async with self._places:
            body = await self._attempts(request)
        choice, usage = _first_choice(body), _usage(body)
        message = choice.get("message")
        message = message if isinstance(message, dict) else {}  # null where a content filter took the answer back
        parameters = {name: value for name, value in request.items() if name not in ("model", "messages")}
        return {
            "requested_model": request["model"],
            "parameters": parameters,
            **about,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "model": body.get("model"),
            "system_fingerprint": body.get("system_fingerprint"),
            "id": body.get("id"),
            "usage": usage,
            "finish_reason": choice.get("finish_reason"),
            "refusal": message.get("refusal"),
            "answer": _text(message.get("content")),
        }

    async def _attempts(self, request: Mapping[str, Any]) -> dict[str, Any]:
        spec = self.spec
        deadline = time.monotonic() + spec.call_timeout
        attempt = 0
        while True:
            await self._wait(self._resume_at - time.monotonic())
            self._check_limits()
            try:
                return await self._attempt(request)
            except _Retry as fault:
                if fault.fault == CallFault.UNREACHABLE and not self._reached and attempt + 1 >= _CONNECT_ATTEMPTS:
                    raise self._stop_all(self._unreachable(fault)) from None
                backoff = min(spec.backoff * 2**attempt, spec.max_backoff) * random.uniform(0.5, 1.0)
                wait = fault.wait + backoff
                if attempt == spec.max_retries or time.monotonic() + wait > deadline:
                    raise CallFailed(fault.fault, f"{fault} ({attempt + 1} attempts)") from None
                self._resume_at = max(self._resume_at, time.monotonic() + fault.wait)
            except JudgeStopped as error:
                raise self._stop_all(error) from None
            attempt += 1
            self.meter.retries += 1
            await self._wait(wait)

    @contextlib.contextmanager
    def drained(self) -> Iterator[None]:
        """In it, the first SIGINT or SIGTERM lets the calls in flight end and be recorded, and acts at the end.

        A second one acts at once. Outside of the main thread, and for signals that are ignored, nothing changes.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop, received = asyncio.get_running_loop(), []
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        def drain(number: int, frame: FrameType | None) -> None:
            del frame
            received.append(number)
            restore()
            name = signal.Signals(number).name
            loop.call_soon_threadsafe(self.stop, f"{name}: no further call was made; the same command resumes")
            say(f"\n  {name}: calls in flight are paid for, and end first; once more to quit at once")

        for number in before:
            signal.signal(number, drain)
        try:
            yield
        finally:
            restore()
            if received:
                signal.raise_signal(received[0])

    def stop(self, why: str) -> None:
        """Lets no further attempt start; those in flight end and are recorded."""
        self._stop_all(JudgeStopped(why))

    def _stop_all(self, error: JudgeStopped) -> JudgeStopped:
        """Lets no further attempt start; the first error stays the one that is reported."""
        self._stopped = self._stopped or error
        self._stop.set()
        return self._stopped

    async def _wait(self, seconds: float) -> None:
        """Sleeps, but not through a stop."""
        if seconds > 0:
            try:
                await asyncio.wait_for(self._stop.wait(), seconds)
            except TimeoutError:
                return

    def _check_limits(self) -> None:
        spec = self.spec
        if self._stopped is not None:
            raise self._stopped
        again = "run the same command again to resume"
        if self._ledger.full:
            why = f"the disk is full: what was paid for is in {self._ledger.path}; make room, and {again}"
        elif spec.run_timeout and time.monotonic() - self._started_at > spec.run_timeout:
            why = f"the judge's run_timeout of {spec.run_timeout:g} s has passed ({self.meter}); {again}"
        elif spec.max_cost and (self.meter.cost or 0.0) >= spec.max_cost:
            why = f"the judge's max_cost of ${spec.max_cost:g} is reached ({self.meter}); {again}, for as much again"
        elif spec.max_cost and self.meter.without_usage:
            why = (
                f"the judge's max_cost cannot be enforced: {spec.base_url} answers without counts of tokens "
                f"({self.meter}). Set max_cost to 0 and {again}"
            )
        else:
            return
        raise self._stop_all(JudgeStopped(why))

    async def _attempt(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """One request; the parsed body of a chat completion, or `_Retry`, `CallFailed`, `JudgeStopped`."""
        extra = {name: value for name, value in request.items() if name not in ("model", "messages")}
        try:
            async with asyncio.timeout(self.spec.request_timeout):
                response = await self._client.chat.completions.with_raw_response.create(
                    model=request["model"], messages=request["messages"], extra_body=extra
                )
        except (TimeoutError, openai.APIConnectionError, openai.APIStatusError) as error:
            raise self._classify(error) from None
        self._reached = True
        text = self._redact(response.http_response.text)
        try:
            body = self._redact_values(json.loads(text))
        except (ValueError, RecursionError):
            body = None
        if isinstance(body, dict):
            error = body.get("error")
            if isinstance(error, dict) and not body.get("choices") and not body.get("usage"):
                raise self._classify_body(error, response.http_response, text)
            if body.get("choices") is not None or body.get("usage") is not None:
                if (why := _broken(body)) is not None:
                    self.meter.add_broken(_usage(body))
                    raise _Retry(CallFault.BROKEN_OFF, why)
                return body  # with or without a message: it was answered, and is paid for
        raise _Retry(CallFault.NOT_A_COMPLETION, f"the endpoint answered {text[:200]!r}")

    def _redact(self, text: str) -> str:
        """Text for the screen, without the key in any spelling of JSON's."""
        # The "key" of a local server may be any word, which is not a secret and may well occur in an answer.
        if len(self._key) < _SHORTEST_SECRET or (self._key.isalpha() and len(self._key) < _LONGEST_WORD):
            return text
        escaped = "".join(rf"(?:{re.escape(char)}|\\{re.escape(char)}|\\u{ord(char):04x})" for char in self._key)
        return re.sub(escaped, "[key]", text, flags=re.IGNORECASE if "\\" in text else 0)

    def _redact_values(self, value: Any) -> Any:
        """The same of every text of an answer, in which nothing is escaped any more."""
        if isinstance(value, str):
            return self._redact(value)
        if isinstance(value, list):
            return [self._redact_values(item) for item in value]
        if isinstance(value, dict):
            return {self._redact(name): self._redact_values(item) for name, item in value.items()}
        return value

    def _classify(self, error: Exception) -> Exception:
        """What a fault of the request means for this call and for the others."""
        if isinstance(error, openai.APIStatusError):
            self._reached = True
            detail = f"HTTP {error.status_code}: {self._redact(str(error))[:300]}"
            return self._classify_status(error, error.status_code, detail)
        cause = type(error.__cause__).__name__  # of httpx or httpx2, which the versions of openai differ in
        if cause in ("ConnectError", "ConnectTimeout"):
            return _Retry(CallFault.UNREACHABLE, str(error.__cause__) or cause)
        if isinstance(error, TimeoutError | openai.APITimeoutError):
            return _Retry(CallFault.TIMED_OUT, f"no answer within {self.spec.request_timeout:g} s")
        return _Retry(CallFault.DISCONNECTED, self._redact(f"{error} {error.__cause__ or ''}"))

    def _classify_body(self, body: dict[str, Any], response: Any, text: str) -> Exception:
        """What an error means that came with HTTP 200: the same as under the status that its code names."""
        code = str(body.get("code"))
        if not (code.isascii() and code.isdecimal() and 400 <= int(code[:4]) <= 599):
            return _Retry(CallFault.NOT_A_COMPLETION, f"the endpoint answered {text[:200]!r}")
        error = openai.APIStatusError(str(body.get("message")), response=response, body=body)
        return self._classify_status(error, int(code[:4]), f"HTTP 200 with error {code}: {text[:300]}")

    def _unreachable(self, fault: _Retry) -> JudgeStopped:
        return JudgeStopped(
            f"the judge's endpoint {self.spec.base_url} cannot be reached ({fault}). Check base_url, and that the "
            "server runs"
        )

    def _classify_status(self, error: openai.APIStatusError, status: int, detail: str) -> Exception:
        url, model = self.spec.base_url, self.spec.model
        again = "what was paid for is kept: run the same command again to resume"
        if status == 402 or {str(error.code), str(error.type)} & {"insufficient_quota", "billing_hard_limit_reached"}:
            return JudgeStopped(
                f"the account at {url} is out of money or over its quota ({detail}). Add credit or raise the limit; "
                + again
            )
        # 403 is a key without rights, or a text that a filter refuses: where anything was ever answered, the latter.
        if status == 401 or (status == 403 and not len(self._ledger)):
            return JudgeStopped(
                f"{url} refuses the key in the environment variable {self.spec.key_variable} ({detail}). Set it to "
                f"a key that may use the model {model!r}; {again}"
            )
        if status == 403:
            return CallFailed(CallFault.FORBIDDEN, detail)
        if 300 <= status < 400:
            leads = self._redact(str(error.response.headers.get("location", "an address it does not name")))
            return JudgeStopped(
                f"{url} sends requests on to {leads} (HTTP {status}), and traces go nowhere but to base_url; set "
                f"base_url to the address that answers; {again}"
            )
        if status == 404:
            return JudgeStopped(
                f"{url} has no model {model!r}, or is not the address of a chat completions API, which most often "
                f"ends in /v1 ({detail}). Check model and base_url; {again}"
            )
        if status in (408, 409, 429) or status >= 500:
            fault = CallFault.RATE_LIMITED if status == 429 else CallFault.SERVER_ERROR
            return _Retry(fault, detail, _retry_after(error.response.headers))
        parameter = str(error.param).partition(".")[0]
        if parameter in OpenAISpec.__dataclass_fields__:
            return JudgeStopped(
                f"{url} does not accept the judge's {parameter} ({detail}). Change it or leave it out; {again}"
            )
        return CallFailed(CallFault.BAD_REQUEST, detail)


def _usage(body: Mapping[str, Any]) -> dict[str, Any]:
    """What the endpoint counted, empty where it counted nothing."""
    usage = body.get("usage")
    return usage if isinstance(usage, dict) else {}


def _broken(body: Mapping[str, Any]) -> str | None:
    """Why an answer is none that ended, in words; None for one that did, or that has no choice at all."""
    choice = _first_choice(body)
    if not choice:
        return None
    if error := choice.get("error"):
        return f"the answer broke off with the error {str(error)[:200]}"
    if ending(choice.get("finish_reason")) == Ending.BROKEN_OFF:
        return f"the answer broke off with finish_reason={choice.get('finish_reason')!r}"
    return None


def _is_answer(entry: Mapping[str, Any]) -> bool:
    """Whether an entry of a ledger, which an earlier version may have written, is of an answer that ended."""
    nothing = entry.get("finish_reason") is None and not entry.get("answer", "").strip()  # no choice, but a bill
    return nothing or ending(entry.get("finish_reason")) != Ending.BROKEN_OFF


def sent_in_the_open(base_url: str) -> str | None:
    """A warning where key and traces would go to another machine without encryption; None where not."""
    url = urlsplit(base_url)
    local = url.hostname in ("localhost", "::1") or str(url.hostname).startswith("127.")
    if url.scheme != "http" or local:
        return None
    return f"  warning: {base_url} is not encrypted: key and traces can be read on the way there; https:// is"


def _first_choice(body: Mapping[str, Any]) -> dict[str, Any]:
    """The choice of an answer, empty where it has none."""
    choices = body.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    return first if isinstance(first, dict) else {}


def _text(content: Any) -> str:
    """Text of a message's content: a string or nothing, or a list of parts, of which those of type `text` count."""
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
    return "".join(text for text in texts if isinstance(text, str))


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that the endpoint asks to wait, 0 where it does not: Retry-After as seconds or date, or in ms."""
    for name, scale in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        try:
            seconds = float(headers[name]) / scale
        except (KeyError, ValueError):
            continue
        return max(0.0, seconds) if math.isfinite(seconds) else 0.0
    try:
        return max(0.0, email.utils.parsedate_to_datetime(headers["retry-after"]).timestamp() - time.time())
    except (KeyError, ValueError, OverflowError):  # the last: a date out of range
        return 0.0
