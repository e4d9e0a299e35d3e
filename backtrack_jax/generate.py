"""Sampling from a model whose residual stream is intervened on: prefill and decode in one compiled program.

`generate` is a plain function of arrays, so `jax.vmap` over magnitudes works; `generate_rows` is what long runs call:
it sorts rows into batches of few shapes and yields each row's reply as its batch is done. `generate_text` is what a
notebook calls.
"""

import dataclasses
import zlib
from collections.abc import Container, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from backtrack_jax.intervention import Intervention, key_of, stack_rows
from backtrack_jax.models.attention import PAD, KVCache
from backtrack_jax.models.batching import batches, check_ids, left_pad
from backtrack_jax.models.decoder import Decoder
from backtrack_jax.models.sharding import place_rows
from backtrack_jax.models.tokenizer import Tokenizer

_NOISE_STREAM = np.uint32(0xFFFFFFFF)  # sampling step numbers never get here
_CDF_BLOCK = 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; traced values, scalar or, in a batch of `generate`, one per row [B].

    Attributes:
      temperature: 0 takes the most likely token.
      top_p: smallest set of tokens with at least this probability; 1 keeps all.
      top_k: number of most likely tokens kept; 0 keeps all.
    """

    temperature: jax.Array | float = 0.0
    top_p: jax.Array | float = 1.0
    top_k: jax.Array | int = 0

    def check(self) -> None:
        """ValueError if a value that is not traced cannot be meant."""
        accepted = {
            "temperature": (lambda x: np.isfinite(x) & (x >= 0), "a finite number of at least 0"),
            "top_p": (lambda x: (x > 0) & (x <= 1), "more than 0 and at most 1"),
            "top_k": (lambda x: (x >= 0) & (x == np.floor(x)), "an integer of at least 0"),
        }
        for name, (holds, expected) in accepted.items():
            value = getattr(self, name)
            if not isinstance(value, Tracer) and not np.all(holds(np.asarray(value))):
                raise ValueError(f"{name}={value}, expected {expected}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Generated:
    """Replies of a batch.

    Attributes:
      ids: [B, G] int32 sampled tokens; meaningful up to `lengths`, a stop token included.
      lengths: [B] int32 number of sampled tokens.
      stopped: [B] bool, True if the reply ended in a stop token, False if it reached the limit.
      finite: [B] bool, False if the reply's logits were infinite or NaN at some step; its tokens then mean nothing.
    """

    ids: jax.Array
    lengths: jax.Array
    stopped: jax.Array
    finite: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """What the decode loop carries; XLA updates it in place.

    Attributes:
      cache: keys and values of prompt and reply so far, T + G slots.
      ids: [B, G] int32 tokens sampled so far.
      step: int32, number of tokens sampled so far in every row.
      stopped: [B] bool, rows that have sampled a stop token.
      lengths: [B] int32, tokens that count.
      finite: [B] bool, rows whose logits have been finite.
    """

    cache: KVCache
    ids: jax.Array
    step: jax.Array
    stopped: jax.Array
    lengths: jax.Array
    finite: jax.Array


def generate(
    model: Decoder,
    ids: jax.Array,
    positions: jax.Array,
    keys: jax.Array,
    intervention: Intervention | None = None,
    sampling: Sampling = Sampling(),
    stop_ids: jax.Array | Sequence[int] = (),
    *,
    max_new_tokens: int,
) -> Generated:
    """Samples up to `max_new_tokens` tokens for B prompts.

    Generated position j is the forward pass whose *input* is generated token j. The intervention acts in prefill and in
    every decode step through the same code, on the positions of its span.

    Args:
      model: the model.
      ids: [B, T] int32 prompts, padded on either side (`models.batching.left_pad`).
      positions: [B, T] int32, PAD at padding.
      keys: [B] typed PRNG keys. A row's text depends on its own key, prompt and intervention, not on its batch.
      intervention: B rows, or None.
      sampling: temperature, top-p and top-k.
      stop_ids: [n] int32; a row ends with the first of them. The loop ends when all rows have.
      max_new_tokens: G, static.

    Returns:
      The replies.

    Raises:
      ValueError: if `max_new_tokens` is below 1, the sampling cannot be meant, or keys or intervention have other
        shapes than these rows and this model.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}, expected at least 1")
    sampling.check()
    if jnp.shape(keys) != (len(ids),):
        raise ValueError(f"keys have shape {jnp.shape(keys)}, expected one for each of {len(ids)} rows (`row_key`)")
    stop_ids = jnp.asarray(stop_ids, jnp.int32).reshape(-1)
    prompt_length = jnp.max(positions, axis=1) + 1
    if intervention is not None:
        intervention.check_shape(len(ids), model.config.n_layers, model.config.d_model)
        intervention = intervention.resolve(prompt_length)

    def record(state: DecodeState, resid: jax.Array) -> DecodeState:
        """Samples from the last position's residual stream [B, 1, D] and writes the tokens at `state.step`."""
        logits = model.logits(resid[:, 0])
        tokens = sample(logits, sampling, keys, state.step)
        written = lax.dynamic_update_slice_in_dim(state.ids, tokens[:, None], state.step, axis=1)
        return dataclasses.replace(
            state,
            ids=jnp.where(state.stopped[:, None], state.ids, written),
            step=state.step + 1,
            stopped=state.stopped | jnp.isin(tokens, stop_ids),
            lengths=jnp.where(state.stopped, state.lengths, state.lengths + 1),
            finite=state.finite & (state.stopped | jnp.isfinite(jnp.max(logits, axis=-1))),
        )

    def decode_step(state: DecodeState) -> DecodeState:
        last = lax.dynamic_slice_in_dim(state.ids, state.step - 1, 1, axis=1)
        # A row that has stopped goes on as padding: nothing attends to it and nothing is done to it.
        at = jnp.where(state.stopped, PAD, prompt_length + state.step - 1)[:, None]
        out = decoder(last, at, cache=state.cache, intervention=intervention)
        return record(dataclasses.replace(state, cache=out.cache), out.resid)

    def unfinished(state: DecodeState) -> jax.Array:
        return (state.step < max_new_tokens) & ~jnp.all(state.stopped)

    B = len(ids)
    out = model(ids, positions, intervention=intervention)
    decoder, cache = model.for_decoding(out.cache.extended(max_new_tokens))
    nothing = jnp.zeros((B, max_new_tokens), jnp.int32)
    zeros = jnp.zeros(B, jnp.int32)
    start = DecodeState(cache, nothing, jnp.zeros((), jnp.int32), zeros > 0, zeros, zeros == 0)
    at_last = jnp.argmax(positions, axis=1)[:, None, None]  # not the last column where padding stands behind
    last = lax.while_loop(unfinished, decode_step, record(start, jnp.take_along_axis(out.resid, at_last, axis=1)))
    return Generated(last.ids, last.lengths, last.stopped, last.finite)


