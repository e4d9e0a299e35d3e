"""What is done to the residual stream: one pytree of traced values, per row and per layer.

At the output of every block (`resid_post`), at every position t inside the row's span at which its gates are open,

    x <- x + sum over the row's terms of term.delta(x)

All terms see the same x, the block's own output. `Add` adds a vector, `Amplify` the activation's own direction, `Noise`
a Gaussian direction drawn afresh at every position and step, `Ablate` removes the component in a subspace, and `Clamp`
sets it along a direction; `terms` has them all. Because vector, layer, length, span and gate are values and not code,
every condition of an experiment is a *row* of one batch through one compiled program; static is only which kinds of
terms and gates the batch has. A row is built by one of the constructors below, rows combine with `+`, `when_token`,
`when_component` and `keeping_norm` say more of them, and `stack_rows` makes the batch.
"""

import dataclasses
import functools
import operator
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from backtrack_jax.terms import (
    Ablate,
    Add,
    Amplify,
    Clamp,
    Noise,
    NoiseOutside,
    NoiseWithin,
    Term,
    orthonormal,
)

PROMPT_END = (
    -1
)  # in `span`, stands for the row's prompt length P until `resolve` puts the number there; -1 - j for P + j
END = np.iinfo(np.int32).max  # in `span`, no upper limit

Span = str | tuple[int, int]
"""Positions: "all", "prompt", "generated", "generated[2:18]" of the generated ones, or absolute (start, stop)."""

