"""What is done to the residual stream: one pytree of traced values, per row and per layer.

At the output of every block (`resid_post`), at every position t inside the row's span,

    x <- x + add + amplify * x / |x| + noise * e / |e| - ablate * (x . u) u

where e ~ N(0, I) is drawn afresh at every position and step. Because vector, layer, magnitude and span are values and
not code, every condition of an experiment (steering vector at a magnitude, overall mean, label vector,
self-amplification, noise, ablation) is a *row* of one batch through one compiled program. A row is built by one of the
constructors below, rows combine with `+`, and `stack_rows` makes the batch.
"""

import dataclasses
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

PROMPT_END = -1  # in `span`, stands for the row's prompt length until `resolve` puts the number there
END = np.iinfo(np.int32).max  # in `span`, no upper limit

Span = str | tuple[int, int]  # "all", "prompt", "generated", or absolute (start, stop)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Intervention:
    """Changes to the residual stream of B rows in L layers; without the axis B, of one row.

    Attributes:
      add: [B, L, D] float32, added vector, in residual-norm units (unit direction times magnitude).
      amplify: [B, L] float32, length added along the activation's own direction.
      noise: [B, L] float32, length of the Gaussian direction drawn afresh at every position and step.
      ablate: [B, L] float32, share of the component along `direction` that is removed (1 removes it all).
      direction: [B, L, D] float32, unit vectors u of the ablation; zero where nothing is ablated.
      span: [B, 2] int32, absolute positions [start, stop) that are changed; position 0 is BOS.
      key: [B] typed PRNG keys of the noise. The draw depends on key, layer and position alone, so it is the same in any
        batch and the same with a cache as without.
    """

    add: jax.Array
    amplify: jax.Array
    noise: jax.Array
    ablate: jax.Array
    direction: jax.Array
    span: jax.Array
    key: jax.Array

    def __add__(self, other: "Intervention") -> "Intervention":
        """Both changes at once, on the left operand's span and noise key.

        Raises:
          ValueError: if the operands are not of one model and number of rows. Or if the sum is another thing than both:
            two ablations in one layer, or a right operand with a span or a noise key of its own; not under `jax.jit` or
            `jax.vmap`, where the values are not known.
        """
        if self.add.shape != other.add.shape:
            raise ValueError(
                f"the operands' `add` have the shapes {self.add.shape} and {other.add.shape}, expected the same; "
                "add rows first, then stack them"
            )
        _check_sum(self, other)
        return dataclasses.replace(
            self,
            add=self.add + other.add,
            amplify=self.amplify + other.amplify,
            noise=self.noise + other.noise,
            ablate=self.ablate + other.ablate,
            direction=self.direction + other.direction,
        )

    def check(self, n_rows: int, n_layers: int, d_model: int) -> None:
        """ValueError if these are not rows for such a batch and model, or a concrete span is not resolved."""
        self.check_shape(n_rows, n_layers, d_model)
        self.check_resolved()

    def at_layers(self) -> dict[str, jax.Array]:
        """See `models.decoder.Edit`."""
        return self.per_layer()

    def apply(self, x: jax.Array, at_layer: dict[str, jax.Array], layer: jax.Array, positions: jax.Array) -> jax.Array:
        """See `models.decoder.Edit`."""
        return intervene(x, dataclasses.replace(self, **at_layer), layer, positions)

    def per_layer(self) -> dict[str, jax.Array]:
        """The values that differ between layers, layer axis first, to be scanned over beside the model's blocks."""
        names = ("add", "amplify", "noise", "ablate", "direction")
        return {name: jnp.moveaxis(getattr(self, name), 1, 0) for name in names}

    def resolve(self, prompt_length: jax.Array) -> "Intervention":
        """Puts each row's prompt length ([B] int32, in tokens with BOS) where the span says `prompt` or `generated`."""
        length = jnp.asarray(prompt_length, jnp.int32)[..., None]
        return dataclasses.replace(self, span=jnp.where(self.span == PROMPT_END, length, self.span))

    def check_shape(self, n_rows: int, n_layers: int, d_model: int) -> None:
        """ValueError if these are not rows for such a batch and model; some other shapes would broadcast."""
        if self.add.shape != (n_rows, n_layers, d_model):
            raise ValueError(
                f"the intervention's `add` has shape {self.add.shape}, expected (rows, layers, width) = "
                f"{(n_rows, n_layers, d_model)}; `stack_rows` makes a batch of rows"
            )

    def unresolved(self) -> jax.Array:
        """[B] bool, whether a row's span waits for the prompt's length."""
        return jnp.any(self.span == PROMPT_END, axis=-1)

    def check_resolved(self) -> None:
        """ValueError if a concrete span waits for the prompt's length."""
        if isinstance(self.span, Tracer):
            return
        if rows := np.flatnonzero(np.any(np.asarray(self.span) == PROMPT_END, axis=-1)).tolist():
            raise ValueError(
                f"the spans of rows {rows} are `prompt` or `generated`, and the prompt's length is not known here: "
                "call `resolve` with it first, or `generate`, which does"
            )


