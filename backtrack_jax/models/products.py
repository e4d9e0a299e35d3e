"""Matrix products and look-ups of 16- and 32-bit weights: what they round, and what XLA's backends need to be fast."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax


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


def matmul(x: jax.Array, weight: jax.Array | Adapted, spec: str = "...d,df->...f") -> jax.Array:
    """Product in the weight's dtype with float32 accumulation and result.

    float32 inputs are multiplied in full float32: accelerators would otherwise round them to TF32 or bfloat16.
    Gradients of a 16-bit product are 16-bit products too, likewise accumulated in float32.
    """
    if isinstance(weight, Adapted):
        return matmul(x, weight.weight, spec) + matmul(matmul(x, weight.a, spec), weight.b, spec)
    if weight.dtype.itemsize == 2:
        return _matmul_16_bit(spec, x, weight)
    return einsum(spec, x.astype(weight.dtype), weight)


def _product_16_bit(spec: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    return einsum(spec, x.astype(weight.dtype), weight)


def _matmul_16_bit_forward(spec: str, x: jax.Array, weight: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _product_16_bit(spec, x, weight), (x.astype(weight.dtype), weight)


def _matmul_16_bit_backward(
    spec: str, kept: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Left to itself, JAX would multiply the float32 gradient by the 16-bit factor, in float32."""
    x, weight = kept
    inputs, result = spec.split("->")
    of_x, of_weight = inputs.split(",")
    # XLA's CPU backend sums over several axes in 16 bits, over one in 32; and without the barrier it would compute the
    # factors column by column, since it exchanges their axes first.
    x, gradient = lax.optimization_barrier((x, gradient.astype(weight.dtype)))
    d_x = einsum(f"{result},{of_weight}->{of_x}", gradient, weight)
    tokens = tuple(range(x.ndim - 1))
    factors = (x, gradient) if of_weight == of_x[-1] + result[-1] else (gradient, x)
    d_weight = jnp.tensordot(*factors, (tokens, tokens), preferred_element_type=jnp.float32)
    return d_x, d_weight.astype(weight.dtype)


_matmul_16_bit = jax.custom_vjp(_product_16_bit, nondiff_argnums=(0,))
_matmul_16_bit.defvjp(_matmul_16_bit_forward, _matmul_16_bit_backward)


def einsum(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """`jnp.einsum` with float32 accumulation and result; float32 inputs are multiplied in full float32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=jnp.float32)


def take(table: jax.Array, index: jax.Array | int) -> jax.Array:
    """table[index]; on CPU, 16-bit floats are looked up as integers, since XLA would widen the whole table first."""
    if jax.default_backend() != "cpu" or table.dtype.itemsize != 2:
        return table[index]
    return _take_as_integers(table, jnp.asarray(index))


@jax.custom_jvp
def _take_as_integers(table: jax.Array, index: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(lax.bitcast_convert_type(table, jnp.uint16)[index], table.dtype)


@_take_as_integers.defjvp
def _take_tangent(primals: tuple[jax.Array, jax.Array], tangents: Any) -> tuple[jax.Array, jax.Array]:
    """As of table[index]: integers have no derivative."""
    return _take_as_integers(*primals), tangents[0][primals[1]]


def random_param(rngs: nnx.Rngs, shape: tuple[int, ...], dtype: jnp.dtype) -> nnx.Param:
    """Normal numbers of standard deviation 0.02."""
    return nnx.Param((0.02 * jax.random.normal(rngs.params(), shape, jnp.float32)).astype(dtype))
