"""What is done to the residual stream: one pytree of traced values, per row and per layer.

At the output of every block (`resid_post`), at every position t inside the row's span,

    x <- x + sum over the row's terms of term.delta(x)

All terms see the same x, the block's own output. `Add` adds a vector, `Amplify` the activation's own direction, `Noise`
a Gaussian direction drawn afresh at every position and step, and `Ablate` removes the component in a subspace. Because
vector, layer, length and span are values and not code, every condition of an experiment is a *row* of one batch through
one compiled program; static is only which kinds of terms the batch has. A row is built by one of the constructors
below, rows combine with `+`, and `stack_rows` makes the batch.

A new term is a class like those below.
"""

import abc
import dataclasses
import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

PROMPT_END = -1  # in `span`, stands for the row's prompt length until `resolve` puts the number there
END = np.iinfo(np.int32).max  # in `span`, no upper limit

Span = str | tuple[int, int]  # "all", "prompt", "generated", or absolute (start, stop)


@dataclasses.dataclass(frozen=True)
class Term(abc.ABC):
    """One kind of change. Every array leads with the axes of `strength`: [B, L] in a batch, [L] in a single row.

    Attributes:
      strength: [B, L] float32, how much is done in which layer. At 0 nothing is, and `delta` is zero.
    """

    draws: ClassVar[bool] = False
    """Whether `delta` depends on the row's key."""

    strength: jax.Array

    @abc.abstractmethod
    def delta(self, x: jax.Array, layer: jax.Array, positions: jax.Array, key: jax.Array) -> jax.Array:
        """What is added to one block's output; called on the term at that layer, without the axis L.

        Args:
          x: [B, T, D] float32, the residual stream after the block.
          layer: int32 scalar, the block's number.
          positions: [B, T] int32, absolute positions, negative at padding.
          key: [B] typed PRNG keys.

        Returns:
          [B, T, D] or [B, 1, D] float32, for positions inside and outside of spans.
        """

    def plus(self, other: Any) -> Self:
        """Both terms, of one class, combined into one, for sums of rows; ValueError if they cannot be."""
        raise ValueError(f"both operands have a term {type(self).__name__}, but a row can have only one")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Add(Term):
    """Adds a vector.

    Attributes:
      strength: share of the vector that is added, 1 in the layers that `add_vector` was asked for.
      vector: [B, L, D] float32, what is added, in the scale of the residual stream: its length is in it.
    """

    vector: jax.Array

    def delta(self, x: jax.Array, layer: jax.Array, positions: jax.Array, key: jax.Array) -> jax.Array:
        """Strength * vector."""
        return (self.strength[:, None] * self.vector)[:, None]

    def plus(self, other: Any) -> Self:
        """One addition of the sum."""
        vector = self.strength[..., None] * self.vector + other.strength[..., None] * other.vector
        strength = ((self.strength != 0) | (other.strength != 0)).astype(jnp.float32)
        return dataclasses.replace(self, strength=strength, vector=vector)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Amplify(Term):
    """Adds the activation's own unit vector; `strength` is the length that is added."""

    def delta(self, x: jax.Array, layer: jax.Array, positions: jax.Array, key: jax.Array) -> jax.Array:
        """Strength * x / |x|."""
        square = jnp.sum(x * x, axis=-1, keepdims=True)
        own_direction = x / jnp.sqrt(jnp.where(square == 0, 1.0, square))  # a norm of 0 has no derivative
        return self.strength[:, None, None] * own_direction

    def plus(self, other: Any) -> Self:
        """Both lengths."""
        return dataclasses.replace(self, strength=self.strength + other.strength)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ablate(Term):
    """Removes the component of the activation in a subspace of R dimensions.

    Attributes:
      strength: share of the component that is removed; 1 removes it all, a negative one adds to it.
      directions: [B, L, R, D] float32, orthonormal, or zero where there are fewer than R.
    """

    directions: jax.Array

    def delta(self, x: jax.Array, layer: jax.Array, positions: jax.Array, key: jax.Array) -> jax.Array:
        """-strength * U^T U x, of the directions U [R, D]."""
        components = jnp.einsum("btd,brd->btr", x, self.directions, precision="highest")
        removed = jnp.einsum("btr,brd->btd", components, self.directions, precision="highest")
        return -self.strength[:, None, None] * removed

    @jax.ensure_compile_time_eval()  # a program that is being traced may add concrete rows
    def plus(self, other: Any) -> Self:
        """One ablation of the subspace that the directions of both span."""
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((self, other))):
            raise ValueError("both operands ablate, and their values are traced; `ablate` takes several directions")
        left, right = np.asarray(self.strength), np.asarray(other.strength)
        if np.any(unlike := (left != 0) & (right != 0) & (left != right)):
            at = tuple(np.argwhere(unlike)[0])
            raise ValueError(
                f"the operands ablate the shares {left[at]:g} and {right[at]:g} in layer {at[-1]}, but a row removes "
                "one share per layer; expected the same share in both"
            )
        both = [
            np.asarray(term.directions) * (np.asarray(term.strength) != 0)[..., None, None] for term in (self, other)
        ]
        strength = jnp.asarray(np.where(left != 0, left, right))
        return dataclasses.replace(
            self, strength=strength, directions=jnp.asarray(_orthonormal(np.concatenate(both, axis=-2)))
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Noise(Term):
    """Adds a Gaussian direction, fresh at every position and step; `strength` is its length.

    The draw depends on key, layer and position alone, so it is the same in any batch and the same with a cache as
    without.
    """

    draws: ClassVar[bool] = True

    def delta(self, x: jax.Array, layer: jax.Array, positions: jax.Array, key: jax.Array) -> jax.Array:
        """Strength * e / |e|, where e ~ N(0, I)."""
        return _noise(self.strength, key, layer, positions, x)

    def plus(self, other: Any) -> Self:
        """Both lengths of the one direction that a key draws."""
        return dataclasses.replace(self, strength=self.strength + other.strength)


_Term = TypeVar("_Term", bound=Term)


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
    """

    terms: tuple[Term, ...]
    span: jax.Array
    key: jax.Array
    n_layers: int = dataclasses.field(metadata={"static": True})
    d_model: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, L, D); of a single row (L, D)."""
        return (*self.span.shape[:-1], self.n_layers, self.d_model)

    def term(self, kind: type[_Term]) -> _Term | None:
        """The term of a kind, if there is one."""
        return next((term for term in self.terms if type(term) is kind), None)

    def __add__(self, other: "Intervention") -> "Intervention":
        """Both changes at once, on the left operand's span and key.

        Two additions become one of the summed vector, and two ablations one of the subspace that their directions span.

        Raises:
          ValueError: if the operands are not of one model and number of rows. Or if the sum would not equal both
            changes: two ablations of different shares in one layer, or a right operand with a span or a noise key of
            its own; the last two not under `jax.jit` or `jax.vmap`, where the values are not known.
        """
        if self.shape != other.shape:
            raise ValueError(
                f"the operands have the shapes {self.shape} and {other.shape}, expected the same; "
                "add rows first, then stack them"
            )
        _check_sum(self, other)
        summed: dict[type[Term], Term] = {type(term): term for term in self.terms}
        for term in other.terms:
            mine = summed.get(type(term))
            summed[type(term)] = term if mine is None else mine.plus(term)
        return dataclasses.replace(self, terms=_in_order(summed))

    def resolve(self, prompt_length: jax.Array) -> Self:
        """Puts each row's prompt length ([B] int32, in tokens with BOS) where the span says `prompt` or `generated`."""
        length = jnp.asarray(prompt_length, jnp.int32)[..., None]
        return dataclasses.replace(self, span=jnp.where(self.span == PROMPT_END, length, self.span))

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

    def check_resolved(self) -> None:
        """ValueError if a concrete span waits for the prompt's length."""
        if isinstance(self.span, Tracer):
            return
        if rows := np.flatnonzero(np.any(np.asarray(self.span) == PROMPT_END, axis=-1)).tolist():
            raise ValueError(
                f"the spans of rows {rows} are `prompt` or `generated`, and the prompt's length is not known here: "
                "call `resolve` with it first, or `generate`, which does"
            )

    def unresolved(self) -> jax.Array:
        """[B] bool, whether a row's span waits for the prompt's length."""
        return jnp.any(self.span == PROMPT_END, axis=-1)

    def changes_before(self, position: jax.Array | int) -> jax.Array:
        """[B] bool, whether a row, its span resolved, may change anything before a position ([B] int32 or one)."""
        strengths = [jnp.any(term.strength != 0, axis=-1) for term in self.terms]
        something = functools.reduce(operator.or_, strengths, jnp.zeros(self.span.shape[:-1], bool))
        return something & (self.span[..., 0] < position)

    def at_layers(self) -> tuple[Term, ...]:
        """The terms with the layer axis first, to be scanned over beside the model's blocks."""
        return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), self.terms)

    def apply(self, x: jax.Array, at_layer: tuple[Term, ...], layer: jax.Array, positions: jax.Array) -> jax.Array:
        """One block's output after the change.

        Args:
          x: [B, T, D] float32, the residual stream after the block.
          at_layer: the terms at this layer, without the axis L.
          layer: int32 scalar, the block's number.
          positions: [B, T] int32 absolute positions, negative at padding, which is never changed.

        Returns:
          [B, T, D] float32; x to the bit outside the span and where all strengths are zero.
        """
        if not at_layer:
            return x
        deltas = [_checked(term, term.delta(x, layer, positions, self.key), x) for term in at_layer]
        start, stop = self.span[:, :1], self.span[:, 1:]
        inside = (start >= 0) & (positions >= start) & (positions < stop)  # nowhere if the span is not resolved
        return jnp.where(inside[..., None], x + functools.reduce(operator.add, deltas), x)


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
) -> Intervention:
    """Adds a Gaussian direction of norm `length`, fresh at every position and step (Fig. 4, noise)."""
    term = Noise(_one_hot(layer, n_layers) * _number(length, "length"))
    return dataclasses.replace(no_intervention(n_layers, d_model, span, key), terms=(term,))


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
        basis = jnp.asarray(_orthonormal(np.asarray(directions)))
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
    shapes = {kind: _largest_shapes(terms) for kind, terms in by_kind.items()}
    grown = {at: _grown(term, shapes[type(term)]) for at, term in different.items()}
    # Zeros, not strength zero alone: another row's values may not be finite.
    nothing = {kind: jax.tree.map(jnp.zeros_like, grown[id(terms[0])]) for kind, terms in by_kind.items()}
    return [
        dataclasses.replace(row, terms=_in_order(nothing | {type(term): grown[id(term)] for term in row.terms}))
        for row in rows
    ]


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


