"""Prompts and traces as token ids: exactly one BOS, R1's format pinned, spans that index the original reply.

Every prompt is built as ids, piece by piece, and never by decoding and encoding again: a text that already holds the
BOS string would get a second one and shift every position by one.
"""

from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import takewhile
from typing import Any, NamedTuple, TypeVar

import numpy as np

from backtrack_jax.models.markers import END_MARKERS, END_OF_THOUGHT, START_OF_THOUGHT, TURNS
from backtrack_jax.models.tokenizer import Span, Tokenizer

_E = TypeVar("_E", bound=StrEnum)


class Format(StrEnum):
    """How a problem is put to the model.

    `r1`: BOS, system text without a marker, `<｜User｜>`, problem, `<｜Assistant｜>`, think mode.
    `chat`: the tokenizer's own chat template.
    `plain`: BOS, problem; for base models.
    """

    R1 = "r1"
    CHAT = "chat"
    PLAIN = "plain"


class Think(StrEnum):
    """What follows `<｜Assistant｜>` in R1's format.

    `primed`: `<think>` and a newline, as R1's template writes since January 2025.
    `generated`: nothing, as the template before: the model opens its thinking itself, or skips it.
    `none`: an empty think block, `<think>`, blank line, `</think>`, blank line: what R1 writes itself where it skips
    its thinking.
    """

    PRIMED = "primed"
    GENERATED = "generated"
    NONE = "none"


class MarkerMode(StrEnum):
    """What the base model reads in the place of turn and think markers, whose embeddings it may never have trained."""

    KEEP = "keep"
    REPLACE = "replace"
    DROP = "drop"


class R1Markers(NamedTuple):
    """Ids of R1's turn and think tokens: 128011 to 128014 on Llama, other ids on Qwen."""

    user: int
    assistant: int
    think: int
    end_think: int


# Ids on Llama-3's vocabulary, most of them from an independent C++ tokenizer's tests.
GOLDEN_LLAMA3 = {
    "hello world!": (15339, 1917, 0),
    "   hello world!    ": (256, 24748, 1917, 0, 257),
    "\n": (198,),
    "\n\n": (271,),
    "Wait": (14524,),
    "I": (40,),
}
GOLDEN_R1_LLAMA = {
    "<｜User｜>Thanks for putting me into the right direction": (128011, 12947, 369, 10917, 757, 1139, 279, 1314, 5216),
    "<｜Assistant｜><think>\n": (128012, 128013, 198),
    "</think>": (128014,),
}
GOLDEN_QWEN = {
    "hello world!": (14990, 1879, 0),
    "2024 is x²": (17, 15, 17, 19, 374, 856, 29456),
    "   Wait,\n\n": (256, 13824, 3554),
    " ####": (26274,),
}
GOLDEN_R1_QWEN = {"<｜User｜>Hi<｜Assistant｜><think>\n": (151644, 13048, 151645, 151648, 198)}
GOLDEN_QWEN3 = {"<|im_start|>user\nHi<|im_end|>\n": (151644, 872, 198, 13048, 151645, 198)}
# A marker of each vocabulary, its id there, and what that vocabulary gives; the last line that fits a tokenizer counts.
_GOLDEN = (
    ("<|im_start|>", 128011, GOLDEN_LLAMA3),  # SmolLM3, which has no BOS
    ("<｜User｜>", 128011, GOLDEN_LLAMA3 | GOLDEN_R1_LLAMA),
    ("<|im_start|>", 151644, GOLDEN_QWEN | GOLDEN_QWEN3),
    ("<｜User｜>", 151644, GOLDEN_QWEN | GOLDEN_R1_QWEN),
)
_SAMPLES = ("Wait, no.\n\nHmm", "  two  spaces and\ta tab ", "naïve: ∑ x² ≠ ½, 日本語, 🧮")

_PRIMED_TOKENS = 16  # more than any opening mark and line break take
_R1_TEXTS = ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>")  # the bars are U+FF5C


