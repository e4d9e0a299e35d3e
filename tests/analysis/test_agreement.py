"""Agreement of judges against scikit-learn, its intervals, and the sheets for people."""

import csv
import dataclasses
import math
import random
import re
import types
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import tiny
from scipy import stats
from sklearn.metrics import accuracy_score, cohen_kappa_score, f1_score, precision_score, recall_score

from backtrack_jax.analysis.agreement import (
    SHEET_COLUMNS,
    _on_replies,
    agreement,
    export_for_human,
    format_agreement,
    main,
    read_human,
)
from backtrack_jax.data.annotations import align
from backtrack_jax.data.records import (
    LABELS,
    UNSTEERED,
    Annotation,
    Condition,
    Rejection,
    Reply,
    Section,
    Trace,
    pair_annotations,
    read_released,
)
from backtrack_jax.data.text import split_sentences, split_words
from backtrack_jax.judges.keyword import annotate

NAMES = ("deduction", "backtracking", "example-testing")


def make_trace(number: int, rng: random.Random, problem: str = "") -> Trace:
    text = " ".join(
        rng.choice(["So it is.", "Wait, no!", "Hmm, why?", "It\nholds."]) for _ in range(rng.randint(4, 12))
    )
    problem = problem or f"p{number}"
    return Trace(f"{problem}/{number}", problem, "ab"[number % 2], "Is it?", text, number)


def make_judge(traces: list[Trace], rng: random.Random, name: str, gaps: float = 0.0) -> list[Annotation]:
    """Sections between random words; some of the text stays without a label."""
    annotations = []
    for trace in traces:
        starts = [match.start() for match in re.finditer(r"\S+", trace.text)]
        cuts = [0, *sorted(rng.sample(starts[1:], min(len(starts) - 1, rng.randint(1, 6)))), len(trace.text)]
        sections = tuple(
            Section(rng.choice(NAMES), start, len(trace.text[:stop].rstrip()))
            for start, stop in pairwise(cuts)
            if rng.random() >= gaps
        )
        annotations.append(Annotation(trace.id, name, sections))
    pair_annotations(traces, annotations)
    return annotations


def letters(annotation: Annotation, length: int) -> list[str]:
    """The label of every character, another way to say what is labelled how."""
    labels = [""] * length
    for section in annotation.sections:
        labels[section.start : section.stop] = [section.label] * (section.stop - section.start)
    return labels


def unit_labels(traces, reference, other, unit, label):
    """Labels of both judges for all units, from labels of characters; and how many units have none."""
    first, second, left_out = [], [], 0
    for trace, a, b in zip(traces, reference, other, strict=True):
        spans = split_sentences(trace.text) if unit == "sentence" else [(s.start, s.stop) for s in a.sections]
        for start, stop in spans:
            of_unit = []
            for annotation in (a, b):
                inside = [name for name in letters(annotation, len(trace.text))[start:stop] if name]
                if label is None:
                    of_unit.append(max(dict.fromkeys(inside), key=inside.count) if inside else None)
                else:
                    of_unit.append(label in inside if inside else None)
            if None in of_unit:
                left_out += 1
            else:
                first.append(of_unit[0])
                second.append(of_unit[1])
    return first, second, left_out


@pytest.fixture(scope="module")
def judged():
    rng = random.Random(0)
    traces = [make_trace(number, rng) for number in range(60)]
    return traces, make_judge(traces, rng, "a", 0.1), make_judge(traces, rng, "b", 0.2)


@pytest.mark.parametrize("label", ["backtracking", "deduction", None])
@pytest.mark.parametrize("unit", ["section", "sentence"])
def test_the_measures_are_those_of_scikit_learn(judged, unit, label):
    traces, reference, other = judged
    row = agreement(traces, reference, other, unit=unit, label=label)[0]
    true, called, left_out = unit_labels(traces, reference, other, unit, label)
    assert (row.n_units, row.left_out_units, row.left_out_traces) == (len(true), left_out, 0) and left_out > 0
    assert row.kappa.value == pytest.approx(cohen_kappa_score(true, called), abs=1e-12)
    if label is None:
        share = accuracy_score(true, called)
        assert [row.precision.value, row.recall.value, row.f1.value] == pytest.approx([share] * 3)
        assert (row.label, row.n_reference, row.n_other) == ("any", len(true), len(true))
    else:
        assert row.precision.value == pytest.approx(precision_score(true, called))
        assert row.recall.value == pytest.approx(recall_score(true, called))
        assert row.f1.value == pytest.approx(f1_score(true, called))
        assert (row.label, row.n_reference, row.n_other) == (label, sum(true), sum(called))


