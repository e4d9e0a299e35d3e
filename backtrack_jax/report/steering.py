"""The steering sweep as a table and a figure: backtracking rate against magnitude (Fig. 3 and 4 of the paper)."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from backtrack_jax import store
from backtrack_jax.conditions import UNSTEERED
from backtrack_jax.config import Experiment

CELL = ("target", "kind", "source", "layer", "magnitude", "length", "unit", "span")
_TEXT = {"target", "kind", "source", "unit", "span"}
_UNITS = {
    "absolute": "norm of what is added",
    "relative": "magnitude, in mean residual norms of layer {layer}",
    "raw": "factor on the difference of means",
}
# Okabe and Ito's colours, told apart with any colour vision; the line style tells the source as well.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
_STYLES = {"base": "-", "reasoning": "--", "": ":"}

Rows = Sequence[Mapping[str, Any]]


def to_csv(rows: Rows) -> str:
    """Rows of one set of columns as CSV text."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def read_csv(path: Path) -> list[dict[str, Any]]:
    """What `to_csv` wrote, numbers as numbers."""
    with path.open(newline="") as file:
        return [{k: v if k in _TEXT else float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def curves(rows: Rows, target: str) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    """(kind, source) -> cells of one steered model by rising magnitude, each starting from the unsteered cell."""
    mine = [row for row in rows if row["target"] == target]
    unsteered = [row for row in mine if row["kind"] == UNSTEERED]
    steered = {(row["kind"], row["source"]): None for row in mine if row["kind"] != UNSTEERED}
    return {
        key: sorted(
            [*unsteered, *(row for row in mine if (row["kind"], row["source"]) == key)],
            key=lambda row: row["magnitude"],
        )
        for key in steered
    }


def draw(rows: Rows, experiment: Experiment, summary: Mapping[str, Any], folder: Path) -> None:
    """Writes `steering.png`, `.pdf` and `.csv`: rate above, repetition below, one column per steered model."""
    store.write_text(folder / "steering.csv", to_csv(rows))
    targets = experiment.roles
    figure, axes = plt.subplots(
        2,
        len(targets),
        figsize=(1.2 + 4.8 * len(targets), 5.6),
        sharex=True,
        sharey="row",
        squeeze=False,
        height_ratios=(2, 1),
        layout="constrained",
    )
    for column, target in enumerate(targets):
        for number, ((kind, source), cells) in enumerate(curves(rows, target).items()):
            label = f"{kind} ({source}-derived)" if source else kind
            line = {"color": _COLOURS[number % len(_COLOURS)], "linestyle": _STYLES[source], "marker": "o", "ms": 4}
            _draw_curve(axes[0, column], axes[1, column], cells, label, line)
        axes[0, column].set_title(f"{target} model" if len(targets) > 1 else experiment.name)
        unit = _UNITS[experiment.steering.unit].format(layer=experiment.steering.layer)
        norm = summary[target]["mean_norm"][experiment.steering.layer]
        axes[1, column].set_xlabel(f"{unit}\n(mean residual norm {norm:.3g})")
        axes[0, column].set_ylim(bottom=0)
        axes[1, column].set_ylim(0, 1)
    axes[0, 0].set_ylabel("wait, hmm: % of words\n(95 % interval over problems)")
    axes[1, 0].set_ylabel("repeated 3-grams,\nshare")
    axes[0, -1].legend(frameon=False, fontsize=8)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
    for suffix in ("png", "pdf"):
        figure.savefig(folder / f"steering.{suffix}", dpi=160)
    plt.close(figure)


def _draw_curve(rate: Axes, repetition: Axes, cells: Rows, label: str, line: Mapping[str, Any]) -> None:
    x = [cell["magnitude"] for cell in cells]
    y = [100 * cell["rate"] for cell in cells]
    below = [max(0.0, 100 * (cell["rate"] - cell["low"])) for cell in cells]
    above = [max(0.0, 100 * (cell["high"] - cell["rate"])) for cell in cells]
    rate.errorbar(x, y, yerr=(below, above), label=label, capsize=2, linewidth=1.4, elinewidth=0.8, **line)
    repetition.plot(x, [cell["repeated_3grams"] for cell in cells], linewidth=1.4, **line)


def summarise(rows: Rows, experiment: Experiment, summary: Mapping[str, Any], placed: str) -> str:
    """The run in Markdown: what was read, what was steered, and what came out."""
    layer = experiment.steering.layer
    lines = [f"# {experiment.name}", "", "## Sections", "", "```", placed.strip(), "```", "", "## Vectors", ""]
    for role in experiment.roles:
        windows = summary[role]["windows"]
        counts = ", ".join(f"{label} {n['read']} ({n['dropped']} dropped)" for label, n in windows.items())
        lines.append(
            f"- {role} model: windows read: {counts}; mean residual norm at layer {layer}: "
            f"{summary[role]['mean_norm'][layer]:.4g}"
        )
    if "cosine" in summary:
        lines.append(
            f"- cosine of the two {experiment.vectors.label} vectors at layer {layer}: {summary['cosine'][layer]:.3f}"
        )
    lines += [
        "",
        "## Steering",
        "",
        f"Layer {layer}, span `{experiment.steering.span}`; magnitude in unit "
        f"`{experiment.steering.unit}`. Rate: share of words in {{wait, hmm}} (Eq. 1), with a 95 % bootstrap "
        "interval over problems. Repetition: mean share of repeated 3-grams.",
        "",
        "| model | added | source | magnitude | norm added | rate % | interval % | repetition | words | replies |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = (
            *(row["target"], row["kind"], row["source"] or "-"),
            *(f"{row['magnitude']:g}", f"{row['length']:.3g}", f"{100 * row['rate']:.2f}"),
            f"{100 * row['low']:.2f} to {100 * row['high']:.2f}",
            *(f"{row['repeated_3grams']:.2f}", f"{row['n_words']:.0f}", f"{row['n_replies']:.0f}"),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
