"""Labels of the steered replies by `analysis.judge`, which rates and agreement are counted from."""

from collections.abc import Sequence
from pathlib import Path

from backtrack_jax.analysis.base import Analysis, Material
from backtrack_jax.config import Experiment
from backtrack_jax.data.records import Annotation, read_annotations, write_jsonl
from backtrack_jax.files.tables import Table

FILE = "judged.jsonl"


class Judged(Analysis):
    """Asks the judge about every reply."""

    name = "judged"
    settings = ("analysis.judge",)

    def files(self, e: Experiment) -> list[str]:
        """The labels, in the order of the replies, if a judge is asked."""
        return [FILE] if e.analysis.judge else []

    def finish(self, material: Material, folder: Path) -> dict[str, Table]:
        """Asks."""
        assert material.judge is not None
        marks = material.experiment.traces.end_marks
        traces = [reply.trace(n, marks) for n, reply in enumerate(material.replies)]
        write_jsonl(folder / FILE, material.judge(traces))
        return {}


JUDGED = Judged()


def read(material: Material, folder: Path) -> Sequence[Annotation] | None:
    """The labels of all replies; None if no judge was asked."""
    return read_annotations(folder / FILE) if material.judge else None
