"""Eq. 2 against torch, and the keyword set by decoded text."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from helpers import hf_llama, save

from backtrack_jax.analysis.logit_lens import keyword_ids, logit_lens, word_ids
from backtrack_jax.models import checkpoint
from backtrack_jax.models.tokenizer import Tokenizer
from backtrack_jax.vectors import SteeringVector


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.json").write_text(json.dumps(tiny.tokenizer_json()), "utf-8")
    special = {"add_bos_token": True, "bos_token": tiny.BOS, "eos_token": tiny.EOS}
    (folder / "tokenizer_config.json").write_text(json.dumps(special), "utf-8")
    return Tokenizer.load(folder)


@pytest.mark.hf
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("final_norm", [False, True])
def test_scores_are_those_of_torch(tmp_path: Path, tied: bool, final_norm: bool) -> None:
    """W_U v with and without the final norm; rows of the embedding beyond the tokenizer's items do not count."""
    import torch

    oracle = hf_llama(tie_word_embeddings=tied)
    model = checkpoint.load(str(save(oracle, tmp_path)), dtype="float32")
    v = 3 * np.random.default_rng(0).standard_normal((5, 40)).astype(np.float32)
    ids, n_items = [3, 17, 100], 120
    x = torch.from_numpy(v)
    x = oracle.model.norm(x) if final_norm else x
    head = oracle.lm_head.weight
    logits = (head @ x.T).T[:, :n_items]
    a = torch.zeros(n_items)
    a[ids] = 1
    lens = logit_lens(model, v, ids, n_items=n_items, final_norm=final_norm, n_top=4)
    np.testing.assert_allclose(lens.score, (logits @ a) / a.abs().sum(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(lens.others, (logits @ (1 - a)) / (1 - a).sum(), rtol=1e-4, atol=1e-5)
    for ours, values, largest in ((lens.top, lens.top_logits, True), (lens.bottom, lens.bottom_logits, False)):
        expected = torch.topk(logits, 4, largest=largest)
        assert np.array_equal(ours, expected.indices)
        np.testing.assert_allclose(values, expected.values, rtol=1e-4, atol=1e-5)


def test_the_final_norm_takes_the_length_away_and_equation_2_does_not(tmp_path: Path) -> None:
    tiny.write_model(tmp_path / "model", vocab_size=tiny.VOCAB_SIZE, seed=0)
    model = checkpoint.load(str(tmp_path / "model"), dtype="float32")
    v = np.random.default_rng(0).standard_normal((2, 16)).astype(np.float32)
    for final_norm, factor in ((False, 100.0), (True, 1.0)):
        one, other = (logit_lens(model, x, [1, 2], n_items=200, final_norm=final_norm) for x in (v, 100 * v))
        np.testing.assert_allclose(other.score, factor * one.score, rtol=1e-3)


def test_keywords_are_found_in_decoded_text(tokenizer: Tokenizer) -> None:
    """` wait` is `Ġwait` in the vocabulary; a piece of a word counts if it holds the keyword."""
    found = keyword_ids(tokenizer, ("wai",))
    assert [tokenizer.decode([i]) for i in found] == [" wai", " wait"]
    assert keyword_ids(tokenizer) == [tiny.word_id(" wait")]
    assert word_ids(tokenizer, ("wait", "hmm", "x")) == {
        tiny.word_id(" wait"),
        tiny.word_id(" hmm"),
        ord("x"),
        ord("X"),
    }
    with pytest.raises(ValueError, match="no token contains any of perhaps"):
        keyword_ids(tokenizer, ("perhaps",))


def test_the_case_of_keywords_does_not_matter(tokenizer: Tokenizer) -> None:
    assert keyword_ids(tokenizer, ["WAI"]) == keyword_ids(tokenizer, ["wai"])
    assert word_ids(tokenizer, ["Wait", "X"]) == word_ids(tokenizer, ["wait", "x"])


@pytest.mark.parametrize("words", ["wait", [""], ["wait", ""], [], [3]])
def test_what_is_no_list_of_words_is_refused(tokenizer: Tokenizer, words: Any) -> None:
    """A bare string would be its letters, and every text holds the empty word."""
    for name, find in (("keywords", keyword_ids), ("words", word_ids)):
        with pytest.raises(ValueError, match=re.escape(f"{name}={words!r}: expected a list of words")):
            find(tokenizer, words)


def test_vectors_of_another_width_or_not_finite_are_refused(tmp_path: Path) -> None:
    tiny.write_model(tmp_path / "model", vocab_size=tiny.VOCAB_SIZE, seed=0)
    model = checkpoint.load(str(tmp_path / "model"), dtype="float32")
    with pytest.raises(ValueError, match=r"shape \(3, 15\), expected \[n_layers, 16\]"):
        logit_lens(model, np.ones((3, 15), np.float32), [1], n_items=9)
    with pytest.raises(ValueError, match="not finite"):
        logit_lens(model, np.full((3, 16), np.nan, np.float32), [1], n_items=9)
    vector: Any = SteeringVector(np.ones((3, 16), np.float32))
    with pytest.raises(ValueError, match=r"expected an array \[n_layers, d_model\], got a SteeringVector"):
        logit_lens(model, vector, [1], n_items=9)


@pytest.mark.parametrize(
    ("ids", "n_top", "message"),
    [
        ([], 10, r"ids=\[\]: expected at least one"),
        ([1, -1], 10, r"ids: -1 is outside 0\.\.8"),
        ([9], 10, r"ids: 9 is outside 0\.\.8"),
        ([1], 0, "n_top=0: expected at least 1"),
        ([1], -1, "n_top=-1: expected at least 1"),
    ],
)
def test_items_that_are_not_there_are_refused(tmp_path: Path, ids: list[int], n_top: int, message: str) -> None:
    tiny.write_model(tmp_path / "model", vocab_size=tiny.VOCAB_SIZE, seed=0)
    model = checkpoint.load(str(tmp_path / "model"), dtype="float32")
    with pytest.raises(ValueError, match=message):
        logit_lens(model, np.ones((3, 16), np.float32), ids, n_items=9, n_top=n_top)
