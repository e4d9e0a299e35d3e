"""The model in Flax NNX, used as a stateless tree of parameters: no call changes it.

Axes: B batch, T query positions, S cache slots, L layers, N query heads, K key/value heads, G = N / K query heads a
key/value head serves, H head dimension, D width of the residual stream, F width of the MLP, V vocabulary. A module and
its weights are named as in Hugging Face's Llama.

Everything that depends on where a token stands comes from one array, `positions` [B, T]: the token's place in its own
sequence, BOS = 0, or PAD = -1. Rotary angles, the causal mask and the span of an edit are all derived from it, so they
cannot disagree, and padding may stand on either side. A 0 begins a sequence, so several may stand in one row:

    ids        . . B h i           B h i . .           B h i B y o u
    positions -1-1 0 1 2           0 1 2-1-1           0 1 2 0 1 2 3
    "hi" may attend to: keys of its own sequence with 0 <= position <= its own
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer

from backtrack_jax.models import ops
from backtrack_jax.models.attention import (
    PAD,
    Attention,
    KeysValues,
    KVCache,
    LayerCache,
    causal_mask,
    packed_mask,
    rope_tables,
    write,
)
from backtrack_jax.models.config import LayerKind, ModelConfig
from backtrack_jax.models.layers import MLP, Embedding, RMSNorm


class Edit(Protocol):
    """What is done to the residual stream after every block: a pytree of values for B rows."""

    def check(self, n_rows: int, n_layers: int, d_model: int) -> None:
        """Raises ValueError if it does not fit such a batch and model, or has concrete rows that are `unresolved`."""
        ...

    def unresolved(self) -> jax.Array:
        """[B] bool, rows that wait for a value without which they cannot be applied."""
        ...

    def for_tokens(self, ids: jax.Array) -> "Edit":
        """What is done in a pass over ids [B, T]."""
        ...

    def at_layers(self) -> Any:
        """What differs between layers: a pytree of arrays that lead with an axis L."""
        ...

    def apply(self, x: jax.Array, at_layer: Any, layer: jax.Array, positions: jax.Array) -> jax.Array:
        """The residual stream after a block and the edit.

        Args:
          x: [B, T, D] float32, the block's output.
          at_layer: `at_layers` of this layer, without the axis L.
          layer: int32, the block's number.
          positions: [B, T] int32, PAD at padding.

        Returns:
          [B, T, D] float32.
        """
        ...


class BlockOutput(NamedTuple):
    """Everything a block adds to the residual stream; unused parts cost nothing.

    Attributes:
      resid_pre: [B, T, D] float32, the residual stream that enters the block.
      attn_out: [B, T, D] float32, what attention adds.
      resid_mid: [B, T, D] float32, resid_pre + attn_out.
      mlp_out: [B, T, D] float32, what the MLP adds.
      resid_post: [B, T, D] float32, resid_mid + mlp_out, after the edit: "layer l" of this package.
      layer: int32 scalar, l, the block's number.
    """

    resid_pre: jax.Array
    attn_out: jax.Array
    resid_mid: jax.Array
    mlp_out: jax.Array
    resid_post: jax.Array
    layer: jax.Array | int = -1


Capture = Callable[[BlockOutput], Any]


class Block(nnx.Module):
    """One transformer block, which normalises what attention and MLP read."""

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
        cache: LayerCache | None,
        edit: Callable[[jax.Array], jax.Array],
    ) -> tuple[BlockOutput, KeysValues]:
        """Runs the block.

        Args:
          x: [B, T, D] float32 residual stream.
          rope: cosines and sines, [B, T, H/2].
          mask: [B, T, T], see `Attention`.
          cache: this layer's cached keys and values, or None.
          edit: what is done to the output at this layer, [B, T, D] to [B, T, D].

        Returns:
          Everything computed on the way, the residual stream after the block last, and keys and values, see
          `Attention`.
        """
        with jax.named_scope("attention"):
            attn_out, keys_values = self.attend(x, rope, mask, cache)
        resid_mid = x + attn_out
        with jax.named_scope("mlp"):
            mlp_out = self.feed_forward(resid_mid)
        return BlockOutput(x, attn_out, resid_mid, mlp_out, edit(resid_mid + mlp_out)), keys_values

    def attend(self, x: jax.Array, *rest: Any) -> tuple[jax.Array, KeysValues]:
        """What attention adds to the residual stream x [B, T, D], and keys and values; see `Attention` for the rest."""
        return self.self_attn(self.input_layernorm(x), *rest)

    def feed_forward(self, x: jax.Array) -> jax.Array:
        """What the MLP adds to the residual stream x [B, T, D]."""
        return self.mlp(self.post_attention_layernorm(x))


class PostNormBlock(Block):
    """A block that normalises what attention and MLP add, not what they read (OLMo 2 and 3)."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        """Starts from random weights; `checkpoint` replaces them."""
        self.self_attn = Attention(config, dtype, rngs)
        self.post_attention_layernorm = RMSNorm(config.d_model, config.norm_eps, dtype)
        self.mlp = MLP(config, dtype, rngs)
        self.post_feedforward_layernorm = RMSNorm(config.d_model, config.norm_eps, dtype)

    def attend(self, x: jax.Array, *rest: Any) -> tuple[jax.Array, KeysValues]:
        """As `Block.attend`, normalised behind attention."""
        attn_out, keys_values = self.self_attn(x, *rest)
        return self.post_attention_layernorm(attn_out), keys_values

    def feed_forward(self, x: jax.Array) -> jax.Array:
        """As `Block.feed_forward`, normalised behind the MLP."""
        return self.post_feedforward_layernorm(self.mlp(x))


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
    """Embedding, L stacked blocks, final norm, unembedding. Matrices are [in, out]; a block's lead with an axis L."""

    layers: Any  # a Block whose weights are stacked, or an nnx.List of blocks

    def __init__(self, config: ModelConfig, dtype: jnp.dtype = jnp.float32, *, rngs: nnx.Rngs):
        """Builds the model with random weights of the given dtype (`checkpoint.load` fills in trained ones).

        Args:
          config: architecture.
          dtype: of weights and of matrix-product inputs. Products accumulate in float32; residual stream, norms,
            softmax and logits are float32 whatever it is.
          rngs: source of the random weights.
        """
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.d_model, dtype, rngs)
        block = PostNormBlock if config.norms_after else Block
        self.layers = nnx.vmap(lambda layer_rngs: block(config, dtype, layer_rngs))(rngs.split(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps, dtype)
        self.lm_head = None if config.tied else Embedding(config.vocab_size, config.d_model, dtype, rngs)

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the weights."""
        return self.embed_tokens.weight.dtype

    def __call__(
        self,
        ids: jax.Array,
        positions: jax.Array,
        *,
        cache: KVCache | None = None,
        intervention: Edit | None = None,
        capture: Capture = lambda out: None,
        stop_at_layer: int | None = None,
    ) -> Output:
        """Runs the blocks over `ids`; nothing that is given is changed.

        Args:
          ids: [B, T] int32; any valid id at padding.
          positions: [B, T] int32, place of each token in its sequence, PAD at padding; they rise along a sequence, and
            a 0 begins another, which sees no other. With a cache, one sequence a row.
          cache: tokens before these, with at least T slots free; None for none.
          intervention: what is done to the output of every block, B rows; None for nothing. Rows that are not resolved
            are refused or, where they are traced, give NaN.
          capture: static function of a block's output; its results are stacked over layers. Reduce inside it:
            [L, B, T, D] of a large model does not fit.
          stop_at_layer: run only the blocks before this one, 1..L, when later activations are not needed; None for all.
            Without a cache only. Static.

        Returns:
          The residual stream after the last block that ran, the cache and the captures.

        Raises:
          ValueError: if ids and positions are not integers of one shape [B, T], or concrete positions do not rise along
            a sequence; if the intervention does not fit these rows and this model or is not resolved; or if
            `stop_at_layer` is outside 1..L or given with a cache.
        """
        ids, positions = _checked_tokens(ids, positions)
        n_layers = self._n_layers(stop_at_layer, cache)
        x = self.embed_tokens(ids)
        at_layers = None
        if intervention is not None:
            intervention.check(len(ids), self.config.n_layers, self.config.d_model)
            # Traced rows cannot be refused, and must not be left out silently.
            x = jnp.where(intervention.unresolved()[:, None, None], jnp.nan, x)
            intervention = intervention.for_tokens(ids)
            at_layers = jax.tree.map(lambda leaf: leaf[:n_layers], intervention.at_layers())
        all_positions, cached, cached_positions, slot = positions, None, None, None
        if cache is not None:
            cached = (cache.k, cache.v)
            all_positions = jax.lax.dynamic_update_slice_in_dim(cache.positions, positions, cache.length, axis=1)
            # Stacked, the cache is only read while the blocks run, and written afterwards.
            slot = cache.length if self._is_unstacked else None
            cached_positions = all_positions if self._is_unstacked else cache.positions
        seen_by_kind = [self._seen(kind, positions, cached_positions) for kind in self.config.kinds]

        def body(x: jax.Array, scanned: tuple[Any, ...]) -> tuple[jax.Array, Any]:
            block, layer, kind, cached, at_layer = scanned
            rope, mask, cached_mask = _chosen(seen_by_kind, kind)

            def edit(resid: jax.Array) -> jax.Array:
                return resid if intervention is None else intervention.apply(resid, at_layer, layer, positions)

            layer_cache = None if cached_mask is None else LayerCache(cached[0], cached[1], cached_mask, slot)
            out, keys_values = block(x, rope, mask, layer_cache, edit)
            return out.resid_post, (keys_values, capture(out._replace(layer=layer)))

        kinds = np.array(self.config.kind_of_layer[:n_layers], np.int32)
        others = (jnp.arange(n_layers), kinds, cached, at_layers)
        if self._is_unstacked:
            x, ((k, v), captured) = _run_in_turn(body, x, self.layers, others)
        else:
            x, ((k, v), captured) = ops.scan_blocks(body, x, self.layers, others)
            if cache is not None:
                k, v = write((cache.k, cache.v), (k, v), cache.length)
        length = ids.shape[1] + (jnp.zeros((), jnp.int32) if cache is None else cache.length)
        return Output(x, KVCache(k, v, all_positions, length), captured)

    def for_decoding(self, cache: KVCache) -> tuple["Decoder", KVCache]:
        """Model and cache in the form in which a loop over single tokens is fastest: `unstacked` or as they are."""
        return (self.unstacked(), cache.unstacked()) if ops.unstacks(self.layers) else (self, cache)

    def unstacked(self) -> "Decoder":
        """The same model with a second copy of its blocks, each by itself; its cache is an `unstacked` one too."""
        model = jax.tree.map(lambda leaf: leaf, self)
        numbers = range(self.config.n_layers)
        model.layers = nnx.List([jax.tree.map(lambda leaf, n=n: ops.lookup(leaf, n), self.layers) for n in numbers])
        return model

    def logits(self, resid: jax.Array) -> jax.Array:
        """Final norm and unembedding: [..., D] to [..., V] float32."""
        return self.unembed(self.norm(resid))

    def unembed(self, x: jax.Array) -> jax.Array:
        """W_U x, without the final norm: [..., D] to [..., V] float32."""
        return (self.embed_tokens if self.lm_head is None else self.lm_head).unembed(x)

    def _seen(
        self, kind: LayerKind, positions: jax.Array, cached_positions: jax.Array | None
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array, jax.Array | None]:
        """What blocks of a kind derive from positions: rotary tables, and masks of these and of the cached tokens."""
        rope = rope_tables(jnp.maximum(positions, 0), self.config, kind)
        mask = packed_mask(positions, kind.window)
        return rope, mask, None if cached_positions is None else causal_mask(positions, cached_positions, kind.window)

    @property
    def _is_unstacked(self) -> bool:
        return isinstance(self.layers, nnx.List)

    def _n_layers(self, stop_at_layer: int | None, cache: KVCache | None) -> int:
        """Number of blocks to run; ValueError if a pass cannot end before block `stop_at_layer`."""
        if stop_at_layer is None:
            return self.config.n_layers
        if not 1 <= stop_at_layer <= self.config.n_layers:
            raise ValueError(f"stop_at_layer={stop_at_layer} is outside 1..{self.config.n_layers}")
        if cache is not None:
            raise ValueError(f"stop_at_layer={stop_at_layer} was given with a cache; expected it without one")
        return stop_at_layer


def _checked_tokens(ids: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both as arrays; ValueError if a model cannot be run on them."""
    ids, positions = jnp.asarray(ids), jnp.asarray(positions)
    for name, array in (("ids", ids), ("positions", positions)):
        if array.ndim != 2 or array.shape != ids.shape or not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(
                f"{name} are {array.dtype} of shape {array.shape}, expected integers of shape [rows, tokens], "
                f"as many positions as ids; ids have the shape {ids.shape}"
            )
    if not isinstance(positions, Tracer):
        for row, places in enumerate(np.asarray(positions)):
            of_tokens = places[places >= 0]
            if np.any((np.diff(of_tokens) <= 0) & (of_tokens[1:] != 0)):
                raise ValueError(
                    f"positions of row {row} are {places[:8].tolist()}..., expected places 0, 1, 2, ... and {PAD} at "
                    "padding, as `left_pad` and `right_pad` give them; an attention mask is something else"
                )
    return ids, positions


def _chosen(of_kinds: list[Any], kind: jax.Array | np.integer) -> Any:
    """The entry of a kind: one of them, or, where the kind differs between steps of a scan, one of their stack."""
    if len(of_kinds) == 1:
        return of_kinds[0]
    if isinstance(kind, np.integer):
        return of_kinds[int(kind)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves)[kind], *of_kinds)


def _run_in_turn(body: Callable, x: jax.Array, blocks: nnx.List, others: tuple[Any, ...]) -> tuple[jax.Array, Any]:
    """What `ops.scan_blocks` does, of unstacked blocks; keys and values come back as one array per layer."""
    layers, kinds, cached, at_layers = others
    keys, values = cached or ((None,) * len(blocks),) * 2
    outs = []
    for layer, block in enumerate(blocks):
        at_layer = jax.tree.map(lambda leaf, layer=layer: leaf[layer], at_layers)
        x, out = body(x, (block, layers[layer], kinds[layer], (keys[layer], values[layer]), at_layer))
        outs.append(out)
    keys_values, captured = zip(*outs, strict=True)
    return x, (tuple(zip(*keys_values, strict=True)), jax.tree.map(lambda *leaves: jnp.stack(leaves), *captured))
