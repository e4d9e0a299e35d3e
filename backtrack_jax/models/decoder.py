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

import functools
from collections.abc import Callable
from enum import StrEnum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.core import Tracer

from backtrack_jax.intervention import Intervention
from backtrack_jax.models.attention import PAD, Attention, KeysValues, KVCache, Past, may_see, rope_tables, write
from backtrack_jax.models.config import ModelConfig
from backtrack_jax.models.products import KEPT, cpu_barrier, kept, matmul, random_param, take


class Recompute(StrEnum):
    """What a gradient computes again, instead of keeping it from the forward pass.

    `nothing`: all is kept, but for attention's weights and the activations of 16-bit models, which are always
      computed again.
    `cheap`: norms, activations and attention's weights. Kept are the residual stream, what attention reads, and what
      the products with weight matrices gave, in the dtype of their inputs, queries and keys rotated.
    `blocks`: everything but the residual stream between the blocks.
    """

    NOTHING = "nothing"
    CHEAP = "cheap"
    BLOCKS = "blocks"


class BlockOutput(NamedTuple):
    """Everything a block computes that an analysis may want; what nobody keeps, XLA removes.

    Attributes:
      resid_pre: [B, T, D] float32, the residual stream that enters the block.
      attn_out: [B, T, D] float32, what attention adds.
      resid_mid: [B, T, D] float32, resid_pre + attn_out.
      mlp_out: [B, T, D] float32, what the MLP adds.
      resid_post: [B, T, D] float32, resid_mid + mlp_out, after the intervention: "layer l" of this package.
      k: [B, K, H, T], rotated keys of these tokens, in the cache's dtype.
      v: [B, K, T, H], values of these tokens, in the cache's dtype.
      written: the cached keys [B, K, H, S] and values [B, K, S, H] with these written in; None if they were not.
    """

    resid_pre: jax.Array
    attn_out: jax.Array
    resid_mid: jax.Array
    mlp_out: jax.Array
    resid_post: jax.Array
    k: jax.Array
    v: jax.Array
    written: "KeysValues | None"


Capture = Callable[[BlockOutput], Any]


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
        self.gate_proj = random_param(rngs, (config.d_model, config.d_mlp), dtype)
        self.up_proj = random_param(rngs, (config.d_model, config.d_mlp), dtype)
        self.down_proj = random_param(rngs, (config.d_mlp, config.d_model), dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, D] to [B, T, D] float32."""
        gate, up = matmul(x, self.gate_proj[...]), matmul(x, self.up_proj[...])
        dtype = self.down_proj.dtype
        gated: Any = _gated_16_bit(dtype, gate, up) if dtype.itemsize == 2 else _gated(kept(gate), kept(up))
        return matmul(gated, self.down_proj[...])


def _gated(gate: jax.Array, up: jax.Array) -> jax.Array:
    return jax.nn.silu(gate) * up


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gated_16_bit(dtype: jnp.dtype, gate: jax.Array, up: jax.Array) -> jax.Array:
    """`_gated`, rounded to the dtype of the weights behind it; a gradient keeps 16 bits of what comes in and out."""
    return _gated(gate, up).astype(dtype).astype(jnp.float32)


def _gated_16_bit_forward(dtype: jnp.dtype, gate: jax.Array, up: jax.Array) -> tuple[jax.Array, Any]:
    gated = kept(_gated(gate, up).astype(dtype)).astype(jnp.float32)
    return gated, (kept(gate.astype(dtype)), kept(up.astype(dtype)))


def _gated_16_bit_backward(dtype: jnp.dtype, saved: Any, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    gate, up = (factor.astype(jnp.float32) for factor in saved)
    return jax.vjp(_gated, gate, up)[1](gradient)


_gated_16_bit.defvjp(_gated_16_bit_forward, _gated_16_bit_backward)


class Block(nnx.Module):
    """One transformer block; submodules are named as in Hugging Face's Llama."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        """Starts from random weights; `checkpoint` replaces them."""
        self.input_layernorm = RMSNorm(config.d_model, config.norm_eps, dtype)
        self.self_attn = Attention(config, dtype, rngs)
        self.post_attention_layernorm = RMSNorm(config.d_model, config.norm_eps, dtype)
        self.mlp = MLP(config, dtype, rngs)

    def __call__(
        self,
        x: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        mask: jax.Array,
        past: Past | None,
        edit: Callable[[jax.Array], jax.Array],
    ) -> tuple[jax.Array, BlockOutput]:
        """Runs the block and returns the residual stream after it with everything computed on the way.

        Args:
          x: [B, T, D] float32 residual stream.
          rope: cosines and sines, [B, T, H/2].
          mask: [B, T, T], see `Attention`.
          past: this layer's cached keys and values, or None.
          edit: the intervention at this layer, [B, T, D] to [B, T, D].
        """
        with jax.named_scope("attention"):
            attn_out, k, v, written = self.self_attn(self.input_layernorm(x), rope, mask, past)
        resid_mid = kept(x + attn_out)
        with jax.named_scope("mlp"):
            mlp_out = self.mlp(self.post_attention_layernorm(resid_mid))
        resid_post = edit(resid_mid + mlp_out)
        return resid_post, BlockOutput(x, attn_out, resid_mid, mlp_out, resid_post, k, v, written)


