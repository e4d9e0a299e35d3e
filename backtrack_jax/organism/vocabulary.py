"""The small pair's tokenizer: one token per word of the grammar, any other text as bytes, and R1's markers."""

import json
import re
from pathlib import Path
from typing import Any

from backtrack_jax.models.tokenizer import starts_with
from backtrack_jax.organism import corpus, grammar

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
MARKERS = (BOS, EOS, "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>")
"""As in the tokenizer of R1's distills; the turn and think tokens are not flagged special there either."""

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '<｜Assistant｜>' + message['content'] + eos_token }}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
)
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def tokenizer_json() -> dict[str, Any]:
    """Content of `tokenizer.json`: byte-level BPE that takes known words whole (`ignore_merges`) and merges nothing."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {byte: chr(byte) for byte in printable}
    letters |= {byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in letters)}
    tokens = [letters[byte] for byte in range(256)]
    tokens += [word.replace(" ", letters[32]) for word in _words()]
    added = [
        {"id": len(tokens) + i, "content": marker, "special": marker in (BOS, EOS), **_FLAGS}
        for i, marker in enumerate(MARKERS)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": _BYTE_LEVEL,
        "post_processor": starts_with(BOS, len(tokens)),
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


def tokenizer_config() -> dict[str, Any]:
    """Content of `tokenizer_config.json`."""
    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 8192,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def write(folder: Path) -> None:
    """Writes the tokenizer, and the ids that begin and end a sequence, into a folder that is there."""
    spec = tokenizer_json()
    ids = {token["content"]: token["id"] for token in spec["added_tokens"]}
    files = {
        "tokenizer.json": spec,
        "tokenizer_config.json": tokenizer_config(),
        "generation_config.json": {"bos_token_id": ids[BOS], "eos_token_id": ids[EOS]},
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
