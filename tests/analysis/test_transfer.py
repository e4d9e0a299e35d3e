"""The numbers of the question `transfer`, and which settings are refused."""

import dataclasses
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import tiny

from backtrack_jax import checks
from backtrack_jax.analysis import transfer
from backtrack_jax.analysis import transfer_vectors as tv
from backtrack_jax.analysis.results import Results
from backtrack_jax.config import ModelSpec, TransferSpec

RNG = np.random.default_rng(0)


def lines(n: int, factors: dict[str, float]) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """Changes that are so many times those of the own vector, and noise; in another order for each direction."""
    own = 1 + 0.3 * RNG.standard_normal(n)
    of = {name: factor * own + 0.05 * RNG.standard_normal(n) for name, factor in factors.items()} | {tv.OWN: own}
    return [
        {"role": "reasoning", "direction": name, "problem_id": f"p{i}", "change": float(of[name][i])}
        for name in of
        for i in RNG.permutation(n)
    ], of


def maps(names: list[str]) -> list[dict[str, Any]]:
    return [{"role": "reasoning", "other_layer": 3} | tv._line(name, 0.5, (0.4, 0.6)) for name in names]


FACTORS = {tv.RIDGE: 0.6, tv.SHUFFLED_PAIRS: 0.1}


def test_shares_are_ratios_of_means_over_the_same_problems() -> None:
    changes, of = lines(40, FACTORS)
    changes = [line for line in changes if (line["direction"], line["problem_id"]) != (tv.RIDGE, "p7")]
    found = {line["direction"]: line for line in transfer.summary(maps([tv.OWN, *FACTORS]), changes, [])}
    assert list(found) == [tv.OWN, *FACTORS, transfer.CONTRAST]
    kept = np.arange(40) != 7
    ridge, control, own = (of[name][kept] for name in (tv.RIDGE, tv.SHUFFLED_PAIRS, tv.OWN))
    expected = {tv.RIDGE: ridge, transfer.CONTRAST: ridge - control}
    for name, values in expected.items():
        assert found[name]["problems"] == 39
        assert found[name]["effect"] == pytest.approx(values.mean())
        assert found[name]["share"] == pytest.approx(values.mean() / own.mean())
        # Fieller's interval by its definition: at its ends Student's t test of values - ratio * own is just at 5 %.
        for end in ("share_low", "share_high"):
            rest = values - found[name][end] * own
            t = rest.mean() / (rest.std(ddof=1) / np.sqrt(39))
            assert abs(t) == pytest.approx(2.0243942, rel=1e-5)  # t of 38 degrees of freedom, .975
    assert found[tv.SHUFFLED_PAIRS]["problems"] == 40


def test_rates_are_pooled_over_replies() -> None:
    changes, _ = lines(10, FACTORS)
    answered = [
        {
            "role": "reasoning",
            "direction": name,
            "problem_id": f"p{i}",
            "hits": i % 2 * more,
            "words": 10 + i,
            "text": "",
        }
        for name, more in ((tv.OWN, 2), ("unsteered", 0))
        for i in range(10)
    ]
    found = {line["direction"]: line for line in transfer.summary(maps([tv.OWN, *FACTORS]), changes, answered)}
    assert found[tv.OWN]["hits"] == 10 and found[tv.OWN]["words"] == 145
    assert found[tv.OWN]["rate"] == pytest.approx(10 / 145)
    assert found["unsteered"]["rate"] == 0 < found["unsteered"]["rate_high"] and not found[tv.RIDGE]["words"]


@pytest.mark.parametrize(
    ("n", "factors", "verdict"),
    [
        (100, FACTORS, "holds"),
        (79, FACTORS, "undecided"),
        (100, {tv.RIDGE: 0.1, tv.SHUFFLED_PAIRS: 0.6}, "fails"),
        (100, {tv.RIDGE: 0.3, tv.SHUFFLED_PAIRS: 0.3}, "undecided"),
    ],
)
def test_the_claim_rests_on_the_contrast(n: int, factors: dict[str, float], verdict: str) -> None:
    changes, _ = lines(n, factors)
    if factors[tv.RIDGE] == factors[tv.SHUFFLED_PAIRS]:
        same = {line["problem_id"]: line["change"] for line in changes if line["direction"] == tv.RIDGE}
        for line in changes:
            if line["direction"] == tv.SHUFFLED_PAIRS:
                line["change"] = same[line["problem_id"]] + (0.05 if int(line["problem_id"][1:]) % 2 else -0.05)
    e = tiny.get_config()
    e.questions.transfer.model.path = "family/other"
    found = transfer.summary(maps([tv.OWN, *factors]), changes, [])
    r = cast(
        Results,
        SimpleNamespace(
            tables={"transfer": found, "transfer_effects": changes},
            experiment=e,
            label="backtracking",
            author="reasoning",
        ),
    )
    (claim,) = transfer.TRANSFER.claims(r)
    assert claim.verdict == verdict and claim.n == n and claim.low < claim.estimate < claim.high
    assert claim.estimate == pytest.approx(found[-1]["share"])
    (sentence,) = transfer.TRANSFER.sentences(r)
    line = found[-1]
    said = f"a difference of {line['share']:.2f} ({line['share_low']:.2f} to {line['share_high']:.2f}) on {n} held-out"
    assert said in sentence and "family/other" in sentence


@pytest.mark.parametrize(
    ("layer", "n_layers", "n_other", "expected"),
    [(10, 32, 32, 10), (2, 8, 10, 3), (7, 8, 10, 9), (0, 32, 4, 0), (31, 32, 12, 11), (10, 32, 36, 11)],
)
def test_a_block_at_the_same_depth(layer: int, n_layers: int, n_other: int, expected: int) -> None:
    assert tv.layer_at_depth(layer, n_layers, n_other) == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": ModelSpec()}, "questions.transfer.model.path='', expected a folder, hub id"),
        (
            {"model": ModelSpec("a", markers="drop")},
            "model.markers='drop', expected 'keep': questions.transfer.prompt=",
        ),
        ({"prompt": "r2"}, "questions.transfer.prompt='r2', expected one of plain, chat, r1"),
        ({"held_out": 1.0}, "questions.transfer.held_out=1.0, expected a share of the problems"),
        ({"layer": -2}, "questions.transfer.layer=-2, expected at least -1"),
        ({"positions": 1}, "questions.transfer.positions=1, expected at least 2"),
        ({"rank": 0}, "questions.transfer.rank=0, expected at least 1"),
        ({"anchors": 5001}, "questions.transfer.anchors=5001, expected at most questions.transfer.positions=5000"),
        ({"magnitude": -1.0}, "questions.transfer.magnitude=-1.0, expected a number above 0"),
    ],
)
def test_settings_that_cannot_run_are_refused(fields: dict[str, Any], message: str) -> None:
    e = tiny.get_config()
    e.questions.ask = ("transfer",)
    e.questions.transfer = TransferSpec(ModelSpec("a", dtype="float32"))
    checks.check(e)
    e.questions.transfer = dataclasses.replace(e.questions.transfer, **fields)
    with pytest.raises(ValueError, match=message):
        checks.check(e)
    e.questions.ask = ()
    checks.check(e)  # of what is not asked, nothing


def test_the_steered_layer_must_be_kept() -> None:
    e = tiny.get_config()
    e.questions.ask, e.vectors.layers = ("transfer",), (2,)
    e.questions.transfer = TransferSpec(ModelSpec("a"))
    with pytest.raises(ValueError, match=r"vectors.layers=\(2,\), expected steering.layer=1 among them"):
        checks.check(e)