_Term = TypeVar("_Term", bound=Term)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenGate:
    """Open where the input token is one of a set.

    Attributes:
      tokens: [B, V] bool; ids beyond are not in the set.
    """

    tokens: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ComponentGate:
    """Open where the activation's component along a direction is above a threshold, in each layer by itself.

    Attributes:
      direction: [B, L, D] float32.
      threshold: [B, L] float32, in units of the direction's norm times that of the residual stream.
    """

    direction: jax.Array
    threshold: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Intervention:
    """Changes to the residual stream of B rows in L layers of width D; without the axis B, of one row.

    It is the `Edit` that `models.decoder` applies.

    Attributes:
      terms: what is done, at most one term of each class, by the names of the classes; empty for nothing.
      span: [B, 2] int32, absolute positions [start, stop) that are changed; position 0 is BOS.
      key: [B] typed PRNG keys of what is drawn.
      n_layers: L, static.
      d_model: D, static.
      token_gate: where its terms act, by the input token; None for everywhere.
      component_gate: where its terms act, by the activation; None for everywhere.
      keeps_norm: [B] bool, whether the stream keeps the norm that it had before the terms; None for no row.
      open: [B, T] bool, where the token gate is open for the tokens of one pass (`for_tokens`); None before.
    """

    terms: tuple[Term, ...]
    span: jax.Array
    key: jax.Array
    n_layers: int = dataclasses.field(metadata={"static": True})
    d_model: int = dataclasses.field(metadata={"static": True})
    token_gate: TokenGate | None = dataclasses.field(default=None, kw_only=True)
    component_gate: ComponentGate | None = dataclasses.field(default=None, kw_only=True)
    keeps_norm: jax.Array | None = dataclasses.field(default=None, kw_only=True)
    open: jax.Array | None = dataclasses.field(default=None, kw_only=True)

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, L, D); of a single row (L, D)."""
        return (*self.span.shape[:-1], self.n_layers, self.d_model)

    def term(self, kind: type[_Term]) -> _Term | None:
        """The term of a kind, if there is one."""
        return next((term for term in self.terms if type(term) is kind), None)

    def __add__(self, other: "Intervention") -> "Intervention":
        """Both changes at once, each on its own span, on the left operand's key.

        Two additions become one of the summed vector, and two ablations one of the subspace that their directions span.

        Raises:
          ValueError: if the operands are not of one model and number of rows, or have gates or keep the norm (say that
            of the sum). Or if the sum would not equal both changes: two ablations of different shares in one layer, two
            terms of one kind on different spans, or a right operand with a noise key of its own; the last two not under
            `jax.jit` or `jax.vmap`, where values are not known and the left operand's span is taken.
        """
        if self.shape != other.shape:
            raise ValueError(
                f"the operands have the shapes {self.shape} and {other.shape}, expected the same; "
                "add rows first, then stack them"
            )
        if any(row.token_gate or row.component_gate or row.keeps_norm is not None for row in (self, other)):
            raise ValueError("an operand has a gate or keeps its norm; add rows first, then say so of the sum")
        _check_sum(self, other)
        left, right = (self, other) if _same_spans(self, other) else (_on_own_span(self), _on_own_span(other))
        summed: dict[type[Term], Term] = {type(term): term for term in left.terms}
        for term in right.terms:
            mine = summed.get(type(term))
            if mine is not None and not _same_during(mine, term):
                raise ValueError(
                    f"both operands have a term {type(term).__name__}, on different spans; a row has one of each kind"
                )
            summed[type(term)] = term if mine is None else mine.plus(term)
        return dataclasses.replace(left, terms=_in_order(summed))

    def resolve(self, prompt_length: jax.Array) -> Self:
        """Puts each row's prompt length ([B] int32, in tokens with BOS) where the span says `prompt` or `generated`."""
        length = jnp.asarray(prompt_length, jnp.int32)

        def known(span: jax.Array) -> jax.Array:
            at = length.reshape(length.shape + (1,) * (span.ndim - length.ndim))
            return jnp.where(span < 0, at + (PROMPT_END - span), span)

        terms = [
            term if term.during is None else dataclasses.replace(term, during=known(term.during)) for term in self.terms
        ]
        return dataclasses.replace(self, span=known(self.span), terms=tuple(terms))

    def for_tokens(self, ids: jax.Array) -> Self:
        """For a pass over ids [B, T]: the same with the token gate looked up."""
        if self.token_gate is None:
            return self
        look_up = jax.vmap(lambda table, row: table.at[row].get(mode="fill", fill_value=False))
        return dataclasses.replace(self, token_gate=None, open=look_up(self.token_gate.tokens, ids))

    def check(self, n_rows: int, n_layers: int, d_model: int) -> None:
        """ValueError if these are not rows for such a batch and model, or a concrete span is not resolved."""
        self.check_shape(n_rows, n_layers, d_model)
        self.check_resolved()

    def check_shape(self, n_rows: int, n_layers: int, d_model: int) -> None:
        """ValueError if these are not rows for such a batch and model; some other shapes would broadcast."""
        if self.shape != (n_rows, n_layers, d_model):
            raise ValueError(
                f"the intervention has shape {self.shape}, expected (rows, layers, width) = "
                f"{(n_rows, n_layers, d_model)}; `stack_rows` makes a batch of rows"
            )
        for term in self.terms:
            for leaf in jax.tree.leaves(term):
                if leaf.shape[:2] != (n_rows, n_layers):
                    raise ValueError(
                        f"{type(term).__name__} has an array of shape {leaf.shape}, expected (rows, layers) = "
                        f"{(n_rows, n_layers)} to come first"
                    )
        if self.token_gate is not None and len(self.token_gate.tokens) != n_rows:
            raise ValueError(f"the token gate is of {len(self.token_gate.tokens)} rows, expected {n_rows}")

    def check_resolved(self) -> None:
        """ValueError if a concrete span waits for the prompt's length."""
        spans = [self.span, *(term.during for term in self.terms if term.during is not None)]
        if any(isinstance(span, Tracer) for span in spans):
            return
        waiting = [np.any(np.asarray(span).reshape(len(span), -1) < 0, axis=-1) for span in spans]
        if rows := np.flatnonzero(functools.reduce(operator.or_, waiting)).tolist():
            raise ValueError(
                f"the spans of rows {rows} are `prompt` or `generated`, and the prompt's length is not known here: "
                "call `resolve` with it first, or `generate`, which does"
            )

    def unresolved(self) -> jax.Array:
        """[B] bool, whether a row's span waits for the prompt's length."""
        of_terms = [jnp.any(term.during < 0, axis=(-2, -1)) for term in self.terms if term.during is not None]
        return functools.reduce(operator.or_, of_terms, jnp.any(self.span < 0, axis=-1))

    def changes_before(self, position: jax.Array | int) -> jax.Array:
        """[B] bool, whether a row, its spans resolved, may change anything before a position ([B] int32 or one)."""
        found = jnp.zeros(self.span.shape[:-1], bool)
        for term in self.terms:
            starts = self.span[..., :1] if term.during is None else jnp.maximum(self.span[..., :1], term.during[..., 0])
            before = starts < jnp.asarray(position)[..., None]
            found |= jnp.any((term.strength != 0) & before, axis=-1)
        return found

    def at_layers(self) -> tuple[tuple[Term, ...], ComponentGate | None]:
        """Terms and gate with the layer axis first, to be scanned over beside the model's blocks."""
        return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), (self.terms, self.component_gate))

    def apply(
        self,
        x: jax.Array,
        at_layer: tuple[tuple[Term, ...], ComponentGate | None],
        layer: jax.Array,
        positions: jax.Array,
    ) -> jax.Array:
        """One block's output after the change.

        Args:
          x: [B, T, D] float32, the residual stream after the block.
          at_layer: terms and gate at this layer, without the axis L.
          layer: int32 scalar, the block's number.
          positions: [B, T] int32 absolute positions, negative at padding, which is never changed.

        Returns:
          [B, T, D] float32; x to the bit outside the span, where a gate is closed, and where all strengths are zero.

        Raises:
          ValueError: it has a token gate, which `for_tokens` has not looked up.
        """
        terms, component_gate = at_layer
        if not terms:
            return x
        if self.token_gate is not None:
            raise ValueError("the intervention has a token gate; call `for_tokens` first, as the model does")
        deltas = []
        for term in terms:
            delta = _checked(term, term.delta(x, layer, positions, self.key), x)
            if term.during is not None:
                delta = jnp.where(_inside(term.during, positions)[..., None], delta, 0.0)
            deltas.append(delta)
        change = functools.reduce(operator.add, deltas)
        changed = x + change
        if self.keeps_norm is not None:
            scale = _norm(x) / _norm(changed)
            # Where nothing is added, not even rounding may change x, but the derivative is that of the scale.
            scale = jnp.where(jnp.any(change != 0, axis=-1, keepdims=True), scale, scale / lax.stop_gradient(scale))
            changed = jnp.where(self.keeps_norm[:, None, None], changed * scale, changed)
        here = _inside(self.span, positions)
        if self.open is not None:
            here &= self.open
        if component_gate is not None:
            component = jnp.einsum("btd,bd->bt", x, component_gate.direction, precision="highest")
            here &= component > component_gate.threshold[:, None]
        return jnp.where(here[..., None], changed, x)


