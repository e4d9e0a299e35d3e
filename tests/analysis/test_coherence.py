"""Likelihood of replies and activations of single tokens, against torch."""

from collections.abc import Sequence

import jax
import numpy as np
import pytest
from helpers import hf_llama, save

from backtrack_jax.analysis import activations, coherence, forced
from backtrack_jax.extract import TokenTrace
from backtrack_jax.models import checkpoint
from backtrack_jax.models.decoder import Decoder

pytestmark = pytest.mark.hf

RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, 131, n).tolist() for n in (3, 9, 1, 60, 5)]
REPLIES = [RNG.integers(0, 131, n).tolist() for n in (7, 2, 11, 8, 0)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, Decoder]:
    oracle = hf_llama()
    return oracle, checkpoint.load(str(save(oracle, tmp_path_factory.mktemp("model"))), dtype="float32")


def test_likelihoods_are_those_of_torch(pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of two buckets, in an incomplete batch, with logits in one piece and position by position."""
    import torch

    oracle, model = pair
    for at_once in (1 << 27, 1):
        monkeypatch.setattr(forced, "_LOGITS_AT_ONCE", at_once)
        jax.clear_caches()
        found = dict(row for rows in coherence.log_likelihoods(model, PROMPTS, REPLIES, batch_size=3) for row in rows)
        assert sorted(found) == [0, 1, 2, 3, 4] and np.isnan(found[4])
        for row in range(4):
            ids = torch.tensor([PROMPTS[row] + REPLIES[row]])
            logp = torch.log_softmax(oracle(ids).logits[0, :-1], -1)
            chosen = logp.gather(1, ids[0, 1:, None])[len(PROMPTS[row]) - 1 :, 0]
            assert len(chosen) == len(REPLIES[row])
            assert found[row] == pytest.approx(float(chosen.mean()), rel=1e-4)


def test_batches_that_are_done_are_left_out(pair) -> None:
    _, model = pair
    whole = list(coherence.log_likelihoods(model, PROMPTS[:4], REPLIES[:4], batch_size=2))
    done = {row for row, _ in whole[0]}
    assert list(coherence.log_likelihoods(model, PROMPTS[:4], REPLIES[:4], batch_size=2, done=done)) == whole[1:]


def test_a_token_beyond_the_vocabulary_is_refused(pair) -> None:
    """JAX would take the last row of the embedding for it."""
    _, model = pair
    V = model.config.vocab_size
    with pytest.raises(ValueError, match=rf"row 1 has the token id {V}, expected 0 to {V - 1}"):
        next(coherence.log_likelihoods(model, [PROMPTS[0], [V]], REPLIES[:2], batch_size=2))


def block_output(oracle, layer: int, ids: Sequence[int]) -> np.ndarray:
    """By a hook: the last of transformers' hidden states is the one after the final norm."""
    import torch

    kept = []
    handle = oracle.model.layers[layer].register_forward_hook(lambda module, inputs, out: kept.append(out))
    oracle(torch.tensor([ids]))
    handle.remove()
    out = kept[0][0] if isinstance(kept[0], tuple) else kept[0]
    return out[0].numpy()


def test_activations_are_those_of_torch(pair) -> None:
    oracle, model = pair
    traces = [TokenTrace(str(i), p + r, len(p), ()) for i, (p, r) in enumerate(zip(PROMPTS, REPLIES, strict=True))]
    at = [np.array([4, 9]), np.array([0, 10, 3]), np.array([], int), np.array([67]), np.array([1])]
    found = dict(row for rows in activations.read(model, traces, at, (2, 0), batch_size=3) for row in rows)
    assert sorted(found) == [0, 1, 2, 3, 4]
    for i, trace in enumerate(traces):
        expected = np.stack([block_output(oracle, layer, trace.ids)[at[i]] for layer in (2, 0)], axis=1)
        assert found[i].shape == (len(at[i]), 2, 40)
        np.testing.assert_allclose(found[i], expected, rtol=1e-4, atol=1e-4)


def test_positions_and_layers_are_checked(pair) -> None:
    _, model = pair
    trace = TokenTrace("a/0", [1, 2, 3], 1, ())
    with pytest.raises(ValueError, match=r"layer=3 is outside 0\.\.2"):
        list(activations.read(model, [trace], [np.array([0])], (3,), batch_size=1))
    with pytest.raises(ValueError, match="'a/0' has 3 tokens, asked for position 3"):
        list(activations.read(model, [trace], [np.array([3])], (0,), batch_size=1))
