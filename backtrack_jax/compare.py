"""Does it hold across pairs of models? Finished runs side by side.

    python -m backtrack_jax.compare results/organism results/organism2 --out=results/compared

On each pair, at the dose of its own run, the 2 x 2 of {base, reasoning model} x {base-, reasoning-derived vector}: how
much more a vector does on the reasoning model than on the base model, in nats of the keywords' log-odds on the same
text, and in keywords a word of sampled replies. Then their mean over pairs. Writes

    compare.md, compare.json   all that follows, in words and as numbers
    pairs.csv                  a line per pair: model, depth of the steered and of the best layer, norms, cosines
    effects.csv                a line per pair, measure, text, vector and model, with its interval over problems
    forest.png, .pdf, .csv     the interaction of every pair, their mean, and what a further pair is expected to show
"""

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from backtrack_jax import inputs
from backtrack_jax.analysis import cells, dose, log_odds, meta, replies
from backtrack_jax.analysis.claims import number
from backtrack_jax.analysis.forced import BASE_REPLIES, REASONING_TRACES
from backtrack_jax.analysis.log_odds import EXAMPLES
from backtrack_jax.analysis.plots import COLOURS, Panel, Plot, Series
from backtrack_jax.analysis.statistics import FEWEST_PROBLEMS, NAN
from backtrack_jax.config import ROLES
from backtrack_jax.data.records import Condition
from backtrack_jax.files import store, tables
from backtrack_jax.files.console import ends_in_one_line, say
from backtrack_jax.files.tables import Table
from backtrack_jax.finished import FinishedRun, load_run
from backtrack_jax.report import static

# Other commands have a flag of this name too; a process that imports several runs one of them.
_OUT = flags.DEFINE_string("out", "", "Folder for the comparison.", allow_override=True)

LOG_ODDS, RATE = "log-odds, nats", "keywords a word"
BOTH = "both"
"""In the column `source`: the mean over both vectors."""
INTERACTION = "interaction"
"""In the column `target`: what is done on the reasoning model less what is done on the base model."""


@dataclasses.dataclass(frozen=True)
class Pair:
    """A run, and what is compared of it.

    Attributes:
      name: of the run's folder, told apart from the others.
      run: the run.
      chosen: its dose.
      interaction: problem -> difference of the log-odds' changes on reasoning traces, mean over both vectors, in nats.
    """

    name: str
    run: FinishedRun
    chosen: dose.Dose
    interaction: dict[str, float]

    @property
    def magnitude(self) -> float:
        """At which everything is compared."""
        return self.chosen.cell["magnitude"]


def read_pairs(folders: Sequence[str | Path]) -> list[Pair]:
    """Finished runs of pairs of models, ready to be compared.

    Raises:
      ValueError: names the run that is not finished, has one model, no steered cell or no log-odds; or says which runs
        cannot stand in one table.
    """
    runs = [load_run(folder) for folder in folders]
    names = [run.folder.resolve().name for run in runs]
    if len({run.folder.resolve() for run in runs}) < len(runs):
        raise ValueError(f"a run is named twice: {', '.join(map(str, folders))}; expected different ones")
    if len(set(names)) < len(names):
        names = [f"{run.folder.resolve().parent.name}/{name}" for run, name in zip(runs, names, strict=True)]
    wide = {"int8" in (run.experiment.model(role).dtype for role in run.experiment.roles): run for run in runs}
    if len(wide) > 1:
        raise ValueError(f"{wide[True].folder} is of int8 weights and {wide[False].folder} is not; compare them apart")
    return [_pair(name, run) for name, run in zip(names, runs, strict=True)]


def _pair(name: str, run: FinishedRun) -> Pair:
    r = run.results
    if set(run.experiment.roles) != set(ROLES):
        raise ValueError(f"{run.folder}: roles={run.experiment.roles}, expected runs of a base and a reasoning model")
    chosen = dose.of_run(r)
    if chosen is None:
        raise ValueError(f"{run.folder}: no reply was steered along its vector, or none was sampled unsteered")
    found = _interaction(run, REASONING_TRACES, chosen.cell["magnitude"], ROLES)
    if len(found) < 2:
        raise ValueError(f"{run.folder}: no log-odds on given text at its dose; raise analysis.forced_texts")
    return Pair(name, run, chosen, found)


