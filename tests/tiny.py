"""A complete experiment in a second of work: two random models of three layers, a tokenizer of words, annotated chains.

This file is its own experiment file: `python -m backtrack_jax.run --config=tests/tiny.py`, in a folder that `write`
filled. All its paths are relative, so nothing in the artifacts depends on where that folder is.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from backtrack_jax.config import (
    AnalysisSpec,
    AnnotationSpec,
    Experiment,
    ModelSpec,
    PromptSpec,
    SteeringSpec,
    TraceSpec,
    VectorSpec,
)
from backtrack_jax.models import checkpoint
from backtrack_jax.models.config import ModelConfig
from backtrack_jax.models.safetensors import LazyTensor

WORDS = (" wait", " hmm", " so", " the", " is", " two", " add", " first", " no", " then", ",", ".")
MARKERS = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>")
BOS, EOS = MARKERS[:2]
TASKS = [f"{category}_{number}" for category in ("verbal", "math_logic", "spatial") for number in range(4)]
CHAINS = "chains.json"


def get_config() -> Experiment:
    """Both models, both sources, every kind of condition, every sweep."""
    return Experiment(
        name="tiny",
        base=ModelSpec("base", dtype="float32", markers="drop"),
        reasoning=ModelSpec("reasoning", dtype="float32"),
        prompt=PromptSpec(format="r1", think="primed"),
        traces=TraceSpec(path=CHAINS),
        annotations=AnnotationSpec(judge="released"),
        vectors=VectorSpec(window=(-5, -2), offsets=(-6, -1, 0, 1), layers=(1, 2), batch_size=4),
        steering=SteeringSpec(
            kinds=("backtracking", "deduction", "overall-mean", "noise", "self-amplification", "random"),
            baselines=("shuffled",),
            offsets=(-1, 0),
            layers=(0, 1, 2),
            grid_magnitudes=(0.0, 8.0),
            grid_limit=2,
            layer=(1,),
            magnitudes=(0.0, -4.0, 8.0),
            limit=3,
            samples=2,
            temperature=1.0,
            max_new_tokens=8,
            batch_size=32,
        ),
        analysis=AnalysisSpec(forced_texts=3, examples=2),
    )


def write(folder: Path) -> None:
    """Writes both models, each with its tokenizer, and the chains."""
    tokenizer = tokenizer_json()
    for role, seed in (("base", 1), ("reasoning", 2)):
        write_model(folder / role, vocab_size=VOCAB_SIZE, seed=seed)
        (folder / role / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
        special = {"add_bos_token": True, "bos_token": BOS, "eos_token": EOS}
        (folder / role / "tokenizer_config.json").write_text(json.dumps(special), "utf-8")
    (folder / CHAINS).write_text(json.dumps(chains(), indent=1), "utf-8")


def write_model(folder: Path, *, vocab_size: int, seed: int, d_model: int = 16, n_layers: int = 3) -> None:
    """Writes a random model that says words: coordinate 0 is large everywhere, and speaks against all other tokens."""
    config = ModelConfig(
        vocab_size=vocab_size,
        d_model=d_model,
        d_mlp=24,
        n_layers=n_layers,
        n_heads=2,
        n_kv_heads=1,
        head_dim=8,
        norm_eps=1e-5,
        rope_theta=10000.0,
        rope_scaling=None,
        tied=False,
    )
    write_weights(folder, config, seed)


def write_weights(folder: Path, config: ModelConfig, seed: int) -> None:
    """The random model of an architecture; with tied embeddings it may say anything."""
    vocab_size, d_model = config.vocab_size, config.d_model
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in checkpoint.expected_tensors(config).items():
        weight = rng.standard_normal(shape) / np.sqrt(shape[-1]) if len(shape) == 2 else np.ones(shape)
        weights[name] = weight.astype(np.float32)
    weights["model.embed_tokens.weight"] *= d_model**0.5
    weights["model.embed_tokens.weight"][:, 0] = 4
    said = [word_id(word) for word in WORDS] + [VOCAB_SIZE - len(MARKERS) + MARKERS.index(EOS)]
    if not config.tied:
        head = np.zeros((vocab_size, d_model), np.float32)
        head[:, 0] = -2
        head[said] = 2 * weights["lm_head.weight"][said]
        weights["lm_head.weight"] = head
    lazy = {name: LazyTensor(w.shape, w.dtype, lambda w=w: w, name) for name, w in weights.items()}
    checkpoint.write_hf(config, lazy, folder)


def word_id(word: str) -> int:
    """Id of a word that is one token."""
    vocabulary: dict[str, int] = tokenizer_json()["model"]["vocab"]
    return vocabulary[word.replace(" ", "Ġ")]


def tokenizer_json() -> dict[str, Any]:
    """Byte-level BPE of the 256 bytes, the words with the merges that lead to them, and R1's markers."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {byte: chr(byte) for byte in printable}
    letters |= {byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in letters)}
    vocabulary = {letters[byte]: byte for byte in range(256)}
    merges = []
    for word in (word.replace(" ", "Ġ") for word in WORDS):
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary:
                vocabulary[word[:end]] = len(vocabulary)
                merges.append([word[: end - 1], word[end - 1]])
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": len(vocabulary) + i, "content": marker, "special": marker in (BOS, EOS), **flags}
            for i, marker in enumerate(MARKERS)
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merges},
    }


VOCAB_SIZE = len(tokenizer_json()["model"]["vocab"]) + len(MARKERS)


def chains() -> list[dict[str, str]]:
    """Twelve annotated chains in the released format: one section is altered, one backtracks too early to be read."""
    made = []
    for number, task in enumerate(TASKS):
        sections = [
            ("initializing", f"Task {number} is to add."),
            ("deduction", f"First {number}, then two, so the sum is {number + 2}."),
            ("backtracking", "Wait, no. The first is not two, so wait."),
            ("adding-knowledge", "Two and two is four." if number % 2 else "Zero is even."),
            ("backtracking", "Hmm, wait. I add two, then two."),
            ("uncertainty-estimation", "The sum is not sure."),
        ][: 3 + number % 4]
        if number == 5:  # a backtracking section with nothing in front of it
            sections = sections[2:] + sections[1:2]
        text = ("<think>\n" if number % 3 == 0 else "") + "\n\n".join(text for _, text in sections)
        text += "\n</think>\n\nIt is so." if number == 7 else ""
        copied = [(label, s.replace("is to add", "is to  add up") if number == 2 else s) for label, s in sections]
        made.append(
            {
                "task_id": task,
                "problem": f"Add {number} and two, with {'no' if number % 2 else 'all the'} words.",
                "reasoning_chain": text,
                "annotated_chain": " ".join(f'["{label}"]{s}["end-section"]' for label, s in copied),
            }
        )
    return made
