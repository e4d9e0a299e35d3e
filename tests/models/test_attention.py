"""Attention that sees no cache, against PyTorch's in float64: forward and backward."""

import functools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from backtrack_jax.models import attention
from backtrack_jax.models.attention import attend_causally, may_see

torch = pytest.importorskip("torch", reason="needs torch to compare with")

B, T, K, G, H = 3, 300, 2, 3, 16  # three chunks of queries, of which the last is cut short
RNG = np.random.default_rng(0)
Q, KEYS, VALUES, D_Z = (
    RNG.standard_normal(shape).astype(np.float32)
    for shape in ((B, T, K, G, H), (B, K, H, T), (B, K, T, H), (B, T, K * G * H))
)


def mask_of(layout: str) -> np.ndarray:
    """[B, T, T]; of rows that are full, padded on the left, padded on the right, or hold two sequences each."""
    positions = np.broadcast_to(np.arange(T), (B, T)).copy()
    segments = np.zeros((B, T), int)
    if layout == "left":
        positions = np.stack([np.arange(T) - pad for pad in (0, 40, 170)])
    elif layout == "right":
        for row, length in enumerate((T, 129, 5)):
            positions[row, length:] = -1
    elif layout == "packed":
        for row, cut in enumerate((100, 128, 290)):
            positions[row, cut:] -= cut
            segments[row, cut:] = 1
    positions = np.maximum(positions, -1)
    return np.asarray(may_see(jnp.asarray(positions), jnp.asarray(positions))) & (
        segments[:, :, None] == segments[:, None, :]
    )


def expected(dtype: jnp.dtype, mask: np.ndarray) -> list[np.ndarray]:
    """Result and gradients of the rounded inputs, in float64; queries that may see nothing give nothing."""
    q, k, v = (
        torch.tensor(np.asarray(jnp.asarray(a, dtype), np.float64), requires_grad=True) for a in (Q, KEYS, VALUES)
    )
    some = torch.tensor(mask.any(-1))
    z = torch.nn.functional.scaled_dot_product_attention(
        q.permute(0, 2, 3, 1, 4).reshape(B, K * G, T, H),
        k.transpose(2, 3).repeat_interleave(G, dim=1),
        v.repeat_interleave(G, dim=1),
        attn_mask=torch.tensor(mask)[:, None] | ~some[:, None, :, None],
        scale=1.0,
    )
    z = z.transpose(1, 2).reshape(B, T, -1) * some[:, :, None]
    z.backward(torch.tensor(D_Z, dtype=torch.float64))
    assert q.grad is not None and k.grad is not None and v.grad is not None
    return [a.detach().numpy() for a in (z, q.grad, k.grad, v.grad)]


@pytest.mark.parametrize("layout", ["full", "left", "right", "packed"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 0.01), (jnp.float16, 0.002)], ids=str
)
def test_attention_and_its_gradients_are_those_of_torch(dtype: jnp.dtype, tolerance: float, layout: str) -> None:
    mask = mask_of(layout)
    some = np.any(mask, axis=-1)[:, :, None]
    z, backward = jax.vjp(
        jax.jit(functools.partial(attend_causally, mask=jnp.asarray(mask))),
        *(jnp.asarray(a, dtype) for a in (Q, KEYS, VALUES)),
    )
    found = [z * some, *backward(jnp.asarray(D_Z * some))]
    for name, a, b in zip(("z", "d_q", "d_k", "d_v"), found, expected(dtype, mask), strict=True):
        error = np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)
        assert error < tolerance, (name, error)


def compiled_products(text: str) -> Counter[tuple[str, ...]]:
    """How often a compiled program multiplies factors of these dtypes."""
    dtypes = dict(re.findall(r"(%[\w.-]+) = (\w+)\[", text))
    return Counter(tuple(dtypes[name] for name in dot) for dot in re.findall(r" dot\((%[\w.-]+), (%[\w.-]+)\)", text))


