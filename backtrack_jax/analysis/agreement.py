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
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from backtrack_jax.analysis import cells, judged
from backtrack_jax.analysis.base import Analysis, Material
from backtrack_jax.analysis.claims import Claim, all_of, measured
from backtrack_jax.analysis.dose import LEVEL
from backtrack_jax.analysis.results import PAPER_LABEL, Results
from backtrack_jax.analysis.sheets import SHEET_COLUMNS as SHEET_COLUMNS
from backtrack_jax.analysis.sheets import export_for_human as export_for_human
from backtrack_jax.analysis.sheets import read_human as read_human
from backtrack_jax.analysis.statistics import NAN, Region, rate_interval, share_interval, verdict
from backtrack_jax.config import Experiment
from backtrack_jax.data.annotations import align
from backtrack_jax.data.records import (
    UNSTEERED,
    Annotation,
    Reply,
    Section,
    Trace,
    failure,
    pair_annotations,
    read_released,
    window_name,
)
from backtrack_jax.data.text import sentence_spans
from backtrack_jax.files.console import say
from backtrack_jax.files.tables import Table
from backtrack_jax.judges import keyword
from backtrack_jax.judges.base import trace_judge
from backtrack_jax.judges.keyword import VARIANTS, annotate

UNITS = ("section", "sentence")
"""What the judges are compared on; see the module."""

_NONE = "none of these"
_ON_REPLIES = "judge_agreement"  # table
_PAPER_F1 = {"0": 0.6412, "4": 0.6452, "8": 0.5635, "12": 0.5424}  # Table C.1, by strength: norm added
_WITHIN = 0.1
_LEVELS = {"decides": LEVEL, "of_four": 1 - (1 - LEVEL) / len(_PAPER_F1)}  # the latter errs a quarter as often
_COUNTED = ("group", "unit", "n_units", "n_reference", "n_traces", "n_problems", "left_out_units", "left_out_traces")


class Measure(NamedTuple):
    """A value and its interval over problems; nan where it is not defined."""

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
        n_problems: problems, the unit of the intervals.
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
        measures, matrix = _measure(found, len(classes), label is not None, level)
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


def reply_traces(replies: Iterable[Reply]) -> tuple[list[Trace], dict[str, str]]:
    """Steered replies as traces, and the strength of each (Table C.1).

        traces, strengths = reply_traces(STEERING.read(folder / STEERING.name))
        label_traces(traces, JudgePrompt(), settings, ledger, on_done=lambda done, _: by_llm.append(done.annotation))
        agreement(traces, by_llm, [keyword.annotate(trace) for trace in traces], unit="sentence", groups=strengths)

    Args:
        replies: all or some of a run; the paper's table is of one model and one vector.

    Returns:
        The traces, named by their number, the problem and the sample; and trace id -> magnitude.
    """
    replies = list(replies)
    traces = [reply.trace(number) for number, reply in enumerate(replies)]
    strengths = [f"{reply.condition.magnitude:g}" for reply in replies]
    return traces, {trace.id: strength for trace, strength in zip(traces, strengths, strict=True)}


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
    return classes.index(max(shared, key=lambda name: shared[name]))  # of ties, the first in the text


def _measure(counts: Sequence[_Counts], n_classes: int, binary: bool, level: float) -> tuple[list[Measure], np.ndarray]:
    """Precision, recall, F1 and kappa of the pooled matrix, and that matrix, [K, K].

    The first three are shares of units that are counted problem by problem, with `rate_interval`; F1 is that of true
    hits among the mean of both judges' counts.
    """
    by_problem: dict[str, np.ndarray] = {}
    for one in counts:
        by_problem[one.problem] = by_problem.get(one.problem, 0) + one.matrix
    stacked = np.array(list(by_problem.values()), float).reshape(len(by_problem), n_classes, n_classes)
    true, called = stacked.sum(2), stacked.sum(1)
    if binary:
        hits, true, called = stacked[:, 1, 1], true[:, 1], called[:, 1]
    else:
        hits, true, called = np.trace(stacked, axis1=1, axis2=2), true.sum(1), called.sum(1)
    shares = [
        Measure(float(hits.sum() / of.sum()) if of.any() else NAN, *rate_interval(hits, of, level=level))
        for of in (called, true, (true + called) / 2)
    ]
    return [*shares, _kappa(stacked, level)], stacked.sum(0).astype(np.int64)


