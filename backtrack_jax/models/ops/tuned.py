"""The operations of `plain`, as XLA's backends run them fast.

Each says which behaviour of XLA it works around, and `docs/measurements/ops.md` what it gains: an operation that gains
nothing any more is to be deleted. Seen with jaxlib 0.10.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import backtrack_jax.models.ops.plain as plain
from backtrack_jax.models.ops.plain import Part, einsum, rows_of_queries, tokens_of_rows
from backtrack_jax.models.ops.targets import target

PLATFORMS = {
    "lookup": ("cpu",),
    "attend": ("cpu", "gpu", "tpu"),
    "attend_causally": ("cpu", "gpu", "tpu"),
    "scan_blocks": ("cpu", "gpu", "tpu"),
    "compiler_options": ("cpu",),
    "unstacks": ("cpu", "gpu"),
}
"""Operations of this module, and the platforms on which they take the place of the plain ones."""

_QUERY_CHUNK = 128  # queries of a causal chunk, at least; shorter ones make products too small to be fast
_MAX_CHUNKS = 16  # since each adds to the compilation


def lookup(table: jax.Array, index: jax.Array | int) -> jax.Array:
    """16-bit floats are looked up as integers, since XLA's CPU backend would widen the whole table to float32 first."""
    if table.dtype.itemsize != 2:
        return table[index]
    return _lookup_as_integers(table, jnp.asarray(index))


@jax.custom_jvp
def _lookup_as_integers(table: jax.Array, index: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(lax.bitcast_convert_type(table, jnp.uint16)[index], table.dtype)


@_lookup_as_integers.defjvp
def _lookup_tangent(primals: tuple[jax.Array, jax.Array], tangents: Any) -> tuple[jax.Array, jax.Array]:
    """As of table[index]: integers have no derivative."""
    return _lookup_as_integers(*primals), tangents[0][primals[1]]


def attend(q: jax.Array, *parts: Part) -> jax.Array:
    """Parts stay where they are: beside each other they would be a copy of the cache, in every block of every step."""
    rows, G = rows_of_queries(q), q.shape[3]
    keys, values, masks = zip(*parts, strict=True)
    seen = [jnp.repeat(mask, G, axis=1)[:, None] for mask in masks]
    scores = [jnp.where(s, einsum("BKQH,BKHS->BKQS", rows, k), -1e30) for k, s in zip(keys, seen, strict=True)]
    highest = functools.reduce(jnp.maximum, [jnp.max(score, axis=-1, keepdims=True) for score in scores])
    highest = lax.stop_gradient(highest)  # the result does not depend on it
    weights = [jnp.exp(score - highest) for score in scores]
    sums = [einsum("BKQS,BKSH->BKQH", w.astype(v.dtype), v) for w, v in zip(weights, values, strict=True)]
    total = functools.reduce(jnp.add, [jnp.sum(w, axis=-1, keepdims=True) for w in weights])
    return tokens_of_rows(functools.reduce(jnp.add, sums) / total, q.shape[1])


def attend_causally(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """In chunks of queries that do not look at the keys behind them.

    Half the scores are never computed, and those of one chunk are all that is held at a time.
    """
    T = q.shape[1]
    size = max(_QUERY_CHUNK, -(-T // _MAX_CHUNKS))
    chunks = []
    for start in range(0, T, size):
        of, seen = slice(start, start + size), slice(0, start + size)
        chunks.append(attend(q[:, of], (k[..., seen], v[:, :, seen], mask[:, of, seen])))
    return jnp.concatenate(chunks, axis=1)


def scan_blocks(body: Callable, x: jax.Array, blocks: Any, others: tuple[Any, ...]) -> tuple[jax.Array, Any]:
    """The weights of one layer are taken out in the loop's body.

    Of 16-bit weights XLA's CPU backend would otherwise widen all to float32 before the loop, 32 GB for an 8B model. The
    barrier keeps the taking where it is. And a part of the stack would be a copy.
    """
    leaves = jax.tree.leaves(blocks)
    n = len(jax.tree.leaves(others)[0])
    on_cpu = target().platform == "cpu"
    if n == len(leaves[0]) and not (on_cpu and any(leaf.dtype.itemsize == 2 for leaf in leaves)):
        return plain.scan_blocks(body, x, blocks, others)

    def step(x: jax.Array, scanned: tuple[Any, ...]) -> tuple[jax.Array, Any]:
        layer, others = scanned
        stacked, layer = lax.optimization_barrier((blocks, layer)) if on_cpu else (blocks, layer)
        take = lookup if on_cpu else plain.lookup
        return body(x, (jax.tree.map(lambda leaf: take(leaf, layer), stacked), *others))

    return lax.scan(step, x, (jnp.arange(n), others))


def compiler_options(dtype: jnp.dtype) -> dict[str, str]:
    """float32 products by Eigen, where XLA's CPU backend would give them to YNNPACK.

    That is the faster one for 16-bit floats and for the few rows of a decode step, but not for many rows of float32.
    """
    return {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"} if dtype == jnp.float32 else {}


def unstacks(blocks: Any) -> bool:
    """Under a scan XLA copies every block's weights and cache out of their stacks at every step.

    That is three times the bytes that a step needs; but not on a TPU, where they are read where they lie. One by one
    the blocks are taken out once, before the loop, at the price of a second copy of the weights and of a longer
    compilation. On a GPU only if that leaves room: if one copy takes no more than a third of its memory.
    """
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(blocks))
    return target().platform == "cpu" or 3 * size <= target().memory_bytes
