"""Sweeps of the experiment's vector over offsets (Fig. 2) and layers (Fig. B.1), and of every kind over layers."""

from collections.abc import Callable, Sequence

from backtrack_jax.analysis import cells
from backtrack_jax.analysis.base import Analysis
from backtrack_jax.analysis.plots import Heat, Panel, Plot, line_of
from backtrack_jax.analysis.results import PAPER_LABEL, Cell, Results
from backtrack_jax.data.records import UNSTEERED, window_name


class Grids(Analysis):
    """Heat maps of the table of rates; it has no table of its own."""

    name = "grids"

    def plots(self, r: Results) -> Sequence[Plot | None]:
        """Fig. 2 and Fig. B.1, and every kind at every layer where there are several."""
        return [offsets(r), layers(r), kinds_by_layer(r)]

    def reference(self, r: Results) -> dict[str, str]:
        """The best offset and the best layers."""
        return best_places(r) if r.label == PAPER_LABEL else {}


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
