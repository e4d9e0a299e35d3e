"""Grouped-query attention with rotary positions, and the cache of keys and values. Axes as in `decoder`."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from backtrack_jax.models import ops
from backtrack_jax.models.config import LayerKind, ModelConfig, RopeScaling
from backtrack_jax.models.layers import Linear, RMSNorm

PAD = -1  # position of a padding token

KeysValues = tuple[jax.Array, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens so far. Every row uses the same slot at the same step.

    A batch of two left-padded prompts (`.` is padding) after two generated tokens, with S = 7:

        slot        0  1  2  3  4  5  6        length = 6
        row 0       .  B  h  i  x  y  -
        positions  -1  0  1  2  3  4 -1
        row 1       B  y  o  u  z  w  -
        positions   0  1  2  3  4  5 -1

    Attributes:
      k: [L, B, K, H, S] keys, rotated; slots come last, which is how a decode step multiplies them. Of an `unstacked`
        model, a tuple of L arrays without the axis L.
      v: [L, B, K, S, H] values, likewise.
      positions: [B, S] int32, PAD where a slot is empty or holds padding.
      length: int32, number of slots in use.
    """

    k: Any
    v: Any
    positions: jax.Array
    length: jax.Array

    def extended(self, slots: int) -> "KVCache":
        """The same cache with `slots` more, empty ones."""
        none, more = (0, 0), (0, slots)
        return KVCache(
            jnp.pad(self.k, (none, none, none, none, more)),
            jnp.pad(self.v, (none, none, none, more, none)),
            jnp.pad(self.positions, (none, more), constant_values=PAD),
            self.length,
        )

    def repeated(self, times: int) -> "KVCache":
        """The cache of `times` rows after each other in place of every row."""
        return KVCache(
            jnp.repeat(self.k, times, axis=1),
            jnp.repeat(self.v, times, axis=1),
            jnp.repeat(self.positions, times, axis=0),
            self.length,
        )

    def unstacked(self) -> "KVCache":
        """The same cache as one array per layer, to go with `Decoder.unstacked`."""
        return dataclasses.replace(self, k=tuple(self.k), v=tuple(self.v))


class LayerCache(NamedTuple):
    """What the new tokens of one layer attend to beside each other.

    Attributes:
      k: [B, K, H, S] cached keys.
      v: [B, K, S, H] cached values.
      mask: [B, T, S] bool, which slots a query may attend to.
      slot: where the new keys and values are written before anything is attended to, and `mask` is of what is there
        then; None if the cache stays as it is and the new ones are attended to beside it.
    """

    k: jax.Array
    v: jax.Array
    mask: jax.Array
    slot: jax.Array | None


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        """Starts from random weights; `checkpoint` replaces them."""
        self.q_proj = Linear.of(config, "q_proj", dtype, rngs)
        self.k_proj = Linear.of(config, "k_proj", dtype, rngs)
        self.v_proj = Linear.of(config, "v_proj", dtype, rngs)
        self.o_proj = Linear.of(config, "o_proj", dtype, rngs)
        norms = {name: RMSNorm(width, config.norm_eps, dtype) for name, width in config.qk_norm_widths.items()}
        self.q_norm, self.k_norm = norms.get("q_norm"), norms.get("k_norm")
        self.config = config

    def __call__(
        self, x: jax.Array, rope: tuple[jax.Array, jax.Array], mask: jax.Array, cache: LayerCache | None
    ) -> tuple[jax.Array, KeysValues]:
        """Attends from x to the cached tokens and to x itself.

        Args:
          x: [B, T, D] normalised residual stream.
          rope: cosines and sines, [B, T, H/2] float32.
          mask: [B, T, T] bool, which tokens of x a query may attend to.
          cache: this layer's cached keys and values, or None.

        Returns:
          Output [B, T, D] float32, and new keys [B, K, H, T] and values [B, K, T, H]; or, where these were written
          into the cache, all of the cache's, [B, K, H, S] and [B, K, S, H].
        """
        c = self.config
        B, T, _ = x.shape
        dtype = self.q_proj.dtype
        q = self._heads(self.q_proj(x), self.q_norm)
        k = self._heads(self.k_proj(x), self.k_norm)
        v = self.v_proj(x).reshape(B, T, c.n_kv_heads, c.head_dim)
        q = rotate(q, *rope) * c.head_dim**-0.5
        q = q.reshape(B, T, c.n_kv_heads, c.n_heads // c.n_kv_heads, c.head_dim).astype(dtype)
        k = jnp.transpose(rotate(k, *rope), (0, 2, 3, 1)).astype(dtype)
        v = jnp.swapaxes(v, 1, 2).astype(dtype)
        if cache is None:
            z = ops.attend_causally(q, k, v, mask)
        elif cache.slot is None:
            z = ops.attend(q, (cache.k, cache.v, cache.mask), (k, v, mask))
        else:
            k, v = write((cache.k, cache.v), (k, v), cache.slot)
            z = ops.attend(q, (k, v, cache.mask))
        return self.o_proj(z), (k, v)

    def _heads(self, x: jax.Array, norm: RMSNorm | None) -> jax.Array:
        """[B, T, heads * H] to [B, T, heads, H], normalised before or after they are taken apart, or not at all."""
        if norm is not None and self.config.qk_norm == "width":
            x = norm(x)
        x = x.reshape(*x.shape[:2], -1, self.config.head_dim)
        return norm(x) if norm is not None and self.config.qk_norm == "head" else x


def write(cached: KeysValues, new: KeysValues, slot: jax.Array) -> KeysValues:
    """Cached keys and values with new ones from `slot` on, stacked over layers or not."""
    k = lax.dynamic_update_slice_in_dim(cached[0], new[0], slot, axis=-1)
    v = lax.dynamic_update_slice_in_dim(cached[1], new[1], slot, axis=-2)
    return k, v


def causal_mask(queries: jax.Array, keys: jax.Array, window: int | None = None) -> jax.Array:
    """[B, T, S] of positions [B, T] and [B, S]: the key is a token (not padding) and does not come after the query.

    With a window, the key is one of the last `window` tokens up to the query.
    """
    queries, keys = queries[:, :, None], keys[:, None, :]
    mask = (keys >= 0) & (keys <= queries)
    return mask if window is None else mask & (keys > queries - window)


def packed_mask(positions: jax.Array, window: int | None = None) -> jax.Array:
    """[B, T, T] of positions [B, T]: `causal_mask` of tokens with each other, where a position 0 begins a sequence."""
    sequence = jnp.cumsum(positions == 0, axis=1)
    return causal_mask(positions, positions, window) & (sequence[:, :, None] == sequence[:, None, :])


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Angle per position of each rotated pair, [H/2] float32."""
    frequencies = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    return (frequencies if scaling is None else scaling.scaled(frequencies, theta)).astype(np.float32)


def rope_tables(positions: jax.Array, config: ModelConfig, kind: LayerKind) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [B, T, H/2] float32 of positions [B, T]; bfloat16 could not hold position 257."""
    scaling = config.rope_scaling if kind.scaled else None
    frequencies = rope_frequencies(config.head_dim, config.rope_theta, scaling)
    if not kind.rotary:
        frequencies, scaling = np.zeros_like(frequencies), None
    angles = positions[..., None].astype(jnp.float32) * frequencies
    amplitude = 1.0 if scaling is None else scaling.amplitude
    return jnp.cos(angles) * amplitude, jnp.sin(angles) * amplitude


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates [B, T, heads, H]; pairs are (i, i + H/2), as in Hugging Face weights, not Meta's (2i, 2i + 1)."""
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
