"""Whether the best offset differs between groups of problems: by category, and by how difficult they are.

The vectors of Fig. 2 are added to the model that writes the traces, and the outcome is split by problem. Which offset
is best in a group of few problems is mostly luck (it was named right in .56 of simulated runs with 12 problems), so the
primary contrast is of two offsets that were set in advance:

    advantage of a problem = effect at `chosen` - effect at `reference`

and whether it differs between groups. An effect is the change of the log-odds of the keywords on the problem's own
trace; the change of the rate of sampled replies stands beside it. Groups of problems are by

    category, difficulty     as the problems have it; none where all have one
    length, backtracking     thirds by tokens of a trace, and by the share of its sections that have the run's label
    answer                   whether traces give the right one, where it is known

The last three are properties of traces: of other samples than the text that effects are measured on, for problems that
have several; else of that text itself, which the table says (`basis`).

offsets_curves.csv   effect in every group at every offset, by either measure
offsets_groups.csv   best offset and advantage of every group
offsets_tests.csv    whether the advantage differs between the groups
"""

from collections import defaultdict
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from backtrack_jax.analysis import cells, known, log_odds, replies, statistics
from backtrack_jax.analysis.base import Material, Question
from backtrack_jax.analysis.claims import Claim, measured
from backtrack_jax.analysis.dose import LEVEL
from backtrack_jax.analysis.forced import REASONING_TRACES
from backtrack_jax.analysis.plots import COLOURS, MARKERS, Panel, Plot, Series
from backtrack_jax.analysis.results import Results
from backtrack_jax.analysis.statistics import NAN, Region
from backtrack_jax.config import Experiment
from backtrack_jax.data.records import UNSTEERED, Condition, window_name
from backtrack_jax.files import tables
from backtrack_jax.files.tables import Table

ALL = "all"
GROUPINGS = ("category", "difficulty", "length", "backtracking", "answer")
"""How problems are divided."""

THIRDS = ("low", "middle", "high")
ORDER = {"length": THIRDS, "backtracking": THIRDS, "answer": ("right", "wrong")}
"""Groups from the easiest to the most difficult, where they are not numbers."""

OTHER_SAMPLES, SAME_TEXT, OF_PROBLEM = "other samples", "the same text", "the problem"
"""What a problem's group was taken from."""

FEWEST = 2
"""Problems that a group must have to be in a test."""

Groups = dict[str, dict[str, tuple[str, str]]]
"""Grouping -> problem -> (group, basis)."""


class OffsetsByGroup(Question):
    """Of the vectors of `steering.offsets`."""

    name = "offsets"
    reads = ("rates", "log_odds")
    tables = ("offsets_curves", "offsets_groups", "offsets_tests")

    def inputs(self, e: Experiment) -> dict[str, Any]:
        """Its settings, and what is known of the problems."""
        return super().inputs(e) | {"known": known.content(e)}

    def finish(self, material: Material, folder: Path) -> dict[str, Table]:
        """From the log-odds and the replies of the run."""
        e = material.experiment
        forced = tables.read(folder / f"{e.author}.log_odds.csv")
        changes = {
            offset: log_odds.changes(forced, e.author, REASONING_TRACES, **_cell(e, offset))
            for offset in e.steering.offsets
        }
        of_cell = replies.by_cell(tables.read(folder / "replies.csv"))
        groups = grouped(material, set.union(*map(set, changes.values())))
        of_groups = _groups(e, changes, groups)
        return {
            "offsets_curves": _curves(e, changes, of_cell, groups),
            "offsets_groups": of_groups,
            "offsets_tests": between_groups(_advantages(e, changes), groups),
        }

    def plots(self, r: Results) -> Sequence[Plot | None]:
        """Curves of every grouping."""
        return [plot(r)]

    def sentences(self, r: Results) -> Sequence[str]:
        """The primary contrast."""
        line = primary(r.tables["offsets_tests"])
        if line is None:
            return []
        q = r.experiment.questions.offsets
        return [
            f"On problems {_described(line, 'hardest')}, offset {q.chosen} gains {line['difference']:.2f} nats more "
            f"over offset {q.reference} than on problems {_described(line, 'easiest')} ({line['low']:.2f} to "
            f"{line['high']:.2f}, {line['n_problems']} problems)."
        ]

    def claims(self, r: Results) -> Sequence[Claim]:
        """That the advantage is larger for difficult problems."""
        line = primary(r.tables["offsets_tests"])
        if line is None:
            return []
        q = r.experiment.questions.offsets
        omnibus = "; ".join(
            f"{one['by']} p = {one['p_holm']:.2g} over {one['groups']} groups" for one in r.tables["offsets_tests"]
        )
        return [
            measured(
                "offset_by_difficulty",
                "The preset offset gains more over the other one on problems that are more difficult.",
                figure="offsets_by_group",
                where="-",
                rule=f"change of the log-odds at offset {q.chosen} less that at {q.reference}, on problems "
                f"{_described(line, 'hardest')} less on problems {_described(line, 'easiest')}, above 0",
                estimate=line["difference"],
                interval=(line["low_claim"], line["high_claim"]),
                unit="nats",
                region=Region(low=0),
                n=line["n_problems"],
                note=f"any difference between groups, after Holm: {omnibus}",
            )
        ]


