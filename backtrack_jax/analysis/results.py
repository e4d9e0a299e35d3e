"""Everything that figures, sentences and the page are made from."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from backtrack_jax.analysis import replies
from backtrack_jax.config import Experiment
from backtrack_jax.data.records import LABELS, UNSTEERED, Condition, Reply, window_name
from backtrack_jax.files.tables import Table

PAPER_LABEL = "backtracking"
"""The label of the vectors that the paper's numbers are about."""

Cell = dict[str, Any]
"""A line of rates.csv."""


@dataclasses.dataclass(frozen=True)
class Results:
    """Results of a run.

    Attributes:
      experiment: what was asked for.
      vectors: summary.json of stage 3: labels, windows read, mean residual norms, cosines.
      tables: name of a table of stage 5 without its suffix -> its lines; those of single models are joined.
      projections: role -> tokens of a few traces with their projections.
      replies: the steered replies.
      annotations: summary of the annotations, as text.
      environment: versions, device and revision of the run.
      judge: who labelled the sentences of replies, as figures name it; empty if nobody did.
    """

    experiment: Experiment
    vectors: dict[str, Any]
    tables: dict[str, Table]
    projections: dict[str, dict[str, Any]]
    replies: Sequence[Reply]
    annotations: str
    environment: dict[str, Any]
    judge: str = ""

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

    @property
    def label(self) -> str:
        """The label of the experiment's vectors."""
        return self.experiment.vectors.label

    @property
    def layer(self) -> int:
        """The layer that figures are about."""
        return self.experiment.steering.main_layer

    @property
    def n_layers(self) -> int:
        """Layers of the models."""
        return len(self.vectors[self.author]["mean_norm"])

    @property
    def n_problems(self) -> int:
        """Problems that the models were steered on; a grid may have taken fewer of them."""
        return len({reply.problem_id for reply in self.replies})

    def mean_norm(self, role: str, layer: int) -> float:
        """Mean norm of the residual stream of a model at a layer, over reply tokens."""
        return self.vectors[role]["mean_norm"][layer]

    def labels(self, table: Table) -> list[str]:
        """Labels that occur in a table: the experiment's first, then the paper's in its order, then any other."""
        found = {line["label"] for line in table}
        return [label for label in dict.fromkeys([self.label, *LABELS, *sorted(found)]) if label in found]

    def probed_layer(self, table: str) -> int | None:
        """The steered layer if a table has it, else the last that it has; None where `vectors.layers` is empty."""
        layers = {line["layer"] for line in self.tables[table]}
        return self.layer if self.layer in layers else max(layers, default=None)

    def unsteered(self, target: str) -> Cell | None:
        """The unsteered cell of a model, if it was sampled."""
        return next((c for c in self.tables["rates"] if c["target"] == target and c["kind"] == UNSTEERED), None)

    def cells(self, target: str, kind: str, source: str, **others: Any) -> list[Cell]:
        """Cells of one curve by rising magnitude, from the unsteered one on.

        Cells that only a grid (Fig. 2, B.1) asked for, on fewer problems than the rest of the curve, are left out.

        Args:
          target: role of the steered model.
          kind: what is added.
          source: role of the model that it comes from; empty where there is none.
          **others: further fields of the condition, in place of the layer that figures are about and of the window.
        """
        wanted = {"layer": self.layer, "window": self.window if source else ""} | others
        steered = [
            cell
            for cell in self.tables["rates"]
            if (cell["target"], cell["kind"], cell["source"]) == (target, kind, source)
            and all(cell[name] == value for name, value in wanted.items())
        ]
        most = max((cell["n_problems"] for cell in steered), default=0)
        found = [cell for cell in self.tables["rates"] if cell["target"] == target and cell["kind"] == UNSTEERED]
        found = [cell for cell in found if cell["n_problems"] >= most]
        found += [cell for cell in steered if cell["n_problems"] == most]
        return sorted(found, key=lambda cell: cell["magnitude"])

    def on_shared_problems(self, cells: Sequence[Cell]) -> list[Cell]:
        """The cells over the problems that all of them have, measured anew where some have more than others."""
        if len({cell["n_problems"] for cell in cells}) < 2:
            return list(cells)
        members = replies.by_cell(self.tables["replies"])
        of_cell = [members[Condition.of(cell)] for cell in cells]
        shared = set.intersection(*({line["problem_id"] for line in lines} for lines in of_cell))
        kept = [line for lines in of_cell for line in lines if line["problem_id"] in shared]
        return replies.summarise(kept)


def extent(lines: Sequence[dict[str, Any]], name: str) -> str:
    """A column's number, or the lowest and the highest of its numbers, as text."""
    values = [line[name] for line in lines]
    return f"{min(values)}" if min(values) == max(values) else f"{min(values)} to {max(values)}"
