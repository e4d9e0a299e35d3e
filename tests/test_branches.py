"""What the decode loop holds: no branch and no inner loop for kinds of sampling and edits that are static."""

from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from torch_reference import CONFIG, tiny_llama, unit_vectors

from backtrack_jax.generate import Sampling, generate, row_key
from backtrack_jax.intervention import ablate, add_vector, gaussian_noise, no_intervention, stack_rows
from backtrack_jax.models.ops import targets
from backtrack_jax.sampling import sample

L, D, V = CONFIG.n_layers, CONFIG.d_model, CONFIG.vocab_size
MODEL = tiny_llama()
U = unit_vectors(1, D)[0]


def primitives(jaxpr: Any) -> Counter[str]:
    """How often each primitive stands in a program, inner ones included; what a scan over blocks holds, once."""
    found: Counter[str] = Counter()
    for equation in jaxpr.eqns:
        found[equation.primitive.name] += 1
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    found += primitives(inner)
    return found


def decode_loop(sampling: Sampling, rows: list[Any], platform: str) -> Counter[str]:
    """Primitives of the body of the loop over new tokens, as traced for a platform."""
    n = len(rows)
    ids, positions = jnp.zeros((n, 4), jnp.int32), jnp.tile(jnp.arange(4), (n, 1))
    keys = jnp.stack([row_key(0, "p", i) for i in range(n)])
    stops, edits = jnp.zeros(1, jnp.int32), stack_rows(rows)
    with targets.compiling_for(platform):
        traced = jax.make_jaxpr(lambda s: generate(MODEL, ids, positions, keys, edits, s, stops, max_new_tokens=4))(
            sampling
        )
    # The first token is drawn before the loop, by a loop of its own with top-p.
    loop = [e for e in traced.jaxpr.eqns if e.primitive.name == "while"][-1]
    return primitives(loop.params["body_jaxpr"].jaxpr)


ADDED = [add_vector(U, 1, 3.0, n_layers=L), no_intervention(L, D), ablate(U, n_layers=L)]
NOISY = [*ADDED, gaussian_noise(1, 3.0, n_layers=L, d_model=D)]


@pytest.mark.parametrize(
    ("steps", "rows", "platform", "branches", "loops"),
    [
        ((), ADDED, "gpu", 0, 0),
        (("draw",), ADDED, "gpu", 0, 0),
        (("draw",), ADDED, "cpu", 0, 0),
        (("draw",), NOISY, "gpu", 0, 0),
        (("draw",), NOISY, "tpu", 0, 0),
        (("draw", "top_p"), ADDED, "gpu", 0, 1),
        (("draw", "top_k"), ADDED, "gpu", 0, 0),
    ],
)
def test_the_decode_loop_has_no_branch(
    steps: tuple[str, ...], rows: list[Any], platform: str, branches: int, loops: int
) -> None:
    """And one loop, with top-p; top-k takes 32 steps, a scan. On a CPU a branch leaves noise out of layers."""
    sampling = Sampling(jnp.float32(0.7), jnp.float32(0.9), jnp.int32(5), steps=steps)
    found = decode_loop(sampling, rows, platform)
    assert (found["cond"], found["while"]) == (branches, loops), found
    assert found["dot_general"] > 7  # it is the model's loop


def test_what_is_not_known_is_decided_on_the_device() -> None:
    found = decode_loop(Sampling(jnp.float32(0.7), jnp.float32(0.9), jnp.int32(5)), ADDED, "gpu")
    assert found["cond"] == 3 and found["while"] == 1


@pytest.mark.parametrize(
    ("values", "steps"),
    [
        ((0.0, 1.0, 0), ()),
        ((0.0, 0.5, 3), ()),
        ((0.7, 1.0, 0), ("draw",)),
        ((0.7, 0.9, 0), ("draw", "top_p")),
        ((0.7, 1.0, 4), ("draw", "top_k")),
        ((np.array([0.0, 0.7]), np.array([1.0, 0.9]), np.array([2, 0])), ("draw", "top_k", "top_p")),
    ],
)
def test_known_samplings_draw_the_same_tokens(values: tuple[Any, ...], steps: tuple[str, ...]) -> None:
    """As the program that decides on the device, for many distributions, keys and steps."""
    rng = np.random.default_rng(0)
    known = Sampling(*values).known()
    assert known.steps == steps and known.known() is known
    drawn = jax.jit(sample)
    for step in range(40):
        logits = jnp.asarray(rng.normal(0, 3, (2, V)), jnp.float32)
        keys = jax.vmap(jax.random.key)(jnp.arange(2) + 7 * step)
        arguments = (logits, keys, jnp.int32(step))
        found = drawn(arguments[0], known, *arguments[1:])
        np.testing.assert_array_equal(found, drawn(arguments[0], Sampling(*values), *arguments[1:]))
    traced = jax.jit(lambda t: Sampling(t).known().steps is None)(0.7)
    assert bool(traced)


def test_noise_is_the_same_with_and_without_the_branch() -> None:
    ids, positions = jnp.zeros((4, 6), jnp.int32), jnp.tile(jnp.arange(6), (4, 1))
    rows = stack_rows(NOISY).resolve(jnp.full(4, 3))
    found = []
    for platform in ("cpu", "gpu"):
        with targets.compiling_for(platform):
            found.append(np.asarray(MODEL(ids, positions, intervention=rows).resid))
    np.testing.assert_allclose(*found, rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(found[1][1], np.asarray(MODEL(ids, positions).resid)[1])