class Output(NamedTuple):
    """What a forward pass returns.

    Attributes:
      resid: [B, T, D] float32, the residual stream after the last block that ran, before the final norm.
      cache: the given cache with the input tokens written in; without one, a cache that is full of the input tokens.
      captured: what `capture` returned in each block, with a leading axis L.
    """

    resid: jax.Array
    cache: KVCache
    captured: Any


class Decoder(nnx.Module):
    """Embedding, L stacked blocks, final norm, unembedding. Weights are [in, out]; a block's lead with an axis L."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype = jnp.float32, *, rngs: nnx.Rngs):
        """Builds the model with random weights of the given dtype (`checkpoint.load` fills in trained ones).

        Args:
          config: architecture.
          dtype: of weights and of matrix-product inputs. Products accumulate in float32; residual stream, norms,
            softmax and logits are float32 whatever it is.
          rngs: source of the random weights.
        """
        self.config = config
        self.embed_tokens = random_param(rngs, (config.vocab_size, config.d_model), dtype)
        self.layers = nnx.vmap(lambda layer_rngs: Block(config, dtype, layer_rngs))(rngs.split(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps, dtype)
        self.lm_head = None if config.tied else random_param(rngs, (config.vocab_size, config.d_model), dtype)

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the weights."""
        return self.embed_tokens.dtype

    @property
    def unembedding(self) -> jax.Array:
        """W_U, [V, D]."""
        return (self.embed_tokens if self.lm_head is None else self.lm_head)[...]

    def __call__(
        self,
        ids: jax.Array,
        positions: jax.Array,
        *,
        cache: KVCache | None = None,
        intervention: Intervention | None = None,
        capture: Capture = lambda out: None,
        layers: tuple[Block, ...] | None = None,
        stop_at_layer: int | None = None,
        segments: jax.Array | None = None,
        dtype: jnp.dtype | None = None,
        recompute: Recompute = Recompute.NOTHING,
    ) -> Output:
        """Runs the blocks over `ids`; nothing that is given is changed.

        Args:
          ids: [B, T] int32; any valid id at padding.
          positions: [B, T] int32, place of each token in its sequence, PAD at padding; they rise along a sequence.
          cache: tokens before these, with at least T slots free; None for none.
          intervention: B rows, spans `resolve`d: others are refused, or where traced give NaN; None for none.
          capture: static function of a block's output; its results are stacked over layers. Reduce inside it:
            [L, B, T, D] of a large model does not fit.
          layers: the blocks as `unstacked_layers` gives them, to run them one by one instead of under a scan; the
            cache is then an `unstacked` one.
          stop_at_layer: run only the blocks before this one, 1..L, for who needs no later activation; None for all.
            Without a cache and `layers` only. Static.
          segments: [B, T] int32, which of several packed sequences a token belongs to; it sees no other. Without a
            cache only. None where a row holds one sequence.
          dtype: of matrix-product inputs, where it is not that of the weights: training keeps float32 weights and may
            multiply in bfloat16. Static.
          recompute: what a gradient computes again. Static.

        Returns:
          The residual stream after the last block that ran, the cache and the captures.

        Raises:
          ValueError: if ids and positions are not integers of one shape [B, T], or concrete positions do not rise along
            a sequence; if an intervention has other shapes than these rows and this model, or a concrete span that is
            not resolved; if `stop_at_layer` is outside 1..L or cannot be had; or if `recompute` is no `Recompute`.
        """
        ids, positions = _checked_tokens(ids, positions, segments)
        if stop_at_layer is not None:
            _check_stop(stop_at_layer, self.config.n_layers, cache, layers)
        if intervention is not None:
            intervention.check(len(ids), self.config.n_layers, self.config.d_model)
        x = take(self.embed_tokens[...], ids).astype(jnp.float32)
        if intervention is not None:  # a traced span cannot be refused, and must not be left out without a word
            x = jnp.where(intervention.unresolved()[:, None, None], jnp.nan, x)
        # Behind the barrier, or XLA's CPU backend would compute sines anew in every block of a decode step.
        rope = lax.optimization_barrier(rope_tables(jnp.maximum(positions, 0), self.config))
        filled = jnp.zeros((), jnp.int32) if cache is None else cache.filled
        of_keys = positions
        mask = may_see(positions, positions)
        if segments is not None:
            mask &= segments[:, :, None] == segments[:, None, :]
        past_mask, slot = None, None
        if cache is not None:
            of_keys = lax.dynamic_update_slice_in_dim(cache.positions, positions, filled, axis=1)
            # Under a scan a TPU reads a layer's part of the cache where it lies, as long as nothing is written into it;
            # written first, it would be copied. One by one, XLA's CPU backend copies what is written after it is read.
            past_mask = may_see(positions, cache.positions if layers is None else of_keys)
            slot = None if layers is None else filled

        def body(x, scanned):
            block, layer, cached, values = scanned
            if dtype is not None:
                block = jax.tree.map(lambda weight: weight.astype(dtype) if weight.ndim > 1 else weight, block)

            def edit(resid: jax.Array) -> jax.Array:
                if intervention is None:
                    return resid
                return intervention.apply(resid, values, layer, positions)

            past = None if past_mask is None else Past(cached[0], cached[1], past_mask, slot)
            x, out = block(x, rope, mask, past, edit)
            return x, (out.written or (out.k, out.v), capture(out))

        values = None if intervention is None else intervention.at_layers()
        cached = None if cache is None else (cache.k, cache.v)
        others = (jnp.arange(self.config.n_layers), cached, values)
        if stop_at_layer is not None:
            others = jax.tree.map(lambda a: a[:stop_at_layer], others)
        if layers is not None:
            x, (kept, captured) = _loop_blocks(body, x, layers, others, recompute)
        else:
            x, (kept, captured) = _scan_blocks(body, x, self.layers, others, recompute)
            if cache is not None:
                kept = write((cache.k, cache.v), kept, filled)
        k, v = kept
        return Output(x, KVCache(k, v, of_keys, filled + ids.shape[1]), captured)

    def unstacked_layers(self) -> tuple[Block, ...]:
        """The blocks one by one, for a decode loop.

        Under a scan every step copies every layer's weights out of their stacks, but on a TPU. One by one they are
        taken out once, before the loop, at the price of a second copy of the weights and of a longer compilation.
        """
        return tuple(_block_at(self.layers, layer) for layer in range(self.config.n_layers))

    def logits(self, resid: jax.Array) -> jax.Array:
        """Final norm and unembedding: [..., D] to [..., V] float32."""
        return self.unembed(self.norm(resid))

    def unembed(self, x: jax.Array) -> jax.Array:
        """W_U x, without the final norm: [..., D] to [..., V] float32."""
        return unembed(x, self.unembedding)


