"""Runs that are done, as a notebook or a comparison reads them."""

import dataclasses
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from backtrack_jax.analysis.results import Results
from backtrack_jax.config import Experiment
from backtrack_jax.data.records import Annotation, Trace, pair_annotations
from backtrack_jax.files import store
from backtrack_jax.files.tables import Table
from backtrack_jax.report.stage import REPORT, read_results
from backtrack_jax.stages.analysis import ANALYSIS
from backtrack_jax.stages.annotations import ANNOTATIONS
from backtrack_jax.stages.steering import STEERING
from backtrack_jax.stages.traces import TRACES
from backtrack_jax.stages.vectors import VECTORS
from backtrack_jax.vectors import SteeringVector

_STAGES = (TRACES, ANNOTATIONS, VECTORS, STEERING, ANALYSIS)


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """What a run has found.

    Attributes:
      folder: of the run.
      experiment: its config.
      results: tables, replies and settings, as its figures are made from them.
      vectors: (role, label) -> steering vector of every layer.
      traces: traces, each with its labelled sections.
      claims: name of a claim -> its line of claims.json; empty where the report was not made.
    """

    folder: Path
    experiment: Experiment
    results: Results
    vectors: Mapping[tuple[str, str], SteeringVector]
    traces: list[tuple[Trace, Annotation]]
    claims: Mapping[str, Mapping[str, Any]]

    @property
    def tables(self) -> Mapping[str, Table]:
        """Name of a table of stage 5 -> its lines; those of both models are joined."""
        return self.results.tables

    def norms(self, role: str) -> list[float]:
        """Mean norm of the residual stream of a model at each layer: the unit `relative`."""
        return [self.results.mean_norm(role, layer) for layer in range(self.results.n_layers)]

    def replies(self) -> Table:
        """The steered replies, a flat line each: problem, condition, text, ids."""
        return [reply.line() for reply in self.results.replies]


def load_run(folder: str | Path) -> FinishedRun:
    """Reads the results of `python -m backtrack_jax.run`; no model is loaded.

        run = load_run("results/organism")
        run.vectors["base", "backtracking"].unit(2)
        pandas.DataFrame(run.replies())

    Args:
      folder: of the run, `WORKDIR/NAME`.

    Raises:
      ValueError: stages 1 to 5 are not done there, or are out of date; names the stage.
    """
    folder = Path(folder).expanduser()
    for stage in _STAGES:
        path = stage.path(folder)
        if not store.is_finished(path):
            raise ValueError(
                f"{folder}: {stage.name} is not done there; expected the folder of a run, such as results/organism"
            )
        if (path / store.STALE).exists():
            raise ValueError(f"{path} is stale: {(path / store.STALE).read_text('utf-8').strip()}; run it again")
    run = store.read_json(STEERING.path(folder) / store.RUN)
    experiment = _of(Experiment, run["config"], str(folder))
    read = VECTORS.path(folder)
    results = read_results(experiment, folder)
    vectors = {
        (role, label): VECTORS.load(read, role, label)
        for role in experiment.roles
        for label in results.vectors["labels"]
        if VECTORS.has(read, role, label)
    }
    pairs = pair_annotations(TRACES.read(TRACES.path(folder)), ANNOTATIONS.read(ANNOTATIONS.path(folder)))
    claims = {claim["name"]: claim for claim in REPORT.read_claims(REPORT.path(folder))}
    return FinishedRun(folder, experiment, results, vectors, pairs, claims)


def _of(kind: type, values: Mapping[str, Any], where: str) -> Any:
    """A spec out of JSON values; fields that came later have their defaults.

    Raises:
      ValueError: a field is not known any more.
    """
    types = typing.get_type_hints(kind)
    if unknown := sorted(values.keys() - types.keys()):
        raise ValueError(f"{where}: its config has the field {unknown[0]!r}, which this version does not know")
    made: dict[str, Any] = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(types[name]):
            made[name] = _of(types[name], value, where)  # pyright: ignore[reportArgumentType]
        else:
            made[name] = tuple(value) if isinstance(value, list) else value
    return kind(**made)
