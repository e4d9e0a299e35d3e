"""Stage 6: figures, summary and page."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from backtrack_jax.files import store
from backtrack_jax.files.console import say
from backtrack_jax.report import figures, page, results, static, summary, tokens

if TYPE_CHECKING:
    from backtrack_jax.pipeline import Run


def report(run: "Run", folder: Path) -> None:
    """Stage 6: every figure as PNG, PDF and CSV, `summary.md`, and `report.html`."""
    r = results.read(run.experiment, run.workdir)
    plots = figures.all_figures(r)
    for plot in plots:
        static.write(plot, folder)
    _draw_traces(r, folder)
    text = summary.markdown(r)
    store.write_text(folder / "summary.md", text)
    store.write_text(folder / "report.html", page.render(r, plots))
    say("\n".join(f"  {sentence}" for sentence in summary.sentences(r)))


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
