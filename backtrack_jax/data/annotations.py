"""Labelled chains `["label"]text["end-section"]`: parse them and place every section in the original trace.

A judge copies the trace while it labels it, and its copy is not exact: blank lines vanish, tags stay open,
labels are invented, the chain is copied past the end of the reasoning. So the copy only serves to *find* the sections;
a section itself is a span of the original text. Every piece of the copy is placed there or rejected with a `Reason`,
and `summarise` counts both.

Placement, in order of preference:

1. All occurrences of a section's text in the trace, white space folded (every run counts as one space). Of these the
   chain that keeps the order of the sections and covers most text is taken, the earliest where several do: a text that
   occurs twice goes to the occurrence that its neighbours allow, and one stray section cannot displace the others.
2. What occurs nowhere is looked for between its placed neighbours, by similarity (`FUZZY_RATIO`). Its first word must
   be there unchanged: windows are counted from the start of a section, so a start is exact or it is not used.
"""

import re
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from enum import StrEnum
from typing import Any, NamedTuple

import numpy as np

from backtrack_jax.data.records import LABELS, Annotation, Note, Rejection, Section, Trace
from backtrack_jax.data.text import reasoning_end, sentence_spans

FUZZY_RATIO = 0.9
"""`difflib` ratio (2 x matching characters / characters of both) above which an altered text is still placed."""

_MOST_COMPARED = 20_000_000  # pairs of characters per altered text, about a second; 28,290 at most in released chains


class Reason(StrEnum):
    """Why a piece of a labelled chain was rejected, or what was noted about one that was placed."""

    # Rejected.
    NO_SECTIONS = "no_sections"
    """The answer holds no tag at all: the judge did not label the chain."""
    UNKNOWN_LABEL = "unknown_label"
    """The judge invented a label."""
    EMPTY = "empty"
    """A tag is followed by the next tag: a section without text (often the same label is then opened again)."""
    UNTAGGED = "untagged"
    """Text outside all tags."""
    STRAY_CLOSER = "stray_closer"
    """A closer without an open section, with the text in front of it: the rest of a section that another one split."""
    NOT_FOUND = "not_found"
    """Nothing in the trace, between the neighbours of the section, is like its text."""
    OUT_OF_ORDER = "out_of_order"
    """The text occurs in the trace, but only where other sections are: repeated by the judge, or in the wrong place."""
    AFTER_END = "after_end"
    """The section starts after `</think>` or an end-of-text marker: it belongs to the answer, not to the reasoning."""

    # Placed, and noted.
    BROKEN_OPENER = "broken_opener"
    """The opening tag is misspelt (`['Deduction']`, `["adding_knowledge"]`); the label is clear."""
    BROKEN_CLOSER = "broken_closer"
    """The closing tag is misspelt, most often `["end-section]`, or names the label, as `["/deduction"]`."""
    UNCLOSED = "unclosed"
    """The section has no closer: it ends at the next opening tag, or with the answer."""
    FOLDED = "folded"
    """Placed after folding white space: the judge changed line breaks or spaces inside the section."""
    FUZZY = "fuzzy"
    """Placed by similarity: the judge altered the text."""
    AMBIGUOUS = "ambiguous"
    """The text occurs more than once between the neighbours of the section; the first occurrence was taken."""
    CLIPPED = "clipped"
    """The section runs past the end of the reasoning and was cut there."""


_REPAIRS = frozenset({Reason.BROKEN_OPENER, Reason.BROKEN_CLOSER, Reason.UNCLOSED})
_REFUSALS = frozenset({Reason.UNKNOWN_LABEL, Reason.EMPTY, Reason.UNTAGGED, Reason.STRAY_CLOSER, Reason.NO_SECTIONS})

