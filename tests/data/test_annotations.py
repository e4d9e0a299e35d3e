"""Placing labelled sections: every defect has a fixture, and positions are checked by independent means."""

import json
import random
import re
import time
from collections import Counter
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest

from backtrack_jax.data.annotations import Reason, align, format_summary, parse_sections, summarise
from backtrack_jax.data.records import LABELS, Annotation, Trace, pair_annotations, read_released
from backtrack_jax.data.text import reasoning_end

TEXT = (
    "Okay, how many legs do 3 cats have?\n\n"
    "A cat has 4 legs. So 3 cats have 7 legs.\n\n"
    "Wait, that adds. I should multiply: 3 * 4 = 12.\n\n"
    "Wait, that adds nothing new. So it is 12"
)


def trace(text: str = TEXT) -> Trace:
    return Trace("p/0", "p", "c", "question", text)


def tag(label: str, text: str) -> str:
    return f'["{label}"]{text}["end-section"]'


def placed(annotated: str, text: str = TEXT) -> list[tuple[str, str]]:
    """Labels and texts of the placed sections; checks the invariants of every annotation on the way."""
    annotation = align(trace(text), annotated)
    pair_annotations([trace(text)], [annotation])
    spans = [(section.start, section.stop) for section in annotation.sections]
    assert all(stop <= start for (_, stop), (start, _) in pairwise(spans)), "overlap"
    assert all(not text[start].isspace() and not text[stop - 1].isspace() for start, stop in spans)
    return [(section.label, text[section.start : section.stop]) for section in annotation.sections]


def codes(annotated: str, text: str = TEXT) -> tuple[list[str], list[tuple[str, str, str]]]:
    annotation = align(trace(text), annotated)
    return [n.code for n in annotation.notes], [(r.reason, r.label, r.text) for r in annotation.rejected]


def test_a_perfect_answer_is_placed_without_notes() -> None:
    annotated = tag("deduction", "A cat has 4 legs.") + "\n\n" + tag("backtracking", " Wait, that adds. ")
    assert placed(annotated) == [("deduction", "A cat has 4 legs."), ("backtracking", "Wait, that adds.")]
    assert codes(annotated) == ([], [])
    assert all(piece.well_formed for piece in parse_sections(annotated))


@pytest.mark.parametrize(
    ("annotated", "sections", "notes"),
    [
        # The closer of 53 of the 1,000 released chains.
        ('["deduction"]So it is 12["end-section]', [("deduction", "So it is 12")], [Reason.BROKEN_CLOSER]),
        ("[\"deduction\"]A cat has 4 legs.['end-section']", [("deduction", "A cat has 4 legs.")], ["broken_closer"]),
        # Closers that name the label.
        ('["deduction"]A cat has 4 legs.["/deduction"]', [("deduction", "A cat has 4 legs.")], ["broken_closer"]),
        ('["deduction"]A cat has 4 legs.["end-deduction"]', [("deduction", "A cat has 4 legs.")], ["broken_closer"]),
        ('["deduction"]A cat has 4 legs.["/section"]', [("deduction", "A cat has 4 legs.")], ["broken_closer"]),
        ('["deduction"]A cat has 4 legs.["/label"]', [("deduction", "A cat has 4 legs.")], ["broken_closer"]),
        ('["deduction"]A cat has 4 legs.["end-label"]', [("deduction", "A cat has 4 legs.")], ["broken_closer"]),
        ('["deduction"]A cat has 4 legs.[end_section]', [("deduction", "A cat has 4 legs.")], ["broken_closer"]),
        ('["deduction"]A cat has 4 legs.["end-section"', [("deduction", "A cat has 4 legs.")], ["broken_closer"]),
        (
            '["deduction]A cat has 4 legs.["end-section"]',
            [("deduction", "A cat has 4 legs.")],
            [Reason.BROKEN_OPENER],
        ),
        (
            "[\u201cAdding_Knowledge\u201d]A cat has 4 legs.[\u201cend-section\u201d]",
            [("adding-knowledge", "A cat has 4 legs.")],
            ["broken_opener", "broken_closer"],
        ),
        (
            r"[\"deduction\"]A cat has 4 legs.[\"end-section\"]",
            [("deduction", "A cat has 4 legs.")],
            ["broken_opener", "broken_closer"],
        ),
        ('["deduction"]A cat has 4 legs. So 3', [("deduction", "A cat has 4 legs. So 3")], [Reason.UNCLOSED]),
        (
            '["deduction"]A cat has 4 legs.["backtracking"]Wait, that adds.["end-section"]',
            [("deduction", "A cat has 4 legs."), ("backtracking", "Wait, that adds.")],
            [Reason.UNCLOSED],
        ),
        (
            tag("initializing", "Okay, how many legs do 3\n\ncats have? A  cat"),
            [("initializing", "Okay, how many legs do 3 cats have?\n\nA cat")],
            [Reason.FOLDED],
        ),
        (
            tag("deduction", "I should multiply: 3 \u00d7 4 = 12"),
            [("deduction", "I should multiply: 3 * 4 = 12")],
            [Reason.FUZZY],
        ),
    ],
)
def test_repaired_defects_are_placed_and_noted(
    annotated: str, sections: list[tuple[str, str]], notes: list[Any]
) -> None:
    assert placed(annotated) == sections
    assert codes(annotated) == (notes, [])


