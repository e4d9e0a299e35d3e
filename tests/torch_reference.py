"""The same tiny Llama twice: in this package and in Hugging Face's torch code, steered by a hook of a few lines."""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from helpers import need_torch
from sizes import TINY, random_model

from backtrack_jax.models.config import Llama3RopeScaling
from backtrack_jax.models.decoder import Decoder

if TYPE_CHECKING:
    import torch
    import transformers

CONFIG = dataclasses.replace(
    TINY,
    vocab_size=300,  # not a multiple of 128
    d_model=32,
    d_mlp=48,
    rope_theta=1e4,
    # so short that positions of a test are far on either side of it
    rope_scaling=Llama3RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=64),
)


def tiny_llama(seed: int = 0) -> Decoder:
    return random_model(CONFIG, seed)


def torch_copy(model: Decoder) -> "transformers.LlamaForCausalLM":
    """Hugging Face's implementation with the same weights, written against its parameter names."""
    need_torch()
    import torch
    import transformers

    c, scaling = model.config, model.config.rope_scaling
    assert isinstance(scaling, Llama3RopeScaling)
    reference = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.d_model,
            intermediate_size=c.d_mlp,
            num_hidden_layers=c.n_layers,
            num_attention_heads=c.n_heads,
            num_key_value_heads=c.n_kv_heads,
            head_dim=c.head_dim,
            rms_norm_eps=c.norm_eps,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": c.rope_theta,
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_context,
            },
            tie_word_embeddings=False,
        )
    ).eval()
    reference.set_attn_implementation("eager")
    assert model.lm_head is not None
    modules = {"model.embed_tokens": model.embed_tokens, "model.norm": model.norm, "lm_head": model.lm_head}
    arrays = {f"{name}.weight": np.asarray(module.weight[...]) for name, module in modules.items()}
    for part, names in {
        "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
        "mlp": ("gate_proj", "up_proj", "down_proj"),
    }.items():
        for name in names:
            for i, weight in enumerate(np.asarray(getattr(getattr(model.layers, part), name).weight[...])):
                arrays[f"model.layers.{i}.{part}.{name}.weight"] = weight.T
    for name in ("input_layernorm", "post_attention_layernorm"):
        for i, weight in enumerate(np.asarray(getattr(model.layers, name).weight[...])):
            arrays[f"model.layers.{i}.{name}.weight"] = weight
    reference.load_state_dict({name: torch.tensor(array) for name, array in arrays.items()}, strict=True)
    return reference


@contextmanager
def added(
    reference: "transformers.LlamaForCausalLM", layer: int, vector: np.ndarray, span: tuple[int, int] | None = None
) -> Iterator[None]:
    """Adds a vector to the output of a block, at columns [start, stop) of its input or at all of them."""
    import torch

    start, stop = span or (0, None)

    def hook(module: "torch.nn.Module", args: tuple, output: "torch.Tensor | tuple") -> "torch.Tensor | tuple":
        hidden = output if isinstance(output, torch.Tensor) else output[0]  # depends on the version of transformers
        assert hidden.ndim == 3
        changed = hidden.clone()
        changed[:, start:stop] += torch.tensor(vector, dtype=hidden.dtype)
        return changed if isinstance(output, torch.Tensor) else (changed, *output[1:])

    handle = reference.model.layers[layer].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def torch_logits(reference: "transformers.LlamaForCausalLM", ids: Sequence[int]) -> np.ndarray:
    """[T, V] float32 of one sequence, alone, without padding or cache."""
    import torch

    with torch.no_grad():
        return reference(torch.tensor([list(ids)]), use_cache=False).logits[0].numpy()


def torch_residuals(reference: "transformers.LlamaForCausalLM", ids: Sequence[int]) -> np.ndarray:
    """Output of every block, [L, T, D] float32, of one sequence, alone, without padding or cache.

    By hooks: Hugging Face's last hidden state is not the last block's output but comes after the final norm.
    """
    import torch

    outputs: list[np.ndarray] = []

    def hook(module: "torch.nn.Module", args: tuple, output: "torch.Tensor | tuple") -> None:
        hidden = output[0] if isinstance(output, tuple) else output  # depends on the version of transformers
        assert hidden.ndim == 3
        outputs.append(hidden[0].numpy())

    handles = [layer.register_forward_hook(hook) for layer in reference.model.layers]
    try:
        with torch.no_grad():
            reference(torch.tensor([list(ids)]), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return np.stack(outputs)


def unit_vectors(n: int, d_model: int, seed: int = 0) -> jax.Array:
    """[n, D] random directions of norm 1."""
    v = jax.random.normal(jax.random.key(seed), (n, d_model))
    return v / jnp.linalg.norm(v, axis=-1, keepdims=True)
