"""Measures of replies: counters side by side, effects on single problems, what a condition adds up to."""

import math
from typing import Any

import pytest

from backtrack_jax.analysis import replies
from backtrack_jax.analysis.statistics import mean_interval, paired_interval, rate_interval
from backtrack_jax.data.records import Annotation, Condition, Reply, Section
from backtrack_jax.data.text import split_sentences

LIKELY = {"Wait, no. I am waiting.": -1.0, "So it is.": -3.0, "Hmm. Hmm. Hmm. Hmm.": -2.0, "": math.nan}


def condition(kind: str, magnitude: float) -> Condition:
    return Condition("base", kind, "", 1, "", magnitude, magnitude)


def row(text: str, problem: str, kind: str, magnitude: float, ids: tuple[int, ...] = (1, 2)) -> dict[str, Any]:
    of = condition(kind, magnitude)
    reply = Reply(problem, "c", "Wait for it.", 0, "base", of, "absolute", "all", "", 0, ids, text, "stop")
    return replies.measure(reply, "Wait for it.", {2}, LIKELY[text])


def test_counters_side_by_side() -> None:
    found = row("Wait, no. I am waiting.", "a", "noise", 1.0, (2, 2, 5, 7))
    assert (found["hits"], found["words"]) == (1, 5)  # whole words of the reply
    assert (found["substring_hits"], found["substring_words"]) == (3, 7)  # over prompt and reply, glued together
    assert (found["token_rate"], found["tokens"]) == (0.5, 4)
    assert (found["keyword_sentences"], found["sentences"]) == (1, 2)
    assert found["repeated_2grams"] == 0 and found["log_likelihood"] == -1.0


ROWS = [
    row("So it is.", "a", "unsteered", 0.0),
    row("So it is.", "b", "unsteered", 0.0),
    row("Wait, no. I am waiting.", "a", "noise", 1.0),
    row("So it is.", "a", "noise", 1.0),
    row("Hmm. Hmm. Hmm. Hmm.", "b", "noise", 1.0),
    row("", "c", "noise", 1.0),
]


def test_effects_are_paired_by_problem() -> None:
    found = replies.effects(ROWS)
    assert [(f["problem_id"], f["rate"], f["unsteered"], f["effect"]) for f in found] == [
        ("a", 1 / 8, 0.0, 1 / 8),  # its two replies pooled
        ("b", 1.0, 0.0, 1.0),
    ]  # c was never sampled unsteered
    assert replies.effects(ROWS[2:]) == []


def test_a_condition_by_hand() -> None:
    plain, noise = replies.summarise(ROWS)
    assert (plain["rate"], plain["n_problems"], plain["log_likelihood"]) == (0.0, 2, -3.0)
    assert math.isnan(plain["effect"])
    assert noise["rate"] == pytest.approx(5 / 12) and noise["n_words"] == 12 and noise["n_hits"] == 5
    assert (noise["low"], noise["high"]) == rate_interval([1, 4, 0], [8, 4, 0])
    names = ("log_likelihood", "sentence_rate", "token_rate")
    ends = {name: (noise[f"{name}_low"], noise[f"{name}_high"]) for name in names}
    assert ends["log_likelihood"] == mean_interval([-4.0, -2.0], [2, 1])  # problem c has no likelihood
    assert ends["sentence_rate"] == rate_interval([1, 4, 0], [3, 4, 0])
    assert (noise["token_rate"], ends["token_rate"]) == (0.5, rate_interval([2, 1, 1], [4, 2, 2]))  # pooled tokens
    assert math.isnan(noise["judge_rate"]) and math.isnan(noise["judge_rate_low"])  # nobody was asked
    assert noise["mean_rate"] == pytest.approx((1 / 5 + 0 + 1 + 0) / 4)
    assert noise["std_rate"] == pytest.approx(0.17**0.5)
    assert noise["log_likelihood"] == pytest.approx(-2.0)  # of the replies that have one
    assert noise["sentence_rate"] == pytest.approx(5 / 7) and noise["repeated_3grams"] == pytest.approx(1 / 8)
    assert noise["effect"] == pytest.approx(5 / 12)  # of the rates of the problems that both have, pooled
    assert (noise["effect_low"], noise["effect_high"]) == paired_interval([[1, 4], [0, 0]], [[8, 4], [3, 3]], [1, -1])


