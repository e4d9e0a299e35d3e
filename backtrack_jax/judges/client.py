"""Calls to an OpenAI-compatible chat endpoint: bounded, retried, metered, and paid for once.

`ChatClient.complete` is one call. It is looked up in the ledger before it waits for anything; else it takes one of
`concurrency` places, and is retried with exponential backoff and jitter, never sooner than the endpoint's Retry-After,
until it is answered or given up. Faults come in two kinds:

- `CallFailed`: this call got no answer (rate limit, server error, time-out, dropped connection, refused request) after
  all its retries. Nothing was paid; the others go on, and the next run asks again.
- `JudgeStopped`: no call can succeed (no key, wrong key, no such endpoint or model, no money) or a limit of the user's
  was reached. No new call starts, those in flight end and are recorded, then the error is raised with what to do. The
  same command goes on from there.

The key is read from the environment and goes nowhere but into the request's header: not into the ledger, an error
message or a log, even where the endpoint sends it back.
"""

import asyncio
import email.utils
import json
import os
import random
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import openai

from backtrack_jax.judges.ledger import Entry, Ledger, content_key

_SHORTEST_SECRET = 16
_CONNECT_ATTEMPTS = 3


class CallFault(StrEnum):
    """Why a call got no answer."""

    RATE_LIMITED = "rate_limited"
    SERVER_ERROR = "server_error"
    TIMED_OUT = "timed_out"
    DISCONNECTED = "disconnected"
    UNREACHABLE = "unreachable"
    """No connection. When the endpoint has never answered, the run stops after `_CONNECT_ATTEMPTS` of these."""
    NOT_A_COMPLETION = "not_a_completion"
    """HTTP 200 with a body that is not a chat completion: cut off, or a web page of something else."""
    BAD_REQUEST = "bad_request"
    """The endpoint refuses this request, e.g. because the text is too long for the model. Never retried."""


class CallFailed(Exception):
    """One call got no answer; `fault` says why, the message gives the endpoint's words."""

    def __init__(self, fault: CallFault, detail: str) -> None:
        super().__init__(detail)
        self.fault = fault


class JudgeStopped(RuntimeError):
    """No further call can succeed; the message says why and what to do. What was paid for is in the ledger."""


class _Retry(Exception):
    """A fault that may pass; `wait`: seconds that the endpoint asks for."""

    def __init__(self, fault: CallFault, detail: str, wait: float = 0.0) -> None:
        super().__init__(detail)
        self.fault = fault
        self.wait = wait