@jax.custom_jvp
def _noise(strength: jax.Array, key: jax.Array, layer: jax.Array, positions: jax.Array, x: jax.Array) -> jax.Array:
    """`_drawn_noise`, left out of layers where no row has noise: drawing costs more than a small model's block."""
    draw = lambda: _drawn_noise(strength, key, layer, positions, x)  # noqa: E731
    return lax.cond(jnp.any(strength != 0), draw, lambda: jnp.zeros_like(x))


@_noise.defjvp
def _noise_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
    """The derivative of noise that is drawn, which is not zero where the strength is."""
    return _noise(*primals), jax.jvp(_drawn_noise, primals, tangents)[1]


def _drawn_noise(
    strength: jax.Array, key: jax.Array, layer: jax.Array, positions: jax.Array, x: jax.Array
) -> jax.Array:
    """strength [B] times unit vectors of x's shape [B, T, D], functions of (row key, layer, position) alone."""

    def draw(row_key: jax.Array, position: jax.Array) -> jax.Array:
        e = jax.random.normal(jax.random.fold_in(row_key, position), x.shape[-1:], jnp.float32)
        return e / jnp.linalg.norm(e)

    row_keys = jax.vmap(lambda k: jax.random.fold_in(k, layer))(key)
    return strength[:, None, None] * jax.vmap(jax.vmap(draw, (None, 0)), (0, 0))(row_keys, positions)


