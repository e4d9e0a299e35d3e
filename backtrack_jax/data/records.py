"""Problems, traces and annotations: the records that the stages hand to each other, and their files.

Every record is one line of a UTF-8 JSONL file whose keys are the field names. Spans are half-open ranges of characters
(Python code points) of `Trace.text`, the reply exactly as it was generated or released; nothing in this package ever
rebuilds that text. Reading is strict and happens before any long work: a fault is a `ValueError` that names the file,
the line or entry, and the field.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from backtrack_jax.config import CONTRASTS
from backtrack_jax.data import jsonl
from backtrack_jax.data.jsonl import Fields
from backtrack_jax.kinds import RESERVED

LABELS = ("initializing", "deduction", "adding-knowledge", "example-testing", "uncertainty-estimation", "backtracking")
"""The labels of the paper, in the order of its annotation prompt."""

OTHER = "other"
"""Label that a judge with one question (is this backtracking?) gives sections that are not; see `judges.keyword`."""

RESERVED_LABELS = (*CONTRASTS, "sums", "unsteered", *RESERVED)
"""Names of groups of sections, files of stage 3 and conditions; no label may have them."""

FINISH_REASONS = ("stop", "length")
"""Why a reply ended: a stop id was sampled, or the limit of new tokens was reached. None means that it is not known."""


@dataclass(frozen=True)
class Problem:
    """A task that the reasoning model is asked.

    Attributes:
        id: unique in its file.
        category: kind of problem, e.g. `math_logic`.
        problem: the text that is put to the model.
        answer: what is right, a number or a choice (`data.answers`); empty where it is not known.
        difficulty: from 1 up; 0 where it is not known.
    """

    id: str
    category: str
    problem: str
    answer: str = ""
    difficulty: int = 0


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
        end_marks: texts that end its reasoning beside those of `models.markers.END_MARKERS`.
    """

    id: str
    problem_id: str
    category: str
    problem: str
    text: str
    sample: int = 0
    token_ids: tuple[int, ...] | None = None
    finish_reason: str | None = None
    end_marks: tuple[str, ...] = ()


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


UNSTEERED = "unsteered"
"""Kind of the condition under which nothing is changed."""


@dataclass(frozen=True)
class Condition:
    """One cell of a sweep.

    Attributes:
        target: role of the model that is steered.
        kind: what is done: an entry of `steering.kinds` (`kinds.parse`), or `unsteered`.
        source: role of the model whose activations the direction comes from; empty where there is none.
        layer: block whose output is changed, 0-based, and where the direction was read; of an ablation the first block.
        window: offsets that the direction was read at, as `window_name` writes them; empty where there is no source.
        magnitude: as in the config, in its unit.
        length: norm of what is added, in the residual stream's own scale, with the magnitude's sign; of an ablation
            the share of the component that is removed.
    """

    target: str
    kind: str
    source: str
    layer: int
    window: str
    magnitude: float
    length: float

    @classmethod
    def of(cls, line: Mapping[str, Any]) -> "Condition":
        """The condition of a line of a table or of generations.jsonl; KeyError names a field that is missing."""
        return cls(**{field.name: line[field.name] for field in dataclasses.fields(cls)})

    @property
    def name(self) -> str:
        """The cell in words, for messages."""
        source = f" of the {self.source} model (window {self.window})" if self.source else ""
        return f"{self.kind}{source} at layer {self.layer} of the {self.target} model, magnitude {self.magnitude:g}"


def window_name(window: tuple[int, int]) -> str:
    """Offsets as they stand in tables: `-13..-8`."""
    return f"{window[0]}..{window[1]}"


@dataclass(frozen=True)
class Reply:
    """One steered reply, a line of generations.jsonl.

    Attributes:
        problem_id: id of the problem that was asked.
        category: its category.
        problem: its text.
        sample: number of the reply among those to the same problem under the same condition.
        model: path of the model that wrote it.
        condition: what was done to the model; its fields stand in the line one by one.
        unit: of the magnitude, see `SteeringSpec.unit`.
        span: positions that were changed.
        vector_hash: of the direction that was added; empty where there is none.
        seed: of the run.
        ids: sampled token ids, a stop token included.
        text: the reply without the stop token.
        finish_reason: one of `FINISH_REASONS`.
        dtype: of the model's weights; empty where it was not written down, before version 0.3.
    """

    problem_id: str
    category: str
    problem: str
    sample: int
    model: str
    condition: Condition
    unit: str
    span: str
    vector_hash: str
    seed: int
    ids: tuple[int, ...]
    text: str
    finish_reason: str
    dtype: str = ""

    def line(self) -> dict[str, Any]:
        """The flat JSON object that generations.jsonl holds."""
        flat: dict[str, Any] = {}
        for name, value in asdict(self).items():
            flat |= value if name == "condition" else {name: value}
        return flat

    @classmethod
    def from_line(cls, line: Mapping[str, Any]) -> "Reply":
        """The reply of a line of generations.jsonl; KeyError names a field that is missing."""
        own = {
            field.name: line[field.name]
            for field in dataclasses.fields(cls)
            if field.name not in ("condition", "ids", "dtype")
        }
        own["dtype"] = line.get("dtype", "")
        return cls(condition=Condition.of(line), ids=tuple(line["ids"]), **own)

    def trace(self, number: int = 0, end_marks: tuple[str, ...] = ()) -> Trace:
        """The reply as a judge reads it, named by its number among the replies, the problem and the sample."""
        return Trace(
            id=f"{number}/{self.problem_id}/{self.sample}",
            problem_id=self.problem_id,
            category=self.category,
            problem=self.problem,
            text=self.text,
            sample=self.sample,
            token_ids=self.ids,
            finish_reason=self.finish_reason,
            end_marks=end_marks,
        )