def _kappa(matrices: np.ndarray, level: float) -> Measure:
    """Cohen's kappa of problems' matrices, [P, K, K], with its interval.

    1 - kappa is the share of units on which the judges differ over the share that chance would give. Its interval is
    that of a share (`share_interval`), in which the linearised deviation of the other share counts as well; so judges
    that never differ have one too.
    """
    pooled, n = matrices.sum(0), matrices.sum()
    rows, columns = pooled.sum(1), pooled.sum(0)
    chance = 1 - rows @ columns / n**2 if n else 0.0
    if chance <= 0:
        return Measure(NAN, NAN, NAN)
    units = matrices.sum((1, 2))
    differ = units - np.trace(matrices, axis1=1, axis2=2)
    share = differ.sum() / n
    by_chance = 2 * units * (1 - chance) - (matrices.sum(2) @ columns + matrices.sum(1) @ rows) / n
    residuals = differ - share * units - share / chance * by_chance
    low, high = share_interval(float(share), residuals, float(n), burst=min(2.0, units.max()), level=level)
    return Measure(float(1 - share / chance), float(1 - high / chance), float(1 - low / chance))


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


class AgreementAnalysis(Analysis):
    """Table C.1: the keyword judge against the labels of the run, and against `analysis.judge` on steered replies."""

    name = "agreement"
    version = 3  # other intervals
    reads = (judged.JUDGED.name,)
    tables = ("agreement",)

    def files(self, e: Experiment) -> list[str]:
        """The second table only where a judge reads replies."""
        return [*super().files(e), *([f"{_ON_REPLIES}.csv"] if e.analysis.judge else [])]

    def finish(self, material: Material, folder: Path) -> dict[str, Table]:
        """Labels by keyword, and compares."""
        labels = judged.read(material, folder)
        by_strength = {} if labels is None else {_ON_REPLIES: _on_replies(material, labels)}
        return {"agreement": _table(_on_traces(material))} | by_strength

    def reference(self, r: Results) -> dict[str, str]:
        """Precision, recall and F1 by strength; on the traces, where no judge read replies."""
        compared = [
            (f"at magnitude {line['group']}", line) for line in r.tables.get(_ON_REPLIES, []) if line["group"] != "all"
        ] or [("on the traces", line) for line in r.tables.get("agreement", []) if line["group"] == "all"]
        if not compared or r.label != PAPER_LABEL:
            return {}
        texts = [
            " / ".join(cells.percent(line[name]) for name in ("precision", "recall", "f1")) + f" {where}"
            for where, line in compared
        ]
        return {"judge": "; ".join(texts)}

    def claims(self, r: Results) -> Sequence[Claim]:
        """Table C.1, where a judge read replies at the paper's strengths."""
        lines = [line for line in r.tables.get(_ON_REPLIES, []) if str(line["group"]) in _PAPER_F1]
        comparable = r.label == PAPER_LABEL and r.experiment.steering.unit == "absolute"
        return [_table_c1(lines)] if lines and comparable else []


AGREEMENT = AgreementAnalysis()


