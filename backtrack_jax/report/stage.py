"""Stage 6: figures, summary and page.

report.html, summary.md; every figure as .png, .pdf and .csv
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from backtrack_jax.config import Experiment
from backtrack_jax.files import store
from backtrack_jax.files.console import say
from backtrack_jax.report import figures, page, results, static, summary, tokens
from backtrack_jax.stages import estimates
from backtrack_jax.stages.base import Context, Stage

_PAGE, _SUMMARY = "report.html", "summary.md"


class ReportStage(Stage):
    """Every figure as PNG, PDF and CSV, the summary, and the page."""

    name = "6-report"
    page = _PAGE

    def inputs(self, e: Experiment) -> dict[str, Any]:
        """The run's name, which is the title."""
        return {"name": e.name}

    def plan(self, context: Context) -> list[str]:
        """How much is drawn."""
        rows = sum(estimates.steered_rows(context.experiment).values())
        return [f"figures, summary and page from the tables of {rows} replies; no model is held"]

    def run(self, context: Context, folder: Path) -> None:
        """Draws and writes."""
        r = results.read(context.experiment, context.workdir)
        plots = figures.all_figures(r)
        for plot in plots:
            static.write(plot, folder)
        _draw_traces(r, folder)
        store.write_text(folder / _SUMMARY, summary.markdown(r))
        store.write_text(folder / _PAGE, page.render(r, plots))
        self.mark_stale(folder, "")
        say("\n".join(f"  {sentence}" for sentence in summary.sentences(r)))

    def mark_stale(self, folder: Path, reason: str) -> None:
        """Puts the reason where the page looks for it and shows it; an empty file where the page is current."""
        store.write_text(folder / page.STALE, f"window.staleReason = {json.dumps(reason)};\n" if reason else "")


REPORT = ReportStage()


def _draw_traces(r: results.Results, folder: Path) -> None:
    """Fig. 1 and Fig. 6: the first shown trace, with its windows, and shaded by the projection on the direction."""
    shown = r.projections[r.author]
    label, layer = r.experiment.vectors.label, r.experiment.steering.main_layer
    vector = 0  # the experiment's label, from the base model where it takes part
    at = shown["layers"].index(layer)
    values = [trace["values"][at][vector] for trace in shown["traces"]]
    trace = shown["traces"][0]
    written = tokens.tokens(trace, values[0], label)
    about = f"Reply {trace['id']}, read by the {r.author} model."
    tokens.write(
        written,
        label,
        folder / "fig1_trace",
        "Fig. 1: what is read",
        f"{about} Green: tokens of the read window {r.window}; red: first token of a {label} section.",
        None,
    )
    scale = 2.5 * float(np.sqrt(np.mean(np.square(np.concatenate(values)))))
    source = shown["vectors"][vector]["source"]
    tokens.write(
        written,
        label,
        folder / "fig6_projection",
        "Fig. 6: projection on the direction",
        f"{about} Shade: projection of the centred layer-{layer} activation on the {source}-derived {label} vector, "
        f"deepest at {scale:.3g}. Framed: Wait, Hmm (black), other starts of {label} sections (red).",
        scale or 1.0,
    )
