"""Offsets by group of problems: against scipy and by hand, on effects whose truth is known, and on a whole run."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from scipy import stats

from backtrack_jax import checks, pipeline
from backtrack_jax.analysis import known, offsets_by_group
from backtrack_jax.analysis.offsets_by_group import OFFSETS_BY_GROUP, SAME_TEXT, between_groups, thirds
from backtrack_jax.config import Experiment
from backtrack_jax.data import records
from backtrack_jax.files import tables
from backtrack_jax.report.stage import read_results
from backtrack_jax.stages.analysis import gather


def experiment(**settings: Any) -> Experiment:
    e = tiny.get_config()
    e.questions.ask = ("offsets",)
    e.questions.offsets = dataclasses.replace(e.questions.offsets, chosen=-1, **settings)
    return e


def groups_of(by: str, of: dict[str, str]) -> offsets_by_group.Groups:
    return {by: {name: (group, SAME_TEXT) for name, group in of.items()}}


def test_tests_are_those_of_scipy() -> None:
    rng = np.random.default_rng(1)
    of = {f"p{n}": str(1 + n % 3) for n in range(90)}
    values = {name: rng.normal(0.2 * int(group), int(group)) for name, group in of.items()}
    samples = [[values[name] for name in of if of[name] == group] for group in "123"]
    (line,) = between_groups(values, groups_of("difficulty", of))
    assert line["p_value"] == line["p_holm"] == pytest.approx(stats.alexandergovern(*samples).pvalue)
    assert (line["easiest"], line["hardest"], line["n_problems"]) == ("1", "3", 60)
    assert line["difference"] == pytest.approx(np.mean(samples[2]) - np.mean(samples[0]))
    # Welch's interval, by hand
    parts = [np.var(sample, ddof=1) / len(sample) for sample in (samples[0], samples[2])]
    df = sum(parts) ** 2 / sum(part**2 / 29 for part in parts)
    half = stats.t.ppf(0.96, df) * math.sqrt(sum(parts))
    assert line["low_claim"] == pytest.approx(line["difference"] - half)
    assert line["high_claim"] == pytest.approx(line["difference"] + half)
    assert line["low"] < line["low_claim"] and offsets_by_group.primary([line]) is line


def test_p_values_are_corrected_over_the_groupings() -> None:
    rng = np.random.default_rng(2)
    names = [f"p{n}" for n in range(60)]
    values = {name: rng.normal() + (n < 30) for n, name in enumerate(names)}
    groups = groups_of("difficulty", {name: "1" if n < 30 else "2" for n, name in enumerate(names)})
    groups |= groups_of("category", {name: "ab"[n % 2] for n, name in enumerate(names)})
    groups |= groups_of("length", {name: ("low", "high")[n % 3 > 0] for n, name in enumerate(names)})
    lines = between_groups(values, groups)
    p = sorted(line["p_value"] for line in lines)
    expected = np.maximum.accumulate([min(1.0, p[0] * 3), min(1.0, p[1] * 2), p[2]])
    assert sorted(line["p_holm"] for line in lines) == pytest.approx(expected)


def test_a_true_null_is_rejected_as_often_as_it_should_be_and_a_difference_is_found() -> None:
    rng = np.random.default_rng(3)
    of = {f"p{n}": str(1 + n % 2) for n in range(80)}
    groups = groups_of("difficulty", of)
    found = {}
    for difference in (0.0, 1.0):
        lines = [
            between_groups(
                {name: rng.normal(difference * (group == "2"), 1 + (group == "2")) for name, group in of.items()},
                groups,
            )[0]
            for _ in range(400)
        ]
        found[difference] = np.mean([line["low"] > 0 or line["high"] < 0 for line in lines])
    assert 0.02 < found[0.0] < 0.09  # .05, three standard errors
    assert found[1.0] > 0.7


def test_groups_that_are_too_small_or_equal_have_no_test() -> None:
    of = {"a": "1", "b": "2", "c": "2"}
    (line,) = between_groups({"a": 1.0, "b": 2.0, "c": 3.0}, groups_of("difficulty", of))
    assert line["groups"] == 1 and math.isnan(line["p_value"]) and offsets_by_group.primary([line]) is None
    of |= {"d": "1"}
    (line,) = between_groups({"a": 1.0, "d": 1.0, "b": 2.0, "c": 3.0}, groups_of("difficulty", of))
    assert line["difference"] == 1.5 and math.isnan(line["low"]) and math.isnan(line["p_value"])


def test_difficulties_are_in_the_order_of_numbers() -> None:
    assert offsets_by_group.ordered("difficulty", {"10", "2", "1"}) == ["1", "2", "10"]
    assert offsets_by_group.ordered("length", {"high", "low"}) == ["low", "high"]


def test_thirds_hold_equal_numbers_together() -> None:
    found = thirds({f"p{n}": float(n) for n in range(9)})
    assert [found[f"p{n}"] for n in range(9)] == [third for third in ("low", "middle", "high") for _ in range(3)]
    assert thirds({"a": 1.0, "b": 1.0}) == {}
    tied = thirds({"a": 0.0, "b": 0.0, "c": 0.0, "d": 5.0})
    assert tied["a"] == tied["b"] == tied["c"] == "low" and tied["d"] == "high"


def test_the_best_offset_is_measured_on_problems_that_did_not_choose_it() -> None:
    """On noise the best of 40 offsets looks good on the problems that chose it, and not on the others."""
    rng, offsets, names = np.random.default_rng(4), list(range(-39, 1)), [f"p{n}" for n in range(40)]
    chosen, held_out, values = [], [], np.zeros((40, 40))
    for _ in range(60):
        values = rng.standard_normal((40, 40))
        found = offsets_by_group.best(offsets, values, names, seed=0)
        assert found["best"] == offsets[int(values.mean(1).argmax())]
        assert found["best_low"] <= found["best_high"] and 0 <= found["best_share"] <= 1
        chosen.append(values.mean(1).max())
        held_out.append(found["held_out"])
    assert np.mean(chosen) > 0.25 and abs(np.mean(held_out)) < 3 * np.std(held_out) / math.sqrt(60)
    values[7] += 3
    sure = offsets_by_group.best(offsets, values, names, seed=0)
    assert sure["best"] == sure["best_low"] == sure["best_high"] == offsets[7] and sure["best_share"] == 1
    assert math.isnan(offsets_by_group.best(offsets, values[:, :3], names[:3], seed=0)["best"])


@pytest.mark.slow
def test_a_run_that_asks(finished: Path) -> None:
    """The advantage of a problem is that of the log-odds in the run's table; difficulty is the problem's own."""
    problems = {trace.problem_id: trace for trace in records.read_traces(finished / "1-traces" / "traces.jsonl")}
    lines = [
        {"id": name, "category": t.category, "problem": t.problem, "answer": "7", "difficulty": 1 + n % 2}
        for n, (name, t) in enumerate(problems.items())
    ]
    lines[0]["problem"] += " Or not."  # another problem of the same name
    Path("known.json").write_text(json.dumps(lines))
    e = experiment()
    e.traces.problems, e.steering.grid_limit = "known.json", 3
    checks.check(e)
    pipeline.Run(e).run()
    material = gather(pipeline.Run(e).context)
    facts = known.problems(e, material.traces)
    assert lines[0]["id"] not in facts and len(facts) == len(lines) - 1

    folder = finished / "5-analysis"
    own = {
        (line["window"], line["problem_id"]): line["log_odds"]
        for line in tables.read(folder / "reasoning.log_odds.csv")
        if line["text"] == "reasoning traces" and line["source"] in ("", "reasoning") and line["layer"] == 1
        if line["kind"] == "unsteered" or (line["kind"], line["magnitude"]) == ("backtracking", 8.0)
    }
    measured = sorted({name for window, name in own if window == "-1..-1"})
    assert len(measured) == 3
    advantage = {name: own["-1..-1", name] - own["0..0", name] for name in measured}
    table = tables.read(folder / "offsets_groups.csv")
    assert table[0]["by"] == "all" and table[0]["n_problems"] == 3
    assert table[0]["advantage"] == pytest.approx(np.mean(list(advantage.values())), rel=1e-6)
    for line in table[1:]:
        if line["by"] == "difficulty":
            members = [name for name in measured if name in facts and str(facts[name].difficulty) == line["group"]]
            assert line["n_problems"] == len(members) > 0 and line["basis"] == "the problem"
            assert line["advantage"] == pytest.approx(np.mean([advantage[name] for name in members]), rel=1e-6)
    curves = tables.read(folder / "offsets_curves.csv")
    whole = {(line["measure"], line["offset"]): line for line in curves if line["by"] == "all"}
    plain = {name: own["", name] for name in measured}
    for offset in (-1, 0):
        changes = [own[f"{offset}..{offset}", name] - plain[name] for name in measured]
        line = whole["log_odds", offset]
        assert line["effect"] == pytest.approx(np.mean(changes), rel=1e-6)
        low, high = stats.t.interval(0.95, 2, np.mean(changes), stats.sem(changes))
        assert (line["low"], line["high"]) == pytest.approx((low, high), rel=1e-6)
        cell = next(
            x
            for x in tables.read(folder / "rates.csv")
            if (x["window"], x["magnitude"], x["target"]) == (f"{offset}..{offset}", 8.0, "reasoning")
        )
        assert whole["rate", offset]["effect"] == pytest.approx(cell["effect"], abs=1e-12)
    r = read_results(e, finished)
    assert offsets_by_group.plot(r) is not None and (finished / "6-report" / "offsets_by_group.png").exists()
    for claim in OFFSETS_BY_GROUP.claims(r):
        assert claim.verdict == "undecided" and claim.where == "-"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"chosen": -3}, r"questions\.offsets\.chosen=-3, expected one of steering\.offsets, \(-1, 0\)"),
        ({"reference": -1}, r"questions\.offsets\.chosen=-1, expected another offset"),
        ({"reference": 4}, r"questions\.offsets\.reference=4, expected one of steering\.offsets"),
        (
            {"magnitude": 4.0},
            r"questions\.offsets\.magnitude=4\.0, expected a positive one of steering\.grid_magnitudes",
        ),
    ],
)
def test_settings_that_cannot_be_compared_are_refused(changed: dict[str, Any], message: str) -> None:
    e = experiment()
    for name, value in changed.items():
        setattr(e.questions.offsets, name, value)
    with pytest.raises(ValueError, match=message):
        checks.check(e)
    e.questions.ask = ()
    checks.check(e)


def test_a_sweep_without_the_unsteered_model_is_refused() -> None:
    e = experiment()
    e.steering.magnitudes = (8.0,)
    with pytest.raises(ValueError, match=r"steering\.magnitudes=\(8\.0,\), expected 0 among them"):
        checks.check(e)


@pytest.mark.parametrize(
    ("text", "reason", "right"),
    [
        ("Two and five.</think> The answer is 7.", "stop", True),
        ("The answer is 7.</think> The answer is 8.", "stop", False),
        ("The answer is 7, wait", "length", False),
        ("Two and five. The answer is 7.", "stop", True),
        ("Two and five.</think> The answer is 7", "length", True),
    ],
)
def test_an_answer_stands_behind_the_reasoning(text: str, reason: str, right: bool) -> None:
    assert known.right(text, reason, "7") == right
