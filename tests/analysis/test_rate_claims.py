"""Claims that rates carry, on replies whose rates are known; the dose they are read at; a maximum over cells."""

import dataclasses
import math
import types
from typing import Any

import numpy as np
import pytest
import tiny

from backtrack_jax.analysis import cells, dose, grids, replies
from backtrack_jax.analysis.agreement import AGREEMENT
from backtrack_jax.analysis.claims import Claim
from backtrack_jax.analysis.dose import LEVEL
from backtrack_jax.analysis.grids import GRIDS
from backtrack_jax.analysis.rates import RATES
from backtrack_jax.analysis.results import Results
from backtrack_jax.analysis.statistics import mean_interval, paired_interval, ratio_interval
from backtrack_jax.data.records import UNSTEERED, Condition

OWN, ZERO = "-5..-2", "0..0"
PLAIN = Condition("reasoning", UNSTEERED, "", 1, "", 0.0, 0.0)


def steered(kind: str, source: str, magnitude: float, *, layer: int = 1, window: str = OWN) -> Condition:
    return Condition("reasoning", kind, source, layer, window if source else "", magnitude, magnitude)


def lines_of(
    rates: dict[Condition, float], *, n: int = 80, likelihood: dict[Condition, float] | None = None, seed: int = 0
) -> list[dict[str, Any]]:
    """One reply of some ninety words to each of n problems, which differ, with hits at these rates."""
    rng = np.random.default_rng(seed)
    more, ease = rng.gamma(2.0, 0.5, n), rng.normal(0, 0.05, n)
    made = []
    for condition, rate in rates.items():
        words = rng.integers(60, 111, n)
        hits = np.minimum(rng.poisson(rate * words * more), words)
        drop = (likelihood or {}).get(condition, 0.0)
        for i in range(n):
            made.append(
                dataclasses.asdict(condition)
                | {"unit": "absolute", "span": "all", "problem_id": f"p{i}", "category": "", "sample": 0}
                | dict.fromkeys(("hits", "substring_hits", "keyword_sentences", "judged_backtracking"), int(hits[i]))
                | dict.fromkeys(("words", "substring_words", "tokens"), int(words[i]))
                | {"sentences": 50, "judged_sentences": 0, "token_rate": 0.0, "finish_reason": "stop"}
                | {"log_likelihood": -0.6 + ease[i] + rng.normal(0, 0.02) + drop}
                | {"repeated_2grams": 0.0, "repeated_3grams": 0.0, "compression": rng.random()}
            )
    return made


def results(lines: list[dict[str, Any]], **steering: Any) -> Results:
    e = tiny.get_config()
    e.steering = dataclasses.replace(e.steering, baselines=(), offsets=(-1, 0), **steering)
    asked = [types.SimpleNamespace(problem_id=name) for name in {line["problem_id"] for line in lines}]
    vectors = {role: {"mean_norm": [1.0] * 6} for role in ("base", "reasoning")}
    tables = {"replies": lines, "rates": replies.summarise(lines)}
    return Results(e, vectors, tables, {}, asked, "", {})  # type: ignore[arg-type]


KINDS = ("backtracking", "deduction", "noise", "random", "deduction - backtracking", "ablate:deduction")
RATES_OF = {
    PLAIN: 0.005,
    **{steered("backtracking", s, m): 0.005 + 0.005 * m for s in ("base", "reasoning") for m in (2.0, 4.0, 8.0)},
    steered("backtracking", "base", -4.0): 0.0005,
    steered("backtracking", "base", -16.0): 0.02,
    **{steered("deduction", "reasoning", m): 0.006 for m in (2.0, 4.0, 8.0)},
    **{steered("noise", "", m): 0.005 for m in (2.0, 4.0, 8.0)},
    **{steered("random", "", m): 0.004 for m in (2.0, 4.0, 8.0)},
    **{steered("deduction - backtracking", "reasoning", m): 0.04 for m in (2.0, 4.0, 8.0)},  # holds the vector
    **{steered("ablate:deduction", "reasoning", m): 0.04 for m in (2.0, 4.0, 8.0)},  # not of equal norm
}


def found(r: Results) -> dict[str, Claim]:
    return {claim.name: claim for analysis in (RATES, GRIDS, AGREEMENT) for claim in analysis.claims(r)}