compiled_generate = jax.jit(generate, static_argnames="max_new_tokens")


def sample(logits: jax.Array, sampling: Sampling, keys: jax.Array, step: jax.Array) -> jax.Array:
    """Draws one token per row from [B, V] float32 logits; [B] int32.

    A uniform number per row, `uniform(fold_in(key, step))`, is looked up in the row's cumulative distribution; a token
    outside the top-p set is drawn again. Rows of different conditions but equal key thus meet the same random numbers,
    and a step costs one or two numbers per row, not one per vocabulary item.
    """
    temperature = jnp.broadcast_to(jnp.asarray(sampling.temperature, jnp.float32), logits.shape[:1])
    most_likely = _first_maximum(logits)

    def draw() -> jax.Array:
        scaled = logits / jnp.where(temperature == 0, 1.0, temperature)[:, None]
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
        return jnp.where(
            temperature == 0, most_likely, _draw(_weights(scaled, sampling.top_k), sampling.top_p, step_keys)
        )

    return lax.cond(jnp.all(temperature == 0), lambda: most_likely, draw)


def _first_maximum(x: jax.Array) -> jax.Array:
    """`jnp.argmax` over the last axis of [B, V], as two plain reductions, which XLA's CPU backend vectorises."""
    V = x.shape[-1]
    is_maximum = x == jnp.max(x, axis=-1, keepdims=True)
    return jnp.min(jnp.where(is_maximum, jnp.arange(V), V - 1), axis=-1).astype(jnp.int32)


def _weights(logits: jax.Array, top_k: jax.Array | int) -> jax.Array:
    """[B, V] probabilities up to a factor per row, zero outside the top-k tokens.

    The k-th largest logit is found bit by bit on integers ordered like the floats: 32 passes over the row are exact,
    take k as a traced value, and cost a fraction of sorting a vocabulary.
    """
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    top_k = jnp.broadcast_to(jnp.asarray(top_k, jnp.int32), logits.shape[:1])[:, None]
    bits = lax.bitcast_convert_type(logits, jnp.uint32)
    ordered = jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))

    def set_bit(i: jax.Array, threshold: jax.Array) -> jax.Array:
        candidate = threshold | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(jnp.sum(ordered >= candidate, axis=-1, keepdims=True) >= top_k, candidate, threshold)

    def keep_top_k() -> jax.Array:
        threshold = lax.fori_loop(0, 32, set_bit, jnp.zeros_like(top_k, jnp.uint32))
        return jnp.where((ordered >= threshold) | (top_k == 0), weights, 0.0)

    return lax.cond(jnp.any(top_k > 0), keep_top_k, lambda: weights)