def unembed(x: jax.Array, unembedding: jax.Array) -> jax.Array:
    """W_U x of [..., D] and W_U [V, D]: [..., V] float32."""
    return matmul(x, unembedding, spec="...d,vd->...v")


def _checked_tokens(ids: jax.Array, positions: jax.Array, segments: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Both as arrays; ValueError if they are none that a model can be run on."""
    ids, positions = jnp.asarray(ids), jnp.asarray(positions)
    for name, array in (("ids", ids), ("positions", positions)):
        if array.ndim != 2 or array.shape != ids.shape or not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(
                f"{name} are {array.dtype} of shape {array.shape}, expected integers of shape [rows, tokens], "
                f"as many positions as ids; ids have the shape {ids.shape}"
            )
    if not isinstance(positions, Tracer) and not isinstance(segments, Tracer):
        parts = np.zeros(positions.shape) if segments is None else np.asarray(segments)
        for row, (places, part) in enumerate(zip(np.asarray(positions), parts, strict=True)):
            real = places >= 0
            if np.any((np.diff(places[real]) <= 0) & (np.diff(part[real]) == 0)):
                raise ValueError(
                    f"positions of row {row} are {places[:8].tolist()}..., expected places 0, 1, 2, ... and {PAD} at "
                    "padding, as `left_pad` and `right_pad` give them; an attention mask is something else"
                )
    return ids, positions


def _check_stop(stop_at_layer: int, n_layers: int, cache: KVCache | None, layers: tuple[Block, ...] | None) -> None:
    """ValueError if a pass cannot end before block `stop_at_layer`."""
    if not 1 <= stop_at_layer <= n_layers:
        raise ValueError(f"stop_at_layer={stop_at_layer} is outside 1..{n_layers}")
    if cache is not None or layers is not None:
        given = " and ".join(name for name, value in (("cache", cache), ("layers", layers)) if value is not None)
        raise ValueError(f"stop_at_layer={stop_at_layer} was given with {given}; expected it without both")


def _scan_blocks(
    body: Callable, x: jax.Array, blocks: Block, others: tuple[Any, ...], recompute: Recompute
) -> tuple[jax.Array, Any]:
    """`lax.scan` of body(x, (block, *others)) over the stacked blocks and what is scanned beside them.

    Left to itself, XLA's CPU backend widens all 16-bit weights to float32 before the loop, 32 GB for an 8B model. There
    the weights of one layer are taken out in the loop's body, and the barrier keeps that where it is. A gradient takes
    them out again; else it would keep a second copy of them all. The same where the scan ends before the last block,
    since a part of the stack would be a copy.
    """
    step, scanned = body, (blocks, *others)
    widened = jax.default_backend() == "cpu" and blocks.self_attn.q_proj.dtype.itemsize == 2
    if widened or len(others[0]) < len(blocks.input_layernorm.weight[...]):

        def step(x, others):
            stacked, layer = cpu_barrier((blocks, others[0]))
            return body(x, (_block_at(stacked, layer), *others))

        scanned = others
    # A scan keeps the two computations apart.
    return lax.scan(_recomputing(step, recompute, prevent_cse=False), x, scanned)


def _recomputing(step: Callable, recompute: Recompute, prevent_cse: bool = True) -> Callable:
    """The same function, whose gradient keeps no more than it is told to; ValueError for what is no `Recompute`."""
    if recompute not in list(Recompute):
        raise ValueError(f"recompute={recompute!r}, expected one of {', '.join(Recompute)}")
    if recompute == Recompute.NOTHING:
        return step
    policy = jax.checkpoint_policies.save_only_these_names(KEPT) if recompute == Recompute.CHEAP else None
    return jax.checkpoint(step, policy=policy, prevent_cse=prevent_cse)


def _loop_blocks(
    body: Callable, x: jax.Array, blocks: tuple[Block, ...], others: tuple[Any, ...], recompute: Recompute
) -> tuple[Any, Any]:
    """What `_scan_blocks` does, one block after the other; keys and values come back as one array per layer."""
    step = _recomputing(body, recompute)
    numbers, cached, values = others
    outs = []
    for layer, block in enumerate(blocks):
        kept = None if cached is None else (cached[0][layer], cached[1][layer])
        edits = jax.tree.map(lambda value, layer=layer: value[layer], values)
        x, out = step(x, (block, numbers[layer], kept, edits))
        outs.append(out)
    kept, captured = zip(*outs, strict=True)
    return x, (tuple(zip(*kept, strict=True)), jax.tree.map(lambda *leaves: jnp.stack(leaves), *captured))


def _block_at(blocks: Block, layer: jax.Array | int) -> Block:
    """One layer's block out of the stacked ones."""
    return jax.tree.map(lambda leaf: take(leaf, layer), blocks)