def test_of_a_pair_as_in_the_paper_all_claims_hold() -> None:
    lines = lines_of(RATES_OF)
    claims = found(results(lines, kinds=KINDS))
    assert {name: claim.verdict for name, claim in claims.items()} == dict.fromkeys(
        ("works_base", "works_reasoning", "comparable", "controls", "negative"), "holds"
    )
    assert {claim.n for claim in claims.values()} == {80} and not any("undecided" in c.note for c in claims.values())
    # Each number and interval is that of the statistics, at the dose.
    v = [steered("backtracking", s, 8.0) for s in ("base", "reasoning")]
    counts = replies.shared(replies.by_cell(lines), [*v, PLAIN])
    base, reasoning, plain = counts.rates
    works, comparable = claims["works_base"], claims["comparable"]
    assert works.estimate == base / plain
    assert (works.low, works.high) == ratio_interval(counts.hits, counts.words, [1, 0, 0], [0, 0, 1], level=LEVEL)
    assert comparable.estimate == pytest.approx((base - plain) / (reasoning - plain))
    ends = ratio_interval(counts.hits, counts.words, [1, 0, -1], [0, 1, -1], level=LEVEL)
    assert (comparable.low, comparable.high) == ends and comparable.detectable == (ends[1] - ends[0]) / 2
    backwards = replies.shared(replies.by_cell(lines), [steered("backtracking", "base", -4.0), PLAIN])
    ends = paired_interval(backwards.hits, backwards.words, [1, -1], level=LEVEL)
    assert (claims["negative"].low, claims["negative"].high) == tuple(100 * end for end in ends)
    assert all(kind in claims["controls"].note for kind in ("deduction", "noise", "random"))
    assert " - " not in claims["controls"].note and "ablate" not in claims["controls"].note


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("works_base", {steered("backtracking", "base", 8.0): 0.004}),
        ("comparable", {steered("backtracking", "base", 8.0): 0.015}),
        ("controls", {steered("noise", "", 8.0): 0.045}),
        ("negative", {steered("backtracking", "base", -4.0): 0.02}),
    ],
)
def test_a_claim_fails_where_it_is_not_so(name: str, rates: dict[Condition, float]) -> None:
    claims = found(results(lines_of(RATES_OF | rates), kinds=KINDS))
    assert claims[name].verdict == "fails"
    assert claims["works_reasoning"].verdict == "holds"


def test_below_eighty_problems_nothing_is_decided() -> None:
    claims = found(results(lines_of(RATES_OF, n=79), kinds=KINDS))
    assert {claim.verdict for claim in claims.values()} == {"undecided"}
    assert all("undecided on 79 problems, at least 80 are needed" in claim.note for claim in claims.values())
    assert all(claim.low < claim.estimate < claim.high for claim in claims.values())


def test_what_was_not_sampled_has_no_claim() -> None:
    without = {c: rate for c, rate in RATES_OF.items() if c.source != "base" and c.kind in (UNSTEERED, "backtracking")}
    assert list(found(results(lines_of(without), kinds=("backtracking",)))) == []  # the run's own vector is the base's
    rest = {c: rate for c, rate in RATES_OF.items() if c.kind != UNSTEERED}
    assert found(results(lines_of(rest), kinds=KINDS)) == {}
    r = results(lines_of(RATES_OF), kinds=KINDS)
    r.experiment.vectors = dataclasses.replace(r.experiment.vectors, label="deduction")
    assert found(r) == {}


def test_the_dose_is_the_largest_coherent_magnitude_whatever_the_rates() -> None:
    eight, four = (steered("backtracking", "base", m) for m in (8.0, 4.0))
    broken = lines_of(RATES_OF, likelihood={eight: -0.3})
    r = results(broken, kinds=KINDS)
    at = dose.of_run(r)
    assert at is not None and at.cell["magnitude"] == 4
    assert found(r)["works_base"].note.startswith("magnitude 4, layer 1")
    curve, plain = r.cells("reasoning", "backtracking", "base"), r.unsteered("reasoning")
    assert plain is not None
    of_cell = replies.by_cell(broken)
    own = np.array([[line["log_likelihood"] for line in of_cell[c]] for c in (four, PLAIN)])
    low, high = mean_interval(own, np.ones(own.shape), [1, -1], level=LEVEL)
    assert at.coherence == pytest.approx((math.exp(own[0].mean() - own[1].mean()), math.exp(low), math.exp(high)))
    # A larger magnitude that is coherent again does not count, and the smallest one stands in where none is.
    for likelihood, expected in (({four: -0.3}, 2), ({steered("backtracking", "base", 2.0): -0.3}, 2)):
        chosen = dose.choose(replies.by_cell(lines_of(RATES_OF, likelihood=likelihood)), curve, plain)
        assert chosen is not None and chosen.cell["magnitude"] == expected


