"""Agreement of two judges: precision, recall, F1 and Cohen's kappa, with intervals; and sheets for people to label.

A *unit* is what both judges are asked about. `section`: the sections of the reference; `sentence`: the sentences of the
reasoning (`keyword.split_sentences`), as in the paper's Table C.1. A judge gives a unit a label if one of its sections
of that label shares a character with the unit. So a sentence with "Wait" makes the section that holds it a keyword hit,
and a section of three sentences labels all three. Units to which one of the judges gives no label at all, and traces
that one of them failed on or did not see, are left out and counted.

    python -m backtrack_jax.analysis.agreement --released=../shared/data/ward2025

prints the keyword judge against the released labels of GPT-4o, by category. The paper's table is by strength, on
steered replies: `reply_traces` makes traces of these, which any judge can label, and gives the strengths as groups.
"""

import argparse
import csv
import hashlib
import io
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from backtrack_jax.data.annotations import align
from backtrack_jax.data.records import (
    LABELS,
    OTHER,
    Annotation,
    Section,
    Trace,
    failure,
    pair_annotations,
    read_released,
)
from backtrack_jax.data.text import sentence_spans
from backtrack_jax.judges.keyword import VARIANTS, annotate

UNITS = ("section", "sentence")
"""What the judges are compared on; see the module."""

SHEET_COLUMNS = ("key", "trace_id", "category", "problem", "start", "stop", "text", "label")
"""Columns of the sheet for people. They fill in `label`; `key`, `start` and `stop` have to stay as they are."""

_NONE = "none of these"


