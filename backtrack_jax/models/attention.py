"""Grouped-query attention with rotary positions, and the cache of keys and values. Axes as in `llama`."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from backtrack_jax.models.config import Llama3RopeScaling, LlamaConfig
from backtrack_jax.models.products import einsum, matmul, random_param

PAD = -1  # position of a padding token
_QUERY_CHUNK = 128  # queries of a causal chunk, at least; shorter ones make products too small to be fast
_MAX_CHUNKS = 16  # since each adds to the compilation

KeysValues = tuple[jax.Array, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens so far. Every row uses the same slot at the same step.

    A batch of two left-padded prompts (`.` is padding) after two generated tokens, with S = 7:

        slot        0  1  2  3  4  5  6        filled = 6
        row 0       .  B  h  i  x  y  -
        positions  -1  0  1  2  3  4 -1
        row 1       B  y  o  u  z  w  -
        positions   0  1  2  3  4  5 -1

    Attributes:
      k: [L, B, K, H, S] keys, rotated; slots come last, which is how a decode step multiplies them. Beside unstacked
        layers, a tuple of L arrays without the axis L.
      v: [L, B, K, S, H] values, likewise.
      positions: [B, S] int32, PAD where a slot is empty or holds padding.
      filled: int32, number of slots in use.
    """

    k: Any
    v: Any
    positions: jax.Array
    filled: jax.Array

    def extended(self, slots: int) -> "KVCache":
        """The same cache with `slots` more, empty ones."""

        none, more = (0, 0), (0, slots)
        return KVCache(
            jnp.pad(self.k, (none, none, none, none, more)),
            jnp.pad(self.v, (none, none, none, more, none)),
            jnp.pad(self.positions, (none, more), constant_values=PAD),
            self.filled,
        )

    def unstacked(self) -> "KVCache":
        """The same cache as one array per layer, to go with `Llama.unstacked_layers`."""
        return dataclasses.replace(self, k=tuple(self.k), v=tuple(self.v))


