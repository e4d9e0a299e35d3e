"""Problems, traces and annotations: the records that the stages hand to each other, and their files.

Every record is one line of a UTF-8 JSONL file whose keys are the field names. Spans are half-open ranges of characters
(Python code points) of `Trace.text`, the reply exactly as it was generated or released; nothing in this package ever
rebuilds that text. Reading is strict and happens before any long work: a fault is a `ValueError` that names the file,
the line or entry, and the field.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

LABELS = ("initializing", "deduction", "adding-knowledge", "example-testing", "uncertainty-estimation", "backtracking")
"""The labels of the paper, in the order of its annotation prompt."""

OTHER = "other"
"""Label that a judge with one question (is this backtracking?) gives sections that are not; see `judges.keyword`."""

RESERVED_LABELS = (
    *("all", "rest", "shuffled", "overall-mean", "sums"),
    *("noise", "random", "self-amplification", "unsteered"),
)
"""Names of vectors and groups of sections that stage 3 makes itself; no label may have them."""

FINISH_REASONS = ("stop", "length")
"""Why a reply ended: a stop id was sampled, or the limit of new tokens was reached. None means that it is not known."""


@dataclass(frozen=True)
class Problem:
    """A task that the reasoning model is asked.

    Attributes:
        id: unique in its file.
        category: kind of problem, e.g. `math_logic`.
        problem: the text that is put to the model.
    """

    id: str
    category: str
    problem: str


@dataclass(frozen=True)
class Trace:
    """One reply of the reasoning model.

    Attributes:
        id: `"<problem id>/<sample>"`, unique in its file.
        problem_id: id of the problem that was asked.
        category: its category.
        problem: its text.
        text: the reply exactly as generated (or as released). The spans of sections index this string.
        sample: number of the reply among the replies to the same problem.
        token_ids: ids as sampled, when known; the text is never tokenised again then.
        finish_reason: one of `FINISH_REASONS`, or None where it is not known.
    """

    id: str
    problem_id: str
    category: str
    problem: str
    text: str
    sample: int = 0
    token_ids: tuple[int, ...] | None = None
    finish_reason: str | None = None


@dataclass(frozen=True)
class Section:
    """A labelled, half-open span `[start, stop)` of `Trace.text`; `text[start]` is its first non-space character."""

    label: str
    start: int
    stop: int


@dataclass(frozen=True)
class Rejection:
    """A piece of a judge's answer that was not turned into a section.

    Attributes:
        reason: code, a value of `annotations.Reason` (or of the judge that made it).
        label: label as the judge wrote it, empty where it wrote none.
        text: text as the judge wrote it.
    """

    reason: str
    label: str
    text: str


@dataclass(frozen=True)
class Note:
    """Something to know about a section that *was* placed.

    Attributes:
        code: a value of `annotations.Reason`, e.g. `fuzzy`.
        section: index into `Annotation.sections`.
    """

    code: str
    section: int


@dataclass(frozen=True)
class Annotation:
    """The sections that a judge found in one trace, in order of their place in the text.

    Attributes:
        trace_id: `Trace.id`.
        judge: name of the judge.
        sections: what was placed.
        rejected: what was not, with the reason.
        notes: how a placed section had to be repaired or searched for.
    """

    trace_id: str
    judge: str
    sections: tuple[Section, ...]
    rejected: tuple[Rejection, ...] = ()
    notes: tuple[Note, ...] = ()


class _Identified(Protocol):
    @property
    def id(self) -> str: ...


_SURROGATE = re.compile("[\ud800-\udfff]")
_R = TypeVar("_R", bound=_Identified)


class _Fields:
    """Typed access to one JSON object whose faults name the place and the field."""

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, dict):
            raise ValueError(f"{where}: expected a JSON object, got {type(value).__name__}")
        self.value: dict[str, Any] = value
        self.where = where

    def refuse_others(self, accepted: Iterable[str]) -> None:
        """Refuses keys that are not fields of the record: a misspelt optional field must not be dropped in silence."""
        accepted = tuple(accepted)
        unknown = sorted(set(self.value) - set(accepted))
        if unknown:
            raise ValueError(f"{self.where}: unknown field {unknown[0]!r}; accepted: {', '.join(accepted)}")

    def get(self, key: str) -> Any:
        if key not in self.value:
            raise ValueError(f"{self.where}: field {key!r} is missing; found: {', '.join(self.value) or 'none'}")
        return self.value[key]

    def require(self, *keys: str) -> "_Fields":
        """Itself; ValueError names all of the keys that are missing."""
        if missing := [repr(key) for key in keys if key not in self.value]:
            named = f"field {missing[0]} is" if len(missing) == 1 else f"fields {', '.join(missing)} are"
            raise ValueError(f"{self.where}: {named} missing; found: {', '.join(self.value) or 'none'}")
        return self

    def text(self, key: str, *, empty: bool = False, cut: bool = False) -> str:
        """A string; `cut` lets lone surrogates through: a judge's answer may be cut inside an emoji."""
        value = self.get(key)
        if not isinstance(value, str):
            raise ValueError(f"{self.where}: field {key!r} must be a string, got {type(value).__name__} {value!r}")
        if not empty and not value.strip():
            raise ValueError(f"{self.where}: field {key!r} is empty; it needs text")
        if not cut and (surrogate := _SURROGATE.search(value)):
            raise ValueError(
                f"{self.where}: field {key!r} holds half of a character (\\u{ord(surrogate[0]):04x}, at character "
                f"{surrogate.start()}), which no tokenizer or endpoint takes; write the whole character or leave it out"
            )
        return value

    def natural(self, key: str) -> int:
        value = self.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{self.where}: field {key!r} must be an integer >= 0, got {value!r}")
        return value

    def items(self, key: str) -> list["_Fields"]:
        value = self.get(key)
        if not isinstance(value, list):
            raise ValueError(f"{self.where}: field {key!r} must be a list, got {type(value).__name__}")
        return [_Fields(item, f"{self.where}, {key}[{index}]") for index, item in enumerate(value)]


