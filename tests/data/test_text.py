"""Spans of code and mathematics, against the regular expression that they are defined by; and their time."""

import random
import re

import pytest

from backtrack_jax.data import text

_INSIDE = r"(?:(?!\n[^\S\n]*\n).)*?"
DEFINED = re.compile(
    rf"```.*?```|\$\${_INSIDE}\$\$|\\\[{_INSIDE}\\\]|\\\({_INSIDE}\\\)|\\begin\{{(\w+\*?)\}}{_INSIDE}\\end\{{\1\}}"
    r"|\$(?=[^\s$])[^$\n]*?(?<=[^\s$])\$(?!\d)",
    re.DOTALL,
)
"""Leftmost match, alternatives in order; an opening mark without an end is searched to the end of the text."""

PIECES = (*("$", "$$", "```", r"\(", r"\)", r"\[", r"\]", r"\begin{a}", r"\end{a}", r"\begin{b*}", r"\end{b*}"),)
PIECES += (*("a", " ", ". ", "\n", "\n\n", "\n \n", "1", "x. Y"),)


def test_protected_spans_are_those_of_their_definition() -> None:
    rng = random.Random(0)
    for _ in range(4000):
        sample = "".join(rng.choices(PIECES, k=rng.randint(1, 24)))
        assert text._protected(sample) == [match.span() for match in DEFINED.finditer(sample)], sample


@pytest.mark.parametrize("opening", [r"\begin{align} a ", r"\( x = ", r"\[ x ", "$$ x ", "``` x ", "$x ", "$ "])
def test_openings_without_an_end_take_no_longer(opening: str) -> None:
    """A quarter of a million characters; the pattern took 13 s for half as many."""
    found = text.split_sentences(opening * (250_000 // len(opening)) + "so. Then.")
    assert found[-1][1] == len(opening) * (250_000 // len(opening)) + 9