class Past(NamedTuple):
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

    def __init__(self, config: LlamaConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        """Starts from random weights; `checkpoint` replaces them."""
        D, N, K, H = config.d_model, config.n_heads, config.n_kv_heads, config.head_dim
        self.q_proj = random_param(rngs, (D, N * H), dtype)
        self.k_proj = random_param(rngs, (D, K * H), dtype)
        self.v_proj = random_param(rngs, (D, K * H), dtype)
        self.o_proj = random_param(rngs, (N * H, D), dtype)
        self.config = config

    def __call__(
        self, x: jax.Array, rope: tuple[jax.Array, jax.Array], mask: jax.Array, past: Past | None
    ) -> tuple[jax.Array, jax.Array, jax.Array, KeysValues | None]:
        """Attends from x to the cached tokens and to x itself.

        Args:
          x: [B, T, D] normalised residual stream.
          rope: cosines and sines, [B, T, H/2] float32.
          mask: [B, T, T] bool, which tokens of x a query may attend to.
          past: this layer's cached keys and values, or None.

        Returns:
          Output [B, T, D] float32, new keys [B, K, H, T] and values [B, K, T, H], and the cached ones with the new
          written in, if they were.
        """
        c = self.config
        B, T, _ = x.shape
        dtype = cache_dtype(self.q_proj.dtype)
        q = matmul(x, self.q_proj[...]).reshape(B, T, c.n_heads, c.head_dim)
        k = matmul(x, self.k_proj[...]).reshape(B, T, c.n_kv_heads, c.head_dim)
        v = matmul(x, self.v_proj[...]).reshape(B, T, c.n_kv_heads, c.head_dim)
        q = rotate(q, *rope) * c.head_dim**-0.5
        q = q.reshape(B, T, c.n_kv_heads, c.n_heads // c.n_kv_heads, c.head_dim).astype(dtype)
        k = jnp.transpose(rotate(k, *rope), (0, 2, 3, 1)).astype(dtype)
        v = jnp.swapaxes(v, 1, 2).astype(dtype)
        written = None
        if past is None:
            inputs = self.q_proj.dtype
            z = _attend_causally(q.astype(inputs), k.astype(inputs), v.astype(inputs), mask)
        elif past.slot is None:
            z = _attend(q, (past.k, past.v, past.mask), (k, v, mask))
        else:
            written = write((past.k, past.v), (k, v), past.slot)
            z = _attend(q, (*written, past.mask))
        return matmul(z, self.o_proj[...]), k, v, written


def cache_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Dtype of cached keys and values for weights of a dtype: the same, but float32 on CPU.

    XLA's CPU backend rewrites a whole 16-bit cache at every step. Tokens that attend to no cache do so in 16 bits there
    as well.
    """
    return jnp.dtype(jnp.float32) if jax.default_backend() == "cpu" else jnp.dtype(dtype)


def write(past: KeysValues, new: KeysValues, filled: jax.Array) -> KeysValues:
    """Cached keys and values with new ones behind the `filled` slots, stacked over layers or not."""
    k = lax.dynamic_update_slice_in_dim(past[0], new[0], filled, axis=-1)
    v = lax.dynamic_update_slice_in_dim(past[1], new[1], filled, axis=-2)
    return k, v


def _attend_causally(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """`_attend` without a cache, in chunks of queries that do not look at the keys behind them.

    Half the scores are never computed, and those of one chunk are all that is held at a time.
    """
    T = q.shape[1]
    size = max(_QUERY_CHUNK, -(-T // _MAX_CHUNKS))
    chunks = []
    for start in range(0, T, size):
        stop = min(start + size, T)
        chunks.append(_attend(q[:, start:stop], (k[..., :stop], v[:, :, :stop], mask[:, start:stop, :stop])))
    return jnp.concatenate(chunks, axis=1) if len(chunks) > 1 else chunks[0]


def _attend(q: jax.Array, *parts: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
    """Softmax attention of queries [B, T, K, G, H] over all parts together.

    A part is its keys [B, K, H, S], values [B, K, S, H], and which of them a query may attend to, [B, T, S].
    Returns [B, T, N * H] float32.

    The queries of a key head's group are rows of one matrix, [B, K, T * G, H].
    """
    B, T, K, G, H = q.shape
    rows = jnp.moveaxis(q, 2, 1).reshape(B, K, T * G, H)
    keys, values, masks = zip(*parts, strict=True)
    scores = [einsum("BKRH,BKHS->BKRS", rows, k) for k in keys]
    masks = [jnp.repeat(mask, G, axis=1)[:, None] for mask in masks]
    scores = [jnp.where(mask, score, -1e30) for mask, score in zip(masks, scores, strict=True)]
    highest = functools.reduce(jnp.maximum, [jnp.max(score, axis=-1, keepdims=True) for score in scores])
    weights = [jnp.exp(score - lax.stop_gradient(highest)) for score in scores]
    sums = [einsum("BKRS,BKSH->BKRH", w.astype(v.dtype), v) for w, v in zip(weights, values, strict=True)]
    totals = [jnp.sum(w, axis=-1, keepdims=True) for w in weights]
    z = functools.reduce(jnp.add, sums) / functools.reduce(jnp.add, totals)
    return jnp.moveaxis(z.reshape(B, K, T, G, H), 1, 2).reshape(B, T, K * G * H)


def may_see(queries: jax.Array, keys: jax.Array) -> jax.Array:
    """[B, T, S]: the key is a token (not padding) and does not come after the query."""
    return (keys[:, None, :] >= 0) & (keys[:, None, :] <= queries[:, :, None])


def rope_frequencies(head_dim: int, theta: float, scaling: Llama3RopeScaling | None) -> np.ndarray:
    """Angle per position of each rotated pair, [H/2] float32, scaled as in Llama 3.1 if `scaling` is given."""
    frequencies = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is not None:
        rotations = scaling.original_context * frequencies / (2 * np.pi)  # turns within the original context
        blend = (rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        kept = np.clip(blend, 0.0, 1.0)
        frequencies = kept * frequencies + (1 - kept) * frequencies / scaling.factor
    return frequencies.astype(np.float32)


def rope_tables(positions: jax.Array, config: LlamaConfig) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [B, T, H/2] float32 of positions [B, T]; bfloat16 could not hold position 257."""
    frequencies = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates [B, T, heads, H]; pairs are (i, i + H/2), as in Hugging Face weights, not Meta's (2i, 2i + 1)."""
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
