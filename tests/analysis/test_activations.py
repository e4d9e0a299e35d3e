"""Activations at single positions against hidden states of torch."""

import dataclasses

import numpy as np
import pytest

from backtrack_jax.analysis import activations
from backtrack_jax.extract import TokenTrace

pytest.importorskip("torch", reason="needs torch and transformers to compare with")

from torch_reference import tiny_llama, torch_copy, torch_residuals

pytestmark = pytest.mark.hf

MODEL = tiny_llama()
LENGTHS = (40, 100, 7, 64)
IDS = [np.random.default_rng(n).integers(0, MODEL.config.vocab_size, n).tolist() for n in LENGTHS]
TRACES = [TokenTrace(str(n), ids, 1, []) for n, ids in enumerate(IDS)]


@pytest.mark.parametrize("layers", [(0,), (1, 0), (0, 2)])
def test_activations_are_those_of_torch_at_every_position(layers):
    """Ragged traces in two buckets, an incomplete batch; layers in any order, with and without the last one."""
    reference = torch_copy(MODEL)
    at = [np.array([0, n // 2, n - 1]) if n != 7 else np.array([], int) for n in LENGTHS]
    found = dict(pair for batch in activations.read(MODEL, TRACES, at, layers, batch_size=3) for pair in batch)
    assert sorted(found) == list(range(len(TRACES)))
    for i, ids in enumerate(IDS):
        expected = torch_residuals(reference, ids)[list(layers)][:, at[i]]
        assert found[i].shape == (len(at[i]), len(layers), MODEL.config.d_model)
        np.testing.assert_allclose(np.moveaxis(found[i], 0, 1), expected, rtol=1e-4, atol=1e-4)


def test_activations_hold_no_more_memory_than_they_say():
    [batch] = activations.read(MODEL, TRACES[:1], [np.array([0, 1])], (0,), batch_size=1)
    assert batch[0][1].base is None


def test_a_token_beyond_the_vocabulary_is_refused():
    trace = dataclasses.replace(TRACES[0], ids=[1, MODEL.config.vocab_size])
    with pytest.raises(ValueError, match=rf"has the token id {MODEL.config.vocab_size}, expected 0 to"):
        next(activations.read(MODEL, [trace], [np.array([0])], (0,), batch_size=1))


@pytest.mark.parametrize(
    ("layers", "position", "named"),
    [
        ((-1,), 0, "layer=-1 is outside 0..2"),
        ((0, 3), 0, "layer=3 is outside 0..2"),
        ((0,), 40, "asked for position 40"),
    ],
)
def test_what_a_model_or_trace_does_not_have_is_refused(layers, position, named):
    with pytest.raises(ValueError, match=named):
        next(activations.read(MODEL, TRACES[:1], [np.array([position])], layers, batch_size=1))
