"""Modules without a notion of position. Axes as in `decoder`."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from backtrack_jax.models import ops
from backtrack_jax.models.config import ModelConfig


class Linear(nnx.Module):
    """x W + b, multiplied in the dtype of W and summed in float32."""

    def __init__(self, d_in: int, d_out: int, dtype: jnp.dtype, rngs: nnx.Rngs, *, bias: bool = False):
        """Starts from random weights and a bias of zero; `checkpoint` replaces them."""
        self.weight = _random(rngs, (d_in, d_out), dtype)
        self.bias = nnx.Param(jnp.zeros(d_out, dtype)) if bias else None

    @classmethod
    def of(cls, config: ModelConfig, name: str, dtype: jnp.dtype, rngs: nnx.Rngs) -> "Linear":
        """One of a block's matrices, by its name in `ModelConfig.matrices`."""
        return cls(*config.matrices[name], dtype, rngs, bias=name in config.biases)

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the weights."""
        return self.weight.dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., in] to [..., out] float32."""
        y = ops.matmul(x, self.weight[...])
        return y if self.bias is None else y + self.bias[...].astype(jnp.float32)


class Embedding(nnx.Module):
    """A vector for every token of the vocabulary: what the token starts as, or in the unembedding a row of W_U."""

    def __init__(self, vocab_size: int, d_model: int, dtype: jnp.dtype, rngs: nnx.Rngs):
        """Starts from random weights; `checkpoint` replaces them."""
        self.weight = _random(rngs, (vocab_size, d_model), dtype)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """[B, T] int32 to [B, T, D] float32."""
        return ops.lookup(self.weight[...], ids).astype(jnp.float32)

    def unembed(self, x: jax.Array) -> jax.Array:
        """W_U x: [..., D] to [..., V] float32."""
        return ops.unembed(x, self.weight[...])


class RMSNorm(nnx.Module):
    """x / rms(x) * weight, in float32."""

    def __init__(self, width: int, eps: float, dtype: jnp.dtype):
        """Starts with weight one."""
        self.weight = nnx.Param(jnp.ones(width, dtype))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] float32 to [..., D] float32."""
        scale = lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return x * scale * self.weight[...].astype(jnp.float32)


class MLP(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        """Starts from random weights; `checkpoint` replaces them."""
        self.gate_proj = Linear.of(config, "gate_proj", dtype, rngs)
        self.up_proj = Linear.of(config, "up_proj", dtype, rngs)
        self.down_proj = Linear.of(config, "down_proj", dtype, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, D] to [B, T, D] float32."""
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


def _random(rngs: nnx.Rngs, shape: tuple[int, ...], dtype: jnp.dtype) -> nnx.Param:
    """Normal numbers of standard deviation 0.02."""
    return nnx.Param((0.02 * jax.random.normal(rngs.params(), shape, jnp.float32)).astype(dtype))