def test_an_effect_is_the_pooled_rate_less_the_unsteered_one_of_the_same_problems() -> None:
    """A long reply counts as its words do, not as one of two problems."""
    long = [{**line, "words": 30} if line["problem_id"] == "a" else line for line in ROWS]
    plain, noise = replies.summarise([line for line in long if line["problem_id"] != "c"])
    assert noise["effect"] == noise["rate"] - plain["rate"] == pytest.approx(5 / 64)
    with_c = replies.summarise(long)[1]  # c was never sampled unsteered, and has no words
    assert with_c["n_problems"] == 3 and with_c["effect"] == noise["effect"]


@pytest.mark.parametrize("hits", [0, 1])
def test_no_cell_has_a_rate_without_width(hits: int) -> None:
    """Neither where nothing was said, nor where all is the same."""
    lines = [{**line, "hits": hits * line["words"], "substring_hits": 0, "keyword_sentences": 0} for line in ROWS]
    for cell in replies.summarise(lines):
        for name in ("", "substring_rate_", "token_rate_", "sentence_rate_"):
            assert cell[f"{name}low"] < cell[f"{name}high"]
        assert math.isnan(cell["effect"]) or cell["effect_low"] < cell["effect_high"]


def test_the_order_of_replies_does_not_matter() -> None:
    def keyed(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        return {found["kind"]: {k: repr(v) for k, v in found.items()} for found in rows}

    assert keyed(replies.summarise(ROWS)) == keyed(replies.summarise([*ROWS[:2], ROWS[3], ROWS[2], *ROWS[4:]]))


def test_a_contrast_is_over_the_problems_that_all_its_conditions_have() -> None:
    """`c` was asked under noise alone."""
    noise, plain = condition("noise", 1.0), condition("unsteered", 0.0)
    value, interval = replies.contrast(ROWS, {noise: 1, plain: -1})
    assert value == pytest.approx(5 / 12)  # nothing is said unsteered
    assert interval == paired_interval([[1, 4], [0, 0]], [[8, 4], [3, 3]], [1, -1])
    assert replies.contrast(ROWS, {noise: 2})[0] == pytest.approx(10 / 12)
    with pytest.raises(ValueError, match="no reply was sampled under noise at layer 1 of the base model, magnitude 2"):
        replies.contrast(ROWS, {noise: 1, condition("noise", 2.0): -1})
    with pytest.raises(ValueError, match="no problem was asked under all of these conditions"):
        replies.contrast([*ROWS[:2], ROWS[5]], {noise: 1, plain: -1})


def test_a_judge_counts_the_sentences_that_it_labelled() -> None:
    """A section that ends where the next sentence starts does not label that one; nor does a judge that failed."""
    text = "So it is. Wait, no. I am here. The end."
    (_, (wait, _), (i_am, i_am_stop), _) = split_sentences(text)
    of = condition("noise", 1.0)
    reply = Reply("a", "c", "Is it?", 0, "base", of, "absolute", "all", "", 0, (1,), text, "stop")

    def measured(*sections: Section) -> dict[str, Any]:
        return replies.measure(reply, "", set(), -1.0, Annotation(reply.trace().id, "judge", sections))

    one = measured(Section("backtracking", wait, i_am), Section("deduction", i_am, i_am_stop))
    assert (one["judged_sentences"], one["judged_backtracking"]) == (2, 1)
    none, silent = measured(Section("deduction", 0, len(text))), measured()
    assert (none["judged_sentences"], none["judged_backtracking"]) == (4, 0)
    assert (silent["judged_sentences"], silent["judged_backtracking"]) == (0, 0)
    (cell,) = replies.summarise([one, none, silent])
    assert (cell["n_judged"], cell["n_replies"]) == (2, 3)
    assert cell["judge_rate"] == pytest.approx(1 / 6) and cell["sentence_rate"] == pytest.approx(3 / 12)