def _draw(weights: jax.Array, top_p: jax.Array | float, keys: jax.Array) -> jax.Array:
    """One token per row of [B, V] weights, from the smallest set of most likely ones that holds `top_p` of the weight.

    The set is not looked for, which would take a pass over the row per bit. A token drawn from all is in it if what is
    more likely weighs less than `top_p`; else neither it nor anything less likely is, and the row draws again from the
    others. There are as many rounds as the unluckiest row needs: two or three for 64 rows and a top-p of 0.95.
    """
    top_p = jnp.broadcast_to(jnp.asarray(top_p, jnp.float32), weights.shape[:1])
    target = jnp.maximum(top_p * jnp.sum(weights, axis=-1), jnp.finfo(jnp.float32).tiny)  # the first token is always in

    def more_likely(token: jax.Array) -> jax.Array:
        return jnp.where(weights > jnp.take_along_axis(weights, token[:, None], axis=1), weights, 0.0)

    def outside(token: jax.Array) -> jax.Array:
        return (top_p < 1) & (jnp.sum(more_likely(token), axis=-1) >= target)

    def draw_again(state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        token, rejected, keys = state
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys, 1)
        drawn = _inverse_cdf(more_likely(token), _uniform(keys))
        token = jnp.where(rejected, drawn, token)
        return token, outside(token), keys

    token = _inverse_cdf(weights, _uniform(keys))
    rejected = lax.cond(jnp.any(top_p < 1), outside, lambda token: token < 0, token)
    return lax.while_loop(lambda state: jnp.any(state[1]), draw_again, (token, rejected, keys))[0]


def _uniform(keys: jax.Array) -> jax.Array:
    """One number in [0, 1) per key, float32 also where JAX's default is float64."""
    return jax.vmap(lambda key: jax.random.uniform(key, dtype=jnp.float32))(keys)


def _inverse_cdf(weights: jax.Array, u: jax.Array) -> jax.Array:
    """First index where the cumulative weight of [B, V] exceeds u [B] of the total: among blocks, then inside one."""
    B, V = weights.shape
    blocks = jnp.pad(weights, ((0, 0), (0, -V % _CDF_BLOCK))).reshape(B, -1, _CDF_BLOCK)
    sums = jnp.sum(blocks, axis=-1)
    cumulative = jnp.cumsum(sums, axis=-1)
    target = u * cumulative[:, -1]
    block = _first_above(cumulative, sums, target)[:, None]
    inside = jnp.take_along_axis(blocks, block[..., None], axis=1)[:, 0]
    before = jnp.take_along_axis(cumulative - sums, block, axis=1)[:, 0]
    token = _first_above(jnp.cumsum(inside, axis=-1), inside, target - before)
    return (block[:, 0] * _CDF_BLOCK + token).astype(jnp.int32)


def _first_above(cumulative: jax.Array, weights: jax.Array, target: jax.Array) -> jax.Array:
    """Index per row of the first positive weight whose cumulative sum exceeds the target; the last if none does."""
    above = (cumulative > target[:, None]) & (weights > 0)
    last_positive = weights.shape[1] - 1 - jnp.argmax(weights[:, ::-1] > 0, axis=1)
    return jnp.where(jnp.any(above, axis=1), jnp.argmax(above, axis=1), last_positive)


def row_key(seed: int, problem_id: str, sample_id: int) -> jax.Array:
    """PRNG key of one row. Neither its place in a batch nor its condition enters, so conditions share their noise."""
    key = jax.random.fold_in(key_of(seed), np.uint32(zlib.crc32(str(problem_id).encode())))
    return jax.random.fold_in(key, sample_id)


def noise_key(key: jax.Array) -> jax.Array:
    """Key of `gaussian_noise` for the row with the given `row_key`, disjoint from the keys that sample its tokens."""
    return jax.random.fold_in(key, _NOISE_STREAM)


@dataclasses.dataclass(frozen=True)
class Row:
    """One reply to be sampled.

    Attributes:
      prompt: token ids, BOS included.
      key: PRNG key (`row_key`).
      intervention: one row.
      name: what an error calls it; empty for its number.
    """

    prompt: Sequence[int]
    key: jax.Array
    intervention: Intervention
    name: str = ""


