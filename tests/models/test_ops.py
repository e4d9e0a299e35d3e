"""Tuned operations equal the plain ones, in values and gradients; and the door chooses by what is compiled for."""

import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from backtrack_jax.models import ops
from backtrack_jax.models.attention import causal_mask
from backtrack_jax.models.ops import plain, tuned

DECISIONS = {"compiler_options", "unstacks"}  # compute nothing
B, T, S, K, G, H = 2, 150, 40, 2, 3, 8  # two chunks of queries
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.02, "float16": 0.003}


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).standard_normal(shape)


def attend(form: Any, q: Any, k: Any, v: Any, past_k: Any, past_v: Any) -> jax.Array:
    """New tokens beside cached ones; of the cache, slots from 30 on are empty."""
    new = jnp.arange(30, 30 + T)[None]
    old = jnp.where(jnp.arange(S) < 30, jnp.arange(S), -1)[None]
    masks = (jnp.repeat(causal_mask(new, keys), B, axis=0) for keys in (old, new))
    return form.attend(q, (past_k, past_v, next(masks)), (k, v, next(masks)))


def attend_causally(form: Any, q: Any, k: Any, v: Any) -> jax.Array:
    return form.attend_causally(q, k, v, jnp.broadcast_to(jnp.tril(jnp.ones((T, T), bool)), (B, T, T)))


def scan_blocks(form: Any, x: Any, weight: Any, bias: Any, *, n: int) -> jax.Array:
    def body(x: jax.Array, scanned: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
        (weight, bias), layer = scanned
        x = jnp.tanh(plain.matmul(x, weight) + bias.astype(jnp.float32) + layer)
        return x, jnp.sum(x)

    last, sums = form.scan_blocks(body, x.astype(jnp.float32), (weight, bias), (jnp.arange(n, dtype=jnp.float32),))
    return jnp.concatenate([last.ravel(), sums])


QUERIES, KEYS, VALUES = draw(B, T, K, G, H), draw(B, K, H, T), draw(B, K, T, H)
CASES: dict[str, list[tuple[Callable[..., jax.Array], tuple[np.ndarray, ...]]]] = {
    "attend": [(attend, (QUERIES, KEYS, VALUES, draw(B, K, H, S), draw(B, K, S, H)))],
    "attend_causally": [(attend_causally, (QUERIES, KEYS, VALUES))],
    "lookup": [
        (lambda form, table: form.lookup(table, jnp.array([[3, 0, 3], [9, 1, 2]])), (draw(10, 7),)),
        (lambda form, table: form.lookup(table, 4), (draw(5, 3, 2),)),
    ],
    "scan_blocks": [
        (lambda form, *given, n=n: scan_blocks(form, *given, n=n), (draw(4, 6), draw(5, 6, 6), draw(5, 6)))
        for n in (5, 3)
    ],
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("op", "case"),
    [pytest.param(*case, id=f"{name}{n}") for name, cases in CASES.items() for n, case in enumerate(cases)],
)
def test_tuned_equals_plain(op: Callable[..., jax.Array], case: tuple[np.ndarray, ...], dtype: str) -> None:
    inputs = tuple(jnp.asarray(array, dtype) for array in case)

    def value_and_gradients(form: Any) -> list[np.ndarray]:
        def total(*inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
            out = op(form, *inputs)
            return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

        run = jax.jit(jax.grad(total, tuple(range(len(inputs))), has_aux=True))
        gradients, out = run(*inputs)
        return [np.asarray(array, np.float64) for array in (out, *gradients)]

    for ours, expected in zip(value_and_gradients(tuned), value_and_gradients(plain), strict=True):
        assert np.linalg.norm(expected) > 0
        assert np.linalg.norm(ours - expected) <= TOLERANCE[dtype] * np.linalg.norm(expected)


def test_every_tuned_operation_is_compared_and_has_the_plain_one_s_signature() -> None:
    assert tuned.PLATFORMS.keys() == CASES.keys() | DECISIONS
    for name in tuned.PLATFORMS:
        signatures = [inspect.signature(getattr(form, name)) for form in (plain, tuned, ops)]
        assert signatures[0] == signatures[1] == signatures[2], name


def test_the_door_follows_what_is_compiled_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the same function was compiled for another platform before."""
    monkeypatch.setattr(tuned, "lookup", lambda table, index: table[index] + 1)
    program = jax.jit(lambda table: ops.lookup(table, 0))
    seen = []
    for platform in ("cpu", "gpu", "cpu", "tpu"):
        with ops.compiling_for(platform):
            seen.append(float(program(jnp.zeros(1))))
            assert bool(ops.compiler_options(jnp.dtype("float32"))) == (platform == "cpu")
    assert seen == [1, 0, 1, 0]
    assert ops.target().platform == jax.default_backend()


def test_a_platform_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match="platform='cuda', expected cpu, gpu or tpu"), ops.compiling_for("cuda"):
        pass


@pytest.mark.parametrize(("asked", "expected"), [("all", "0 False"), ("compiler_options", "0 True"), ("", "1 True")])
def test_the_environment_asks_for_plain_operations(asked: str, expected: str) -> None:
    program = (
        "from backtrack_jax.models import ops; import jax.numpy; n = ops.compiler_options(jax.numpy.dtype('float32'))"
    )
    program += "; print(len(n), ops.unstacks(()))"
    environment = os.environ | {"BACKTRACK_PLAIN_OPS": asked, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == expected, done.stderr
