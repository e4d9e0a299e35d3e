"""How a vocabulary spells text: the bytes that a token stands for, in the two ways that files of models have.

Byte-level BPE (GPT-2, Llama 3, Qwen) writes each byte as one printable character. SentencePiece's BPE (Llama 2,
Mistral 7B), as Hugging Face writes it, writes a space as U+2581, characters without a token of their own as bytes
`<0x0A>`, and puts a space in front of what it is given, so that a first word is spelled as any other. Here that space
is put once, where a sequence begins (`models.prompts`), and never where two texts meet: what the tokens spell is then
the text, character for character, and tokens know which of its characters they hold.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

_SPACE = "\u2581"  # LOWER ONE EIGHTH BLOCK
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")

_REPLACED = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
_PREPENDED = {"type": "Prepend", "prepend": _SPACE}
_JOINED = [
    {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]


@dataclasses.dataclass(frozen=True)
class Spelling:
    """How the tokens of a vocabulary spell text.

    Attributes:
      bytes_of: a token that is not an added one -> its bytes.
      begin: what stands in front of the first word of a sequence: a space, or nothing.
      after_markers: whether it stands behind every marker as well.
      settings: keys of `tokenizer.json` with which `tokenizers` spells a text as it is, without `begin`.
    """

    bytes_of: Callable[[str], bytes]
    begin: str
    after_markers: bool
    settings: Mapping[str, Any]


def spelling_of(spec: Mapping[str, Any], name: str) -> Spelling:
    """The way in which a `tokenizer.json` spells.

    Args:
      spec: its content.
      name: where it was read from, for messages.

    Raises:
      ValueError: it is neither of the two.
    """
    decoder, pre = spec["decoder"] or {}, json.dumps(spec["pre_tokenizer"])
    if decoder.get("type") == "ByteLevel" and '"ByteLevel"' in pre:
        return Spelling(_bytes_of_characters, "", after_markers=False, settings={})
    if (first := _first_space(spec)) is not None:
        settings = {
            "normalizer": _REPLACED,
            "pre_tokenizer": None,
            "decoder": {"type": "Sequence", "decoders": _JOINED},
        }
        return Spelling(_bytes_of_piece, " " if first else "", after_markers=first == "always", settings=settings)
    hint = ""
    if "Metaspace" in pre and not spec["model"].get("byte_fallback"):
        hint = " For Llama-3, Qwen, R1: transformers 5 rewrote the file; take the original model's tokenizer.json."
    raise ValueError(
        f"{name}: pre-tokenizer {pre[:200]} with decoder {decoder.get('type')!r} is not handled; accepted: byte-level "
        f"BPE (ByteLevel in both), or SentencePiece's with byte_fallback, spaces as U+2581, and no splits.{hint}"
    )


def _first_space(spec: Mapping[str, Any]) -> str | None:
    """Where SentencePiece's BPE puts a space: `first`, `always` (behind markers too), or nowhere, the empty text.

    None for what is not spelled in this way.
    """
    if not spec["model"].get("byte_fallback"):
        return None
    decoder = spec["decoder"] or {}
    steps = decoder.get("decoders", []) if decoder.get("type") == "Sequence" else [decoder]
    if [step for step in steps if step.get("type") != "Strip"] != _JOINED:
        return None
    normalizer, pre = spec["normalizer"], spec["pre_tokenizer"]
    if pre is None and normalizer:
        steps = normalizer.get("normalizers", []) if normalizer["type"] == "Sequence" else [normalizer]
        return {1: "", 2: "always"}[len(steps)] if steps in ([_REPLACED], [_PREPENDED, _REPLACED]) else None
    if normalizer is None and pre and pre["type"] == "Metaspace" and pre["replacement"] == _SPACE and not pre["split"]:
        return {"never": "", "first": "first", "always": "always"}.get(pre["prepend_scheme"])
    return None


def _byte_of_char() -> dict[str, int]:
    """Inverse of GPT-2's table that writes each byte as one printable character."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()


def _bytes_of_characters(token: str) -> bytes:
    if all(char in _BYTE_OF_CHAR for char in token):
        return bytes(_BYTE_OF_CHAR[char] for char in token)
    return token.encode()  # rows of a vocabulary that no text gives


def _bytes_of_piece(token: str) -> bytes:
    byte = _BYTE.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace(_SPACE, " ").encode()
