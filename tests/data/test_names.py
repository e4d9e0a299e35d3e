"""Names that come from data: on one line, printable, never a path; one id is one problem; a key is given once."""

import json
from pathlib import Path
from typing import Any

import pytest

from backtrack_jax.data import records

TRACE = {"id": "p/0", "problem_id": "p", "category": "c", "problem": "Why?", "text": "So. Wait."}
ANNOTATION = {"trace_id": "p/0", "judge": "me", "sections": [{"label": "deduction", "start": 0, "stop": 3}]}


def write(folder: Path, *lines: Any) -> Path:
    path = folder / "file.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


@pytest.mark.parametrize(
    "label",
    ["x/../../victim", "a/b", "a\\b", "C:x", "..", ".hidden", "a\0b", "a\nb", "\x1b[31mred", "x" * 300, "a\u2028b"],
)
def test_labels_never_become_paths(label: str, tmp_path: Path) -> None:
    path = write(tmp_path, ANNOTATION | {"sections": [{"label": label, "start": 0, "stop": 3}]})
    with pytest.raises(ValueError, match=r"file.jsonl, line 1, sections\[0\]: field 'label' is"):
        records.read_annotations(path)


@pytest.mark.parametrize("label", ["=1+1", "+x", "@me", "a b", "déduction", "日本", "-x", "a.b", "50 %"])
def test_labels_of_other_kinds_are_labels(label: str, tmp_path: Path) -> None:
    path = write(tmp_path, ANNOTATION | {"sections": [{"label": label, "start": 0, "stop": 3}]})
    assert records.read_annotations(path)[0].sections[0].label == label


@pytest.mark.parametrize("field", ["id", "problem_id", "category"])
@pytest.mark.parametrize("value", ["a\x1b[2Jb", "a\nb", "x" * 300, "a\rb"])
def test_names_of_traces_stay_on_one_line(field: str, value: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"line 1: field '{field}' is .* printable characters on one line"):
        records.read_traces(write(tmp_path, TRACE | {field: value}))


def test_one_id_is_one_problem(tmp_path: Path) -> None:
    again = TRACE | {"id": "p/1", "problem": "How?"}
    with pytest.raises(ValueError, match=r"line 2: problem_id 'p' has another problem text than before"):
        records.read_traces(write(tmp_path, TRACE, again))
    chain = {"task_id": "m_1", "problem": "a", "reasoning_chain": "So.", "annotated_chain": ""}
    for name in ("one", "two"):
        (tmp_path / f"{name}_annotated_chains.json").write_text(json.dumps([chain | {"problem": name}]))
    with pytest.raises(ValueError, match=r"two_annotated_chains.json, entry 0: task_id 'm_1' has another problem"):
        records.read_released(tmp_path)
    (tmp_path / "two_annotated_chains.json").write_text(json.dumps([chain | {"problem": "one"}]))
    assert [trace.id for trace in records.read_released(tmp_path)[0]] == ["m_1/0", "m_1/1"]


def test_a_key_that_is_given_twice_is_refused(tmp_path: Path) -> None:
    line = json.dumps(TRACE)[:-1] + ', "text": "Other."}'
    with pytest.raises(ValueError, match=r"line 1: not valid JSON \(the key 'text' is given twice\)"):
        records.read_traces(write(tmp_path, line))