def no_intervention(n_layers: int, d_model: int, span: Span = "all", key: jax.Array | None = None) -> Intervention:
    """The row that changes nothing, to the bit.

    Args:
      n_layers: L of the model.
      d_model: D of the model.
      span: `all` positions, the `prompt`, the `generated` ones (generated position j is the forward pass whose input is
        generated token j, so it cannot change the first sampled token), some of these as in `generated[2:18]`, or
        absolute (start, stop).
      key: PRNG key of the noise.

    Returns:
      One row.

    Raises:
      ValueError: if the span is neither a name nor 0 <= start < stop.
    """
    bounds = jnp.array(_span_bounds(span), jnp.int32)
    return Intervention((), bounds, key_of(0) if key is None else key, n_layers, d_model)


def key_of(seed: int) -> jax.Array:
    """PRNG key of a seed, threefry's whatever JAX's default is.

    A draw must depend on the row's key alone. Other generators draw the keys of a batch together (`jax.vmap`).
    """
    return jax.random.key(seed, impl="threefry2x32")


def add_vector(
    vector: jax.Array, layer: jax.Array | int, length: jax.Array | float, *, n_layers: int, span: Span = "all"
) -> Intervention:
    """Adds `length * vector` to the output of block `layer` (section 3.2 of the paper).

    Args:
      vector: [D], usually of unit norm, so that `length` is the norm of what is added; it is not normalised here.
      layer: block, 0-based; may be traced.
      length: factor; may be traced, so `jax.vmap` over lengths works. Negative steers away.
      n_layers: L of the model.
      span: see `no_intervention`.

    Returns:
      One row.

    Raises:
      ValueError: if `vector` is not one-dimensional, the length not one number, a concrete layer outside 0..L-1, or a
        concrete vector or length not finite. The others below raise the same.
    """
    vector = _checked_vector(vector, 1)
    here = _one_hot(layer, n_layers)
    term = Add(here, here[:, None] * (_number(length, "length") * vector))
    return dataclasses.replace(no_intervention(n_layers, vector.shape[0], span), terms=(term,))


