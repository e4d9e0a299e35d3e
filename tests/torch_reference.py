"""The same tiny Llama twice: in this package and in Hugging Face's torch code, steered by a hook of a few lines."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax import nnx

from backtrack_jax.models.config import Llama3RopeScaling, ModelConfig
from backtrack_jax.models.decoder import Decoder

CONFIG = ModelConfig(
    vocab_size=300,  # not a multiple of 128
    d_model=32,
    d_mlp=48,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    head_dim=16,
    norm_eps=1e-5,
    rope_theta=1e4,
    rope_scaling=Llama3RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=64),
    tied=False,
)


def tiny_llama(seed: int = 0) -> Decoder:
    """Random float32 weights large enough that logits differ by more than rounding and greedy texts vary."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        mean = 1.0 if "norm" in jax.tree_util.keystr(path) else 0.0
        return jnp.array(rng.normal(mean, 0.2, leaf.shape), jnp.float32)

    model = nnx.eval_shape(lambda: Decoder(CONFIG, rngs=nnx.Rngs(0)))  # draws and compiles nothing
    return jax.tree_util.tree_map_with_path(draw, model)


def torch_copy(model: Decoder) -> transformers.LlamaForCausalLM:
    """Hugging Face's implementation with the same weights, written against its parameter names."""
    c, scaling = model.config, model.config.rope_scaling
    assert scaling is not None
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
    reference: transformers.LlamaForCausalLM, layer: int, vector: np.ndarray, span: tuple[int, int] | None = None
) -> Iterator[None]:
    """Adds a vector to the output of a block, at columns [start, stop) of its input or at all of them."""
    start, stop = span or (0, None)

    def hook(module: torch.nn.Module, args: tuple, output: torch.Tensor | tuple) -> torch.Tensor | tuple:
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


def torch_logits(reference: transformers.LlamaForCausalLM, ids: Sequence[int]) -> np.ndarray:
    """[T, V] float32 of one sequence, alone, without padding or cache."""
    with torch.no_grad():
        return reference(torch.tensor([list(ids)]), use_cache=False).logits[0].numpy()


def torch_residuals(reference: transformers.LlamaForCausalLM, ids: Sequence[int]) -> np.ndarray:
    """Output of every block, [L, T, D] float32, of one sequence, alone, without padding or cache.

    By hooks: Hugging Face's last hidden state is not the last block's output but comes after the final norm.
    """
    outputs: list[np.ndarray] = []

    def hook(module: torch.nn.Module, args: tuple, output):
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