def test_groups_are_compared_as_if_they_were_alone(judged):
    traces, reference, other = judged
    strengths = {trace.id: str(number % 3) for number, trace in enumerate(traces) if number % 4}
    rows = agreement(traces, reference, other, groups=strengths)
    assert [row.group for row in rows] == ["all", "1", "2", "0"]
    assert rows[0] == agreement(traces, reference, other)[0]
    for row in rows[1:]:
        ids = {trace for trace, strength in strengths.items() if strength == row.group}
        chosen = [[one for one in many if getattr(one, "trace_id", None) in ids] for many in (reference, other)]
        alone = agreement([trace for trace in traces if trace.id in ids], *chosen)[0]
        assert (row.n_traces, row.precision, row.kappa) == (len(ids), alone.precision, alone.kappa)


def test_traces_that_a_judge_failed_on_are_left_out_and_counted(judged):
    traces, reference, other = judged
    failed = Annotation(traces[0].id, "b", (), (Rejection("judge_failed:empty_reply", "", ""),))
    rows = [
        agreement(traces, reference, [failed, *other[1:]]),
        agreement(traces, [failed, *reference[1:]], other),
        agreement(traces, reference, other[1:]),
    ]
    rest = agreement(traces[1:], reference[1:], other[1:])[0]
    for (row,) in rows:
        assert (row.n_traces, row.left_out_traces) == (59, 1)
        assert (row.precision, row.recall, row.kappa, row.n_units) == (
            rest.precision,
            rest.recall,
            rest.kappa,
            rest.n_units,
        )


def test_a_judge_agrees_with_itself(judged):
    traces, reference, _ = judged
    for unit in ("section", "sentence"):
        for label in ("backtracking", None):
            row = agreement(traces, reference, reference, unit=unit, label=label)[0]
            for measure in (row.precision, row.recall, row.f1, row.kappa):
                assert measure.value == measure.high == 1 and 0.5 < measure.low < 0.99  # which is not certain


def test_what_has_no_denominator_is_nan():
    rng = random.Random(1)
    traces = [make_trace(number, rng) for number in range(4)]
    plain = [Annotation(t.id, "a", (Section("deduction", 0, len(t.text)),)) for t in traces]
    row = agreement(traces, plain, plain)[0]
    assert all(math.isnan(number) for measure in (row.precision, row.recall, row.f1, row.kappa) for number in measure)
    empty = agreement(traces, [], plain)[0]
    assert (empty.n_traces, empty.n_units, empty.left_out_traces) == (0, 0, 4) and math.isnan(empty.f1.value)
    assert "nan" in format_agreement([row, empty])
    alone = agreement(traces[:1], plain[:1], plain[:1], label=None)[0]
    assert alone.f1.value == 1.0 and alone.f1.low < 0.05  # one problem says next to nothing


def effective_interval(
    share: float, deviations: list[float], n: float, level: float, most: float = math.inf
) -> tuple[float, float]:
    """Clopper and Pearson's, at the size at which a share has the variance of these deviations and of a burst more."""
    problems = len(deviations)
    effect = (np.var(deviations, ddof=1) * problems + 4) / (n * share * (1 - share) + 2)
    size = n / effect * (stats.t.ppf(level / 2 + 0.5, n - 1) / stats.t.ppf(level / 2 + 0.5, problems - 1)) ** 2
    size, tail = min(most, size), (1 - level) / 2
    low = float(stats.beta.ppf(tail, size * share, size * (1 - share) + 1))
    return low, float(stats.beta.isf(tail, size * share + 1, size * (1 - share)))