def test_coherence_is_read_at_its_lower_end() -> None:
    for low, coherent in ((0.89, False), (0.9, True)):
        assert dose.Dose({}, dose.Coherence(0.95, low, 1.1)).coherent is coherent


def test_controls_and_the_subtracted_vector_are_the_ones_that_the_rules_name() -> None:
    """Directions of the steered model's own activations; of several negative magnitudes the largest within the dose."""
    other = {steered("deduction", "base", 8.0): 0.045, steered("backtracking", "base", -2.0): 0.02}
    claims = found(results(lines_of(RATES_OF | other), kinds=KINDS))
    assert claims["controls"].verdict == "holds" and claims["controls"].note.count("deduction") == 2
    assert claims["controls"].note.startswith("magnitude 8, layer 1; highest end: deduction; all: ")
    assert claims["negative"].verdict == "holds" and claims["negative"].note.startswith("magnitude -4, ")


def test_offset_zero_is_the_offset_of_that_name() -> None:
    early = {steered("backtracking", "reasoning", 8.0, window="-1..-1"): 0.08}
    places = grids.best_places(results(lines_of(GRID | early), kinds=("backtracking",), grid_magnitudes=(8.0,)))
    assert "at offset -1, magnitude 8" in places["best_offset"]
    assert float(places["offset_zero"].split()[0]) < 3 < float(places["best_offset"].split()[0])


def test_a_vector_that_breaks_the_text_does_not_work() -> None:
    every = {steered("backtracking", "base", m): -0.3 for m in (2.0, 4.0, 8.0)}
    claims = found(results(lines_of(RATES_OF, likelihood=every), kinds=KINDS))
    assert claims["works_base"].verdict == "fails" and claims["comparable"].note.endswith(dose.NONE)


GRID = {
    **{c: rate for c, rate in RATES_OF.items() if c.kind in (UNSTEERED, "backtracking") and c.magnitude >= 0},
    steered("backtracking", "reasoning", 8.0, window=ZERO): 0.01,
    **{
        steered("backtracking", s, 8.0, layer=layer): rate
        for s in ("base", "reasoning")
        for layer, rate in ((0, 0.03), (3, 0.02), (5, 0.004))
    },
}


def test_offset_and_layers() -> None:
    swept = {"kinds": ("backtracking",), "layers": (0, 1, 3, 5), "grid_magnitudes": (8.0,)}
    claims = found(results(lines_of(GRID), **swept))
    offset, layers = claims["offset"], claims["layer_base"]
    assert offset.verdict == layers.verdict == claims["layer_reasoning"].verdict == "holds"
    lines = replies.by_cell(lines_of(GRID))
    pair = [steered("backtracking", "reasoning", 8.0, window=window) for window in (OWN, ZERO)]
    counts = replies.shared(lines, pair)
    assert offset.estimate == counts.rates[0] / counts.rates[1]
    assert (offset.low, offset.high) == ratio_interval(counts.hits, counts.words, [1, 0], [0, 1], level=LEVEL)
    assert layers.estimate == layers.low == layers.high == 1 / 5 and "excluded as the best: 0, 3, 5" in layers.note
    assert math.isnan(layers.detectable)
    # Were the last layer as good, it could not be excluded; were it the best, the claim would fail.
    for rate, verdict in ((0.045, "undecided"), (0.12, "fails")):
        last = {steered("backtracking", "base", 8.0, layer=5): rate}
        assert found(results(lines_of(GRID | last), **swept))["layer_base"].verdict == verdict
    # A layer whose text falls apart is not compared: at a smaller magnitude it might be the best. Nor is none.
    last = steered("backtracking", "base", 8.0, layer=5)
    claim = found(results(lines_of(GRID, likelihood={last: -0.5}), **swept))["layer_base"]
    assert claim.verdict == "undecided" and "incoherent at every magnitude: 5" in claim.note
    early = {c: rate for c, rate in GRID.items() if c.layer != 5}
    assert "layer_base" not in found(results(lines_of(early), **(swept | {"layers": (0, 1, 3)})))
    # At offset 0 as well as anywhere.
    same = {steered("backtracking", "reasoning", 8.0, window=ZERO): 0.045}
    assert found(results(lines_of(GRID | same), **swept))["offset"].verdict == "fails"