def self_amplify(
    layer: jax.Array | int, length: jax.Array | float, *, n_layers: int, d_model: int, span: Span = "all"
) -> Intervention:
    """Adds `length` times the activation's own unit vector (Fig. 4, self-amplification)."""
    term = Amplify(_one_hot(layer, n_layers) * _number(length, "length"))
    return dataclasses.replace(no_intervention(n_layers, d_model, span), terms=(term,))


def gaussian_noise(
    layer: jax.Array | int,
    length: jax.Array | float,
    key: jax.Array | None = None,
    *,
    n_layers: int,
    d_model: int,
    span: Span = "all",
    frozen: bool = False,
) -> Intervention:
    """Adds a Gaussian direction of norm `length`, fresh at every position and step (Fig. 4, noise).

    Args:
      layer: see `add_vector`.
      length: norm of what is added.
      key: of the draw. Rows that share it have the same noise.
      n_layers: L of the model.
      d_model: D of the model.
      span: see `no_intervention`.
      frozen: one direction at all positions and steps instead.

    Returns:
      One row.
    """
    strength = _one_hot(layer, n_layers) * _number(length, "length")
    term = Noise(strength, frozen=jnp.ones(n_layers, bool) if frozen else None)
    return dataclasses.replace(no_intervention(n_layers, d_model, span, key), terms=(term,))


def frozen_noise(
    layer: jax.Array | int, length: jax.Array | float, *, n_layers: int, d_model: int, span: Span = "all"
) -> Intervention:
    """`gaussian_noise` that is the same at all positions and steps of a row."""
    return gaussian_noise(layer, length, n_layers=n_layers, d_model=d_model, span=span, frozen=True)


def noise_within(
    directions: jax.Array,
    layer: jax.Array | int,
    length: jax.Array | float,
    key: jax.Array | None = None,
    *,
    n_layers: int,
    span: Span = "all",
) -> Intervention:
    """Adds a Gaussian direction of norm `length` inside a subspace, fresh at every position and step.

    Args:
      directions: [D], or [R, D] for the subspace that they span; of any length, orthonormalised here. R is static.
      layer: see `add_vector`.
      length: norm of what is added.
      key: see `gaussian_noise`.
      n_layers: L of the model.
      span: see `no_intervention`.

    Returns:
      One row.

    Raises:
      ValueError: a direction is zero or traced.
    """
    return _within_rows(_basis(directions), True, layer, length, key, n_layers, span)


def noise_part_within(
    directions: jax.Array,
    layer: jax.Array | int,
    length: jax.Array | float,
    key: jax.Array | None = None,
    *,
    n_layers: int,
    span: Span = "all",
) -> Intervention:
    """Adds the part inside a subspace that isotropic noise of norm `length` has: N(0, length^2 / D) along a direction.

    Arguments and errors are those of `noise_within`.
    """
    return _within_rows(_basis(directions), False, layer, length, key, n_layers, span)


def matched_noise(
    factor: jax.Array,
    layer: jax.Array | int,
    length: jax.Array | float,
    key: jax.Array | None = None,
    *,
    n_layers: int,
    span: Span = "all",
) -> Intervention:
    """Adds a direction of norm `length` drawn with a covariance, fresh at every position and step.

    Args:
      factor: [D] or [R, D], U of the covariance U^T U, of which only the shape matters; e.g. the singular vectors of
        centred activations, each times its singular value.
      layer: see `add_vector`.
      length: norm of what is added.
      key: see `gaussian_noise`.
      n_layers: L of the model.
      span: see `no_intervention`.

    Returns:
      One row.

    Raises:
      ValueError: the factor is zero or not finite.
    """
    factor = _checked_vector(factor, 1, 2)
    factor = factor.reshape(-1, factor.shape[-1])
    if not np.any(np.asarray(factor)):
        raise ValueError("the factor is zero, expected a covariance with which something can be drawn")
    return _within_rows(factor / jnp.max(jnp.abs(factor)), True, layer, length, key, n_layers, span)


