"""The backtracking rate of replies (Eq. 1), and measures of coherence that need no model.

    b = (number of words in {wait, hmm}) / (number of words)                                                   (Eq. 1)

A *word* is a run of letters and digits, with apostrophes inside (`don't`); everything else separates, and case does not
matter. So "Wait," and "wait-and-see" hold the word *wait*; "waiting", "await", "Hm" and "Hmmm" hold no keyword. Markers
such as `<think>` or `<|eot_id|>` hold no words.
"""

import zlib
from collections.abc import Collection, Sequence
from typing import NamedTuple

from backtrack_jax.data.text import KEYWORDS, split_words

VARIANTS = ("words", "substring")
"""`words` is Eq. 1. `substring` is the released counter, kept to compare with its numbers; see `count_keywords`."""


class Counts(NamedTuple):
    """Keywords and words of one text; `hits / words` is its rate."""

    hits: int
    words: int


def count_keywords(
    reply: str, *, variant: str = "words", prompt: str = "", keywords: Collection[str] = KEYWORDS
) -> Counts:
    """Counts the keywords and the words of one reply.

    Args:
        reply: what the model wrote, without the prompt.
        variant: `words`: whole words of the reply, Eq. 1. `substring`: as the released counter did, all occurrences of
            the keywords as substrings ("awaiting", "Hmmm") and all white-space separated words, over prompt and reply.
        prompt: the prompt as text; only `substring` reads it.
        keywords: lower-case words.

    Returns:
        Number of keywords and number of words.

    Raises:
        ValueError: unknown variant.
    """
    if variant == "words":
        words = split_words(reply)
        return Counts(sum(word in keywords for word in words), len(words))
    if variant == "substring":
        text = (prompt + reply).lower()
        return Counts(sum(text.count(keyword) for keyword in keywords), len(text.split()))
    raise ValueError(f"unknown variant {variant!r} of the backtracking rate; accepted: {', '.join(VARIANTS)}")


def backtracking_rate(
    reply: str, *, variant: str = "words", prompt: str = "", keywords: Collection[str] = KEYWORDS
) -> float:
    """Rate b of one reply, Eq. 1, as a fraction; 0.0 for a reply without words. Arguments as in `count_keywords`."""
    hits, words = count_keywords(reply, variant=variant, prompt=prompt, keywords=keywords)
    return hits / words if words else 0.0


def token_id_rate(ids: Sequence[int], keyword_ids: Collection[int]) -> float:
    """Share of the generated tokens that are keyword tokens.

    Args:
        ids: generated ids, without the prompt.
        keyword_ids: ids whose token is a keyword (`Wait`, ` wait`, ` Hmm`, ...).

    Returns:
        A fraction of `len(ids)`, not of the words; 0.0 for no ids.
    """
    return sum(i in keyword_ids for i in ids) / len(ids) if len(ids) else 0.0


def repeated_ngrams(text: str, n: int) -> float:
    """Share of the word n-grams of a text that occurred in it before: 1 - distinct / all; 0.0 below n words."""
    words = split_words(text)
    grams = list(zip(*(words[i:] for i in range(n)), strict=False))
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def compression_ratio(text: str) -> float:
    """Bytes of the zlib-compressed text (level 9) / bytes of its UTF-8 form; 1.0 for no text.

    The lower, the more the text repeats itself. Short texts compress badly: compare texts of similar length only.
    """
    raw = text.encode("utf-8", errors="replace")
    return len(zlib.compress(raw, 9)) / len(raw) if raw else 1.0
