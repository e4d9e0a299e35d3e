"""Llama in Flax NNX, used as a stateless tree of parameters: no call changes the model.

Axes: B batch, T query positions, S cache slots, L layers, N query heads, K key/value heads, G = N / K query heads a
key/value head serves, H head dimension, D width of the residual stream, F width of the MLP, V vocabulary.

Everything that depends on where a token stands comes from one array, `positions` [B, T]: the token's place in its own
sequence, BOS = 0, or PAD = -1. Rotary angles, the causal mask and the span of an intervention are all derived from it,
so they cannot disagree, and padding may stand on either side:

    ids        . . B h i           B h i . .
    positions -1-1 0 1 2           0 1 2-1-1
    "hi" may attend to: keys with 0 <= position <= its own
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from backtrack_jax.intervention import Intervention, intervene
from backtrack_jax.models.config import Llama3RopeScaling, LlamaConfig

PAD = -1  # position of a padding token


class BlockOutput(NamedTuple):
    """Everything a block computes that an analysis may want; what nobody keeps, XLA removes.

    Attributes:
      resid_pre: [B, T, D] float32, the residual stream that enters the block.
      attn_out: [B, T, D] float32, what attention adds.
      resid_mid: [B, T, D] float32, resid_pre + attn_out.
      mlp_out: [B, T, D] float32, what the MLP adds.
      resid_post: [B, T, D] float32, resid_mid + mlp_out, after the intervention: "layer l" of this package.
      k: [B, K, T, H], rotated keys of these tokens, in the cache's dtype.
      v: [B, K, T, H], values of these tokens, in the cache's dtype.
    """

    resid_pre: jax.Array
    attn_out: jax.Array
    resid_mid: jax.Array
    mlp_out: jax.Array
    resid_post: jax.Array
    k: jax.Array
    v: jax.Array


Capture = Callable[[BlockOutput], Any]


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
      k: [L, B, K, S, H] keys, rotated; S beside H, so that a step reads each head's keys where they lie.
      v: [L, B, K, S, H] values.
      positions: [B, S] int32, PAD where a slot is empty or holds padding.
      filled: int32, number of slots in use.
    """

    k: jax.Array
    v: jax.Array
    positions: jax.Array
    filled: jax.Array

    @classmethod
    def empty(cls, config: LlamaConfig, batch: int, slots: int, dtype: jnp.dtype) -> "KVCache":
        """A cache of `slots` empty slots for `batch` rows."""
        shape = (config.n_layers, batch, config.n_kv_heads, slots, config.head_dim)
        positions = jnp.full((batch, slots), PAD, jnp.int32)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), positions, jnp.zeros((), jnp.int32))

    def append(self, k: jax.Array, v: jax.Array, positions: jax.Array) -> "KVCache":
        """Writes T new tokens ([L, B, K, T, H] keys and values, [B, T] positions) behind those in use."""
        start = (0, 0, 0, self.filled, 0)
        return KVCache(
            lax.dynamic_update_slice(self.k, k, start),
            lax.dynamic_update_slice(self.v, v, start),
            lax.dynamic_update_slice(self.positions, positions, (0, self.filled)),
            self.filled + positions.shape[1],
        )


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


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: LlamaConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        """Starts from random weights; `checkpoint` replaces them."""
        D, N, K, H = config.d_model, config.n_heads, config.n_kv_heads, config.head_dim
        self.q_proj = _random_param(rngs, (D, N * H), dtype)
        self.k_proj = _random_param(rngs, (D, K * H), dtype)
        self.v_proj = _random_param(rngs, (D, K * H), dtype)
        self.o_proj = _random_param(rngs, (N * H, D), dtype)
        self.config = config

    def __call__(
        self, x: jax.Array, rope: tuple[jax.Array, jax.Array], seen: "Seen", past: tuple[jax.Array, jax.Array] | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Attends from x to the cached tokens and to x itself.

        Args:
          x: [B, T, D] normalised residual stream.
          rope: cosines and sines, [B, T, H/2] float32.
          seen: masks over cached and new keys.
          past: this layer's cached keys and values [B, K, S, H], or None.

        Returns:
          Output [B, T, D] float32, and the new keys and values [B, K, T, H].
        """
        c = self.config
        B, T, _ = x.shape
        dtype = cache_dtype(self.q_proj.dtype)
        q = matmul(x, self.q_proj[...]).reshape(B, T, c.n_heads, c.head_dim)
        k = matmul(x, self.k_proj[...]).reshape(B, T, c.n_kv_heads, c.head_dim)
        v = matmul(x, self.v_proj[...]).reshape(B, T, c.n_kv_heads, c.head_dim)
        q = (rotate(q, *rope) * c.head_dim**-0.5).astype(dtype)
        q = q.reshape(B, T, c.n_kv_heads, c.n_heads // c.n_kv_heads, c.head_dim)
        k, v = (jnp.swapaxes(a, 1, 2).astype(dtype) for a in (rotate(k, *rope), v))
        keys, values, masks = [k], [v], [seen.new]
        if past is not None:
            keys, values, masks = [past[0], k], [past[1], v], [seen.past, seen.new]
        z = _attend(q, keys, values, masks)
        return matmul(z.reshape(B, T, c.n_heads * c.head_dim), self.o_proj[...]), k, v


class MLP(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        """Starts from random weights; `checkpoint` replaces them."""
        self.gate_proj = _random_param(rngs, (config.d_model, config.d_mlp), dtype)
        self.up_proj = _random_param(rngs, (config.d_model, config.d_mlp), dtype)
        self.down_proj = _random_param(rngs, (config.d_mlp, config.d_model), dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, D] to [B, T, D] float32."""
        gated = jax.nn.silu(matmul(x, self.gate_proj[...])) * matmul(x, self.up_proj[...])
        return matmul(gated, self.down_proj[...])


class Block(nnx.Module):
    """One transformer block; submodules are named as in Hugging Face's Llama."""

    def __init__(self, config: LlamaConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        """Starts from random weights; `checkpoint` replaces them."""
        self.input_layernorm = RMSNorm(config.d_model, config.norm_eps, dtype)
        self.self_attn = Attention(config, dtype, rngs)
        self.post_attention_layernorm = RMSNorm(config.d_model, config.norm_eps, dtype)
        self.mlp = MLP(config, dtype, rngs)

    def __call__(
        self,
        x: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        seen: "Seen",
        past: tuple[jax.Array, jax.Array] | None,
        edit: Callable[[jax.Array], jax.Array],
    ) -> tuple[jax.Array, BlockOutput]:
        """Runs the block and returns the residual stream after it with everything computed on the way.

        Args:
          x: [B, T, D] float32 residual stream.
          rope: cosines and sines, [B, T, H/2].
          seen: masks over cached and new keys.
          past: this layer's cached keys and values, or None.
          edit: the intervention at this layer, [B, T, D] to [B, T, D].
        """
        with jax.named_scope("attention"):
            attn_out, k, v = self.self_attn(self.input_layernorm(x), rope, seen, past)
        resid_mid = x + attn_out
        with jax.named_scope("mlp"):
            mlp_out = self.mlp(self.post_attention_layernorm(resid_mid))
        resid_post = edit(resid_mid + mlp_out)
        return resid_post, BlockOutput(x, attn_out, resid_mid, mlp_out, resid_post, k, v)


class Seen(NamedTuple):
    """Which keys a query may attend to: `past` [B, T, S] over the cache (or None), `new` [B, T, T] over the input."""

    past: jax.Array | None
    new: jax.Array


class Output(NamedTuple):
    """What a forward pass returns.

    Attributes:
      resid: [B, T, D] float32, the residual stream after the last block, before the final norm.
      k: [L, B, K, T, H] keys of the input tokens, for `KVCache.append`.
      v: [L, B, K, T, H] values of the input tokens.
      captured: what `capture` returned in each block, with a leading axis L.
    """

    resid: jax.Array
    k: jax.Array
    v: jax.Array
    captured: Any


class Llama(nnx.Module):
    """Embedding, L stacked blocks, final norm, unembedding. Weights are [in, out]; a block's lead with an axis L."""

    def __init__(self, config: LlamaConfig, dtype: jnp.dtype = jnp.float32, *, rngs: nnx.Rngs):
        """Builds the model with random weights of the given dtype (`checkpoint.load` fills in trained ones).

        Args:
          config: architecture.
          dtype: of weights and of matrix-product inputs. Products accumulate in float32; residual stream, norms,
            softmax and logits are float32 whatever it is.
          rngs: source of the random weights.
        """
        self.config = config
        self.embed_tokens = _random_param(rngs, (config.vocab_size, config.d_model), dtype)
        self.layers = nnx.vmap(lambda layer_rngs: Block(config, dtype, layer_rngs))(rngs.split(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps, dtype)
        self.lm_head = None if config.tied else _random_param(rngs, (config.vocab_size, config.d_model), dtype)

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the weights."""
        return self.embed_tokens.dtype

    def __call__(
        self,
        ids: jax.Array,
        positions: jax.Array,
        *,
        cache: KVCache | None = None,
        intervention: Intervention | None = None,
        capture: Capture = lambda out: None,
    ) -> Output:
        """Runs the blocks over `ids`, reading (not writing) the cache.

        Args:
          ids: [B, T] int32; any valid id at padding.
          positions: [B, T] int32, place of each token in its sequence, PAD at padding.
          cache: tokens before these; None for none.
          intervention: B rows, with `resolve`d spans; None for none.
          capture: static function of a block's output; its results are stacked over layers. Reduce inside it:
            [L, B, T, D] of a large model does not fit.

        Returns:
          The final residual stream, new keys and values, and captures.
        """
        x = _take(self.embed_tokens[...], ids).astype(jnp.float32)
        rope = rope_tables(jnp.maximum(positions, 0), self.config)
        seen = Seen(None if cache is None else _may_see(positions, cache.positions), _may_see(positions, positions))

        def body(x, scanned):
            block, layer, past, values = scanned

            def edit(resid: jax.Array) -> jax.Array:
                if intervention is None:
                    return resid
                return intervene(resid, dataclasses.replace(intervention, **values), layer, positions)

            x, out = block(x, rope, seen, past, edit)
            return x, (out.k, out.v, capture(out))

        values = None if intervention is None else intervention.per_layer()
        past = None if cache is None else (cache.k, cache.v)
        layers = jnp.arange(self.config.n_layers)
        x, (k, v, captured) = _scan_blocks(body, x, self.layers, (layers, past, values))
        return Output(x, k, v, captured)

    def logits(self, resid: jax.Array) -> jax.Array:
        """Final norm and unembedding: [..., D] to [..., V] float32."""
        unembedding = self.embed_tokens if self.lm_head is None else self.lm_head
        return matmul(self.norm(resid), unembedding[...], spec="...d,vd->...v")


def matmul(x: jax.Array, weight: jax.Array, spec: str = "...d,df->...f") -> jax.Array:
    """Product in the weight's dtype with float32 accumulation and result.

    float32 inputs are multiplied in full float32: accelerators would otherwise round them to TF32 or bfloat16.
    """
    return _einsum(spec, x.astype(weight.dtype), weight)


def cache_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Dtype of cached keys and values for weights of a dtype: the same, but float32 on CPU.

    XLA's CPU backend has no batched products of 16-bit floats and rewrites a whole 16-bit cache at every step.
    """
    return jnp.dtype(jnp.float32) if jax.default_backend() == "cpu" else jnp.dtype(dtype)


def _scan_blocks(body: Callable, x: jax.Array, blocks: Block, others: tuple[Any, ...]) -> tuple[jax.Array, Any]:
    """`lax.scan` of body(x, (block, *others)) over the stacked blocks and what is scanned beside them.

    Left to itself, XLA's CPU backend widens all 16-bit weights to float32 before the loop, 32 GB for an 8B model. There
    the weights of one layer are taken out in the loop's body, and the barrier keeps that where it is.
    """
    if jax.default_backend() != "cpu" or blocks.self_attn.q_proj.dtype.itemsize != 2:
        return lax.scan(body, x, (blocks, *others))

    def body_on_cpu(x, scanned):
        stacked, layer = lax.optimization_barrier((blocks, scanned[0]))
        return body(x, (jax.tree.map(lambda leaf: _take(leaf, layer), stacked), *scanned))

    return lax.scan(body_on_cpu, x, others)


def _take(table: jax.Array, index: jax.Array) -> jax.Array:
    """table[index]; on CPU, 16-bit floats are looked up as integers, since XLA would widen the whole table first."""
    if jax.default_backend() != "cpu" or table.dtype.itemsize != 2:
        return table[index]
    return lax.bitcast_convert_type(lax.bitcast_convert_type(table, jnp.uint16)[index], table.dtype)


def _einsum(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=jnp.float32)


def _attend(q: jax.Array, keys: Sequence[jax.Array], values: Sequence[jax.Array], masks: Sequence[Any]) -> jax.Array:
    """Softmax attention of q [B, T, K, G, H] over several groups of keys and values [B, K, S, H], as if concatenated.

    The cached group is read where it lies: joining it with the new keys would copy the cache at every step.
    """
    scores = [
        jnp.where(mask[:, None, None], _einsum("BTKGH,BKSH->BKGTS", q, k), -1e30)
        for k, mask in zip(keys, masks, strict=True)
    ]
    highest = jnp.max(jnp.stack([jnp.max(s, axis=-1) for s in scores]), axis=0)[..., None]
    weights = [jnp.exp(s - highest) for s in scores]
    total = sum(jnp.sum(w, axis=-1) for w in weights)
    z = sum(_einsum("BKGTS,BKSH->BTKGH", w.astype(v.dtype), v) for w, v in zip(weights, values, strict=True))
    return z / jnp.moveaxis(total, 3, 1)[..., None]


def _may_see(queries: jax.Array, keys: jax.Array) -> jax.Array:
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


def _random_param(rngs: nnx.Rngs, shape: tuple[int, ...], dtype: jnp.dtype) -> nnx.Param:
    return nnx.Param((0.02 * jax.random.normal(rngs.params(), shape, jnp.float32)).astype(dtype))