@dataclass(frozen=True)
class ChatSettings:
    """The endpoint, what every request asks of it, and the limits.

    Attributes:
        model: name at the endpoint; a dated snapshot gives the same labels next month, an alias may not.
        base_url: of the API, version included. Any OpenAI-compatible server.
        key_variable: environment variable that holds the key.
        temperature: sampling temperature; None leaves it out of the request, for models that refuse it.
        seed: sampling seed, the number of the vote is added; None leaves it out.
        max_tokens: limit of the answer in tokens; None leaves it out.
        extra_body: more fields of the request, e.g. `{"reasoning_effort": "low"}`.
        concurrency: calls at the same time.
        request_timeout: seconds for one attempt, from connecting to the last byte.
        call_timeout: seconds for one call, all its attempts and pauses together; no attempt starts later.
        run_timeout: seconds after which no new call starts; None for no limit.
        max_retries: attempts after the first.
        backoff: seconds before the first retry, doubled for each further one; half of it is random.
        max_backoff: limit of that doubling in seconds; Retry-After may ask for more.
        input_price: US dollars per million tokens of the prompt; None where it is not known, then no cost is given.
        cached_price: the same for tokens that the provider served from its prefix cache; None: as `input_price`.
        output_price: the same for tokens of the answer.
        max_cost: US dollars after which no new call starts; needs the prices. Calls in flight can exceed it.
    """

    model: str = "gpt-4o-2024-08-06"
    base_url: str = "https://api.openai.com/v1"
    key_variable: str = "OPENAI_API_KEY"
    temperature: float | None = 0.0
    seed: int | None = 0
    max_tokens: int | None = 4096
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    concurrency: int = 32
    request_timeout: float = 120.0
    call_timeout: float = 900.0
    run_timeout: float | None = None
    max_retries: int = 8
    backoff: float = 1.0
    max_backoff: float = 60.0
    input_price: float | None = None
    cached_price: float | None = None
    output_price: float | None = None
    max_cost: float | None = None

    def __post_init__(self) -> None:
        if not self.model.strip():
            raise ValueError("the judge's model is empty; name one, e.g. gpt-4o-2024-08-06")
        url = urlsplit(self.base_url)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError(
                f"the judge's base_url {self.base_url!r} is not an address; accepted: http(s)://host[:port]/v1"
            )
        if url.username or url.password:
            raise ValueError(f"the judge's base_url holds credentials; the key belongs into ${self.key_variable}")
        for name, least in (("concurrency", 1), ("max_retries", 0), ("backoff", 0), ("max_backoff", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"the judge's {name} {getattr(self, name)} must be at least {least}")
        for name in ("request_timeout", "call_timeout"):
            if getattr(self, name) <= 0:
                raise ValueError(f"the judge's {name} {getattr(self, name)} must be more than 0 seconds")
        if self.max_cost is not None and (self.input_price is None or self.output_price is None):
            raise ValueError("max_cost of the judge needs input_price and output_price")

    def cost(self, prompt: int, completion: int, cached: int = 0) -> float | None:
        """US dollars for tokens of prompts (of them `cached` from the cache) and answers; None without prices."""
        if self.input_price is None or self.output_price is None:
            return None
        cached_price = self.input_price if self.cached_price is None else self.cached_price
        dollars = (prompt - cached) * self.input_price + cached * cached_price + completion * self.output_price
        return dollars / 1e6

    def request(self, messages: list[dict[str, str]], vote: int = 0, **fields: Any) -> dict[str, Any]:
        """Body of the request for these messages; `fields` are more of its fields."""
        sampling = {
            "temperature": self.temperature,
            "seed": None if self.seed is None else self.seed + vote,
            "max_tokens": self.max_tokens,
        }
        given = {name: value for name, value in sampling.items() if value is not None}
        return {"model": self.model, "messages": messages, **given, **fields, **self.extra_body}


@dataclass
class Meter:
    """What a run has asked and paid for so far. Answers from the ledger cost nothing and count in `reused` only.

    Attributes:
        settings: the prices.
        paid: calls that were answered by the endpoint.
        reused: calls that were answered by the ledger.
        retries: attempts that were repeated.
        failed: calls that got no answer, by fault.
        prompt_tokens: tokens of the prompts of paid calls, as the endpoint counts them.
        cached_tokens: those of them that came from the provider's prefix cache.
        completion_tokens: tokens of the answers of paid calls.
        without_usage: paid calls for which the endpoint gave no count of tokens.
    """

    settings: ChatSettings
    paid: int = 0
    reused: int = 0
    retries: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    without_usage: int = 0

    @property
    def cost(self) -> float | None:
        """US dollars paid so far; None without prices."""
        return self.settings.cost(self.prompt_tokens, self.completion_tokens, self.cached_tokens)

    def add(self, usage: Mapping[str, Any]) -> None:
        """Counts one paid call; `usage` as in the chat completions API, empty where there is none."""
        self.paid += 1
        self.without_usage += not usage
        self.prompt_tokens += usage.get("prompt_tokens") or 0
        self.completion_tokens += usage.get("completion_tokens") or 0
        self.cached_tokens += (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0

    def __str__(self) -> str:
        parts = [f"{self.paid} paid", f"{self.reused} from the ledger"]
        parts += [f"{count} {fault}" for fault, count in sorted(self.failed.items())]
        parts += [f"{self.retries} retries"] if self.retries else []
        parts.append(f"{self.prompt_tokens:,} + {self.completion_tokens:,} tokens")
        return ", ".join(parts) + ("" if self.cost is None else f", ${self.cost:.4f}")


def read_key(settings: ChatSettings) -> str:
    """The key from the environment.

    Raises:
        JudgeStopped: the variable is not set.
    """
    key = os.environ.get(settings.key_variable, "").strip()
    if not key:
        raise JudgeStopped(
            f"no key for the judge: the environment variable {settings.key_variable} is not set. Set it to your key "
            f"for {settings.base_url}, or to any word for a local server that asks for none; or use the judge "
            "'keyword', which needs neither key nor network"
        )
    return key


class ChatClient:
    """An open connection to the endpoint. Use it as an asynchronous context manager.

    Args:
        settings: endpoint and limits.
        ledger: where paid calls are looked up and recorded.

    Raises:
        JudgeStopped: the key is not set.
    """

    def __init__(self, settings: ChatSettings, ledger: Ledger) -> None:
        self.settings = settings
        self.meter = Meter(settings)
        self._ledger = ledger
        self._key = read_key(settings)
        self._client = openai.AsyncOpenAI(
            api_key=self._key, base_url=settings.base_url, max_retries=0, timeout=settings.request_timeout
        )
        self._places = asyncio.Semaphore(settings.concurrency)
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
            request: body of the request, see `ChatSettings.request`.
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
                content_key(request, vote), lambda: self._pay(request, {"vote": vote, **about})
            )
        except CallFailed as error:
            self.meter.failed[error.fault] += 1
            raise
        self.meter.reused += reused
        return entry

    async def _pay(self, request: Mapping[str, Any], about: Mapping[str, Any]) -> Entry:
        async with self._places:
            body = await self._attempts(request)
        usage = body.get("usage") or {}
        self.meter.add(usage)
        choice = body["choices"][0]
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
            "refusal": choice["message"].get("refusal"),
            "answer": choice["message"].get("content") or "",
        }

    async def _attempts(self, request: Mapping[str, Any]) -> dict[str, Any]:
        settings = self.settings
        deadline = time.monotonic() + settings.call_timeout
        attempt = 0
        while True:
            await self._wait(self._resume_at - time.monotonic())
            self._check_limits()
            try:
                return await self._attempt(request)
            except _Retry as fault:
                if fault.fault == CallFault.UNREACHABLE and not self._reached and attempt + 1 >= _CONNECT_ATTEMPTS:
                    raise self._stop_all(self._unreachable(fault)) from None
                backoff = min(settings.backoff * 2**attempt, settings.max_backoff) * random.uniform(0.5, 1.0)
                wait = fault.wait + backoff
                if attempt == settings.max_retries or time.monotonic() + wait > deadline:
                    raise CallFailed(fault.fault, f"{fault} ({attempt + 1} attempts)") from None
                self._resume_at = max(self._resume_at, time.monotonic() + fault.wait)
            except JudgeStopped as error:
                raise self._stop_all(error) from None
            attempt += 1
            self.meter.retries += 1
            await self._wait(wait)

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
        settings = self.settings
        if self._stopped is not None:
            raise self._stopped
        if settings.run_timeout is not None and time.monotonic() - self._started_at > settings.run_timeout:
            limit, advice = f"run_timeout of {settings.run_timeout:g} s is over", "run"
        elif settings.max_cost is not None and (self.meter.cost or 0.0) >= settings.max_cost:
            limit, advice = f"max_cost of ${settings.max_cost:g} is reached", "raise it and run"
        else:
            return
        raise self._stop_all(
            JudgeStopped(f"the judge's {limit} ({self.meter}); {advice} the same command again to go on")
        )

    async def _attempt(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """One request; the parsed body of a chat completion, or `_Retry`, `CallFailed`, `JudgeStopped`."""
        extra = {name: value for name, value in request.items() if name not in ("model", "messages")}
        try:
            async with asyncio.timeout(self.settings.request_timeout):
                response = await self._client.chat.completions.with_raw_response.create(
                    model=request["model"], messages=request["messages"], extra_body=extra
                )
        except (TimeoutError, openai.APIConnectionError, openai.APIStatusError) as error:
            raise self._classify(error) from None
        self._reached = True
        text = self._redact(response.http_response.text)
        try:
            body = json.loads(text)
            if not isinstance(body["choices"][0]["message"].get("content") or "", str):
                raise ValueError("content is not text")
            return body
        except (ValueError, TypeError, LookupError, AttributeError):
            raise _Retry(CallFault.NOT_A_COMPLETION, f"the endpoint answered {text[:200]!r}") from None

    def _redact(self, text: str) -> str:
        # The "key" of a local server may be any word, which is no secret and may well occur in an answer.
        return text.replace(self._key, "[key]") if len(self._key) >= _SHORTEST_SECRET else text

    def _classify(self, error: Exception) -> Exception:
        """What a fault of the request means for this call and for the others."""
        if isinstance(error, openai.APIStatusError):
            self._reached = True
            return self._classify_status(error, f"HTTP {error.status_code}: {self._redact(str(error))[:300]}")
        cause = type(error.__cause__).__name__  # of httpx or httpx2, which the versions of openai differ in
        if cause in ("ConnectError", "ConnectTimeout"):
            return _Retry(CallFault.UNREACHABLE, str(error.__cause__) or cause)
        if isinstance(error, TimeoutError | openai.APITimeoutError):
            return _Retry(CallFault.TIMED_OUT, f"no answer within {self.settings.request_timeout:g} s")
        return _Retry(CallFault.DISCONNECTED, self._redact(f"{error} {error.__cause__ or ''}"))

    def _unreachable(self, fault: _Retry) -> JudgeStopped:
        return JudgeStopped(
            f"the judge's endpoint {self.settings.base_url} cannot be reached ({fault}). Check base_url, and that the "
            "server runs"
        )

    def _classify_status(self, error: openai.APIStatusError, detail: str) -> Exception:
        url, model, status = self.settings.base_url, self.settings.model, error.status_code
        again = "what was paid for is kept: run the same command again to go on"
        if status == 401 or (status == 403 and not self.meter.paid):
            return JudgeStopped(
                f"{url} refuses the key in the environment variable {self.settings.key_variable} ({detail}). Set it to "
                f"a key that may use the model {model!r}; {again}"
            )
        if status == 402 or {str(error.code), str(error.type)} & {"insufficient_quota", "billing_hard_limit_reached"}:
            return JudgeStopped(
                f"the account at {url} is out of money or over its quota ({detail}). Add credit or raise the limit; "
                + again
            )
        if status == 404:
            return JudgeStopped(
                f"{url} knows no model {model!r}, or is not the address of a chat completions API, which most often "
                f"ends in /v1 ({detail}). Check model and base_url; {again}"
            )
        if status in (408, 409, 429) or status >= 500:
            fault = CallFault.RATE_LIMITED if status == 429 else CallFault.SERVER_ERROR
            return _Retry(fault, detail, _retry_after(error.response.headers))
        parameter = str(error.param).partition(".")[0]
        if parameter in ChatSettings.__dataclass_fields__ or parameter == "response_format":
            return JudgeStopped(
                f"{url} does not accept the judge's {parameter} ({detail}). Change it or leave it out; {again}"
            )
        return CallFailed(CallFault.BAD_REQUEST, detail)


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that the endpoint asks to wait, 0 where it does not: Retry-After as seconds or date, or in ms."""
    for name, scale in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        try:
            return max(0.0, float(headers[name]) / scale)
        except (KeyError, ValueError):
            continue
    try:
        return max(0.0, email.utils.parsedate_to_datetime(headers["retry-after"]).timestamp() - time.time())
    except (KeyError, ValueError):
        return 0.0
