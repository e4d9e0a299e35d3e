"""The example chains of the package: whole, well labelled, and nobody else's text."""

from collections import Counter
from importlib.resources import files
from itertools import combinations
from pathlib import Path

import pytest

from backtrack_jax.data.annotations import align
from backtrack_jax.data.records import LABELS, Trace, read_released
from backtrack_jax.data.text import split_words

CATEGORIES = (
    *("math_logic", "spatial", "verbal", "pattern", "lateral"),
    *("causal", "probability", "systems", "creative", "scientific"),
)


@pytest.fixture(scope="module")
def chains() -> list[tuple[Trace, str]]:
    path = Path(str(files("backtrack_jax") / "data" / "example_chains.json"))
    return list(zip(*read_released(path), strict=True))


def eight_grams(text: str) -> set[tuple[str, ...]]:
    words = split_words(text)
    return {tuple(words[i : i + 8]) for i in range(len(words) - 7)}


def test_four_chains_per_category_each_of_its_own_problem(chains: list[tuple[Trace, str]]) -> None:
    assert Counter(trace.category for trace, _ in chains) == dict.fromkeys(CATEGORIES, 4)
    assert len({trace.problem_id for trace, _ in chains}) == len({trace.problem for trace, _ in chains}) == 40


def test_lengths_and_form(chains: list[tuple[Trace, str]]) -> None:
    for trace, _ in chains:
        assert 120 <= len(trace.text.split()) <= 260, trace.id
        assert '["' not in trace.text and trace.text == trace.text.strip(), trace.id
        assert trace.text.count("\n\n") >= 4, trace.id


def test_every_section_is_placed_to_the_letter_and_nothing_is_left_over(chains: list[tuple[Trace, str]]) -> None:
    for trace, annotated in chains:
        annotation = align(trace, annotated)
        assert annotation.rejected == () and annotation.notes == (), trace.id
        assert annotation.sections[0].label == "initializing", trace.id
        stop = 0
        for section in annotation.sections:
            assert trace.text[stop : section.start].strip() == "", (trace.id, section)
            stop = section.stop
        assert stop == len(trace.text), trace.id


def test_every_label_occurs_often_enough(chains: list[tuple[Trace, str]]) -> None:
    labels = [[section.label for section in align(*chain).sections] for chain in chains]
    assert all(1 <= own.count("backtracking") <= 3 for own in labels)
    counts = Counter(label for own in labels for label in own)
    assert set(counts) == set(LABELS)
    assert counts["backtracking"] >= 60 and min(counts.values()) >= 25, counts


def test_keywords_and_backtracking_are_not_the_same_thing(chains: list[tuple[Trace, str]]) -> None:
    """Otherwise the keyword judge would be perfect on these chains, which it is not on real ones."""
    found = Counter()
    for trace, annotated in chains:
        for section in align(trace, annotated).sections:
            keyword = not {"wait", "hmm"}.isdisjoint(split_words(trace.text[section.start : section.stop]))
            found[section.label == "backtracking", keyword] += 1
    assert found[True, True] >= 30 and found[True, False] >= 20 and found[False, True] >= 8, found


def test_no_two_chains_share_eight_words_in_a_row(chains: list[tuple[Trace, str]]) -> None:
    grams = {trace.id: eight_grams(trace.text) for trace, _ in chains}
    for one, other in combinations(grams, 2):
        assert grams[one].isdisjoint(grams[other]), (one, other, grams[one] & grams[other])


def test_no_eight_words_in_a_row_come_from_the_released_chains(chains: list[tuple[Trace, str]], ward2025: Path) -> None:
    released = set().union(*(eight_grams(f"{t.problem}\n{t.text}") for t in read_released(ward2025)[0]))
    for trace, _ in chains:
        assert released.isdisjoint(eight_grams(f"{trace.problem}\n{trace.text}")), trace.id
