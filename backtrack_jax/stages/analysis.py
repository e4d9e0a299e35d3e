"""Stage 5: what the replies, vectors and activations show, as tables."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from backtrack_jax import store
from backtrack_jax.analysis import backtracking
from backtrack_jax.report import steering as steering_report

if TYPE_CHECKING:
    from backtrack_jax.pipeline import Run


def analyse(run: "Run", folder: Path) -> None:
    """Stage 5: backtracking rate (Eq. 1), its interval and the text's coherence, for every condition."""
    cells: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for line in store.read_lines(run.folder("4-steering") / "generations.jsonl"):
        cell = tuple(line[name] for name in steering_report.CELL)
        cells.setdefault(cell, []).append(line)
    rows = [
        dict(zip(steering_report.CELL, cell, strict=True))
        | backtracking.summarise_cell([line["text"] for line in lines], [line["problem_id"] for line in lines])
        for cell, lines in cells.items()
    ]
    store.write_text(folder / "rates.csv", steering_report.to_csv(rows))
