"""Which boundaries are stable: how often the model backtracks again when it goes on from the same prefix once more.

A boundary is the place right before a section. Of 541 keyword boundaries of one study (arXiv 2604.02113) 6.7 % recurred
in at least 8 of 10 continuations of the same prefix. Here the model that writes the traces continues the token ids of
prompt and reply up to a boundary, as often as `draws`, and

    p = share of the continuations whose first sentence backtracks

by `analysis.judge` where there is one, else by the keywords. One half of the draws sorts the boundaries, the other
half scores them: what was chosen for a high share has a lower one when it is drawn again. Vectors are then read anew
from the run's window means: of all boundaries, weighted by p (shrunk to a beta prior), and of each fifth. They are
added at equal length to texts of problems that they were not read from.

{role}.stability.csv          boundaries of the model that writes the traces, one a line
{role}.stability_effects.csv  change of the log-odds on each text under each vector
stability_shares.csv          p by part of the trace and category
stability_counts.csv          boundaries with 0, 1, ... hits, beside what the fitted prior expects
stability_vectors.csv         the vectors: cosine with the run's, reliability, effect
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from backtrack_jax.analysis import beta_binomial, boundaries, log_odds, statistics
from backtrack_jax.analysis.base import Material, Planned, Question
from backtrack_jax.analysis.boundaries import LABELLED, N_PARTS, REFERENCE, THIRDS
from backtrack_jax.analysis.boundary_vectors import (
    ALL,
    DIFFERENCE,
    WEIGHTED,
    differences,
    effects,
    fifth_name,
    magnitude,
    vectors,
)
from backtrack_jax.analysis.claims import Claim, all_of, measured
from backtrack_jax.analysis.dose import LEVEL
from backtrack_jax.analysis.forced import logits_at_once
from backtrack_jax.analysis.plots import COLOURS, Panel, Plot, Series
from backtrack_jax.analysis.results import Results
from backtrack_jax.analysis.statistics import NAN, Region
from backtrack_jax.files import tables
from backtrack_jax.files.tables import Table
from backtrack_jax.models.batching import bucket
from backtrack_jax.models.config import ModelConfig
from backtrack_jax.models.quantized import activation_dtype

STABLE = 0.8
"""Share of the continuations that must backtrack for a boundary to be called stable, as in arXiv 2604.02113."""

_CHANCE = 0.05  # of a difference at least so large among random ones


class Stability(Question):
    """Of the boundaries of the model that writes the traces."""

    name = "stability"
    of_replies = False
    settings = (
        *("seed", "traces.temperature", "traces.top_p", "steering.main_layer", "steering.unit", "steering.magnitudes"),
        *("steering.span", "analysis.folds", "analysis.forced_texts", "analysis.forced_sentences", "analysis.judge"),
    )
    role_tables = ("stability", "stability_effects")
    tables = ("stability_shares", "stability_counts", "stability_vectors")

    def scratch(self, role: str) -> list[str]:
        """Continuations, log-odds at the boundaries, and log-odds under the vectors, appended batch by batch."""
        return [f"{role}.stability.{what}.jsonl" for what in ("draws", "next", "forced")]

    def of_role(self, material: Material, role: str, folder: Path) -> dict[str, Table]:
        """Continues, sorts, and measures the vectors' effects; nothing of the model that writes no traces."""
        if role != material.experiment.author:
            return {name: [] for name in self.role_tables}
        files = [folder / name for name in self.scratch(role)]
        found = boundaries.choose(material, role)
        draws = boundaries.continuations(material, role, found, files[0])
        odds = boundaries.next_token(material, role, found, files[1])
        lines = boundaries.sort(material, role, found, draws, odds)
        return {"stability": lines, "stability_effects": effects(material, role, lines, files[2])}

    def finish(self, material: Material, folder: Path) -> dict[str, Table]:
        """From the boundaries, the effects and the window sums."""
        role = material.experiment.author
        lines, changes = (tables.read(folder / f"{role}.{name}.csv") for name in self.role_tables)
        return {
            "stability_shares": shares(lines),
            "stability_counts": counts(lines, material.experiment.seed),
            "stability_vectors": vectors(material, role, lines, changes),
        }

    def plots(self, r: Results) -> Sequence[Plot | None]:
        """One figure."""
        return [plot(r)]

    def sentences(self, r: Results) -> Sequence[str]:
        """How many are stable, and the primary contrast."""
        of_group = {line["group"]: line for line in r.tables["stability_shares"] if line["by"] == "all"}
        if LABELLED not in of_group:
            return []
        own, draws = of_group[LABELLED], r.experiment.questions.stability.draws
        text = f"At {100 * own['stable']:.1f} % of {own['boundaries']} boundaries before {r.label}"
        if REFERENCE in of_group:
            text += f" ({100 * of_group[REFERENCE]['stable']:.1f} % of other boundaries)"
        text += f", at least {math.ceil(STABLE * draws)} of {draws} continuations of the same prefix backtrack"
        line, null = _difference(r)
        if line:
            text += (
                f"; at equal length, the vector of the fifth with the highest share changes the log-odds on held-out "
                f"problems by {line['effect']:.2f} nats more than that of the lowest fifth "
                f"({line['effect_low']:.2f} to {line['effect_high']:.2f}, {line['problems']} problems"
            )
            text += f"; {null['effect_low']:.2f} to {null['effect_high']:.2f} for fifths at random)" if null else ")"
        return [f"{text}."]

    def claims(self, r: Results) -> Sequence[Claim]:
        """That stable boundaries hold more of what makes a model backtrack."""
        line, null = _difference(r)
        if not line:
            return []
        values = differences(r.tables["stability_effects"], 0)
        ends = log_odds.interval(values, LEVEL)
        region, p = Region(low=0), line["p_value"]
        decided = [statistics.verdict(*ends, region, len(values)), "holds" if p <= _CHANCE else "undecided"]
        note = f"p = {p:.2g} among {null['draws']} random fifths of the same thirds of traces" if null else ""
        return [
            measured(
                "stable_boundaries",
                "The vector of boundaries that recur acts more than that of boundaries that do not.",
                figure="stability",
                where="-",
                rule="change of the log-odds on held-out problems under the vector of the fifth with the highest share "
                "less that under the vector of the lowest fifth, at equal length, above 0, and above that of fifths at "
                f"random (p at most {_CHANCE:g})",
                estimate=line["effect"],
                interval=ends,
                unit="nats",
                region=region,
                n=len(values),
                note=note,
                given=all_of(decided),
            )
        ]

    def plan(self, planned: Planned) -> str:
        """Continuations and texts, of the one model that writes the traces."""
        e, q = planned.experiment, planned.experiment.questions.stability
        texts = min(e.analysis.forced_texts, len(planned.trace_tokens)) * (3 + N_PARTS + 2 * q.random)
        most = f"{2 * q.boundaries * q.draws:,}" if q.boundaries else f"{q.draws} for each boundary and as many others,"
        return (
            f"if it writes the traces, {most} continuations of up to {q.tokens} tokens at most, with one prefill for "
            f"{q.draws} of them{', each read by the judge' if e.analysis.judge else ''}, and log-odds after at most "
            f"{texts:,} texts under vectors of boundaries"
        )

    def memory(self, planned: Planned, config: ModelConfig) -> dict[str, int]:
        """Keys and values of a batch of continuations, and the logits of some positions of a batch of texts."""
        e = planned.experiment
        longest = bucket(max(planned.trace_tokens, default=0)) + e.questions.stability.tokens
        of_token = 2 * config.n_layers * config.n_kv_heads * config.head_dim
        cache = of_token * longest * e.steering.batch_size * activation_dtype(e.model(e.author).dtype).itemsize
        logits = 4 * logits_at_once(e.analysis.batch_size, config.vocab_size)
        devices = e.data_parallel * e.model_parallel
        return {"cache of continuations": cache // devices, "logits after texts": logits // devices}


STABILITY = Stability()


def shares(lines: Table) -> Table:
    """Mean p, and the share of stable boundaries, of either group: all, and by third of the trace, category and label.

    Intervals are over problems.
    """
    found: Table = []
    for group in (LABELLED, REFERENCE):
        own = [line for line in lines if line["group"] == group]
        for by in ("all", "third", "category", "label"):
            names = {"third": THIRDS}.get(by) or sorted({line[by] if by != "all" else "" for line in own})
            for name in names:
                members = [line for line in own if by == "all" or line[by] == name]
                if members:
                    found.append({"group": group, "by": by, "value": name} | _share(members))
    return found


def _share(lines: Table) -> dict[str, Any]:
    problems = np.array([line["problem_id"] for line in lines])
    hits, draws = (np.array([line[name] for line in lines], np.float64) for name in ("hits", "counted"))
    counted = draws > 0
    stable = counted & (hits >= STABLE * draws)
    n = _by_problem(counted, problems)
    p_low, p_high = statistics.rate_interval(_by_problem(hits, problems), _by_problem(draws, problems))
    stable_low, stable_high = statistics.rate_interval(_by_problem(stable, problems), n)
    return {
        "boundaries": len(lines),
        "problems": len(set(problems.tolist())),
        "p": float(hits.sum() / draws.sum()) if counted.any() else NAN,
        "p_low": p_low,
        "p_high": p_high,
        "keyword_p": float(np.mean([line["keyword_hits"] / line["draws"] for line in lines])),
        "next_token": float(np.mean([line["next_token"] for line in lines])),
        "stable": float(stable.sum() / counted.sum()) if counted.any() else NAN,
        "stable_low": stable_low,
        "stable_high": stable_high,
        "complete": float(np.mean([line["complete"] / line["draws"] for line in lines])),
    }


def _by_problem(values: np.ndarray, problems: np.ndarray) -> np.ndarray:
    _, at = np.unique(problems, return_inverse=True)
    return np.bincount(at, values)


def counts(lines: Table, seed: int) -> Table:
    """How many boundaries of either group have each number of hits, and how many the fitted prior expects.

    Boundaries that a judge gave a label in fewer draws than the others take part in the fit alone.
    """
    found: Table = []
    for group in (LABELLED, REFERENCE):
        own = [line for line in lines if line["group"] == group and line["counted"]]
        if not own:
            continue
        n_draws = own[0]["draws"]
        prior = beta_binomial.fit([line["hits"] for line in own], [line["counted"] for line in own])
        whole = [line["hits"] for line in own if line["counted"] == n_draws]
        observed = np.bincount(whole, minlength=n_draws + 1)
        fitting = beta_binomial.misfit(prior, observed, seed=seed) if whole else NAN
        expected = len(whole) * prior.expected(n_draws)
        of_prior = {
            "alpha": prior.alpha,
            "beta": prior.beta,
            "fit_p": fitting,
            "truly_stable": prior.above(STABLE),
        }
        found += [
            {"group": group, "hits": k, "observed": int(observed[k]), "expected": float(expected[k])} | of_prior
            for k in range(n_draws + 1)
        ]
    return found


def _difference(r: Results) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The line of the primary contrast, and that of its null."""
    of = {line["vector"]: line for line in r.tables["stability_vectors"]}
    line = of.get(DIFFERENCE)
    return (line if line and line["problems"] > 1 else None), of.get(f"random: {DIFFERENCE}")


def plot(r: Results) -> Plot | None:
    """Hits, shares by third, what vectors of each fifth do, and how alike and reliable these are."""
    of_vector = {line["vector"]: line for line in r.tables["stability_vectors"]}
    own, q = of_vector.get(ALL), r.experiment.questions.stability
    if own is None:
        return None
    fifths = [of_vector[name] for n in range(1, N_PARTS + 1) if (name := fifth_name(n)) in of_vector]
    panels = [[_counts_panel(r), _thirds_panel(r)]]
    if fifths:
        panels.append([_dose_panel(of_vector, fifths), _alike_panel(of_vector, fifths)])
    shown = [
        {"panel": panel.title, "series": series.label, "x": x, "y": y}
        | {"low": series.low[i] if len(series.low) else NAN, "high": series.high[i] if len(series.high) else NAN}
        for row in panels
        for panel in row
        for series in panel.series
        for i, (x, y) in enumerate(zip(series.x, series.y, strict=True))
    ]
    caption = (
        f"Continuations of the prefixes of {own['boundaries']} boundaries before {r.label}, {q.draws} each of up to "
        f"{q.tokens} tokens; p is the share whose first sentence backtracks, by {r.judge or 'keywords'}. Lines: what "
        "the fitted beta-binomial expects. One half of the draws sorts boundaries into fifths, the other gives their "
        "p. Effects: change of the log-odds of wait or hmm at sentence starts of given text, at magnitude "
        f"{magnitude(r.experiment):g} ({r.experiment.steering.unit}) and layer {r.layer}, on {own['problems']} "
        "problems that the vectors were not read from. Intervals of 95 % over problems; of what is at random, drawn "
        f"within thirds of the traces, the middle 95 % of {q.random} draws."
    )
    return Plot("stability", "Boundaries that recur, and their vectors", caption, panels, shown, place=7.4)


def _group_name(r: Results, group: str) -> str:
    return f"before {r.label}" if group == LABELLED else "before others"


def _counts_panel(r: Results) -> Panel:
    """Observed and expected shares of boundaries with each number of hits."""
    series = []
    for i, group in enumerate((LABELLED, REFERENCE)):
        own = [line for line in r.tables["stability_counts"] if line["group"] == group]
        n, x, name = sum(line["observed"] for line in own), [line["hits"] for line in own], _group_name(r, group)
        if n:
            look: dict[str, Any] = {"colour": COLOURS[i], "marker": "os"[i]}
            observed, expected = ([100 * line[of] / n for line in own] for of in ("observed", "expected"))
            series.append(Series(name, x, observed, style="", **look))
            series.append(Series(f"expected, {name}", x, expected, style=("-", "--")[i], **look))
    x_label = "continuations that backtrack"
    return Panel("How often boundaries recur", x_label, "% of boundaries", series, whole=True, from_zero=True)


def _series(name: str, x: Sequence[float], lines: Sequence[Mapping[str, Any]], column: str, **look: Any) -> Series:
    """A column with its intervals."""
    y, low, high = ([line[of] for line in lines] for of in (column, f"{column}_low", f"{column}_high"))
    return Series(name, x, y, low, high, **look)


def _thirds_panel(r: Results) -> Panel:
    """Mean p by third of the trace."""
    series = []
    for i, group in enumerate((LABELLED, REFERENCE)):
        lines = [line for line in r.tables["stability_shares"] if (line["group"], line["by"]) == (group, "third")]
        x = [THIRDS.index(line["value"]) + 0.2 * (2 * i - 1) for line in lines]
        name, next_token = _group_name(r, group), [line["next_token"] for line in lines]
        series.append(_series(name, x, lines, "p", colour=COLOURS[i], style="", marker="os"[i]))
        beside = [at + 0.12 for at in x]
        series.append(Series(f"next token, {name}", beside, next_token, colour=COLOURS[i], style="", marker="^D"[i]))
    return Panel("p by place in the trace", "", "mean p", series, categories=THIRDS, from_zero=True)


def _dose_panel(of_vector: Mapping[str, dict[str, Any]], fifths: Sequence[dict[str, Any]]) -> Panel:
    """Effect of the vectors of fifths against their p, beside those of all boundaries and of random fifths."""
    own, column = of_vector[ALL], "effect"
    series = [
        _series("fifth of the boundaries", [line["p"] for line in fifths], fifths, column, marker="D"),
        _series("all boundaries", [own["p"]], [own], column, colour=COLOURS[6], style="", marker="s"),
    ]
    if null := of_vector.get(f"random: {fifth_name(N_PARTS)}"):
        look = {"colour": COLOURS[1], "style": "", "marker": "^"}
        series.append(_series("fifth at random", [own["p"] + 0.02], [null], column, **look))
    return Panel("What their vectors do", "p in the other half of the draws", log_odds.AXIS, series, level=0.0)


def _alike_panel(of_vector: Mapping[str, dict[str, Any]], fifths: Sequence[dict[str, Any]]) -> Panel:
    """Cosine with the run's vector, and reliability, of each vector."""
    at_random = (f"random: {WEIGHTED}", f"random: {fifth_name(N_PARTS)}")
    names = [ALL, WEIGHTED, at_random[0], *(line["vector"] for line in fifths), at_random[1]]
    names = [name for name in names if name in of_vector]
    lines, x = [of_vector[name] for name in names], range(len(names))
    series = [
        _series("cosine with the run's vector", [n - 0.1 for n in x], lines, "cosine", colour=COLOURS[2], style=""),
        _series(
            "split-half cosine", [n + 0.1 for n in x], lines, "reliability", colour=COLOURS[3], style="", marker="s"
        ),
    ]
    shown = [name.replace(at_random[1], "random fifth") for name in names]
    return Panel("How alike and reliable they are", "", "cosine", series, categories=shown, level=0.0)