def no_intervention(n_layers: int, d_model: int, span: Span = "all", key: jax.Array | None = None) -> Intervention:
    """The row that changes nothing, to the bit.

    Args:
      n_layers: L of the model.
      d_model: D of the model.
      span: `all` positions, the `prompt`, the `generated` ones (generated position j is the forward pass whose input is
        generated token j, so it cannot change the first sampled token), or absolute (start, stop).
      key: PRNG key of the noise.

    Returns:
      One row.

    Raises:
      ValueError: if the span is neither a name nor 0 <= start < stop.
    """
    per_layer = jnp.zeros(n_layers, jnp.float32)
    per_layer_vector = jnp.zeros((n_layers, d_model), jnp.float32)
    return Intervention(
        add=per_layer_vector,
        amplify=per_layer,
        noise=per_layer,
        ablate=per_layer,
        direction=per_layer_vector,
        span=jnp.array(_span_bounds(span), jnp.int32),
        key=key_of(0) if key is None else key,
    )


def key_of(seed: int) -> jax.Array:
    """PRNG key of a seed, threefry's whatever JAX's default is.

    A draw must depend on the row's key alone. Other generators draw the keys of a batch together (`jax.vmap`).
    """
    return jax.random.key(seed, impl="threefry2x32")


def add_vector(
    vector: jax.Array, layer: jax.Array | int, magnitude: jax.Array | float, *, n_layers: int, span: Span = "all"
) -> Intervention:
    """Adds `magnitude * vector` to the output of block `layer` (section 3.2 of the paper).

    Args:
      vector: [D], usually of unit norm, so that `magnitude` is in residual-norm units; it is not normalised here.
      layer: block, 0-based; may be traced.
      magnitude: factor; may be traced, so `jax.vmap` over magnitudes works. Negative steers away.
      n_layers: L of the model.
      span: see `no_intervention`.

    Returns:
      One row.

    Raises:
      ValueError: if `vector` is not one-dimensional, the magnitude not one number, a concrete layer outside 0..L-1, or
        a concrete vector or magnitude not finite. The others below raise the same.
    """
    vector = _checked_vector(vector)
    row = no_intervention(n_layers, vector.shape[0], span)
    one_hot = _one_hot(layer, n_layers)
    return dataclasses.replace(row, add=one_hot[:, None] * (_strength(magnitude) * vector))


def self_amplify(
    layer: jax.Array | int, magnitude: jax.Array | float, *, n_layers: int, d_model: int, span: Span = "all"
) -> Intervention:
    """Adds `magnitude` times the activation's own unit vector (Fig. 4, self-amplification)."""
    row = no_intervention(n_layers, d_model, span)
    return dataclasses.replace(row, amplify=_one_hot(layer, n_layers) * _strength(magnitude))


def gaussian_noise(
    layer: jax.Array | int,
    magnitude: jax.Array | float,
    key: jax.Array,
    *,
    n_layers: int,
    d_model: int,
    span: Span = "all",
) -> Intervention:
    """Adds a Gaussian direction of length `magnitude`, fresh at every position and step (Fig. 4, noise)."""
    row = no_intervention(n_layers, d_model, span, key)
    return dataclasses.replace(row, noise=_one_hot(layer, n_layers) * _strength(magnitude))