@dataclasses.dataclass(frozen=True)
class Reply:
    """A sampled reply: its token ids (a stop token included) and why it ended, "stop" or "length"."""

    ids: tuple[int, ...]
    finish_reason: str


def generate_rows(
    model: Decoder,
    rows: Sequence[Row],
    *,
    sampling: Sampling,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    batch_size: int,
    done: Container[int] = (),
) -> Iterator[list[tuple[int, Reply]]]:
    """Samples all rows and yields, batch by batch, (row number, reply) pairs.

    Rows of similar prompt length share a batch, and the last one is filled with copies of its last row, so that few
    shapes are compiled. Batches of which all rows are in `done` are left out; the others are composed as if
    nothing were done, so that an interrupted run repeats the very computation of an uninterrupted one.

    Raises:
      ValueError: names the row whose prompt is no prompt of this model, or what of the sampling cannot be meant.
      FloatingPointError: names the row whose logits are not finite.
    """
    sampling.check()
    for field, value in vars(sampling).items():
        if jnp.ndim(value):  # rows are sorted into batches, and it would meet others than it is meant for
            raise ValueError(f"{field} has shape {jnp.shape(value)}, expected one number for all rows")
    for number, row in enumerate(rows):
        check_ids(row.prompt, model.config.vocab_size, row.name or f"row {number}")
    for padded, members in batches([len(row.prompt) for row in rows], batch_size):
        if all(row in done for row in members):
            continue
        filled = [rows[i] for i in members] + [rows[members[-1]]] * (batch_size - len(members))
        ids, positions = left_pad([row.prompt for row in filled], padded)
        keys, interventions = jnp.stack([row.key for row in filled]), stack_rows([row.intervention for row in filled])
        out = compiled_generate(
            model,
            *place_rows(model, (ids, positions, keys, interventions)),
            sampling,
            np.array(stop_ids, np.int32),
            max_new_tokens=max_new_tokens,
        )
        ids, lengths, stopped, finite = jax.device_get((out.ids, out.lengths, out.stopped, out.finite))
        for i, row in enumerate(members):
            if not finite[i]:
                name = rows[row].name or f"row {row}"
                raise FloatingPointError(f"{name}: logits are not finite within its first {lengths[i]} tokens")
        yield [
            (row, Reply(tuple(ids[i, : lengths[i]].tolist()), "stop" if stopped[i] else "length"))
            for i, row in enumerate(members)
        ]


def generate_text(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    interventions: Sequence[Intervention],
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    seed: int = 0,
    batch_size: int = 32,
) -> list[list[str]]:
    """The reply to every prompt under every intervention, as text without the stop token.

    Args:
      model: the model.
      tokenizer: its tokenizer.
      prompts: token ids (`models.prompts.prompt_ids`).
      interventions: single rows; `no_intervention` for a reply as it is. Noise is another one for every prompt, drawn
        from `seed` and the noise's own key.
      max_new_tokens: limit of a reply.
      sampling: temperature, top-p and top-k; greedy by default.
      seed: of the random numbers. One prompt's replies meet the same ones under every intervention.
      batch_size: replies sampled at once.

    Returns:
      Texts, [prompt][intervention].

    Raises:
      As `generate_rows`.
    """
    keys = [row_key(seed, str(number), 0) for number in range(len(prompts))]
    rows = [
        Row(prompt, key, _with_noise_of(key, intervention), f"prompt {number}")
        for number, (prompt, key) in enumerate(zip(prompts, keys, strict=True))
        for intervention in interventions
    ]
    replies = dict(
        pair
        for batch in generate_rows(
            model,
            rows,
            sampling=sampling,
            stop_ids=tokenizer.stop_ids,
            max_new_tokens=max_new_tokens,
            batch_size=min(batch_size, 1 << max(len(rows) - 1, 0).bit_length()),  # few sizes, so few programs
        )
        for pair in batch
    )
    texts = [tokenizer.decode([i for i in replies[n].ids if i not in tokenizer.stop_ids]) for n in range(len(rows))]
    width = len(interventions)
    return [texts[number * width : (number + 1) * width] for number in range(len(prompts))]


def _with_noise_of(row: jax.Array, intervention: Intervention) -> Intervention:
    """The intervention with noise of a row's own: a key of the row's and of the intervention's key together."""
    own = jax.random.bits(intervention.key, dtype=jnp.uint32)
    return dataclasses.replace(intervention, key=jax.random.fold_in(noise_key(row), own))
