"""Eq. 2 against torch, and the keyword set by decoded text."""

import json
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from helpers import hf_llama, save
from scipy import stats

from backtrack_jax.analysis.dose import LEVEL
from backtrack_jax.analysis.logit_lens import LOGIT_LENS, _rise, keyword_ids, logit_lens, word_ids, z_scores
from backtrack_jax.analysis.results import Results
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_z_is_the_distance_in_spreads_of_single_items(tmp_path: Path, dtype: str) -> None:
    """In plain numpy, over more rows than one pass takes; small differences outlast weights of 16 bits."""
    tiny.write_model(tmp_path / "model", vocab_size=tiny.VOCAB_SIZE, seed=0)
    model = checkpoint.load(str(tmp_path / "model"), dtype=dtype)
    assert model.lm_head is not None
    rng, ids, n_items = np.random.default_rng(0), [tiny.word_id(" wait"), tiny.word_id(" hmm")], tiny.VOCAB_SIZE
    first = rng.standard_normal(16)
    directions = first + np.vstack([np.zeros(16), 1e-3 * rng.standard_normal((70, 16))])
    weight = np.asarray(model.lm_head.weight[...].astype(jnp.float32), np.float64)[:n_items]
    logits = directions @ weight.T
    others = np.delete(logits, ids, axis=1)
    expected = (logits[:, ids].mean(1) - others.mean(1)) / others.std(1)
    found = z_scores(model, directions, ids, n_items=n_items)
    assert found.shape == (71,) and np.ptp(expected) > 0.01
    tolerance = 1e-6 if dtype == "float32" else 5e-5  # of the direction itself it is .02
    np.testing.assert_allclose(found - found[0], expected - expected[0], atol=tolerance)
    np.testing.assert_allclose(found, expected, atol=1e-5 if dtype == "float32" else 0.02)
    lens = logit_lens(model, first[None].astype(np.float32), ids, n_items=n_items)
    np.testing.assert_allclose((lens.score - lens.others) / lens.spread, found[:1], rtol=1e-4)


def test_the_rise_is_of_thirds_of_the_layers() -> None:
    """Of 8 layers, 0 to 2 and 6 to 7, as far as they were kept."""
    rng = np.random.default_rng(0)
    z = {layer: rng.standard_normal(11) for layer in (0, 2, 3, 6, 7)}
    (line,) = _rise("base", "reasoning", z, dict.fromkeys(z, 9), 8)
    rise = (z[6] + z[7]) / 2 - (z[0] + z[2]) / 2
    error = np.sqrt(9 * np.mean((rise[1:] - rise[1:].mean()) ** 2))
    assert (line["first"], line["last"], line["n_problems"]) == ("0 2", "6 7", 9)
    assert (line["rise"], line["error"]) == pytest.approx((rise[0], error))
    assert not _rise("base", "base", {layer: z[layer] for layer in (0, 2, 3)}, dict.fromkeys(z, 9), 8)


def lens_results(z: dict[int, float], error: float, n: int = 100, **rise: Any) -> Results:
    key = {"source": "base", "unembedding": "base", "final_norm": 0}
    lines = [
        key | {"layer": layer, "z": z.get(layer, 0.1), "z_error": error if layer in z else np.nan, "n_problems": n}
        for layer in range(3)
    ]
    line = {
        "source": "reasoning",
        "unembedding": "reasoning",
        "first": "0",
        "last": "2",
        "error": error,
        "n_problems": n,
    }
    tables = {"lens": lines, "lens_rise": [line | rise] if rise else []}
    return Results(tiny.get_config(), {"reasoning": {"mean_norm": [1, 1, 1]}}, tables, {}, [], "", {})


@pytest.mark.parametrize(
    ("z", "error", "n", "answer", "said"),
    [
        ({0: -0.5, 1: 0.2, 2: 7.0}, 0.1, 100, "holds", "layers 0, 1 of 3"),
        ({0: -0.9, 1: 0.2}, 0.1, 100, "undecided", "layers 0, 1 of 3"),
        ({0: 0.1, 1: -1.5}, 0.1, 100, "fails", ""),
        ({0: 0.1}, 0.1, 60, "undecided", "undecided on 60 problems"),
        ({}, 0.1, 100, "undecided", "vectors.layers=(1, 2) keeps no means of sections of enough layers"),
    ],
)
def test_verdict_of_the_base_derived_lens(z: dict[int, float], error: float, n: int, answer: str, said: str) -> None:
    claim, _ = LOGIT_LENS.claims(lens_results(z, error, n))
    assert (claim.name, claim.verdict) == ("lens_base", answer) and said in claim.note
    early = [z[layer] for layer in (0, 1) if layer in z]  # of three layers
    if early:
        ends = [stats.t.interval(1 - (1 - LEVEL) / len(early), n - 1, abs(x), error)[0] for x in early]
        assert claim.estimate == max(map(abs, early)) and claim.low == pytest.approx(max(0, *ends))
        assert claim.high == pytest.approx(stats.t.interval(LEVEL, n - 1, claim.estimate, error)[1])


@pytest.mark.parametrize(
    ("rise", "answer", "said"),
    [
        ({"rise": 0.5}, "holds", "layers 2 against 0"),
        ({"rise": -0.5}, "fails", ""),
        ({"rise": 0.1}, "undecided", ""),
        ({"rise": 0.5, "n_problems": 9}, "undecided", "undecided on 9 problems"),
        ({}, "undecided", "it takes some of the first third and some of the last"),
    ],
)
def test_verdict_of_the_reasoning_derived_lens(rise: dict[str, Any], answer: str, said: str) -> None:
    _, claim = LOGIT_LENS.claims(lens_results({}, 0.1, **rise))
    assert (claim.name, claim.verdict) == ("lens_reasoning", answer) and said in claim.note


@pytest.mark.slow
def test_the_largest_of_several_layers_is_missed_in_at_most_one_case_of_twenty_at_either_end() -> None:
    """Whether one layer alone is at the bound or all of them are."""
    rng, R = np.random.default_rng(0), 2000
    for true in ([1.0, 0.2, 0.0], [1.0, 1.0, -1.0]):
        answers = []
        for _ in range(R):
            z = {layer: float(x + 0.1 * rng.standard_normal()) for layer, x in enumerate(true)}
            answers.append(LOGIT_LENS.claims(lens_results(z, 0.1, 200))[0].verdict)
        assert np.mean([answer == "fails" for answer in answers]) <= 0.06
        assert np.mean([answer == "holds" for answer in answers]) <= 0.06