def noise_outside(
    directions: jax.Array,
    layer: jax.Array | int,
    length: jax.Array | float,
    key: jax.Array | None = None,
    *,
    n_layers: int,
    span: Span = "all",
) -> Intervention:
    """Adds a Gaussian direction of norm `length` without its component in a subspace, fresh at every position and step.

    Arguments and errors are those of `noise_within`.
    """
    basis, here = _basis(directions), _one_hot(layer, n_layers)
    term = NoiseOutside(here * _number(length, "length"), here[:, None, None] * basis)
    return dataclasses.replace(no_intervention(n_layers, basis.shape[-1], span, key), terms=(term,))


def clamp(
    direction: jax.Array, layer: jax.Array | int, value: jax.Array | float, *, n_layers: int, span: Span = "all"
) -> Intervention:
    """Sets the component along a direction to a value at the output of block `layer`.

    Args:
      direction: [D], of any length, scaled to norm 1 here.
      layer: see `add_vector`.
      value: of the component, in the scale of the residual stream. May be traced.
      n_layers: L of the model.
      span: see `no_intervention`.

    Returns:
      One row.

    Raises:
      ValueError: the direction is zero or traced.
    """
    unit, here = _basis(_checked_vector(direction, 1))[0], _one_hot(layer, n_layers)
    term = Clamp(here, here[:, None] * unit, here * _number(value, "value"))
    return dataclasses.replace(no_intervention(n_layers, unit.shape[-1], span), terms=(term,))


def when_token(row: Intervention, ids: Collection[int], vocab_size: int) -> Intervention:
    """The row, acting only where the input token is one of a set.

    Args:
      row: a single row.
      ids: token ids, each in 0..vocab_size - 1.
      vocab_size: V, the same in all rows of a batch.

    Raises:
      ValueError: there is no id, or one is outside of the vocabulary.
    """
    wrong = [i for i in ids if not 0 <= i < vocab_size]
    if not ids or wrong:
        raise ValueError(f"ids={wrong or list(ids)}, expected at least one, each in 0..{vocab_size - 1}")
    tokens = np.zeros(vocab_size, bool)
    tokens[list(ids)] = True
    return dataclasses.replace(row, token_gate=TokenGate(jnp.asarray(tokens)))


def when_component(row: Intervention, direction: jax.Array, threshold: jax.Array | float) -> Intervention:
    """The row, acting in each layer only where the activation's component along a direction is above a threshold.

    Args:
      row: a single row.
      direction: [D], of any length, scaled to norm 1 here; minus the direction for "below minus the threshold".
      threshold: in the scale of the residual stream. May be traced.

    Raises:
      ValueError: the direction is zero or traced.
    """
    unit = _basis(_checked_vector(direction, 1))[0]
    everywhere = jnp.ones(row.n_layers)
    gate = ComponentGate(everywhere[:, None] * unit, everywhere * _number(threshold, "threshold"))
    return dataclasses.replace(row, component_gate=gate)


def keeping_norm(row: Intervention) -> Intervention:
    """The row, after whose terms the stream is scaled to the norm that it had before them."""
    return dataclasses.replace(row, keeps_norm=jnp.ones(row.span.shape[:-1], bool))