def test_intervals_are_those_of_problems_one_by_one():
    rng = random.Random(2)
    traces = [make_trace(number, rng, f"p{number // 3}") for number in range(24)]  # three traces of each problem
    reference, other = make_judge(traces, rng, "a"), make_judge(traces, rng, "b")
    row = agreement(traces, reference, other, unit="sentence", level=0.9)[0]
    assert (row.n_problems, row.n_traces) == (8, 24)
    of_problem = []
    for i in range(0, 24, 3):
        part = slice(i, i + 3)
        true, called, _ = unit_labels(traces[part], reference[part], other[part], "sentence", "backtracking")
        of_problem.append([list(zip(true, called, strict=True)).count((t, c)) for t in (1, 0) for c in (1, 0)])

    def kappa(counts: np.ndarray) -> float:
        tp, fn, fp, tn = counts
        n = counts.sum()
        by_chance = ((tp + fn) * (tp + fp) + (fp + tn) * (fn + tn)) / n**2
        return ((tp + tn) / n - by_chance) / (1 - by_chance)

    counts = np.array(of_problem, float)
    total = counts.sum(0)
    for measure, above, below in (
        (row.precision, [1, 0, 0, 0], [1, 0, 1, 0]),
        (row.recall, [1, 0, 0, 0], [1, 1, 0, 0]),
        (row.f1, [1, 0, 0, 0], [1, 0.5, 0.5, 0]),
    ):
        share = total @ above / (total @ below)
        assert measure.value == pytest.approx(share)
        n = total @ below
        ends = effective_interval(share, list(counts @ above - share * (counts @ below)), n, 0.9, most=n)
        assert (measure.low, measure.high) == pytest.approx(ends)
    # Kappa's deviation of a problem, by numerical differences in how much the problem counts.
    n, step = total.sum(), 1e-6
    slopes = [(kappa(total + step * of) - kappa(total - step * of)) / (2 * step) for of in counts]
    differ = (total[1] + total[2]) / n
    chance = differ / (1 - kappa(total))
    low, high = effective_interval(differ, [-slope * chance * n for slope in slopes], n, 0.9)
    assert row.kappa == pytest.approx((kappa(total), 1 - high / chance, 1 - low / chance), rel=1e-5)


def test_an_unknown_unit_names_the_accepted_ones(judged):
    with pytest.raises(ValueError, match=r"unknown unit 'word'.*accepted: section, sentence"):
        agreement(*judged, unit="word")


def test_the_table_shows_percents_and_what_was_left_out(judged):
    traces, reference, other = judged
    rows = agreement(traces, reference, other[1:], groups={trace.id: trace.category for trace in traces})
    table = format_agreement(rows).split("\n")
    assert re.search(r"precision %.*recall %.*F1 %.*kappa", table[0])
    value, low, high = (100 * number for number in rows[0].precision)
    assert f"{value:.1f} [{low:.1f}, {high:.1f}]" in table[1] and table[1].split()[:3] == [
        "section",
        "backtracking",
        "all",
    ]
    assert table[2].split() == ["left", "out:", str(rows[0].left_out_units), "units,", "1", "traces"]
    assert [line.split()[2] for line in table[1:] if "left out" not in line] == ["all", "a", "b"]


# Sheets.

TRICKY = Trace(
    "1/2",
    "1",
    "=cmd",
    "+1, or\n-1?",
    '=1+1 holds. - a point\n"Quoted", so; it \ud83d is. @home? Wait.\n</think>\n\nNo.',
)
PLAIN = Trace("2/0", "2", "c", "Why?", "Okay. So it is.")