def ablate(
    direction: jax.Array, layers: Sequence[int] | None = None, *, n_layers: int, span: Span = "all"
) -> Intervention:
    """Removes the component along `direction` ([D], normalised here) from the output of `layers` (default: all).

    Raises:
      ValueError: the direction is zero (where it is not traced), or there is no layer.
    """
    direction = _checked_vector(direction)
    if not isinstance(direction, Tracer) and not np.any(np.asarray(direction)):
        raise ValueError("the direction is zero, expected one along which something can be removed")
    if layers is not None and not len(layers):
        raise ValueError("layers=[], expected at least one, or None for all")
    row = no_intervention(n_layers, direction.shape[0], span)
    chosen = range(n_layers) if layers is None else layers
    mask = jnp.max(jnp.stack([_one_hot(layer, n_layers) for layer in chosen]), axis=0)
    direction = direction / jnp.max(jnp.abs(direction))  # float32 may not hold its squares
    unit = direction / jnp.linalg.norm(direction)
    return dataclasses.replace(row, ablate=mask, direction=mask[:, None] * unit)


def stack_rows(rows: Sequence[Intervention]) -> Intervention:
    """Batch of B rows out of B single rows of the same model.

    Raises:
      ValueError: there is no row, or they are not of one model.
    """
    shapes = {row.add.shape for row in rows}
    if len(shapes) != 1 or len(min(shapes)) != 2:
        raise ValueError(
            f"the rows' `add` have the shapes {sorted(shapes)}, expected (layers, width), the same in all rows"
        )
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)


@jax.custom_jvp
def intervene(x: jax.Array, at_layer: Intervention, layer: jax.Array, positions: jax.Array) -> jax.Array:
    """Applies one layer's slice of an intervention to the output of its block.

    Args:
      x: [B, T, D] float32, the residual stream after the block.
      at_layer: the rows' values at this layer, without the axis L (`add` [B, D], `amplify` [B], ...), span resolved.
      layer: int32, the block's number; enters the noise key.
      positions: [B, T] int32 absolute positions, negative at padding, which is never changed.

    Returns:
      [B, T, D] float32. Where a row's strengths are zero or the position is outside the span, x to the bit.
    """
    active = _active(at_layer)
    changed = (_in_span(at_layer, positions) & active[:, None])[..., None]

    def change() -> jax.Array:
        delta = _delta(x, at_layer)
        noisy = lambda: delta + _noise(x, at_layer, layer, positions)  # noqa: E731
        return jnp.where(changed, x + lax.cond(jnp.any(at_layer.noise != 0), noisy, lambda: delta), x)

    # Most layers of most experiments are left alone, and drawing noise costs more than a small model's block.
    return lax.cond(jnp.any(active), change, lambda: x)


@intervene.defjvp
def _intervene_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    """The formula's derivative also at strengths of zero, where what `intervene` leaves out has one too."""
    return intervene(*primals), jax.jvp(_intervene_everywhere, primals, tangents)[1]


def _intervene_everywhere(x: jax.Array, at_layer: Intervention, layer: jax.Array, positions: jax.Array) -> jax.Array:
    """`intervene` without a look at which strengths are zero."""
    changed = x + _delta(x, at_layer) + _noise(x, at_layer, layer, positions)
    return jnp.where(_in_span(at_layer, positions)[..., None], changed, x)


def _in_span(at_layer: Intervention, positions: jax.Array) -> jax.Array:
    """[B, T] bool; nowhere if the span is not resolved."""
    start, stop = at_layer.span[:, :1], at_layer.span[:, 1:]
    return (start >= 0) & (positions >= start) & (positions < stop)


def _active(values: Intervention) -> jax.Array:
    """Where any strength is not zero, with the axes of `noise`."""
    return jnp.any(values.add != 0, axis=-1) | (values.amplify != 0) | (values.noise != 0) | (values.ablate != 0)


def _delta(x: jax.Array, at_layer: Intervention) -> jax.Array:
    """What the formula at the top of this file adds to x but for noise, [B, T, D], inside and outside of spans."""
    u = at_layer.direction[:, None, :]
    amplify, removed = (a[:, None, None] for a in (at_layer.amplify, at_layer.ablate))
    norm = jnp.linalg.norm(x, axis=-1, keepdims=True)
    own_direction = x / jnp.where(norm == 0, 1.0, norm)
    component = jnp.sum(x * u, axis=-1, keepdims=True)
    return at_layer.add[:, None, :] + amplify * own_direction - removed * component * u