@pytest.mark.parametrize(
    ("annotated", "sections", "rejected"),
    [
        ("I cannot label this.", [], [(Reason.NO_SECTIONS, "", "I cannot label this.")]),
        ("", [], [("no_sections", "", "")]),
        (
            tag("verification", "A cat has 4 legs.") + tag("deduction", "So 3 cats have 7 legs."),
            [("deduction", "So 3 cats have 7 legs.")],
            [(Reason.UNKNOWN_LABEL, "verification", "A cat has 4 legs.")],
        ),
        # A tag that is opened twice: the plain pattern `tag(.*?)closer` swallows the second one.
        (
            '["initializing"]\n\n' + tag("deduction", "A cat has 4 legs."),
            [("deduction", "A cat has 4 legs.")],
            [(Reason.EMPTY, "initializing", "")],
        ),
        (
            tag("deduction", " ") + tag("deduction", "A cat has 4 legs."),
            [("deduction", "A cat has 4 legs.")],
            [("empty", "deduction", "")],
        ),
        (
            "Here it is:\n"
            + tag("deduction", "A cat has 4 legs.")
            + " So 3 cats\n\n"
            + tag("backtracking", "Wait, that"),
            [("deduction", "A cat has 4 legs."), ("backtracking", "Wait, that")],
            [(Reason.UNTAGGED, "", "Here it is:"), ("untagged", "", "So 3 cats")],
        ),
        # Nested: the outer section ends where the inner one starts, its rest has no label.
        (
            '["deduction"]A cat has 4 legs. ' + tag("backtracking", "So 3 cats") + ' have 7 legs.["end-section"]',
            [("deduction", "A cat has 4 legs."), ("backtracking", "So 3 cats")],
            [(Reason.STRAY_CLOSER, "", "have 7 legs.")],
        ),
        (
            tag("deduction", "A dog has as many legs as a table.") + tag("backtracking", "Wait, that adds."),
            [("backtracking", "Wait, that adds.")],
            [(Reason.NOT_FOUND, "deduction", "A dog has as many legs as a table.")],
        ),
        (
            tag("deduction", "A cat has 4 legs.") * 2 + tag("backtracking", "Wait, that adds."),
            [("deduction", "A cat has 4 legs."), ("backtracking", "Wait, that adds.")],
            [(Reason.OUT_OF_ORDER, "deduction", "A cat has 4 legs.")],
        ),
    ],
)
def test_unusable_pieces_are_rejected_with_their_reason(
    annotated: str, sections: list[tuple[str, str]], rejected: list[Any]
) -> None:
    assert placed(annotated) == sections
    assert codes(annotated)[1] == rejected


def test_reasoning_ends_at_the_first_marker() -> None:
    answered = TEXT + ".\n</think>\n\nTwelve legs.<\uff5cend\u2581of\u2581sentence\uff5c>"
    assert reasoning_end(answered) == len(TEXT) + 2
    assert reasoning_end("It is 12.<|eot_id|></think>") == len("It is 12.")
    assert reasoning_end(TEXT) == len(TEXT)