def read_sheet(path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def write_sheet(path, rows, delimiter=",", newline="\r\n") -> None:
    with open(path, "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, SHEET_COLUMNS, delimiter=delimiter, lineterminator=newline)
        writer.writeheader()
        writer.writerows(rows)


def test_a_sheet_shows_the_sentences_and_no_judge(tmp_path):
    path = tmp_path / "sheets" / "human.csv"
    export_for_human(path, [TRICKY, PLAIN])
    rows = read_sheet(path)
    assert tuple(rows[0]) == SHEET_COLUMNS
    assert path.read_bytes().startswith(b"\xef\xbb\xbf")
    assert [row["text"] for row in rows] == [
        "'=1+1 holds.",
        "'- a point",
        '"Quoted", so; it ? is.',
        "'@home?",
        "Wait.",
        "Okay.",
        "So it is.",
    ]
    assert [row["problem"] for row in rows if row["problem"]] == ["'+1, or\n-1?", "Why?"]
    assert {row["label"] for row in rows} == {""} and rows[0]["category"] == "'=cmd"
    for cell in (cell for row in rows for cell in row.values()):
        assert not cell.startswith(("=", "+", "-", "@"))


@pytest.mark.parametrize("delimiter", [",", ";"])
def test_a_labelled_sheet_comes_back_as_annotations(tmp_path, delimiter):
    path = tmp_path / "human.csv"
    export_for_human(path, [TRICKY, PLAIN])
    rows = read_sheet(path)
    for row, label in zip(rows, ["Deduction ", "", "uncertainty-estimation", "", "backtracking", "", ""], strict=True):
        # What a spreadsheet does: dates for ids, other spaces in texts.
        row |= {"label": label, "trace_id": "01. Feb", "text": row["text"].replace("\n", " ")}
    random.Random(0).shuffle(rows)
    write_sheet(path, rows, delimiter)
    (annotation,) = read_human(path, [PLAIN, TRICKY], judge="human:ada")
    assert (annotation.trace_id, annotation.judge) == ("1/2", "human:ada")
    pair_annotations([TRICKY], [annotation])
    assert [(s.label, TRICKY.text[s.start : s.stop]) for s in annotation.sections] == [
        ("deduction", "=1+1 holds."),
        ("uncertainty-estimation", '"Quoted", so; it \ud83d is.'),
        ("backtracking", "Wait."),
    ]


def test_some_traces_are_drawn_by_seed(tmp_path):
    rng = random.Random(3)
    traces = [make_trace(number, rng) for number in range(30)]

    def drawn(**options) -> list[str]:
        export_for_human(tmp_path / "human.csv", traces, **options)
        return list(dict.fromkeys(row["trace_id"] for row in read_sheet(tmp_path / "human.csv")))

    assert drawn() == [trace.id for trace in traces]
    assert len(drawn(n_traces=5)) == 5 and drawn(n_traces=5, seed=1) == drawn(n_traces=5, seed=1)
    assert drawn(n_traces=5, seed=1) != drawn(n_traces=5, seed=2)
    with pytest.raises(ValueError, match="n_traces 31 is more than the 30 traces"):
        drawn(n_traces=31)


def change(row: dict[str, str], **changes: str) -> dict[str, str]:
    return row | {"label": "deduction"} | changes


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda rows: [change(rows[0], label="wait")],
            r"human.csv, row 2: unknown label 'wait'; accepted: initializing, ",
        ),
        (lambda rows: [rows[0], change(rows[1], key="t0")], r"row 3: key 't0' belongs to none of the 1 traces"),
        (
            lambda rows: [change(rows[0], start="1")],
            r"row 2: \[1, 5\) is not a sentence of trace '2/0'; restore the row",
        ),
        (lambda rows: [change(rows[0], stop="5,0")], r"row 2: \[0, 5,0\) is not a sentence"),
        (lambda rows: [change(rows[0]), change(rows[0])], r"row 3: the sentence \(0, 5\) of trace '2/0' occurs more"),
        (lambda rows: rows, r"human.csv: no row has a label"),
    ],
)
def test_a_sheet_that_was_damaged_is_refused_by_row(tmp_path, edit, message):
    path = tmp_path / "human.csv"
    export_for_human(path, [PLAIN])
    write_sheet(path, edit(read_sheet(path)))
    with pytest.raises(ValueError, match=message):
        read_human(path, [PLAIN])


def test_a_sheet_of_another_shape_or_text_is_refused(tmp_path):
    path = tmp_path / "human.csv"
    path.write_text("key,start,stop\nt0,1,2\n")
    with pytest.raises(ValueError, match=r"column 'label' is missing; expected: key, trace_id"):
        read_human(path, [PLAIN])
    with pytest.raises(FileNotFoundError):
        read_human(tmp_path / "none.csv", [PLAIN])
    path.write_bytes("key,start,stop,label,text\nt0,1,2,deduction,caf\u00e9\n".encode("cp1252"))
    with pytest.raises(ValueError, match=r"human.csv: not UTF-8 text .*save the sheet as CSV UTF-8"):
        read_human(path, [PLAIN])
    export_for_human(path, [PLAIN])
    key = read_sheet(path)[0]["key"]
    path.write_text(f"label,key,start,stop\ndeduction,{key}\n")
    with pytest.raises(ValueError, match=r"row 2: \[, \) is not a sentence of trace '2/0'"):
        read_human(path, [PLAIN])
    path.write_text("label,key,start,stop\ndeduction\n")
    with pytest.raises(ValueError, match="row 2: key '' belongs to none"):
        read_human(path, [PLAIN])
    export_for_human(path, [PLAIN])
    write_sheet(path, [change(row) for row in read_sheet(path)])
    newer = Trace(PLAIN.id, "2", "c", "Why?", "Okay. So it was.")
    with pytest.raises(ValueError, match="or to an older text"):
        read_human(path, [newer])


# The released labels of GPT-4o.


@pytest.fixture(scope="module")
def released(ward2025):
    traces, annotated = read_released(ward2025)
    return traces, [align(trace, text) for trace, text in zip(traces, annotated, strict=True)]


