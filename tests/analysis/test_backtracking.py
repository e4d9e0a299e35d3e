"""The backtracking rate, its interval, and the measures of coherence."""

import math
import random
import re
import string
import zlib

import numpy as np
import pytest

from backtrack_jax.analysis.backtracking import (
    backtracking_rate,
    bootstrap_interval,
    compression_ratio,
    count_keywords,
    repeated_ngrams,
    token_id_rate,
)
from backtrack_jax.data.text import split_words


@pytest.mark.parametrize(
    ("reply", "hits", "words"),
    [
        ("Wait, no.", 1, 2),
        ("WAIT! wait-and-see: \u201cWait\u201d", 3, 5),
        ("I am waiting; they await a waiter.", 0, 7),
        ("Hmm. hmm HMM", 3, 3),
        ("Hm, hmmm, Hmmmm", 0, 3),
        ("Don't wait, it\u2019s 3.5 = 7/2", 1, 7),
        ("<think>\nWait</think><\uff5cend\u2581of\u2581sentence\uff5c><|eot_id|>", 1, 1),
        ("so_wait_here", 1, 3),
        ("Wait's", 0, 1),
        ("", 0, 0),
        ("... --- \n", 0, 0),
    ],
)
def test_whole_words_are_counted(reply, hits, words):
    assert count_keywords(reply) == (hits, words)
    assert backtracking_rate(reply) == (hits / words if words else 0.0)


def test_the_prompt_does_not_count_in_equation_1():
    assert backtracking_rate("No. Wait.", prompt="Wait, wait, hmm") == 0.5


def test_the_substring_variant_is_the_released_counter():
    rng = random.Random(0)
    pieces = ["wait", "Waiting", "await", "Hmm", "hmmm", "no", "x=3.5", " ", " ", "\n", ", "]
    for _ in range(100):
        prompt, reply = ("".join(rng.choice(pieces) for _ in range(20)) for _ in range(2))
        hits = len(re.findall("wait|hmm", prompt + reply, re.IGNORECASE))
        words = len(re.split(r"\s+", (prompt + reply).strip()))
        assert count_keywords(reply, variant="substring", prompt=prompt) == (hits, words)
    assert count_keywords("I waited", variant="substring", prompt="Await me ") == (2, 4)


def test_other_keywords_and_unknown_variants():
    assert backtracking_rate("But wait, but no", keywords=("but",)) == 0.5
    with pytest.raises(ValueError, match=r"unknown variant 'word'.*accepted: words, substring"):
        backtracking_rate("Wait", variant="word")


def test_the_rate_by_token_ids():
    assert token_id_rate([5, 7, 7, 9], {7, 8}) == 0.5
    assert token_id_rate([], {7}) == 0.0


@pytest.mark.parametrize(
    ("text", "n", "expected"),
    [
        ("a b c d", 2, 0.0),
        ("a b a b a b", 2, 1 - 2 / 5),
        ("A b, a B! a b", 3, 1 - 2 / 4),
        ("wait wait wait wait", 2, 1 - 1 / 3),
        ("one", 2, 0.0),
        ("", 3, 0.0),
    ],
)
def test_repeated_ngrams(text, n, expected):
    assert repeated_ngrams(text, n) == pytest.approx(expected, abs=1e-12)


def test_compression_falls_with_repetition():
    rng = random.Random(0)
    noise = "".join(rng.choice(string.ascii_letters) for _ in range(2000))
    loop = "Wait, hold on. " * 133
    assert compression_ratio(loop) < 0.05 < 0.7 < compression_ratio(noise)
    assert zlib.decompress(zlib.compress(noise.encode(), 9)).decode() == noise
    assert compression_ratio(noise) == len(zlib.compress(noise.encode(), 9)) / 2000
    assert compression_ratio("") == 1.0
    assert compression_ratio("\ud83d") > 0  # a lone surrogate does not stop the run


def test_the_interval_of_two_problems_is_known_in_closed_form():
    # Draws of two from {0.1, 0.3}: 0.1, 0.2, 0.3 with probability 1/4, 1/2, 1/4.
    assert bootstrap_interval([1, 3], [10, 10], level=0.6) == pytest.approx((0.1, 0.3))
    assert bootstrap_interval([1, 3], [10, 10], level=0.4) == pytest.approx((0.2, 0.2))
    # Unequal lengths: the middle one is the pooled rate 4/40, not the mean of the rates.
    assert bootstrap_interval([1, 3], [10, 30], level=0.4) == pytest.approx((0.1, 0.1))


def test_the_interval_of_many_problems_is_that_of_the_delta_method():
    rng = np.random.default_rng(1)
    words = rng.integers(80, 120, size=400)
    hits = rng.binomial(words, rng.beta(2, 38, size=400))
    rate = hits.sum() / words.sum()
    error = math.sqrt(((hits - rate * words) ** 2).sum()) / words.sum()
    low, high = bootstrap_interval(hits, words, n_resamples=20_000)
    assert low == pytest.approx(rate - 1.96 * error, abs=0.05 * error + 2e-4)
    assert high == pytest.approx(rate + 1.96 * error, abs=0.05 * error + 2e-4)


def test_the_interval_is_that_of_drawing_problems_one_by_one():
    hits, words = [0, 4, 1, 9, 2, 0, 3], [50, 60, 10, 90, 40, 30, 45]
    rng = random.Random(3)
    rates = []
    for _ in range(20_000):
        drawn = [rng.randrange(7) for _ in range(7)]
        rates.append(sum(hits[i] for i in drawn) / sum(words[i] for i in drawn))
    rates.sort()
    low, high = bootstrap_interval(hits, words, level=0.9, n_resamples=20_000)
    assert low == pytest.approx(rates[1000], abs=2e-3)
    assert high == pytest.approx(rates[19_000], abs=2e-3)


def test_the_interval_depends_on_the_seed_alone():
    hits, words = np.arange(20), np.full(20, 100)
    assert bootstrap_interval(hits, words, seed=1) == bootstrap_interval(hits, words, seed=1)
    assert bootstrap_interval(hits, words, seed=1) != bootstrap_interval(hits, words, seed=2)


def test_what_has_no_interval_says_so():
    assert all(math.isnan(bound) for bound in bootstrap_interval([1], [10]))
    assert bootstrap_interval([0, 0], [0, 0]) == (0.0, 0.0)
    with pytest.raises(ValueError, match=r"hits \(2,\) and words \(3,\) must both have the shape \[P\]"):
        bootstrap_interval([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match=r"level 95 must lie between 0 and 1"):
        bootstrap_interval([1, 2], [1, 2], level=95)


def test_words_are_case_folded_in_order():
    assert split_words("Don't SHOUT: x_1 = \u00dcber 3.5") == ["don't", "shout", "x", "1", "\u00fcber", "3", "5"]
