"""The paper's claims on small pairs, with their verdicts, and the truth that no larger pair can give.

    python scripts/organism_claims.py                                       # the pair that ships with the program
    python scripts/organism_claims.py --pairs results/pair2 results/pair3   # others, from scripts/train_organism.py

Runs `configs/organism.py` on every pair into `OUT/NAME`, with 80 problems in the cells of Fig. 2 and B.1 too and the
sections of every layer kept; what is done is not done again. Then reads the runs: their `claims.json`, and their
vectors beside the direction of the exact belief about the hidden register. The last thing printed is one table of all
pairs.
"""

import argparse
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from backtrack_jax import pipeline
from backtrack_jax.analysis.claims import number
from backtrack_jax.analysis.dose import LEVEL
from backtrack_jax.checks import check
from backtrack_jax.config import Experiment, PromptSpec
from backtrack_jax.files import store
from backtrack_jax.files.console import ends_in_one_line
from backtrack_jax.models import checkpoint
from backtrack_jax.models.tokenizer import Tokenizer
from backtrack_jax.organism import measure
from backtrack_jax.organism.vocabulary import dialect_of
from backtrack_jax.report.stage import REPORT
from backtrack_jax.stages.annotations import read_pairs
from backtrack_jax.stages.vectors import VECTORS

CONFIG = Path(__file__).parents[1] / "configs" / "organism.py"
ROLES = ("base", "reasoning")


def experiment(name: str, folder: Path, out: Path) -> Experiment:
    """The experiment of a pair."""
    spec = importlib.util.spec_from_file_location("organism_config", CONFIG)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    e: Experiment = module.get_config()
    e.name, e.workdir = name, str(out)
    e.base.path, e.reasoning.path = (str(folder / role) for role in ROLES)
    prompt = dialect_of(Tokenizer.load(folder / "reasoning")).prompt
    e.prompt = PromptSpec(format=prompt.format, think=prompt.think)
    e.steering.layers = tuple(range(checkpoint.read_config(folder / "base").n_layers))
    e.steering.grid_limit = e.steering.limit
    e.vectors.layers = e.steering.layers  # the lens is judged over all of them
    e.steering.baseline_magnitudes = (0.15, 0.3)
    e.analysis.forced_sentences = 6
    return e


def truth(run: pipeline.Run) -> list[dict[str, Any]]:
    """A line per layer: cosine of each model's vector with the direction of the exact belief, and R^2 of the latter."""
    context, e = run.context, run.experiment
    pairs = read_pairs(context)
    columns: dict[str, np.ndarray] = {}
    for role in e.roles:
        read = [context.token_trace(role, *pair) for pair in pairs]
        found = measure.belief(context.model(role), context.tokenizer, role, [trace for trace, _ in pairs], read)
        vector = VECTORS.load(context.folder(VECTORS), role, e.vectors.label).directions
        columns[f"{role} v, belief"] = measure.cosines(vector, found.direction)
        columns[f"{role} v, log-odds"] = measure.cosines(vector, found.log_odds_direction)
        columns[f"R2 of the belief, {role}"] = found.r_squared
    n_layers = len(next(iter(columns.values())))
    return [{"layer": layer} | {name: values[layer] for name, values in columns.items()} for layer in range(n_layers)]


def measure_pair(e: Experiment) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Runs the experiment of a pair; gives its claims, and its vectors beside the truth."""
    check(e)
    run = pipeline.Run(e)
    run.run()
    return store.read_json(run.context.folder(REPORT) / "claims.json")["claims"], truth(run)


def overview(claims: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """One Markdown table: claims down, pairs across; behind several, their mean, whose interval is over trainings."""
    titles = {claim["name"]: claim["title"] for found in claims.values() for claim in found}
    of = {(pair, claim["name"]): claim for pair, found in claims.items() for claim in found}
    several = len(claims) > 1
    heads = [*claims, *(["mean over trainings"] if several else [])]
    lines = [f"| claim | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    for name, title in titles.items():
        cells = [_cell(of[pair, name]) if (pair, name) in of else "-" for pair in claims]
        if several:
            cells.append(_over_trainings([of[pair, name] for pair in claims if (pair, name) in of]))
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(claim: Mapping[str, Any]) -> str:
    value, low, high = (
        number(float("nan" if v is None else v)) for v in (claim[x] for x in ("estimate", "low", "high"))
    )
    return f"**{claim['verdict']}**: {value} ({low} to {high}) {claim['unit']}"


def _over_trainings(found: Sequence[Mapping[str, Any]]) -> str:
    """Mean and interval of a claim's estimates, see `over_trainings`; "-" of fewer than two."""
    estimates = [claim["estimate"] for claim in found if claim["estimate"] is not None]
    if len(estimates) < 2:
        return "-"
    mean, low, high = over_trainings(estimates, ratio=found[0]["unit"].startswith("times"))
    return f"{number(mean)} ({number(low)} to {number(high)})"


def over_trainings(estimates: Sequence[float], *, ratio: bool) -> tuple[float, float, float]:
    """Mean and t-interval over pairs, each of which is one draw of a training; of logarithms for ratios.

    Problems are the first factor, and have the intervals of single pairs; trainings are the second.
    """
    values = np.log(estimates) if ratio else np.asarray(estimates, float)
    interval = stats.t.interval(LEVEL, len(values) - 1, values.mean(), stats.sem(values))
    ends = np.array([values.mean(), *interval])
    return tuple((np.exp(ends) if ratio else ends).tolist())


def markdown(lines: Sequence[Mapping[str, Any]]) -> str:
    """Lines as a Markdown table."""
    rows = [[f"{v:.2f}" if isinstance(v, float | np.floating) else str(v) for v in line.values()] for line in lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in [list(lines[0]), ["---"] * len(lines[0]), *rows])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, nargs="+", default=[checkpoint.resolve("package:backtrack_jax/organism")])
    parser.add_argument("--out", type=Path, default=Path("results/organism_claims"))
    arguments = parser.parse_args(argv)
    for folder in arguments.pairs:
        if missing := [role for role in ROLES if not (folder / role / "model.safetensors").exists()]:
            parser.error(
                f"--pairs: {folder} has no {' and '.join(missing)} model; train_organism.py --out makes a pair"
            )
    names = [folder.resolve().name for folder in arguments.pairs]
    if len(set(names)) < len(names):
        parser.error(f"--pairs: folders are named {', '.join(names)}, and runs after them; expected different names")
    claims = {}
    with ends_in_one_line(remedy="run it again where more is free", resumed="the same command resumes"):
        for name, folder in zip(names, arguments.pairs, strict=True):
            claims[name], lines = measure_pair(experiment(name, folder.resolve(), arguments.out.expanduser()))
            print(f"{name}: vectors beside the exact belief\n\n{markdown(lines)}\n")
        print(overview(claims))


if __name__ == "__main__":
    sys.exit(main())
