"""The shipped problems: complete, well-formed, and none a variant of another, a released or an example one."""

import re
from collections import defaultdict
from collections.abc import Iterable
from importlib.resources import files
from itertools import combinations
from pathlib import Path

from backtrack_jax.data.problems import CATEGORIES, shipped_problems, spread
from backtrack_jax.data.records import Problem, read_problems, read_released

PROBLEMS = shipped_problems()


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower())


def ngrams(text: str, n: int) -> set[tuple[str, ...]]:
    w = words(text)
    return {tuple(w[i : i + n]) for i in range(len(w) - n + 1)}


def shared_ngrams(problems: Iterable[Problem], n: int) -> dict[str, set[str]]:
    """Runs of n words that occur in more than one problem, with the texts of these problems."""
    found: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for problem in problems:
        for gram in ngrams(problem.problem, n):
            found[gram].add(problem.problem)
    return {" ".join(gram): texts for gram, texts in found.items() if len(texts) > 1}


def test_ids_number_thirty_problems_in_each_category() -> None:
    assert [p.id for p in PROBLEMS] == [f"{category}_{number:02d}" for category in CATEGORIES for number in range(30)]
    assert all(p.id == f"{p.category}_{p.id[-2:]}" for p in PROBLEMS)


def test_texts_are_plain_and_of_reasonable_length() -> None:
    for problem in PROBLEMS:
        text = problem.problem
        assert 15 <= len(text.split()) <= 90, problem.id
        assert text.isascii() and text.isprintable(), problem.id
        assert text == " ".join(text.split()), problem.id
        assert re.fullmatch(r"[A-Z].*[.?]'?", text), problem.id


def test_no_problem_is_a_variant_of_another() -> None:
    assert shared_ngrams(PROBLEMS, 8) == {}
    trigrams = {p.id: ngrams(p.problem, 3) for p in PROBLEMS}
    similar = {
        (a, b): len(trigrams[a] & trigrams[b]) / len(trigrams[a] | trigrams[b]) for a, b in combinations(trigrams, 2)
    }
    pair = max(similar, key=lambda k: similar[k])
    assert similar[pair] < 0.1, pair


def in_common(texts: Iterable[str]) -> dict[str, set[tuple[str, ...]]]:
    """Ids of shipped problems that share a run of 8 words with the texts."""
    known = set().union(*(ngrams(text, 8) for text in texts))
    return {p.id: shared for p in PROBLEMS if (shared := ngrams(p.problem, 8) & known)}


def test_no_problem_is_a_released_one(ward2025: Path) -> None:
    released = [p for path in sorted(ward2025.glob("*_tasks.json")) for p in read_problems(path)]
    assert len(released) == 300
    assert in_common(p.problem for p in released) == {}


def test_no_problem_is_that_of_an_example_chain() -> None:
    traces, _ = read_released(Path(str(files("backtrack_jax.data") / "example_chains.json")))
    assert in_common(t.problem for t in traces) == {}


def test_the_check_for_variants_sees_one() -> None:
    first = PROBLEMS[0]
    changed = Problem("x", first.category, first.problem.replace("200", "300"))
    assert shared_ngrams([first, changed], 8)
    assert set(in_common([changed.problem])) == {first.id}


def test_a_limit_is_spread_from_the_first_to_the_last() -> None:
    assert spread(range(10), 4) == [0, 3, 6, 9] and spread("abc", 2) == ["a", "c"] and spread("abc", 1) == ["a"]
    assert spread(range(3), 0) == spread(range(3), 5) == [0, 1, 2]
