"""Everything that figures, summary and page are made from, read once from the stages' folders."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from backtrack_jax.analysis import replies
from backtrack_jax.config import Experiment
from backtrack_jax.data.records import UNSTEERED, window_name
from backtrack_jax.files import store, tables
from backtrack_jax.stages.analysis import ANALYSIS
from backtrack_jax.stages.annotations import ANNOTATIONS
from backtrack_jax.stages.steering import STEERING
from backtrack_jax.stages.vectors import VECTORS

Rows = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Results:
    """Results of a run.

    Attributes:
      experiment: what was asked for.
      vectors: summary.json of stage 3: labels, windows read, mean residual norms, cosines.
      tables: name of a table of stage 5 without its suffix -> rows; those of single models are joined.
      projections: role -> tokens of a few traces with their projections.
      generations: lines of generations.jsonl.
      annotations: summary of the annotations, as text.
      environment: versions, device and revision of the run.
    """

    experiment: Experiment
    vectors: dict[str, Any]
    tables: dict[str, Rows]
    projections: dict[str, dict[str, Any]]
    generations: Rows
    annotations: str
    environment: dict[str, Any]

    @property
    def window(self) -> str:
        """The experiment's window as it stands in tables."""
        return window_name(self.experiment.vectors.window)

    @property
    def roles(self) -> list[str]:
        """Models that take part, the base model first."""
        return [role for role in ("base", "reasoning") if role in self.experiment.roles]

    @property
    def author(self) -> str:
        """Role of the model that writes the traces, on which most sweeps are made."""
        return self.experiment.author

    def mean_norm(self, role: str, layer: int) -> float:
        """Mean norm of the residual stream of a model at a layer, over reply tokens."""
        return self.vectors[role]["mean_norm"][layer]

    def cells(self, target: str, kind: str, source: str, **others: Any) -> Rows:
        """Rows of rates.csv of one curve by rising magnitude, from the unsteered cell on.

        Cells that only a grid (Fig. 2, B.1) asked for, on fewer problems than the rest of the curve, are left out.
        """
        wanted = {"layer": self.experiment.steering.main_layer, "window": self.window if source else ""} | others
        steered = [
            row
            for row in self.tables["rates"]
            if (row["target"], row["kind"], row["source"]) == (target, kind, source)
            and all(row[name] == value for name, value in wanted.items())
        ]
        most = max((row["n_problems"] for row in steered), default=0)
        found = [row for row in self.tables["rates"] if row["target"] == target and row["kind"] == UNSTEERED]
        found = [row for row in found if row["n_problems"] >= most]
        found += [row for row in steered if row["n_problems"] == most]
        return sorted(found, key=lambda row: row["magnitude"])

    def offset_cells(self) -> Rows:
        """Cells of Fig. 2 with the unsteered one, all over the same problems."""
        e = self.experiment
        windows = {window_name(e.vectors.window_at(offset)) for offset in e.steering.offsets}
        return self._grid(
            lambda row: (
                row["source"] == self.author and row["layer"] == e.steering.main_layer and row["window"] in windows
            )
        )

    def layer_cells(self) -> Rows:
        """Cells of Fig. B.1 with the unsteered one, all over the same problems."""
        layers = self.experiment.steering.layers
        return self._grid(lambda row: row["window"] == self.window and row["layer"] in layers)

    def _grid(self, chosen: Callable[[dict[str, Any]], bool]) -> Rows:
        e, s = self.experiment, self.experiment.steering
        magnitudes = s.grid_magnitudes or s.magnitudes
        return self.on_shared_problems(
            [
                row
                for row in self.tables["rates"]
                if row["target"] == self.author
                and (
                    row["kind"] == UNSTEERED
                    or (row["kind"] == e.vectors.label and row["magnitude"] in magnitudes and chosen(row))
                )
            ]
        )

    def on_shared_problems(self, cells: Rows) -> Rows:
        """The cells over the problems that all of them have, measured anew where some have more than others."""
        if len({cell["n_problems"] for cell in cells}) < 2:
            return cells
        members = replies.by_cell(self.tables["replies"])
        of_cell = [members[tuple(cell[name] for name in replies.CELL)] for cell in cells]
        shared = set.intersection(*({row["problem_id"] for row in rows} for rows in of_cell))
        kept = [row for rows in of_cell for row in rows if row["problem_id"] in shared]
        return replies.summarise(kept, seed=self.experiment.seed)

    def beside_unsteered(self, cell: dict[str, Any]) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        """The unsteered cell of the same model, if it was sampled, and the cell, over the problems that both have."""
        plain = self.unsteered(cell["target"])
        both = self.on_shared_problems([plain, cell] if plain else [cell])
        return (both[0] if plain else None), both[-1]

    @property
    def n_problems(self) -> int:
        """Problems that the models were steered on; a grid may have taken fewer of them."""
        return len({line["problem_id"] for line in self.generations})

    def unsteered(self, target: str) -> dict[str, Any] | None:
        """The unsteered cell of a model, if it was sampled."""
        return next((r for r in self.tables["rates"] if r["target"] == target and r["kind"] == UNSTEERED), None)


def read(experiment: Experiment, workdir: Path) -> Results:
    """Reads the results of stages 2 to 5."""
    analysis = ANALYSIS.path(workdir)
    joined: dict[str, Rows] = {}
    for path in sorted(analysis.glob("*.csv")):
        joined.setdefault(path.stem.split(".")[-1], []).extend(tables.read(path))
    described = store.read_json(STEERING.path(workdir) / "run.json")
    return Results(
        experiment,
        VECTORS.read_summary(VECTORS.path(workdir)),
        joined,
        {role: json.loads((analysis / f"{role}.projections.json").read_text()) for role in experiment.roles},
        [reply.line() for reply in STEERING.read(STEERING.path(workdir))],
        ANNOTATIONS.read_summary(ANNOTATIONS.path(workdir)),
        {name: described[name] for name in ("versions", "device", "git_revision")},
    )
