"""Two real tokenizers on one text: sections and ends of words are found among the tokens of each, by hand."""

import dataclasses

import numpy as np
import pytest

from backtrack_jax.analysis import paired_states
from backtrack_jax.data.records import Annotation, Section, Trace
from backtrack_jax.models.prompts import PromptFormat
from backtrack_jax.models.tokenizer import Tokenizer
from backtrack_jax.readers import Reader

TEXT = "So 12345 is naïve.\n\nWait, 🧮 no\n</think>\n\nDone"
TRACE = Trace("p/0", "p", "", "Add 1.", TEXT)
# Ends of words, as numbers of characters, and the token of the reply that ends there:
#   Llama   So| |123|45| is| naï|ve|.\n\n|Wait|,| 🧮 in three| no        three digits a token
#   Qwen    So| |1|2|3|4|5| is| naï|ve|.\n\n|Wait|,| 🧮 in three| no     one digit a token
# "naïve." ends within ".\n\n" of either; behind "no" the reasoning ends.
ENDS = {2: (0, 0), 8: (3, 6), 11: (4, 7), 18: (None, None), 25: (9, 12), 27: (12, 15), 30: (13, 16)}
WAIT = (8, 11)


@pytest.fixture
def readers(r1: Tokenizer, qwen3: Tokenizer) -> tuple[Reader, Reader]:
    return Reader(r1, PromptFormat("r1")), Reader(qwen3, PromptFormat("chat"))


def test_ends_of_words_are_counted_in_characters() -> None:
    assert paired_states.word_ends(TEXT[:31]) == list(ENDS)
    assert paired_states.word_ends("  ") == []


def test_tokens_that_end_where_a_word_does(readers: tuple[Reader, Reader]) -> None:
    for number, reader in enumerate(readers):
        read, positions = reader.token_ends(TRACE, [*ENDS, 31, 45, 1])
        tokens = [places[number] for places in ENDS.values()]
        expected = [-1 if token is None else read.reply_start + token for token in tokens]
        assert positions[: len(ENDS)].tolist() == expected
        assert positions[len(ENDS)] == read.reply_start + (14, 17)[number]  # the line break, before the end mark
        assert positions[-2:].tolist() == [-1, -1]  # cut off, and inside a token
        assert list(read.ids[: read.reply_start]) == reader.prompt_ids("Add 1.")
        for (end, _), at in zip(ENDS.items(), positions.tolist(), strict=False):
            if at >= 0:  # whatever the tokens, the same text was read
                assert reader.tokenizer.decode(read.ids[read.reply_start : at + 1]) == TEXT[:end]


def test_pairs_are_tokens_of_both_at_the_same_characters(readers: tuple[Reader, Reader]) -> None:
    ids, _ = readers[1].tokenizer.encode_with_spans(TEXT)
    sampled = dataclasses.replace(TRACE, token_ids=tuple(ids))  # of the second tokenizer: the first reads the text
    for trace in (TRACE, sampled):
        pairs = paired_states.pair([trace, dataclasses.replace(trace, id="q/0", problem_id="q")], readers, 0)
        assert pairs.problems.tolist() == ["p"] * 6 + ["q"] * 6
        for number in (0, 1):
            tokens = [places[number] for places in ENDS.values() if places[number] is not None]
            for read, positions in zip(pairs.texts[number], pairs.positions[number], strict=True):
                np.testing.assert_array_equal(positions - read.reply_start, tokens)
    few = paired_states.pair([TRACE, dataclasses.replace(TRACE, id="q/0", problem_id="q")], readers, 3)
    assert few.problems.tolist() == ["p", "q", "q"]  # the first, the middle one and the last
    assert [len(at) for at in few.positions[0]] == [1, 2]
    assert few.positions[0][1][-1] - few.texts[0][1].reply_start == 13


def test_the_first_token_and_what_opens_a_reasoning_are_no_pair(readers: tuple[Reader, Reader]) -> None:
    opened = dataclasses.replace(TRACE, text="<think>\nSo it is")
    pairs = paired_states.pair([opened], readers, 0)
    assert len(pairs.problems) == 3
    bare = tuple(dataclasses.replace(reader, prompt=PromptFormat("plain")) for reader in readers)
    text = Trace("p", "p", "", "", "So it is")
    assert readers[1].tokenizer.bos_id is None
    assert len(paired_states.pair([text], (bare[0], bare[1]), 0).problems) == 2  # without BOS the first word is first
    with pytest.raises(ValueError, match="no token that ends at the end of the same word in any of 1 texts"):
        paired_states.pair([dataclasses.replace(text, text="So")], (bare[0], bare[1]), 0)


def test_sections_start_at_tokens_of_ones_own(readers: tuple[Reader, Reader]) -> None:
    annotation = Annotation("p/0", "", (Section("backtracking", 20, 30), Section("deduction", 8, 11)))
    for number, reader in enumerate(readers):
        read = reader.token_trace(TRACE, annotation)
        assert [label for label, _ in read.starts] == ["backtracking", "deduction"]
        first, second = (at - read.reply_start for _, at in read.starts)
        assert first == WAIT[number] and reader.tokenizer.decode([read.ids[read.starts[0][1]]]) == "Wait"
        assert second == ENDS[11][number]  # " is", whose first character ends the word before


def test_markers_that_a_model_is_not_shown_move_what_follows(r1: Tokenizer) -> None:
    kept, dropped = (Reader(r1, PromptFormat("r1"), markers) for markers in ("keep", "drop"))
    (a, at_a), (b, at_b) = (reader.token_ends(TRACE, list(ENDS)) for reader in (kept, dropped))
    assert len(a.ids) - len(b.ids) == 3 == a.reply_start - b.reply_start  # user, assistant, think
    np.testing.assert_array_equal(np.where(at_a >= 0, at_a - 3, -1), at_b)
    assert kept.not_read == () and set(dropped.not_read) == set(
        r1.markers[m] for m in ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>")
    )