def _changes(run: FinishedRun, target: str, text: str, source: str, magnitude: float) -> dict[str, float]:
    """Problem -> change of the log-odds on a text."""
    r = run.results
    cell = {"kind": r.label, "source": source, "layer": r.layer, "window": r.window, "magnitude": magnitude}
    return log_odds.effects(r, target, text, **cell)


def _interaction(run: FinishedRun, text: str, magnitude: float, sources: Sequence[str]) -> dict[str, float]:
    """Problem -> change on the reasoning model less that on the base model, mean over the vectors."""
    found: list[dict[str, float]] = []
    for source in sources:
        base, reasoning = (_changes(run, target, text, source, magnitude) for target in ROLES)
        found.append({name: reasoning[name] - base[name] for name in reasoning.keys() & base.keys()})
    shared = set.intersection(*(set(of) for of in found))
    return {name: float(np.mean([of[name] for of in found])) for name in sorted(shared)}


def effects_of(pair: Pair) -> Table:
    """The cells of the 2 x 2 of a pair and its interactions, each with a 95 % interval over problems."""
    run, lines = pair.run, []

    def add(measure: str, text: str, source: str, target: str, estimate: float, ends: tuple[float, float], n: int):
        line = {"pair": pair.name, "measure": measure, "text": text, "source": source, "target": target}
        lines.append(line | {"estimate": estimate, "low": ends[0], "high": ends[1], "n_problems": n})

    def add_mean(text: str, source: str, target: str, values: Sequence[float]) -> None:
        if len(values) > 1:
            add(LOG_ODDS, text, source, target, float(np.mean(values)), log_odds.interval(values), len(values))

    for text in (REASONING_TRACES, BASE_REPLIES):
        for source in (*ROLES, BOTH):
            sources = ROLES if source == BOTH else (source,)
            for target in ROLES if source != BOTH else ():
                add_mean(text, source, target, list(_changes(run, target, text, source, pair.magnitude).values()))
            add_mean(text, source, INTERACTION, list(_interaction(run, text, pair.magnitude, sources).values()))
        control = log_odds.effects(run.results, "base", text, kind=EXAMPLES)
        add_mean(text, EXAMPLES, "base", list(control.values()))
    for source in (*ROLES, BOTH):
        found = rate_contrast(pair, ROLES if source == BOTH else (source,))
        if found is not None:
            estimate, ends, n = found
            add(RATE, "sampled replies", source, INTERACTION, estimate, ends, n)
    return lines


def rate_contrast(pair: Pair, sources: Sequence[str]) -> tuple[float, tuple[float, float], int] | None:
    """What the vectors add to the rate on the reasoning model less that on the base model, with its interval."""
    r = pair.run.results
    of_cell = replies.by_cell(r.tables["replies"])
    factors: dict[Condition, float] = {}
    for target, sign in zip(ROLES, (-1.0, 1.0), strict=True):
        plain = r.unsteered(target)
        steered = [
            cell
            for source in sources
            for cell in r.cells(target, r.label, source)
            if cell["magnitude"] == pair.magnitude
        ]
        if plain is None or len(steered) < len(sources):
            return None
        for cell in steered:
            factors[Condition.of(cell)] = sign / len(sources)
        factors[Condition.of(plain)] = -sign
    estimate, ends = replies.contrast(r.tables["replies"], factors)
    return estimate, ends, len(replies.shared(of_cell, list(factors)).problems)