def _noise(x: jax.Array, at_layer: Intervention, layer: jax.Array, positions: jax.Array) -> jax.Array:
    """The formula's noise, [B, T, D]."""
    return at_layer.noise[:, None, None] * _noise_directions(at_layer.key, layer, positions, x.shape[-1])


def _noise_directions(key: jax.Array, layer: jax.Array, positions: jax.Array, d_model: int) -> jax.Array:
    """[B, T, D] unit vectors, a function of (row key, layer, absolute position) alone."""

    def draw(row_key: jax.Array, position: jax.Array) -> jax.Array:
        e = jax.random.normal(jax.random.fold_in(row_key, position), (d_model,), jnp.float32)
        return e / jnp.linalg.norm(e)

    row_keys = jax.vmap(lambda k: jax.random.fold_in(k, layer))(key)
    return jax.vmap(jax.vmap(draw, (None, 0)), (0, 0))(row_keys, positions)


@jax.ensure_compile_time_eval()  # a program that is being traced may add concrete rows
def _check_sum(left: Intervention, right: Intervention) -> None:
    """ValueError where the sum of concrete rows would not be both changes."""
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((left, right))):
        return
    twice = (left.ablate != 0) & (right.ablate != 0)
    if jnp.any(twice):
        layers = np.unique(np.nonzero(twice)[-1]).tolist()
        raise ValueError(f"both operands ablate in layers {layers}, but a row has one direction per layer")
    if jnp.any(jnp.any(_active(right), axis=-1) & jnp.any(left.span != right.span, axis=-1)):
        raise ValueError(
            f"the operands have the spans {left.span.tolist()} and {right.span.tolist()} ({PROMPT_END} is the prompt's "
            f"end, {END} no end), but the sum has the left one; expected the same span in both"
        )
    noisy = jnp.any(right.noise != 0, axis=-1)
    if jnp.any(noisy) and jnp.any(noisy & (left.key != right.key)):
        raise ValueError(
            "the right operand's noise has a key of its own, but the sum draws from the left one's; expected the noise "
            "on the left, or the same key in both"
        )


def _span_bounds(span: Span) -> tuple[int, int]:
    named = {"all": (0, END), "prompt": (0, PROMPT_END), "generated": (PROMPT_END, END)}
    if isinstance(span, str):
        if span not in named:
            raise ValueError(f"span={span!r}, expected one of {sorted(named)} or absolute positions (start, stop)")
        return named[span]
    start, stop = map(operator.index, span)
    if not 0 <= start < stop:
        raise ValueError(f"span={span!r} selects no position; expected 0 <= start < stop")
    return start, min(stop, int(END))


def _one_hot(layer: jax.Array | int, n_layers: int) -> jax.Array:
    # A traced layer has no value yet to be looked at.
    if not isinstance(layer, Tracer) and (value := np.asarray(layer).tolist()) not in range(n_layers):
        raise ValueError(f"layer={value!r} is outside 0..{n_layers - 1}")
    return (jnp.arange(n_layers) == layer).astype(jnp.float32)


def _checked_vector(vector: jax.Array) -> jax.Array:
    vector = jnp.asarray(vector, jnp.float32)
    if vector.ndim != 1:
        raise ValueError(f"vector has shape {vector.shape}, expected [d_model]")
    if not isinstance(vector, Tracer) and not np.isfinite(vector).all():
        raise ValueError("the vector is not finite, expected finite numbers")
    return vector


def _strength(magnitude: jax.Array | float) -> jax.Array:
    if jnp.shape(magnitude):
        raise ValueError(f"magnitude has shape {jnp.shape(magnitude)}, expected one number; a batch has rows for more")
    if not isinstance(magnitude, Tracer) and not np.isfinite(np.asarray(magnitude, np.float32)):
        raise ValueError(f"magnitude={magnitude!r}, expected a finite number")
    return jnp.asarray(magnitude, jnp.float32)