def is_released(path: Path) -> bool:
    """Whether a file or folder holds annotated chains; a file may hold traces instead, so its content tells."""
    if not path.is_file():
        return path.suffix != ".jsonl"
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        lines = [next((line for line in file if line.strip()), "")] if path.suffix == ".jsonl" else file
        return any('"annotated_chain"' in line or '"reasoning_chain"' in line for line in lines)


def read_any_traces(path: Path) -> list[Trace]:
    """Traces of a file of traces, or of a file or folder of chains; errors of `read_traces` and `read_released`."""
    return read_released(path)[0] if is_released(path) else read_traces(path)


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from error


def _json_objects(path: Path) -> Iterator[_Fields]:
    """Entries of a JSON list (`.json`) or the lines of a JSONL file (`.jsonl`)."""
    text = _read_text(path)
    if path.suffix == ".jsonl":
        # Not splitlines(): U+2028 and its like are legal inside a JSON string.
        numbered = ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
        entries = ((f"{path}, line {number}", _parse(line, f"{path}, line {number}")) for number, line in numbered)
    elif path.suffix == ".json":
        values = _parse(text, str(path))
        if not isinstance(values, list):
            raise ValueError(f"{path}: expected a JSON list of objects, got {type(values).__name__}")
        entries = ((f"{path}, entry {number}", value) for number, value in enumerate(values))
    else:
        raise ValueError(
            f"{path}: unknown suffix {path.suffix!r}; accepted: .json (a list), .jsonl (one object a line)"
        )
    found = False
    for where, value in entries:
        found = True
        yield _Fields(value, where)
    if not found:
        raise ValueError(f"{path}: holds no entries")


