"""Runs of the tiny experiment and what they leave on disk, for the tests in this folder."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny

from backtrack_jax import pipeline
from backtrack_jax.config import Experiment

TINY = Path(tiny.__file__)
STAGES = tuple(stage.name for stage in pipeline.STAGES)
ROLES = ("base", "reasoning")
CELL = ("target", "kind", "source", "layer", "window", "magnitude")


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]]


def contents(results: Path) -> dict[str, bytes]:
    """All artifacts by name. run.json is left out: the revision in it changes while one works on the source."""
    files = (path for path in results.rglob("*") if path.is_file() and path.name not in ("run.json", ".lock"))
    return {str(path.relative_to(results)): path.read_bytes() for path in files}


def run(e: Experiment, *stages: str) -> pipeline.Run:
    made = pipeline.Run(e, pipeline.stage_names(stages))
    made.run()
    return made


def done(made: pipeline.Run) -> list[str]:
    """Names of the stages that are complete."""
    return [stage.name for stage in made.stages if made.done(stage)]


def set_at(holder: object, name: str, value: object) -> None:
    setattr(holder, name, value)


def few_conditions() -> Experiment:
    """The tiny experiment with one reply of each model."""
    e = tiny.get_config()
    e.steering.kinds, e.steering.magnitudes = ("backtracking",), (-4.0,)
    e.steering.limit = e.steering.samples = 1
    e.steering.baselines = e.steering.offsets = e.steering.layers = ()
    return e


def csv_rows(name: str) -> list[dict[str, str]]:
    with Path("results/tiny/5-analysis", name).open() as file:
        return list(csv.DictReader(file))


def edit_chains(change: Callable[[dict[str, str]], Any]) -> None:
    chains = json.loads(Path(tiny.CHAINS).read_text())
    for chain in chains:
        change(chain)
    Path(tiny.CHAINS).write_text(json.dumps(chains))
