"""The graded problems: that the script writes the file that ships, and answers computed again from the texts."""

import collections
import importlib.util
import itertools
import re
from pathlib import Path
from typing import Any

import pytest

from backtrack_jax.data.answers import is_right, number
from backtrack_jax.data.problems import GRADED, graded_problems, problems_at, shipped_problems

ROOT = Path(__file__).parents[2]
PROBLEMS = graded_problems()


def test_there_are_twenty_of_each_category_and_difficulty() -> None:
    counts = collections.Counter((problem.category, problem.difficulty) for problem in PROBLEMS)
    assert counts == {(category, level): 20 for category in GRADED for level in (1, 2, 3)}
    assert len({problem.id for problem in PROBLEMS}) == len({problem.problem for problem in PROBLEMS}) == 180
    assert all(problem.answer and "Answer with" in problem.problem for problem in PROBLEMS)
    assert all(is_right(f"Therefore the answer is {problem.answer}.", problem.answer) for problem in PROBLEMS)
    assert all(number(problem.answer) is not None for problem in PROBLEMS if problem.category in GRADED[::2])
    assert problems_at("package:backtrack_jax/data/graded.jsonl") == PROBLEMS
    assert not {problem.id for problem in PROBLEMS} & {problem.id for problem in shipped_problems()}


def test_the_script_writes_the_file_that_ships(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("graded_problems", ROOT / "scripts" / "graded_problems.py")
    assert spec and spec.loader
    script: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.main(["--check"]) == 0
    monkeypatch.setattr(script, "OUT", tmp_path / "graded.jsonl")
    assert script.main(["--check"]) == 1


def texts(*patterns: str) -> list[tuple[tuple[str, ...], str]]:
    """Groups of the problems that a pattern describes, with their answers."""
    matches = [(re.search(pattern, p.problem), p.answer) for p in PROBLEMS for pattern in patterns]
    found = [(match.groups(), answer) for match, answer in matches if match]
    assert len(found) >= 4
    return found


def test_remainders() -> None:
    for (a, b, m), answer in texts(r"when (\d+)\^(\d+) is divided by (\d+)"):
        rest = 1
        for _ in range(int(b)):
            rest = rest * int(a) % int(m)
        assert str(rest) == answer


def test_heavier_and_lighter() -> None:
    """By the longest chains above and below, not by going through orders."""
    checked = 0
    for problem in PROBLEMS:
        asked = re.search(r"second (heaviest|lightest) of the (\d+)", problem.problem)
        if not asked:
            continue
        above = [pair if word == "heavier" else pair[::-1] for *pair, word in _compared(problem.problem)]
        people = {name for pair in above for name in pair}
        closure = {(a, b) for a, b in map(tuple, above)}
        while more := {(a, d) for a, b in closure for c, d in closure if b == c} - closure:
            closure |= more
        n = int(asked[2])
        place = 1 if asked[1] == "heaviest" else n - 2
        higher = {name: sum(b == name for _, b in closure) for name in people}
        lower = {name: sum(a == name for a, _ in closure) for name in people}
        sure = [name for name in people if higher[name] >= place and lower[name] >= n - 1 - place]
        assert sure == [problem.answer]
        checked += 1
    assert checked >= 4


def _compared(text: str) -> list[tuple[str, str, str]]:
    return [(a, b, word) for a, word, b in re.findall(r"(\w+) is (heavier|lighter) than (\w+)", text)]


def test_buttons_of_a_lift() -> None:
    """By the numbers of both presses, up to which the floors stay inside in some order."""
    pattern = r"floors 1 to (\d+) has two buttons: one goes up (\d+) floors, one goes down (\d+)"
    for groups, answer in texts(pattern + r".* floor (\d+) to floor (\d+)"):
        floors, up, down, start, goal = map(int, groups)
        reached, presses = {start}, 0
        while goal not in reached:
            reached = {f + d for f, d in itertools.product(reached, (up, -down)) if 1 <= f + d <= floors}
            presses += 1
        assert str(presses) == answer


def test_ways_to_pay() -> None:
    for (values, total), answer in texts(r"coins worth ([\d, and]+) cents. In how many ways can exactly (\d+)"):
        coins, total = [int(v) for v in re.findall(r"\d+", values)], int(total)
        counts = itertools.product(*(range(total // coin + 1) for coin in coins[1:]))
        rest = [total - sum(n * coin for n, coin in zip(n, coins[1:], strict=True)) for n in counts]
        assert str(sum(left >= 0 and left % coins[0] == 0 for left in rest)) == answer


def test_syllogisms_of_three_kinds() -> None:
    """By every village there could be: which of the eight sorts of people live in it."""
    rules = {
        "All": lambda w, a, b: all(s[b] for s in w if s[a]),
        "No": lambda w, a, b: not any(s[a] and s[b] for s in w),
        "Some": lambda w, a, b: any(s[a] and s[b] for s in w),
    }
    rule = r"(\w+) (\w+) are (\w+)\. "
    pattern = rf"of each kind\. {rule}{rule}Is anyone both among the (\w+) and among the (\w+)\?"
    found = [(match.groups(), p.answer) for p in PROBLEMS if (match := re.search(pattern, p.problem))]
    assert len(found) >= 2
    for (form, a, b, other, b_again, c, first, last), answer in found:
        assert (a, b, c) == (first, b_again, last)
        sorts = list(itertools.product((False, True), repeat=3))
        villages = [set(itertools.compress(sorts, mask)) for mask in itertools.product((0, 1), repeat=8)]
        there = [w for w in villages if all(any(s[i] for s in w) for i in range(3))]
        there = [w for w in there if rules[form](w, 0, 1) and rules[other](w, 1, 2)]
        shared = {any(s[0] and s[2] for s in w) for w in there}
        assert answer == ("cannot be told" if len(shared) == 2 else "yes" if shared == {True} else "no")
