"""The steering sweep as a table and a figure: backtracking rate against magnitude (Fig. 3 and 4 of the paper)."""

import csv
import io
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

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
# Okabe and Ito's colours, told apart with any colour vision, without the yellow that is lost on white. The colour (and
# beyond seven kinds, the marker) tells the kind, the line style the source.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^")
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
        return [{k: v if k in _TEXT else _number(v) for k, v in row.items()} for row in csv.DictReader(file)]


def _number(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        return float(text)


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
    targets, spec = experiment.roles, experiment.steering
    # A figure of its own, not pyplot's: no window system is looked for, nothing is kept after it is written.
    figure = Figure(figsize=(3.6 + 4.2 * len(targets), 5.6), layout="constrained")
    axes = figure.subplots(2, len(targets), sharex=True, sharey="row", squeeze=False, height_ratios=(2, 1))
    for column, target in enumerate(targets):
        rate, repetition = axes[:, column]
        for (kind, source), cells in curves(rows, target).items():
            label = f"{kind} ({source}-derived)" if source else kind
            _draw_curve(rate, repetition, cells, label, _line(spec.kinds.index(kind), source))
        rate.set_title(f"{target} model")
        norm = summary[target]["mean_norm"][spec.layer]
        repetition.set_xlabel(f"{_UNITS[spec.unit].format(layer=spec.layer)}\n(mean residual norm {norm:.3g})")
    axes[0, 0].set_ylim(-0.02 * axes[0, 0].get_ylim()[1], None)
    axes[1, 0].set_ylim(-0.04, 1.04)
    axes[0, 0].set_ylabel("wait, hmm: % of words\n(95 % interval over problems)")
    axes[1, 0].set_ylabel("repeated 3-grams,\nshare")
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    n_replies, n_problems = ({row[n] for row in rows} for n in ("n_replies", "n_problems"))
    figure.suptitle(
        f"{experiment.name}: layer {spec.layer}, {spec.span} positions; each point {_range(n_replies)} replies to "
        f"{_range(n_problems)} problems",
        fontsize=9,
    )
    for suffix, metadata in (("png", None), ("pdf", {"CreationDate": None})):
        drawn = io.BytesIO()
        figure.savefig(drawn, format=suffix, dpi=160, metadata=metadata)
        store.write_bytes(folder / f"steering.{suffix}", drawn.getbuffer())


def _line(number: int, source: str) -> dict[str, Any]:
    colour, marker = _COLOURS[number % len(_COLOURS)], _MARKERS[number // len(_COLOURS) % len(_MARKERS)]
    return {"color": colour, "linestyle": _STYLES[source], "marker": marker, "ms": 4}


def _range(numbers: Collection[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


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
            "-" if math.isnan(row["low"]) else f"{100 * row['low']:.2f} to {100 * row['high']:.2f}",
            *(f"{row['repeated_3grams']:.2f}", f"{row['n_words']:.0f}", f"{row['n_replies']:.0f}"),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
