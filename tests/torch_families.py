"""Tiny random models of every family in Hugging Face's torch code; `scripts/model_table.py` compares with them, too."""

from typing import Any

import numpy as np
import torch
import transformers

from backtrack_jax.models import families

SIZES: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 40,
    "intermediate_size": 72,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 16384,
    "tie_word_embeddings": False,
    "pad_token_id": None,
}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
# A ramp that begins and ends within the 8 pairs of a head.
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 64}
OLMO_ROPE = {
    "full_attention": YARN | {"rope_theta": 5e5, "attention_factor": 1.2079441541679836},
    "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
}


def hf_class(name: str) -> Any:
    """Hugging Face's class of a family."""
    return getattr(transformers, families.FAMILIES[name].architecture)


def hf_model(name: str, **changes: Any) -> Any:
    """A random float32 model whose biases and norms are far from their initial values."""
    config = hf_class(name).config_class(**(SIZES | changes))
    config._attn_implementation = "eager"
    model = hf_class(name)(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter_name, parameter in model.named_parameters():
        mean = 1.0 if "norm" in parameter_name else 0.0
        deviation = 0.3 if parameter.ndim == 1 else parameter.shape[1] ** -0.5
        parameter.normal_(mean, deviation, generator=generator)
    return model


def in_torch(reference: Any, ids: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """States [L, B, T, D] after every block, before the final norm, and logits [B, T, V]; read by hooks."""
    states: list[np.ndarray] = []

    def hook(module: Any, args: tuple, output: Any) -> None:
        states.append((output[0] if isinstance(output, tuple) else output).numpy())

    handles = [layer.register_forward_hook(hook) for layer in reference.model.layers]
    with torch.no_grad():
        logits = reference(torch.tensor(ids), position_ids=torch.tensor(positions), use_cache=False).logits.numpy()
    for handle in handles:
        handle.remove()
    return np.stack(states), logits
