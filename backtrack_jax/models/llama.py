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
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.core import Tracer

from backtrack_jax.intervention import Intervention, intervene
from backtrack_jax.models.config import Llama3RopeScaling, LlamaConfig

PAD = -1  # position of a padding token
_QUERY_CHUNK = 128  # queries of a causal chunk, at least; shorter ones make products too small to be fast
_MAX_CHUNKS = 16  # since each adds to the compilation


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


KeysValues = tuple[jax.Array, jax.Array]
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted:
    """A matrix W + A B, in the place of any weight of the blocks: x W + (x A) B, without forming the sum.

    The gradient of A and B then costs a product with their few columns instead of the whole gradient of W.

    Attributes:
      weight: [..., in, out], W; leading axes are layers, as in all three.
      a: [..., in, rank].
      b: [..., rank, out].
    """

    weight: Any
    a: Any
    b: Any

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of W."""
        return self.weight.dtype

    def __getitem__(self, layers: Any) -> "Adapted":
        """The adapted matrices of these layers."""
        return jax.tree.map(lambda leaf: leaf[layers], self)

    def folded(self) -> jax.Array:
        """W + A B in the dtype of W, summed in float32."""
        change = jnp.einsum("...ir,...ro->...io", self.a, self.b, precision=lax.Precision.HIGHEST)
        return (self.weight.astype(jnp.float32) + change).astype(self.weight.dtype)


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
            z = _attend_causally(q, k, v, mask)
        elif past.slot is None:
            z = _attend(q, (past.k, past.v, past.mask), (k, v, mask))
        else:
            written = _write((past.k, past.v), (k, v), past.slot)
            z = _attend(q, (*written, past.mask))
        return matmul(z, self.o_proj[...]), k, v, written


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
        resid_mid = x + attn_out
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
        remat: bool = False,
    ) -> Output:
        """Runs the blocks over `ids`; nothing that is given is changed.

        Args:
          ids: [B, T] int32; any valid id at padding.
          positions: [B, T] int32, place of each token in its sequence, PAD at padding; they rise along a row.
          cache: tokens before these, with at least T slots free; None for none.
          intervention: B rows, with `resolve`d spans, since a row changes nothing before; None for none.
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
          remat: whether a gradient computes every block again from its input, instead of keeping all that was computed
            on the way. Static.

        Returns:
          The residual stream after the last block that ran, the cache and the captures.

        Raises:
          ValueError: if ids and positions are not integers of one shape [B, T], or concrete positions do not rise along
            a row; if an intervention has other shapes than these rows and this model, or a concrete span that is not
            resolved; or if `stop_at_layer` is outside 1..L or cannot be had.
        """
        ids, positions = _checked_tokens(ids, positions)
        if stop_at_layer is not None:
            _check_stop(stop_at_layer, self.config.n_layers, cache, layers)
        if intervention is not None:
            intervention.check_shape(len(ids), self.config.n_layers, self.config.d_model)
            intervention.check_resolved()
        x = _take(self.embed_tokens[...], ids).astype(jnp.float32)
        # Behind the barrier, or XLA's CPU backend would compute sines anew in every block of a decode step.
        rope = lax.optimization_barrier(rope_tables(jnp.maximum(positions, 0), self.config))
        filled = jnp.zeros((), jnp.int32) if cache is None else cache.filled
        of_keys = positions
        mask = _may_see(positions, positions)
        if segments is not None:
            mask &= segments[:, :, None] == segments[:, None, :]
        past_mask, slot = None, None
        if cache is not None:
            of_keys = lax.dynamic_update_slice_in_dim(cache.positions, positions, filled, axis=1)
            # Under a scan a TPU reads a layer's part of the cache where it lies, as long as nothing is written into it;
            # written first, it would be copied. One by one, XLA's CPU backend copies what is written after it is read.
            past_mask = _may_see(positions, cache.positions if layers is None else of_keys)
            slot = None if layers is None else filled

        def body(x, scanned):
            block, layer, cached, values = scanned
            if dtype is not None:
                block = jax.tree.map(lambda weight: weight.astype(dtype) if weight.ndim > 1 else weight, block)

            def edit(resid: jax.Array) -> jax.Array:
                if intervention is None:
                    return resid
                return intervene(resid, dataclasses.replace(intervention, **values), layer, positions)

            past = None if past_mask is None else Past(cached[0], cached[1], past_mask, slot)
            x, out = block(x, rope, mask, past, edit)
            return x, (out.written or (out.k, out.v), capture(out))

        values = None if intervention is None else intervention.per_layer()
        cached = None if cache is None else (cache.k, cache.v)
        others = (jnp.arange(self.config.n_layers), cached, values)
        if stop_at_layer is not None:
            others = jax.tree.map(lambda a: a[:stop_at_layer], others)
        if layers is not None:
            x, (kept, captured) = _loop_blocks(body, x, layers, others, remat)
        else:
            x, (kept, captured) = _scan_blocks(body, x, self.layers, others, remat)
            if cache is not None:
                kept = _write((cache.k, cache.v), kept, filled)
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


def _checked_tokens(ids: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both as arrays; ValueError if they are none that a model can be run on."""
    ids, positions = jnp.asarray(ids), jnp.asarray(positions)
    for name, array in (("ids", ids), ("positions", positions)):
        if array.ndim != 2 or array.shape != ids.shape or not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(
                f"{name} are {array.dtype} of shape {array.shape}, expected integers of shape [rows, tokens], "
                f"as many positions as ids; ids have the shape {ids.shape}"
            )
    if not isinstance(positions, Tracer):
        for row, places in enumerate(np.asarray(positions)):
            if np.any(np.diff(places[places >= 0]) <= 0):
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