def description(pair: Pair) -> dict[str, Any]:
    """What a pair is: architecture, where it is steered, how long and alike its vectors are."""
    run, r = pair.run, pair.run.results
    config = inputs.architecture(run.experiment.model("reasoning").path)
    depth = r.n_layers - 1
    swept = [cell for source in r.roles for layer in range(r.n_layers) for cell in _at(r, source, layer)]
    best = cells.highest(r, swept) if len({cell["layer"] for cell in swept}) > 1 else None
    alike = [row for row in r.tables["similarity"] if (row["label"], row["layer"]) == (r.label, r.layer)]
    cosines = {
        name: float(alike[0][name]) if alike else NAN for name in ("cosine", "corrected", "shuffled", "shuffled_95")
    }
    norms = {
        f"{role} vector norm": float(np.linalg.norm(run.vectors[role, r.label].at(r.layer)))
        / r.mean_norm(role, r.layer)
        for role in ROLES
    }
    return {
        "pair": pair.name,
        "architecture": config.family if config else "-",
        "parameters": config.n_parameters if config else "-",
        "layers": r.n_layers,
        "dtype": run.experiment.reasoning.dtype,
        "layer": r.layer,
        "depth": r.layer / depth,
        "best_layer": best.cell["layer"] if best else "-",
        "best_depth": best.cell["layer"] / depth if best else NAN,
        "best_rate": best.cell["rate"] if best else NAN,
        "magnitude": pair.magnitude,
        "unit": run.experiment.steering.unit,
        "coherence": pair.chosen.coherence.value,
        **cosines,
        **norms,
        "n_problems": len(pair.interaction),
    }


