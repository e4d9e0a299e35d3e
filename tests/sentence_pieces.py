"""SentencePiece models of 500 pieces, and tokenizers of their vocabulary in Hugging Face's layout."""

import functools
import io
import json
from pathlib import Path
from typing import Any

import sentencepiece

SPACE = "\u2581"
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
PREPEND = {"type": "Prepend", "prepend": SPACE}
LAYOUTS: dict[str, dict[str, Any]] = {
    "as Llama 2 and Mistral 7B": {"normalizer": {"type": "Sequence", "normalizers": [PREPEND, REPLACE]}},
    "first": {
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False},
    },
    "without a first space": {"normalizer": REPLACE},
}
MARKERS = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]")


@functools.cache
def trained() -> sentencepiece.SentencePieceProcessor:
    """A model that is trained on the sources of tests; white space stays as it is."""
    lines = [
        line for path in sorted(Path(__file__).parent.glob("test_*.py")) for line in path.read_text("utf-8").split("\n")
    ]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for line in lines if line.isascii()),
        model_writer=model,
        model_type="bpe",
        vocab_size=500,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=list(MARKERS[3:]),
        num_threads=1,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def write(
    folder: Path, sp: sentencepiece.SentencePieceProcessor, layout: str = "as Llama 2 and Mistral 7B", **changes: Any
) -> Path:
    """A folder in Hugging Face's layout with the vocabulary of a SentencePiece model."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    pieces = [sp.id_to_piece(i) for i in range(sp.get_piece_size())]
    scores = {piece: sp.get_score(i) for i, piece in enumerate(pieces) if not sp.is_byte(i) and piece not in MARKERS}
    cuts = [(word[:k], word[k:]) for word in scores for k in range(1, len(word))]
    merges = [pair for pair in cuts if scores.keys() >= {*pair}]
    merges.sort(key=lambda pair: -scores["".join(pair)])
    joined = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    spec = {
        "version": "1.0",
        "added_tokens": [{"id": sp.piece_to_id(text), "content": text, **flags} for text in MARKERS],
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [*joined, strip]},
        "model": {
            "type": "BPE",
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": merges,
            "byte_fallback": True,
            "fuse_unk": True,
            "unk_token": "<unk>",
        },
        **LAYOUTS[layout],
        **changes,
    }
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(spec), "utf-8")
    config = {"add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return folder
