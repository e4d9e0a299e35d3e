"""The keyword judge: a sentence that holds a keyword of Eq. 1 is backtracking. It needs no model and no network.

Against the labels of an LLM this is a weak judge (the paper's Table C.1: F1 of 54-65 % on steered sentences), but it
costs nothing, and what it calls backtracking is known exactly.
"""

from collections.abc import Sequence
from typing import Any

from backtrack_jax.config import Experiment
from backtrack_jax.data.records import OTHER, Annotation, Section, Trace
from backtrack_jax.data.text import KEYWORDS, reasoning, split_sentences, split_words
from backtrack_jax.judges.base import Judge

VARIANTS = ("wait_hmm", "wait", "substring")
"""`wait_hmm`: whole words {wait, hmm}, Eq. 1. `wait`: the whole word wait. `substring`: "wait" or "hmm" anywhere."""


class KeywordJudge(Judge):
    """Labels sentences by the keywords of `annotations.variant`. Replies are measured by keywords anyway."""

    name = "keyword"
    labels = ("backtracking", OTHER)
    on_replies = False

    def faults(self, e: Experiment) -> list[str]:
        """An unknown variant."""
        if (variant := e.annotations.variant) in VARIANTS:
            return []
        return [f"annotations.variant={variant!r}, expected one of {', '.join(VARIANTS)}"]

    def inputs(self, e: Experiment) -> dict[str, Any]:
        """The variant."""
        return {"variant": e.annotations.variant}

    def annotate(self, e: Experiment, traces: Sequence[Trace]) -> list[Annotation]:
        """Labels every sentence, see the function `annotate`."""
        return [annotate(trace, e.annotations.variant) for trace in traces]


JUDGE = KeywordJudge()


def annotate(trace: Trace, variant: str = "wait_hmm") -> Annotation:
    """Labels the sentences of a trace by keyword.

    Args:
        trace: the trace; only its reasoning is labelled, up to `data.text.reasoning_end`.
        variant: one of `VARIANTS`.

    Returns:
        One section per sentence, labelled `backtracking` where it holds a keyword and `other` where not, so that Eq. 3
        has both its sets (D+ and all sections). The judge is named `keyword:<variant>`.

    Raises:
        ValueError: unknown variant.
    """
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r} of the keyword judge; accepted: {', '.join(VARIANTS)}")
    text = reasoning(trace)
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