def test_sections_of_the_answer_are_rejected_and_those_that_run_into_it_are_clipped() -> None:
    answered = TEXT + ".\n</think>\n\nTwelve legs.<\uff5cend\u2581of\u2581sentence\uff5c>"
    annotated = tag("deduction", "So it is 12.\n</think>\n\nTwelve") + tag("deduction", "legs.")
    assert placed(annotated, answered) == [("deduction", "So it is 12.")]
    assert codes(annotated, answered) == ([Reason.CLIPPED], [(Reason.AFTER_END, "deduction", "legs.")])
    # The judge drops the marker and labels the answer: the same words in the reasoning must not attract it.
    repeated = "Twelve legs. Hmm, sure.\n</think>\n\nTwelve legs."
    annotated = tag("deduction", "Twelve legs.") + tag("backtracking", "Hmm, sure.") + tag("deduction", "Twelve legs.")
    assert placed(annotated, repeated) == [("deduction", "Twelve legs."), ("backtracking", "Hmm, sure.")]
    assert codes(annotated, repeated) == ([], [("after_end", "deduction", "Twelve legs.")])


def test_a_repeated_text_goes_to_the_occurrence_that_its_neighbours_allow() -> None:
    second = TEXT.index("Wait, that adds nothing")
    annotation = align(trace(), tag("deduction", "3 * 4 = 12.") + tag("backtracking", "Wait, that adds"))
    assert annotation.sections[1].start == second  # str.find would answer the first
    first = align(trace(), tag("backtracking", "Wait, that adds") + tag("deduction", "3 * 4 = 12."))
    assert first.sections[0].start == TEXT.index("Wait, that adds")
    assert annotation.notes == first.notes == ()


def test_a_section_that_ends_with_the_text_stays() -> None:
    annotation = align(trace(), tag("deduction", "So it is 12"))
    assert [(s.start, s.stop) for s in annotation.sections] == [(len(TEXT) - 11, len(TEXT))]


def test_one_stray_section_does_not_displace_the_others() -> None:
    annotated = (
        tag("deduction", "Wait, that adds nothing new.")  # labelled too early
        + tag("deduction", "A cat has 4 legs.")
        + tag("backtracking", "Wait, that adds.")
        + tag("deduction", "I should multiply: 3 * 4 = 12.")
    )
    assert [text for _, text in placed(annotated)] == [
        "A cat has 4 legs.",
        "Wait, that adds.",
        "I should multiply: 3 * 4 = 12.",
    ]
    assert codes(annotated)[1] == [("out_of_order", "deduction", "Wait, that adds nothing new.")]


def test_words_are_not_split_where_the_whole_word_occurs() -> None:
    text = "Sometimes it fails. So it holds."
    annotation = align(trace(text), tag("deduction", "So"))
    assert (annotation.sections[0].start, annotation.notes) == (text.index("So it"), ())


def test_an_unknown_word_behind_a_slash_is_text() -> None:
    text = 'The path is ["/usr"] here.'
    assert placed(tag("deduction", text), text) == [("deduction", text)]


def test_white_space_of_the_original_makes_no_occurrence_a_better_one() -> None:
    text = "Try 3. Hmm, no. Wait, let me check.\nSo 9.\nTry 2. Hmm, no.\n\n\nWait, let me check."
    annotation = align(trace(text), tag("backtracking", "Hmm, no. Wait, let me check."))
    assert [section.start for section in annotation.sections] == [text.index("Hmm")]
    assert annotation.notes == ()


def test_many_exact_words_do_not_outweigh_a_character_more() -> None:
    """The long text comes last in the trace and first in the answer: it is placed, or the ten words are."""
    words = [f"a{number}" for number in range(10)]
    for length, kept in ((21, 1), (19, 10)):
        long_text = "z" * length
        annotated = tag("backtracking", long_text) + "".join(tag("deduction", word) for word in words)
        assert len(placed(annotated, " ".join([*words, long_text]))) == kept


def test_a_sentence_that_is_repeated_thousands_of_times_takes_no_minutes() -> None:
    n = 2000
    began = time.perf_counter()
    annotation = align(trace(" ".join(["Wait, hold on."] * n)), tag("backtracking", "Wait, hold on.") * n)
    assert [section.start for section in annotation.sections] == [15 * number for number in range(n)]
    assert time.perf_counter() - began < 8  # it takes 0.2 s; comparing span by span took 23 s


def test_looking_for_an_altered_text_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backtrack_jax.data.annotations._MOST_COMPARED", 100_000)
    rng = random.Random(0)
    words = rng.choices(["the", "so", "x", "is", "two", "then"], k=600)
    altered = ["zzzz" if number % 5 == 4 else word for number, word in enumerate(words)]
    began = time.perf_counter()
    annotation = align(trace("the " + " ".join(words)), tag("deduction", "the " + " ".join(altered)))
    assert [rejection.reason for rejection in annotation.rejected] == [Reason.NOT_FOUND]
    assert time.perf_counter() - began < 2


