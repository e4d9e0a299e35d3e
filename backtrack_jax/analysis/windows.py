"""How many windows were read, and how many dropped."""

from collections.abc import Sequence
from pathlib import Path

from backtrack_jax.analysis.base import Analysis, Material
from backtrack_jax.analysis.results import Results
from backtrack_jax.data.records import window_name
from backtrack_jax.files.tables import Table


class Windows(Analysis):
    """Counts of every group of labels and window."""

    name = "windows"
    of_replies = False
    tables = ("windows",)

    def finish(self, material: Material, folder: Path) -> dict[str, Table]:
        """From the sums."""
        lines = [
            {"role": role, "label": label, "window": window_name(window)}
            | {"read": int(sums.read[g, w]), "dropped": int(sums.dropped[g, w])}
            for role, sums in material.sums.items()
            for g, label in enumerate(sums.plan.groups)
            for w, window in enumerate(sums.plan.windows)
        ]
        return {"windows": lines}

    def sentences(self, r: Results) -> Sequence[str]:
        """What the vector of the model that writes the traces rests on."""
        windows = r.vectors[r.author]["windows"]
        own, total = windows[r.label], windows["all"]
        leave = "leave the text or reach its first token" if r.experiment.vectors.into_prompt else "leave the reply"
        return [
            f"The {r.author}-derived vector rests on {own['read']} of {own['read'] + own['dropped']} windows "
            f"({total['dropped']} of all were dropped because they {leave})."
        ]


WINDOWS = Windows()