def test_the_keyword_judge_against_the_released_labels(released):
    """Over the 1,000 chains of ten categories the paper's data give precision 22.9 %, recall 64.5 % by section."""
    traces, reference = released
    keyword = [annotate(trace) for trace in traces]
    row = agreement(traces, reference, keyword, groups={trace.id: trace.category for trace in traces})
    assert [one.group for one in row] == ["all", "math_logic", "probability", "spatial"]
    assert (row[0].n_units, row[0].n_reference, row[0].left_out_units, row[0].left_out_traces) == (5528, 241, 0, 0)
    assert row[0].recall.low < 0.645 < row[0].recall.high
    # Independently: sections whose own text holds a keyword. A sentence that crosses sections is the only difference.
    hits = called = 0
    for trace, annotation in zip(traces, reference, strict=True):
        for section in annotation.sections:
            found = bool({"wait", "hmm"} & set(split_words(trace.text[section.start : section.stop])))
            called += found
            hits += found and section.label == "backtracking"
    assert (hits, called) == (159, 846)
    assert row[0].recall.value == hits / 241
    assert row[0].precision.value == pytest.approx(hits / called, abs=0.003)
    sentences = agreement(traces, reference, keyword, unit="sentence")[0]
    assert (sentences.n_units, sentences.left_out_units) == (8127, 231)
    assert (sentences.precision.value, sentences.recall.value) == pytest.approx((0.190, 0.549), abs=5e-4)


def test_a_person_who_copies_gpt_4o_agrees_with_it(released, tmp_path):
    traces, reference = (many[:20] for many in released)
    path = tmp_path / "human.csv"
    export_for_human(path, traces)
    rows = read_sheet(path)
    by_id = {annotation.trace_id: annotation for annotation in reference}
    for row in rows:
        inside = by_id[row["trace_id"]].sections
        start = int(row["start"])
        row["label"] = next((section.label for section in inside if section.start <= start < section.stop), "")
    write_sheet(path, rows)
    human = read_human(path, traces)
    row = agreement(traces, reference, human, unit="sentence", label=None)[0]
    assert row.f1.value > 0.99 and row.kappa.value > 0.99
    assert {section.label for annotation in human for section in annotation.sections} == set(LABELS)


def test_the_command_prints_the_table(ward2025, capsys):
    main([f"--released={ward2025}"])
    table = capsys.readouterr().out
    assert re.search(r"section +backtracking +all +5528 +241 +857 +18\.6 \[", table)
    assert re.search(r"sentence +backtracking +spatial +2610 ", table)


def test_replies_that_are_compared_are_unsteered_or_under_the_runs_own_vector() -> None:
    """By strength, on the model that writes the traces; not those of another layer, window, kind, source or model."""
    e = tiny.get_config()
    own = Condition("reasoning", "backtracking", "reasoning", 1, "-5..-2", 4.0, 4.0)
    others: tuple[dict[str, Any], ...] = (
        {"layer": 2},
        {"window": "0..0"},
        {"kind": "deduction"},
        {"source": "base"},
        {"target": "base"},
    )
    rng = random.Random(0)
    replies, labels = [], []
    expected: dict[str, tuple[list[bool], list[bool]]] = {}
    for number in range(40):
        condition = own if number % 3 else dataclasses.replace(own, magnitude=8.0)
        condition = Condition("reasoning", UNSTEERED, "", 1, "", 0.0, 0.0) if number % 5 == 0 else condition
        counts = number % 2 == 0
        if not counts:
            condition = dataclasses.replace(own, **others[number // 2 % len(others)])
        sentences = [rng.choice(["So it is.", "Wait, no!", "Hmm, why?"]) for _ in range(rng.randint(3, 6))]
        text = " ".join(sentences)
        reply = Reply(f"p{number}", "c", "Is it?", 0, "m", condition, "absolute", "all", "", 0, (1,), text, "stop")
        spans = split_sentences(text)
        judged = [rng.random() < (0.8 if sentence != "So it is." else 0.3) for sentence in sentences]
        sections = [
            Section("backtracking" if yes else "deduction", *span) for yes, span in zip(judged, spans, strict=True)
        ]
        labels.append(Annotation(reply.trace(number).id, "judge", tuple(sections)))
        replies.append(reply)
        if counts:
            for group in ("all", f"{condition.magnitude:g}"):
                true, called = expected.setdefault(group, ([], []))
                true += judged
                called += [sentence != "So it is." for sentence in sentences]
    table = _on_replies(types.SimpleNamespace(experiment=e, replies=replies), labels)  # type: ignore[arg-type]
    assert {line["group"] for line in table} == set(expected) == {"all", "0", "4", "8"}
    for line in table:
        true, called = expected[line["group"]]
        assert (line["n_units"], line["n_reference"]) == (len(true), sum(true))
        assert line["precision"] == pytest.approx(precision_score(true, called))
        assert line["recall"] == pytest.approx(recall_score(true, called))
        assert line["f1_low_of_four"] <= line["f1_low"] <= line["f1_low_decides"] < line["f1"]
        assert line["f1"] < line["f1_high_decides"] <= line["f1_high"] <= line["f1_high_of_four"]
