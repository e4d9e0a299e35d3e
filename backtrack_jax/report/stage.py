"""Stage 6: figures, summary and page.

report.html, summary.md; claims.json: the paper's claims with their verdicts; every figure as .png, .pdf and .csv
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from backtrack_jax import labelling
from backtrack_jax.analysis import projections
from backtrack_jax.analysis.base import Analysis, asked
from backtrack_jax.analysis.plots import Plot
from backtrack_jax.analysis.registry import ANALYSES
from backtrack_jax.analysis.results import Results
from backtrack_jax.config import Experiment
from backtrack_jax.files import store, tables
from backtrack_jax.files.console import say
from backtrack_jax.files.paths import shown_fields
from backtrack_jax.files.tables import Table
from backtrack_jax.report import claims, page, static, summary, trace_figures
from backtrack_jax.stages import estimates
from backtrack_jax.stages.analysis import ANALYSIS
from backtrack_jax.stages.annotations import ANNOTATIONS
from backtrack_jax.stages.base import Context, Stage
from backtrack_jax.stages.steering import STEERING
from backtrack_jax.stages.vectors import VECTORS

_PAGE, _SUMMARY, _CLAIMS = "report.html", "summary.md", "claims.json"


class ReportStage(Stage):
    """Every figure as PNG, PDF and CSV, the summary, and the page."""

    name = "6-report"
    page = _PAGE

    def __init__(self, analyses: Sequence[Analysis] = ANALYSES):
        """Takes the analyses whose plots and sentences are shown."""
        self.analyses = tuple(analyses)

    def inputs(self, e: Experiment) -> dict[str, Any]:
        """The run's name, which is the title."""
        return {"name": e.name}

    def plan(self, context: Context) -> list[str]:
        """How much is drawn."""
        rows = sum(estimates.steered_rows(context.experiment).values())
        return [f"figures, summary and page from the tables of {rows} replies; no model is held"]

    def run(self, context: Context, folder: Path) -> None:
        """Draws and writes."""
        r = read_results(context.experiment, context.workdir)
        plots = all_plots(r, self.analyses)
        for plot in plots:
            static.write(plot, folder)
        trace_figures.write_figures(r, folder)
        found = claims.claims(r, self.analyses)
        store.write_text(folder / _CLAIMS, claims.as_json(r, found))
        store.write_text(folder / _SUMMARY, summary.markdown(r, self.analyses))
        store.write_text(folder / _PAGE, page.render(r, plots, self.analyses))
        self.mark_stale(folder, "")
        said = [*summary.sentences(r, self.analyses), *(f"{claim.verdict}: {claim.title}" for claim in found)]
        say("\n".join(f"  {text}" for text in said))

    def mark_stale(self, folder: Path, reason: str) -> None:
        """Puts the reason where the page looks for it and shows it; an empty file where the page is current."""
        store.write_text(folder / page.STALE, f"window.staleReason = {json.dumps(reason)};\n" if reason else "")

    def read_claims(self, folder: Path) -> list[dict[str, Any]]:
        """The lines of claims.json in its folder; none where the report was not made."""
        path = folder / _CLAIMS
        return store.read_json(path)["claims"] if path.exists() else []


REPORT = ReportStage()


def read_results(experiment: Experiment, workdir: Path) -> Results:
    """Reads the results of stages 2 to 5."""
    analysis = ANALYSIS.path(workdir)
    joined: dict[str, Table] = {}
    for path in sorted(analysis.glob("*.csv")):
        joined.setdefault(path.stem.split(".")[-1], []).extend(tables.read(path))
    described = store.read_json(STEERING.path(workdir) / store.RUN)
    judge = labelling.judge_of_replies(experiment)
    return Results(
        shown_fields(experiment),
        VECTORS.read_summary(VECTORS.path(workdir)),
        joined,
        {role: projections.read(analysis, role) for role in experiment.roles},
        STEERING.read(STEERING.path(workdir)),
        ANNOTATIONS.read_summary(ANNOTATIONS.path(workdir)),
        {name: described[name] for name in ("versions", "device", "git_revision")},
        judge.title(experiment) if judge else "",
    )


def all_plots(r: Results, analyses: Sequence[Analysis] = ANALYSES) -> list[Plot]:
    """Every figure that the results give: the paper's in its order, then the others in that of the analyses."""
    plots = [plot for analysis in asked(analyses, r.experiment) for plot in analysis.plots(r) if plot is not None]
    return sorted(plots, key=lambda plot: plot.place)