_QUOTE = r"\\?[\"'`\u201c\u201d\u201e\u2018\u2019]"
_CLOSERS = ("end-section", *(f"{mark}{name}" for mark in ("/", "end-") for name in (*LABELS, "section", "label")))
_KNOWN = "|".join(name.replace("-", "[-_ ]?") for name in (*LABELS, *_CLOSERS))
_TAG = re.compile(
    rf"\[\s*{_QUOTE}\s*(?P<quoted>/?[A-Za-z][\w -]*?)\s*(?:{_QUOTE})?\s*\]"  # ["label"], and the broken ["label]
    rf"|\[\s*(?P<bare>{_KNOWN})\s*(?:{_QUOTE})?\s*\]"  # [label]
    rf"|\[\s*{_QUOTE}\s*(?P<open>{_KNOWN})\s*{_QUOTE}",  # ["label"
    re.IGNORECASE,
)
_CANONICAL = {name: "end-section" for name in (name.replace("-", "") for name in _CLOSERS)}
_CANONICAL |= {name.replace("-", ""): name for name in LABELS}


@dataclass(frozen=True)
class ParsedSection:
    """One piece of a labelled chain, before it is placed.

    Attributes:
        label: as written where it is unknown, canonical where it is known, empty for text outside tags.
        text: the judge's copy, without white space at its ends.
        defects: what is wrong with the piece itself.
    """

    label: str
    text: str
    defects: tuple[Reason, ...] = ()

    @property
    def well_formed(self) -> bool:
        """A known label in a proper opening tag, text without a tag inside, and a proper closing tag."""
        return not self.defects


def parse_sections(annotated: str, original: str = "") -> list[ParsedSection]:
    """Cuts a labelled chain at its tags, whatever state they are in.

    Args:
        annotated: the judge's answer.
        original: text of the trace; brackets with an unknown word in quotes that occur there are text, not tags.

    Returns:
        All pieces in order, the unusable ones with a defect that says why. White space between tags is not a piece.
    """
    tags = [tag for tag in _TAG.finditer(annotated) if _is_tag(tag, original)]
    if not tags:
        return [ParsedSection("", annotated.strip(), (Reason.NO_SECTIONS,))]
    pieces: list[ParsedSection] = []
    label: str | None = None
    defects: tuple[Reason, ...] = ()
    end = 0
    for tag in tags:
        text = annotated[end : tag.start()].strip()
        name = _tag_name(tag)
        closes = name == "end-section"
        proper = tag[0] == f'["{name}"]'
        if label is not None:
            closing = (() if proper else (Reason.BROKEN_CLOSER,)) if closes else (Reason.UNCLOSED,)
            pieces.append(_piece(label, text, defects + closing))
        elif closes:
            pieces.append(ParsedSection("", text, (Reason.STRAY_CLOSER,)))
        elif text:
            pieces.append(ParsedSection("", text, (Reason.UNTAGGED,)))
        label = None if closes else name
        defects = () if proper else (Reason.BROKEN_OPENER,)
        end = tag.end()
    text = annotated[end:].strip()
    if label is not None:
        pieces.append(_piece(label, text, (*defects, Reason.UNCLOSED)))
    elif text:
        pieces.append(ParsedSection("", text, (Reason.UNTAGGED,)))
    return pieces


def _piece(label: str, text: str, defects: tuple[Reason, ...]) -> ParsedSection:
    if label not in LABELS:
        defects = (Reason.UNKNOWN_LABEL, *defects)
    elif not text:
        defects = (Reason.EMPTY, *defects)
    return ParsedSection(label, text, defects)


def _tag_name(tag: re.Match[str]) -> str:
    name = tag["quoted"] or tag["bare"] or tag["open"]
    if not name.isascii():  # letters that only look like those of a label, or that Unicode folds into them
        return name
    return _CANONICAL.get(re.sub(r"[-_ ]", "", name).lower(), name)


def _is_tag(tag: re.Match[str], original: str) -> bool:
    name = _tag_name(tag)
    if name in _CANONICAL.values():
        return True
    return not name.startswith("/") and tag[0] == f'["{name}"]' and tag[0] not in original


