"""Sweeps of the experiment's vector over offsets (Fig. 2) and layers (Fig. B.1), and of every kind over layers."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

from backtrack_jax.analysis import cells, dose, replies
from backtrack_jax.analysis.base import Analysis
from backtrack_jax.analysis.claims import Claim, measured
from backtrack_jax.analysis.plots import Heat, Panel, Plot, line_of
from backtrack_jax.analysis.results import PAPER_LABEL, Cell, Results
from backtrack_jax.analysis.statistics import NAN, Region, paired_interval, ratio_interval
from backtrack_jax.data.records import UNSTEERED, Condition, window_name


class Grids(Analysis):
    """Heat maps of the table of rates; it has no table of its own."""

    name = "grids"

    def plots(self, r: Results) -> Sequence[Plot | None]:
        """Fig. 2 and Fig. B.1, and every kind at every layer where there are several."""
        return [offsets(r), layers(r), kinds_by_layer(r)]

    def reference(self, r: Results) -> dict[str, str]:
        """The best offset and the best layers."""
        return best_places(r) if r.label == PAPER_LABEL else {}

    def claims(self, r: Results) -> Sequence[Claim]:
        """That the vector is read before the section, and in the first two thirds of the layers."""
        if r.label != PAPER_LABEL:
            return []
        made = [offset_claim(r), *(layer_claim(r, source) for source in r.roles)]
        return [claim for claim in made if claim]


GRIDS = Grids()


def offset_cells(r: Results) -> list[Cell]:
    """Cells of Fig. 2 with the unsteered one, all over the same problems."""
    windows = _windows(r)
    return _grid(r, lambda c: c["source"] == r.author and c["layer"] == r.layer and c["window"] in windows)


def layer_cells(r: Results) -> list[Cell]:
    """Cells of Fig. B.1 with the unsteered one, all over the same problems."""
    return _grid(r, lambda c: c["window"] == r.window and c["layer"] in r.experiment.steering.layers)


def _windows(r: Results) -> dict[str, int]:
    """Window -> the offset that it is read at."""
    return {window_name(r.experiment.vectors.window_at(offset)): offset for offset in r.experiment.steering.offsets}


def _magnitudes(r: Results) -> Sequence[float]:
    return r.experiment.steering.grid_magnitudes or r.experiment.steering.magnitudes


def _grid(r: Results, chosen: Callable[[Cell], bool]) -> list[Cell]:
    def belongs(cell: Cell) -> bool:
        own = cell["kind"] == r.label and cell["magnitude"] in _magnitudes(r) and chosen(cell)
        return cell["target"] == r.author and (cell["kind"] == UNSTEERED or own)

    return r.on_shared_problems([cell for cell in r.tables["rates"] if belongs(cell)])


def offsets(r: Results) -> Plot | None:
    """Fig. 2: rate by offset of the window and magnitude, reasoning-derived vectors on the reasoning model."""
    e, author, windows = r.experiment, r.author, _windows(r)
    if not windows:
        return None
    found, magnitudes = offset_cells(r), _magnitudes(r)
    panels = [
        Panel(
            "",
            cells.unit_label(r, author),
            "offset from the section's start, tokens" if not i else "",
            heat=Heat(
                [f"{m:g}" for m in magnitudes],
                [str(offset) for offset in windows.values()],
                cells.grid(found, lambda c: c["window"], list(windows), magnitudes, measure, factor),
                y_label,
            ),
        )
        for i, (measure, y_label, factor) in enumerate(cells.MEASURES[:2])
    ]
    first, last = e.vectors.offset_window
    read = "single positions" if first == last == 0 else f"positions offset{first:+d} to offset{last:+d}"
    caption = (
        f"{author}-derived {r.label} vectors read at one offset each ({read}), added to the {author} model; "
        f"layer {r.layer}, span '{e.steering.span}'; {_counted(r, found)}, the same ones in every cell. "
        "Right: mean log-likelihood under the unsteered model."
    )
    return Plot("fig2_offsets", "Fig. 2: offset of the window", caption, [panels], found, place=2)


def _counted(r: Results, found: Sequence[Cell]) -> str:
    return cells.counted([cell for cell in found if cell["magnitude"] in _magnitudes(r)])


def layers(r: Results) -> Plot | None:
    """Fig. B.1: rate by layer and magnitude, for vectors of either model."""
    s = r.experiment.steering
    if not s.layers:
        return None
    found, magnitudes = layer_cells(r), _magnitudes(r)
    panels = []
    for source in r.roles:
        own = [cell for cell in found if cell["source"] in ("", source)]
        panels.append(
            [
                Panel(
                    f"{source}-derived",
                    cells.unit_of_layers(r),
                    "layer" if not i else "",
                    heat=Heat(
                        [f"{m:g}" for m in magnitudes],
                        [str(layer) for layer in s.layers],
                        cells.grid(own, lambda c: c["layer"], s.layers, magnitudes, measure, factor),
                        y_label,
                    ),
                )
                for i, (measure, y_label, factor) in enumerate(cells.MEASURES[:2])
            ]
        )
    norms = [r.mean_norm(r.author, layer) for layer in s.layers]
    caption = (
        f"{r.label} vectors of each layer added at that layer of the {r.author} model, window {r.window}, span "
        f"'{s.span}'; {_counted(r, found)}, the same ones in every cell. Mean residual norms of these layers: "
        f"{min(norms):.3g} to {max(norms):.3g}. Right: mean log-likelihood under the unsteered model."
    )
    return Plot("figB1_layers", "Fig. B.1: layer", caption, panels, found, place=7)


def kinds_by_layer(r: Results) -> Plot | None:
    """Rate against magnitude of every kind at each of the layers that kinds are added at, where there are several."""
    s, author = r.experiment.steering, r.author
    if len(s.kind_layers) < 2:
        return None
    panels, drawn = [], []
    for layer in s.kind_layers:
        series = []
        for number, kind in enumerate(s.kinds):
            of_source = [r.cells(author, kind, source, layer=layer) for source in (author, "")]
            found = next((of for of in of_source if any(cell["kind"] == kind for cell in of)), [])
            series.append(cells.curve(kind, found, "rate", 100, line_of(number, "base")))
            drawn += found
        title = f"layer {layer} (mean residual norm {r.mean_norm(author, layer):.3g})"
        panels.append(Panel(title, cells.unit_of_layers(r, s.kinds), cells.MEASURES[0][1], series, from_zero=True))
    if not drawn:
        return None
    drawn = cells.unique(drawn)
    caption = (
        f"What is done to the {author} model, from its own activations, at one layer each; span '{s.span}', window "
        f"{r.window}; {cells.counted(drawn)}. {cells.RATE_INTERVAL}"
    )
    return Plot("kinds_by_layer", "Kinds by layer", caption, [panels], drawn)


def best_places(r: Results) -> dict[str, str]:
    """Highest rate over offsets, and at offset 0; the layer of the highest rate of either model's vectors."""
    windows = _windows(r)
    swept, by_layer = cells.steered(offset_cells(r)), cells.steered(layer_cells(r))

    def offset(best: Cell) -> str:
        return f"{cells.rate(best)} at offset {windows[best['window']]}, magnitude {best['magnitude']:g}"

    def layer(best: Cell) -> str:
        return f"{best['layer']} of {r.n_layers} ({cells.rate(best)} % of words)"

    asked: dict[str, tuple[list[Cell], Callable[[Cell], str]]] = {
        "best_offset": (swept, offset),
        "offset_zero": ([cell for cell in swept if windows[cell["window"]] == 0], cells.at_magnitude),
    }
    asked |= {f"best_layer_{s}": ([cell for cell in by_layer if cell["source"] == s], layer) for s in r.roles}
    return {key: _best(r, tried, say) for key, (tried, say) in asked.items() if tried}


