"""Cosines of vectors, beside those of shuffled sections; the verdict."""

from typing import Any

import numpy as np
import pytest
import tiny
from scipy import stats

from backtrack_jax.analysis import similarity
from backtrack_jax.analysis.dose import LEVEL
from backtrack_jax.analysis.results import Results
from backtrack_jax.analysis.similarity import SIMILARITY, cosine_matrix


def test_cosine_matrix() -> None:
    x = np.random.default_rng(0).standard_normal((4, 7)).astype(np.float32)
    x[3] = 0
    found = cosine_matrix(x)
    for i in range(3):
        for j in range(3):
            a, b = x[i].astype(float), x[j].astype(float)
            assert found[i, j] == pytest.approx(sum(a * b) / (sum(a * a) * sum(b * b)) ** 0.5)
    assert np.isnan(found[3]).all() and np.isnan(found[:, 3]).all()


def test_the_null_is_of_the_two_models_vectors_of_the_same_draw() -> None:
    base, reasoning = np.random.default_rng(0).standard_normal((2, 200, 9))
    cosines = [a @ b / np.sqrt((a @ a) * (b @ b)) for a, b in zip(base, reasoning, strict=True)]
    found = similarity._null(base, reasoning)
    expected = [np.mean(cosines), *np.quantile(cosines, [0.025, 0.975, 0.95])]
    assert list(found.values()) == pytest.approx(expected)


LINE = {
    **{"label": "backtracking", "layer": 1, "cosine": 0.82, "low": 0.78, "high": 0.86},
    **{"corrected": 0.85, "corrected_low": 0.8, "corrected_high": 0.9, "corrected_error": 0.025},
    **{"shuffled": 0.5, "shuffled_low": 0.4, "shuffled_high": 0.7, "shuffled_95": 0.65, "n_problems": 100},
    **{f"norm_{role}{end}": 1.5 for role in ("base", "reasoning") for end in ("", "_shuffled", "_95")},
}


def results(**line: Any) -> Results:
    return Results(tiny.get_config(), {}, {"similarity": [LINE | line]}, {}, [], "", {})


@pytest.mark.parametrize(
    ("line", "answer", "said"),
    [
        ({}, "holds", "raw 0.820, shuffles below 0.650"),
        ({"corrected": 0.5}, "fails", ""),
        ({"corrected": 0.98, "corrected_error": 0.005}, "fails", ""),
        ({"corrected": 0.93}, "undecided", ""),
        ({"shuffled_95": 0.9}, "fails", "no more alike than shuffled sections may be"),
        ({"shuffled_95": 0.84}, "undecided", "no more alike than shuffled sections may be"),
        ({"corrected": 0.5, "shuffled_95": 0.84}, "fails", ""),
        ({"n_problems": 79}, "undecided", "undecided on 79 problems, at least 80 are needed"),
        ({"corrected": np.nan, "corrected_error": np.nan}, "undecided", "their noise hides the vector"),
    ],
)
def test_verdict_of_the_cosine(line: dict[str, Any], answer: str, said: str) -> None:
    """c* by its interval; the raw one against the shuffles, of which it is one if labels mean nothing."""
    (claim,) = SIMILARITY.claims(results(**line))
    assert (claim.verdict, claim.name, claim.figure) == (answer, "cosine", "cosine_by_layer")
    assert said in claim.note
    if not np.isnan(claim.low):
        n, c, error = line.get("n_problems", 100), line.get("corrected", 0.85), line.get("corrected_error", 0.025)
        half = stats.t.ppf((1 + LEVEL) / 2, n - 1) * error / (1 - c**2)
        assert (claim.low, claim.high) == pytest.approx((np.tanh(np.arctanh(c) - half), np.tanh(np.arctanh(c) + half)))
        assert claim.detectable == pytest.approx((claim.high - claim.low) / 2)


def test_a_layer_that_was_not_kept_has_no_verdict() -> None:
    r = results(corrected=np.nan, corrected_error=np.nan, n_problems=0)
    r.experiment.vectors.layers = (2,)
    (claim,) = SIMILARITY.claims(r)
    assert claim.verdict == "undecided" and np.isnan([claim.estimate, claim.low, claim.detectable]).all()
    assert "vectors.layers=(2,) keeps no means of sections at the steered layer 1" in claim.note


def test_sentence_and_reference_name_the_null() -> None:
    beside = (
        "corrected for noise 0.850 (0.800 to 0.900); sections shuffled within traces have 0.500, 95 % of draws below"
    )
    r = results()
    (said,) = SIMILARITY.sentences(r)
    assert said.startswith(
        "Base- and reasoning-derived backtracking vectors have cosine 0.820 at layer 1 (paper: 0.74); "
    )
    assert f"{beside} 0.650" in said and beside in SIMILARITY.reference(r)["cosine"]
    assert SIMILARITY.reference(r)["norm_base"] == "1.5; shuffled within traces up to 1.5"
    nothing = dict.fromkeys((name for name in LINE if name not in ("label", "layer", "cosine", "n_problems")), np.nan)
    (said,) = SIMILARITY.sentences(results(**nothing))
    assert said.endswith("have cosine 0.820 at layer 1 (paper: 0.74).")


def test_one_model_alone_makes_no_claim() -> None:
    r = results()
    r.experiment.roles = ("base",)
    assert not SIMILARITY.claims(r) and similarity.by_layer(r) is None