def align(trace: Trace, annotated: str, judge: str = "released") -> Annotation:
    """Places the sections of a labelled chain in the original text of its trace.

    Args:
        trace: the trace that was labelled; spans index its `text`.
        annotated: the judge's answer, `["label"]text["end-section"]...`.
        judge: name to record.

    Returns:
        Sections in text order that do not overlap and start in front of `reasoning_end`. A section ends after its last
        non-space character. Every other piece of the answer is a rejection; notes name repairs and inexact placement.
    """
    pieces = parse_sections(annotated, trace.text)
    places = _place_all(trace.text, [piece.text for piece in pieces])
    end = reasoning_end(trace.text, trace.end_marks)
    sections: list[Section] = []
    rejected: list[Rejection] = []
    notes: list[Note] = []
    for piece, place in zip(pieces, places, strict=True):
        reason = next((defect for defect in piece.defects if defect in _REFUSALS), place.failure)
        if reason is None and place.start >= end:
            reason = Reason.AFTER_END
        if reason is not None:
            rejected.append(Rejection(reason, piece.label, piece.text))
            continue
        clipped = (Reason.CLIPPED,) if place.stop > end else ()
        stop = len(trace.text[: min(place.stop, end)].rstrip())
        notes.extend(Note(code, len(sections)) for code in (*piece.defects, *place.notes, *clipped))
        sections.append(Section(piece.label, place.start, stop))
    return Annotation(trace.id, judge, tuple(sections), tuple(rejected), tuple(notes))


def coverage(trace: Trace, annotation: Annotation) -> float:
    """Share of a trace's sentences whose first character lies in a section, 0 to 1; 1 for a trace without sentences."""
    starts = [start for start, _ in sentence_spans(trace)]
    inside = sum(any(s.start <= start < s.stop for s in annotation.sections) for start in starts)
    return inside / len(starts) if starts else 1.0


@dataclass(frozen=True)
class _Place:
    """Where a text was found, `[start, stop)` of the original, or why it was not."""

    start: int = 0
    stop: int = 0
    notes: tuple[Reason, ...] = ()
    failure: Reason | None = None


def _place_all(original: str, texts: Sequence[str]) -> list[_Place]:
    folded = _FoldedText(original)
    found = {text: folded.occurrences(text) for text in set(texts)}
    candidates = [found[text] for text in texts]
    chosen = _best_chain(candidates)
    # after[i] is where the first placed one of the texts i, i+1, ... starts.
    after = [len(original)] * (len(texts) + 1)
    for index in range(len(texts) - 1, -1, -1):
        span = chosen[index]
        after[index] = span.start if span else after[index + 1]
    places: list[_Place] = []
    before, pending = 0, 0
    for index, text in enumerate(texts):
        span, high = chosen[index], after[index + 1]
        if span is not None:
            notes = (Reason.FOLDED,) if original[span.start : span.stop] != text else ()
            notes += (Reason.AMBIGUOUS,) if _has_rival(span, candidates[index], before, high) else ()
            places.append(_Place(span.start, span.stop, notes))
        elif candidates[index]:
            places.append(_Place(failure=Reason.OUT_OF_ORDER))
        else:
            # The texts that were not found since `before` lie in this region too, so it grows with them.
            pending += len(text)
            similar = _similar_span(original, text, before, min(high, before + 2 * pending + 200))
            places.append(_Place(*similar, (Reason.FUZZY,)) if similar else _Place(failure=Reason.NOT_FOUND))
        if places[-1].failure is None:
            before, pending = places[-1].stop, 0
    return places


class _Span(NamedTuple):
    """Where a text occurs, `[start, stop)` of the original; whole words and equality to the letter rank first.

    `length` is that of the text, white space folded: white space of the original makes no occurrence a better one.
    """

    start: int
    stop: int
    rank: int
    length: int


def _has_rival(span: _Span, spans: Sequence[_Span], low: int, high: int) -> bool:
    """Whether another of the spans, which are in text order, fits into [low, high) and ranks no lower."""
    for rival in spans[bisect_left(spans, low, key=lambda s: s.start) :]:
        if rival.stop > high:
            return False
        if rival is not span and rival.rank >= span.rank:
            return True
    return False