def _best(r: Results, tried: Sequence[Cell], say: Callable[[Cell], str]) -> str:
    if not any(cell["n_hits"] for cell in tried):
        return f"none: no hit in {sum(cell['n_words'] for cell in tried)} words"
    best = cells.highest(r, tried)
    return say(best.cell) + cells.by_halves(best) if best else cells.TOO_FEW


def offset_claim(r: Results) -> Claim | None:
    """Rate under the vector of the run's own window over that of the vector read where sections start."""
    chosen, e = dose.of_run(r), r.experiment
    if chosen is None or 0 not in e.steering.offsets:
        return None
    windows = [r.window, window_name(e.vectors.window_at(0))]
    sampled = {
        (cell["window"], cell["magnitude"]): cell
        for cell in r.tables["rates"]
        if (cell["target"], cell["kind"], cell["source"]) == (r.author, r.label, r.author) and cell["layer"] == r.layer
    }
    both = [m for m in _magnitudes(r) if m > 0 and all((window, m) in sampled for window in windows)]
    at = max((m for m in both if m <= chosen.cell["magnitude"]), default=min(both, default=None))
    if at is None or windows[0] == windows[1]:
        return None
    of_cell = replies.by_cell(r.tables["replies"])
    counts = replies.shared(of_cell, [Condition.of(sampled[window, at]) for window in windows])
    own, zero = counts.rates
    return measured(
        "offset",
        "The vector works if it is read before the section, not where the section starts.",
        figure="fig2_offsets",
        where="Fig. 2",
        rule=f"rate under the vector read at {windows[0]}, which the config set beforehand, over that under the one "
        f"read at {windows[1]}, at least 1.5, {dose.RULE}",
        estimate=own / zero if zero else float("inf") if own else NAN,
        interval=ratio_interval(counts.hits, counts.words, [1, 0], [0, 1], level=dose.LEVEL),
        unit="times the rate at offset 0",
        region=Region(low=1.5),
        n=len(counts.problems),
        note=f"magnitude {at:g}, layer {r.layer}: {100 * own:.2f} and {100 * zero:.2f} % of words",
    )


