"""The real Llama-3.1 vocabulary (`tokenizer.model` of the PyPI package `llama-models`) as a Hugging Face folder."""

import base64
import importlib.util
import json
from pathlib import Path

# Llama-3's own text splitter (`llama_models/llama3/tokenizer.py`), and the special tokens that have a name.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    2: "<|reserved_special_token_0|>",
    3: "<|reserved_special_token_1|>",
    4: "<|finetune_right_pad_id|>",
    5: "<|reserved_special_token_2|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}
# What R1-Distill-Llama-8B renames; the turn and think tokens are flagged special=False.
R1_SPECIAL = {0: "<｜begin▁of▁sentence｜>", 1: "<｜end▁of▁sentence｜>", 15: "<｜▁pad▁｜>"}
R1_MARKERS = {11: "<｜User｜>", 12: "<｜Assistant｜>", 13: "<think>", 14: "</think>"}


def tokenizer_model() -> Path | None:
    """Path of the vocabulary file, None where `llama-models` is not installed. Imports nothing of the package."""
    package = importlib.util.find_spec("llama_models")
    if package is None or package.origin is None:
        return None
    path = Path(package.origin).parent / "llama3" / "tokenizer.model"
    return path if path.is_file() else None


def char_of_byte() -> dict[int, str]:
    """GPT-2's table that writes each byte as one printable character, written out another way than in the package."""
    table, spare = {}, 256
    for byte in range(256):
        if 33 <= byte <= 126 or 161 <= byte <= 172 or byte >= 174:
            table[byte] = chr(byte)
        else:
            table[byte] = chr(spare)
            spare += 1
    return table


def tokenizer_json(model: Path, *, r1: bool) -> dict:
    """The `tokenizer.json` of Llama-3.1 (`r1=False`) or of its R1 distill, made from the tiktoken ranks."""
    table = char_of_byte()
    ranks = {}
    for line in model.read_text().splitlines():
        token, rank = line.split()
        ranks["".join(table[byte] for byte in base64.b64decode(token))] = int(rank)
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        splits = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs = [pair for pair in splits if pair[0] in ranks and pair[1] in ranks]
        merges += sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    special = SPECIAL | (R1_SPECIAL | R1_MARKERS if r1 else {})
    names = [special.get(i, f"<|reserved_special_token_{i - 8}|>") for i in range(256)]
    bos = names[0]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": 128000 + i, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": not (r1 and i in R1_MARKERS)}
            for i, name in enumerate(names)
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False},
                byte_level,
            ],
        },
        "post_processor": {
            "type": "Sequence",
            "processors": [
                {**byte_level, "trim_offsets": True},
                {
                    "type": "TemplateProcessing",
                    "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                    "special_tokens": {bos: {"id": bos, "ids": [128000], "tokens": [bos]}},
                },
            ],
        },
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": ranks, "merges": merges, "ignore_merges": True},
    }  # fmt: skip


def write_folder(folder: Path, model: Path, *, r1: bool) -> Path:
    """Write the tokenizer files of Llama-3.1 or of its R1 distill as its repository lays them out."""
    spec = tokenizer_json(model, r1=r1)
    names = {token["id"]: token["content"] for token in spec["added_tokens"]}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(spec), "utf-8")
    if r1:
        config = {
            "add_bos_token": True,
            "bos_token": {"__type": "AddedToken", "content": names[128000]},
            "eos_token": {"__type": "AddedToken", "content": names[128001]},
            "pad_token": {"__type": "AddedToken", "content": names[128001]},
            "tokenizer_class": "LlamaTokenizerFast",
        }
    else:  # says nothing of add_bos_token: the post-processor adds it
        config = {"bos_token": names[128000], "eos_token": names[128001], "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 128001, "temperature": 0.6}), "utf-8")
    return folder
