"""Weights of 8 bits: the matrices of the blocks as integers, with one scale for each output channel.

Embedding, unembedding, norms and biases keep 16 bits, and so do the factors of every product: the integers, which 16
bits hold exactly, are widened where they are multiplied, and the scale is applied to the float32 sums. What is read
off a model and added to it is as before.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from backtrack_jax.models import ops
from backtrack_jax.models.config import ModelConfig
from backtrack_jax.models.decoder import Decoder
from backtrack_jax.models.layers import Linear

_STEP = np.float32(1 / 127)  # multiplied, since compilers turn a division by a constant into that


class Int8Linear(nnx.Module):
    """x (W * scale) + b; W int8 [in, out], scale float32 [out]; leading axes of stacked blocks before both."""

    def __init__(self, linear: Linear):
        """From a `Linear`, whose weights are rounded to the nearest step."""
        weight = linear.weight[...].astype(jnp.float32)
        largest = jnp.max(jnp.abs(weight), axis=-2, keepdims=True)
        scale = jnp.where(largest == 0, 1.0, largest * _STEP)
        self.weight = nnx.Param(jnp.round(weight / scale).astype(jnp.int8))
        self.scale = nnx.Param(scale[..., 0, :])
        self.bias = linear.bias
        self.dtype = linear.dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., in] to [..., out] float32."""
        y = ops.matmul(x, self.weight[...].astype(self.dtype)) * self.scale[...]
        return y if self.bias is None else y + self.bias[...].astype(jnp.float32)


def quantize(model: Decoder) -> Decoder:
    """The model with the matrices of its blocks in 8 bits; everything else keeps its dtype."""
    model = jax.tree.map(lambda leaf: leaf, model)
    for part in (model.layers.self_attn, model.layers.mlp):
        for name in model.config.matrices:
            if isinstance(linear := getattr(part, name, None), Linear):
                setattr(part, name, Int8Linear(linear))
    return model


def abstract(config: ModelConfig, dtype: np.dtype) -> Decoder:
    """A model with shapes in place of weights; int8 stands for the blocks' matrices, beside 16 bits."""
    if dtype != jnp.int8:
        return nnx.eval_shape(lambda: Decoder(config, dtype, rngs=nnx.Rngs(0)))
    return nnx.eval_shape(lambda: quantize(Decoder(config, ops.half(), rngs=nnx.Rngs(0))))


def weight_bytes(config: ModelConfig, dtype: str) -> int:
    """Bytes of a model's weights."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract(config, jnp.dtype(dtype))))


def activation_dtype(dtype: str) -> np.dtype:
    """Of the factors of products, and of cached keys and values, for weights of a dtype."""
    return ops.half() if dtype == "int8" else jnp.dtype(dtype)


def rounded(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows [out, in] of a stored matrix in 8 bits, and their scales [out] float32, as `Int8Linear` rounds them."""
    rows = rows.astype(np.float32)
    largest = np.abs(rows).max(axis=1)
    scale = np.where(largest == 0, np.float32(1), largest * _STEP)
    with np.errstate(invalid="ignore"):  # infinities and NaN, which the scale shows
        return np.rint(rows / scale[:, None]).astype(np.int8), scale
