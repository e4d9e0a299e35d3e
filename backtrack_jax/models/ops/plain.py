"""The operations of a model as they are defined: what `tuned` computes faster, and equals within rounding.

Axes as in `decoder`. Factors are multiplied in the dtype of the weights; sums are float32.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Part = tuple[jax.Array, jax.Array, jax.Array]
"""Keys [B, K, H, S], values [B, K, S, H], and which of them a query may attend to, [B, T, S] bool."""


def einsum(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """`jnp.einsum`, summed in float32; float32 factors are not rounded to TF32 or bfloat16, as accelerators would."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=jnp.float32)


def matmul(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x W of x [..., in], rounded to the dtype of W [in, out]: [..., out] float32."""
    return einsum("...i,io->...o", x.astype(weight.dtype), weight)


def unembed(x: jax.Array, weight: jax.Array) -> jax.Array:
    """W_U x of x [..., D], rounded to the dtype of W_U [V, D]: [..., V] float32."""
    return einsum("...d,vd->...v", x.astype(weight.dtype), weight)


def lookup(table: jax.Array, index: jax.Array | int) -> jax.Array:
    """table[index], along the first axis."""
    return table[index]


def attend(q: jax.Array, *parts: Part) -> jax.Array:
    """Softmax attention of queries [B, T, K, G, H], scaled, over all parts together: [B, T, N * H] float32.

    What a query that may attend to nothing (padding) reads means nothing.
    """
    keys, values, masks = zip(*parts, strict=True)
    k, v, mask = jnp.concatenate(keys, 3), jnp.concatenate(values, 2), jnp.concatenate(masks, 2)
    scores = einsum("BKQH,BKHS->BKQS", rows_of_queries(q), k)
    seen = jnp.repeat(mask, q.shape[3], axis=1)[:, None]
    weights = jax.nn.softmax(jnp.where(seen, scores, -1e30), axis=-1)
    return tokens_of_rows(einsum("BKQS,BKSH->BKQH", weights.astype(v.dtype), v), q.shape[1])


def rows_of_queries(q: jax.Array) -> jax.Array:
    """[B, T, K, G, H] to [B, K, Q, H]: the Q = T * G queries of a key head are the rows of one matrix."""
    B, T, K, G, H = q.shape
    return jnp.moveaxis(q, 2, 1).reshape(B, K, T * G, H)


def tokens_of_rows(z: jax.Array, T: int) -> jax.Array:
    """[B, K, Q, H] to [B, T, N * H]."""
    B, K, Q, H = z.shape
    return jnp.moveaxis(z.reshape(B, K, T, Q // T, H), 1, 2).reshape(B, T, -1)


def attend_causally(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """`attend` of tokens to each other: keys are in the columns of the queries, and none may see a later column."""
    return attend(q, (k, v, mask))


def scan_blocks(body: Callable, x: jax.Array, blocks: Any, others: tuple[Any, ...]) -> tuple[jax.Array, Any]:
    """`lax.scan` of body(x, (block, *others)) over the first of the stacked blocks, as many as `others` are long."""
    n = len(jax.tree.leaves(others)[0])
    return lax.scan(body, x, (jax.tree.map(lambda leaf: leaf[:n], blocks), *others))


def compiler_options(dtype: jnp.dtype) -> dict[str, str]:
    """Options with which a program of many rows, and weights of this dtype, is compiled."""
    return {}


def unstacks(blocks: Any) -> bool:
    """Whether the blocks are taken out of their stack before a loop over tokens, in which they then run one by one."""
    return False
