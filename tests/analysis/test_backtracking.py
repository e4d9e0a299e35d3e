"""The backtracking rate, and the measures of coherence."""

import random
import re
import string
import zlib

import pytest

from backtrack_jax.analysis.backtracking import (
    backtracking_rate,
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


def test_words_are_case_folded_in_order():
    assert split_words("Don't SHOUT: x_1 = \u00dcber 3.5") == ["don't", "shout", "x", "1", "\u00fcber", "3", "5"]
