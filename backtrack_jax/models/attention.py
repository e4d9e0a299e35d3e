"""Grouped-query attention with rotary positions, and the cache of keys and values. Axes as in `llama`."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from backtrack_jax.models.config import Llama3RopeScaling, ModelConfig
from backtrack_jax.models.products import cpu_barrier, einsum, einsum_16_bit, kept, matmul, random_param

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

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
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
            z = attend_causally(q.astype(inputs), k.astype(inputs), v.astype(inputs), mask)
        elif past.slot is None:
            z = _from_rows(_attend(q, (past.k, past.v, past.mask), (k, v, mask))[0], T)
        else:
            written = write((past.k, past.v), (k, v), past.slot)
            z = _from_rows(_attend(q, (*written, past.mask))[0], T)
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


def attend_causally(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Attention without a cache: queries [B, T, K, G, H], keys [B, K, H, T] and values [B, K, T, H] to [B, T, N * H].

    What a query that sees no key reads (padding) means nothing, nor does a gradient of it.
    """
    if q.dtype.itemsize == 2:
        return _attend_causally_16_bit(q, k, v, mask)
    return _from_rows(_attend_in_chunks(kept(q), kept(k), kept(v), mask)[0], q.shape[1])


def _attend_in_chunks(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`_attend` without a cache, in chunks of queries that do not look at the keys behind them.

    Half the scores are never computed, and those of one chunk are all that is held at a time.
    """
    product = einsum_16_bit if q.dtype.itemsize == 2 else einsum
    z, logs = [], []
    for chunk in _query_chunks(q.shape[1]):
        seen = slice(0, chunk.stop)
        of_chunk = _attend(q[:, chunk], (k[..., seen], v[:, :, seen], mask[:, chunk, seen]), product=product)
        z.append(of_chunk[0])
        logs.append(of_chunk[1])
    return jnp.concatenate(z, axis=2), jnp.concatenate(logs, axis=2)


def _query_chunks(T: int) -> list[slice]:
    """The parts in which T queries are gone through."""
    size = max(_QUERY_CHUNK, -(-T // _MAX_CHUNKS))
    return [slice(start, min(start + size, T)) for start in range(0, T, size)]


def _attend(
    q: jax.Array, *parts: tuple[jax.Array, jax.Array, jax.Array], product: Callable[..., jax.Array] = einsum
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention of queries [B, T, K, G, H] over all parts together.

    A part is its keys [B, K, H, S], values [B, K, S, H], and which of them a query may attend to, [B, T, S].
    Returns [B, K, T * G, H] float32, and logarithms of the sums that weights were divided by, [B, K, T * G] float32.
    """
    G = q.shape[3]
    rows = _as_rows(q)
    keys, values, masks = zip(*parts, strict=True)
    scores = [product("BKRH,BKHS->BKRS", rows, k) for k in keys]
    masks = [jnp.repeat(mask, G, axis=1)[:, None] for mask in masks]
    scores = [jnp.where(mask, score, -1e30) for mask, score in zip(masks, scores, strict=True)]
    highest = functools.reduce(jnp.maximum, [jnp.max(score, axis=-1, keepdims=True) for score in scores])
    highest = lax.stop_gradient(highest)  # the result does not depend on it
    weights = [jnp.exp(score - highest) for score in scores]
    sums = [product("BKRS,BKSH->BKRH", w.astype(v.dtype), v) for w, v in zip(weights, values, strict=True)]
    total = functools.reduce(jnp.add, [jnp.sum(w, axis=-1, keepdims=True) for w in weights])
    return functools.reduce(jnp.add, sums) / total, (highest + jnp.log(total))[..., 0]


def _as_rows(q: jax.Array) -> jax.Array:
    """[B, T, K, G, H] to [B, K, T * G, H]: the queries of a key head's group are rows of one matrix."""
    B, T, K, G, H = q.shape
    return jnp.moveaxis(q, 2, 1).reshape(B, K, T * G, H)


def _from_rows(z: jax.Array, T: int) -> jax.Array:
    """[B, K, T * G, H] to [B, T, N * H]."""
    B, K, R, H = z.shape
    return jnp.moveaxis(z.reshape(B, K, T, R // T, H), 1, 2).reshape(B, T, -1)


@jax.custom_vjp
def _attend_causally_16_bit(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Rounded to 16 bits. Its gradient is made of 16-bit products too, where JAX alone would multiply in float32."""
    return _attend_16_bit_forward(q, k, v, mask)[0]


def _attend_16_bit_forward(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> tuple[jax.Array, Any]:
    z, logs = _attend_in_chunks(q, k, v, mask)
    z, logs = kept(z.astype(q.dtype)), kept(logs)
    saved = kept(_as_rows(q)), kept(jnp.swapaxes(k, 2, 3)), kept(v), mask, z, logs
    return _from_rows(z, q.shape[1]).astype(jnp.float32), saved


def _attend_16_bit_backward(
    saved: tuple[jax.Array, ...], d_z: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    """In chunks of queries as the forward pass; keys that several chunks see sum their gradients."""
    q, k, v, mask, z, logs = saved
    (B, K, R, H), T = q.shape, k.shape[2]
    G = R // T
    d_z = cpu_barrier(_as_rows(d_z.reshape(B, T, K, G, H).astype(q.dtype)))
    # Of the rounded gradient, as the products are: where one key has all the weight, the two must cancel.
    along = jnp.sum(d_z.astype(jnp.float32) * z.astype(jnp.float32), axis=-1)
    d_q, d_k, d_v = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for chunk in _query_chunks(T):
        of, seen = slice(chunk.start * G, chunk.stop * G), slice(0, chunk.stop)
        d_rows, d_keys, d_values = _chunk_gradients(
            q[:, :, of],
            d_z[:, :, of],
            logs[:, :, of],
            along[:, :, of],
            k[:, :, seen],
            v[:, :, seen],
            mask[:, chunk, seen],
        )
        d_q.append(d_rows)
        d_k, d_v = d_k.at[:, :, seen].add(d_keys), d_v.at[:, :, seen].add(d_values)
    d_q = jnp.moveaxis(jnp.concatenate(d_q, axis=2).reshape(B, K, T, G, H), 1, 2)
    return d_q.astype(q.dtype), jnp.swapaxes(d_k, 2, 3).astype(k.dtype), d_v.astype(v.dtype), None


def _chunk_gradients(
    q: jax.Array, d_z: jax.Array, logs: jax.Array, along: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of queries, keys and values, float32, as in FlashAttention (Dao et al. 2022, appendix B.2).

    Scores are computed again, with a row for each key, which is how the products want them.

    Args:
      q: [B, K, R, H], R queries of a group as rows.
      d_z: [B, K, R, H], gradient of what they read.
      logs: [B, K, R], logarithms of the sums that their weights were divided by.
      along: [B, K, R], d_z times what they read, float32.
      k: [B, K, S, H].
      v: [B, K, S, H].
      mask: [B, R / G, S].
    """
    mask = cpu_barrier(jnp.repeat(jnp.swapaxes(mask, 1, 2), q.shape[2] // mask.shape[1], axis=2))[:, None]
    scores = einsum_16_bit("BKSH,BKRH->BKSR", k, q)
    weights = jnp.exp(jnp.where(mask, scores - logs[:, :, None], -jnp.inf)).astype(q.dtype)
    d_weights = einsum_16_bit("BKSH,BKRH->BKSR", v, d_z)
    d_scores = (weights * (d_weights - along[:, :, None])).astype(q.dtype)
    d_q = einsum_16_bit("BKSH,BKSR->BKHR", k, d_scores)
    d_k = einsum_16_bit("BKSR,BKRH->BKSH", d_scores, q)
    d_v = einsum_16_bit("BKSR,BKRH->BKSH", weights, d_z)
    d_q, d_k = cpu_barrier((d_q, d_k))  # the axes of both are exchanged
    return jnp.swapaxes(d_q, 2, 3), d_k, d_v


_attend_causally_16_bit.defvjp(_attend_16_bit_forward, _attend_16_bit_backward)


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


def rope_tables(positions: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [B, T, H/2] float32 of positions [B, T]; bfloat16 could not hold position 257."""
    frequencies = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates [B, T, heads, H]; pairs are (i, i + H/2), as in Hugging Face weights, not Meta's (2i, 2i + 1)."""
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
