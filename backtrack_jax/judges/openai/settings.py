"""What the online judge is asked with and what may go wrong, without the package that makes the calls.

Faults come in two kinds:

- `CallFailed`: this call got no answer (rate limit, server error, time-out, dropped connection, refused request) after
  all its retries. Nothing was paid (but a provider may bill an answer that came too late or broke off); the others go
  on, and the next run asks again.
- `JudgeStopped`: no call can succeed (no key, wrong key, no such endpoint or model, no money) or a limit of the user's
  was reached. No new call starts, those in flight end and are recorded, then the error is raised with what to do. The
  same command goes on from there.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any
from urllib.parse import urlsplit

from backtrack_jax.files.console import Stopped
from backtrack_jax.judges.openai.prompts import JudgePrompt


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
    FORBIDDEN = "forbidden"
    """HTTP 403 for this request, where others were answered. Never retried."""
    BAD_REQUEST = "bad_request"
    """The endpoint refuses this request, e.g. because the text is too long for the model. Never retried."""


UNANSWERED = frozenset(CallFault) - {CallFault.BAD_REQUEST}
"""What a later run asks again."""


class CallFailed(Exception):
    """One call got no answer; `fault` says why, the message gives the endpoint's words."""

    def __init__(self, fault: CallFault, detail: str) -> None:
        super().__init__(detail)
        self.fault = fault


class JudgeStopped(Stopped):
    """No further call can succeed; the message says why and what to do. What was paid for is in the ledger."""


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
        run_timeout: seconds after which no new call starts, in each stage of a run; None for no limit.
        max_retries: attempts after the first.
        backoff: seconds before the first retry, doubled for each further one; half of it is random.
        max_backoff: limit of that doubling in seconds; Retry-After may ask for more.
        input_price: US dollars per million tokens of the prompt; None where it is not known, then no cost is given.
        cached_price: the same for tokens that the provider served from its prefix cache; None: as `input_price`.
        output_price: the same for tokens of the answer.
        max_cost: US dollars after which no new call starts, in each stage of a run that asks the judge; needs the
            prices. Calls in flight can exceed it.
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
        if url.username or url.password or url.query:
            raise ValueError(
                f"the judge's base_url holds credentials or a query (?...), and is written into results; the key "
                f"belongs into ${self.key_variable}"
            )
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
        prompt, completion = (_count(usage, name) for name in ("prompt_tokens", "completion_tokens"))
        self.without_usage += not (prompt or completion)
        self.prompt_tokens += prompt
        self.completion_tokens += completion
        self.cached_tokens += _count(usage.get("prompt_tokens_details"), "cached_tokens")

    def __str__(self) -> str:
        parts = [f"{self.paid} paid", f"{self.reused} from the ledger"]
        parts += [f"{count} {fault}" for fault, count in sorted(self.failed.items())]
        parts += [f"{self.retries} retries"] if self.retries else []
        parts.append(f"{self.prompt_tokens:,} + {self.completion_tokens:,} tokens")
        parts += [f"{self.without_usage} without counts of tokens"] if self.without_usage else []
        return ", ".join(parts) + ("" if self.cost is None else f", ${self.cost:.4f}")


def _count(usage: object, name: str) -> int:
    """A number of tokens out of what an endpoint tells; some write it as text, and 0 stands for what is none."""
    value = usage.get(name) if isinstance(usage, Mapping) else None
    if isinstance(value, int | float):
        return int(value) if math.isfinite(value) else 0
    return int(value) if isinstance(value, str) and value.isdecimal() else 0


def read_key(settings: ChatSettings) -> str:
    """The key from the environment.

    Raises:
        JudgeStopped: the variable is not set, or holds what cannot be sent as a header.
    """
    key = os.environ.get(settings.key_variable, "").strip()
    if not key:
        raise JudgeStopped(
            f"no key for the judge: the environment variable {settings.key_variable} is not set. Set it to your key "
            f"for {settings.base_url}, or to any word for a local server that asks for none; or use the judge "
            "'keyword', which needs neither key nor network"
        )
    if not (key.isascii() and key.isprintable()):  # whose error would show the key, escaped
        raise JudgeStopped(
            f"the key in the environment variable {settings.key_variable} holds a line break or another character that "
            "no key has; set it again, without what was copied along"
        )
    return key