class Measure(NamedTuple):
    """A value and its percentile bootstrap interval over problems; nan where it is not defined."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Agreement:
    """How far another judge agrees with the reference on the units of one group of traces.

    Attributes:
        group: name of the group, `all` for all traces.
        unit: one of `UNITS`.
        label: the label that is compared with all others; `any` where all labels are compared with each other.
        precision: of the units that the other judge gives the label, the share to which the reference gives it too.
        recall: of the units to which the reference gives the label, the share that the other judge finds.
        f1: harmonic mean of both. For `any` the three are one number, the share of units with equal labels.
        kappa: Cohen's kappa, (p_o - p_e) / (1 - p_e): agreement above what the frequencies of the labels give.
        n_problems: problems, the unit of the bootstrap.
        n_traces: traces that both judges labelled.
        n_units: units that both judges gave a label.
        n_reference: of these, units that the reference gives the label.
        n_other: of these, units that the other judge gives the label.
        left_out_units: units that one of the judges gave no label.
        left_out_traces: traces on which one of the judges failed, or which one of them did not see.
    """

    group: str
    unit: str
    label: str
    precision: Measure
    recall: Measure
    f1: Measure
    kappa: Measure
    n_problems: int
    n_traces: int
    n_units: int
    n_reference: int
    n_other: int
    left_out_units: int
    left_out_traces: int


@dataclass(frozen=True)
class _Counts:
    """Units of one trace by what the reference (rows) and the other judge (columns) call them."""

    problem: str
    matrix: np.ndarray  # [K, K] integers
    left_out: int


def agreement(
    traces: Sequence[Trace],
    reference: Sequence[Annotation],
    other: Sequence[Annotation],
    *,
    unit: str = "section",
    label: str | None = "backtracking",
    groups: Mapping[str, str] | None = None,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> list[Agreement]:
    """Compares a judge with a reference, over all traces and by group.

    Args:
        traces: the traces.
        reference: annotations by the judge that counts as true; at most one per trace.
        other: annotations by the judge that is measured.
        unit: one of `UNITS`.
        label: the label in question; None compares all labels, each unit with the label that covers most of it.
        groups: trace id -> group, e.g. the category, or the strength of a steered reply; traces without one count in
            `all` only.
        level: coverage of the intervals.
        n_resamples: resamples of the bootstrap.
        seed: of the bootstrap.

    Returns:
        A row for all traces, then one per group in the order of `traces`.

    Raises:
        ValueError: unknown unit, or annotations that do not fit the traces.
    """
    if unit not in UNITS:
        raise ValueError(f"unknown unit {unit!r} of agreement; accepted: {', '.join(UNITS)}")
    pairs = [{trace.id: annotation for trace, annotation in pair_annotations(traces, a)} for a in (reference, other)]
    used = sorted(
        {section.label for found in pairs for annotation in found.values() for section in annotation.sections}
    )
    classes = used if label is None else [_NONE, label]
    counts: dict[str, _Counts] = {}
    for trace in traces:
        first, second = (found.get(trace.id) for found in pairs)
        if first is not None and second is not None and failure(first) is failure(second) is None:
            counts[trace.id] = _count(trace, first, second, unit, classes)
    members: dict[str, list[str]] = {"all": [trace.id for trace in traces]}
    for trace in traces:
        if groups is not None and trace.id in groups:
            members.setdefault(groups[trace.id], []).append(trace.id)
    rows = []
    for group, ids in members.items():
        found = [counts[i] for i in ids if i in counts]
        measures, matrix = _measure(found, len(classes), label is not None, level, n_resamples, seed)
        rows.append(
            Agreement(
                group,
                unit,
                label or "any",
                *measures,
                n_problems=len({one.problem for one in found}),
                n_traces=len(found),
                n_units=int(matrix.sum()),
                n_reference=int(matrix[1].sum() if label else matrix.sum()),
                n_other=int(matrix[:, 1].sum() if label else matrix.sum()),
                left_out_units=sum(one.left_out for one in found),
                left_out_traces=len(ids) - len(found),
            )
        )
    return rows


def reply_traces(lines: Iterable[Mapping[str, Any]]) -> tuple[list[Trace], dict[str, str]]:
    """Steered replies as traces, and the strength of each (Table C.1).

        traces, strengths = reply_traces(store.read_lines(folder / "4-steering" / "generations.jsonl"))
        label_traces(traces, JudgePrompt(), settings, ledger, on_done=lambda done, _: by_llm.append(done.annotation))
        agreement(traces, by_llm, [keyword.annotate(trace) for trace in traces], unit="sentence", groups=strengths)

    Args:
        lines: of generations.jsonl, all or some; the paper's table is of one model and one vector.

    Returns:
        The traces, named by the number of their line, the problem and the sample; and trace id -> magnitude.
    """
    traces, strengths = [], {}
    for number, line in enumerate(lines):
        trace = Trace(
            id=f"{number}/{line['problem_id']}/{line['sample']}",
            **{name: line[name] for name in ("problem_id", "category", "problem", "text", "sample", "finish_reason")},
            token_ids=tuple(line["ids"]),
        )
        traces.append(trace)
        strengths[trace.id] = f"{line['magnitude']:g}"
    return traces, strengths


def _count(trace: Trace, reference: Annotation, other: Annotation, unit: str, classes: Sequence[str]) -> _Counts:
    spans = [(s.start, s.stop) for s in reference.sections] if unit == "section" else sentence_spans(trace)
    matrix, left_out = np.zeros((len(classes), len(classes)), np.int64), 0
    for start, stop in spans:
        first, second = (_class_of(judge.sections, start, stop, classes) for judge in (reference, other))
        if first is None or second is None:
            left_out += 1
        else:
            matrix[first, second] += 1
    return _Counts(trace.problem_id, matrix, left_out)


def _class_of(sections: Sequence[Section], start: int, stop: int, classes: Sequence[str]) -> int | None:
    """Index of the class of a unit; None where no section shares a character with it."""
    shared: Counter[str] = Counter()
    for section in sections:
        if (common := min(stop, section.stop) - max(start, section.start)) > 0:
            shared[section.label] += common
    if not shared:
        return None
    if classes[0] == _NONE:
        return int(classes[1] in shared)
    return classes.index(max(shared, key=lambda name: shared[name]))  # of equals the first in the text


def _measure(
    counts: Sequence[_Counts], n_classes: int, binary: bool, level: float, n_resamples: int, seed: int
) -> tuple[list[Measure], np.ndarray]:
    """Precision, recall, F1 and kappa of the pooled matrix, and that matrix, [K, K]."""
    by_problem: dict[str, np.ndarray] = {}
    for one in counts:
        by_problem[one.problem] = by_problem.get(one.problem, 0) + one.matrix
    stacked = np.array(list(by_problem.values())).reshape(len(by_problem), n_classes, n_classes)
    pooled = stacked.sum(0)
    values = _statistics(pooled.astype(np.float64), binary)
    low = high = np.full(4, np.nan)
    if len(by_problem) > 1:
        n = len(by_problem)
        # How often each problem is drawn, [n_resamples, P].
        draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_resamples)
        resampled = _statistics(np.tensordot(draws, stacked, axes=1).astype(np.float64), binary)
        tail = (1 - level) / 2
        bounds = [
            np.quantile(column[np.isfinite(column)], [tail, 1 - tail])
            if np.isfinite(column).any()
            else (np.nan, np.nan)
            for column in resampled.T
        ]
        low, high = np.array(bounds).T
    return [Measure(*map(float, measure)) for measure in zip(values, low, high, strict=True)], pooled


def _statistics(matrix: np.ndarray, binary: bool) -> np.ndarray:
    """[..., K, K] float64 -> [..., 4]: precision, recall, F1, kappa; nan where a denominator is zero."""
    total = matrix.sum((-2, -1))
    diagonal = np.trace(matrix, axis1=-2, axis2=-1)
    rows, columns = matrix.sum(-1), matrix.sum(-2)
    hits, true, called = (matrix[..., 1, 1], rows[..., 1], columns[..., 1]) if binary else (diagonal, total, total)
    with np.errstate(invalid="ignore", divide="ignore"):
        expected = (rows * columns).sum(-1) / total
        return np.stack(
            [hits / called, hits / true, 2 * hits / (true + called), (diagonal - expected) / (total - expected)], -1
        )


def format_agreement(rows: Sequence[Agreement]) -> str:
    """Table of `agreement`, for people: percents for all but kappa, with the intervals.

    Args:
        rows: rows of one or several comparisons.

    Returns:
        Lines of text without a final line break.
    """
    head = f"{'unit':<10}{'label':<24}{'group':<14}{'units':>7}{'ref.':>7}{'judge':>7}"
    lines = [head + "".join(f"{name:>21}" for name in ("precision %", "recall %", "F1 %", "kappa"))]
    for row in rows:
        line = f"{row.unit:<10}{row.label:<24}{row.group:<14}{row.n_units:>7}{row.n_reference:>7}{row.n_other:>7}"
        for measure, scale, digits in (
            (row.precision, 100, 1),
            (row.recall, 100, 1),
            (row.f1, 100, 1),
            (row.kappa, 1, 2),
        ):
            value, low, high = (f"{scale * number:.{digits}f}" for number in measure)
            line += f"{value + ' [' + low + ', ' + high + ']':>21}"
        lines.append(line)
        if row.left_out_units or row.left_out_traces:
            lines.append(f"{'':<10}left out: {row.left_out_units} units, {row.left_out_traces} traces")
    return "\n".join(lines)


def export_for_human(path: Path | str, traces: Sequence[Trace], *, n_traces: int | None = None, seed: int = 0) -> None:
    """Writes a sheet of sentences for a person to label, without what any judge said.

    Args:
        path: CSV file (UTF-8 with a mark, as spreadsheets expect), `SHEET_COLUMNS`, one sentence a row.
        traces: the traces.
        n_traces: how many of them, drawn at random; None for all. Whole traces: a sentence needs its context.
        seed: of the draw.

    Raises:
        ValueError: n_traces is more than there are.
    """
    if n_traces is not None and n_traces > len(traces):
        raise ValueError(f"n_traces {n_traces} is more than the {len(traces)} traces")
    chosen = traces if n_traces is None else random.Random(seed).sample(list(traces), n_traces)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8-sig", newline="", errors="replace") as file:
        sheet = csv.writer(file)
        sheet.writerow(SHEET_COLUMNS)
        for trace in chosen:
            for number, (start, stop) in enumerate(sentence_spans(trace)):
                problem = trace.problem if number == 0 else ""
                texts = [_cell(text) for text in (trace.id, trace.category, problem)]
                sheet.writerow([_sheet_key(trace), *texts, start, stop, _cell(trace.text[start:stop]), ""])


def _cell(text: str) -> str:
    """Text that a spreadsheet does not take for a formula: model output is not to be trusted."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def _sheet_key(trace: Trace) -> str:
    """Names a trace by its id and its text. The letter in front keeps spreadsheets from reading it as a number."""
    return "t" + hashlib.sha256(f"{trace.id}\0{trace.text}".encode(errors="replace")).hexdigest()[:16]