@dataclass(frozen=True)
class PromptFormat:
    """How prompts are built.

    Attributes:
        format: `r1`, `chat` or `plain`.
        think: for `r1`: `primed`, `generated` or `none`.
        system: system text, for `r1` and `chat`. None leaves it to the chat template, which may have a default.
        template_arguments: for `chat`, what the model's template reads besides the messages, such as
            `enable_thinking`; see `Tokenizer.encode_chat`.
    """

    format: Format | str = Format.R1
    think: Think | str = Think.PRIMED
    system: str | None = None
    template_arguments: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "format", _member(Format, self.format, "prompt format"))
        object.__setattr__(self, "think", _member(Think, self.think, "think mode"))
        if self.format == Format.PLAIN and self.system is not None:
            raise ValueError("prompt format 'plain' has no system text; put it into the problem, or use 'chat' or 'r1'")
        if self.format != Format.CHAT and self.template_arguments:
            raise ValueError(
                f"template_arguments={self.template_arguments!r}: only prompt format 'chat' has a template, "
                f"'{self.format}' takes none"
            )


@dataclass(frozen=True)
class EncodedTrace:
    """A prompt and its reply, or the reasoning of it, as one sequence.

    Attributes:
        ids: prompt and reply, cut before `</think>` (unless the answer is kept) or the end of the sequence.
        reply_start: position of the reply's first token.
        spans: half-open characters of the original reply text, one span per reply token.
    """

    ids: tuple[int, ...]
    reply_start: int
    spans: tuple[Span, ...]

    def position_of_char(self, char: int) -> int | None:
        """Position in `ids` of the token that holds character `char` of the original reply, None if it was cut."""
        token = token_of_char(self.spans, char)
        return None if token is None else self.reply_start + token

    def token_span(self, start: int, stop: int) -> tuple[int, int] | None:
        """Token span of a section: half-open positions in `ids` of the tokens that hold a character of the reply.

        Args:
            start: first character of the section in the original reply.
            stop: character behind its last one.

        Returns:
            The positions; a token at either end may hold a neighbour's characters too. None if all tokens were cut.
        """
        held = [token for token, (first, end) in enumerate(self.spans) if first < stop and end > start]
        return (self.reply_start + held[0], self.reply_start + held[-1] + 1) if held else None


def r1_markers(tokenizer: Tokenizer) -> R1Markers:
    """Ids of R1's markers.

    Args:
        tokenizer: the tokenizer of an R1 distill.

    Returns:
        The four ids.

    Raises:
        ValueError: the tokenizer has no such tokens.
    """
    missing = [text for text in _R1_TEXTS if text not in tokenizer.markers]
    if missing:
        raise ValueError(
            f"{tokenizer.name} has no token {', '.join(missing)}; prompt format 'r1' is for R1 distills, "
            "other models take 'chat' or 'plain'"
        )
    return R1Markers(*(tokenizer.markers[text] for text in _R1_TEXTS))


def prompt_ids(tokenizer: Tokenizer, problem: str, prompt: PromptFormat, prefill: str = "") -> list[int]:
    """Ids of a prompt, up to where the model's reply begins.

    Args:
        tokenizer: the model's tokenizer.
        problem: the user's text. Marker strings in it stay text.
        prompt: the format.
        prefill: first words of the reply, put in the model's mouth. Marker strings in it become markers.

    Returns:
        The ids; one BOS, at index 0, if the model has one.

    Raises:
        ValueError: a text brings a BOS of its own or is not text, or the tokenizer does not fit the format.
    """
    if not isinstance(prompt, PromptFormat):
        raise ValueError(f"prompt={prompt!r}, expected a PromptFormat, such as PromptFormat('chat')")
    if not isinstance(problem, str):
        raise ValueError(f"problem={problem!r}, expected one text")
    for text, what in ((problem, "problem"), (prompt.system or "", "system text"), (prefill, "prefill")):
        _refuse_bos(tokenizer, text, what)
    if prompt.format == Format.R1:
        ids = _r1_ids(tokenizer, problem, prompt)
    elif prompt.format == Format.CHAT:
        system = [] if prompt.system is None else [{"role": "system", "content": prompt.system}]
        ids = tokenizer.encode_chat([*system, {"role": "user", "content": problem}], prompt.template_arguments)
    else:
        ids = tokenizer.encode(tokenizer.begin + problem, markers=False)
    if tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
        ids = [tokenizer.bos_id, *ids]
    ids += tokenizer.encode(prefill)
    _require_one_bos(tokenizer, ids)
    return ids