def ablate(
    directions: jax.Array,
    layers: Sequence[int] | None = None,
    share: jax.Array | float = 1.0,
    *,
    n_layers: int,
    span: Span = "all",
) -> Intervention:
    """Removes the component in a subspace from the output of `layers`.

    Later blocks may write the component anew, so that its absence is certain only where all of them are ablated.

    Args:
      directions: [D], or [R, D] for the subspace that they span; of any length, orthonormalised here. R is static.
      layers: blocks, 0-based; None for all.
      share: of the component that is removed; 1 removes it all. May be traced.
      n_layers: L of the model.
      span: see `no_intervention`.

    Returns:
      One row.

    Raises:
      ValueError: a direction is zero (where it is not traced), or no layer is given.
    """
    directions = _checked_vector(directions, 1, 2)
    directions = directions.reshape(-1, directions.shape[-1])
    if isinstance(directions, Tracer):
        scaled = directions / jnp.max(jnp.abs(directions), axis=-1, keepdims=True)  # float32 may not hold its squares
        basis = jnp.linalg.qr(scaled.T)[0].T
    else:
        if not np.all(np.any(np.asarray(directions), axis=-1)):
            raise ValueError("the direction is zero, expected one along which something can be removed")
        basis = jnp.asarray(orthonormal(np.asarray(directions)))
    if layers is not None and not len(layers):
        raise ValueError("layers=[], expected at least one, or None for all")
    chosen = range(n_layers) if layers is None else layers
    here = jnp.max(jnp.stack([_one_hot(layer, n_layers) for layer in chosen]), axis=0)
    term = Ablate(here * _number(share, "share"), here[:, None, None] * basis)
    return dataclasses.replace(no_intervention(n_layers, directions.shape[-1], span), terms=(term,))


def ablate_from(
    direction: jax.Array, layer: int, share: jax.Array | float = 1.0, *, n_layers: int, span: Span = "all"
) -> Intervention:
    """`ablate` in block `layer` and all later ones, so that nothing writes the component anew."""
    return ablate(direction, range(layer, n_layers), share, n_layers=n_layers, span=span)


def stack_rows(rows: Sequence[Intervention]) -> Intervention:
    """Batch of B rows out of B single rows of the same model, with every kind of term that one of them has.

    Raises:
      ValueError: no row is given, or they are not of one model.
    """
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *with_same_terms(rows))


def with_same_terms(rows: Sequence[Intervention]) -> list[Intervention]:
    """The same rows, each with every kind of term that one of them has, at strength zero where it was not there.

    What is compiled depends on the kinds of terms and on their shapes, so rows that are treated like this once make
    batches of one program.

    Raises:
      ValueError: as `stack_rows`.
    """
    sizes = {row.shape for row in rows}
    if len(sizes) != 1 or len(min(sizes)) != 2:
        raise ValueError(f"the rows have the shapes {sorted(sizes)}, expected (layers, width), the same in all rows")
    different = {id(term): term for row in rows for term in row.terms}  # rows of a condition share theirs
    by_kind: dict[type[Term], list[Term]] = {}
    for term in different.values():
        by_kind.setdefault(type(term), []).append(term)
    filled = {id(term): _filled(term, terms) for terms in by_kind.values() for term in terms}
    shapes = {kind: _largest_shapes([filled[id(term)] for term in terms]) for kind, terms in by_kind.items()}
    grown = {at: _grown(filled[at], shapes[type(term)]) for at, term in different.items()}
    # Zeros, not strength zero alone: another row's values may not be finite.
    nothing = {kind: jax.tree.map(jnp.zeros_like, grown[id(terms[0])]) for kind, terms in by_kind.items()}
    with_terms = [
        dataclasses.replace(row, terms=_in_order(nothing | {type(term): grown[id(term)] for term in row.terms}))
        for row in rows
    ]
    return _with_same_gates(with_terms)


def _with_same_gates(rows: Sequence[Intervention]) -> list[Intervention]:
    """The same rows, with a gate that is open everywhere where another row has one."""
    sizes = {row.token_gate.tokens.shape for row in rows if row.token_gate is not None}
    if len(sizes) > 1:
        raise ValueError(f"the rows have token gates of the sizes {sorted(sizes)}, expected one vocabulary")
    every = TokenGate(jnp.ones(min(sizes), bool)) if sizes else None
    L, D = rows[0].shape
    gated = any(row.component_gate is not None for row in rows)
    open_everywhere = ComponentGate(jnp.zeros((L, D)), jnp.full(L, -jnp.inf)) if gated else None
    changes_norm = jnp.zeros((), bool) if any(row.keeps_norm is not None for row in rows) else None
    return [
        dataclasses.replace(
            row,
            token_gate=row.token_gate or every,
            component_gate=row.component_gate or open_everywhere,
            keeps_norm=changes_norm if row.keeps_norm is None else row.keeps_norm,
        )
        for row in rows
    ]


