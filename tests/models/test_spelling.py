"""Tokenizers that spell as SentencePiece's BPE does, against `sentencepiece` itself."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import sentence_pieces
import sentencepiece
from sentence_pieces import LAYOUTS, MARKERS, PREPEND, REPLACE, SPACE, write
from test_tokenizer import HARD_TEXTS, tiny_spec

from backtrack_jax.models import prompts, spelling
from backtrack_jax.models.prompts import PromptFormat
from backtrack_jax.models.tokenizer import Tokenizer

TEXTS = [*HARD_TEXTS, " lead", "a<s>b", "  two  spaces", "[INST] quoted [/INST]", "wait Wait,wait", "<0x41>"]


@pytest.fixture(scope="module")
def reference() -> sentencepiece.SentencePieceProcessor:
    return sentence_pieces.trained()


def plainly(sp: sentencepiece.SentencePieceProcessor, text: str) -> bool:
    """Whether `sentencepiece` takes no part of a text for a marker, which it knows no way to leave alone."""
    return not any(marker in text for marker in MARKERS)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ids_equal_those_of_sentencepiece(
    layout: str, reference: sentencepiece.SentencePieceProcessor, tmp_path: Path
) -> None:
    """With the space in front that its sequences begin with; ids spell the text, character for character."""
    found = Tokenizer.load(write(tmp_path / "t", reference, layout))
    assert found.begin == ("" if "without" in layout else " ")
    for text in TEXTS:
        if text and plainly(reference, text):
            assert found.encode(" " + text) == reference.encode(text), text
            assert prompts.prompt_ids(found, text, PromptFormat("plain")) == [1, *found.encode(found.begin + text)]
        ids, spans = found.encode_with_spans(text)
        assert found.decode(ids) == text and found.decode_with_spans(ids) == (text, spans)
        plain = found.encode(text, markers=False)
        assert found.decode(plain) == text and not {*plain} & {*found.markers.values()}
    prompts.check_tokenizer(found, [text for text in TEXTS if "<s>" not in text])
    bytes_ = found.encode("é")
    assert [found.decode([i]) for i in bytes_] == ["\ufffd"] * 2 and found.decode(bytes_) == "é"


def test_tokens_hold_the_characters_they_spell(reference: sentencepiece.SentencePieceProcessor, tmp_path: Path) -> None:
    found = Tokenizer.load(write(tmp_path / "t", reference, "first"))
    text = "wait\n\nWait, 日本 x"
    ids, spans = found.encode_with_spans(text)
    assert all(found.decode([i]) == text[a:b] for i, (a, b) in zip(ids, spans, strict=True) if text[a:b].isascii())
    assert all(later[0] in (first[0], first[1]) for first, later in pairwise(spans))
    assert prompts.token_of_char(spans, text.index("W")) == next(n for n, (a, _) in enumerate(spans) if a == 6)
    assert [s for s in spans if text[slice(*s)] == "日"] == [(12, 13)] * 3


@pytest.mark.parametrize(("layout", "behind"), [("as Llama 2 and Mistral 7B", SPACE), ("first", "")])
def test_the_space_in_chats(
    layout: str, behind: str, reference: sentencepiece.SentencePieceProcessor, tmp_path: Path
) -> None:
    """Behind every marker where the file prepends one to each part, as in transformers; else at the start alone."""
    folder = write(tmp_path / "t", reference, layout)
    template = "{{ bos_token }}{% for m in messages %}[INST]{{ m.content }}[/INST]{% endfor %}"
    (folder / "chat_template.jinja").write_text(template, "utf-8")
    found = Tokenizer.load(folder)
    inst, end = (found.markers[text] for text in MARKERS[3:])
    ids = found.encode_chat([{"role": "user", "content": "so, wait"}])
    assert ids == [1, inst, *found.encode(behind.replace(SPACE, " ") + "so, wait"), end]


def test_it_is_saved_as_it_was(reference: sentencepiece.SentencePieceProcessor, tmp_path: Path) -> None:
    for n, layout in enumerate(LAYOUTS):
        found = Tokenizer.load(write(tmp_path / str(n), reference, layout))
        (copy := tmp_path / f"copy {n}").mkdir()
        found.save(copy)
        again = Tokenizer.load(copy)
        assert again.begin == found.begin and again.encode("Wait, wait") == found.encode("Wait, wait")
        spec = json.loads((copy / "tokenizer.json").read_text("utf-8"))
        assert spec["decoder"]["decoders"][-1]["type"] == "Strip"


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "Sequence", "normalizers": [REPLACE, {"type": "NFC"}]}},
        {"normalizer": {"type": "Sequence", "normalizers": [PREPEND]}},
        {"normalizer": None},
        {"pre_tokenizer": {"type": "Split", "pattern": {"String": " "}, "behavior": "Isolated", "invert": False}},
        {"decoder": {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "always", "split": False}},
        {"decoder": None},
    ],
)
def test_other_ways_are_refused(
    changes: dict[str, Any], reference: sentencepiece.SentencePieceProcessor, tmp_path: Path
) -> None:
    folder = write(tmp_path / "t", reference, "as Llama 2 and Mistral 7B", **changes)
    with pytest.raises(ValueError, match=r"is not handled; accepted: byte-level BPE .*or SentencePiece's"):
        Tokenizer.load(folder)


def test_byte_level_vocabularies_begin_with_nothing() -> None:
    found = spelling.spelling_of(tiny_spec(), "tiny")
    assert (found.begin, found.settings) == ("", {})
    assert b"".join(map(found.bytes_of, ("Ġ", "Ã", "©"))) == " é".encode()