def encode_trace(
    tokenizer: Tokenizer,
    problem: str,
    text: str,
    prompt: PromptFormat,
    *,
    token_ids: Sequence[int] | None = None,
    prefill: str = "",
    answer: bool = False,
    end_marks: Sequence[str] = (),
) -> EncodedTrace:
    """Prompt and reply as one sequence, with the reply's tokens tied to characters of its original text.

    The reply is cut before `</think>` or another end of thought (`models.markers`), and before an end of sequence,
    token or literal text: what follows is no reasoning. A sampled one is cut before a BOS as well, where the model
    began another text. A reply that opens with its own `<think>` replaces the one that the prompt would prime.

    Args:
        tokenizer: the tokenizer of the model that wrote the reply.
        problem: the user's text.
        text: the reply exactly as generated or released, without the prompt and the prefill.
        prompt: the format under which it was generated.
        token_ids: the sampled reply ids, where known; they are used as they are.
        prefill: first words of the reply that were given to the model.
        answer: keep what follows `</think>`; the end of sequence cuts all the same.
        end_marks: further texts that end a reasoning (`Trace.end_marks`).

    Returns:
        The sequence, where the reply starts in it, and the spans.

    Raises:
        ValueError: `token_ids` do not decode to `text` or begin with BOS, or another text brings a BOS of its own.
    """
    marks = {*END_MARKERS, *end_marks}
    if answer:
        marks -= {*END_OF_THOUGHT, *end_marks}
    if token_ids is None:
        _refuse_bos(tokenizer, text, "reply")
        reply, spans = tokenizer.encode_with_spans(text[: _end(tokenizer, text, marks)])
    else:
        decoded, spans = tokenizer.decode_with_spans(token_ids)
        end = _end(tokenizer, decoded, marks, sampled=True)
        if decoded[:end] != text[: _end(tokenizer, text, marks, sampled=True)]:
            at = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(decoded, text, strict=False)))
            raise ValueError(
                f"the reply's token ids do not decode to its text: they differ from character {at}, "
                f"ids {decoded[at : at + 20]!r}, text {text[at : at + 20]!r}"
            )
        kept = bisect_right(spans, end, key=lambda span: span[1])
        reply, spans = list(token_ids[:kept]), spans[:kept]
    start = prompt_ids(tokenizer, problem, prompt, prefill)
    opening = next((mark for mark in START_OF_THOUGHT if text.startswith(mark)), "")
    if reply and opening:
        start = _without_primed(tokenizer, start, opening)
    _require_one_bos(tokenizer, start + reply)
    return EncodedTrace(ids=(*start, *reply), reply_start=len(start), spans=tuple(spans))


def token_of_char(spans: Sequence[Span], char: int) -> int | None:
    """Index of the first token whose span covers a character.

    Args:
        spans: half-open spans in ascending order; they may overlap (several tokens of one character) or be empty.
        char: index of a character, 0 or more.

    Returns:
        The index, None if no span covers the character.
    """
    token = bisect_right(spans, char, key=lambda span: span[1])  # the first span that ends after the character
    return token if token < len(spans) and spans[token][0] <= char else None


