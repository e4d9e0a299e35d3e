"""Every number of figures, summary and page by its label, against tables in which no two numbers are alike.

Two steps: a description (`Plot`) is that of the tables, and what paper and page draw is the description.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lopsided
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from backtrack_jax.analysis import claims as analysis_claims
from backtrack_jax.analysis import forced, log_odds, rates, statistics
from backtrack_jax.analysis.agreement import judges_table
from backtrack_jax.analysis.plots import Heat, Panel, Plot, Series
from backtrack_jax.analysis.registry import ANALYSES
from backtrack_jax.analysis.results import Results
from backtrack_jax.files import tables
from backtrack_jax.report import claims, interactive, page, reference, static, summary, trace_figures
from backtrack_jax.report.stage import all_plots, read_results

ROLES = ("base", "reasoning")
OWN, LAYER, MAGNITUDES = "-5..-2", 2, (-0.3, 0.0, 0.9)
Values = Mapping[Any, tuple[float, ...]]


@pytest.fixture(scope="module")
def r(lopsided_run: Path) -> Results:
    """The lopsided run, with other rates: every cell and measure has a value and an interval of its own."""
    made = read_results(lopsided.get_config(), lopsided_run / "results" / "lopsided")
    rng = np.random.default_rng(0)
    changed = []
    for row in made.tables["rates"]:
        new = dict(row) | {"n_problems": 5}  # all on the same problems, or grids would count them anew
        for name in (name for name in row if f"{name}_low" in row or name == "rate"):
            value, below, above = rng.uniform(0.1, 0.9), rng.uniform(0.01, 0.05), rng.uniform(0.05, 0.1)
            ends = ("low", "high") if name == "rate" else (f"{name}_low", f"{name}_high")
            new |= {name: value, ends[0]: value - below, ends[1]: value + above}
        changed.append(new | {"judge_rate": math.nan})
    windows = [row | {"read": row["read"] + 100 * (row["role"] == "base")} for row in made.tables["windows"]]
    for counts in made.vectors["base"]["windows"].values():  # or both models would have read the same
        counts["read"] += 100
    return dataclasses.replace(made, tables=made.tables | {"rates": changed, "windows": windows})


@pytest.fixture(scope="module")
def plots(r: Results) -> dict[str, Plot]:
    return {plot.name: plot for plot in all_plots(r)}


def test_figures_are_in_order_and_models_in_their_place(r: Results, plots: dict[str, Plot]) -> None:
    order = ("fig2_offsets", "fig3_pairs", "log_odds", "cosine_by_layer", "fig4_baselines", "fig5_logit_lens", "probe")
    others = ("figB1_layers", "metrics", "effects", "norms", "label_cosines", "reliability")
    assert tuple(plots) == (*order, *others)
    assert {role: r.projections[role]["role"] for role in ROLES} == {role: role for role in ROLES}


def cell(r: Results, **fields: Any) -> dict[str, Any]:
    """The one cell with these values."""
    (found,) = (row for row in r.tables["rates"] if fields.items() <= row.items())
    return found


def steered(
    r: Results, target: str, kind: str, source: str, magnitude: float, layer: int = LAYER, window: str = OWN
) -> dict[str, Any]:
    if magnitude == 0:
        return cell(r, target=target, kind="unsteered")
    window = window if source else ""
    return cell(r, target=target, kind=kind, source=source, magnitude=magnitude, layer=layer, window=window)


def curves(panel: Panel) -> dict[str, Values]:
    """Label -> x -> y, and ends of its interval if it has them; labels are unlike."""
    assert len({series.label for series in panel.series}) == len(panel.series)
    return {s.label: points(s) for s in panel.series}


def points(s: Series) -> Values:
    ends = [s.low, s.high] if len(s.low) else []
    return dict(zip(s.x, zip(s.y, *ends, strict=True), strict=True))


def close(found: Mapping[str, Values], expected: Mapping[str, Values], *, shift: float = 0.0) -> None:
    """The same curves, point by point; x may be moved aside by less than `shift`."""
    assert list(found) == list(expected)
    for label, values in expected.items():
        assert len(found[label]) == len(values)
        for (x, y), (own_x, own) in zip(sorted(values.items()), sorted(found[label].items()), strict=True):
            assert own_x == pytest.approx(x, abs=shift or 1e-9), label
            assert own == pytest.approx(y, nan_ok=True), (label, x)


def of_cell(row: dict[str, Any], measure: str, factor: float) -> tuple[float, float, float]:
    prefix = "" if measure == "rate" else f"{measure}_"
    return factor * row[measure], factor * row[f"{prefix}low"], factor * row[f"{prefix}high"]


MEASURES = (("rate", 100), ("log_likelihood", 1), ("repeated_3grams", 100))


def test_pairs_and_baselines(r: Results, plots: dict[str, Plot]) -> None:
    """Fig. 3 and Fig. 4."""
    for row, (measure, factor) in zip(plots["fig3_pairs"].panels, MEASURES, strict=True):
        for target, panel in zip(ROLES, row, strict=True):
            expected = {
                f"{source}-derived vector": {
                    m: of_cell(steered(r, target, "backtracking", source, m), measure, factor) for m in MAGNITUDES
                }
                for source in ROLES
            }
            close(curves(panel), expected)
            assert panel.title == (f"{target} model" if measure == "rate" else "")
            assert f"{r.vectors[target]['mean_norm'][LAYER]:.3g}" in panel.x_label
    for (panel,), (measure, factor) in zip(plots["fig4_baselines"].panels, MEASURES, strict=True):
        kinds = {"backtracking": "reasoning", "deduction": "reasoning", "noise": ""}
        expected = {
            kind: {m: of_cell(steered(r, "reasoning", kind, source, m), measure, factor) for m in MAGNITUDES}
            for kind, source in kinds.items()
        }
        close(curves(panel), expected, shift=0.05)


def heat_of(heat: Heat | None) -> dict[tuple[str, str], float]:
    assert heat is not None
    return {(row, column): heat.values[i][j] for i, row in enumerate(heat.y) for j, column in enumerate(heat.x)}


def test_grids(r: Results, plots: dict[str, Plot]) -> None:
    """Fig. 2 and Fig. B.1, with the unsteered cell where the magnitude is 0."""
    e = dataclasses.replace(
        r.experiment, steering=dataclasses.replace(r.experiment.steering, grid_magnitudes=(0.9, 0.0), offsets=(0,))
    )
    plots = {plot.name: plot for plot in all_plots(dataclasses.replace(r, experiment=e))}
    author, label = "reasoning", "backtracking"
    for panel, (measure, factor) in zip(plots["fig2_offsets"].panels[0], MEASURES[:2], strict=True):
        at_zero = steered(r, author, label, author, 0.9, window="-1..0")
        plain = steered(r, author, label, author, 0)
        expected = {("0", "0.9"): factor * at_zero[measure], ("0", "0"): factor * plain[measure]}
        assert heat_of(panel.heat) == pytest.approx(expected)
    for row, source in zip(plots["figB1_layers"].panels, ROLES, strict=True):
        for panel, (measure, factor) in zip(row, MEASURES[:2], strict=True):
            expected = {
                (str(layer), f"{m:g}"): factor * steered(r, author, label, source, m, layer)[measure]
                for layer in (1, 2)
                for m in (0.9, 0)
            }
            assert panel.title == f"{source}-derived" and heat_of(panel.heat) == pytest.approx(expected)


def test_variants_and_effects(r: Results, plots: dict[str, Plot]) -> None:
    names = {
        "words of the reply (Eq. 1)": "rate",
        "substrings, prompt + reply (released)": "substring_rate",
        "keyword tokens": "token_rate",
        "sentences with a keyword": "sentence_rate",
        "sentences that backtrack, by a judge": "judge_rate",
    }
    judged = [row | {"judge_rate": 0.3 + 0.1 * row["rate"]} for row in r.tables["rates"]]
    other = dataclasses.replace(r, judge="a judge", tables=r.tables | {"rates": judged})
    plot = rates.metrics(other)
    assert plot is not None
    found = {**curves(plot.panels[0][0]), **curves(plot.panels[0][1])}
    expected = {
        text: {m: of_cell(steered(other, "reasoning", "backtracking", "reasoning", m), name, 100) for m in MAGNITUDES}
        for text, name in names.items()
    }
    close(found, expected)
    assert [len(panel.series) for panel in plot.panels[0]] == [3, 2]
    (panel,) = plots["effects"].panels[0]
    for source, series in zip(ROLES, panel.series, strict=True):
        own = [
            row
            for row in r.tables["effects"]
            if (row["target"], row["kind"], row["source"], row["layer"]) == ("reasoning", "backtracking", source, LAYER)
            if row["window"] == OWN
        ]
        assert series.label == f"{source}-derived vector" and len(own) > 5
        assert list(series.y) == [100 * row["effect"] for row in own]
        assert all(abs(x - row["magnitude"]) < 0.6 for x, row in zip(series.x, own, strict=True))


def test_log_odds_by_magnitude(r: Results, plots: dict[str, Plot]) -> None:
    titles = [
        f"{target} model on {text}" for text in (forced.REASONING_TRACES, forced.BASE_REPLIES) for target in ROLES
    ]
    panels = [panel for row in plots["log_odds"].panels for panel in row]
    assert [panel.title for panel in panels] == titles[: len(panels)] and len(panels) >= 2
    for panel in panels:
        target, _, text = panel.title.partition(" model on ")
        own = [row for row in r.tables["log_odds"] if (row["target"], row["text"]) == (target, text)]
        plain = {row["problem_id"]: row["log_odds"] for row in own if row["kind"] == "unsteered"}
        for label, values in curves(panel).items():
            kind, source = (label, "") if label == "noise" else ("backtracking", label.removesuffix("-derived vector"))
            for magnitude, (y, low, high) in values.items():
                changes = [
                    row["log_odds"] - plain[row["problem_id"]]
                    for row in own
                    if (row["kind"], row["source"], row["magnitude"], row["layer"]) == (kind, source, magnitude, LAYER)
                    if row["window"] in ("", OWN) and math.isfinite(row["log_odds"])
                ]
                if magnitude:
                    ends = statistics.mean_interval(changes, np.ones(len(changes)))
                    assert (y, low, high) == pytest.approx((np.mean(changes), *ends))
    assert list(curves(panels[1])) == ["base-derived vector", "reasoning-derived vector", "noise"]


def test_vectors(r: Results, plots: dict[str, Plot]) -> None:
    """Cosines, norms, reliability and lens."""
    line = {(row["label"], row["layer"]): row for row in r.tables["similarity"]}
    labels = r.labels(r.tables["similarity"])
    by_layer, own, at_layer = plots["cosine_by_layer"].panels[0]
    close(curves(by_layer), {label: {layer: (line[label, layer]["cosine"],) for layer in range(3)} for label in labels})
    kinds = {
        "as read": ("cosine", "low", "high"),
        "corrected (c*)": ("corrected", "corrected_low", "corrected_high"),
        "shuffled within traces": ("shuffled", "shuffled_low", "shuffled_high"),
    }
    of_layers = {
        text: {layer: tuple(line["backtracking", layer][c] for c in cs) for layer in (0, 2)}
        for text, cs in kinds.items()
    }
    close(curves(own), of_layers, shift=0.3)
    of_labels = {
        text: {i: tuple(line[label, LAYER][c] for c in cs) for i, label in enumerate(labels)}
        for text, cs in kinds.items()
    }
    close(curves(at_layer), of_labels, shift=0.3)
    assert list(at_layer.categories) == labels and own.title == "backtracking" and at_layer.title == "layer 2"
    for role, panel in zip(ROLES, plots["norms"].panels[0], strict=True):
        names = {"of the label": f"norm_{role}", "shuffled within traces, 95 % quantile": f"norm_{role}_95"}
        expected = {
            text: {i: (line[label, LAYER][name],) for i, label in enumerate(labels)} for text, name in names.items()
        }
        close(curves(panel), expected, shift=0.2)
        assert panel.title == f"{role}-derived" and list(panel.categories) == labels
    for role, panel in zip(ROLES, plots["label_cosines"].panels[0], strict=True):
        expected = {
            (row["label"], row["other"]): row["cosine"]
            for row in r.tables["label_cosines"]
            if (row["role"], row["layer"]) == (role, LAYER)
        }
        assert panel.title == f"{role}-derived" and heat_of(panel.heat) == pytest.approx(expected)
    (panel,) = plots["reliability"].panels[0]
    names = [name.rpartition(" (")[0] for name in panel.categories]
    expected = {
        f"{role}-derived": {
            names.index(row["label"]): (row["cosine"], row["low"], row["high"])
            for row in r.tables["reliability"]
            if (row["role"], row["layer"]) == (role, LAYER)
        }
        for role in ROLES
    }
    close(curves(panel), expected, shift=0.2)
    read = {
        row["label"]: row["read"] for row in r.tables["windows"] if (row["role"], row["window"]) == ("reasoning", OWN)
    }
    assert list(panel.categories) == [f"{name} ({read[name]})" for name in names] and names[-1] == "shuffled"
    for norm, panel in enumerate(plots["fig5_logit_lens"].panels[0]):
        expected = {
            f"{source}-derived, {head} unembedding": {
                row["layer"]: (row["score"],)
                for row in r.tables["lens"]
                if (row["source"], row["unembedding"], row["final_norm"]) == (source, head, norm)
            }
            for source in ROLES
            for head in ROLES
        }
        close(curves(panel), expected)
        assert ("final norm" in panel.title) == bool(norm)


def test_probe(r: Results, plots: dict[str, Plot]) -> None:
    area, precision = plots["probe"].panels[0]
    lines = [row for row in r.tables["probe"] if row["layer"] == LAYER]
    methods = list(area.categories)
    for panel, columns in ((area, ("auc", "low", "high")), (precision, ("average_precision",))):
        expected = {
            f"{role} model, next {horizon} tokens": {
                methods.index(row["method"]): tuple(row[name] for name in columns)
                for row in lines
                if (row["role"], row["horizon"]) == (role, horizon)
            }
            for role in ROLES
            for horizon in (2, 9)
        }
        close(curves(panel), expected, shift=0.3)
    for horizon in (2, 9):
        own = next(row for row in lines if (row["role"], row["horizon"]) == ("reasoning", horizon))
        share = 100 * own["n_positive"] / own["n_tokens"]
        assert f"{share:.1f} % within {horizon}" in plots["probe"].caption
    one = dataclasses.replace(r.experiment, analysis=dataclasses.replace(r.experiment.analysis, horizons=(9,)))
    # The models' shares are made unlike, as where one of them is shown fewer tokens.
    rows = [
        row | {"n_positive": 1} if row["role"] == "base" else row for row in r.tables["probe"] if row["horizon"] == 9
    ]
    other = dataclasses.replace(r, experiment=one, tables=r.tables | {"probe": rows})
    plot = next(plot for plot in all_plots(other) if plot.name == "probe")
    assert plot.panels[0][1].level == pytest.approx(share / 100) and plot.panels[0][0].level == 0.5


# What is drawn


def axes_of(figure: Figure) -> list[Axes]:
    return [axis for axis in figure.axes if axis.get_visible() and axis.get_label() != "<colorbar>"]


def drawn_curves(axis: Axes) -> dict[str, tuple[Values, Any]]:
    """Label in the legend -> x -> y with its interval, and the colour of the points."""
    found = {}
    handles, labels = axis.get_legend_handles_labels()
    for handle, label in zip(handles, labels, strict=True):
        line: Any = handle.lines[0] if isinstance(handle, ErrorbarContainer) else handle
        x, y = (np.asarray(values, float).tolist() for values in (line.get_xdata(), line.get_ydata()))
        ends: list[list[float]] = []
        if isinstance(handle, ErrorbarContainer):
            ends = [[float(end[1]) for end in segment] for segment in handle.lines[2][0].get_segments()]
        found[label] = ({a: (b, *(ends[i] if ends else ())) for i, (a, b) in enumerate(zip(x, y, strict=True))}, line)
    return found


def test_paper_draws_what_is_described(plots: dict[str, Plot]) -> None:
    for plot in plots.values():
        figure = static.draw(plot)
        panels = [panel for row in plot.panels for panel in row]
        last = plot.panels[-1]
        labels = list(dict.fromkeys(s.label for panel in panels for s in panel.series))
        for legend in figure.legends:
            assert [text.get_text() for text in legend.get_texts()] == labels
        for axis, panel in zip(axes_of(figure), panels, strict=True):
            assert axis.get_title() == panel.title
            assert axis.get_xlabel() in ("", panel.x_label) and axis.get_ylabel() in ("", panel.y_label)
            assert panel not in last or axis.get_xlabel() == panel.x_label
            assert panel not in [row[0] for row in plot.panels] or axis.get_ylabel() == panel.y_label
            if panel.heat:
                check_heat(axis, panel.heat)
                continue
            found = drawn_curves(axis)
            close_to_drawn({label: values for label, (values, _) in found.items()}, curves(panel))
            for s in panel.series:
                assert found[s.label][1].get_color() == s.colour and found[s.label][1].get_marker() == s.marker
            if panel.categories:
                names = [tick.get_text().replace("\n", " ") for tick in axis.get_xticklabels()]
                assert names == [" ".join(name.split()) for name in panel.categories]
                assert list(axis.get_xticks()) == list(range(len(names)))
            level = [np.asarray(line.get_ydata()).tolist() for line in axis.lines if line.get_color() == "0.5"]
            assert level == ([] if panel.level is None else [[panel.level] * 2])


def close_to_drawn(found: Mapping[str, Values], expected: Mapping[str, Values]) -> None:
    """As `close`; an end that is not defined, or on the wrong side, is drawn at the value itself."""
    assert list(found) == list(expected)
    for label, values in expected.items():
        for (x, (y, *ends)), (own_x, (own_y, *own)) in zip(values.items(), found[label].items(), strict=True):
            assert (own_x, own_y) == pytest.approx((x, y), nan_ok=True), label
            if ends and not math.isnan(y):
                low, high = (y if math.isnan(end) else end for end in ends)
                assert own == pytest.approx((min(low, y), max(high, y))), label


def check_heat(axis: Axes, heat: Heat) -> None:
    values = np.ma.MaskedArray(axis.images[0].get_array()).filled(math.nan)
    np.testing.assert_allclose(values, heat.values)
    assert [tick.get_text() for tick in axis.get_xticklabels()] == list(heat.x)
    assert [tick.get_text() for tick in axis.get_yticklabels()] == list(heat.y)
    written = {(round(t.get_position()[1]), round(t.get_position()[0])): float(t.get_text()) for t in axis.texts}
    finite = {at: value for at, value in np.ndenumerate(values) if np.isfinite(value)}
    assert written.keys() == (finite.keys() if len(heat.x) <= 12 else set())
    for at, number in written.items():
        assert number == pytest.approx(finite[at], abs=0.51 if abs(number) > 9 else 0.006)
    bar = axis.images[0].colorbar
    assert bar is not None and bar.ax.get_ylabel() == heat.label


def test_the_page_draws_what_is_described(plots: dict[str, Plot]) -> None:
    for plot in plots.values():
        figure = interactive.figure(plot)
        layout = figure["layout"]
        traces: dict[str, list[dict[str, Any]]] = {}
        for trace in figure["data"]:
            traces.setdefault(trace.get("xaxis", "x").removeprefix("x"), []).append(trace)
        shapes = {shape["yref"].removeprefix("y"): shape for shape in layout.get("shapes", [])}
        titles = [note["text"] for note in layout.get("annotations", [])]
        panels = [panel for row in plot.panels for panel in row]
        assert titles == [panel.title for panel in panels if panel.title]
        columns = max(len(row) for row in plot.panels)
        for r_, row in enumerate(plot.panels):
            for c, panel in enumerate(row):
                number = r_ * columns + c + 1
                key = "" if number == 1 else str(number)
                if panel.heat:
                    (trace,) = traces[key]
                    found = {
                        (y, x): trace["z"][i][j] for i, y in enumerate(trace["y"]) for j, x in enumerate(trace["x"])
                    }
                    assert {k: math.nan if v is None else v for k, v in found.items()} == pytest.approx(
                        heat_of(panel.heat), nan_ok=True
                    )
                    assert trace["colorbar"]["title"]["text"] == panel.heat.label
                    continue
                found_curves = {}
                for trace, series in zip(traces[key], panel.series, strict=True):
                    y = [math.nan if v is None else v for v in trace["y"]]
                    ends = []
                    if "array" in trace.get("error_y", {}):
                        bars = trace["error_y"]
                        ends = [
                            [v - below for v, below in zip(y, bars["arrayminus"], strict=True)],
                            [v + above for v, above in zip(y, bars["array"], strict=True)],
                        ]
                    found_curves[trace["name"]] = dict(zip(trace["x"], zip(y, *ends, strict=True), strict=True))
                    shown = "#808080" if series.colour == "#000000" else series.colour
                    assert trace["marker"]["color"] == shown
                close_to_drawn(found_curves, curves(panel))
                if panel.categories:
                    axis = layout[f"xaxis{key}"]
                    assert axis["ticktext"] == list(panel.categories)
                    assert axis["tickvals"] == list(range(len(panel.categories)))
                assert (key in shapes) == (panel.level is not None)
                if panel.level is not None:
                    assert shapes[key]["y0"] == shapes[key]["y1"] == panel.level


# Summary and page


def markdown_tables(text: str) -> list[list[dict[str, str]]]:
    blocks = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    found = []
    for block in blocks:
        head, _, *rows = [line[2:-2].split(" | ") for line in block.strip().split("\n")]
        found.append([dict(zip(head, row, strict=True)) for row in rows])
    return found


def test_the_summary_says_what_the_tables_hold(r: Results) -> None:
    text = summary.markdown(r, ANALYSES)
    *_, compared, settings, cells = markdown_tables(text)
    assert len(cells) == len(r.tables["rates"])
    for shown, row in zip(cells, r.tables["rates"], strict=True):
        plain = row["kind"] == "unsteered"
        assert shown == {
            "model": row["target"],
            "added": row["kind"],
            "source": row["source"] or "-",
            "layer": "-" if plain else str(row["layer"]),
            "window": row["window"] or "-",
            "magnitude": f"{row['magnitude']:g}",
            "norm added": f"{row['length']:.3g}",
            "rate %": f"{100 * row['rate']:.2f}",
            "interval %": f"{100 * row['low']:.2f} to {100 * row['high']:.2f}",
            "log-likelihood": f"{row['log_likelihood']:.2f}",
            "repetition": f"{row['repeated_3grams']:.2f}",
            "words": str(row["n_words"]),
            "replies": str(row["n_replies"]),
        }
    for role in ROLES:
        (line,) = re.findall(rf"^- {role} model: windows read: (.*)$", text, re.MULTILINE)
        counts = {
            label: (int(read), int(dropped))
            for label, read, dropped in re.findall(r"([\w-]+) (\d+) \((\d+) dropped\)", line)
        }
        own = [row for row in r.tables["windows"] if (row["role"], row["window"]) == (role, OWN)]
        assert counts == {row["label"]: (row["read"], row["dropped"]) for row in own}
        assert line.endswith(f"at layer 2: {r.vectors[role]['mean_norm'][2]:.4g}")
    e, paper = r.experiment, reference.numbers()["settings"]
    run = {row["setting"]: row["run"] for row in settings}
    assert run == {
        **{"base model": "base", "reasoning model": "reasoning", "layers": "3", "labels by": "released"},
        **{"label of the vector": "backtracking", "vector read at layer": "2", "window": "[-5, -2]"},
        **{"contrast": "rest", "estimator": "token_mean", "windows into the prompt": "False"},
        **{"unit of magnitudes": "relative", "span": "all", "new tokens": str(e.steering.max_new_tokens)},
        "problems": str(e.steering.limit),
    }
    assert {row["setting"]: row["paper"] for row in settings} == {name: str(paper[name]) for name in run}
    assert {row["same"] for row in settings if row["setting"] in ("contrast", "window", "unit of magnitudes")} == {"no"}
    assert compared == [
        {name: row[name].replace("|", "\\|") for name in ("where", "what", "paper", "released", "run")}
        for row in reference.comparison(r, ANALYSES)
    ]


def test_the_comparison_is_that_of_the_tables(r: Results) -> None:
    run = {row["what"]: row["run"] for row in reference.comparison(r, ANALYSES)}
    (line,) = (x for x in r.tables["similarity"] if (x["label"], x["layer"]) == ("backtracking", LAYER))
    for role in ROLES:
        said = run[f"norm of the {role}-derived vector"]
        assert said == f"{line[f'norm_{role}']:.3g}; shuffled within traces up to {line[f'norm_{role}_95']:.3g}"
    assert run["cosine of base- and reasoning-derived backtracking vectors"].startswith(
        f"{line['cosine']:.3f} at layer 2"
    )
    lens = {
        x["layer"]: x
        for x in r.tables["lens"]
        if (x["source"], x["unembedding"], x["final_norm"]) == ("base", "base", 0)
    }
    (said,) = (text for what, text in run.items() if what.startswith("mean keyword logit"))
    assert said == f"{lens[2]['score']:.3g} at layer 2, {lens[2]['score']:.3g} at layer 2"
    (said,) = (text for what, text in run.items() if what.startswith("ROC-AUC"))
    key = ("reasoning", LAYER, "base-derived direction", 9)
    (probe,) = (x for x in r.tables["probe"] if (x["role"], x["layer"], x["method"], x["horizon"]) == key)
    assert said == f"{probe['auc']:.3f} ({probe['low']:.3f} to {probe['high']:.3f}), next 9 tokens"
    (said,) = (text for what, text in run.items() if what.startswith("keyword judge"))
    (agreed,) = r.tables["agreement"]
    assert said == " / ".join(f"{100 * agreed[name]:.2f}" for name in ("precision", "recall", "f1")) + " on the traces"


def test_sentences_say_what_the_tables_hold(r: Results) -> None:
    said = " ".join(summary.sentences(r, ANALYSES))
    windows = {row["label"]: row for row in r.tables["windows"] if (row["role"], row["window"]) == ("reasoning", OWN)}
    own, every = windows["backtracking"], windows["all"]
    total = own["read"] + own["dropped"]
    assert f"vector rests on {own['read']} of {total} windows ({every['dropped']} of all were dropped" in said
    at = float(re.findall(r"On given text, at magnitude ([\d.]+)", said)[0])
    for source in ROLES:
        both = log_odds.paired_effects(r, forced.REASONING_TRACES, source, at)
        base, reasoning = both.mean(0)
        assert (
            f"the {source}-derived vector adds {reasoning:.2f} nats to the log-odds of wait or hmm on the reasoning "
            f"model and {base:.2f} on the base model (difference {reasoning - base:.2f}, "
        ) in said
    best, plain = (
        {"judge_rate": x, "log_likelihood": -y, "repeated_3grams": z, "n_judged": n, "n_replies": n + 1}
        for x, y, z, n in ((0.41, 1.5, 0.07, 3), (0.12, 2.25, 0.31, 8))
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rates, "_highest", lambda r: (plain, best))
        assert (
            "calls 41 % of the sentences backtracking (unsteered 12 %); it labelled 3 of 4 replies (unsteered 8 of 9)"
            in rates._by_the_judge(r)
        )
        likely = "is -1.50 nats a token (unsteered -2.25), and 7 % of their 3-grams are repeated (unsteered 31 %)."
        assert rates._coherence(r).endswith(likely)


def test_the_page_says_what_the_tables_hold(r: Results) -> None:
    shown = page._replies(r)
    cells = [row for row in r.tables["rates"] if row["layer"] == LAYER and row["window"] in ("", OWN)]
    assert len(shown["conditions"]) == len(cells)
    for condition, row in zip(shown["conditions"], cells, strict=True):
        name = f"{row['target']} model, unsteered"
        if row["kind"] != "unsteered":
            source = f", {row['source']}-derived" if row["source"] else ""
            name = f"{row['target']} model + {row['magnitude']:g} x {row['kind']}{source}"
        assert condition["name"] == name
        assert condition["numbers"] == (
            f"all {row['n_replies']} replies: {100 * row['rate']:.2f} % wait or hmm, log-likelihood "
            f"{row['log_likelihood']:.2f}, {100 * row['repeated_3grams']:.0f} % repeated 3-grams"
        )
    for problem in shown["problems"]:
        for row, reply in zip(cells, problem["replies"], strict=True):
            (own,) = [
                x
                for x in r.replies
                if x.problem_id == problem["id"] and x.sample == 0
                if dataclasses.asdict(x.condition).items() <= row.items()
            ]
            assert reply == {"text": own.text, "finish_reason": own.finish_reason} and problem["problem"] == own.problem
    left, right = cells[shown["left"]], cells[shown["right"]]
    assert (left["target"], left["kind"]) == ("reasoning", "unsteered")
    own_cells = [
        row for row in cells if (row["target"], row["kind"]) == ("reasoning", "backtracking") and row["magnitude"] > 0
    ]
    assert right is max(own_cells, key=lambda row: row["rate"])
    rendered = page.render(r, all_plots(r), ANALYSES)
    dropped = rendered.partition("<h3>Windows</h3>")[2].partition("</table>")[0]
    own = [row for row in r.tables["windows"] if row["window"] == OWN]
    expected = [tuple(str(row[name]) for name in ("role", "label", "read", "dropped")) for row in own]
    assert re.findall(r"<tr>" + "<td>(.*?)</td>" * 4 + "</tr>", dropped) == expected
    for claim in claims.claims(r, ANALYSES):
        figure = rendered.partition(f'<figure id="figure-{claim.figure}">')[2].partition("</figure>")[0]
        title = claim.title.replace("'", "&#39;")
        assert not claim.figure or f'<p class="verdict {claim.verdict}">{claim.verdict}: {title}</p>' in figure


def test_judges_on_the_page(r: Results) -> None:
    line: dict[str, Any] = {"group": "4", "n_units": 81, "n_reference": 27}
    for n, name in enumerate(("precision", "recall", "f1", "kappa")):
        line |= {name: 0.2 + 0.1 * n, f"{name}_low": 0.11 + 0.1 * n, f"{name}_high": 0.33 + 0.1 * n}
    e = dataclasses.replace(r.experiment, analysis=dataclasses.replace(r.experiment.analysis, judge="grammar"))
    tables_ = {"agreement": [], "judge_agreement": [line]}
    (shown,) = judges_table(dataclasses.replace(r, experiment=e, tables=tables_))
    assert shown == {
        **{"judge": "grammar", "of": "replies, by magnitude", "group": "4", "n_units": "81", "n_reference": "27"},
        **{
            "precision": "20 (11 to 33)",
            "recall": "30 (21 to 43)",
            "f1": "40 (31 to 53)",
            "kappa": "0.50 (0.41 to 0.63)",
        },
    }


def test_claims_are_told_with_their_numbers(r: Results) -> None:
    made = [
        analysis_claims.Claim(
            *(f"n{i}", f"title {i}", "probe", f"where {i}", f"rule {i}"),
            *(1.5 + i, 0.25 + i, 2.5 + i),
            *(f"unit {i}", verdict, 0.125 + i, 80 + i, f"note {i}"),
        )
        for i, verdict in enumerate(("holds", "fails", "fails", "undecided", "undecided", "undecided"))
    ]
    assert claims.tally(made).startswith("6 claims: 1 hold, 2 fail, 3 undecided. A claim holds if the 92 % interval")
    for i, (claim, row, shown) in enumerate(zip(made, claims.table(made), claims.columns(made), strict=True)):
        assert row == {
            **{"claim": f"title {i}", "where": f"where {i}", "verdict": claim.verdict, "rule": f"rule {i}"},
            **{"estimate": f"{1.5 + i:.3g} ({0.25 + i:.3g} to {2.5 + i:.3g}) unit {i}", "seen": f"{0.125 + i:.3g}"},
            **{"n": str(80 + i), "note": f"note {i}", "figure": "probe"},
        }
        heads = {"claim": "claim", "where": "where", "verdict": "verdict", "measured (92 % interval)": "estimate"}
        heads |= {"holds if": "rule", "could be seen": "seen", "problems": "n", "note": "note"}
        assert shown == {head: row[name] for head, name in heads.items()}
    written = json.loads(claims.as_json(r, made))
    assert written["claims"] == [dataclasses.asdict(claim) for claim in made]
    differing = {row["setting"] for row in written["settings that differ"]}
    assert {"window", "contrast", "unit of magnitudes"} < differing and "span" not in differing


def test_the_trace_is_that_of_the_projections(r: Results, tmp_path: Path) -> None:
    """Fig. 1 and Fig. 6: the author's first trace, at the steered layer, on the first direction."""
    shown = r.projections["reasoning"]
    trace = shown["traces"][0]
    assert shown["vectors"][0] == {"source": "base", "label": "backtracking"} and shown["layers"] == [0, 2]
    values = trace["values"][1][0]
    starts = {at: label for label, at in reversed(trace["starts"])}
    trace_figures.write_figures(r, tmp_path)
    for name in ("fig1_trace", "fig6_projection"):
        rows = tables.read(tmp_path / f"{name}.csv")
        assert [row["text"] for row in rows] == trace["tokens"]
        assert [row["projection"] for row in rows] == values
        assert [i for i, row in enumerate(rows) if row["read"]] == trace["read"]
        assert {i: row["label"] for i, row in enumerate(rows) if row["label"]} == starts
    token = trace_figures.Token
    tokens = [token("ab", True, "", 1.0), token("c", False, "backtracking", -1.0), token("d", False, "deduction", 0.0)]
    plain = trace_figures.draw(tokens, "backtracking", "t", "c", None)
    # Read: green; start of the label: red.
    assert grounds(plain) == {0: to_rgba("#7FC97F"), 2: to_rgba("#D55E00")}
    shaded = grounds(trace_figures.draw(tokens, "backtracking", "t", "c", 1.0))
    assert shaded[0][0] > shaded[0][2] and shaded[2][2] > shaded[2][0]  # red along the direction, blue against it


def grounds(figure: Figure) -> dict[int, tuple[float, float, float, float]]:
    """Column of a token -> colour of its ground."""
    boxes = [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle)]
    return {round(box.get_x()): to_rgba(box.get_facecolor()) for box in boxes}
