"""The judge's question, and the reading of its answers."""

import json
import random
import re
from itertools import pairwise

import pytest

from backtrack_jax.data.annotations import Reason, align
from backtrack_jax.data.records import (
    LABELS,
    Annotation,
    Rejection,
    Section,
    Trace,
    failure,
    pair_annotations,
    read_released,
)
from backtrack_jax.data.text import sentence_spans
from backtrack_jax.judges.openai.prompts import BACKTRACKING, JudgePrompt, align_sentences

SENTENCES = ["Okay, 3 cats.", "A cat has 4 legs, e.g. Tom.", "So 7 legs.", "Wait, no.", "Hmm, 3 * 4 = 12."]
TEXT = f"<think>\n{SENTENCES[0]}\n\n{SENTENCES[1]} {SENTENCES[2]}\n\n{SENTENCES[3]} {SENTENCES[4]}\n</think>\n\nTwelve."
TRACE = Trace("p/0", "p", "c", "How many legs have 3 cats?", TEXT)


def runs(*pairs: tuple[object, object]) -> str:
    return json.dumps({"runs": [{"from": first, "label": label} for first, label in pairs]})


def labelled(answer: str, trace: Trace = TRACE) -> list[tuple[str, str]]:
    annotation = align_sentences(trace, answer, "j")
    pair_annotations([trace], [annotation])
    return [(section.label, trace.text[section.start : section.stop]) for section in annotation.sections]


def rejected(answer: str) -> list[tuple[str, str, str]]:
    return [(r.reason, r.label, r.text) for r in align_sentences(TRACE, answer, "j").rejected]


def test_only_the_reasoning_is_shown_and_numbered():
    question = JudgePrompt().messages(TRACE)[1]["content"]
    reasoning = question.split("labelled:\n")[-1]
    assert reasoning == "\n".join(f"{number}: {sentence}" for number, sentence in enumerate(SENTENCES, 1))
    assert TRACE.problem in question
    inline = JudgePrompt("inline").messages(TRACE)[1]["content"].split("labelled:\n")[-1]
    assert inline == TEXT[len("<think>\n") : TEXT.index("\n</think>")]


def test_a_sentence_with_line_breaks_is_one_line():
    trace = Trace("p/0", "p", "c", "q", "So:\n\\[\nx = 1. \n\\]\nThen 2: stop.")
    assert JudgePrompt().messages(trace)[1]["content"].endswith("1: So:\n2: \\[ x = 1. \\]\n3: Then 2: stop.")
    assert labelled(runs((1, "deduction"), (3, "backtracking")), trace) == [
        ("deduction", "So:"),
        ("deduction", "\\[\nx = 1. \n\\]"),
        ("backtracking", "Then 2: stop."),
    ]


def test_the_instructions_are_one_prefix_for_all_traces_and_name_every_label():
    for format_ in ("sentences", "inline"):
        prompt = JudgePrompt(format_)
        systems = {prompt.messages(trace)[0]["content"] for trace in (TRACE, Trace("q/0", "q", "d", "Why?", "So."))}
        assert systems == {prompt.instructions}
        assert all(f"\n{label}: " in prompt.instructions for label in LABELS)


def test_the_hash_is_the_version_of_the_question():
    prompts = [
        JudgePrompt(),
        JudgePrompt("inline"),
        JudgePrompt(backtracking="change"),
        JudgePrompt(response_format="json_object"),
        JudgePrompt(response_format="none"),
    ]
    assert len({prompt.hash for prompt in prompts}) == len(prompts)
    assert all(re.fullmatch("[0-9a-f]{12}", prompt.hash) for prompt in prompts)
    assert JudgePrompt().hash == JudgePrompt("sentences", "revise", "json_schema").hash
    assert JudgePrompt("inline", response_format="none").hash == JudgePrompt("inline").hash


def test_the_definition_of_backtracking_is_selectable():
    for name, text in BACKTRACKING.items():
        assert f"backtracking: {text}\n" in JudgePrompt(backtracking=name).instructions


@pytest.mark.parametrize("field", ["format", "backtracking", "response_format"])
def test_an_unknown_choice_names_the_accepted_ones(field):
    with pytest.raises(ValueError, match=rf"unknown {field} 'x'.*accepted: \w+, \w+"):
        JudgePrompt(**{field: "x"})


def test_the_request_asks_for_the_schema():
    fields = JudgePrompt().request_fields()["response_format"]
    assert fields["type"] == "json_schema" and fields["json_schema"]["strict"] is True
    item = fields["json_schema"]["schema"]["properties"]["runs"]["items"]
    assert item["properties"]["label"]["enum"] == list(LABELS)
    assert item["required"] == ["from", "label"] and item["additionalProperties"] is False
    assert JudgePrompt(response_format="json_object").request_fields() == {"response_format": {"type": "json_object"}}
    assert JudgePrompt(response_format="none").request_fields() == JudgePrompt("inline").request_fields() == {}


