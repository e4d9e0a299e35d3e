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

from backtrack_jax.intervention import Intervention, key_of, stack_rows, with_same_terms
from backtrack_jax.models.attention import PAD, KVCache
from backtrack_jax.models.batching import batches, check_ids, left_pad
from backtrack_jax.models.decoder import Decoder
from backtrack_jax.models.prompts import PromptFormat, prompt_ids
from backtrack_jax.models.sharding import place_rows
from backtrack_jax.models.tokenizer import Tokenizer
from backtrack_jax.sampling import GREEDY, Sampling, sample

_SHARED = "something inside the prompt that it shares with other rows, expected the span `generated`, or repeats=1"
_NOISE_STREAM = np.uint32(0xFFFFFFFF)  # sampling step numbers never get here


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
    sampling: Sampling = GREEDY,
    stop_ids: jax.Array | Sequence[int] = (),
    *,
    max_new_tokens: int,
    vocab_size: int | None = None,
    repeats: int = 1,
) -> Generated:
    """Samples up to `max_new_tokens` tokens for B prompts, or for B / `repeats` prompts `repeats` times each.

    Generated position j is the forward pass whose *input* is generated token j. The intervention acts in prefill and in
    every decode step through the same code, on the positions of its span.

    Args:
      model: the model.
      ids: [B / repeats, T] int32 prompts, padded on either side (`models.batching.left_pad`).
      positions: [B / repeats, T] int32, PAD at padding.
      keys: [B] typed PRNG keys. A row's text depends on its own key, prompt and intervention, not on its batch.
      intervention: B rows, or None.
      sampling: temperature, top-p and top-k.
      stop_ids: [n] int32; a row ends with the first of them. The loop ends when all rows have.
      max_new_tokens: G, static.
      vocab_size: number of ids that the tokenizer has, static; None for as many as the model embeds. Rows of an
        embedding beyond it are padding, and are never sampled.
      repeats: how many rows after each other continue one prompt, static. It is prefilled once for all of them, so none
        of them may change anything inside it.

    Returns:
      The replies.

    Raises:
      ValueError: if `max_new_tokens`, `vocab_size` or `repeats` is below 1, the sampling is invalid, keys or
        intervention have other shapes than these rows and this model, or a row of several that share a prompt changes
        something inside it. Where that is traced, the row's logits are NaN.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("repeats", repeats), ("vocab_size", vocab_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}, expected at least 1")
    sampling.check()
    sampling = sampling.known()
    B = len(ids) * repeats
    if jnp.shape(keys) != (B,):
        raise ValueError(f"keys have shape {jnp.shape(keys)}, expected one for each of {B} rows (`row_key`)")
    stop_ids = jnp.asarray(stop_ids, jnp.int32).reshape(-1)
    prompt_length = jnp.repeat(jnp.max(positions, axis=1) + 1, repeats)
    if intervention is not None:
        intervention.check_shape(B, model.config.n_layers, model.config.d_model)
        intervention = intervention.resolve(prompt_length)

    def record(state: DecodeState, resid: jax.Array) -> DecodeState:
        """Samples from the last position's residual stream [B, 1, D] and writes the tokens at `state.step`."""
        logits = model.logits(resid[:, 0])
        if vocab_size is not None and vocab_size < logits.shape[-1]:
            logits = jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, -jnp.inf)
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
        # A row that has stopped continues as padding: nothing attends to it and nothing is done to it.
        at = jnp.where(state.stopped, PAD, prompt_length + state.step - 1)[:, None]
        out = decoder(last, at, cache=state.cache, intervention=intervention)
        return record(dataclasses.replace(state, cache=out.cache), out.resid)

    def unfinished(state: DecodeState) -> jax.Array:
        return (state.step < max_new_tokens) & ~jnp.all(state.stopped)

    out = model(ids, positions, intervention=intervention if repeats == 1 else None)
    at_last = jnp.argmax(positions, axis=1)[:, None, None]  # not the last column where padding stands behind
    resid, cache = jnp.take_along_axis(out.resid, at_last, axis=1), out.cache
    if repeats > 1:
        resid, cache = jnp.repeat(resid, repeats, axis=0), cache.repeated(repeats)
        if intervention is not None:
            resid = jnp.where(_changes_prompt(intervention, prompt_length)[:, None, None], jnp.nan, resid)
    decoder, cache = model.for_decoding(cache.extended(max_new_tokens))
    nothing = jnp.zeros((B, max_new_tokens), jnp.int32)
    zeros = jnp.zeros(B, jnp.int32)
    start = DecodeState(cache, nothing, jnp.zeros((), jnp.int32), zeros > 0, zeros, zeros == 0)
    last = lax.while_loop(unfinished, decode_step, record(start, resid))
    return Generated(last.ids, last.lengths, last.stopped, last.finite)