FAILED = "judge_failed:"
"""Prefix of the reason of the first rejection of an annotation that stands for a failure; see `failure`."""


def failure(annotation: Annotation) -> str | None:
    """Why the judge could not label the trace, without the prefix `FAILED`; None where it did.

    A failure is an annotation without sections whose first rejection has a reason `judge_failed:<why>`. It stands for
    "no label", not for "no backtracking": leave such traces out of every rate, and count them.
    """
    reason = annotation.rejected[0].reason if annotation.rejected and not annotation.sections else ""
    return reason.removeprefix(FAILED) if reason.startswith(FAILED) else None


class _Identified(Protocol):
    @property
    def id(self) -> str: ...


_R = TypeVar("_R", bound=_Identified)


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
        path: `.json` or `.jsonl`; every entry has the strings `id`, `category` and `problem`, and may have `answer` and
            `difficulty`; other keys are ignored.

    Returns:
        The problems, in the order of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a fault, named by file, line or entry, and field; or an id that occurs twice.
    """
    path = Path(path)
    return _unique([_problem(fields) for fields in jsonl.read_objects(path)], path)


def _problem(fields: Fields) -> Problem:
    names, given = ("id", "category", "problem"), fields.value
    fields.require(*names)
    return Problem(
        fields.name("id"),
        fields.name("category"),
        fields.text("problem"),
        answer=fields.text("answer", empty=True) if "answer" in given else "",
        difficulty=fields.natural("difficulty") if "difficulty" in given else 0,
    )


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
    problems: dict[str, str] = {}
    traces = []
    for fields in jsonl.read_objects(path):
        trace = _trace(fields)
        if problems.setdefault(trace.problem_id, trace.problem) != trace.problem:
            raise ValueError(_two_problems(fields.where, "problem_id", trace.problem_id))
        traces.append(trace)
    return _unique(traces, path)


def _two_problems(where: str, field: str, name: str) -> str:
    return f"{where}: {field} {name!r} has another problem text than before; one id is one problem"


def _trace(fields: Fields) -> Trace:
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
    end_marks = given.get("end_marks", [])
    if not isinstance(end_marks, list) or not all(isinstance(mark, str) and mark.strip() for mark in end_marks):
        raise ValueError(f"{fields.where}: field 'end_marks' must be a list of texts, got {end_marks!r}")
    return Trace(
        id=fields.name("id"),
        problem_id=fields.name("problem_id"),
        category=fields.name("category"),
        problem=fields.text("problem"),
        text=fields.text("text", empty=finish_reason is not None),
        sample=fields.natural("sample") if "sample" in given else 0,
        token_ids=token_ids,
        finish_reason=finish_reason,
        end_marks=tuple(end_marks),
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
    annotations = [_annotation(fields) for fields in jsonl.read_objects(path)]
    seen: set[tuple[str, str]] = set()
    for annotation in annotations:
        key = (annotation.trace_id, annotation.judge)
        if key in seen:
            raise ValueError(f"{path}: trace {key[0]!r} is annotated more than once by the judge {key[1]!r}")
        seen.add(key)
    return annotations


def _annotation(fields: Fields) -> Annotation:
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


def _label(item: Fields) -> str:
    """Any label but a reserved one and a known one in another spelling, which would count as a label of its own."""
    label = item.name("label", file=True)
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
    """Writes one record a line; the file is whole or it is not there.

    Args:
        path: target; its folder is created if missing.
        records: problems, traces or annotations.
    """
    jsonl.write_objects(Path(path), map(_fields, records))


def _fields(record: Problem | Trace | Annotation) -> dict[str, Any]:
    """The fields of a record; `end_marks` only where there are some, so that other traces are written as ever."""
    return {name: value for name, value in asdict(record).items() if name != "end_marks" or value}


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
    problems: dict[str, str] = {}
    for file in chain_files(path):
        for fields in jsonl.read_objects(file):
            task = fields.name("task_id")
            category = re.sub(r"_\d+$", "", task)
            sample, samples[task] = samples[task], samples[task] + 1
            problem, chain = fields.text("problem"), fields.text("reasoning_chain")
            if problems.setdefault(task, problem) != problem:
                raise ValueError(_two_problems(fields.where, "task_id", task))
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