def _at(r: Any, source: str, layer: int) -> list[Any]:
    """The steered cells of Fig. B.1 of one vector at one layer of the model that writes the traces."""
    return cells.steered(r.cells(r.author, r.label, source, layer=layer))


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All that is written.

    Attributes:
      pairs: a line per pair.
      effects: a line per pair and cell.
      mean: of the interaction over pairs; None of a single one.
      joint: mean over pairs with problems alone as factor, its interval, and how many problems all pairs have.
    """

    pairs: Table
    effects: Table
    mean: meta.RandomEffects | None
    joint: tuple[float, tuple[float, float], int]


def compare(pairs: Sequence[Pair]) -> Comparison:
    """Everything, from runs that are read."""
    found = [list(pair.interaction.values()) for pair in pairs]
    errors = [float(np.std(values, ddof=1) / math.sqrt(len(values))) for values in found]
    mean = meta.random_effects([np.mean(values) for values in found], errors) if len(pairs) > 1 else None
    return Comparison(
        [description(pair) for pair in pairs],
        [line for pair in pairs for line in effects_of(pair)],
        mean,
        meta.resampled_jointly([pair.interaction for pair in pairs]),
    )


def forest(found: Comparison) -> Plot:
    """Interaction of every pair on reasoning traces, and what they give together."""
    rows = [
        line
        for line in found.effects
        if (line["measure"], line["text"], line["target"]) == (LOG_ODDS, REASONING_TRACES, INTERACTION)
    ]
    names = [str(line["pair"]) for line in found.pairs]
    series = []
    for number_, (source, marker) in enumerate(zip((*ROLES, BOTH), ("o", "s", "D"), strict=True)):
        own = [line for line in rows if line["source"] == source]
        x = [names.index(line["pair"]) + 0.16 * (number_ - 1) for line in own]
        label = "mean of both vectors" if source == BOTH else f"{source}-derived vector"
        y, low, high = ([line[column] for line in own] for column in ("estimate", "low", "high"))
        series.append(Series(label, x, y, low, high, COLOURS[number_], "", marker))
    categories, shown = list(names), list(rows)
    if (mean := found.mean) is not None and mean.k > 2:  # of two, the bar would hide both
        at = len(names)
        categories.append(f"mean of {mean.k}")
        series.append(Series("mean over pairs", [at], [mean.mean], [mean.low], [mean.high], "#000000", "", "s"))
        shown.append(
            {"pair": "mean", "measure": LOG_ODDS, "text": REASONING_TRACES, "source": BOTH, "target": INTERACTION}
            | {"estimate": mean.mean, "low": mean.low, "high": mean.high, "n_problems": ""}
        )
        categories.append("a further pair")
        ends = ([mean.predicted_low], [mean.predicted_high])
        series.append(Series("prediction", [at + 1], [mean.mean], *ends, "#8C510A", "", "^"))
    panel = Panel("", "", "reasoning less base model, nats", series, categories=categories, level=0.0)
    n = ", ".join(f"{line['pair']} {line['n_problems']}" for line in found.pairs)
    caption = (
        "How much more a vector raises the log-odds of wait or hmm on the reasoning model than on the base model, on "
        "the same reasoning traces, each pair at the dose of its own run. Bars: 95 % intervals over problems "
        f"(Student's t; n = {n}); of the mean over pairs, Hartung and Knapp's, where there are at least three."
    )
    return Plot("forest", "Reasoning less base model, pair by pair", caption, [[panel]], shown)


def markdown(found: Comparison) -> str:
    """compare.md."""
    lines = ["# Pairs of models compared", "", sentence(found), "", "## Pairs", "", *_table(found.pairs)]
    lines += ["", "![](forest.png)", "", "## Effects", "", *_table(found.effects), ""]
    lines += [
        "Each pair is steered at the dose of its own run: the largest magnitude that keeps replies coherent. Of "
        "log-odds, intervals over problems are Student's t; of rates, those of a paired contrast. The mean over pairs "
        "weighs them by both variances, within and between (restricted maximum likelihood), with the interval of "
        "Hartung and Knapp.",
        "",
    ]
    return "\n".join(lines)


def sentence(found: Comparison) -> str:
    """What the comparison says, with its interval and how many pairs and problems it rests on."""
    names = [str(line["pair"]) for line in found.pairs]
    short = [str(line["pair"]) for line in found.pairs if line["n_problems"] < FEWEST_PROBLEMS]
    mean = found.mean
    if mean is None:
        (own,) = (
            line
            for line in found.effects
            if (line["text"], line["source"], line["target"]) == (REASONING_TRACES, BOTH, INTERACTION)
        )
        said = (
            f"On {names[0]} the vectors raise the log-odds of wait or hmm by {number(own['estimate'])} nats "
            f"({number(own['low'])} to {number(own['high'])}, {own['n_problems']} problems) more on the reasoning "
            "model than on the base model. Of one pair there is no mean over pairs."
        )
    else:
        said = (
            f"Over {mean.k} pairs the vectors raise the log-odds of wait or hmm by {number(mean.mean)} nats "
            f"({number(mean.low)} to {number(mean.high)}) more on the reasoning model than on the base model; standard "
            f"deviation between pairs {number(mean.tau)}, {100 * mean.i_squared:.0f} % of the spread."
        )
        if mean.k == 2:
            said += " The interval of two pairs has one degree of freedom, and is as wide as that."
        else:
            said += f" A further pair is expected at {number(mean.predicted_low)} to {number(mean.predicted_high)}."
        value, ends, n = found.joint
        if not math.isnan(value):
            said += (
                f" With these pairs as they are, over the {n} problems that all have: {number(value)} "
                f"({number(ends[0])} to {number(ends[1])})."
            )
    if short:
        said += f" Fewer than {FEWEST_PROBLEMS} problems, so undecided: {', '.join(short)}."
    return said


def _table(rows: Table) -> list[str]:
    """Lines of a Markdown table."""
    if not rows:
        return ["none"]
    text = [[number(v) if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    return [f"| {' | '.join(row)} |" for row in [list(rows[0]), ["---"] * len(rows[0]), *text]]


def write(found: Comparison, folder: Path) -> None:
    """Writes everything into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tables.write(folder / "pairs.csv", found.pairs)
    tables.write(folder / "effects.csv", found.effects)
    static.write(forest(found), folder)
    mean = dataclasses.asdict(found.mean) if found.mean else None
    value, ends, n = found.joint
    joint = {"mean": value, "low": ends[0], "high": ends[1], "n_problems": n}
    values = {"pairs": found.pairs, "effects": found.effects, "mean over pairs": mean, "problems jointly": joint}
    store.write_text(folder / "compare.json", json.dumps(_json(values), indent=1) + "\n")
    store.write_text(folder / "compare.md", markdown(found))


def _json(value: Any) -> Any:
    """The same with null for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {name: _json(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main(argv: Sequence[str]) -> None:
    """Compares the runs that are named on the command line."""
    with ends_in_one_line(remedy="run it where more is free", resumed="nothing was changed"):
        if len(argv) < 2:
            raise ValueError(
                "name runs: python -m backtrack_jax.compare results/organism results/organism2 --out=FOLDER"
            )
        if not _OUT.value:
            raise ValueError("--out: expected a folder for the comparison")
        found = compare(read_pairs(argv[1:]))
        write(found, Path(_OUT.value).expanduser())
        say(sentence(found))
        say(f"the comparison is in {Path(_OUT.value) / 'compare.md'}")


def console() -> None:
    """The command line."""
    app.run(main)


if __name__ == "__main__":
    sys.exit(console())
