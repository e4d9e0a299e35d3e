"""The kinds of changes to the residual stream, one class each: what is added at the output of a block.

A new kind is a class like those below.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from backtrack_jax.models.ops.targets import branches


@dataclasses.dataclass(frozen=True)
class Term(abc.ABC):
    """One kind of change. Every array leads with the axes of `strength`: [B, L] in a batch, [L] in a single row.

    Attributes:
      strength: [B, L] float32, how much is done in which layer. At 0 nothing is, and `delta` is zero.
      during: [B, L, 2] int32, positions [start, stop) at which it acts, where these are fewer than the row's; coded as
        `Intervention.span` is. None for all of them.
    """

    draws: ClassVar[bool] = False
    """Whether `delta` depends on the row's key."""

    strength: jax.Array
    during: jax.Array | None = dataclasses.field(default=None, kw_only=True)

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
            self, strength=strength, directions=jnp.asarray(orthonormal(np.concatenate(both, axis=-2)))
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Noise(Term):
    """Adds a Gaussian direction, fresh at every position and step; `strength` is its length.

    The draw depends on key, layer and position alone, so it is the same in any batch and the same with a cache as
    without.

    Attributes:
      frozen: [B, L] bool, True for one direction at all positions of a row; None for none. Rows with one key share it.
    """

    draws: ClassVar[bool] = True

    frozen: jax.Array | None = dataclasses.field(default=None, kw_only=True)

    def delta(self, x: jax.Array, layer: jax.Array, positions: jax.Array, key: jax.Array) -> jax.Array:
        """Strength * e / |e|, where e ~ N(0, I)."""
        if self.frozen is not None:
            positions = jnp.where(self.frozen[:, None], 0, positions)
        return _drawn(_isotropic, self.strength, key, layer, positions, x)

    def plus(self, other: Any) -> Self:
        """Both lengths of the one direction that a key draws; ValueError if one of them is frozen."""
        if self.frozen is not None or other.frozen is not None:
            return super().plus(other)
        return dataclasses.replace(self, strength=self.strength + other.strength)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NoiseWithin(Term):
    """Adds a Gaussian direction z^T U of a subspace, z ~ N(0, I_R), fresh at every position and step.

    Attributes:
      strength: length of what is added, or, of what is not `normalised`, of the isotropic noise whose part it is.
      directions: [B, L, R, D] float32, U: orthonormal for noise inside a subspace, or scaled, for noise with the
        covariance U^T U; zero where there are fewer than R.
      normalised: [B, L] float32, 1 for z^T U scaled to norm 1, 0 for z^T U / sqrt(D), which is what isotropic noise
        has along orthonormal directions.
    """

    draws: ClassVar[bool] = True

    directions: jax.Array
    normalised: jax.Array

    def delta(self, x: jax.Array, layer: jax.Array, positions: jax.Array, key: jax.Array) -> jax.Array:
        """Strength * z^T U / |z^T U|, or strength * z^T U / sqrt(D)."""
        return _drawn(_within, self.strength, key, layer, positions, x, self.directions, self.normalised)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NoiseOutside(Term):
    """Adds a Gaussian direction without its component in a subspace, fresh at every position and step.

    Attributes:
      strength: length of what is added.
      directions: [B, L, R, D] float32, orthonormal, or zero where there are fewer than R.
    """

    draws: ClassVar[bool] = True

    directions: jax.Array

    def delta(self, x: jax.Array, layer: jax.Array, positions: jax.Array, key: jax.Array) -> jax.Array:
        """Strength * e / |e|, where e is what N(0, I) draws less its projection."""
        return _drawn(_outside, self.strength, key, layer, positions, x, self.directions)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Clamp(Term):
    """Sets the component of the activation along a direction to a value.

    Attributes:
      strength: share of the change that is made; 1 makes it all.
      direction: [B, L, D] float32, of norm 1.
      value: [B, L] float32, in the scale of the residual stream.
    """

    direction: jax.Array
    value: jax.Array

    def delta(self, x: jax.Array, layer: jax.Array, positions: jax.Array, key: jax.Array) -> jax.Array:
        """Strength * (value - u . x) u."""
        component = jnp.einsum("btd,bd->bt", x, self.direction, precision="highest")
        change = self.strength[:, None] * (self.value[:, None] - component)
        return change[..., None] * self.direction[:, None]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _drawn(draw: Callable[..., jax.Array], strength: jax.Array, *arguments: jax.Array) -> jax.Array:
    """What is drawn, on a CPU left out of layers where no row has noise: drawing costs more than a small model's block.

    Elsewhere it costs little, and a branch in every layer of a decode step may be decided on the host.
    """
    x = arguments[3]
    some = lambda: strength[:, None, None] * draw(*arguments)  # noqa: E731
    if not branches():
        return some()
    return lax.cond(jnp.any(strength != 0), some, lambda: jnp.zeros_like(x))


@_drawn.defjvp
def _drawn_jvp(
    draw: Callable[..., jax.Array], primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[jax.Array, jax.Array]:
    """The derivative of noise that is drawn, which is not zero where the strength is."""

    def always(strength: jax.Array, *arguments: jax.Array) -> jax.Array:
        return strength[:, None, None] * draw(*arguments)

    return _drawn(draw, *primals), jax.jvp(always, primals, tangents)[1]


def _gaussian(key: jax.Array, layer: jax.Array, positions: jax.Array, x: jax.Array) -> jax.Array:
    """N(0, 1) in x's shape [B, T, D], functions of (row key, layer, position) alone."""

    def draw(row_key: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(row_key, position), x.shape[-1:], jnp.float32)

    row_keys = jax.vmap(lambda k: jax.random.fold_in(k, layer))(key)
    return jax.vmap(jax.vmap(draw, (None, 0)), (0, 0))(row_keys, positions)


def _isotropic(key: jax.Array, layer: jax.Array, positions: jax.Array, x: jax.Array) -> jax.Array:
    """Unit vectors [B, T, D]."""
    e = _gaussian(key, layer, positions, x)
    return e / jnp.linalg.norm(e, axis=-1, keepdims=True)


def _within(
    key: jax.Array,
    layer: jax.Array,
    positions: jax.Array,
    x: jax.Array,
    directions: jax.Array,
    normalised: jax.Array,
) -> jax.Array:
    """Vectors [B, T, D] of a subspace; zero where it has no direction."""
    R, D = directions.shape[1:]
    # The first R of D numbers: as many as R alone would be others in a batch whose largest R is larger.
    z = _gaussian(key, layer, positions, x)[..., :R]
    e = jnp.einsum("btr,brd->btd", z, directions, precision="highest")
    square = jnp.sum(e * e, axis=-1, keepdims=True)
    unit = e / jnp.sqrt(jnp.where(square == 0, 1.0, square))
    return jnp.where(normalised[:, None, None] != 0, unit, e / np.sqrt(D))


def _outside(key: jax.Array, layer: jax.Array, positions: jax.Array, x: jax.Array, directions: jax.Array) -> jax.Array:
    """Unit vectors [B, T, D] without a component along directions."""
    e = _gaussian(key, layer, positions, x)
    components = jnp.einsum("btd,brd->btr", e, directions, precision="highest")
    e = e - jnp.einsum("btr,brd->btd", components, directions, precision="highest")
    square = jnp.sum(e * e, axis=-1, keepdims=True)
    return e / jnp.sqrt(jnp.where(square == 0, 1.0, square))


def orthonormal(directions: np.ndarray) -> np.ndarray:
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
