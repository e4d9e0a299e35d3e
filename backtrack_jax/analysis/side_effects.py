"""What steering does beside backtracking: to the answers, to the length of replies, to every other token.

For the vectors of either model at all their magnitudes and the controls, on both models:

    accuracy       share of replies that end with the right answer, where it is known (`data.answers`)
    corrections    share that say wait or hmm and end with the right answer
    length         tokens of a reply, and the share that was cut at the limit
    divergence     KL from the unsteered model in nats per token, on the unsteered model's own replies (`divergence`)

{role}.side_effects_kl.csv  divergence of every problem under every condition
side_effects.csv            all measures of every condition, each with its difference from the unsteered model
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from backtrack_jax.analysis import cells, divergence, known, log_odds, resumable, statistics
from backtrack_jax.analysis.backtracking import count_keywords
from backtrack_jax.analysis.base import Material, Planned, Question, Wanted
from backtrack_jax.analysis.claims import Claim, measured
from backtrack_jax.analysis.dose import LEVEL
from backtrack_jax.analysis.forced import logits_at_once
from backtrack_jax.analysis.plots import COLOURS, MARKERS, Panel, Plot, Series
from backtrack_jax.analysis.results import Results, extent
from backtrack_jax.analysis.statistics import NAN, Region
from backtrack_jax.config import Experiment
from backtrack_jax.data.problems import spread
from backtrack_jax.data.records import UNSTEERED, Condition, Problem, Reply, window_name
from backtrack_jax.files import tables
from backtrack_jax.files.tables import Table
from backtrack_jax.models.config import ModelConfig

RANDOM = "random"
"""The control of the primary contrast: a random direction of the same length, another one in every reply."""

SHARES = ("right", "corrected", "cut")
"""Measures of a reply that are 0 or 1."""

Counts = Mapping[str, tuple[float, int]]
"""Problem -> sum over its replies, and how many there are."""


class SideEffects(Question):
    """Of the vectors and controls at `steering.layer`."""

    name = "side_effects"
    role_tables = ("side_effects_kl",)
    tables = ("side_effects",)

    def conditions(self, e: Experiment) -> Sequence[Wanted]:
        """The control at the magnitude of the primary contrast."""
        return [Wanted(role, RANDOM, (magnitude(e),)) for role in e.roles]

    def inputs(self, e: Experiment) -> dict[str, Any]:
        """Its settings, and what is known of the problems."""
        return super().inputs(e) | {"known": known.content(e)}

    def scratch(self, role: str) -> list[str]:
        """Finished rows, appended batch by batch."""
        return [f"{role}.side_effects_kl.jsonl"]

    def of_role(self, material: Material, role: str, folder: Path) -> dict[str, Table]:
        """The divergence: two passes over every text under every condition."""
        own = [reply for reply in material.replies if reply.condition.target == role]
        texts = [reply for reply in own if reply.condition.kind == UNSTEERED and reply.sample == 0 and reply.ids]
        texts = spread(texts, material.experiment.questions.side_effects.texts)
        rows = [
            (condition, reply)
            for condition in _measured(material.experiment, own)
            if condition.kind != UNSTEERED
            for reply in texts
        ]
        prompts = {reply.problem: material.prompt_ids(role, reply.problem) for reply in texts}
        found = resumable.values(
            folder / self.scratch(role)[0],
            "kl",
            f"  divergence of the steered {role} model",
            [len(prompts[reply.problem]) + len(reply.ids) for _, reply in rows],
            lambda done: divergence.kl_per_token(
                material.model(role),
                [prompts[reply.problem] for _, reply in rows],
                [reply.ids for _, reply in rows],
                [material.intervention(condition, reply.problem_id) for condition, reply in rows],
                batch_size=material.experiment.analysis.batch_size,
                done=done,
            ),
        )
        lines = [
            dataclasses.asdict(condition) | {"problem_id": reply.problem_id, "tokens": len(reply.ids), "kl": value}
            for (condition, reply), value in zip(rows, found, strict=True)
        ]
        return {"side_effects_kl": lines}

    def finish(self, material: Material, folder: Path) -> dict[str, Table]:
        """From the replies and the divergences."""
        e = material.experiment
        of_kl = {role: tables.read(folder / f"{role}.side_effects_kl.csv") for role in e.roles}
        facts = known.problems(e, material.replies)
        return {
            "side_effects": [line for role in e.roles for line in _table(e, material.replies, of_kl[role], facts, role)]
        }

    def plots(self, r: Results) -> Sequence[Plot | None]:
        """Every measure against magnitude."""
        return [plot(r)]

    def sentences(self, r: Results) -> Sequence[str]:
        """The primary contrast."""
        line, found = primary_cell(r), kl_contrast(r)
        if line is None:
            return []
        at = f"At magnitude {line['magnitude']:g}, the {line['source']}-derived vector"
        if line["n_known"]:
            return [
                f"{at} changes the share of right answers by {100 * line['right_change']:.1f} points "
                f"({100 * line['right_change_low']:.1f} to {100 * line['right_change_high']:.1f}, {line['n_known']} "
                f"problems)."
            ]
        if not len(found):
            return []
        low, high = log_odds.interval(found[:, 0] - found[:, 1])
        v, control = found.mean(0)
        return [
            f"{at} costs the {r.author} model {v:.3g} nats per token on its own replies, and a random direction of "
            f"equal length {control:.3g} (difference {v - control:.3g}, {low:.3g} to {high:.3g}, "
            f"{len(found)} problems)."
        ]

    def claims(self, r: Results) -> Sequence[Claim]:
        """That answers do not suffer; or, where none is known, that the vector disturbs no more than a random one."""
        line, found = primary_cell(r), kl_contrast(r)
        if line is None:
            return []
        if line["n_known"]:
            margin = r.experiment.questions.side_effects.margin
            return [
                measured(
                    "accuracy",
                    "Answers do not suffer from the vector.",
                    figure="side_effects",
                    where="-",
                    rule=f"share of right answers at magnitude {line['magnitude']:g} less the unsteered share, over "
                    f"the same problems, above -{100 * margin:g} points",
                    estimate=100 * line["right_change"],
                    interval=(100 * line["right_low_claim"], 100 * line["right_high_claim"]),
                    unit="points",
                    region=Region(low=-100 * margin),
                    n=line["n_known"],
                    note=f"unsteered {100 * line['right_unsteered']:.1f} %, steered {100 * line['right']:.1f} %",
                )
            ]
        if not len(found):
            return []
        difference = found[:, 0] - found[:, 1]
        return [
            measured(
                "disturbance",
                "The vector disturbs the model's own replies less than a random direction of equal length.",
                figure="side_effects",
                where="-",
                rule=f"divergence from the unsteered model at magnitude {line['magnitude']:g}, less that of a random "
                "direction in every text, below 0",
                estimate=float(difference.mean()),
                interval=log_odds.interval(difference, LEVEL),
                unit="nats per token",
                region=Region(high=0),
                n=len(difference),
                note="no answer is known",
            )
        ]

    def plan(self, planned: Planned) -> str:
        """Texts under the conditions, read twice."""
        e = planned.experiment
        texts = e.questions.side_effects.texts or e.steering.limit
        return f"divergence on at most {texts * planned.conditions:,} texts, read steered and unsteered"

    def memory(self, planned: Planned, config: ModelConfig) -> dict[str, int]:
        """The logits of some positions of a batch, of both."""
        e = planned.experiment
        n = logits_at_once(e.analysis.batch_size, config.vocab_size)
        return {"logits of the divergence": 4 * n // (e.data_parallel * e.model_parallel)}


SIDE_EFFECTS = SideEffects()


def magnitude(e: Experiment) -> float:
    """Of the primary contrast: the setting, else the largest of the sweep."""
    return e.questions.side_effects.magnitude or max(e.steering.magnitudes)


def _measured(e: Experiment, replies: Sequence[Reply]) -> list[Condition]:
    """Conditions at the layer and window that figures are about, in their order."""
    own, layer = ("", window_name(e.vectors.window)), e.steering.main_layer
    kinds = {UNSTEERED, RANDOM, *e.steering.all_kinds}
    every = dict.fromkeys(reply.condition for reply in replies)
    return [c for c in every if c.kind in kinds and c.layer == layer and c.window in own]


def _table(e: Experiment, replies: Sequence[Reply], of_kl: Table, facts: Mapping[str, Problem], role: str) -> Table:
    """A line per condition of a model."""
    own: dict[Condition, list[Reply]] = {}
    for reply in replies:
        if reply.condition.target == role:
            own.setdefault(reply.condition, []).append(reply)
    divergences: dict[Condition, dict[str, float]] = {}
    for line in of_kl:
        if np.isfinite(line["kl"]):
            divergences.setdefault(Condition.of(line), {})[line["problem_id"]] = line["kl"]
    plain = next((of for c, of in own.items() if c.kind == UNSTEERED), [])
    measures = {name: _sums(plain, name, facts, e.traces.end_marks) for name in (*SHARES, "tokens")}
    found: Table = []
    for condition in _measured(e, replies):
        if condition.target != role:
            continue
        members = own[condition]
        line = dataclasses.asdict(condition) | {"unit": e.steering.unit, "n_replies": len(members)}
        line |= {"n_problems": len({reply.problem_id for reply in members})}
        steered = {name: _sums(members, name, facts, e.traces.end_marks) for name in measures}
        line |= {"n_known": len(set(steered["right"]) & set(measures["right"]))}
        for name, sums in steered.items():
            line |= _change(name, sums, measures[name])
        values = np.array(list(divergences.get(condition, {}).values()))
        low, high = log_odds.interval(values) if len(values) else (NAN, NAN)
        kl = float(values.mean()) if len(values) else 0.0 if condition.kind == UNSTEERED else NAN
        found.append(line | {"kl": kl, "kl_low": low, "kl_high": high, "n_texts": len(values)})
    return found


def _sums(replies: Sequence[Reply], name: str, facts: Mapping[str, Problem], end_marks: tuple[str, ...]) -> Counts:
    """A measure of replies by problem; of answers, only of problems whose answer is known."""
    found: dict[str, tuple[float, int]] = {}
    for reply in replies:
        fact = facts.get(reply.problem_id)
        if name in ("right", "corrected") and not (fact and fact.answer):
            continue
        total, n = found.get(reply.problem_id, (0.0, 0))
        found[reply.problem_id] = total + _value(reply, name, fact.answer if fact else "", end_marks), n + 1
    return found


def _value(reply: Reply, name: str, answer: str, end_marks: tuple[str, ...]) -> float:
    if name == "tokens":
        return len(reply.ids)
    if name == "cut":
        return reply.finish_reason == "length"
    right = known.right(reply.text, reply.finish_reason, answer, end_marks)
    return right and (name == "right" or count_keywords(reply.text).hits > 0)


def _change(name: str, steered: Counts, plain: Counts) -> dict[str, float]:
    """A measure, the unsteered one and their difference over the problems that both have, with intervals."""
    problems = sorted(set(steered) & set(plain))
    columns = [name, f"{name}_unsteered"] + [f"{name}_change{end}" for end in ("", "_low", "_high")]
    of_claims = [f"{name}_low_claim", f"{name}_high_claim"] if name == "right" else []
    if not problems:
        return dict.fromkeys([*columns, *of_claims], NAN)
    both = np.array([[of[problem] for problem in problems] for of in (steered, plain)], float)
    sums, counts = both[..., 0], both[..., 1]
    value, before = sums.sum(1) / counts.sum(1)
    interval = statistics.paired_interval if name in SHARES else statistics.mean_interval
    ends = interval(sums, counts, [1, -1])
    line = dict(zip(columns, (value, before, value - before, *ends), strict=True))
    of_level = interval(sums, counts, [1, -1], level=LEVEL)
    return {key: float(number) for key, number in (line | dict(zip(of_claims, of_level, strict=False))).items()}


def primary_cell(r: Results) -> dict[str, Any] | None:
    """The run's vector on the model that writes the traces, at the magnitude of the primary contrast."""
    wanted = {"target": r.author, "kind": r.label, "source": r.roles[0], "magnitude": magnitude(r.experiment)}
    return next((x for x in r.tables["side_effects"] if all(x[name] == v for name, v in wanted.items())), None)