def _table_c1(lines: Sequence[Mapping[str, Any]]) -> Claim:
    """F1 at each of the paper's strengths less the paper's; the claim is shown at the one that is furthest from it."""
    region, verdicts, texts = Region(-_WITHIN, _WITHIN), [], []
    apart = []
    for line in lines:
        paper = _PAPER_F1[str(line["group"])]
        n = line["n_problems"]
        (low, high), wider = ((line[f"f1_low_{level}"] - paper, line[f"f1_high_{level}"] - paper) for level in _LEVELS)
        found = verdict(low, high, region, n)
        if found == "fails":  # that one of four does; each may err in its share of the cases
            found = verdict(*wider, region, n)
        verdicts.append(found)
        apart.append((max(-low, high), line["f1"] - paper, low, high))
        texts.append(f"{line['group']}: {100 * line['f1']:.1f} % (paper {100 * paper:.1f} %)")
    _, value, low, high = max(apart)
    return measured(
        "table_c1",
        "The keyword judge agrees with the language model's labels as in the paper, at each strength.",
        figure="",
        where="Table C.1",
        rule=f"F1 within {100 * _WITHIN:g} points of the paper's at each strength that both have",
        estimate=100 * value,
        interval=(100 * low, 100 * high),
        unit="points of F1 above the paper's",
        region=Region(-100 * _WITHIN, 100 * _WITHIN),
        n=min(line["n_problems"] for line in lines),
        note=f"F1 by strength: {', '.join(texts)}",
        given=all_of(verdicts),
    )


def _on_traces(material: Material) -> list[Agreement]:
    """On the traces, where their labels are another judge's."""
    e, traces = material.experiment, material.traces
    if trace_judge(e) == keyword.JUDGE.name or e.vectors.label != PAPER_LABEL:
        return []
    found = agreement(traces, material.annotations, [annotate(trace) for trace in traces], unit="sentence")
    say(f"  keyword judge against the labels: F1 {100 * found[0].f1.value:.1f} %")
    return found


def _on_replies(material: Material, labels: Sequence[Annotation]) -> Table:
    """On replies of the model that writes the traces, unsteered and under its own vector at the experiment's layer.

    F1 has the intervals that decide the claim as well.
    """
    e = material.experiment
    own = (e.vectors.label, e.author, e.steering.main_layer, window_name(e.vectors.window))
    kept = []
    for number, reply in enumerate(material.replies):
        c = reply.condition
        if c.target == e.author and (c.kind == UNSTEERED or (c.kind, c.source, c.layer, c.window) == own):
            kept.append(number)
    traces, strengths = reply_traces(material.replies)
    traces = [traces[number] for number in kept]
    by_keyword = [annotate(trace) for trace in traces]

    def compared(level: float) -> list[Agreement]:
        by_judge = [labels[n] for n in kept]
        return agreement(traces, by_judge, by_keyword, unit="sentence", groups=strengths, level=level)

    table = _table(compared(0.95))
    for name, level in _LEVELS.items():
        for line, row in zip(table, compared(level), strict=True):
            line |= {f"f1_low_{name}": row.f1.low, f"f1_high_{name}": row.f1.high}
    return table


def _table(found: Sequence[Agreement]) -> Table:
    return [
        {name: getattr(row, name) for name in _COUNTED}
        | {
            f"{name}{suffix}": getattr(getattr(row, name), field)
            for name in ("precision", "recall", "f1", "kappa")
            for suffix, field in (("", "value"), ("_low", "low"), ("_high", "high"))
        }
        for row in found
    ]


def judges_table(r: Results) -> list[dict[str, str]]:
    """Table C.1 for the page, on traces and on replies, as far as there is another judge than the keywords."""
    rows = []
    for table, judge, where in (
        ("agreement", trace_judge(r.experiment), "traces"),
        (_ON_REPLIES, r.experiment.analysis.judge, "replies, by magnitude"),
    ):
        for line in r.tables.get(table, []):
            shown = {"judge": judge, "of": where}
            shown |= {name: str(line[name]) for name in ("group", "n_units", "n_reference")}
            for name, factor, digits in (("precision", 100, 0), ("recall", 100, 0), ("f1", 100, 0), ("kappa", 1, 2)):
                value, low, high = (f"{factor * line[name + end]:.{digits}f}" for end in ("", "_low", "_high"))
                shown[name] = f"{value} ({low} to {high})" if value != "nan" else "-"
            rows.append(shown)
    return rows


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