@jax.ensure_compile_time_eval()  # a program that is being traced may add concrete rows
def _check_sum(left: Intervention, right: Intervention) -> None:
    """ValueError where the sum of concrete rows would not be both changes, for their spans or keys."""
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((left, right))):
        return

    def acting(terms: Sequence[Term]) -> jax.Array:
        rows = jnp.zeros(right.span.shape[:-1], bool)
        return functools.reduce(operator.or_, (jnp.any(term.strength != 0, axis=-1) for term in terms), rows)

    if jnp.any(acting(right.terms) & jnp.any(left.span != right.span, axis=-1)):
        raise ValueError(
            f"the operands have the spans {left.span.tolist()} and {right.span.tolist()} ({PROMPT_END} is the prompt's "
            f"end, {END} no end), but the sum has the left one; expected the same span in both"
        )
    noisy = acting([term for term in right.terms if term.draws])
    if jnp.any(noisy) and jnp.any(noisy & (left.key != right.key)):
        raise ValueError(
            "the right operand's noise has a key of its own, but the sum draws from the left one's; expected the noise "
            "on the left, or the same key in both"
        )


def _orthonormal(directions: np.ndarray) -> np.ndarray:
    """Orthonormal rows that span the same as given ones [..., R, D], float32; fewer than R are followed by zeros.

    R is cut to the largest number of rows that are not zero.
    """
    directions = directions.astype(np.float64)
    norms = np.linalg.norm(directions, axis=-1, keepdims=True)
    basis = np.zeros_like(directions)
    for r, direction in enumerate(np.moveaxis(directions / np.where(norms == 0, 1, norms), -2, 0)):
        for _ in range(2):  # once leaves what rounding made of nearly equal directions
            direction = direction - np.einsum("...rd,...re,...e->...d", basis, basis, direction)
        norm = np.linalg.norm(direction, axis=-1, keepdims=True)
        basis[..., r, :] = np.where(norm > 1e-6, direction / np.where(norm == 0, 1, norm), 0)
    present = np.any(basis, axis=-1)
    first = np.argsort(~present, axis=-1, kind="stable")[..., None]
    return np.take_along_axis(basis, first, axis=-2)[..., : np.sum(present, axis=-1).max(), :].astype(np.float32)


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