OFFSETS_BY_GROUP = OffsetsByGroup()

_DESCRIBED = {"low": "with the shortest traces", "high": "with the longest traces"}


def _described(line: Mapping[str, Any], end: str) -> str:
    """The `hardest` or the `easiest` problems of the primary contrast, in words behind "problems"."""
    return f"of difficulty {line[end]}" if line["by"] == "difficulty" else _DESCRIBED[line[end]]


def magnitude(e: Experiment) -> float:
    """Of the vectors that are compared: the setting, else the smallest positive one at which offsets are swept."""
    swept = e.steering.grid_magnitudes or e.steering.magnitudes
    return e.questions.offsets.magnitude or min(m for m in swept if m > 0)


def _cell(e: Experiment, offset: int) -> dict[str, Any]:
    """Fields of the condition of an offset, as in tables."""
    return {
        "kind": e.vectors.label,
        "source": e.author,
        "layer": e.steering.main_layer,
        "window": window_name(e.vectors.window_at(offset)),
        "magnitude": magnitude(e),
    }


def grouped(material: Material, of: Container[str]) -> Groups:
    """The group of each of some problems in every grouping that has at least two groups of them."""
    e, of_problem = material.experiment, defaultdict(list)
    for trace in material.traces:
        if trace.problem_id in of:
            of_problem[trace.problem_id].append(trace)
    labels = {
        trace.id: [section.label == e.vectors.label for section in annotation.sections]
        for trace, annotation in material.pairs
    }
    facts = known.problems(e, material.traces)
    found: Groups = {name: {} for name in GROUPINGS}
    numbers: dict[str, dict[str, float]] = {"length": {}, "backtracking": {}}
    basis = {}
    for name, traces in of_problem.items():
        found["category"][name] = traces[0].category, OF_PROBLEM
        # The first trace is the text that the log-odds are measured on.
        others = traces[1:] or traces
        basis[name] = OTHER_SAMPLES if traces[1:] else SAME_TEXT
        numbers["length"][name] = float(np.mean([_length(material, trace) for trace in others]))
        if shares := [float(np.mean(labels[trace.id])) for trace in others if labels.get(trace.id)]:
            numbers["backtracking"][name] = float(np.mean(shares))
        fact = facts.get(name)
        if fact and fact.difficulty:
            found["difficulty"][name] = str(fact.difficulty), OF_PROBLEM
        if fact and fact.answer:
            right = [known.right(t.text, t.finish_reason, fact.answer, t.end_marks) for t in others]
            found["answer"][name] = "right" if 2 * sum(right) > len(right) else "wrong", basis[name]
    for by, values in numbers.items():
        found[by] = {name: (group, basis[name]) for name, group in thirds(values).items()}
    return {by: of_all for by, of_all in found.items() if len({group for group, _ in of_all.values()}) > 1}


def _length(material: Material, trace: Any) -> int:
    return len(material.tokenizer.encode(trace.text)) if trace.token_ids is None else len(trace.token_ids)


def thirds(values: Mapping[str, float]) -> dict[str, str]:
    """Problem -> its third by a number; equal numbers are in one third. None where all numbers are equal."""
    if len(set(values.values())) < 2:
        return {}
    first, second = np.quantile(list(values.values()), (1 / 3, 2 / 3))
    return {name: THIRDS[int(value > first) + int(value > second)] for name, value in values.items()}


def _members(groups: Groups) -> list[tuple[str, str, dict[str, str]]]:
    """(grouping, group, problem -> basis), after that of all problems."""
    found: list[tuple[str, str, dict[str, str]]] = []
    for by, of in groups.items():
        for group in ordered(by, {group for group, _ in of.values()}):
            found.append((by, group, {name: basis for name, (own, basis) in of.items() if own == group}))
    every = {name: OF_PROBLEM for of in groups.values() for name in of}
    return [(ALL, ALL, every), *found]