def test_the_first_of_several_occurrences_that_fit_is_taken_and_noted() -> None:
    annotation = align(trace(), tag("initializing", "Okay,") + tag("deduction", "So") + tag("deduction", "it is 12"))
    assert annotation.sections[1].start == TEXT.index("So 3 cats")
    assert [(note.code, note.section) for note in annotation.notes] == [(Reason.AMBIGUOUS, 1)]


@pytest.mark.parametrize(
    ("copy", "found"),
    [
        ("I should multiply: 3 x 4 = 12.", True),
        ("i should multiply: 3 * 4 = 12", True),
        ("We should multiply: 3 * 4 = 12.", False),  # another first word: the start would be a guess
        ("I would rather divide: 3 / 4.", False),
    ],
)
def test_an_altered_text_is_placed_only_when_it_is_alike_from_its_first_word(copy: str, found: bool) -> None:
    annotation = align(trace(), tag("deduction", copy))
    if found:
        assert annotation.sections[0].start == TEXT.index("I should multiply")
    else:
        assert (annotation.sections, annotation.rejected[0].reason) == ((), Reason.NOT_FOUND)


@pytest.mark.parametrize(
    "text",
    [
        "Also 3 * 4 = 12 holds here.",
        "Some 3 * 4 = 12 holds here.",
    ],
)
def test_the_first_word_of_an_altered_text_is_a_whole_word(text: str) -> None:
    assert codes(tag("deduction", "So 3 x 4 = 12 holds here."), text)[1][0][0] == Reason.NOT_FOUND


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [
        ("Stop.", "", "Then 3 * 4 = 12 holds here. Stop. Then it ends."),
        ("Stop.", "It ends.", "Stop. It ends. Then 3 * 4 = 12 holds here."),
        ("I see: Then 3 * 4 = 12 holds here.", "", "I see: Then 3 * 4 = 12 holds here. Stop."),
        ("Stop.", "", "Stop. " + "Then it goes on. " * 20 + "Then 3 * 4 = 12 holds here."),  # too far away
    ],
)
def test_an_altered_text_is_looked_for_between_its_neighbours_only(before: str, after: str, text: str) -> None:
    altered = tag("deduction", "Then 3 x 4 = 12 holds here.")
    annotated = tag("backtracking", before) + altered + (tag("deduction", after) if after else "")
    assert placed(annotated, text) == [("backtracking", before)] + ([("deduction", after)] if after else [])
    assert [reason for reason, *_ in codes(annotated, text)[1]] == [Reason.NOT_FOUND]


def test_the_search_for_an_altered_text_goes_on_behind_what_was_not_found() -> None:
    text = "Stop. " + "Here the model says other things. " * 12 + "Then 3 * 4 = 12 holds here."
    altered = tag("deduction", "Then 3 x 4 = 12 holds here.")
    lost = tag("deduction", "Of this the judge made up a free summary. " * 10)
    assert placed(tag("backtracking", "Stop.") + lost + altered, text)[1][1] == "Then 3 * 4 = 12 holds here."


def test_brackets_of_the_trace_are_text_and_not_tags() -> None:
    text = 'Take d["key"] and d[X]. Then d["key"] is set. Hmm, is it?'
    annotated = tag("deduction", 'Take d["key"] and d[X].') + tag("backtracking", "Hmm, is it?")
    assert placed(annotated, text) == [("deduction", 'Take d["key"] and d[X].'), ("backtracking", "Hmm, is it?")]
    assert codes(annotated, text) == ([], [])


def random_case(rng: random.Random) -> tuple[str, str, list[tuple[str, int]]]:
    """A trace with repeated sentences, a labelled copy with other white space, and the true (label, start)s."""
    sentences = ["Wait, no.", "Hmm.", "So x = 3.5 (e.g. n = 2).", "Let me see.", "Hmm. Wait, no.", "x = 3.5"]
    text, annotated, truth = "", "", []
    for _ in range(rng.randint(1, 12)):
        text += rng.choice(["", " ", "\n\n", "\n - "]) if text else ""
        sentence, label = rng.choice(sentences), rng.choice(LABELS)
        truth.append((label, len(text)))
        text += sentence.replace(" ", rng.choice([" ", "\n", "  "]))
        annotated += rng.choice(["", "\n\n"]) + tag(label, sentence)
    return text, annotated, truth


