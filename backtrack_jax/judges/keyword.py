"""The keyword judge: a sentence that holds a keyword of Eq. 1 is backtracking. It needs no model and no network.

Against the labels of an LLM this is a weak judge (the paper's Table C.1: F1 of 54-65 % on steered sentences), but it
costs nothing, and what it calls backtracking is known exactly.
"""

import re
from bisect import bisect_right

from backtrack_jax.analysis.backtracking import KEYWORDS, split_words
from backtrack_jax.data.annotations import reasoning_end
from backtrack_jax.data.records import OTHER, Annotation, Section, Trace

VARIANTS = ("wait_hmm", "wait", "substring")
"""`wait_hmm`: whole words {wait, hmm}, Eq. 1. `wait`: the whole word wait. `substring`: "wait" or "hmm" anywhere."""

# Places in which neither a line break nor a full stop ends a sentence. Display mathematics holds no blank line.
_INSIDE = r"(?:(?!\n[^\S\n]*\n).)*?"
_PROTECTED = re.compile(
    rf"```.*?```|\$\${_INSIDE}\$\$|\\\[{_INSIDE}\\\]|\\\({_INSIDE}\\\)|\\begin\{{(\w+\*?)\}}{_INSIDE}\\end\{{\1\}}"
    r"|\$(?=[^\s$])[^$\n]*?(?<=[^\s$])\$(?!\d)",
    re.DOTALL,
)
# Behind the look-behinds, or a long run of dots or blanks would be tried from each of them, to its end.
_BREAK = re.compile(r"(?<!\s)\s*\n\s*|(?<![.!?\u2026])[.!?\u2026]++(?P<closers>[\"'\u201d\u2019)\]*_]*)(?P<space>\s+)")
_LIST_MARKER = re.compile(r"[*_(#\s]*(?:\d{1,3}|[A-Za-z])\.\**")
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\[*_\"'])(?:e\.g|i\.e|cf|vs|figs?|eqs?|dr|mrs?|prof|approx|resp|w\.r\.t)\.$", re.IGNORECASE
)


def split_sentences(text: str) -> list[tuple[int, int]]:
    """Splits a reply into sentences, with mathematics and lists in mind.

    A sentence ends at a line break, or at `.`, `!`, `?` and closing quotes or brackets in front of white space. It does
    not end inside LaTeX or a code block, after the marker of a list item (`1. `, `a. `), after an abbreviation such as
    `e.g.`, or after `.` (or a closing bracket) in front of a lower-case letter; decimals have no white space.

    Args:
        text: the reply, or the part of it that is to be split.

    Returns:
        Half-open character spans in order, without white space at their ends. Spans without a letter or digit (rules,
        lone brackets) and an opening `<think>` are left out.
    """
    protected = [match.span() for match in _PROTECTED.finditer(text)]
    starts = [start for start, _ in protected]
    opening = re.match(r"\s*<think>", text)
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


def annotate(trace: Trace, variant: str = "wait_hmm") -> Annotation:
    """Labels the sentences of a trace by keyword.

    Args:
        trace: the trace; only its reasoning is labelled, up to `annotations.reasoning_end`.
        variant: one of `VARIANTS`.

    Returns:
        One section per sentence, labelled `backtracking` where it holds a keyword and `other` where not, so that Eq. 3
        has both its sets (D+ and all sections). The judge is named `keyword:<variant>`.

    Raises:
        ValueError: unknown variant.
    """
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r} of the keyword judge; accepted: {', '.join(VARIANTS)}")
    text = trace.text[: reasoning_end(trace.text)]
    sections = tuple(
        Section("backtracking" if _holds_keyword(text[start:stop], variant) else OTHER, start, stop)
        for start, stop in split_sentences(text)
    )
    return Annotation(trace.id, f"keyword:{variant}", sections)


def _holds_keyword(sentence: str, variant: str) -> bool:
    if variant == "substring":
        lowered = sentence.lower()
        return any(keyword in lowered for keyword in KEYWORDS)
    keywords = KEYWORDS if variant == "wait_hmm" else ("wait",)
    return not set(keywords).isdisjoint(split_words(sentence))
