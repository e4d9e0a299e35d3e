"""Whether other directions contribute beside the vector, and whether they combine linearly with it.

Directions are the labels' vectors, as they are and orthogonalised, the difference of the two models' vectors, principal
components of what is read before the label's sections, and those of its differences between problems. Each is added at
one length; the one that does most without a part along the vector is added beside it on a grid; and while the vector is
added, the labels' own parts and their span are removed from all later layers. All of it is on given text.

{role}.composition_effects.csv  log-odds and share of keywords on each text under each direction
{role}.composition_grid.csv     the same of pairs of directions, on the texts that did not choose the pair
{role}.composition_ablated.csv  the same with the vector added and subspaces removed
composition.csv                 directions: cosine with the vector, effect, share of the vector's
composition_interaction.csv     index of interaction of the pair and of what it is compared with
composition_necessity.csv       what is left of the vector's effect without each subspace
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from backtrack_jax.analysis.base import Material, Planned, Question
from backtrack_jax.analysis.claims import Claim, measured, number
from backtrack_jax.analysis.composition_figure import plot
from backtrack_jax.analysis.composition_rows import (
    ALONE,
    APART,
    GRID,
    RANDOM,
    SPAN,
    Direction,
    Directions,
    ablated,
    effects,
    grid,
    magnitude,
)
from backtrack_jax.analysis.composition_tables import directions, interactions, necessity, of_cell, shares
from backtrack_jax.analysis.dose import LEVEL
from backtrack_jax.analysis.forced import logits_at_once
from backtrack_jax.analysis.plots import Plot
from backtrack_jax.analysis.results import Results
from backtrack_jax.analysis.statistics import Region
from backtrack_jax.files import tables
from backtrack_jax.files.tables import Table
from backtrack_jax.models.config import ModelConfig

LIMIT = 0.5
"""Share of the vector's effect that a second direction would have to reach, as the paper's controls."""


class Composition(Question):
    """On the model that writes the traces."""

    name = "composition"
    of_replies = False
    settings = (
        *("seed", "analysis.forced_texts", "analysis.forced_sentences", "steering.main_layer", "steering.unit"),
        *("steering.magnitudes", "steering.span"),
    )
    role_tables = ("composition_effects", "composition_grid", "composition_ablated")
    tables = ("composition", "composition_interaction", "composition_necessity")

    def scratch(self, role: str) -> list[str]:
        """Finished rows, appended batch by batch."""
        return [f"{role}.composition.{what}.jsonl" for what in ("effects", "grid", "ablated")]

    def of_role(self, material: Material, role: str, folder: Path) -> dict[str, Table]:
        """Reads given texts; nothing of the model that writes no traces."""
        if role != material.experiment.author:
            return {name: [] for name in self.role_tables}
        of_effects, of_grid, of_ablated = (folder / name for name in self.scratch(role))
        found = Directions(material, role)
        alone = effects(found, of_effects)
        problems = list(dict.fromkeys(line["problem_id"] for line in alone))
        chosen = choice(found, alone, problems[::2])
        return {
            "composition_effects": _with_cosines(found, alone),
            "composition_grid": [
                line | {"direction": chosen.name, "form": chosen.form}
                for line in grid(found, chosen, problems[1::2], of_grid)
            ]
            if chosen
            else [],
            "composition_ablated": ablated(found, of_ablated),
        }

    def finish(self, material: Material, folder: Path) -> dict[str, Table]:
        """From the tables of the model that writes the traces."""
        role, seed = material.experiment.author, material.experiment.seed
        alone, pairs, removed = (tables.read(folder / f"{role}.{name}.csv") for name in self.role_tables)
        return {
            "composition": directions(alone, material.experiment.vectors.label),
            "composition_interaction": interactions(pairs, seed),
            "composition_necessity": necessity(removed),
        }

    def plots(self, r: Results) -> Sequence[Plot | None]:
        """One figure."""
        return [plot(r)]

    def sentences(self, r: Results) -> Sequence[str]:
        """The strongest direction without a part along the vector, and whether it adds up with it."""
        line = strongest(r)
        if line is None:
            return []
        text = (
            f"At magnitude {magnitude(r.experiment):g}, of {len(_apart(r))} directions without a part along the "
            f"{r.label} vector the strongest ({line['direction']}, {line['form']}) has {line['share']:.2f} "
            f"({line['share_low']:.2f} to {line['share_high']:.2f}) of the vector's effect on the log-odds of wait or "
            f"hmm on given text ({line['problems']} problems)"
        )
        of = {(one["pair"], one["scale"]): one for one in r.tables["composition_interaction"]}
        if (pair := of.get(("direction", "log-odds"))) is not None and pair["problems"] > 1:
            text += (
                f"; together they do {pair['estimate']:.2f} nats more than the sum of both ({pair['low']:.2f} to "
                f"{pair['high']:.2f}; p = {pair['p_random']:.2g} among random directions, and p = "
                f"{pair['p_index']:.2g} against one weighted sum that explains the grid)"
            )
        return [f"{text}."]

    def claims(self, r: Results) -> Sequence[Claim]:
        """That no direction without a part along the vector does half as much."""
        line, label = strongest(r), r.label
        if line is None:
            return []
        own = of_cell(r.tables["composition_effects"], label, ALONE)
        others = [of_cell(r.tables["composition_effects"], one["direction"], one["form"]) for one in _apart(r)]
        region, each = Region(high=LIMIT), 1 - (1 - LEVEL) / len(others)
        inside = all(shares(other, own, LEVEL)[2] < LIMIT for other in others)
        beyond = any(shares(other, own, each)[1] > LIMIT for other in others)
        left = {one["removed"]: one for one in r.tables["composition_necessity"]}
        note = "; ".join(
            f"{name} removed from later layers leaves {number(one['left'])} of the vector's effect"
            for name, one in left.items()
            if name.startswith(SPAN)
        )
        return [
            measured(
                "second_direction",
                f"No direction without a part along the {label} vector does half as much as it, at equal length.",
                figure="composition",
                where=f"{line['direction']}, {line['form']}",
                rule=f"change of the log-odds under each such direction over that under the vector, below {LIMIT:g}; "
                "the number is of the highest; to fail, one has to lie above by an interval corrected for all",
                estimate=line["share"],
                interval=shares(of_cell(r.tables["composition_effects"], line["direction"], line["form"]), own, LEVEL)[
                    1:
                ],
                unit="of the vector's effect",
                region=region,
                n=line["problems"],
                note=note,
                given="holds" if inside else "fails" if beyond else "undecided",
            )
        ]

    def plan(self, planned: Planned) -> str:
        """Texts of the model that writes the traces."""
        e, q = planned.experiment, planned.experiment.questions.composition
        n = min(e.analysis.forced_texts, len(planned.trace_tokens))
        pairs = len(GRID) ** 2 + 5 + 2 * q.random
        removed = 2 * min(q.ablated_texts or n, n) * (10 + len(q.ranks) * (1 + q.subspaces))
        return (
            f"if it writes the traces, log-odds after at most {n * (32 + 6 * q.components):,} texts under directions, "
            f"{n // 2 * pairs:,} under pairs and {removed:,} without subspaces"
        )

    def memory(self, planned: Planned, config: ModelConfig) -> dict[str, int]:
        """Logits of some positions, and the subspaces that the rows of a batch hold for every layer."""
        e = planned.experiment
        devices, rows = e.data_parallel * e.model_parallel, e.analysis.batch_size
        rank = max(e.questions.composition.ranks, default=1)
        return {
            "logits under directions": 4 * logits_at_once(rows, config.vocab_size) // devices,
            "subspaces": 4 * rows * config.n_layers * rank * config.d_model // e.data_parallel,
        }


COMPOSITION = Composition()


def choice(found: Directions, alone: Table, problems: Sequence[str]) -> Direction | None:
    """The direction without a part along v that raises the log-odds most on some problems, or the one asked for.

    Raises:
      ValueError: there is no such direction as `questions.composition.pair` asks for.
    """
    asked = found.e.questions.composition.pair
    of = {f"{d.name}, {d.form}": d for d in found.of if d.form in APART and d.name != found.labels[0]}
    if asked:
        if asked not in of:
            accepted = " | ".join(of)
            raise ValueError(f"questions.composition.pair={asked!r} is not among the directions: {accepted}")
        return of[asked]
    here = [line for line in alone if line["problem_id"] in problems]
    effect = {name: np.mean(list(of_cell(here, d.name, d.form).values())) for name, d in of.items()}
    return of[max(effect, key=lambda name: effect[name])] if effect else None


def _with_cosines(found: Directions, alone: Table) -> Table:
    """The lines with `cosine` to v, and `length`, the share of the magnitude's."""
    of = {(d.name, d.form): (float(d.vector @ found.v), d.length) for d in found.of}
    blank = (math.nan, 0.0)
    return [
        line
        | dict(zip(("cosine", "length"), of.get((line["direction"], line["form"]), _random(line, blank)), strict=True))
        for line in alone
    ]


def _random(line: dict, blank: tuple[float, float]) -> tuple[float, float]:
    return (0.0, 1.0) if line["direction"] == RANDOM else blank


def _apart(r: Results) -> Table:
    """Directions without a part along v."""
    return [
        line
        for line in r.tables["composition"]
        if line["form"] in APART and line["direction"] != r.label and line["problems"]
    ]


def strongest(r: Results) -> dict | None:
    """The line of the one of them that does most."""
    lines = [line for line in _apart(r) if math.isfinite(line["share"])]
    return max(lines, key=lambda line: line["share"], default=None)
