"""Sheets of sentences for people to label, and what they labelled as annotations."""

import csv
import hashlib
import io
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from backtrack_jax.data.records import LABELS, OTHER, Annotation, Section, Trace
from backtrack_jax.data.text import sentence_spans

SHEET_COLUMNS = ("key", "trace_id", "category", "problem", "start", "stop", "text", "label")
"""Columns of the sheet for people. They fill in `label`; `key`, `start` and `stop` have to stay as they are."""


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
            that is not a sentence of the trace, a sentence that occurs twice; or no row has a label.
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
            f"{where}: [{row['start']}, {row['stop']}) is not a sentence of trace {trace.id!r}; restore the row"
        )
    return span
