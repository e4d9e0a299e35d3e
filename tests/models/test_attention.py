"""Attention that sees no cache, against PyTorch's in float64: forward and backward."""

import functools
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from backtrack_jax.models.attention import packed_mask
from backtrack_jax.models.ops import plain, tuned

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
    if layout == "left":
        positions = np.stack([np.arange(T) - pad for pad in (0, 40, 170)])
    elif layout == "right":
        for row, length in enumerate((T, 129, 5)):
            positions[row, length:] = -1
    elif layout == "packed":
        for row, cut in enumerate((100, 128, 290)):
            positions[row, cut:] -= cut
    return np.asarray(packed_mask(jnp.asarray(np.maximum(positions, -1))))


def test_a_token_sees_those_before_it_in_its_own_sequence() -> None:
    mask = packed_mask(jnp.array([[-1, 0, 1, 0, 1, -1]]))
    np.testing.assert_array_equal(
        mask[0],
        [
            [0, 0, 0, 0, 0, 0],
            [0, 1, 0, 0, 0, 0],
            [0, 1, 1, 0, 0, 0],
            [0, 0, 0, 1, 0, 0],
            [0, 0, 0, 1, 1, 0],
            [0, 0, 0, 0, 0, 0],
        ],
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


@pytest.mark.parametrize("form", [plain, tuned], ids=["plain", "tuned"])
@pytest.mark.parametrize("layout", ["full", "left", "right", "packed"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 0.01), (jnp.float16, 0.002)], ids=str
)
def test_attention_and_its_gradients_are_those_of_torch(
    dtype: jnp.dtype, tolerance: float, layout: str, form: ModuleType
) -> None:
    mask = mask_of(layout)
    some = np.any(mask, axis=-1)[:, :, None].astype(np.float32)
    z, backward = jax.vjp(
        jax.jit(functools.partial(form.attend_causally, mask=jnp.asarray(mask))),
        *(jnp.asarray(a, dtype) for a in (Q, KEYS, VALUES)),
    )
    found = [z * some, *backward(jnp.asarray(D_Z * some))]
    for name, a, b in zip(("z", "d_q", "d_k", "d_v"), found, expected(dtype, mask), strict=True):
        error = np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)
        assert error < tolerance, (name, error)