@dataclass
class OpenAISpec:
    """The online judge of stage 2: any OpenAI-compatible endpoint, see `judges.openai`.

    Attributes:
        model: name at the endpoint; a dated snapshot gives the same labels next month, an alias may not.
        base_url: of the API, version included. Answers are kept by what was asked, not by address: for another server
            that gives its model the same name, name another `ledger`.
        key_variable: environment variable that holds the key, which is read from nowhere else.
        format: of the answers: `sentences` (numbered, answered by JSON) or `inline` (the paper's; five times as long).
        backtracking: definition of backtracking in the instructions, see `judges.prompts.BACKTRACKING`.
        response_format: how `sentences` asks for JSON: `json_schema`, `json_object` or `none`.
        votes: answers per trace; sections that more than half of them have are kept.
        reask: how often an unusable answer is asked for again.
        temperature: of the judge; below 0 it is left out of the request.
        seed: of the judge; below 0 it is left out.
        max_tokens: limit of an answer; 0 leaves it out.
        extra_body: JSON object of more fields of the request, e.g. `{"reasoning_effort": "low"}`; empty for none.
        concurrency: calls at the same time.
        request_timeout: seconds for one attempt.
        call_timeout: seconds for one call with all its attempts.
        run_timeout: seconds after which no new call starts, in each stage of a run; 0 for no limit.
        max_retries: attempts after the first.
        backoff: seconds before the first retry, doubled for each further one, half of it random.
        max_backoff: limit of that doubling; Retry-After may ask for more.
        input_price: US dollars per million tokens of prompts; 0 where prices are not known.
        cached_price: the same for tokens from the provider's prefix cache; 0 takes `input_price`.
        output_price: the same for tokens of answers.
        max_cost: US dollars after which no new call starts, in each stage of a run; 0 for no limit.
        ledger: file of the answers that were paid for; empty for `judge-ledger.jsonl` in `workdir`, shared by all runs.
        allow_unanswered: whether the stage may end with calls that got no answer after all retries. Their traces are
            counted as failed then; else the run stops, and the same command asks for these alone.
    """

    model: str = "gpt-4o-2024-08-06"
    base_url: str = "https://api.openai.com/v1"
    key_variable: str = "OPENAI_API_KEY"
    format: str = "sentences"
    backtracking: str = "revise"
    response_format: str = "json_schema"
    votes: int = 1
    reask: int = 0
    temperature: float = 0.0
    seed: int = 0
    max_tokens: int = 4096
    extra_body: str = ""
    concurrency: int = 32
    request_timeout: float = 120.0
    call_timeout: float = 900.0
    run_timeout: float = 0.0
    max_retries: int = 8
    backoff: float = 1.0
    max_backoff: float = 60.0
    input_price: float = 0.0
    cached_price: float = 0.0
    output_price: float = 0.0
    max_cost: float = 0.0
    ledger: str = ""
    allow_unanswered: bool = False

    def prompt(self) -> JudgePrompt:
        """The question that is put to the judge; ValueError names what is wrong with it."""
        return JudgePrompt(self.format, self.backtracking, self.response_format)

    def settings(self) -> ChatSettings:
        """Endpoint and limits; ValueError names what is wrong with them."""
        try:
            extra = json.loads(self.extra_body or "{}")
        except ValueError:
            extra = None
        if not isinstance(extra, dict):
            raise ValueError(f"extra_body={self.extra_body!r} of the judge, expected a JSON object, or nothing")
        own = ("format", "backtracking", "response_format", "votes", "reask", "ledger", "allow_unanswered")
        given: dict[str, Any] = {name: value for name, value in asdict(self).items() if name not in own}
        for name in ("temperature", "seed"):
            given[name] = given[name] if given[name] >= 0 else None
        for name in ("max_tokens", "run_timeout", "input_price", "cached_price", "output_price", "max_cost"):
            given[name] = given[name] or None
        given["extra_body"] = extra
        return ChatSettings(**given)
