"""The backtracking rate of replies (Eq. 1), its interval, and measures of coherence that need no model.

    b = (number of words in {wait, hmm}) / (number of words)                                                   (Eq. 1)

A *word* is a run of letters and digits, with apostrophes inside (`don't`); everything else separates, and case does not
matter. So "Wait," and "wait-and-see" hold the word *wait*; "waiting", "await", "Hm" and "Hmmm" hold no keyword. Markers
such as `<think>` or `<|eot_id|>` hold no words.
"""

import functools
import zlib
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

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


def bootstrap_interval(
    hits: ArrayLike, words: ArrayLike, *, level: float = 0.95, n_resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the pooled rate sum(hits) / sum(words), resampling problems.

    Replies to one problem are alike, so the problem is the unit: sum hits and words over the replies of each problem
    first. A resample without any word counts as rate 0.

    Args:
        hits: [P], numerators, one per problem.
        words: [P], denominators, >= 0.
        level: coverage of the interval, between 0 and 1.
        n_resamples: number of resamples.
        seed: of the random generator; the same arguments give the same interval.

    Returns:
        Lower and upper bound, in the unit of the rate; (nan, nan) for fewer than two problems, where it is not defined.

    Raises:
        ValueError: shapes differ or are not [P], or the level is not between 0 and 1.
    """
    numerators, denominators = np.asarray(hits, np.float64), np.asarray(words, np.float64)
    if numerators.ndim != 1 or numerators.shape != denominators.shape:
        raise ValueError(f"hits {numerators.shape} and words {denominators.shape} must both have the shape [P]")
    if not 0 < level < 1:
        raise ValueError(f"level {level} must lie between 0 and 1")
    n = len(numerators)
    if n < 2:
        return float("nan"), float("nan")
    draws = _draws(n, n_resamples, seed)
    totals = draws @ denominators
    rates = np.divide(draws @ numerators, totals, out=np.zeros(n_resamples), where=totals > 0)
    low, high = np.quantile(rates, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@functools.lru_cache(maxsize=4)
def _draws(n: int, n_resamples: int, seed: int) -> np.ndarray:
    """How often each of n problems is drawn, [n_resamples, n] float64; the same for all measures of all conditions."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_resamples).astype(np.float64)