def _parse(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # also of an integer of 5,000 digits, of endless brackets
        raise ValueError(f"{where}: not valid JSON ({error})") from error


def _unique(records: list[_R], path: Path | str) -> list[_R]:
    seen: set[str] = set()
    for record in records:
        if record.id in seen:
            raise ValueError(f"{path}: id {record.id!r} occurs more than once; every id must be unique")
        seen.add(record.id)
    return records


def read_problems(path: Path | str) -> list[Problem]:
    """Reads problems from a JSON list or a JSONL file; the released `*_tasks.json` load unchanged.

    Args:
        path: `.json` or `.jsonl`; every entry has the strings `id`, `category` and `problem`, other keys are ignored.

    Returns:
        The problems, in the order of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a fault, named by file, line or entry, and field; or an id that occurs twice.
    """
    path = Path(path)
    names = ("id", "category", "problem")
    problems = [Problem(*(fields.require(*names).text(name) for name in names)) for fields in _json_objects(path)]
    return _unique(problems, path)


def read_traces(path: Path | str) -> list[Trace]:
    """Reads traces written by `write_jsonl` or by hand.

    A trace without text is refused unless it says how it ended: an empty reply is only believed when it was generated.

    Args:
        path: JSONL (or a JSON list) whose keys are the fields of `Trace`; the fields with a default may be absent.

    Returns:
        The traces, in the order of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a fault, named by file, line and field; or an id that occurs twice.
    """
    path = Path(path)
    return _unique([_trace(fields) for fields in _json_objects(path)], path)


def _trace(fields: _Fields) -> Trace:
    fields.refuse_others(Trace.__dataclass_fields__)
    given = fields.value
    finish_reason, token_ids = given.get("finish_reason"), given.get("token_ids")
    if finish_reason is not None and finish_reason not in FINISH_REASONS:
        accepted = ", ".join(FINISH_REASONS)
        raise ValueError(f"{fields.where}: finish_reason {finish_reason!r} is unknown; accepted: {accepted}, null")
    if token_ids is not None:
        if not isinstance(token_ids, list) or not all(type(i) is int and i >= 0 for i in token_ids):
            raise ValueError(f"{fields.where}: field 'token_ids' must be a list of integers >= 0, or null")
        token_ids = tuple(token_ids)
    return Trace(
        id=fields.text("id"),
        problem_id=fields.text("problem_id"),
        category=fields.text("category"),
        problem=fields.text("problem"),
        text=fields.text("text", empty=finish_reason is not None),
        sample=fields.natural("sample") if "sample" in given else 0,
        token_ids=token_ids,
        finish_reason=finish_reason,
    )


def read_annotations(path: Path | str) -> list[Annotation]:
    """Reads annotations written by `write_jsonl` or by hand: trace ids and character spans.

    Args:
        path: JSONL (or a JSON list) whose keys are the fields of `Annotation`; `rejected` and `notes` may be absent.

    Returns:
        The annotations, in the order of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a fault, named by file, line and field, a known label in another spelling included; or two
            annotations of one trace by one judge.
    """
    path = Path(path)
    annotations = [_annotation(fields) for fields in _json_objects(path)]
    seen: set[tuple[str, str]] = set()
    for annotation in annotations:
        key = (annotation.trace_id, annotation.judge)
        if key in seen:
            raise ValueError(f"{path}: trace {key[0]!r} is annotated more than once by the judge {key[1]!r}")
        seen.add(key)
    return annotations


def _annotation(fields: _Fields) -> Annotation:
    fields.refuse_others(Annotation.__dataclass_fields__)
    sections = []
    for item in fields.items("sections"):
        item.refuse_others(Section.__dataclass_fields__)
        section = Section(_label(item), item.natural("start"), item.natural("stop"))
        if section.stop <= section.start:
            raise ValueError(f"{item.where}: span [{section.start}, {section.stop}) is empty; stop must exceed start")
        sections.append(section)
    rejected = fields.items("rejected") if "rejected" in fields.value else []
    notes = fields.items("notes") if "notes" in fields.value else []
    return Annotation(
        trace_id=fields.text("trace_id"),
        judge=fields.text("judge"),
        sections=tuple(sections),
        rejected=tuple(
            Rejection(
                r.text("reason", cut=True),
                r.text("label", empty=True, cut=True),
                r.text("text", empty=True, cut=True),
            )
            for r in rejected
        ),
        notes=tuple(Note(n.text("code"), n.natural("section")) for n in notes),
    )


def _label(item: _Fields) -> str:
    """Any label but a reserved one and a known one in another spelling, which would count as a label of its own."""
    label = item.text("label")
    meant = _LABELS_BY_LETTERS.get(_letters(label), label.strip())
    if label != meant:
        raise ValueError(f"{item.where}: unknown label {label!r}; did you mean {meant!r}?")
    if label in RESERVED_LABELS:
        raise ValueError(
            f"{item.where}: label {label!r} is a name that this program uses itself ({', '.join(RESERVED_LABELS)}); "
            "choose another"
        )
    return label


def _letters(label: str) -> str:
    return re.sub(r"[-_\s]", "", label).lower()


_LABELS_BY_LETTERS = {_letters(label): label for label in (*LABELS, OTHER)}


def pair_annotations(traces: Sequence[Trace], annotations: Sequence[Annotation]) -> list[tuple[Trace, Annotation]]:
    """Joins annotations to their traces and checks every span against the text that it indexes.

    Args:
        traces: traces with unique ids.
        annotations: at most one per trace; traces without one are left out.

    Returns:
        Pairs in the order of `traces`.

    Raises:
        ValueError: an annotation of an unknown trace, two of one trace, a span that leaves the text, starts on white
            space or starts before the section in front of it, or a note on a section that does not exist.
    """
    by_trace: dict[str, Annotation] = {}
    for annotation in annotations:
        if annotation.trace_id in by_trace:
            raise ValueError(f"trace {annotation.trace_id!r} has more than one annotation; pair one judge at a time")
        by_trace[annotation.trace_id] = annotation
    pairs = [(trace, by_trace.pop(trace.id)) for trace in traces if trace.id in by_trace]
    if by_trace:
        raise ValueError(f"annotation of trace {next(iter(by_trace))!r}, which is not among the {len(traces)} traces")
    for trace, annotation in pairs:
        _check_spans(trace, annotation)
    return pairs


def _check_spans(trace: Trace, annotation: Annotation) -> None:
    previous = 0
    for index, section in enumerate(annotation.sections):
        where = f"trace {trace.id!r}, section {index} [{section.start}, {section.stop})"
        if not 0 <= section.start < section.stop <= len(trace.text):
            raise ValueError(f"{where}: not a span of its text of {len(trace.text)} characters")
        if trace.text[section.start].isspace():
            raise ValueError(f"{where}: starts on white space; start must be the section's first non-space character")
        if section.start < previous:
            raise ValueError(f"{where}: starts before the section in front of it; sections must be in text order")
        previous = section.start
    for note in annotation.notes:
        if note.section >= len(annotation.sections):
            raise ValueError(f"trace {trace.id!r}: note {note.code!r} on section {note.section}, which does not exist")


def write_jsonl(path: Path | str, records: Iterable[Problem | Trace | Annotation]) -> None:
    """Writes one record a line, to a temporary name that is then renamed: the file is whole or it is not there.

    Args:
        path: target; its folder is made where it is missing.
        records: problems, traces or annotations.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            for record in records:
                file.write(_line(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _line(record: Problem | Trace | Annotation) -> str:
    value = asdict(record)
    line = json.dumps(value, ensure_ascii=False)
    # A lone surrogate (a judge's answer cut inside an emoji) has no UTF-8 form; escaped, it still makes the round trip.
    return line if line.isascii() or not any("\ud800" <= c <= "\udfff" for c in line) else json.dumps(value)


def read_released(path: Path | str | Sequence[Path | str]) -> tuple[list[Trace], list[str]]:
    """Reads annotated chains in the released format.

    Each entry has the strings `task_id`, `problem`, `reasoning_chain` and `annotated_chain`. The category is the task
    id without its number (`math_logic_12` -> `math_logic`), the trace id `"<task_id>/<sample>"`, where `sample` counts
    the chains of one task. The format does not record how a chain ended. An empty `annotated_chain` is let through: the
    judge failed there, which `annotations.align` reports as `no_sections`.

    Args:
        path: a `.json` or `.jsonl` file, a folder (all its `*_annotated_chains.json`), or several of these.

    Returns:
        Traces, and for each the annotated chain as the judge wrote it (for `annotations.align`).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a fault, named by file, entry and field.
    """
    traces: list[Trace] = []
    annotated: list[str] = []
    samples: Counter[str] = Counter()
    for file in chain_files(path):
        for fields in _json_objects(file):
            task = fields.text("task_id")
            category = re.sub(r"_\d+$", "", task)
            sample, samples[task] = samples[task], samples[task] + 1
            problem, chain = fields.text("problem"), fields.text("reasoning_chain")
            traces.append(Trace(f"{task}/{sample}", task, category, problem, chain, sample))
            annotated.append(fields.text("annotated_chain", empty=True, cut=True))
    return traces, annotated


def chain_files(path: Path | str | Sequence[Path | str]) -> Iterator[Path]:
    """The files that `read_released` reads: of a folder those named *_annotated_chains.json.

    Raises:
      FileNotFoundError: a folder has no such file.
    """
    if not isinstance(path, Path | str):
        for item in path:
            yield from chain_files(item)
        return
    path = Path(path)
    if not path.is_dir():
        yield path
        return
    files = sorted(path.glob("*_annotated_chains.json"))
    if not files:
        raise FileNotFoundError(f"{path}: no file of this folder is named *_annotated_chains.json")
    yield from files