def ordered(by: str, groups: set[str]) -> list[str]:
    """The groups of a grouping, the easiest first where they have an order."""
    return [group for group in ORDER.get(by, ()) if group in groups] or sorted(
        groups, key=lambda group: (int(group), "") if group.isdecimal() else (0, group)
    )


def _advantages(e: Experiment, changes: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    """Problem -> effect at the chosen offset less that at the reference."""
    q = e.questions.offsets
    chosen, reference = changes[q.chosen], changes[q.reference]
    return {name: value - reference[name] for name, value in chosen.items() if name in reference}


def _curves(
    e: Experiment,
    changes: Mapping[int, Mapping[str, float]],
    of_cell: Mapping[Condition, Sequence[replies.Line]],
    groups: Groups,
) -> Table:
    """Effect of every group, offset and measure, with its interval over problems."""
    found: Table = []
    plain = next((c for c in of_cell if (c.target, c.kind) == (e.author, UNSTEERED)), None)
    sampled = {}
    for offset in e.steering.offsets:
        wanted = _cell(e, offset) | {"target": e.author}
        cell = next((c for c in of_cell if all(getattr(c, name) == value for name, value in wanted.items())), None)
        if cell and plain:
            sampled[offset] = replies.shared(of_cell, [cell, plain])
    for by, group, members in _members(groups):
        for offset in e.steering.offsets:
            head = {"by": by, "group": group, "offset": offset, "magnitude": magnitude(e)}
            values = np.array([value for name, value in changes[offset].items() if name in members])
            low, high = log_odds.interval(values)
            if len(values):
                effect = _effect(float(values.mean()), low, high, len(values))
                found.append(head | {"measure": "log_odds"} | effect)
            if offset in sampled:
                counts = sampled[offset]
                own = np.array([name in members for name in counts.problems], bool)
                hits, words = counts.hits[:, own], counts.words[:, own]
                total = words.sum(1)
                if total.all():
                    ends = statistics.paired_interval(hits, words, [1, -1])
                    rate = float(hits.sum(1) / total @ [1, -1])
                    found.append(head | {"measure": "rate"} | _effect(rate, *ends, int(own.sum())))
    return found


def _effect(value: float, low: float, high: float, n: int) -> dict[str, Any]:
    return {"effect": value, "low": low, "high": high, "n_problems": n}


def _groups(e: Experiment, changes: Mapping[int, Mapping[str, float]], groups: Groups) -> Table:
    """Best offset and advantage of every group."""
    advantages, offsets = _advantages(e, changes), list(e.steering.offsets)
    shared = set.intersection(*(set(of) for of in changes.values()))
    found: Table = []
    for by, group, members in _members(groups):
        own = np.array([value for name, value in advantages.items() if name in members])
        low, high = log_odds.interval(own)
        names = sorted(name for name in shared if name in members)
        values = np.array([[changes[offset][name] for name in names] for offset in offsets]).reshape(len(offsets), -1)
        bases = sorted({members[name] for name in advantages if name in members})
        found.append(
            {"by": by, "group": group, "basis": ", ".join(bases), "n_problems": len(own)}
            | {"advantage": float(own.mean()) if len(own) else NAN, "low": low, "high": high}
            | best(offsets, values, names, e.seed)
        )
    return found


def best(offsets: Sequence[int], values: np.ndarray, names: Sequence[str], seed: int) -> dict[str, Any]:
    """Which offset has the largest mean effect, how sure that is, and how large it is without the luck of the choice.

    Args:
      offsets: O of them.
      values: [O, P] effects of each problem.
      names: P problems.
      seed: of the bootstrap.

    Returns:
      `best`; `best_low` and `best_high`, the middle 95 % of the best of problems drawn anew, and `best_share`, how
      often it is the same; `held_out`, the effect at the offset that one half of the problems chooses, on the other
      half (`cells.halves`), with its interval. NaN with fewer than 2 problems in a half.
    """
    empty = dict.fromkeys(("best", "best_low", "best_high", "best_share", "held_out", "held_out_low", "held_out_high"))
    if len(names) < 4:
        return dict.fromkeys(empty, NAN)
    at = int(values.mean(1).argmax())
    drawn = statistics.resampled(lambda counts: (counts @ values.T).argmax(1), len(names), seed=seed)
    low, high = statistics.percentiles(np.asarray(offsets, float)[drawn])
    first, second = ([names.index(name) for name in half] for half in cells.halves(names))
    chosen = values[values[:, first].mean(1).argmax()][second]
    ends = log_odds.interval(chosen)
    return {
        **{"best": offsets[at], "best_low": low, "best_high": high, "best_share": float((drawn == at).mean())},
        **{"held_out": float(chosen.mean()), "held_out_low": ends[0], "held_out_high": ends[1]},
    }


def between_groups(advantages: Mapping[str, float], groups: Groups) -> Table:
    """Whether the advantage differs between the groups of each grouping.

    Returns:
      A line per grouping: `groups`, `n_problems` of the two outer ones; `p_value` of equal means by Alexander and
      Govern (1994), which allows unequal variances, and `p_holm` after Holm's correction over the groupings;
      `hardest` and `easiest` group, and of ordered groupings their `difference` with Welch's interval of 95 % (`low`,
      `high`) and of the level of claims. NaN where groups have no order, or fewer than `FEWEST` problems.
    """
    found: Table = []
    for by, of in groups.items():
        samples: dict[str, list[float]] = defaultdict(list)
        for name, value in advantages.items():
            if name in of:
                samples[of[name][0]].append(value)
        names = [group for group in ordered(by, set(samples)) if len(samples[group]) >= FEWEST]
        line = {"by": by, "groups": len(names), "easiest": "", "hardest": "", "n_problems": 0, "p_value": NAN}
        line |= dict.fromkeys(("p_holm", "difference", "low", "high", "low_claim", "high_claim"), NAN)
        varies = [group for group in names if np.ptp(samples[group]) > 0]
        if len(names) > 1 and varies == names:
            line["p_value"] = float(stats.alexandergovern(*(samples[group] for group in names)).pvalue)
        if by != "category" and len(names) > 1:
            easy, hard = samples[names[0]], samples[names[-1]]
            line |= {"easiest": names[0], "hardest": names[-1], "n_problems": len(easy) + len(hard)}
            line["difference"] = float(np.mean(hard) - np.mean(easy))
            if varies == names:
                welch = stats.ttest_ind(hard, easy, equal_var=False)
                for level, ends in ((0.95, ("low", "high")), (LEVEL, ("low_claim", "high_claim"))):
                    between = welch.confidence_interval(level)
                    line |= {ends[0]: float(between.low), ends[1]: float(between.high)}
        found.append(line)
    defined = [line for line in found if np.isfinite(line["p_value"])]
    highest = 0.0
    for rank, line in enumerate(sorted(defined, key=lambda line: line["p_value"])):
        highest = max(highest, min(1.0, (len(defined) - rank) * line["p_value"]))
        line["p_holm"] = highest
    return found


def primary(lines: Table) -> dict[str, Any] | None:
    """The line of the primary contrast: difficulty where the problems have one, else length of the trace."""
    by = {line["by"]: line for line in lines}
    line = by.get("difficulty") or by.get("length")
    return line if line and line["n_problems"] else None


def plot(r: Results) -> Plot | None:
    """Change of the log-odds, and of the rate, against the offset, a line per group."""
    lines = r.tables["offsets_curves"]
    if not lines:
        return None
    q, panels = r.experiment.questions.offsets, []
    for by in dict.fromkeys(line["by"] for line in lines if line["by"] != ALL):
        row = []
        for measure, axis, factor in (("log_odds", log_odds.AXIS, 1), ("rate", "change of the rate, % of words", 100)):
            own = [line for line in lines if line["by"] == by and line["measure"] == measure]
            series = []
            for i, group in enumerate(dict.fromkeys(line["group"] for line in own)):
                points = sorted((line for line in own if line["group"] == group), key=lambda line: line["offset"])
                shift = 0.15 * i
                series.append(
                    Series(
                        f"{by}: {group} ({max(line['n_problems'] for line in own if line['group'] == group)})",
                        [line["offset"] + shift for line in points],
                        *([factor * line[name] for line in points] for name in ("effect", "low", "high")),
                        colour=COLOURS[i % len(COLOURS)],
                        style=("-", "--", ":")[i % 3],
                        marker=MARKERS[i % len(MARKERS)],
                    )
                )
            if series:
                row.append(Panel(f"by {by}", "offset from the section's first token", axis, series, level=0.0))
        panels.append(row)
    caption = (
        f"Change under the vector of each offset at magnitude {lines[0]['magnitude']:g}, from the unsteered model, in "
        "groups of problems (number in parentheses): log-odds of wait or hmm at sentence starts of given traces, and "
        "rate of sampled replies. Mean and 95 % interval over problems. The primary contrast is of offsets "
        f"{q.chosen} and {q.reference}, which were set in advance; {cells.setting(r)}."
    )
    return Plot("offsets_by_group", "Offsets by group of problems", caption, panels, lines, place=7.4)