def test_table_c1_is_decided_at_all_strengths_together() -> None:
    def table(**f1: float) -> list[dict[str, Any]]:
        made = []
        for group, value in f1.items():
            ends = {f"f1_{end}_{level}": value + sign * width for level, width in (("decides", 0.03), ("of_four", 0.05))
                    for end, sign in (("low", -1), ("high", 1))}  # fmt: skip
            made.append({"group": int(group[1:]), "f1": value, "n_problems": 80} | ends)
        return [{"group": "all"}, *made]

    def claim(rows: list[dict[str, Any]], unit: str = "absolute") -> list[Claim]:
        r = results(lines_of({PLAIN: 0.005}), kinds=(), unit=unit)
        return list(AGREEMENT.claims(dataclasses.replace(r, tables=r.tables | {"judge_agreement": rows})))

    (holds,) = claim(table(s0=0.65, s4=0.63, s8=0.60, s6=0.1))  # the paper has no strength 6
    assert holds.verdict == "holds" and holds.estimate == pytest.approx(3.65) and holds.high == pytest.approx(6.65)
    assert claim(table(s0=0.65, s4=0.72))[0].verdict == "undecided"
    assert claim(table(s0=0.65, s4=0.78))[0].verdict == "undecided"  # one of four may look so by chance
    assert claim(table(s0=0.65, s4=0.80))[0].verdict == "fails"
    assert claim(table(s0=0.65), unit="relative") == claim(table(s6=0.6)) == []


def test_the_highest_of_cells_that_are_alike_is_not_higher() -> None:
    """Sixty cells of one rate over 20 problems: the highest shows much more, its other half does not."""
    alike = {steered("noise", "", float(m)): 0.005 for m in range(1, 61)}
    shown, reported = [], []
    for seed in range(12):
        r = results(lines_of({PLAIN: 0.005} | alike, n=20, seed=seed), kinds=("noise",))
        found = cells.highest(r, r.cells("reasoning", "noise", ""))
        assert found is not None and found.unsteered is not None
        assert found.cell["n_problems"] == found.unsteered["n_problems"] == 10
        shown.append(max(cell["rate"] for cell in r.tables["rates"]))
        reported.append(found.cell["rate"])
    assert np.mean(shown) > 0.008
    assert np.mean(reported) == pytest.approx(0.005, abs=0.0015)


def test_the_highest_is_chosen_on_one_half_and_measured_on_the_other() -> None:
    one, two = (steered("noise", "", m) for m in (1.0, -2.0))
    lines = lines_of({PLAIN: 0.02, one: 0.02, two: 0.02}, n=11)
    first, second = cells.halves({line["problem_id"] for line in lines})
    assert (len(first), len(second)) == (6, 5) and not set(first) & set(second)
    assert cells.halves(reversed([*first, *second])) == (first, second)
    for line in lines:
        line["hits"] = 0 if line["problem_id"] in first and line["magnitude"] != -2 else 3
    r = results(lines, kinds=("noise",))
    found = cells.highest(r, r.tables["rates"], either_way=True)
    assert found is not None and Condition.of(found.cell) == two
    expected = [line for line in lines if line["problem_id"] in second]
    assert [found.cell, found.unsteered] == [replies.summarise(expected)[n] for n in (2, 0)]
    alone = cells.highest(r, r.tables["rates"])  # negative magnitudes do not count
    assert alone is not None and Condition.of(alone.cell) == one
    assert cells.highest(r, [cell for cell in r.tables["rates"] if cell["kind"] == UNSTEERED]) is None
    few = [line for line in lines if line["problem_id"] in (*first[:2], second[0])]
    assert cells.highest(results(few, kinds=("noise",)), replies.summarise(few), either_way=True) is None
