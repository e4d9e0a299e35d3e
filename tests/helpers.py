"""Tiny random Llamas of Hugging Face transformers, the oracle that models are compared with."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def hf_llama(**changes: Any) -> transformers.LlamaForCausalLM:
    """A random float32 Llama with eager attention; weights, norms' too, are far from their initial values.

    Sizes differ wherever they can, so that a confusion of axes shows; heads have 16 dimensions, so that all three bands
    of Llama 3.1's RoPE scaling occur.
    """
    fields: dict[str, Any] = {
        "vocab_size": 131,
        "hidden_size": 40,
        "intermediate_size": 72,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
        "rope_parameters": LLAMA3_ROPE,
    }
    config = transformers.LlamaConfig(**(fields | changes))
    config._attn_implementation = "eager"
    model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        mean, deviation = (1.0, 0.3) if parameter.ndim == 1 else (0.0, parameter.shape[1] ** -0.5)
        parameter.normal_(mean, deviation, generator=generator)
    return model


def save(model: transformers.LlamaForCausalLM, folder: Path, **kwargs: Any) -> Path:
    """The model's folder, as transformers write it."""
    model.save_pretrained(folder, **kwargs)
    return folder


def relative_error(ours: Any, theirs: Any) -> float:
    """Frobenius norm of the difference over that of `theirs`."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