def kl_contrast(r: Results) -> np.ndarray:
    """[problems, 2] divergence under the run's vector and under random directions of equal length, nats per token."""
    at = {"target": r.author, "magnitude": magnitude(r.experiment)}
    lines = [x for x in r.tables["side_effects_kl"] if all(x[name] == value for name, value in at.items())]
    v, control = (
        {x["problem_id"]: x["kl"] for x in lines if (x["kind"], x["source"]) == cell and np.isfinite(x["kl"])}
        for cell in ((r.label, r.roles[0]), (RANDOM, ""))
    )
    return np.array([(v[name], control[name]) for name in v if name in control]).reshape(-1, 2)


def plot(r: Results) -> Plot | None:
    """Divergence, length and right answers of either model against magnitude."""
    lines = r.tables["side_effects"]
    shown = [
        ("kl", ("kl", "kl_low", "kl_high"), "KL per token, nats", 1),
        (
            "tokens_change",
            ("tokens_change", "tokens_change_low", "tokens_change_high"),
            "change of the length, tokens",
            1,
        ),
        (
            "right_change",
            ("right_change", "right_change_low", "right_change_high"),
            "change of right answers, points",
            100,
        ),
    ]
    panels = []
    for target in r.roles:
        row = []
        for name, columns, axis, factor in shown:
            own = [x for x in lines if x["target"] == target and x["kind"] != UNSTEERED and np.isfinite(x[name])]
            series = []
            for i, (kind, source) in enumerate(dict.fromkeys((x["kind"], x["source"]) for x in own)):
                points = sorted(
                    (x for x in own if (x["kind"], x["source"]) == (kind, source)), key=lambda x: x["magnitude"]
                )
                several = len({x["magnitude"] for x in points}) > 1
                series.append(
                    Series(
                        f"{kind} ({source}-derived)" if source else kind,
                        [x["magnitude"] for x in points],
                        *([factor * x[column] for x in points] for column in columns),
                        colour=COLOURS[i % len(COLOURS)],
                        style=("-", "--", ":")[i % 3] if several else "",
                        marker=MARKERS[i % len(MARKERS)],
                    )
                )
            if series:
                label = cells.unit_label(r, target, list(dict.fromkeys(x["kind"] for x in own)))
                row.append(Panel(f"{target} model", label, axis, series, level=0.0))
        if row:
            panels.append(row)
    if not panels:
        return None
    texts = extent([x for x in lines if x["kind"] != UNSTEERED], "n_texts")
    caption = (
        f"Divergence of the steered from the unsteered model on the unsteered model's own replies ({texts} problems), "
        f"and sampled replies against unsteered ones ({extent(lines, 'n_problems')} problems, answers known of "
        f"{extent(lines, 'n_known')}). Mean and 95 % interval over problems; {cells.setting(r)}."
    )
    return Plot("side_effects", "Side effects", caption, panels, lines, place=7.5)
