"""From logits to a token: temperature, top-k and top-p, drawn with one uniform number per row."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

_CDF_BLOCK = 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; traced values, scalar or, in a batch of `generate`, one per row [B].

    Attributes:
      temperature: 0 takes the most likely token.
      top_p: smallest set of tokens with at least this probability; 1 keeps all.
      top_k: number of most likely tokens kept; 0 keeps all.
      steps: which of `draw`, `top_k` and `top_p` a row needs, static, so that a program holds no other; None where that
        is decided on the device, at every token. `known` says it of values that are known.
    """

    temperature: jax.Array | float = 0.0
    top_p: jax.Array | float = 1.0
    top_k: jax.Array | int = 0
    steps: tuple[str, ...] | None = dataclasses.field(default=None, metadata={"static": True}, kw_only=True)

    def known(self) -> "Sampling":
        """The same with `steps` said, where no value is traced: greedy, temperature, top-k and top-p are programs."""
        values = (self.temperature, self.top_k, self.top_p)
        if self.steps is not None or any(isinstance(value, Tracer) for value in values):
            return self
        temperature, top_k, top_p = (np.asarray(value) for value in values)
        needed = {"draw": temperature > 0, "top_k": top_k > 0, "top_p": top_p < 1}
        steps = tuple(name for name, where in needed.items() if np.any(where))
        return dataclasses.replace(self, steps=steps if "draw" in steps else ())

    def check(self) -> None:
        """ValueError if a value that is not traced is invalid."""
        accepted = {
            "temperature": (lambda x: np.isfinite(x) & (x >= 0), "a finite number of at least 0"),
            "top_p": (lambda x: (x > 0) & (x <= 1), "more than 0 and at most 1"),
            "top_k": (lambda x: (x >= 0) & (x == np.floor(x)), "an integer of at least 0"),
        }
        for name, (holds, expected) in accepted.items():
            value = getattr(self, name)
            if not isinstance(value, Tracer) and not np.all(holds(np.asarray(value))):
                raise ValueError(f"{name}={value}, expected {expected}")


GREEDY = Sampling()
"""Takes the most likely token."""


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
        weights = _weights(scaled, sampling.top_k, sampling.steps)
        return jnp.where(temperature == 0, most_likely, _draw(weights, sampling.top_p, step_keys, sampling.steps))

    if sampling.steps is not None:
        return draw() if "draw" in sampling.steps else most_likely
    return lax.cond(jnp.all(temperature == 0), lambda: most_likely, draw)


def _first_maximum(x: jax.Array) -> jax.Array:
    """`jnp.argmax` over the last axis of [B, V], as two plain reductions, which XLA's CPU backend vectorises."""
    V = x.shape[-1]
    is_maximum = x == jnp.max(x, axis=-1, keepdims=True)
    return jnp.min(jnp.where(is_maximum, jnp.arange(V), V - 1), axis=-1).astype(jnp.int32)


def _weights(logits: jax.Array, top_k: jax.Array | int, steps: tuple[str, ...] | None = None) -> jax.Array:
    """[B, V] probabilities up to a factor per row, zero outside the top-k tokens.

    The k-th largest logit is found bit by bit on integers ordered like the floats: 32 passes over the row are exact,
    take k as a traced value, and cost a fraction of sorting a vocabulary.
    """
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    if steps is not None and "top_k" not in steps:
        return weights
    top_k = jnp.broadcast_to(jnp.asarray(top_k, jnp.int32), logits.shape[:1])[:, None]
    bits = lax.bitcast_convert_type(logits, jnp.uint32)
    ordered = jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))

    def set_bit(i: jax.Array, threshold: jax.Array) -> jax.Array:
        candidate = threshold | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(jnp.sum(ordered >= candidate, axis=-1, keepdims=True) >= top_k, candidate, threshold)

    def keep_top_k() -> jax.Array:
        threshold = lax.fori_loop(0, 32, set_bit, jnp.zeros_like(top_k, jnp.uint32))
        return jnp.where((ordered >= threshold) | (top_k == 0), weights, 0.0)

    return keep_top_k() if steps is not None else lax.cond(jnp.any(top_k > 0), keep_top_k, lambda: weights)


def _draw(
    weights: jax.Array, top_p: jax.Array | float, keys: jax.Array, steps: tuple[str, ...] | None = None
) -> jax.Array:
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
    if steps is not None and "top_p" not in steps:
        return token
    some = jnp.any(top_p < 1)
    rejected = outside(token) if steps is not None else lax.cond(some, outside, lambda token: token < 0, token)
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