def read_human(path: Path | str, traces: Sequence[Trace], judge: str = "human") -> list[Annotation]:
    """Reads a sheet that was labelled by a person; rows may be in any order.

    Args:
        path: the CSV file, separated by commas or semicolons.
        traces: the traces that it was made from, and any others.
        judge: name to record.

    Returns:
        One annotation per trace with at least one label, one section per labelled sentence, in the order of `traces`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not UTF-8, or a column is missing; or in a named row: an unknown trace or label, a span
            that is no sentence of the trace, a sentence that occurs twice; or no row has a label.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}); save the sheet as CSV UTF-8") from error
    head = text.partition("\n")[0]
    delimiter = ";" if head.count(";") > head.count(",") else ","
    rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, restval=""))  # of short rows
    missing = {"key", "start", "stop", "label"} - set(rows[0] if rows else ())
    if missing:
        raise ValueError(f"{path}: column {min(missing)!r} is missing; expected: {', '.join(SHEET_COLUMNS)}")
    by_key = {_sheet_key(trace): trace for trace in traces}
    found: dict[str, dict[tuple[int, int], str]] = {}
    for number, row in enumerate(rows, 2):
        where = f"{path}, row {number}"
        label = (row["label"] or "").strip().lower()
        if not label:
            continue
        if label not in (*LABELS, OTHER):
            raise ValueError(f"{where}: unknown label {label!r}; accepted: {', '.join((*LABELS, OTHER))}, or nothing")
        trace = by_key.get(row["key"].strip())
        if trace is None:
            raise ValueError(
                f"{where}: key {row['key']!r} belongs to none of the {len(traces)} traces, or to an older text"
            )
        spans = found.setdefault(trace.id, {})
        span = _span(row, trace, where)
        if span in spans:
            raise ValueError(f"{where}: the sentence {span} of trace {trace.id!r} occurs more than once")
        spans[span] = label
    if not found:
        raise ValueError(f"{path}: no row has a label")
    return [
        Annotation(trace.id, judge, tuple(Section(label, *span) for span, label in sorted(found[trace.id].items())))
        for trace in traces
        if trace.id in found
    ]


def _span(row: Mapping[str, str], trace: Trace, where: str) -> tuple[int, int]:
    try:
        span = int(row["start"]), int(row["stop"])
    except ValueError:
        span = (-1, -1)
    if span not in sentence_spans(trace):
        raise ValueError(
            f"{where}: [{row['start']}, {row['stop']}) is no sentence of trace {trace.id!r}; restore the row"
        )
    return span


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the keyword judge against the released labels."""
    parser = argparse.ArgumentParser(description="The keyword judge against the released labels of GPT-4o.")
    parser.add_argument("--released", required=True, help="a released *_annotated_chains.json, or a folder of them")
    parser.add_argument("--variant", default="wait_hmm", choices=VARIANTS, help="variant of the keyword judge")
    flags = parser.parse_args(arguments)
    traces, annotated = read_released(flags.released)
    reference = [align(trace, text) for trace, text in zip(traces, annotated, strict=True)]
    other = [annotate(trace, flags.variant) for trace in traces]
    groups = {trace.id: trace.category for trace in traces}
    print(format_agreement([row for u in UNITS for row in agreement(traces, reference, other, unit=u, groups=groups)]))


if __name__ == "__main__":
    main()