def _filled(term: Term, others: Sequence[Term]) -> Term:
    """The term with arrays where others of its kind have some and it has None: zeros, and all positions."""
    arrays: dict[str, Any] = {}
    for field in dataclasses.fields(term):
        found = [value for other in others if (value := getattr(other, field.name)) is not None]
        if found and getattr(term, field.name) is None:
            nothing = jnp.zeros_like(found[0])
            arrays[field.name] = nothing.at[..., 1].set(END) if field.name == "during" else nothing
    return dataclasses.replace(term, **arrays) if arrays else term


def _largest_shapes(terms: Sequence[Term]) -> list[tuple[int, ...]]:
    """Shape of each array of a kind of terms that holds all of them: directions of ablations differ in R."""
    leaves = zip(*map(jax.tree.leaves, terms), strict=True)
    return [tuple(np.max([leaf.shape for leaf in of_terms], axis=0).tolist()) for of_terms in leaves]


def _grown(term: Term, shapes: Sequence[tuple[int, ...]]) -> Term:
    """The term with zeros appended to its arrays up to these shapes; itself if it has them."""
    leaves, structure = jax.tree.flatten(term)
    if all(leaf.shape == shape for leaf, shape in zip(leaves, shapes, strict=True)):
        return term
    widths = [np.subtract(shape, leaf.shape) for leaf, shape in zip(leaves, shapes, strict=True)]
    padded = [jnp.pad(leaf, [(0, n) for n in more]) for leaf, more in zip(leaves, widths, strict=True)]
    return jax.tree.unflatten(structure, padded)


def _in_order(terms: Mapping[type[Term], Term]) -> tuple[Term, ...]:
    """The same order in every batch, since it is a part of what is compiled."""
    return tuple(terms[kind] for kind in sorted(terms, key=lambda kind: (kind.__qualname__, kind.__module__)))


def _checked(term: Term, delta: jax.Array, x: jax.Array) -> jax.Array:
    """The delta; ValueError if it would spread over rows or dimensions."""
    B, T, D = x.shape
    if delta.shape not in ((B, T, D), (B, 1, D)):
        raise ValueError(
            f"{type(term).__name__}.delta has shape {delta.shape}, expected {(B, T, D)} (rows, positions, width) "
            f"or {(B, 1, D)}"
        )
    return delta


def _inside(span: jax.Array, positions: jax.Array) -> jax.Array:
    """[B, T] bool, positions in [start, stop) of a span [B, 2]; none where it is not resolved."""
    start, stop = span[:, :1], span[:, 1:]
    return (start >= 0) & (positions >= start) & (positions < stop)


def _norm(x: jax.Array) -> jax.Array:
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return jnp.sqrt(jnp.where(square == 0, 1.0, square))  # a norm of 0 has no derivative


def _within_rows(
    directions: jax.Array,
    normalised: bool,
    layer: jax.Array | int,
    length: jax.Array | float,
    key: jax.Array | None,
    n_layers: int,
    span: Span,
) -> Intervention:
    here = _one_hot(layer, n_layers)
    term = NoiseWithin(here * _number(length, "length"), here[:, None, None] * directions, here * float(normalised))
    return dataclasses.replace(no_intervention(n_layers, directions.shape[-1], span, key), terms=(term,))


def _basis(directions: jax.Array) -> jax.Array:
    """Orthonormal [R, D] of concrete directions [D] or [R, D]; ValueError if one is zero or traced."""
    if isinstance(directions, Tracer):
        raise ValueError("the directions are traced, expected concrete ones: they are orthonormalised on the host")
    vectors = np.asarray(_checked_vector(directions, 1, 2))
    if not np.all(np.any(vectors, axis=-1)):
        raise ValueError("the direction is zero, expected one along which something can be done")
    return jnp.asarray(orthonormal(vectors.reshape(-1, vectors.shape[-1])))


def _are_traced(*rows: Intervention) -> bool:
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(rows))


@jax.ensure_compile_time_eval()  # a program that is being traced may add concrete rows
def _check_sum(left: Intervention, right: Intervention) -> None:
    """ValueError where the sum of concrete rows would not be both changes, for their keys."""
    if _are_traced(left, right):
        return
    noisy = _acting(right, [term for term in right.terms if term.draws])
    if jnp.any(noisy) and jnp.any(noisy & (left.key != right.key)):
        raise ValueError(
            "the right operand's noise has a key of its own, but the sum draws from the left one's; expected the noise "
            "on the left, or the same key in both"
        )