class _FoldedText:
    """A text with every run of white space as one space, and the way back to the original positions."""

    def __init__(self, original: str) -> None:
        words = list(re.finditer(r"\S+", original))
        self.original = original
        self.folded = " ".join(word[0] for word in words)
        self.original_starts = [word.start() for word in words]
        self.folded_starts: list[int] = []
        position = 0
        for word in words:
            self.folded_starts.append(position)
            position += len(word[0]) + 1

    def occurrences(self, text: str) -> list[_Span]:
        """All spans of the original that hold `text`, white space folded."""
        folded = " ".join(text.split())
        spans: list[_Span] = []
        position = self.folded.find(folded) if folded else -1
        while position >= 0:
            start, stop = self._unfold(position), self._unfold(position + len(folded) - 1) + 1
            whole = not (_splits_word(self.original, start) or _splits_word(self.original, stop))
            spans.append(_Span(start, stop, 2 * whole + (self.original[start:stop] == text), len(folded)))
            position = self.folded.find(folded, position + 1)
        return spans

    def _unfold(self, position: int) -> int:
        word = bisect_right(self.folded_starts, position) - 1
        return self.original_starts[word] + position - self.folded_starts[word]


def _splits_word(text: str, position: int) -> bool:
    """Whether a position is between two letters or digits, of any script."""
    return 0 < position < len(text) and text[position - 1].isalnum() and text[position].isalnum()


@dataclass(frozen=True)
class _Link:
    """End of a chain of placed texts: its last span, the worth of the chain, and the chain in front of it."""

    worth: int
    index: int = -1
    span: _Span | None = None
    previous: "_Link | None" = None


def _best_chain(candidates: Sequence[list[_Span]]) -> list[_Span | None]:
    """Chooses at most one span per text, in order and without overlap, so that most of the text is covered.

    `frontier` holds, for every stop, the chain of most worth that ends there or earlier, where it is worth more than
    those that end before it: stops and worths both increase, so the best predecessor of a span is one bisection away.
    Arrays, because a judge that repeats a sentence thousands of times makes as many candidates of each copy.
    """
    unit = 3 * len(candidates) + 1  # of one character covered: all ranks (0-3) together only break ties
    frontier = [_Link(0)]
    stops, worths = [0], [0]
    bounds: dict[int, np.ndarray] = {}
    for index, spans in enumerate(candidates):
        if not spans:
            continue
        # [3, S] integers: start, stop and worth of each span. Equal texts share one list.
        if id(spans) not in bounds:
            bounds[id(spans)] = np.array([(s.start, s.stop, unit * s.length + s.rank) for s in spans]).T
        begin, end, gain = bounds[id(spans)]
        before, worth_then = np.asarray(stops), np.asarray(worths)
        predecessor = np.searchsorted(before, begin, side="right") - 1
        worth = worth_then[predecessor] + gain
        # An earlier stop that is worth as much makes a span useless, one of this text (they are in order) included.
        useful = worth > worth_then[np.searchsorted(before, end, side="right") - 1]
        useful[1:] &= worth[1:] > np.maximum.accumulate(worth)[:-1]
        chosen_now = np.flatnonzero(useful)
        links = [_Link(int(worth[i]), index, spans[i], frontier[predecessor[i]]) for i in chosen_now]
        for stop, link in zip(end[chosen_now].tolist(), links, strict=True):
            first = last = bisect_left(stops, stop)
            while last < len(frontier) and frontier[last].worth <= link.worth:
                last += 1
            frontier[first:last], stops[first:last], worths[first:last] = [link], [stop], [link.worth]
    chosen: list[_Span | None] = [None] * len(candidates)
    last_link: _Link | None = frontier[-1]
    while last_link is not None:
        if last_link.span is not None:
            chosen[last_link.index] = last_link.span
        last_link = last_link.previous
    return chosen