compiled_generate = jax.jit(generate, static_argnames=("max_new_tokens", "vocab_size", "repeats"))


def _changes_prompt(intervention: Intervention, prompt_length: jax.Array) -> jax.Array:
    """[B] bool, rows that change something inside their prompt; ValueError where that is known before it is run."""
    changes = intervention.changes_before(prompt_length)
    if not isinstance(changes, Tracer) and np.any(changes):
        row = np.flatnonzero(changes)[0]
        raise ValueError(f"row {row} changes {_SHARED}")
    return changes


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
class Completion:
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
    vocab_size: int | None = None,
    done: Container[int] = (),
    repeats: int = 1,
) -> Iterator[list[tuple[int, Completion]]]:
    """Samples all rows and yields, batch by batch, (row number, reply) pairs.

    Rows of similar prompt length share a batch, the last one is filled with copies of its last row, and every batch has
    the kinds of terms that any row has, so that few programs are compiled. Batches of which all rows are in `done` are
    left out; the others are composed as if nothing were done, so that an interrupted run repeats the very computation
    of an uninterrupted one.

    `vocab_size` is as in `generate`: the number of ids that the tokenizer has. With `repeats`, as many rows after each
    other have one prompt, none of them changes anything inside it, and it is prefilled once for as many of them as a
    batch has room for.

    Raises:
      ValueError: names the row whose prompt is invalid for this model, that does not share its prompt or changes what
        it shares, or the invalid value of the sampling.
      FloatingPointError: names the row whose logits are not finite.
    """
    sampling.check()
    sampling = sampling.known()
    for field in ("temperature", "top_p", "top_k"):
        # Rows are sorted into batches, so each of several values would reach the wrong row.
        if jnp.ndim(value := getattr(sampling, field)):
            raise ValueError(f"{field} has shape {jnp.shape(value)}, expected one number for all rows")
    for number, row in enumerate(rows):
        check_ids(row.prompt, model.config.vocab_size, row.name or f"row {number}")
    _check_shared(rows, repeats)
    together = max(n for n in range(1, max(1, min(repeats, batch_size)) + 1) if repeats % n == 0)
    interventions = with_same_terms([row.intervention for row in rows]) if rows else []
    for padded, sets in batches([len(row.prompt) for row in rows[::together]], batch_size // together):
        members = [together * n + i for n in sets for i in range(together)]
        if all(row in done for row in members):
            continue
        filled = [*members, *members[-together:] * (batch_size // together - len(sets))]
        ids, positions = left_pad([rows[i].prompt for i in filled[::together]], padded)
        keys, stacked = jnp.stack([rows[i].key for i in filled]), stack_rows([interventions[i] for i in filled])
        out = compiled_generate(
            model,
            *place_rows(model, (ids, positions, keys, stacked)),
            sampling,
            np.array(stop_ids, np.int32),
            max_new_tokens=max_new_tokens,
            vocab_size=vocab_size,
            repeats=together,
        )
        ids, lengths, stopped, finite = jax.device_get((out.ids, out.lengths, out.stopped, out.finite))
        for i, row in enumerate(members):
            if not finite[i]:
                name = rows[row].name or f"row {row}"
                raise FloatingPointError(f"{name}: logits are not finite within its first {lengths[i]} tokens")
        yield [
            (row, Completion(tuple(ids[i, : lengths[i]].tolist()), "stop" if stopped[i] else "length"))
            for i, row in enumerate(members)
        ]


def _check_shared(rows: Sequence[Row], repeats: int) -> None:
    """ValueError if rows cannot be prefilled together."""
    if repeats < 1 or len(rows) % repeats:
        raise ValueError(f"repeats={repeats}, expected a number that divides {len(rows)} rows")
    for number, row in enumerate(rows) if repeats > 1 else ():
        name, first = row.name or f"row {number}", number - number % repeats
        if tuple(row.prompt) != tuple(rows[first].prompt):
            raise ValueError(f"{name} has another prompt than row {first}, expected the same in {repeats} rows")
        length = jnp.asarray(len(row.prompt), jnp.int32)
        if row.intervention.terms and row.intervention.resolve(length).changes_before(length):
            raise ValueError(f"{name} changes {_SHARED}")


def generate_text(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: str | Sequence[int] | Sequence[str | Sequence[int]],
    interventions: Intervention | Sequence[Intervention],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    batch_size: int = 32,
) -> list[list[str]]:
    """The reply to every prompt under every intervention, as text without the stop token.

    Args:
      model: the model.
      tokenizer: its tokenizer.
      prompts: token ids (`models.prompts.prompt_ids` puts a problem into a chat format), or plain texts, which get one
        BOS and no format. One prompt alone is a list of one.
      interventions: single rows, or one alone; `no_intervention` for a reply as it is. Noise differs between prompts;
        it is drawn from `seed` and the noise's own key.
      max_new_tokens: limit of a reply.
      sampling: temperature, top-p and top-k; greedy by default.
      seed: of the random numbers. A prompt's replies use the same ones under every intervention.
      batch_size: replies sampled at once.

    Returns:
      Texts, [prompt][intervention].

    Raises:
      As `generate_rows`.
    """
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int | np.integer)):
        prompts = [prompts]  # pyright: ignore[reportAssignmentType]
    if isinstance(interventions, Intervention):
        interventions = [interventions]
    plain = PromptFormat("plain")
    encoded = [prompt_ids(tokenizer, text, plain) if isinstance(text, str) else text for text in prompts]
    keys = [row_key(seed, str(number), 0) for number in range(len(encoded))]
    rows = [
        Row(prompt, key, _with_noise_of(key, intervention), f"prompt {number}")  # pyright: ignore[reportArgumentType]
        for number, (prompt, key) in enumerate(zip(encoded, keys, strict=True))
        for intervention in interventions
    ]
    replies = dict(
        pair
        for batch in generate_rows(
            model,
            rows,
            sampling=sampling,
            stop_ids=tokenizer.stop_ids,
            vocab_size=tokenizer.vocab_size,
            max_new_tokens=max_new_tokens,
            batch_size=min(batch_size, 1 << max(len(rows) - 1, 0).bit_length()),  # few sizes, so few programs
        )
        for pair in batch
    )
    texts = [tokenizer.decode([i for i in replies[n].ids if i not in tokenizer.stop_ids]) for n in range(len(rows))]
    width = len(interventions)
    return [texts[number * width : (number + 1) * width] for number in range(len(encoded))]


def _with_noise_of(row: jax.Array, intervention: Intervention) -> Intervention:
    """The intervention with noise of a row's own: a key of the row's and of the intervention's key together."""
    own = jax.random.bits(intervention.key, dtype=jnp.uint32)
    return dataclasses.replace(intervention, key=jax.random.fold_in(noise_key(row), own))
