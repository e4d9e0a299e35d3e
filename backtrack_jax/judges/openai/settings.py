"""What the online judge is asked with and what may go wrong, without the package that makes the calls.

Faults come in two kinds:

- `CallFailed`: this call got no answer (rate limit, server error, time-out, dropped connection, refused request) after
  all its retries. Nothing was paid (but a provider may bill an answer that came too late or broke off); the others
  continue, and the next run asks again.
- `JudgeStopped`: no call can succeed (no key, wrong key, no such endpoint or model, no money) or a limit of the user's
  was reached. No new call starts, those in flight end and are recorded, then the error is raised with what to do. The
  same command resumes from there.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any
from urllib.parse import urlsplit

from backtrack_jax.config import OpenAISpec
from backtrack_jax.files.console import Stopped


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
    BROKEN_OFF = "broken_off"
    """An answer that did not end as answers do: an error, an abort, or a finish reason that is not known."""
    FORBIDDEN = "forbidden"
    """HTTP 403 for this request, where others were answered. Never retried."""
    BAD_REQUEST = "bad_request"
    """The endpoint refuses this request, e.g. because the text is too long for the model. Never retried."""


_COMPLETE = frozenset(("stop", "eos", "eos_token", "stop_sequence", "end_turn", "complete", "completed"))
_CUT = frozenset(
    ("length", "max_tokens", "max_output_tokens", "max_length", "model_length", "model_context_window_exceeded")
)
_WITHHELD = frozenset(("content_filter", "refusal", "safety", "recitation", "blocklist", "prohibited_content", "spii"))


class Ending(StrEnum):
    """What a finish reason means for an answer."""

    COMPLETE = "complete"
    CUT = "cut"
    """By a limit of tokens: it would be cut again."""
    WITHHELD = "withheld"
    """By a filter or the model itself."""
    BROKEN_OFF = "broken off"
    """All else, no reason among it: the answer may lack anything, and is asked for again."""


def ending(finish_reason: object) -> Ending:
    """What a finish reason means, in the words of any provider; one that is not known is no complete answer."""
    word = finish_reason.strip().lower() if isinstance(finish_reason, str) else ""
    known = {Ending.COMPLETE: _COMPLETE, Ending.CUT: _CUT, Ending.WITHHELD: _WITHHELD}
    return next((found for found, words in known.items() if word in words), Ending.BROKEN_OFF)


UNANSWERED = frozenset(CallFault) - {CallFault.BAD_REQUEST}
"""What a later run asks again."""


class CallFailed(Exception):
    """One call got no answer; `fault` says why, the message gives the endpoint's words."""

    def __init__(self, fault: CallFault, detail: str) -> None:
        super().__init__(detail)
        self.fault = fault


class JudgeStopped(Stopped):
    """No further call can succeed; the message says why and what to do. What was paid for is in the ledger."""


def check(spec: OpenAISpec) -> None:
    """Refuses an invalid endpoint or limits: ValueError names the first."""
    if not spec.model.strip():
        raise ValueError("the judge's model is empty; name one, e.g. gpt-4o-2024-08-06")
    url = urlsplit(spec.base_url)
    if url.scheme not in ("http", "https") or not url.hostname:
        raise ValueError(
            f"the judge's base_url {spec.base_url!r} is not an address; accepted: http(s)://host[:port]/v1"
        )
    if url.username or url.password or url.query:
        raise ValueError(
            f"the judge's base_url holds credentials or a query (?...), and is written into results; the key "
            f"belongs in ${spec.key_variable}"
        )
    for name, least in (("concurrency", 1), ("max_retries", 0), ("backoff", 0), ("max_backoff", 0)):
        if getattr(spec, name) < least:
            raise ValueError(f"the judge's {name} {getattr(spec, name)} must be at least {least}")
    for name in ("request_timeout", "call_timeout"):
        if getattr(spec, name) <= 0:
            raise ValueError(f"the judge's {name} {getattr(spec, name)} must be more than 0 seconds")
    if spec.max_cost and not (spec.input_price and spec.output_price):
        raise ValueError("max_cost of the judge needs input_price and output_price")
    _extra_body(spec)


def _extra_body(spec: OpenAISpec) -> dict[str, Any]:
    try:
        extra = json.loads(spec.extra_body or "{}")
    except ValueError:
        extra = None
    if not isinstance(extra, dict):
        raise ValueError(f"extra_body={spec.extra_body!r} of the judge, expected a JSON object, or nothing")
    return extra


