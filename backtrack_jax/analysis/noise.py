"""Why Gaussian noise raises backtracking: its component along the vector, what it does downstream, mistakes, entropy.

Each explanation has rows of its own, on the same given texts: noise without its component along the vector or the
labels' span, and inside of subspaces, at one norm; what it moves along the vector in later layers, and what of its
effect passes through that; a burst of noise, noise in the prompt, and the text that was written under noise read
without it; and a temperature that makes the next token as uncertain.

{role}.noise_log_odds.csv     log-odds and entropy of each text under each row
{role}.noise_shift.csv        components along each later layer's vector, less those without noise
{role}.noise_slopes.csv       sums of which slopes over the draws of a text's noise are made
{role}.noise_mediation.csv    log-odds of runs whose later components are those of another run
{role}.noise_temperature.csv  each text at the temperature that matches the entropy under noise
noise_effects.csv             effect of each row
noise_contrasts.csv           what tells the explanations apart, with p
noise_hazard.csv              chance of the first keyword behind a burst
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from backtrack_jax.analysis import statistics
from backtrack_jax.analysis.base import Material, Planned, Question, Wanted
from backtrack_jax.analysis.claims import Claim, measured, number
from backtrack_jax.analysis.dose import LEVEL
from backtrack_jax.analysis.forced import logits_at_once
from backtrack_jax.analysis.log_odds import interval
from backtrack_jax.analysis.noise_contrasts import contrasts, downstream, effects, hazard, less, of_kinds, share_of
from backtrack_jax.analysis.noise_figure import plot
from backtrack_jax.analysis.noise_rows import (
    NOISE,
    PROMPT,
    VECTOR,
    Rows,
    burst,
    magnitude,
    mediation,
    primary,
    tempered,
)
from backtrack_jax.analysis.noise_rows import measured as measured_rows
from backtrack_jax.analysis.plots import Plot
from backtrack_jax.analysis.results import Results
from backtrack_jax.analysis.statistics import Region
from backtrack_jax.config import Experiment
from backtrack_jax.files import tables
from backtrack_jax.files.tables import Table
from backtrack_jax.models.config import ModelConfig


class Noise(Question):
    """On the model that writes the traces, and the same rows of given text on the other."""

    name = "noise"
    settings = (
        *("seed", "analysis.forced_texts", "analysis.forced_sentences", "steering.main_layer", "steering.unit"),
        *("steering.magnitudes", "steering.baseline_magnitudes", "steering.span", "vectors.window"),
    )
    role_tables = ("noise_log_odds", "noise_shift", "noise_slopes", "noise_mediation", "noise_temperature")
    tables = ("noise_effects", "noise_contrasts", "noise_hazard")

    def conditions(self, e: Experiment) -> Sequence[Wanted]:
        """Noise, without its component along the vector or a random direction, in a burst, and in the prompt."""
        limit = e.questions.noise.replies
        label = e.vectors.label
        entries = (NOISE, f"noise-outside:{label}", "noise-outside:random", burst(e), PROMPT)
        if not limit:  # the vector is needed on given text
            return [Wanted(e.author, f"noise-outside:{label}", ())]
        plain = Wanted(e.author, NOISE, (0.0,), limit=limit)  # at magnitude 0 the unsteered condition
        return [plain, *(Wanted(e.author, entry, (magnitude(e),), limit=limit) for entry in entries)]

    def scratch(self, role: str) -> list[str]:
        """Finished rows, appended batch by batch."""
        return [f"{role}.noise.{what}.jsonl" for what in ("forced", "exchanged")]

    def of_role(self, material: Material, role: str, folder: Path) -> dict[str, Table]:
        """Reads given texts; components are exchanged in the model that writes the traces alone."""
        forced, exchanged = (folder / name for name in self.scratch(role))
        rows = Rows(material, role)
        reads = rows.reads()
        found = measured_rows(rows, reads, forced)
        shift, slopes = downstream(rows, reads, found)
        return {
            "noise_log_odds": [
                {"role": role, "kind": read.kind, "text": read.text, "draw": read.draw, "problem_id": read.problem}
                | {"n_starts": len(one["log_odds"])}
                | {name: float(np.mean(one[name])) for name in ("log_odds", "entropy")}
                for read, one in zip(reads, found, strict=True)
            ],
            "noise_shift": shift,
            "noise_slopes": slopes,
            "noise_mediation": mediation(rows, reads, exchanged) if role == material.experiment.author else [],
            "noise_temperature": tempered(rows, reads, found),
        }

    def finish(self, material: Material, folder: Path) -> dict[str, Table]:
        """From the tables of the roles and the replies."""
        e = material.experiment
        joined: dict[str, Table] = {
            name: [line for role in e.roles for line in tables.read(folder / f"{role}.{name}.csv")]
            for name in self.role_tables
        }
        hazards = hazard(material)
        return {
            "noise_effects": effects(joined["noise_log_odds"]),
            "noise_contrasts": contrasts(material, joined, hazards),
            "noise_hazard": hazards,
        }

    def plots(self, r: Results) -> Sequence[Plot | None]:
        """One figure."""
        return [plot(r)]

    def sentences(self, r: Results) -> Sequence[str]:
        """The primary contrast, and the share that passes through the vector's component."""
        of = {line["contrast"]: line for line in r.tables["noise_contrasts"]}
        line, whole = of.get(primary(r.label)), of.get(f"noise less none, {r.author} model")
        if line is None or whole is None or line["problems"] < 2:
            return []
        margin = r.experiment.questions.noise.margin
        shown = "equivalent" if line["p"] <= 0.05 else "not shown to be equivalent"
        text = (
            f"Gaussian noise at magnitude {magnitude(r.experiment):g} changes the log-odds of wait or hmm on given "
            f"text by {_nats(whole)}; to take its component along the {r.label} vector away, and not that along a "
            f"random direction, changes this by {line['estimate']:.3f} nats ({line['low']:.3f} to "
            f"{line['high']:.3f}, {line['problems']} problems; {shown} within {margin:g}, p = {line['p']:.2g})"
        )
        if (share := share_of(r.tables, NOISE, VECTOR)) is not None:
            value, (low, high), _ = share
            text += (
                f", and {number(value)} ({number(low)} to {number(high)}) of its effect passes through the later "
                "layers' components along the vector"
            )
        return [f"{text}."]

    def claims(self, r: Results) -> Sequence[Claim]:
        """That the noise's own component along the vector is not what acts."""
        label, margin = r.label, r.experiment.questions.noise.margin
        found = of_kinds(r.tables["noise_log_odds"], r.author)
        values = np.array(list(less(found, f"noise-outside:{label}", "noise-outside:random").values()))
        if len(values) < 2:
            return []
        share, note = share_of(r.tables, NOISE, VECTOR), ""
        whole = abs(float(np.mean(list(found[NOISE].values()))))
        ends = interval(values, LEVEL)
        given = statistics.verdict(*ends, Region(-margin, margin), len(values))
        if margin >= whole:
            given, note = "undecided", f"the whole effect of noise, {whole:.3f} nats, is within the margin; "
        if share is not None:
            value, (low, high), _ = share
            mediated_by = f"{number(value)} ({number(low)} to {number(high)})"
            note += f"share mediated by the later components along the vector: {mediated_by}"
        return [
            measured(
                "noise_direction",
                "Gaussian noise acts as much without its component along the vector as with it.",
                figure="noise",
                where="-",
                rule="log-odds under noise without its component along the vector less those without a component along "
                f"a random direction, equivalent to 0 within {margin:g} nats",
                estimate=float(values.mean()),
                interval=ends,
                unit="nats",
                region=Region(-margin, margin),
                n=len(values),
                note=note,
                given=given,
            )
        ]

    def plan(self, planned: Planned) -> str:
        """Texts of one model; the exchange is of the one that writes the traces."""
        e, q = planned.experiment, planned.experiment.questions.noise
        texts = min(e.analysis.forced_texts, len(planned.trace_tokens))
        rows = 11 + 3 * q.draws + 3 * len(q.ranks) + q.seeds
        both = 4 * min(texts, q.replies) if q.replies else 0
        return (
            f"at most {texts * rows:,} texts under noise, and if it writes the traces {both:,} more and "
            f"{texts * (5 * (q.draws + 1) + 1):,} in whose runs components are exchanged, in two passes each"
        )

    def memory(self, planned: Planned, config: ModelConfig) -> dict[str, int]:
        """Logits of some positions, and the directions that the rows of a batch hold for every layer."""
        e = planned.experiment
        devices, rows = e.data_parallel * e.model_parallel, e.analysis.batch_size
        rank = max((*e.questions.noise.ranks, min(256, config.d_model)))
        return {
            "logits after texts": 4 * logits_at_once(rows, config.vocab_size) // devices,
            "directions of noise": 4 * rows * config.n_layers * rank * config.d_model // e.data_parallel,
        }


NOISE_QUESTION = Noise()


def _nats(line: Mapping[str, Any]) -> str:
    return f"{line['estimate']:.2f} nats ({line['low']:.2f} to {line['high']:.2f})"
