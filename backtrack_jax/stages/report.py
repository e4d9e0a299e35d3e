"""Stage 6: figures and summary."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from backtrack_jax import store
from backtrack_jax.progress import say
from backtrack_jax.report import steering as steering_report

if TYPE_CHECKING:
    from backtrack_jax.pipeline import Run


def report(run: "Run", folder: Path) -> None:
    """Stage 6: figure and summary."""
    rows = steering_report.read_csv(run.folder("5-analysis") / "rates.csv")
    summary = json.loads((run.folder("3-vectors") / "summary.json").read_text())
    placed = (run.folder("2-annotations") / "summary.txt").read_text()
    steering_report.draw(rows, run.experiment, summary, folder)
    text = steering_report.summarise(rows, run.experiment, summary, placed)
    store.write_text(folder / "summary.md", text)
    say(text)