def cost_of(spec: OpenAISpec, prompt: int, completion: int, cached: int = 0) -> float | None:
    """US dollars for tokens of prompts (of them `cached` from the cache) and answers; None without prices."""
    if not (spec.input_price and spec.output_price):
        return None
    cached_price = spec.cached_price or spec.input_price
    return ((prompt - cached) * spec.input_price + cached * cached_price + completion * spec.output_price) / 1e6


def request(spec: OpenAISpec, messages: list[dict[str, str]], vote: int = 0, **fields: Any) -> dict[str, Any]:
    """Body of the request for these messages; `vote` is the number of the answer, `fields` are more of its fields."""
    body: dict[str, Any] = {"model": spec.model, "messages": messages}
    if spec.temperature >= 0:
        body["temperature"] = spec.temperature
    if spec.seed >= 0:
        body["seed"] = spec.seed + vote
    if spec.max_tokens:
        body["max_tokens"] = spec.max_tokens
    return {**body, **fields, **_extra_body(spec)}


@dataclass
class Meter:
    """What a run has asked and paid for so far. Answers from the ledger cost nothing and count in `reused` only.

    Attributes:
        spec: the prices.
        paid: calls that were answered by the endpoint.
        reused: calls that were answered by the ledger.
        retries: attempts that were repeated.
        failed: calls that got no answer, by fault.
        prompt_tokens: tokens of the prompts of paid calls, as the endpoint counts them.
        cached_tokens: those of them that came from the provider's prefix cache.
        completion_tokens: tokens of the answers of paid calls.
        without_usage: paid calls for which the endpoint gave no count of tokens.
        broken: answers that broke off, whose tokens are counted as they may be billed, and that were asked for again.
    """

    spec: OpenAISpec
    paid: int = 0
    reused: int = 0
    retries: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    without_usage: int = 0
    broken: int = 0

    @property
    def cost(self) -> float | None:
        """US dollars paid so far; None without prices."""
        return cost_of(self.spec, self.prompt_tokens, self.completion_tokens, self.cached_tokens)

    def add(self, usage: Mapping[str, Any]) -> None:
        """Counts one paid call; `usage` as in the chat completions API, empty where there is none."""
        self.paid += 1
        self.without_usage += not self._add_tokens(usage)

    def add_broken(self, usage: Mapping[str, Any]) -> None:
        """Counts an answer that broke off."""
        self.broken += 1
        self._add_tokens(usage)

    def _add_tokens(self, usage: Mapping[str, Any]) -> int:
        prompt, completion = (count(usage, name) for name in ("prompt_tokens", "completion_tokens"))
        self.prompt_tokens += prompt
        self.completion_tokens += completion
        self.cached_tokens += count(usage.get("prompt_tokens_details"), "cached_tokens")
        return prompt + completion

    def __str__(self) -> str:
        parts = [f"{self.paid} paid", f"{self.reused} from the ledger"]
        parts += [f"{count} {fault}" for fault, count in sorted(self.failed.items())]
        parts += [f"{self.retries} retries"] if self.retries else []
        parts += [f"{self.broken} answers that broke off"] if self.broken else []
        parts.append(f"{self.prompt_tokens:,} + {self.completion_tokens:,} tokens")
        parts += [f"{self.without_usage} without counts of tokens"] if self.without_usage else []
        return ", ".join(parts) + ("" if self.cost is None else f", ${self.cost:.4f}")


def count(usage: object, name: str) -> int:
    """The number of tokens that an endpoint reports; some write it as text, and 0 stands for what is not a number."""
    value = usage.get(name) if isinstance(usage, Mapping) else None
    if isinstance(value, int | float):
        return int(value) if math.isfinite(value) else 0
    return int(value) if isinstance(value, str) and value.isdecimal() else 0


def read_key(spec: OpenAISpec) -> str:
    """The key from the environment.

    Raises:
        JudgeStopped: the variable is not set, or holds what cannot be sent as a header.
    """
    key = os.environ.get(spec.key_variable, "").strip()
    if not key:
        raise JudgeStopped(
            f"no key for the judge: the environment variable {spec.key_variable} is not set. Set it to your key "
            f"for {spec.base_url}, or to any word for a local server that asks for none; or use the judge "
            "'keyword', which needs neither key nor network"
        )
    if not (key.isascii() and key.isprintable()):  # whose error would show the key, escaped
        raise JudgeStopped(
            f"the key in the environment variable {spec.key_variable} holds a line break or another character that "
            "keys do not contain; set it again, without what was copied along with it"
        )
    return key