def marker_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids of the tokens that mark turns and thinking: of R1's four markers on an R1 distill, of ChatML's on Qwen3.

    Args:
        tokenizer: any tokenizer.

    Returns:
        The ids, of those texts of `models.markers` that are one token there. Where a model writes a mark in several
        tokens, such as `<think>` on OLMo 3, it is text like any other.

    Raises:
        ValueError: none of them is.
    """
    texts = (*TURNS, *START_OF_THOUGHT, *END_OF_THOUGHT)
    found = [tokenizer.markers[text] for text in texts if text in tokenizer.markers]
    found = [i for i in found if i != tokenizer.bos_id]
    if not found:
        raise ValueError(
            f"{tokenizer.name} has no token that marks a turn or thinking; known: {', '.join(texts)}. "
            "Use markers='keep'"
        )
    return tuple(found)


def replacement_id(tokenizer: Tokenizer, text: str) -> int:
    """Id of the token that a model reads in place of markers.

    Args:
        tokenizer: the tokenizer whose ids the model reads.
        text: the token's text. The authors' later code takes ` ####`, which is 27370 on Llama-3 and 26274 on Qwen.

    Returns:
        The id.

    Raises:
        ValueError: the text is not exactly one token.
    """
    ids = tokenizer.encode(text)
    if len(ids) != 1:
        pieces = ", ".join(repr(tokenizer.decode([i])) for i in ids) or "none"
        raise ValueError(
            f"marker_replacement={text!r} is {len(ids)} tokens of {tokenizer.name}: {pieces} (ids {ids}); expected a "
            "text that is exactly one token, such as '\\n\\n' or ' ####'"
        )
    return ids[0]


def map_markers(
    ids: Sequence[int], markers: Collection[int], mode: MarkerMode | str, replacement: int | None = None
) -> tuple[list[int], np.ndarray]:
    """Ids of a sequence of the reasoning model as the base model is to read them.

    Args:
        ids: ids under the reasoning model's tokenizer, which the base model shares but for the markers.
        markers: the marker ids, `marker_ids(tokenizer)`.
        mode: `keep` them; `replace` each with `replacement`; `drop` them.
        replacement: id for `replace`, see `replacement_id`.

    Returns:
        The new ids, and an int array, one entry per old position: the new position of the same token, -1 where it was
        dropped.

    Raises:
        ValueError: an unknown mode, or a replacement that is missing or not used.
    """
    mode = _member(MarkerMode, mode, "marker mode")
    if (replacement is not None) != (mode == MarkerMode.REPLACE):
        raise ValueError(
            f"marker mode {mode.value!r}, replacement {replacement}: only 'replace' takes one, and needs it"
        )
    marked = np.isin(np.asarray(ids, dtype=np.int64), list(markers))
    if mode == MarkerMode.DROP:
        kept = [i for i, drop in zip(ids, marked, strict=True) if not drop]
        return kept, np.where(marked, -1, np.cumsum(~marked) - 1)
    if replacement is not None:
        return [replacement if swap else i for i, swap in zip(ids, marked, strict=True)], np.arange(len(ids))
    return list(ids), np.arange(len(ids))


def check_tokenizer(tokenizer: Tokenizer, samples: Sequence[str] = _SAMPLES) -> None:
    """Self-check before long work: round trips, one BOS, and golden ids where the vocabulary is Llama-3's or Qwen's.

    Args:
        tokenizer: any tokenizer.
        samples: texts within its vocabulary, in Unicode's composed form.

    Raises:
        ValueError: what failed, all of it.
    """
    faults = []
    for text in samples:
        ids, spans = tokenizer.encode_with_spans(text)
        if tokenizer.decode(ids) != text or tokenizer.decode_with_spans(ids)[1] != spans:
            faults.append(f"{text!r} comes back as {tokenizer.decode(ids)!r}, spans {spans}")
        if tokenizer.bos_id is not None and tokenizer.bos_id in ids:
            faults.append(f"{text!r} is given a BOS by encode: {ids}")
        prompt_ids(tokenizer, text, PromptFormat(Format.PLAIN))  # raises unless there is one BOS
    for text, expected in golden_ids(tokenizer).items():
        if (ids := tuple(tokenizer.encode(text))) != expected:
            faults.append(f"{text!r} gives the ids {ids}, expected {expected}")
    if faults:
        raise ValueError(f"the tokenizer of {tokenizer.name} does not fit:\n" + "\n".join(faults))


def golden_ids(tokenizer: Tokenizer) -> dict[str, tuple[int, ...]]:
    """Texts and the ids that a tokenizer of this vocabulary gives them, Llama-3's or Qwen's; none of any other."""
    golden = GOLDEN_LLAMA3 if tokenizer.bos_id == 128000 else {}
    for marker, token, of_vocabulary in _GOLDEN:
        golden = of_vocabulary if tokenizer.markers.get(marker) == token else golden
    return golden


def _r1_ids(tokenizer: Tokenizer, problem: str, prompt: PromptFormat) -> list[int]:
    mark = r1_markers(tokenizer)
    blank = tokenizer.encode("\n\n")
    tail = {
        Think.PRIMED: [mark.think, *tokenizer.encode("\n")],
        Think.GENERATED: [],
        Think.NONE: [mark.think, *blank, mark.end_think, *blank],
    }[Think(prompt.think)]
    system = tokenizer.encode(prompt.system or "", markers=False)
    return [*system, mark.user, *tokenizer.encode(problem, markers=False), mark.assistant, *tail]


def _without_primed(tokenizer: Tokenizer, ids: list[int], opening: str) -> list[int]:
    """The prompt without a `<think>` at its end, one token or several, for a reply that brings its own."""
    if not tokenizer.decode(ids[-_PRIMED_TOKENS:]).rstrip().endswith(opening):
        return ids
    end = ""
    for first in range(len(ids) - 1, -1, -1):
        end = tokenizer.decode(ids[first:])
        if end.rstrip() == opening:
            return ids[:first]
        if opening in end:
            break
    raise ValueError(
        f"the prompt ends in {opening!r} and the reply begins with it, and {tokenizer.name} joins the prompt's with "
        f"what stands before it: {end!r}; give the reply without it"
    )


def _end(tokenizer: Tokenizer, text: str, marks: Collection[str], sampled: bool = False) -> int:
    """Characters of `text` before the first end of sequence or mark.

    In what a model sampled, BOS ends a text, unless it begins one: that is refused.
    """
    ends = {*marks, *(tokenizer.decode([i]) for i in tokenizer.stop_ids)} - {""}
    ends_at = [text.find(end) for end in ends]
    if sampled and (bos := _bos_text(tokenizer)):
        ends_at.append(text.find(bos, 1))
    return min((at for at in ends_at if at >= 0), default=len(text))


def _bos_text(tokenizer: Tokenizer) -> str:
    return "" if tokenizer.bos_id is None else tokenizer.decode([tokenizer.bos_id])


def _refuse_bos(tokenizer: Tokenizer, text: str, what: str) -> None:
    bos = _bos_text(tokenizer)
    if bos and bos in text:
        raise ValueError(
            f"the {what} holds the BOS text {bos!r} at character {text.index(bos)}; prompts get their one "
            "BOS here, give the text without it"
        )


def _require_one_bos(tokenizer: Tokenizer, ids: list[int]) -> None:
    if tokenizer.bos_id is None:
        return
    at = [i for i, token in enumerate(ids) if token == tokenizer.bos_id]
    if at != [0]:
        raise ValueError(f"{tokenizer.name}: BOS id {tokenizer.bos_id} is at {at}, expected at index 0 only")


def _member(kind: type[_E], value: str, what: str) -> _E:
    if value not in [member.value for member in kind]:
        raise ValueError(f"{what} {value!r} is not known; accepted: {' | '.join(kind)}")
    return kind(value)