def test_16_bit_gradients_are_products_of_16_bit_factors() -> None:
    """XLA's CPU backend would widen some to float32, at half the speed, which it does not with a plain product."""
    mask = jnp.asarray(mask_of("full"))
    inputs = [jnp.asarray(a, jnp.bfloat16) for a in (Q, KEYS, VALUES)]
    gradient = jax.grad(lambda q, k, v: jnp.sum(attend_causally(q, k, v, mask) * D_Z), (0, 1, 2))
    lowered = jax.jit(gradient).lower(*inputs)
    products = [line for line in lowered.as_text().splitlines() if "stablehlo.dot_general" in line]
    assert len(products) == 3 * (2 + 5)
    assert all(line.count("xbf16>") == 2 for line in products)
    matrix = jnp.ones((128, 128), jnp.bfloat16)
    plain = jax.jit(lambda a: jnp.dot(a, a, preferred_element_type=jnp.float32)).lower(matrix).compile()
    (dtypes,) = compiled_products(plain.as_text() or "")
    assert compiled_products(lowered.compile().as_text() or "") == {dtypes: len(products)}


@pytest.mark.parametrize("layout", ["full", "left"])
def test_second_derivatives_in_16_bits_are_right_or_refused(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused on a CPU, where 16-bit numbers are kept as integers, which have no derivative."""
    mask = mask_of(layout)
    some = np.any(mask, axis=-1)[:, :, None]

    def twice(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        read = functools.partial(attend_causally, mask=jnp.asarray(mask))
        gradients = jax.grad(lambda q, k, v: jnp.sum(jnp.sin(read(q, k, v) * some)), (0, 1, 2))
        return sum((jnp.sum(jnp.cos(g)) for g in gradients(q, k, v)), start=jnp.zeros(()))

    def second(dtype: jnp.dtype) -> tuple[jax.Array, ...]:
        rounded = (jnp.asarray(a, jnp.bfloat16).astype(dtype) for a in (Q, KEYS, VALUES))
        return jax.jit(jax.grad(twice, (0, 1, 2)))(*rounded)

    with pytest.raises(TypeError, match=r"second derivative through 16-bit products .* expected float32"):
        second(jnp.bfloat16)
    monkeypatch.setattr(attention, "kept", lambda x: x)  # as on other backends
    for found, exact in zip(second(jnp.bfloat16), second(jnp.float32), strict=True):
        assert np.linalg.norm(found.astype(jnp.float32) - exact) < 0.03 * np.linalg.norm(exact)


@pytest.mark.parametrize(
    ("key_heads", "group", "head_dim", "tokens"),
    [(1, 1, 2, 2), (2, 2, 64, 2), (2, 2, 8, 24), (3, 1, 64, 129), (1, 4, 16, 256)],
)
def test_16_bit_gradients_of_other_shapes(key_heads: int, group: int, head_dim: int, tokens: int) -> None:
    """Not scaled, so that one key has nearly all the weight: there a gradient is a small difference."""
    rng = np.random.default_rng(0)
    inputs = [
        rng.standard_normal((2, *shape))
        for shape in (
            (tokens, key_heads, group, head_dim),
            (key_heads, head_dim, tokens),
            (key_heads, tokens, head_dim),
        )
    ]
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((tokens, tokens), bool)), (2, tokens, tokens))

    def gradients(dtype: jnp.dtype) -> tuple[jax.Array, ...]:
        total = lambda q, k, v: jnp.sum(jnp.sin(attend_causally(q, k, v, mask)))  # noqa: E731
        return jax.jit(jax.grad(total, (0, 1, 2)))(*(jnp.asarray(a, jnp.bfloat16).astype(dtype) for a in inputs))

    for rounded, exact in zip(gradients(jnp.bfloat16), gradients(jnp.float32), strict=True):
        assert np.linalg.norm(rounded.astype(jnp.float32) - exact) < 0.02 * np.linalg.norm(exact)