def test_every_sentence_of_a_run_is_a_section_with_the_exact_span():
    answer = runs((1, "initializing"), (2, "adding-knowledge"), (3, "deduction"), (4, "backtracking"))
    labels = ["initializing", "adding-knowledge", "deduction", "backtracking", "backtracking"]
    expected = list(zip(labels, SENTENCES, strict=True))
    assert labelled(answer) == labelled(f"```json\n{answer}\n```") == labelled(f"Here: {answer} Done.") == expected
    assert rejected(answer) == []


def test_both_formats_end_in_the_same_record():
    answer = runs((1, "initializing"), (3, "deduction"), (4, "backtracking"))
    labels = ["initializing", "initializing", "deduction", "backtracking", "backtracking"]
    copy = "".join(f'["{label}"]{text}["end-section"]' for label, text in zip(labels, SENTENCES, strict=True))
    assert JudgePrompt().read(TRACE, answer, "j") == JudgePrompt("inline").read(TRACE, copy, "j")
    assert JudgePrompt("inline").read(TRACE, copy, "j") == align(TRACE, copy, "j")


def test_what_a_reasoning_judge_thinks_aloud_is_not_its_answer():
    thought = "<think>Perhaps {1: so}? " + runs((1, "backtracking")) + "</think>"
    annotation = JudgePrompt().read(TRACE, thought + runs((1, "deduction")), "j")
    assert {section.label for section in annotation.sections} == {"deduction"}


@pytest.mark.parametrize("ending", ["</think>", "\n</think>\n", "</think>\n\nTwelve."])
def test_an_answer_that_runs_on_to_the_end_marker_is_read(ending):
    """A judge goes on with the trace, or a server closes a thought that was never opened."""
    answer = runs((1, "deduction"), (4, "backtracking"))
    assert JudgePrompt().read(TRACE, answer + ending, "j") == JudgePrompt().read(TRACE, answer, "j")
    copy = "".join(f'["deduction"]{text}["end-section"]' for text in SENTENCES)
    kept = JudgePrompt("inline").read(TRACE, copy, "j").sections
    assert len(kept) == len(SENTENCES) and JudgePrompt("inline").read(TRACE, copy + ending, "j").sections == kept
    inside = copy.removesuffix('["end-section"]') + ending + '["end-section"]'
    assert [s.start for s in JudgePrompt("inline").read(TRACE, inside, "j").sections] == [s.start for s in kept]


def test_a_thought_that_was_never_opened_is_not_the_answer():
    thought = "Perhaps {1: so}? " + runs((1, "backtracking")) + "</think>"
    annotation = JudgePrompt().read(TRACE, thought + runs((1, "deduction")), "j")
    assert {section.label for section in annotation.sections} == {"deduction"}
    refusing = JudgePrompt().read(TRACE, "<think>" + thought + "I cannot say.", "j")
    assert refusing.sections == () and refusing.rejected[0].reason == Reason.NO_SECTIONS


def test_an_unknown_label_is_rejected_with_its_text():
    answer = runs((1, "deduction"), (2, "verification"), (4, "backtracking"))
    labels = {1: "deduction", 4: "backtracking", 5: "backtracking"}
    assert labelled(answer) == [(label, SENTENCES[number - 1]) for number, label in labels.items()]
    spans = sentence_spans(TRACE)
    assert rejected(answer) == [(Reason.UNKNOWN_LABEL, "verification", TEXT[spans[1][0] : spans[2][1]])]


def test_runs_may_come_in_any_order_and_twice():
    in_order = runs((1, "initializing"), (2, "deduction"), (4, "backtracking"))
    shuffled = runs((1, "initializing"), (4, "backtracking"), (2, "deduction"), (4, "backtracking"))
    assert labelled(shuffled) == labelled(in_order)
    assert rejected(shuffled) == []


@pytest.mark.parametrize(
    ("pairs", "refused"),
    [
        # Counted from 0: every label would come one sentence too late.
        (
            [(0, "initializing"), (1, "deduction"), (3, "backtracking")],
            [(Reason.NOT_FOUND, "initializing", "sentence 0 of 5")],
        ),
        (
            [(1, "deduction"), (6, "backtracking"), (0, "backtracking")],
            [
                (Reason.NOT_FOUND, "backtracking", "sentence 6 of 5"),
                (Reason.NOT_FOUND, "backtracking", "sentence 0 of 5"),
            ],
        ),
        ([(3, "deduction")], [(Reason.UNTAGGED, "", TEXT[TEXT.index("Okay") : TEXT.index(" So 7")])]),
        (
            [(1, "deduction"), (4, "backtracking"), (4, "deduction")],
            [(Reason.OUT_OF_ORDER, "deduction", "sentence 4, which has backtracking too")],
        ),
    ],
)
def test_numbers_that_leave_open_what_is_meant_label_nothing(pairs, refused):
    assert labelled(runs(*pairs)) == []
    assert rejected(runs(*pairs)) == refused


