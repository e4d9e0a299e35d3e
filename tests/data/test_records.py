"""Records: the round trip through files, and what bad input is told."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from backtrack_jax.data.records import (
    Annotation,
    Condition,
    Note,
    Problem,
    Rejection,
    Reply,
    Section,
    Trace,
    failure,
    is_released,
    pair_annotations,
    read_annotations,
    read_any_traces,
    read_problems,
    read_released,
    read_traces,
    write_jsonl,
)
from backtrack_jax.kinds import RESERVED

PROBLEM = {"id": "logic_1", "category": "logic", "problem": "Is 7 prime?"}
TRACE = {"id": "logic_1/0", "problem_id": "logic_1", "category": "logic", "problem": "Is 7 prime?", "text": "Yes."}
CHAIN = {
    "task_id": "math_logic_12",
    "problem": "Is 7 prime?",
    "reasoning_chain": "It is odd. Wait, 2 is even.",
    "annotated_chain": '["deduction"]It is odd.["end-section"]',
}


def trace(text: str = "abc def", id: str = "p/0") -> Trace:
    return Trace(id, "p", "c", "question", text)


def write(path: Path, value: object) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "text",
    [
        "plain",
        "∀x ∈ S: 你好\n\tend",
        "line\u2028and\u2029paragraph\x85\x0c",
        'quote " and \\ slash',
    ],
)
def test_traces_make_the_round_trip_to_the_letter(tmp_path: Path, text: str) -> None:
    traces = [
        Trace("p/0", "p", "c", "q", text, 0, (1, 2, 128000), "length"),
        Trace("p/1", "p", "c", "q", text, 1),
        Trace("p/2", "p", "c", "q", "", 2, (), "stop"),
    ]
    path = tmp_path / "new" / "traces.jsonl"
    write_jsonl(path, traces)
    assert read_traces(path) == traces
    assert path.read_bytes().decode("utf-8").count("\n") == 3


@pytest.mark.parametrize(
    ("read", "entry", "field"),
    [
        (read_traces, TRACE, "text"),
        (read_traces, TRACE, "problem"),
        (read_problems, PROBLEM, "problem"),
        (read_released, CHAIN, "reasoning_chain"),
    ],
)
def test_half_a_character_is_refused_where_it_stands(
    tmp_path: Path, read: Callable[..., Any], entry: dict[str, Any], field: str
) -> None:
    path = write(tmp_path / "x.jsonl", json.dumps(entry) + "\n" + json.dumps(entry | {field: "Yes \ud83d."}))
    with pytest.raises(ValueError, match=rf"x.jsonl, line 2: field '{field}' holds half of a character \(\\ud83d, at "):
        read(path)


@pytest.mark.parametrize("line", ["[" * 100_000, '{"id":' + "9" * 5000 + "}"])
def test_json_that_python_cannot_hold_is_named_by_line(tmp_path: Path, line: str) -> None:
    path = write(tmp_path / "x.jsonl", json.dumps(TRACE) + "\n" + line)
    with pytest.raises(ValueError, match=r"x.jsonl, line 2: not valid JSON"):
        read_traces(path)


def test_chains_behind_a_blank_line_are_chains(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", "\n  \n" + json.dumps(CHAIN))
    assert is_released(path) and read_any_traces(path) == read_released(path)[0]


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("Backtracking", "unknown label 'Backtracking'; did you mean 'backtracking'"),
        ("adding knowledge", "did you mean 'adding-knowledge'"),
        ("example_testing", "did you mean 'example-testing'"),
        ("deduction ", "did you mean 'deduction'"),
        (" my label", "did you mean 'my label'"),
        ("rest", "label 'rest' is a name that this program uses itself"),
        ("all", "uses itself .*choose another"),
        ("trace", "uses itself"),
        ("shuffled", "uses itself"),
        ("sums", "uses itself"),  # its vector would overwrite the window sums
        *((name, "uses itself") for name in RESERVED),
    ],
)
def test_labels_that_would_be_lost_are_refused(tmp_path: Path, label: str, message: str) -> None:
    sections = [{"label": "my-own", "start": 0, "stop": 2}, {"label": label, "start": 2, "stop": 3}]
    path = write(tmp_path / "x.jsonl", json.dumps({"trace_id": "p/0", "judge": "me", "sections": sections}))
    with pytest.raises(ValueError, match=rf"x.jsonl, line 1, sections\[1\]: .*{message}"):
        read_annotations(path)


def test_annotations_and_problems_make_the_round_trip(tmp_path: Path) -> None:
    annotations = [
        Annotation(
            "p/0",
            "released",
            (Section("deduction", 0, 3), Section("backtracking", 4, 7)),
            (Rejection("untagged", "", "so"),),
            (Note("folded", 1),),
        ),
        Annotation("p/1", "released", ()),
        Annotation("p/1", "keyword", ()),
    ]
    write_jsonl(tmp_path / "annotations.jsonl", annotations)
    assert read_annotations(tmp_path / "annotations.jsonl") == annotations
    problems = [Problem("a", "c", "one"), Problem("b", "c", "two")]
    write_jsonl(tmp_path / "problems.jsonl", problems)
    assert read_problems(tmp_path / "problems.jsonl") == problems


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    write_jsonl(path, [trace()])

    def interrupted():
        yield trace("other")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_jsonl(path, interrupted())
    assert read_traces(path) == [trace()]
    assert list(tmp_path.iterdir()) == [path]


def test_a_reader_of_the_old_file_is_not_disturbed_by_a_new_one(tmp_path: Path) -> None:
    path = tmp_path / "problems.jsonl"
    write_jsonl(path, [Problem("a", "c", "old")])
    with path.open(encoding="utf-8") as old:
        write_jsonl(path, [Problem("a", "c", "new")])
        assert "old" in old.read()
    assert read_problems(path) == [Problem("a", "c", "new")]


def test_problems_are_read_from_json_and_jsonl_and_may_hold_other_keys(tmp_path: Path) -> None:
    entries = [PROBLEM | {"difficulty": 3, "answer": "yes", "source": "ours"}, PROBLEM | {"id": "logic_2"}]
    expected = [Problem("logic_1", "logic", "Is 7 prime?", "yes", 3), Problem("logic_2", "logic", "Is 7 prime?")]
    assert read_problems(write(tmp_path / "a.json", entries)) == expected
    lines = "\n".join(json.dumps(entry) for entry in entries)
    assert read_problems(write(tmp_path / "a.jsonl", "\ufeff" + lines + "\n\n")) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "[{", r"a\.json: not valid JSON"),
        ("a.json", "[]", r"a\.json: holds no entries"),
        ("a.jsonl", "\n\n", r"a\.jsonl: holds no entries"),
        ("a.json", PROBLEM, r"a\.json: expected a JSON list of objects, got dict"),
        ("a.json", ["text"], r"a\.json, entry 0: expected a JSON object, got str"),
        ("a.txt", "x", r"unknown suffix '\.txt'; accepted: \.json"),
        ("a.json", [PROBLEM, {"id": "b", "problem": "?"}], r"entry 1: field 'category' is missing; found: id, problem"),
        ("a.json", [{"problem": "?"}], r"entry 0: fields 'id', 'category' are missing; found: problem"),
        ("a.json", [PROBLEM | {"id": 3}], r"entry 0: field 'id' must be a string, got int 3"),
        ("a.json", [PROBLEM | {"problem": " \n"}], r"entry 0: field 'problem' is empty"),
        ("a.json", [PROBLEM, PROBLEM], r"a\.json: id 'logic_1' occurs more than once"),
        ("a.jsonl", json.dumps(PROBLEM) + "\n{'id'}", r"a\.jsonl, line 2: not valid JSON"),
    ],
)
def test_faulty_problems_are_named(tmp_path: Path, name: str, content: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_problems(write(tmp_path / name, content))


def test_a_missing_file_and_one_that_is_not_text_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json: no such file"):
        read_problems(tmp_path / "nowhere.json")
    (tmp_path / "a.json").write_bytes(b"\xff\xfe[\x00")
    with pytest.raises(ValueError, match=r"a\.json: not UTF-8 text"):
        read_problems(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": "  "}, "line 1: field 'text' is empty"),
        ({"text": None}, "field 'text' must be a string, got NoneType None"),
        ({"finish_reason": "eos"}, "finish_reason 'eos' is unknown; accepted: stop, length, null"),
        ({"token_ids": [1, -2]}, "'token_ids' must be a list of integers >= 0"),
        ({"token_ids": [1, True]}, "'token_ids' must be a list of integers >= 0"),
        ({"sample": -1}, "'sample' must be an integer >= 0, got -1"),
        ({"tokenids": [1]}, "unknown field 'tokenids'; accepted: id, problem_id"),
    ],
)
def test_faulty_traces_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_traces(write(tmp_path / "t.jsonl", json.dumps(TRACE | change)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sections": [{"label": "deduction", "start": 4, "stop": 4}]}, r"sections\[0\]: span \[4, 4\) is empty"),
        ({"sections": [{"label": "deduction", "start": 4}]}, r"sections\[0\]: field 'stop' is missing"),
        ({"sections": [{"label": "", "start": 4, "stop": 5}]}, r"sections\[0\]: field 'label' is empty"),
        ({"sections": {"label": "deduction"}}, "field 'sections' must be a list, got dict"),
        ({"rejected": [{"reason": "empty", "label": ""}]}, r"rejected\[0\]: field 'text' is missing"),
        ({"spans": []}, "unknown field 'spans'"),
    ],
)
def test_faulty_annotations_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    value = {"trace_id": "p/0", "judge": "me", "sections": []} | change
    with pytest.raises(ValueError, match=r"t\.jsonl, line 1.*" + message):
        read_annotations(write(tmp_path / "t.jsonl", json.dumps(value)))


def test_a_judge_annotates_a_trace_once(tmp_path: Path) -> None:
    line = json.dumps({"trace_id": "p/0", "judge": "me", "sections": []})
    with pytest.raises(ValueError, match="trace 'p/0' is annotated more than once by the judge 'me'"):
        read_annotations(write(tmp_path / "t.jsonl", f"{line}\n{line}"))


def test_pairs_follow_the_traces_and_leave_out_those_without_annotation() -> None:
    traces = [trace(id="p/0"), trace(id="p/1"), trace(id="p/2")]
    annotations = [Annotation("p/2", "me", (Section("deduction", 4, 7),)), Annotation("p/0", "me", ())]
    assert pair_annotations(traces, annotations) == [(traces[0], annotations[1]), (traces[2], annotations[0])]


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([(4, 8)], r"section 0 \[4, 8\): not a span of its text of 7 characters"),
        ([(3, 7)], r"section 0 \[3, 7\): starts on white space"),
        ([(4, 7), (0, 3)], r"section 1 \[0, 3\): starts before the section in front of it"),
    ],
)
def test_spans_that_do_not_fit_the_text_are_refused(spans: list[tuple[int, int]], message: str) -> None:
    annotation = Annotation("p/0", "me", tuple(Section("deduction", *span) for span in spans))
    with pytest.raises(ValueError, match=r"trace 'p/0', " + message):
        pair_annotations([trace()], [annotation])


def test_pairs_need_known_traces_one_judge_and_notes_on_sections() -> None:
    empty = Annotation("p/0", "me", ())
    with pytest.raises(ValueError, match="annotation of trace 'p/9', which is not among the 1 traces"):
        pair_annotations([trace()], [Annotation("p/9", "me", ())])
    with pytest.raises(ValueError, match="trace 'p/0' has more than one annotation"):
        pair_annotations([trace()], [empty, empty])
    with pytest.raises(ValueError, match="note 'folded' on section 0, which does not exist"):
        pair_annotations([trace()], [Annotation("p/0", "me", (), (), (Note("folded", 0),))])


def test_released_chains_are_read_from_a_file_a_folder_and_several(tmp_path: Path) -> None:
    first = write(tmp_path / "a_annotated_chains.json", [CHAIN, CHAIN | {"reasoning_chain": "No."}])
    second = write(tmp_path / "b_annotated_chains.json", [CHAIN | {"task_id": "own", "annotated_chain": ""}])
    write(tmp_path / "b_tasks.json", [PROBLEM])
    traces, annotated = read_released(tmp_path)
    assert traces == [
        Trace("math_logic_12/0", "math_logic_12", "math_logic", "Is 7 prime?", "It is odd. Wait, 2 is even.", 0),
        Trace("math_logic_12/1", "math_logic_12", "math_logic", "Is 7 prime?", "No.", 1),
        Trace("own/0", "own", "own", "Is 7 prime?", "It is odd. Wait, 2 is even.", 0),
    ]
    assert annotated == [CHAIN["annotated_chain"], CHAIN["annotated_chain"], ""]
    assert read_released([first, second]) == (traces, annotated)
    assert read_released(first)[0] == traces[:2]


def test_lines_of_chains_and_lines_of_traces_are_told_apart(tmp_path: Path) -> None:
    chains = tmp_path / "chains.jsonl"
    chains.write_text(json.dumps(CHAIN) + "\n" + json.dumps(CHAIN | {"reasoning_chain": "No."}) + "\n")
    assert (
        read_any_traces(chains)
        == read_released(write(tmp_path / "c.json", [CHAIN, CHAIN | {"reasoning_chain": "No."}]))[0]
    )
    quoting = trace(text='It says "annotated_chain": "x".')
    write_jsonl(tmp_path / "traces.jsonl", [quoting])
    assert read_any_traces(tmp_path / "traces.jsonl") == [quoting]


@pytest.mark.parametrize(
    ("chains", "message"),
    [
        ([CHAIN, CHAIN | {"reasoning_chain": ""}], r"a\.json, entry 1: field 'reasoning_chain' is empty"),
        ([CHAIN | {"reasoning_chain": None}], r"entry 0: field 'reasoning_chain' must be a string, got NoneType"),
        ([{k: v for k, v in CHAIN.items() if k != "annotated_chain"}], "entry 0: field 'annotated_chain' is missing"),
        ([], r"a\.json: holds no entries"),
        ("{", r"a\.json: not valid JSON"),
    ],
)
def test_faulty_released_chains_are_named(tmp_path: Path, chains: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_released(write(tmp_path / "a.json", chains))


def test_a_folder_without_chains_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file of this folder is named"):
        read_released(tmp_path)


def test_the_released_files_load_unchanged(ward2025: Path) -> None:
    traces, annotated = read_released(ward2025)
    assert len(traces) == len(annotated) == 300
    assert {trace.category for trace in traces} == {"math_logic", "probability", "spatial"}
    problems = [p for name in sorted(ward2025.glob("*_tasks.json")) for p in read_problems(name)]
    assert {(p.id, p.problem) for p in problems} == {(t.problem_id, t.problem) for t in traces}


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("indent", [None, 1])
def test_traces_and_chains_are_told_apart_by_their_content(tmp_path: Path, suffix: str, indent: int | None) -> None:
    for content, released in ((TRACE, False), (CHAIN, True)):
        text = json.dumps([content], indent=indent) if suffix == ".json" else json.dumps(content) + "\n"
        path = tmp_path / f"file{suffix}"
        path.write_text(text)
        assert is_released(path) == released
        assert len(read_any_traces(path)) == 1


def test_a_reply_is_read_as_a_trace_with_its_own_fields() -> None:
    condition = Condition("base", "noise", "", 1, "", 2.0, 3.0)
    reply = Reply("p", "c", "Is it?", 4, "m", condition, "raw", "all", "h", 5, (6, 7), "It is.", "length")
    assert reply.trace(8) == Trace("8/p/4", "p", "c", "Is it?", "It is.", 4, (6, 7), "length")
    assert Reply.from_line(json.loads(json.dumps(reply.line()))) == reply


def test_a_judge_failed_only_where_it_placed_nothing() -> None:
    rejected = (Rejection("judge_failed:timed_out", "", ""),)
    assert failure(Annotation("t", "j", (), rejected)) == "timed_out"
    assert failure(Annotation("t", "j", (Section("deduction", 0, 2),), rejected)) is None
    assert failure(Annotation("t", "j", (), (Rejection("not_found", "", ""),))) is None
