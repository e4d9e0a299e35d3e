"""Text primitives: words, sentences, the end of the reasoning, and the keyword sets of the paper's equations.

A *word* is a run of letters and digits, with apostrophes inside (`don't`); everything else separates, and case does not
matter. So "Wait," and "wait-and-see" hold the word *wait*; "waiting", "await", "Hm" and "Hmmm" hold no keyword. Markers
such as `<think>` or `<|eot_id|>` hold no words.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence

from backtrack_jax.data.records import Trace
from backtrack_jax.models.markers import END_MARKERS, START_OF_THOUGHT

KEYWORDS = ("wait", "hmm")
"""The set of Eq. 1, the backtracking rate."""

LENS_KEYWORDS = ("wait", "but")
"""The set of Eq. 2, the logit lens: a vocabulary item counts if its text contains one of them, whatever its case."""

_MARKER = re.compile(r"</?think(?:ing)?>|\[/?THINK\]|<[|\uff5c][^<>|\uff5c\s]{1,40}[|\uff5c]>")
_OPENING = re.compile(rf"\s*(?:{'|'.join(map(re.escape, START_OF_THOUGHT))})")
_WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*")

# Places in which neither a line break nor a full stop ends a sentence: see `_protected`.
_OPENER = re.compile(r"```|\$\$|\\\[|\\\(|\\begin\{(\w+\*?)\}|\$")
_CLOSERS = {"```": "```", "$$": "$$", r"\[": r"\]", r"\(": r"\)"}
_INLINE = re.compile(r"\$(?=[^\s$])[^$\n]*?(?<=[^\s$])\$(?!\d)")
_BLANK_LINE = re.compile(r"\n(?=[^\S\n]*\n)")
# Behind the look-behinds, or a long run of dots or blanks would be tried from each of them, to its end.
_BREAK = re.compile(r"(?<!\s)\s*\n\s*|(?<![.!?\u2026])[.!?\u2026]++(?P<closers>[\"'\u201d\u2019)\]*_]*)(?P<space>\s+)")
_LIST_MARKER = re.compile(r"[*_(#\s]*(?:\d{1,3}|[A-Za-z])\.\**")
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\[*_\"'])(?:e\.g|i\.e|cf|vs|figs?|eqs?|dr|mrs?|prof|approx|resp|w\.r\.t)\.$", re.IGNORECASE
)


def split_words(text: str) -> list[str]:
    """Words of a text, case-folded, in order; the module says what a word is."""
    return [word.casefold() for word in _WORD.findall(_MARKER.sub(" ", text))]


def reasoning_end(text: str, end_marks: Sequence[str] = ()) -> int:
    """Position at which the reasoning ends: that of the first of `END_MARKERS` or `end_marks`, else the text's length.

    Args:
        text: a reply.
        end_marks: further texts that end a reasoning (`Trace.end_marks`).
    """
    found = [position for marker in (*END_MARKERS, *end_marks) if (position := text.find(marker)) >= 0]
    return min(found, default=len(text))


def reasoning(trace: Trace) -> str:
    """The text of a trace up to the end of its reasoning."""
    return trace.text[: reasoning_end(trace.text, trace.end_marks)]


def opening_end(text: str) -> int:
    """Position behind what opens a reasoning, such as `<think>`, and white space around it."""
    opening = _OPENING.match(text)
    begin = opening.end() if opening else 0
    return len(text) - len(text[begin:].lstrip())


def split_sentences(text: str) -> list[tuple[int, int]]:
    """Splits a reply into sentences, with mathematics and lists in mind.

    A sentence ends at a line break, or at `.`, `!`, `?` and closing quotes or brackets in front of white space. It does
    not end inside LaTeX or a code block, after the marker of a list item (`1. `, `a. `), after an abbreviation such as
    `e.g.`, or after `.` (or a closing bracket) in front of a lower-case letter; decimals have no white space.

    Args:
        text: the reply, or the part of it that is to be split.

    Returns:
        Half-open character spans in order, without white space at their ends. Spans without a letter or digit (rules,
        lone brackets) and what opens the reasoning, such as `<think>`, are left out.
    """
    protected = _protected(text)
    starts = [start for start, _ in protected]
    opening = _OPENING.match(text)
    begin = opening.end() if opening else 0
    spans: list[tuple[int, int]] = []
    for match in _BREAK.finditer(text, begin):
        inside = bisect_right(starts, match.start()) - 1
        if inside >= 0 and match.start() < protected[inside][1]:
            continue
        if match["space"] is None:
            stop = match.start()
        elif _ends_sentence(text, begin, match):
            stop = match.start("space")
        else:
            continue
        spans.append((begin, stop))
        begin = match.end()
    spans.append((begin, len(text)))
    return [span for span in (_strip(text, *span) for span in spans) if split_words(text[slice(*span)])]


def _protected(text: str) -> list[tuple[int, int]]:
    """Spans of code blocks and mathematics; display mathematics holds no blank line, inline one no line break.

    Every closing mark is looked for once behind every opening one, so that openings without an end take no longer.
    """
    blanks = [match.start() for match in _BLANK_LINE.finditer(text)]
    next_at: dict[str, int] = {}  # of a closing mark: where the next one stands, len(text) for nowhere
    spans: list[tuple[int, int]] = []
    at = 0
    while (opener := _OPENER.search(text, at)) is not None:
        at = opener.start() + 1
        if opener[0] == "$":
            if (inline := _INLINE.match(text, opener.start())) is not None:
                spans.append(inline.span())
                at = inline.end()
            continue
        closer = _CLOSERS.get(opener[0]) or rf"\end{{{opener[1]}}}"
        if next_at.get(closer, -1) < opener.end():
            found = text.find(closer, opener.end())
            next_at[closer] = found if found >= 0 else len(text)
        stop = next_at[closer]
        blank = bisect_left(blanks, opener.end())
        whole = closer == "```" or blank == len(blanks) or blanks[blank] >= stop
        if stop < len(text) and whole:
            at = stop + len(closer)
            spans.append((opener.start(), at))
    return spans


def _ends_sentence(text: str, begin: int, match: re.Match[str]) -> bool:
    """Whether the punctuation ends the sentence that starts at `begin`."""
    if "\n" in match["space"]:
        return True
    sentence = text[begin : match.start("space")]
    if _LIST_MARKER.fullmatch(sentence) or _ABBREVIATION.search(sentence[-12:]):
        return False
    weak = match[0][0] in ".\u2026" or match["closers"]
    return not (weak and text[match.end() : match.end() + 1].islower())


def _strip(text: str, start: int, stop: int) -> tuple[int, int]:
    piece = text[start:stop]
    return start + len(piece) - len(piece.lstrip()), start + len(piece.rstrip())


def sentence_spans(trace: Trace) -> list[tuple[int, int]]:
    """Spans of the sentences of the reasoning, in order; sentence number n of the prompt is entry n - 1."""
    return split_sentences(reasoning(trace))