def test_a_misspelt_label_is_read_and_noted_on_each_of_its_sections():
    annotation = align_sentences(TRACE, runs((1, "deduction"), (4, "Back_Tracking"), (5, "adding knowledge")), "j")
    assert [s.label for s in annotation.sections][3:] == ["backtracking", "adding-knowledge"]
    assert [(n.code, n.section) for n in annotation.notes] == [(Reason.BROKEN_OPENER, 3), (Reason.BROKEN_OPENER, 4)]


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "No.",
        "{",
        "}{",
        '{"runs":[]}',
        '{"runs":{"from":1,"label":"deduction"}}',
        '{"labels":["deduction"]}',
        '{"runs":[{"from":1,"label":"deduction"},{"from":2,"la',
        '{"runs":[{"from":1,"label":"deduction"},7]}',
        runs((1, "deduction"), ("2", "deduction")),
        runs((1, "deduction"), (2.0, "deduction")),
        runs((True, "deduction")),
        runs((1, None)),
        '{"runs":' + "[" * 100_000 + "]" * 100_000 + "}",
        JudgePrompt().instructions,
        JudgePrompt().instructions + "\n" + JudgePrompt().messages(TRACE)[1]["content"],
    ],
)
def test_an_answer_of_another_shape_is_no_label_at_all(answer):
    annotation = align_sentences(TRACE, answer, "j")
    assert (annotation.sections, annotation.notes) == ((), ())
    assert [r.reason for r in annotation.rejected] == [Reason.NO_SECTIONS]


def test_instructions_sent_back_label_nothing_inline():
    prompt = JudgePrompt("inline")
    for answer in (prompt.instructions, "\n".join(message["content"] for message in prompt.messages(TRACE))):
        assert prompt.read(TRACE, answer, "j").sections == ()


def test_arbitrary_runs_partition_the_sentences_or_label_none():
    rng = random.Random(0)
    labels = [*LABELS, "verification", "Deduction"]
    usable = 0
    for _ in range(500):
        pairs = [(rng.randint(1, 5), rng.choice(labels)) for _ in range(rng.randint(1, 4))]
        pairs += [(1, "deduction")] if rng.random() < 0.8 else [(rng.randint(-1, 7), "deduction")]
        annotation = align_sentences(TRACE, runs(*pairs), "j")
        assert annotation.sections or annotation.rejected
        by_number: dict[int, set[str]] = {}
        for first, label in pairs:
            by_number.setdefault(first, set()).add(label)
        if 1 not in by_number or not set(by_number) <= set(range(1, 6)) or max(map(len, by_number.values())) > 1:
            assert annotation.sections == (), pairs
            continue
        usable += 1
        kept = [TEXT[s.start : s.stop] for s in annotation.sections]
        lost = " ".join(r.text for r in annotation.rejected)
        assert all((sentence in kept) != (sentence in lost) for sentence in SENTENCES), pairs
        assert set(kept) <= set(SENTENCES) and len(kept) == len(set(kept))
    assert usable > 100


def test_failure_is_told_from_a_trace_in_which_nothing_is_labelled():
    section = Section("deduction", 8, 20)
    failed = Annotation("p/0", "j", (), (Rejection("judge_failed:timed_out", "", ""), Rejection("untagged", "", "")))
    assert failure(failed) == "timed_out"
    assert failure(Annotation("p/0", "j", ())) is None
    assert failure(Annotation("p/0", "j", (), (Rejection("untagged", "", "x"),))) is None
    assert failure(Annotation("p/0", "j", (section,), (Rejection("judge_failed:x", "", ""),))) is None


def test_sections_of_released_chains_are_sentences(ward2025):
    """Why a section is a sentence here: in the released labels most sections are one, and nearly all start as one."""
    starts = sections = single = repeated = 0
    for trace, annotated in zip(*read_released(ward2025), strict=True):
        spans = sentence_spans(trace)
        found = align(trace, annotated).sections
        sections += len(found)
        starts += len({section.start for section in found} & {start for start, _ in spans})
        single += sum(sum(s.start <= start < s.stop for start, _ in spans) == 1 for s in found)
        repeated += sum(first.label == second.label for first, second in pairwise(found))
    assert (sections, starts, single, repeated) == (5528, 5498, 3939, 1482)


def test_labels_of_released_chains_survive_the_sentence_format(ward2025):
    """GPT-4o's labels, said in runs of numbered sentences: the same labels at the same characters."""
    for trace, annotated in zip(*read_released(ward2025), strict=True):
        at = {section.start: section.label for section in align(trace, annotated).sections}
        spans = sentence_spans(trace)
        label, pairs, truth = "deduction", [], []
        for number, span in enumerate(spans, 1):
            label = at.get(span[0], label)
            truth.append((label, *span))
            if not pairs or pairs[-1][1] != label:
                pairs.append((number, label))
        annotation = align_sentences(trace, runs(*pairs), "j")
        assert [(s.label, s.start, s.stop) for s in annotation.sections] == truth
        assert (annotation.rejected, annotation.notes) == ((), ())
        pair_annotations([trace], [annotation])
