"""The real vocabulary of R1-Distill-Qwen-7B, from the metadata of its GGUF file, and Qwen3's made of it.

Qwen2, Qwen2.5, Qwen3 and R1's distills of them share the first 151,643 tokens and all merges.
"""

import json
from pathlib import Path

from gguf import GGUFReader

HEADER = Path(__file__).resolve().parents[3] / "shared" / "data" / "qwen" / "r1_distill_qwen_7b_header.gguf"
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
N_ORDINARY = 151643
QWEN3_SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)
QWEN3_MARKERS = (
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
)
# What Qwen3's own template comes to for a system text and a problem.
QWEN3_CHAT = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)


def write_header(path: Path) -> Path:
    """The metadata as a GGUF file without tensors, whose weights are not here."""
    data = bytearray(HEADER.read_bytes())
    data[8:16] = bytes(8)  # the number of tensors
    path.write_bytes(data)
    return path


def write_qwen3(folder: Path, header: Path) -> Path:
    """Writes Qwen3's tokenizer files as its repository lays them out."""
    fields = GGUFReader(header).fields
    texts = fields["tokenizer.ggml.tokens"].contents()[:N_ORDINARY]
    merges = fields["tokenizer.ggml.merges"].contents()
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False}
    spec = {
        "version": "1.0",
        "added_tokens": [
            {"id": N_ORDINARY + i, "content": text, "special": text in QWEN3_SPECIAL, **flags}
            for i, text in enumerate((*QWEN3_SPECIAL, *QWEN3_MARKERS))
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {text: i for i, text in enumerate(texts)}, "merges": merges},
    }
    config = {"add_bos_token": False, "bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(json.dumps(spec), "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": QWEN3_CHAT}), "utf-8")
    # As in the files of the models, whose config names a BOS that no sequence begins with.
    (folder / "config.json").write_text(json.dumps({"bos_token_id": 151643, "eos_token_id": 151645}), "utf-8")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [151645, 151643]}), "utf-8")
    return folder
