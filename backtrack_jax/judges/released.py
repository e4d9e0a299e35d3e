"""The labels that came with the traces: chains in the released format, which GPT-4o labelled."""

from collections.abc import Mapping, Sequence

from backtrack_jax.config import Experiment
from backtrack_jax.data.annotations import align
from backtrack_jax.data.records import LABELS, Annotation, Trace
from backtrack_jax.judges.base import RELEASED, Judge


class ReleasedJudge(Judge):
    """Places the labels that came with the traces in their text."""

    name = RELEASED
    labels = LABELS
    reads_text = False
    on_replies = False

    def faults(self, e: Experiment) -> list[str]:
        """Traces that are sampled."""
        if e.traces.path:
            return []
        return ["annotations.judge='released' needs traces.path: sampled traces come without labels"]

    def annotate(self, e: Experiment, traces: Sequence[Trace]) -> list[Annotation]:
        """Refuses traces that came without labels: ValueError."""
        raise ValueError(f"annotations.judge='released', but {e.traces.path} holds traces without labels")

    def annotate_labelled(
        self, e: Experiment, traces: Sequence[Trace], came_with: Mapping[str, str]
    ) -> list[Annotation]:
        """Places the labels; what could not be placed is a rejection."""
        return [align(trace, came_with[trace.id]) for trace in traces]


JUDGE = ReleasedJudge()