def _similar_span(original: str, text: str, low: int, high: int) -> tuple[int, int] | None:
    """Span of `original[low:high]` most like `text`, from its first word on; None if none is above `FUZZY_RATIO`.

    The best one found when `_MOST_COMPARED` is used up: a long text of frequent words has thousands of candidates.
    """
    words = text.split()
    if not words:
        return None
    matcher = SequenceMatcher(None, "", text, autojunk=False)
    slack = len(text) // 5 + 8
    best, best_ratio, compared = None, FUZZY_RATIO, 0
    for opening in re.finditer(rf"(?<!\w){re.escape(words[0])}(?!\w)", original[low:high], re.IGNORECASE):
        start = low + opening.start()
        limit = min(start + len(text) + slack, high)
        endings = re.finditer(re.escape(words[-1]), original[start:limit], re.IGNORECASE)
        stops = [start + ending.end() for ending in endings] + [min(start + len(text), high)]
        for stop in stops:
            if compared > _MOST_COMPARED:
                break
            matcher.set_seq1(original[start:stop])
            # These are upper bounds of ratio(): by the lengths alone, by the characters.
            if matcher.real_quick_ratio() <= best_ratio:
                continue
            compared += 10 * len(text)
            if matcher.quick_ratio() > best_ratio:
                compared += (stop - start) * len(text)
                if (ratio := matcher.ratio()) > best_ratio:
                    best, best_ratio = (start, stop), ratio
    if best is None:
        return None
    return best[0], len(original[: best[1]].rstrip())


def summarise(annotations: Iterable[Annotation]) -> dict[str, Any]:
    """Counts what was placed, what was rejected and why.

    Args:
        annotations: of any number of traces, one per trace.

    Returns:
        `traces`: number of annotations; `placed`: label -> number of sections; `notes` and `rejected`: reason ->
        label -> number; `exact`: label -> (e, w), where w counts the well-formed sections (see
        `ParsedSection.well_formed`) that belong to the reasoning, found or not, and e those of them that were placed
        to the letter where no other occurrence fits. A text that was not found counts in w whatever its tags.
    """
    placed: Counter[str] = Counter()
    notes: dict[str, Counter[str]] = {}
    rejected: dict[str, Counter[str]] = {}
    exact: Counter[str] = Counter()
    well_formed: Counter[str] = Counter()
    traces = 0
    for annotation in annotations:
        traces += 1
        codes: list[set[str]] = [set() for _ in annotation.sections]
        for note in annotation.notes:
            codes[note.section].add(note.code)
            notes.setdefault(note.code, Counter())[annotation.sections[note.section].label] += 1
        for section, found in zip(annotation.sections, codes, strict=True):
            placed[section.label] += 1
            well_formed[section.label] += not found & _REPAIRS
            exact[section.label] += not found - {Reason.CLIPPED}
        for rejection in annotation.rejected:
            rejected.setdefault(rejection.reason, Counter())[rejection.label] += 1
            well_formed[rejection.label] += rejection.reason in (Reason.NOT_FOUND, Reason.OUT_OF_ORDER)
    return {
        "traces": traces,
        "placed": dict(placed),
        "notes": {code: dict(counts) for code, counts in notes.items()},
        "rejected": {code: dict(counts) for code, counts in rejected.items()},
        "exact": {label: (exact[label], count) for label, count in well_formed.items() if count},
    }


def format_summary(summary: dict[str, Any]) -> str:
    """Table of `summarise`, for people: one line per label, then one per reason.

    Args:
        summary: what `summarise` returned (or the same after a round trip through JSON).

    Returns:
        Lines of text without a final line break.
    """
    placed = summary["placed"]
    labels = [label for label in LABELS if label in placed] + sorted(set(placed) - set(LABELS))
    lines = [f"{sum(placed.values())} sections placed in {summary['traces']} traces"]
    lines.append(f"{'label':<24}{'placed':>8}{'well-formed':>13}{'of these exact':>17}")
    for label in labels:
        exact, well_formed = summary["exact"].get(label, (0, 0))
        share = f"{exact} ({exact / well_formed:.1%})" if well_formed else "-"
        lines.append(f"{label:<24}{placed[label]:>8}{well_formed:>13}{share:>17}")
    for title, table in (("placed with a note", summary["notes"]), ("rejected", summary["rejected"])):
        lines.append(f"{title}: {sum(sum(counts.values()) for counts in table.values())}")
        width = max([16, *(len(reason) + 2 for reason in table)])  # `judge_failed:...` is long
        for reason, counts in sorted(table.items()):
            detail = ", ".join(f"{label or 'no label'} {count}" for label, count in sorted(counts.items()))
            lines.append(f"  {reason:<{width}}{sum(counts.values()):>6}  ({detail})")
    return "\n".join(lines)