def layer_claim(r: Results, source: str) -> Claim | None:
    """Which layers are excluded as the best one, each at the dose of its own.

    A layer at which no magnitude is coherent cannot be compared, and so is not excluded: a smaller one might be.
    """
    plain, found, last = r.unsteered(r.author), layer_cells(r), r.n_layers - 1
    if plain is None or not any(layer >= last * 2 / 3 for layer in r.experiment.steering.layers):
        return None
    of_cell = replies.by_cell(r.tables["replies"])
    doses = []
    for layer in sorted(r.experiment.steering.layers):
        curve = [cell for cell in found if (cell["source"], cell["layer"]) == (source, layer)]
        if (of_layer := dose.choose(of_cell, curve, plain)) and of_layer.coherence.high >= dose.COHERENT:
            doses.append(of_layer.cell)
    if len(doses) < 2:
        return None
    counts = replies.shared(of_cell, [Condition.of(cell) for cell in doses])
    layers = [cell["layer"] for cell in doses]
    best = layers[int(counts.rates.argmax())]
    incoherent = set(r.experiment.steering.layers) - set(layers)
    kept = {layers[number] for number in not_excluded(counts)} | incoherent
    claim = measured(
        f"layer_{source}",
        f"Of {source}-derived vectors those of early and middle layers work best.",
        figure="figB1_layers",
        where="Fig. B.1",
        rule="every layer that is not excluded as the best (another one's rate is higher: paired intervals over "
        "problems, error .05 for all others together) lies below 2/3 of the depth, which is the last layer's number; "
        f"each {dose.RULE}",
        estimate=best / last,
        interval=(min(kept) / last, max(kept) / last),
        unit="share of the depth (interval: layers that are not excluded)",
        region=Region(high=2 / 3),
        n=len(counts.problems),
        note=f"highest rate at layer {best} of {r.n_layers}; compared: {_listed(layers)}; excluded as the best: "
        f"{_listed(set(layers) - kept)}; incoherent at every magnitude: {_listed(incoherent)}",
    )
    return dataclasses.replace(claim, detectable=NAN)


def not_excluded(counts: replies.Counts) -> list[int]:
    """Numbers of the cells that may be the best: of no other one the rate is higher for sure.

    The level of these comparisons is shared among all other cells (Bonferroni), so that the best one is excluded in at
    most one case of twenty.
    """
    numbers = range(len(counts.hits))
    level = 1 - (1 - dose.LEVEL) / (len(numbers) - 1)

    def higher(one: int, other: int) -> bool:
        pair = [one, other]
        return paired_interval(counts.hits[pair], counts.words[pair], [1, -1], level=level)[0] > 0

    return [one for one in numbers if not any(higher(other, one) for other in numbers if other != one)]


def _listed(layers: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(layers))) or "none"
