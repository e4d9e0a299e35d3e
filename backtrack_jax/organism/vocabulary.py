"""The small pairs' tokenizers: one token per word of the grammar, any other text as bytes, and a family's markers."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from backtrack_jax.models.prompts import PromptFormat
from backtrack_jax.models.tokenizer import Tokenizer, starts_with
from backtrack_jax.organism import corpus, grammar


@dataclasses.dataclass(frozen=True)
class Dialect:
    """How the texts of a pair are marked.

    Attributes:
      bos: what every sequence begins with; None for nothing.
      eos: what ends a reply.
      pad: what stands where nothing is.
      markers: all control tokens, in the order of their ids.
      special: those of them that are flagged special.
      chat_template: Jinja source.
      prompt: the format of prompts.
      words: tokens beside those of the grammar.
      ascending: order of the words' ids, so that two vocabularies differ.
    """

    bos: str | None
    eos: str
    pad: str
    markers: tuple[str, ...]
    special: tuple[str, ...]
    chat_template: str
    prompt: PromptFormat
    words: tuple[str, ...] = ()
    ascending: bool = True


_BOS, _EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
R1 = Dialect(
    bos=_BOS,
    eos=_EOS,
    pad=_EOS,
    # As in the tokenizer of R1's distills; the turn and think tokens are not flagged special there either.
    markers=(_BOS, _EOS, "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"),
    special=(_BOS, _EOS),
    chat_template=(
        "{{ bos_token }}{% for message in messages %}"
        "{% if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
        "{% elif message['role'] == 'assistant' %}{{ '<｜Assistant｜>' + message['content'] + eos_token }}"
        "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
    ),
    prompt=PromptFormat("r1", "primed"),
)
_PAD, _START, _END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
QWEN3 = Dialect(
    bos=None,
    eos=_END,
    pad=_PAD,
    # As in Qwen3's tokenizer, whose think tokens are not flagged special.
    markers=(_PAD, _START, _END, "<think>", "</think>"),
    special=(_PAD, _START, _END),
    chat_template=(
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
    ),
    prompt=PromptFormat("chat"),
    words=("assistant", "user"),
    ascending=False,
)
DIALECTS = {"llama": R1, "qwen3": QWEN3}
"""By the family of the model."""


def dialect_of(tokenizer: Tokenizer) -> Dialect:
    """The dialect of a pair's tokenizer, by its markers; ValueError if it is no pair's."""
    for dialect in DIALECTS.values():
        if set(dialect.markers) == set(tokenizer.markers):
            return dialect
    raise ValueError(f"{tokenizer.name} has the markers {sorted(tokenizer.markers)}, which are no small pair's")


_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def tokenizer_json(dialect: Dialect) -> dict[str, Any]:
    """Content of `tokenizer.json`: byte-level BPE that takes known words whole (`ignore_merges`) and merges nothing."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {byte: chr(byte) for byte in printable}
    letters |= {byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in letters)}
    tokens = [letters[byte] for byte in range(256)]
    tokens += [
        word.replace(" ", letters[32]) for word in [*_words(), *dialect.words][:: 1 if dialect.ascending else -1]
    ]
    added = [
        {"id": len(tokens) + i, "content": marker, "special": marker in dialect.special, **_FLAGS}
        for i, marker in enumerate(dialect.markers)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": _BYTE_LEVEL,
        "post_processor": None if dialect.bos is None else starts_with(dialect.bos, len(tokens)),
        "decoder": _BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [],
        },
    }


def tokenizer_config(dialect: Dialect) -> dict[str, Any]:
    """Content of `tokenizer_config.json`."""
    return {
        "add_bos_token": dialect.bos is not None,
        "add_eos_token": False,
        "bos_token": dialect.bos,
        "eos_token": dialect.eos,
        "pad_token": dialect.pad,
        "chat_template": dialect.chat_template,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 8192,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def write(folder: Path, dialect: Dialect = R1) -> None:
    """Writes the tokenizer, and the ids that begin and end a sequence, into a folder that is there."""
    spec = tokenizer_json(dialect)
    ids = {token["content"]: token["id"] for token in spec["added_tokens"]}
    bos = {} if dialect.bos is None else {"bos_token_id": ids[dialect.bos]}
    files = {
        "tokenizer.json": spec,
        "tokenizer_config.json": tokenizer_config(dialect),
        "generation_config.json": bos | {"eos_token_id": ids[dialect.eos]},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", "utf-8")


def _words() -> list[str]:
    """Every word of the language behind a space, and without one those that a text may begin with."""
    texts = [text for texts in grammar.TEMPLATES.values() for text in texts]
    first = {text.split()[0].strip(",") for text in grammar.TEMPLATES["initializing"]}
    openings = [text.split()[0].strip(",") for text in (*corpus.PROBLEMS.values(), *corpus.STORIES, corpus.ANSWER)]
    texts += [*corpus.PROBLEMS.values(), *corpus.STORIES, corpus.ANSWER]
    literal = {word for text in texts for word in re.findall(r"\w+", re.sub(r"\{\w+\}", "", text))}
    filled = {word for words in (*grammar.SLOTS.values(), *grammar.CONTENT.values()) for word in words}
    behind_space = literal | filled | set(grammar.KEYWORDS)
    names = set(grammar.CONTENT["who"])
    alone = first | {word for word in openings if not word.startswith("{")} | names
    return sorted(f" {word}" for word in behind_space) + sorted(word for word in alone if len(word) > 1)
