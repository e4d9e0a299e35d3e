"""What every judge is: it labels the sections of traces and, if asked to, of steered replies.

`labelling` lists the judges, and nothing else needs to know one by name: a new judge is a file with a subclass of
`Judge`, and a line in that list.
"""

import abc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from backtrack_jax.config import Experiment
from backtrack_jax.data import records
from backtrack_jax.data.records import Annotation, Trace
from backtrack_jax.files.paths import local_path

RELEASED = "released"
"""Name of the judge that takes the labels that came with the traces."""

RELEASED_OR = f"{RELEASED}-or-"
"""In front of a judge's name: that judge where the traces came without labels."""


class Judge(abc.ABC):
    """Who labels.

    Attributes:
      name: in a config, and in what labels depend on.
      labels: that it may give; None where it may give any.
      reads_text: whether it labels what it reads, so that it can stand behind `released-or-`.
      on_replies: whether it labels steered replies too, as `analysis.judge`.
      reads_path: whether it reads `annotations.path`.
      paid: whether its labels cost money, so that only a stage may ask for them.
    """

    name: ClassVar[str]
    labels: ClassVar[tuple[str, ...] | None] = None
    reads_text: ClassVar[bool] = True
    on_replies: ClassVar[bool] = True
    reads_path: ClassVar[bool] = False
    paid: ClassVar[bool] = False

    @abc.abstractmethod
    def annotate(self, e: Experiment, traces: Sequence[Trace]) -> list[Annotation]:
        """Labels traces.

        Args:
          e: the experiment, which sets the judge up.
          traces: what is to be labelled, up to `data.text.reasoning_end`.

        Returns:
          An annotation of every trace, in their order.

        Raises:
          ValueError, console.Stopped: says what is wrong and what to do.
        """

    def annotate_labelled(
        self, e: Experiment, traces: Sequence[Trace], came_with: Mapping[str, str]
    ) -> list[Annotation]:
        """Labels traces that came with labels, which only the judge `released` looks at; else as `annotate`.

        Args:
          e: as in `annotate`.
          traces: as in `annotate`.
          came_with: trace id -> its chain with the labels that it came with.
        """
        del came_with
        return self.annotate(e, traces)

    def title(self, e: Experiment) -> str:
        """What figures and tables call it."""
        del e
        return self.name

    def faults(self, e: Experiment) -> list[str]:
        """What is wrong with the fields that set it up: each names the field, its value, and what is accepted."""
        del e
        return []

    def inputs(self, e: Experiment) -> dict[str, Any]:
        """What its labels depend on, as JSON values."""
        del e
        return {}

    def prepare(self, e: Experiment) -> None:
        """Refuses what would stop it, before stages that may take hours."""
        del e

    def plan(self, e: Experiment, traces: Sequence[Trace]) -> list[str]:
        """What labelling traces would take, line by line, first about the judge itself; empty if next to nothing."""
        del e, traces
        return []

    def settle(
        self, e: Experiment, own: dict[str, Any], found: Callable[[Mapping[str, Any]], Path | None], file: str
    ) -> dict[str, Any]:
        """The inputs that hold for labels where more than one set of them may, as `Stage.settle`.

        Args:
          e: the experiment.
          own: inputs of complete labels.
          found: folder of results that are complete under given inputs.
          file: of the annotations in it.
        """
        del e, found, file
        return own


def trace_judge(e: Experiment) -> str:
    """Name of the judge that labels the traces: of `released-or-x`, `released` where they came with labels, else x."""
    name = e.annotations.judge
    if not name.startswith(RELEASED_OR):
        return name
    labelled = e.traces.path and records.is_released(local_path(e.traces.path))
    return RELEASED if labelled else name.removeprefix(RELEASED_OR)