def _acting(row: Intervention, terms: Sequence[Term]) -> jax.Array:
    """[B] bool, or a scalar for a single row: whether any of the terms does something."""
    nothing = jnp.zeros(row.span.shape[:-1], bool)
    return functools.reduce(operator.or_, (jnp.any(term.strength != 0, axis=-1) for term in terms), nothing)


@jax.ensure_compile_time_eval()
def _same_spans(left: Intervention, right: Intervention) -> bool:
    """Whether the left operand's span is that of both, or nothing is known of them."""
    if _are_traced(left, right):
        return True
    return not bool(jnp.any(_acting(right, right.terms) & jnp.any(left.span != right.span, axis=-1)))


@jax.ensure_compile_time_eval()
def _on_own_span(row: Intervention) -> Intervention:
    """The same row, whose terms have the span that it had; it covers all positions."""
    everywhere = jnp.broadcast_to(jnp.asarray(_span_bounds("all"), jnp.int32), row.span.shape)
    if any(term.during is not None for term in row.terms) and jnp.any(row.span != everywhere):
        raise ValueError(
            "an operand has a span and terms with spans of their own, expected the span `all` beside those"
        )
    over = [
        dataclasses.replace(
            term, during=jnp.broadcast_to(row.span[..., None, :], (*term.strength.shape, 2)).astype(jnp.int32)
        )
        if term.during is None
        else term
        for term in row.terms
    ]
    return dataclasses.replace(row, span=everywhere, terms=tuple(over))


def _same_during(left: Term, right: Term) -> bool:
    """Whether two terms act at the same positions, as far as that is known."""
    if left.during is None or right.during is None:
        return left.during is right.during
    if isinstance(left.during, Tracer) or isinstance(right.during, Tracer):
        return True
    return bool(np.array_equal(left.during, right.during))


def _span_bounds(span: Span) -> tuple[int, int]:
    named = {"all": (0, END), "prompt": (0, PROMPT_END), "generated": (PROMPT_END, END)}
    if not isinstance(span, str):
        start, stop = map(operator.index, span)
        if not 0 <= start < stop:
            raise ValueError(f"span={span!r} selects no position; expected 0 <= start < stop")
        return start, min(stop, int(END))
    if span in named:
        return named[span]
    if not (found := re.fullmatch(r"generated\[(\d+):(\d+)\]", span)) or int(found[1]) >= int(found[2]):
        raise ValueError(
            f"span={span!r}, expected one of {sorted(named)}, generated positions such as 'generated[2:18]', or "
            "absolute positions (start, stop)"
        )
    return PROMPT_END - int(found[1]), PROMPT_END - int(found[2])


def _one_hot(layer: jax.Array | int, n_layers: int) -> jax.Array:
    # A traced layer has no value yet to be looked at.
    if not isinstance(layer, Tracer) and (value := np.asarray(layer).tolist()) not in range(n_layers):
        raise ValueError(f"layer={value!r} is outside 0..{n_layers - 1}")
    return (jnp.arange(n_layers) == layer).astype(jnp.float32)


def _checked_vector(vector: jax.Array, *n_axes: int) -> jax.Array:
    vector = jnp.asarray(vector, jnp.float32)
    if vector.ndim not in n_axes:
        raise ValueError(f"vector has shape {vector.shape}, expected [d_model]" + " or [R, d_model]" * (2 in n_axes))
    if not isinstance(vector, Tracer) and not np.isfinite(vector).all():
        raise ValueError("the vector is not finite, expected finite numbers")
    return vector


def _number(value: jax.Array | float, name: str) -> jax.Array:
    if jnp.shape(value):
        raise ValueError(f"{name} has shape {jnp.shape(value)}, expected one number; a batch has rows for more")
    if not isinstance(value, Tracer) and not np.isfinite(np.asarray(value, np.float32)):
        raise ValueError(f"{name}={value!r}, expected a finite number")
    return jnp.asarray(value, jnp.float32)
