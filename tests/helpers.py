"""Tiny random Llamas of Hugging Face transformers, the oracle that models are compared with."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from sizes import TINY

from backtrack_jax.models import families

if TYPE_CHECKING:
    import transformers

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def need_torch() -> None:
    """Skips the test where the oracle is not installed."""
    for name in ("torch", "transformers"):
        pytest.importorskip(name, reason="needs torch and transformers to compare with")


def hf_llama(**changes: Any) -> "transformers.LlamaForCausalLM":
    """A random float32 Llama of `TINY`'s sizes with eager attention; weights are far from their initial values.

    Args:
      **changes: fields of its `LlamaConfig` with other values.
    """
    need_torch()
    import torch
    import transformers

    fields: dict[str, Any] = families.to_hf(TINY) | {"rope_parameters": LLAMA3_ROPE}
    del fields["rope_theta"], fields["rope_scaling"]  # the old form of the same
    config = transformers.LlamaConfig(**(fields | changes))
    config._attn_implementation = "eager"
    model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        mean, deviation = (1.0, 0.3) if parameter.ndim == 1 else (0.0, parameter.shape[1] ** -0.5)
        parameter.normal_(mean, deviation, generator=generator)
    return model


def save(model: "transformers.LlamaForCausalLM", folder: Path, **kwargs: Any) -> Path:
    """The model's folder, as transformers write it."""
    model.save_pretrained(folder, **kwargs)
    return folder


def relative_error(ours: Any, theirs: Any) -> float:
    """Frobenius norm of the difference over that of `theirs`."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
