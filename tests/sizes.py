"""Sizes of models that tests share, and random models of them.

In torch, `helpers.hf_llama` has the sizes of `TINY`. The models of `tiny`, a whole experiment, have sizes of their own:
that file is a config, which stands alone.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from backtrack_jax.models.config import Llama3RopeScaling, ModelConfig
from backtrack_jax.models.decoder import Decoder

LLAMA_8B = ModelConfig(  # Llama-3.1-8B and DeepSeek-R1-Distill-Llama-8B
    vocab_size=128256,
    d_model=4096,
    d_mlp=14336,
    n_layers=32,
    n_heads=32,
    n_kv_heads=8,
    head_dim=128,
    norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=Llama3RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192),
    tied=False,
)
# Sizes differ wherever they can, so that a confusion of axes shows; heads have 16 dimensions, so that all three bands
# of Llama 3.1's RoPE scaling occur.
TINY = ModelConfig(
    vocab_size=131,
    d_model=40,
    d_mlp=72,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    head_dim=16,
    norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=LLAMA_8B.rope_scaling,
    tied=False,
)


def random_model(config: ModelConfig = TINY, seed: int = 0) -> Decoder:
    """Random float32 weights large enough that logits differ by more than rounding and greedy texts vary."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        mean = 1.0 if "norm" in jax.tree_util.keystr(path) else 0.0
        return jnp.array(rng.normal(mean, 0.2, leaf.shape), jnp.float32)

    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))  # draws and compiles nothing
    return jax.tree_util.tree_map_with_path(draw, model)