def test_positions_of_random_traces_are_those_of_their_making() -> None:
    # Every sentence of the trace is labelled, so the full chain covers most and every start is determined.
    rng = random.Random(0)
    for _ in range(300):
        text, annotated, truth = random_case(rng)
        annotation = align(trace(text), annotated)
        assert [(s.label, s.start) for s in annotation.sections] == truth, (text, annotated)
        assert annotation.rejected == ()


def test_placement_covers_as_much_as_exhaustive_search() -> None:
    rng = random.Random(1)
    for _ in range(200):
        words = [rng.choice("abc") for _ in range(9)]
        text = " ".join(words)
        texts = [" ".join(rng.choice("abc") for _ in range(rng.randint(1, 3))) for _ in range(4)]
        choices = [[None, *(m.start() for m in re.finditer(rf"(?={re.escape(t)}(?!\w))", text))] for t in texts]
        best = 0
        for starts in product(*choices):
            spans = [(s, s + len(t)) for s, t in zip(starts, texts, strict=True) if s is not None]
            if all(stop <= start for (_, stop), (start, _) in pairwise(spans)):
                best = max(best, sum(stop - start for start, stop in spans))
        annotation = align(trace(text), "".join(tag("deduction", t) for t in texts))
        assert sum(s.stop - s.start for s in annotation.sections) == best, (text, texts)
        end = 0
        for section in annotation.sections:  # each as early as those in front of it allow
            found = re.compile(rf"\b{text[section.start : section.stop]}\b").search(text, end)
            assert found is not None and found.span() == (section.start, section.stop), (text, texts)
            end = section.stop
        assert len(annotation.sections) + len(annotation.rejected) == 4


def test_the_summary_counts_everything_once() -> None:
    answered = TEXT + ".\n</think>\n\nTwelve."
    annotations = [
        align(trace(answered), tag("backtracking", "Wait, that adds.") + tag("backtracking", "Twelve.")),
        align(trace(answered), tag("backtracking", "So it is 12.\n</think>\n\nTwelve.")),
        align(trace(), tag("backtracking", "Wait, that  adds.") + tag("deduction", "No such text at all.")),
        align(
            trace(), tag("backtracking", "Wait, that adds.") + '["backtracking"]Wait, that adds nothing["end-section]'
        ),
        align(trace(), tag("guess", "A cat") + tag("deduction", "A cat has 4 legs.")),
    ]
    summary = summarise(annotations)
    assert summary == {
        "traces": 5,
        "placed": {"backtracking": 5, "deduction": 1},
        "notes": {"clipped": {"backtracking": 1}, "folded": {"backtracking": 1}, "broken_closer": {"backtracking": 1}},
        "rejected": {"after_end": {"backtracking": 1}, "not_found": {"deduction": 1}, "unknown_label": {"guess": 1}},
        "exact": {"backtracking": (3, 4), "deduction": (1, 2)},
    }
    table = format_summary(json.loads(json.dumps(summary)))
    assert re.search(r"backtracking +5 +4 +3 \(75\.0%\)", table)
    assert re.search(r"rejected: 3\n  after_end +1 +\(backtracking 1\)", table)


# The released chains. The counts of sections that the released vectors imply (5,882, of them 227 backtracking) belong
# to *another* set of 300 chains: ten categories, every chain starts with `<think>`. Those here are three of the ten
# categories of the 1,000-chain set, in which no chain does, and they hold 5,547 tags, of them 241 backtracking.

TAG = re.compile(r'\["([a-z-]+)"?\]')


@pytest.fixture(scope="module")
def chains(ward2025: Path) -> list[tuple[Trace, str, Annotation]]:
    traces, annotated = read_released(ward2025)
    return [(trace, labelled, align(trace, labelled)) for trace, labelled in zip(traces, annotated, strict=True)]


def test_released_chains_are_placed_or_rejected_with_these_counts(
    chains: list[tuple[Trace, str, Annotation]],
) -> None:
    assert not any(trace.text.startswith("<think>") for trace, _, _ in chains)
    summary = summarise(annotation for _, _, annotation in chains)
    assert summary["placed"] == {
        "initializing": 592,
        "deduction": 2465,
        "adding-knowledge": 1250,
        "example-testing": 395,
        "uncertainty-estimation": 585,
        "backtracking": 241,
    }
    totals = {key: {code: sum(c.values()) for code, c in summary[key].items()} for key in ("notes", "rejected")}
    assert totals["notes"] == {"broken_closer": 24, "folded": 12, "fuzzy": 2, "unclosed": 1}
    assert totals["rejected"] == {"after_end": 7, "empty": 12, "untagged": 6}
    opened = sum(name != "end-section" for _, labelled, _ in chains for name in TAG.findall(labelled))
    assert opened == sum(summary["placed"].values()) + 7 + 12  # every tag is accounted for


