"""Matrix products and look-ups of 16- and 32-bit weights: what they round, and what XLA's backends need to be fast."""

import dataclasses
import math
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

_T = TypeVar("_T")

KEPT = "kept"  # name of what a gradient may keep where it computes the rest again, see `kept`


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
    # As one row a token: XLA's CPU backend takes twice as long for a gradient of the weight that sums over two axes.
    rows = einsum(spec, x.astype(weight.dtype).reshape(-1, x.shape[-1]), weight)
    return rows.reshape(*x.shape[:-1], rows.shape[-1])


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
    x, gradient = cpu_barrier((x, gradient.astype(weight.dtype)))
    d_x = einsum(f"{result},{of_weight}->{of_x}", gradient, weight)
    factors = (x, gradient) if of_weight == of_x[-1] + result[-1] else (gradient, x)
    return d_x, _sum_over_tokens(*factors).astype(weight.dtype)


def _sum_over_tokens(a: jax.Array, b: jax.Array) -> jax.Array:
    """Sum of a^T b over all axes but the last, [..., i] and [..., o]: [i, o] float32.

    A CPU exchanges the axes of a first. Where those of b and of the result are less to move, it is given these.
    """
    n, i, o = math.prod(a.shape[:-1]), a.shape[-1], b.shape[-1]
    if n * i > n * o + i * o:
        return cpu_barrier(_sum_over_tokens(b, a)).T
    summed = tuple(range(a.ndim - 1))
    return jnp.tensordot(a, b, (summed, summed), preferred_element_type=jnp.float32)


_matmul_16_bit = jax.custom_vjp(_product_16_bit, nondiff_argnums=(0,))
_matmul_16_bit.defvjp(_matmul_16_bit_forward, _matmul_16_bit_backward)


def einsum(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """`jnp.einsum` with float32 accumulation and result; float32 inputs are multiplied in full float32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=jnp.float32)


def einsum_16_bit(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """`einsum` of 16-bit factors that have one summed letter, which XLA's CPU backend does not widen to float32.

    It widens factors whose axes it would have to exchange. Where two axes are summed it exchanges them before it looks,
    and one of the two may have length 1. Behind the barrier, or it would take an exchange of axes before the product
    into it, and stop at run time, since it has no such product. One after it needs a barrier as well.
    """
    inputs, result = spec.split("->")
    of_a, of_b = inputs.split(",")
    (summed,) = set(of_a) & set(of_b) - set(result)
    a, b = cpu_barrier((a, b))
    a, b = jnp.expand_dims(a, of_a.index(summed)), jnp.expand_dims(b, of_b.index(summed))
    return einsum(spec.replace(summed, "z" + summed), a, b)


def cpu_barrier(x: _T) -> _T:
    """x; XLA's CPU backend computes it before what follows. Others are free to make one computation of both."""
    return lax.platform_dependent(x, cpu=lax.optimization_barrier, default=lambda x: x)


def kept(x: jax.Array) -> jax.Array:
    """x; a gradient that computes again only what is cheap (`Recompute.CHEAP`) keeps it.

    16-bit numbers are kept as integers on a CPU, since XLA would widen them there. These have no derivative, so only
    what nobody differentiates may come here: what the forward rule of a `jax.custom_vjp` hands to the backward one.
    Who differentiates that rule, for a second derivative, is refused.
    """
    if jax.default_backend() != "cpu" or x.dtype.itemsize != 2:
        return checkpoint_name(x, KEPT)
    integers = lax.bitcast_convert_type(_differentiated_once(x), jnp.uint16)
    return lax.bitcast_convert_type(checkpoint_name(integers, KEPT), x.dtype)


@jax.custom_jvp
def _differentiated_once(x: jax.Array) -> jax.Array:
    return x


@_differentiated_once.defjvp
def _refuse_second_derivative(primals: Any, tangents: Any) -> Any:
    raise TypeError(
        "a second derivative through 16-bit products is not to be had on a CPU; expected float32 weights and dtype=None"
    )


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
