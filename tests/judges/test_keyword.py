"""The keyword judge: sentences of mathematical text, and which of them it calls backtracking."""

import random
import re

import pytest

from backtrack_jax.data import text as text_module
from backtrack_jax.data.records import OTHER, Trace, pair_annotations, read_released
from backtrack_jax.data.text import split_sentences
from backtrack_jax.judges.keyword import annotate


def sentences(text: str) -> list[str]:
    return [text[start:stop] for start, stop in split_sentences(text)]


def trace(text: str) -> Trace:
    return Trace("p/0", "p", "c", "question", text)


@pytest.mark.parametrize(
    "parts",
    [
        ["It costs 3.5 dollars.", "Then 1,000.25 more!", "Why?", "No idea."],
        ["Take a prime, e.g. Seven, i.e. 7.", "Cf. Lemma 2 vs. Eq. 3 (cf. Fig. 4).", "Done."],
        ["Take a few (2, 3, etc.) of them.", "So on etc.", "Then stop."],
        ["The answer is no.", "Wait, is it?"],
        ["Hmm... let me see.", "Wait\u2026 what?!", "OK."],
        ['He said "stop."', "Then (as I said.)", "**It ended.**", "Good"],
        ["He said (stop.) and left.", "Was it (why?) or not?", "Yes."],
        ["Let \\( x = 1. Then y = 2. \\) hold here.", "So $a. B$ is fine.", "It costs $5.", "Or is it $6?"],
        ["It starts with A.", "Then B."],
    ],
)
def test_sentences_in_a_line(parts):
    assert sentences(" ".join(parts)) == parts


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("First\n\nSecond line\nthird", ["First", "Second line", "third"]),
        (
            "Cases:\n\n1. **Corner**: 8 cubes.\n2. Edge. It has 12.\n- a point\n  * deeper\na. Last",
            ["Cases:", "1. **Corner**: 8 cubes.", "2. Edge.", "It has 12.", "- a point", "* deeper", "a. Last"],
        ),
        ("So:\n\\[\nx = 1.\n\ny", ["So:", "x = 1.", "y"]),  # a display that never closes protects nothing
        ("So:\n\\[\nx = 1. \n\\]\nThen.", ["So:", "\\[\nx = 1. \n\\]", "Then."]),
        ("$$\na. B\n$$ holds. Yes", ["$$\na. B\n$$ holds.", "Yes"]),
        ("\\begin{align}\na. B\\\\\nc\n\\end{align}\nEnd", ["\\begin{align}\na. B\\\\\nc\n\\end{align}", "End"]),
        ("```\nx = 1\n\ny. Z\n```\nEnd", ["```\nx = 1\n\ny. Z\n```", "End"]),
        ("<think>\nOkay. So", ["Okay.", "So"]),
        ("<think>Okay. So", ["Okay.", "So"]),
        ("One.\n---\n\n***\nTwo", ["One.", "Two"]),
        ("", []),
        (" \n .", []),
    ],
)
def test_lines_lists_and_latex(text, expected):
    assert sentences(text) == expected


def test_spans_are_in_order_and_leave_out_no_word():
    rng = random.Random(0)
    pieces = ["Wait", "x = 3.5", ".", "?", "\n", "\n\n", " ", "- ", "1. ", "\\(", "\\)", "$", "e.g.", "\u201d", "so"]
    for _ in range(500):
        text = "".join(rng.choice(pieces) for _ in range(30))
        spans = split_sentences(text)
        end = 0
        for start, stop in spans:
            assert end <= start < stop
            assert not text[start].isspace() and not text[stop - 1].isspace()
            assert not any(character.isalnum() for character in text[end:start])
            end = stop
        assert not any(character.isalnum() for character in text[end:])


SENTENCES = ["Wait, no.", "HMM, odd.", "I am waiting.", "Await it.", "Hmmm, well.", "Oh, wait!", "Fine."]


@pytest.mark.parametrize(
    ("variant", "hits"),
    [
        ("wait_hmm", ["Wait, no.", "HMM, odd.", "Oh, wait!"]),
        ("wait", ["Wait, no.", "Oh, wait!"]),
        ("substring", ["Wait, no.", "HMM, odd.", "I am waiting.", "Await it.", "Hmmm, well.", "Oh, wait!"]),
    ],
)
def test_variants_decide_by_their_keywords(variant, hits):
    text = " ".join(SENTENCES)
    annotation = annotate(trace(text), variant)
    assert (annotation.judge, annotation.rejected) == (f"keyword:{variant}", ())
    assert [text[s.start : s.stop] for s in annotation.sections] == SENTENCES
    assert [text[s.start : s.stop] for s in annotation.sections if s.label == "backtracking"] == hits
    assert {s.label for s in annotation.sections} == {"backtracking", OTHER}


def test_long_runs_end_sentences_where_short_ones_do():
    """Replies that fall apart hold thousands of dots or blanks; each must not be tried to its end from each of them."""
    rng = random.Random(0)
    slow = re.compile(r"\s*\n\s*|[.!?\u2026]+(?P<closers>[\"'\u201d\u2019)\]*_]*)(?P<space>\s+)")
    for _ in range(2000):
        text = "".join(rng.choices('.!? \n"*a', k=rng.randint(1, 14)))
        assert [m.span() for m in text_module._BREAK.finditer(text)] == [m.span() for m in slow.finditer(text)], text
    assert split_sentences("So" + "." * 100_000 + "x" + " " * 100_000 + "y. Then.") == [
        (0, 200_005),
        (200_006, 200_011),
    ]


def test_only_the_reasoning_is_labelled():
    text = "It is 12. Wait, no.\n</think>\n\nWait, the answer.<\uff5cend\u2581of\u2581sentence\uff5c>"
    annotation = annotate(trace(text))
    assert [text[s.start : s.stop] for s in annotation.sections] == ["It is 12.", "Wait, no."]


def test_an_unknown_variant_names_the_accepted_ones():
    with pytest.raises(ValueError, match=r"unknown variant 'llm'.*accepted: wait_hmm, wait, substring"):
        annotate(trace("Wait."), "llm")


def test_released_chains_are_split_into_valid_sections(ward2025):
    traces, _ = read_released(ward2025)
    pairs = pair_annotations(traces, [annotate(trace) for trace in traces])
    lengths = [section.stop - section.start for _, annotation in pairs for section in annotation.sections]
    assert 20 < sum(lengths) / len(lengths) < 120