def test_released_sections_are_where_counting_characters_puts_them(
    chains: list[tuple[Trace, str, Annotation]],
) -> None:
    """Where the copy without tags is the trace but for white space, counting non-space characters gives positions."""
    checked = Counter()
    for trace, labelled, annotation in chains:
        copy = "".join(TAG.sub("", labelled).split())
        if not "".join(trace.text.split()).startswith(copy):
            continue
        positions = [i for i, character in enumerate(trace.text) if not character.isspace()]
        truth, counted, end = set(), 0, 0
        for match in TAG.finditer(labelled):
            counted += len("".join(labelled[end : match.start()].split()))
            end = match.end()
            if match[1] != "end-section" and counted < len(positions):
                truth.add((match[1], positions[counted]))
        for section in annotation.sections:
            assert (section.label, section.start) in truth, (trace.id, section)
            checked[section.label] += 1
    assert checked["backtracking"] >= 235
    assert sum(checked.values()) >= 5400


def test_well_formed_backtracking_sections_of_the_released_chains_are_placed_to_the_letter(
    chains: list[tuple[Trace, str, Annotation]],
) -> None:
    total = exact = 0
    for trace, labelled, annotation in chains:
        found = [trace.text[s.start : s.stop] for s in annotation.sections if s.label == "backtracking"]
        for text in re.findall(r'\["backtracking"\]((?:(?!\[").)*)\["end-section"\]', labelled, re.DOTALL):
            total += 1
            if text.strip() in found:
                exact += 1
                found.remove(text.strip())
    assert total == 240
    assert exact / total >= 0.99


def test_well_formed_pieces_are_those_of_the_plain_pattern(
    chains: list[tuple[Trace, str, Annotation]],
) -> None:
    for trace, labelled, _ in chains:
        plain = re.findall(r'\["([\w-]+)"\]((?:(?!\["[a-z-]+"?\]).)*)\["end-section"\]', labelled, re.DOTALL)
        ours = [(p.label, p.text) for p in parse_sections(labelled, trace.text) if p.well_formed]
        assert ours == [(label, text.strip()) for label, text in plain if text.strip()]


def test_altered_copies_of_released_chains_are_placed_at_the_same_starts(
    chains: list[tuple[Trace, str, Annotation]],
) -> None:
    """Typing errors in every few words: starts stay exact or the section is rejected, none is misplaced."""
    rng = random.Random(2)

    def misspell(text: str) -> str:
        return re.sub(r"\b([a-z]{6})[a-z]([a-z]*)", lambda m: m[0] if rng.random() < 0.8 else m[1] + m[2], text)

    kept = misplaced = total = 0
    for trace, labelled, annotation in chains[:40]:
        pieces = re.split(r'(\["[a-z-]+"?\])', labelled)
        altered = align(trace, "".join(p if p.startswith('["') else misspell(p) for p in pieces))
        truth = {(section.label, section.start) for section in annotation.sections}
        kept += sum((section.label, section.start) in truth for section in altered.sections)
        misplaced += sum((section.label, section.start) not in truth for section in altered.sections)
        total += len(annotation.sections)
    assert misplaced == 0
    assert kept >= 0.99 * total


def test_a_section_that_starts_where_the_reasoning_ends_is_none_of_it() -> None:
    text = "So it is.</think>Done."
    annotated = tag("deduction", "So it is.") + tag("backtracking", "</think>Done.")
    assert placed(annotated, text) == [("deduction", "So it is.")]
    assert codes(annotated, text) == ([], [(Reason.AFTER_END, "backtracking", "</think>Done.")])


def test_what_was_copied_twice_counts_as_well_formed_and_not_as_exact() -> None:
    twice = tag("deduction", "A cat has 4 legs.") * 2
    assert codes(twice)[1] == [(Reason.OUT_OF_ORDER, "deduction", "A cat has 4 legs.")]
    assert summarise([align(trace(TEXT), twice)])["exact"] == {"deduction": (1, 2)}