def matmul(x: jax.Array, weight: jax.Array | Adapted, spec: str = "...d,df->...f") -> jax.Array:
    """Product in the weight's dtype with float32 accumulation and result.

    float32 inputs are multiplied in full float32: accelerators would otherwise round them to TF32 or bfloat16.
    Gradients of a 16-bit product are 16-bit products too, likewise accumulated in float32.
    """
    if isinstance(weight, Adapted):
        return matmul(x, weight.weight, spec) + matmul(matmul(x, weight.a, spec), weight.b, spec)
    if weight.dtype.itemsize == 2:
        return _matmul_16_bit(spec, x, weight)
    return _einsum(spec, x.astype(weight.dtype), weight)


def _product_16_bit(spec: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    return _einsum(spec, x.astype(weight.dtype), weight)


def _matmul_16_bit_forward(spec: str, x: jax.Array, weight: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _product_16_bit(spec, x, weight), (x.astype(weight.dtype), weight)


def _matmul_16_bit_backward(
    spec: str, kept: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Left to itself, JAX would multiply the float32 gradient by the 16-bit factor, in float32."""
    x, weight = kept
    inputs, result = spec.split("->")
    of_x, of_weight = inputs.split(",")
    d_x = _einsum(f"{result},{of_weight}->{of_x}", gradient.astype(weight.dtype), weight)
    # Summed over all tokens; XLA's CPU backend is no faster at such products in 16 bits than in 32.
    dtype = jnp.float32 if jax.default_backend() == "cpu" else weight.dtype
    rows, gradients = (a.reshape(-1, a.shape[-1]).astype(dtype) for a in (x, gradient))
    flat = [part.replace("...", "n") for part in (of_x, result, of_weight)]
    d_weight = _einsum(f"{flat[0]},{flat[1]}->{flat[2]}", rows, gradients)
    return d_x, d_weight.astype(weight.dtype)


_matmul_16_bit = jax.custom_vjp(_product_16_bit, nondiff_argnums=(0,))
_matmul_16_bit.defvjp(_matmul_16_bit_forward, _matmul_16_bit_backward)


def cache_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Dtype of cached keys and values for weights of a dtype: the same, but float32 on CPU.

    XLA's CPU backend has no batched products of 16-bit floats and rewrites a whole 16-bit cache at every step.
    """
    return jnp.dtype(jnp.float32) if jax.default_backend() == "cpu" else jnp.dtype(dtype)


def _scan_blocks(
    body: Callable, x: jax.Array, blocks: Block, others: tuple[Any, ...], remat: bool
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
            stacked, layer = lax.optimization_barrier((blocks, others[0]))
            return body(x, (_block_at(stacked, layer), *others))

        scanned = others
    if remat:
        step = jax.checkpoint(step, prevent_cse=False)  # a scan keeps the two computations apart
    return lax.scan(step, x, scanned)


def _loop_blocks(
    body: Callable, x: jax.Array, blocks: tuple[Block, ...], others: tuple[Any, ...], remat: bool
) -> tuple[Any, Any]:
    """What `_scan_blocks` does, one block after the other; keys and values come back as one array per layer."""
    step = jax.checkpoint(body) if remat else body
    numbers, cached, values = others
    outs = []
    for layer, block in enumerate(blocks):
        kept = None if cached is None else (cached[0][layer], cached[1][layer])
        edits = None if values is None else {name: value[layer] for name, value in values.items()}
        x, out = step(x, (block, numbers[layer], kept, edits))
        outs.append(out)
    kept, captured = zip(*outs, strict=True)
    return x, (tuple(zip(*kept, strict=True)), jax.tree.map(lambda *leaves: jnp.stack(leaves), *captured))


def _block_at(blocks: Block, layer: jax.Array | int) -> Block:
    """One layer's block out of the stacked ones."""
    return jax.tree.map(lambda leaf: _take(leaf, layer), blocks)


def _take(table: jax.Array, index: jax.Array | int) -> jax.Array:
    """table[index]; on CPU, 16-bit floats are looked up as integers, since XLA would widen the whole table first."""
    if jax.default_backend() != "cpu" or table.dtype.itemsize != 2:
        return table[index]
    return lax.bitcast_convert_type(lax.bitcast_convert_type(table, jnp.uint16)[index], table.dtype)


def _einsum(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=jnp.float32)


def _write(past: KeysValues, new: KeysValues, filled: jax.Array) -> KeysValues:
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
    scores = [_einsum("BKRH,BKHS->BKRS", rows, k) for k in keys]
    masks = [jnp.repeat(mask, G, axis=1)[:, None] for mask in masks]
    scores = [jnp.where(mask, score, -1e30) for mask, score in zip(masks, scores, strict=True)]
    highest = functools.reduce(jnp.maximum, [jnp.max(score, axis=-1, keepdims=True) for score in scores])
    weights = [jnp.exp(score - lax.stop_gradient(highest)) for score in scores]
    sums = [_einsum("BKRS,BKSH->BKRH", w.astype(v.dtype), v) for w, v in zip(weights, values, strict=True)]
    totals = [jnp.sum(w, axis=-1, keepdims=True) for w in weights]
    z = functools.reduce(jnp.add, sums) / functools.reduce(jnp.add, totals)
    return jnp.moveaxis(z.reshape(B, K, T, G, H), 1, 2).reshape(B, T, K * G * H)


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
