"""Figures by their tables: what is drawn, on paper and on the page, is what the CSV beside it says."""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from matplotlib import colors, image
from matplotlib.container import ErrorbarContainer

from backtrack_jax.analysis import cells, grids, plots, probe, rates, reliability, replies
from backtrack_jax.analysis.registry import ANALYSES
from backtrack_jax.analysis.results import Results
from backtrack_jax.files import tables
from backtrack_jax.report import interactive, reference, static, summary, trace_figures
from backtrack_jax.report.stage import all_plots, read_results


@pytest.fixture(scope="module")
def r(tiny_run: Path) -> Results:
    return read_results(tiny.get_config(), tiny_run / "results" / "tiny")


@pytest.fixture(scope="module")
def drawn(r: Results) -> dict[str, plots.Plot]:
    return {plot.name: plot for plot in all_plots(r)}


def test_the_csv_of_every_figure_is_its_table(drawn: dict[str, plots.Plot], tiny_run: Path) -> None:
    for name, plot in drawn.items():
        rows = tables.read(tiny_run / "results" / "tiny" / "6-report" / f"{name}.csv")
        assert json.dumps(rows) == json.dumps(list(plot.rows)) and len(rows) > 1


def test_pairs_are_those_of_the_table(r: Results, drawn: dict[str, plots.Plot]) -> None:
    """Fig. 3: points, intervals, and both measures of coherence, from the unsteered cell on."""
    measures = (("rate", 100), ("log_likelihood", 1), ("repeated_3grams", 100))
    for row, (measure, factor) in zip(drawn["fig3_pairs"].panels, measures, strict=True):
        for target, panel in zip(("base", "reasoning"), row, strict=True):
            assert f"{r.vectors[target]['mean_norm'][1]:.3g}" in panel.x_label
            for source, series in zip(("base", "reasoning"), panel.series, strict=True):
                own = (("unsteered", "", ""), ("backtracking", source, "-5..-2"))
                cells = {
                    row["magnitude"]: row
                    for row in r.tables["rates"]
                    if row["target"] == target and row["layer"] == 1
                    if (row["kind"], row["source"], row["window"]) in own
                }
                assert list(series.x) == sorted(cells) == [-4, 0, 8]
                np.testing.assert_allclose(series.y, [factor * cells[m][measure] for m in series.x])
                if measure == "rate":
                    np.testing.assert_allclose(series.low, [100 * cells[m]["low"] for m in series.x])
                    np.testing.assert_allclose(series.high, [100 * cells[m]["high"] for m in series.x])
                assert source in series.label


def test_grids_are_those_of_the_table(r: Results, drawn: dict[str, plots.Plot]) -> None:
    rate = {
        (c["source"], c["layer"], c["window"], c["magnitude"]): 100 * c["rate"]
        for c in r.tables["rates"]
        if c["target"] == "reasoning" and c["kind"] in ("backtracking", "unsteered")
    }
    plain = rate["", 1, "", 0.0]
    heat = drawn["fig2_offsets"].panels[0][0].heat
    assert heat is not None and (heat.x, heat.y) == (["0", "8"], ["-1", "0"])
    np.testing.assert_allclose(heat.values, [[plain, rate["reasoning", 1, f"{o}..{o}", 8.0]] for o in (-1, 0)])
    for row, source in zip(drawn["figB1_layers"].panels, ("base", "reasoning"), strict=True):
        assert row[0].heat is not None and row[0].heat.y == ["0", "1", "2"]
        expected = [[plain, rate[source, layer, "-5..-2", 8.0]] for layer in range(3)]
        np.testing.assert_allclose(row[0].heat.values, expected)


def test_baselines_are_all_there_at_equal_norm(drawn: dict[str, plots.Plot]) -> None:
    plot = drawn["fig4_baselines"]
    series = plot.panels[0][0].series
    assert [s.label for s in series] == [*tiny.get_config().steering.all_kinds]
    assert {row["length"] for row in plot.rows if row["magnitude"] == 8} == {8.0}
    assert {row["source"] for row in plot.rows} == {"", "reasoning"}
    assert len({(s.colour, s.marker) for s in series}) == len(series)


def changed(r: Results, name: str, rows: list[dict[str, Any]], **steering: Any) -> Results:
    """The results with other rows in a table and another sweep in the config."""
    e = dataclasses.replace(r.experiment, steering=dataclasses.replace(r.experiment.steering, **steering))
    return dataclasses.replace(r, experiment=e, tables=r.tables | {name: rows})


def test_vector_files_of_one_name_are_told_apart(r: Results) -> None:
    files = ("a/mine.npz", "b/mine.npz", "c/other.npz")
    noise = [row for row in r.tables["rates"] if (row["target"], row["kind"]) == ("reasoning", "noise")]
    rows = [*r.tables["rates"], *(row | {"kind": file} for file in files for row in noise)]
    plot = rates.baselines(changed(r, "rates", rows, kinds=files, baselines=()))
    assert plot is not None and "or as a file has them, all of equal norm" in plot.caption
    assert [s.label for s in plot.panels[0][0].series] == ["a/mine.npz", "b/mine.npz", "other.npz"]


def test_what_is_compared_and_counted_is_what_is_drawn(r: Results) -> None:
    """The experiment's own layer is also sampled at other magnitudes, on more problems, for Fig. 3."""
    own = ("reasoning", "backtracking", 1, "-5..-2", 8)
    names = ("target", "kind", "layer", "window", "magnitude")
    more = copied(r)
    rows = [
        row | {"magnitude": 9.0, "hits": row["words"]} if tuple(row[name] for name in names) == own else row
        for row in more.tables["replies"]
    ]  # at no magnitude of the heat map
    moved = changed(changed(more, "replies", rows), "rates", replies.summarise(rows))
    plot = grids.layers(moved)
    assert plot is not None and plot.panels[0][0].heat is not None
    assert f"{cells.counted([dict(c) for c in plot.rows if c['magnitude'] in (0, 8)])}, the same" in plot.caption
    best = {row["what"]: row["run"] for row in reference.comparison(moved, ANALYSES)}
    assert all("100.00 (" not in best[f"best layer, {source}-derived"] for source in ("base", "reasoning"))
    assert (
        "then 100.00 (" in best["base-derived vector on the reasoning model: unsteered, then highest rate, % of words"]
    )


def counting(r: Results, hits: dict[tuple[str, float], tuple[int, int, int]]) -> Results:
    """The results if each reply had 10 words, and so many hits in the cells of one kind, magnitude and problem.

    The first two problems are those of the grids; a negative number of hits takes the replies away.
    """
    rows: list[dict[str, Any]] = [
        {**row, "words": 10, "hits": 0} for row in r.tables["replies"] if row["target"] == "reasoning"
    ]
    few = {row["problem_id"] for row in rows if row["layer"] == 0}
    every = sorted({row["problem_id"] for row in rows}, key=lambda name: (name not in few, name))
    assert (len(few), len(every)) == (2, 3)
    own = [row for row in rows if row["layer"] == 1 and row["window"] in ("", "-5..-2")]
    own = [row for row in own if row["kind"] in ("unsteered", "backtracking")]
    made = [row for row in rows if row not in own]
    for row in own:
        of = hits.get((row["kind"], row["magnitude"]), (-1, -1, -1))[every.index(row["problem_id"])]
        made += [row | {"hits": of}] if of >= 0 else []
    return changed(changed(r, "replies", made), "rates", replies.summarise(made))


def copied(r: Results, n: int = 4) -> Results:
    """The results with each problem n times, under other names: enough for two halves."""
    rows = [row | {"problem_id": f"{row['problem_id']}/{i}"} for i in range(n) for row in r.tables["replies"]]
    asked = [dataclasses.replace(reply, problem_id=f"{reply.problem_id}/{i}") for i in range(n) for reply in r.replies]
    more = changed(changed(r, "replies", rows), "rates", replies.summarise(rows))
    return dataclasses.replace(more, replies=asked)


def all_hits(r: Results, kind: str, magnitude: float) -> Results:
    """The results if every word under a condition were a hit."""
    rows = [
        row | {"hits": row["words"]} if (row["kind"], row["magnitude"]) == (kind, magnitude) else row
        for row in r.tables["replies"]
    ]
    return changed(changed(r, "replies", rows), "rates", replies.summarise(rows))


def test_rates_are_compared_over_the_same_problems(r: Results) -> None:
    """A cell that only a grid asked for has fewer problems, which may have lower or higher rates."""
    mixed = counting(
        r, {("unsteered", 0): (1, 1, 10), ("backtracking", -4): (1, 1, 10), ("backtracking", 8): (5, 5, -1)}
    )
    assert [cell["magnitude"] for cell in mixed.cells("reasoning", "backtracking", "base")] == [-4, 0]
    assert not any(text.startswith("Steered") for text in summary.sentences(copied(mixed), ANALYSES))
    alone = copied(counting(r, {("unsteered", 0): (1, 1, 10), ("backtracking", 8): (2, 2, -1)}))
    said = " ".join(summary.sentences(alone, ANALYSES))
    assert re.search(r"says wait or hmm in 40\.00 \(\S+ to \S+\) % of its words\.", said)
    # Of the eight problems that both have, four chose.
    on_these = r"on 4 problems, and 10\.00 \(\S+ to \S+\) % unsteered on these"
    expected = r"20\.00 \(\S+ to \S+\) % at magnitude 8 with the base-derived backtracking vector"
    assert re.search(rf"{expected} \({on_these}\)", said)
    found = {row["what"]: row["run"] for row in reference.comparison(alone, ANALYSES)}
    (pair,) = (run for what, run in found.items() if what.startswith("base-derived vector on the reasoning model"))
    shown = r"10\.00, then 20\.00 \(\S+ to \S+\) at magnitude 8, 4 problems that did not choose it"
    assert re.fullmatch(shown, pair)


def test_layers_are_compared_over_the_same_problems(r: Results) -> None:
    """The experiment's own layer has the problems of Fig. 3 too."""
    more = counting(r, {("unsteered", 0): (1, 1, 10), ("backtracking", 8): (2, 2, 10)})
    plot = grids.layers(more)
    assert plot is not None and "4 replies to 2 problems a cell, the same ones in every cell" in plot.caption
    for panel, _ in plot.panels:
        assert panel.heat is not None
        np.testing.assert_allclose(panel.heat.values, [[10, 0], [10, 20], [10, 0]])
    best = {row["what"]: row["run"] for row in reference.comparison(copied(more), ANALYSES)}
    shown = r"1 of 3 \(20\.00 \(\S+ to \S+\) % of words\), 4 problems that did not choose it"
    assert re.fullmatch(shown, best["best layer, base-derived"])


def test_too_few_problems_for_two_halves_say_so(r: Results) -> None:
    """Three problems, two of them in grids; what was not sampled at all is another matter."""
    found = {row["what"]: row["run"] for row in reference.comparison(r, ANALYSES)}
    assert found["highest rate at offset 0, % of words"] == found["best layer, base-derived"] == cells.TOO_FEW
    assert not any(text.startswith("Steered") for text in summary.sentences(r, ANALYSES))


def test_kinds_are_drawn_at_each_of_several_layers(r: Results) -> None:
    at_two = [cell | {"layer": 2, "rate": 0.5} for cell in r.tables["rates"] if cell["kind"] in ("deduction", "noise")]
    assert grids.kinds_by_layer(r) is None
    plot = grids.kinds_by_layer(
        changed(r, "rates", [*r.tables["rates"], *at_two], layer=(1, 2), kinds=("deduction", "noise"))
    )
    assert plot is not None
    (first, second), plain = plot.panels[0], r.unsteered("reasoning")
    assert plain is not None and f"layer 2 (mean residual norm {r.mean_norm('reasoning', 2):.3g})" == second.title
    for kind, source, one, two in zip(
        ("deduction", "noise"), ("reasoning", ""), first.series, second.series, strict=True
    ):
        assert one.label == two.label == kind
        assert list(one.y) == [100 * cell["rate"] for cell in r.cells("reasoning", kind, source)]
        assert list(two.x) == [-4, 0, 8] and list(two.y) == [50, 100 * plain["rate"], 50]
    assert len(plot.rows) == 1 + 2 * 2 * 2  # the unsteered cell once


def test_a_baseline_is_counted_at_either_sign(r: Results) -> None:
    negative = all_hits(copied(r), "noise", -4)
    (run,) = (row["run"] for row in reference.comparison(negative, ANALYSES) if row["what"].startswith("noise"))
    assert run.startswith("100.00") and "at magnitude -4, 6 problems" in run
    said = " ".join(summary.sentences(negative, ANALYSES))
    assert "noise reached most on one half of the problems: 100.00" in said


def test_the_papers_numbers_stand_beside_those_of_its_label_only(r: Results) -> None:
    e = dataclasses.replace(r.experiment, vectors=dataclasses.replace(r.experiment.vectors, label="deduction"))
    other = dataclasses.replace(r, experiment=e)
    assert "have cosine" in " ".join(summary.sentences(other, ANALYSES)) and "paper: 0.74" not in summary.markdown(
        other, ANALYSES
    )
    measured = {
        row["what"].split(":")[0] for row in reference.comparison(other, ANALYSES) if row["run"] != "not measured"
    }
    assert measured == {"noise", "self-amplification", "overall mean, deduction, initializing"}
    runs = [row["run"] for row in reference.comparison(all_hits(copied(other), "deduction", 8), ANALYSES)]
    assert not any("100.00 (" in run for run in runs)  # its own vector is no baseline
    labels = [{row["setting"]: row for row in reference.settings(x)}["label of the vector"] for x in (r, other)]
    assert [(row["paper"], row["run"], row["same"]) for row in labels] == [
        ("backtracking", "backtracking", "yes"),
        ("backtracking", "deduction", "no"),
    ]


def test_no_hit_is_no_certainty(r: Results) -> None:
    nothing = counting(r, {("unsteered", 0): (0, 0, 0)})
    plain = nothing.unsteered("reasoning")
    assert plain is not None and plain["low"] == 0 and 0.05 < plain["high"] < 1
    assert cells.rate(plain) == f"0.00 (0.00 to {100 * plain['high']:.2f})"
    assert f"| 0.00 | 0.00 to {100 * plain['high']:.2f} |" in summary.markdown(nothing, ANALYSES)


def test_no_rate_is_drawn_or_printed_without_width(r: Results, drawn: dict[str, plots.Plot]) -> None:
    for cell in r.tables["rates"]:
        for name in ("", "substring_rate_", "token_rate_", "sentence_rate_"):
            assert cell[f"{name}low"] < cell[f"{name}high"], cell["kind"]
    for name in ("fig3_pairs", "fig4_baselines"):
        for panel in drawn[name].panels[0]:
            assert all(low < high for series in panel.series for low, high in zip(series.low, series.high, strict=True))
    for row in r.tables["agreement"]:
        for name in ("precision", "recall", "f1", "kappa"):
            assert math.isnan(row[name]) or row[f"{name}_low"] < row[f"{name}_high"]


def test_captions_count_what_is_drawn(r: Results) -> None:
    some = [row | {"n_splits": 105 if row["label"] == "deduction" else 200} for row in r.tables["reliability"]]
    plot = reliability.reliability(changed(r, "reliability", some))
    assert plot is not None and "of 105 to 200 splits, with its 95 % interval over problems." in plot.caption
    own = [row for row in r.tables["effects"] if (row["kind"], row["layer"]) == ("backtracking", 1)]
    left_out = next(row for row in own if row["target"] == "reasoning" and row["window"] == "-5..-2")
    plot = rates.effects(changed(r, "effects", [row for row in r.tables["effects"] if row is not left_out]))
    assert plot is not None and "one point per problem (2 to 3)" in plot.caption
    rows = [row | {"n_problems": 1, "n_tokens": 7} for row in r.tables["probe"][1:]]
    plot = probe.probe(changed(r, "probe", [*r.tables["probe"], *rows]))
    first = r.tables["probe"][0]
    counted = f"7 to {first['n_tokens']} tokens of 1 to {first['n_problems']} problems"
    assert plot is not None and counted in plot.caption


def test_an_unsteered_cell_over_fewer_problems_is_no_part_of_a_curve(r: Results) -> None:
    """As where a grid alone has the magnitude 0."""
    rows = [row | {"n_problems": 1} if row["kind"] == "unsteered" else row for row in r.tables["rates"]]
    kinds = [
        {cell["kind"] for cell in some.cells("reasoning", "backtracking", "reasoning")}
        for some in (r, changed(r, "rates", rows))
    ]
    assert kinds == [{"unsteered", "backtracking"}, {"backtracking"}]


def test_where_every_rate_is_zero_no_layer_and_offset_is_the_best(r: Results) -> None:
    zero = [row | {"rate": 0.0, "high": 0.0, "n_hits": 0} for row in r.tables["rates"]]
    replied = [row | {"hits": 0} for row in r.tables["replies"]]
    found = grids.best_places(changed(changed(r, "rates", zero), "replies", replied))
    assert found["best_offset"].startswith("none: no hit in ")
    assert found["best_layer_base"].startswith("none: no hit in ")


@pytest.mark.parametrize("into_prompt", [False, True])
def test_why_windows_were_dropped(r: Results, into_prompt: bool) -> None:
    e = dataclasses.replace(r.experiment, vectors=dataclasses.replace(r.experiment.vectors, into_prompt=into_prompt))
    said = summary.sentences(dataclasses.replace(r, experiment=e), ANALYSES)[-1]
    assert said.endswith("leave the text or reach its first token)." if into_prompt else "leave the reply).")


def test_chance_is_drawn_where_it_is_one(r: Results) -> None:
    plot = probe.probe(r)
    assert plot is not None and plot.panels[0][1].level is not None
    share = plot.panels[0][1].level
    rows = [*r.tables["probe"], *(x | {"horizon": 2, "n_positive": 1} for x in r.tables["probe"])]
    other = changed(r, "probe", rows)
    other.experiment.analysis = dataclasses.replace(r.experiment.analysis, horizons=(13, 2))
    plot = probe.probe(other)
    assert plot is not None and plot.panels[0][1].level is None
    assert f"positive: {100 * share:.1f} % within 13, " in plot.caption


@pytest.mark.parametrize(
    "name", ["fig3_pairs", "probe", "figB1_layers", "label_cosines", "reliability", "cosine_by_layer", "norms"]
)
def test_paper_and_page_draw_the_same_numbers(drawn: dict[str, plots.Plot], name: str) -> None:
    plot = drawn[name]
    traces = iter(interactive.figure(plot)["data"])
    panels = [panel for row in plot.panels for panel in row]
    for axis, panel in zip(static.draw(plot).axes, panels, strict=False):
        curves = [c.lines[0] for c in axis.containers if isinstance(c, ErrorbarContainer)]
        curves = curves or [line for line in axis.lines if not str(line.get_label()).startswith("_")]
        for series, line in zip(panel.series, curves, strict=True):
            assert line is not None
            np.testing.assert_allclose(np.asarray(line.get_ydata(), float), series.y)
            np.testing.assert_allclose(np.asarray(line.get_xdata(), float), series.x)
            trace = next(traces)
            assert trace["name"] == series.label and trace["type"] == "scatter"
            np.testing.assert_allclose(numbers(trace["y"]), series.y)
            np.testing.assert_allclose(numbers(trace["x"]), series.x)
        if panel.heat:
            np.testing.assert_allclose(np.asarray(axis.images[0].get_array()), panel.heat.values)
            np.testing.assert_allclose([numbers(row) for row in next(traces)["z"]], panel.heat.values)


def numbers(values: Any) -> np.ndarray:
    return np.array([math.nan if v is None else v for v in values], float)


def test_nothing_is_cut_off(drawn: dict[str, plots.Plot]) -> None:
    for plot in drawn.values():
        figure = static.draw(plot)
        figure.draw_without_rendering()
        boxes = [axis.get_tightbbox() for axis in figure.axes if axis.get_visible()]
        boxes += [legend.get_window_extent() for legend in figure.legends]
        for box in boxes:
            assert box is not None and box.x0 >= -2 and box.y0 >= -2, plot.name
            assert box.x1 <= figure.bbox.x1 + 2 and box.y1 <= figure.bbox.y1 + 2, plot.name


def test_panels_that_share_an_axis_hold_the_highest_curve_of_all() -> None:
    row = [
        plots.Panel(str(top), "x", "% of words", [plots.Series("a", [0, 1], [0, top])], from_zero=True)
        for top in (0.5, 6.0, 2.0)
    ]
    for axis in static.draw(plots.Plot("a", "A", "", [row], [])).axes:
        low, high = axis.get_ylim()
        assert low <= 0 and 6 < high < 7


def test_equal_results_give_equal_files(drawn: dict[str, plots.Plot], tmp_path: Path, tiny_run: Path) -> None:
    """No date and no random name is in them."""
    static.write(drawn["fig2_offsets"], tmp_path)
    for suffix in ("png", "pdf", "csv"):
        before = tiny_run / "results" / "tiny" / "6-report" / f"fig2_offsets.{suffix}"
        assert (tmp_path / f"fig2_offsets.{suffix}").read_bytes() == before.read_bytes()
    assert image.imread(tmp_path / "fig2_offsets.png").shape[1] > 800


def test_the_comparison_takes_its_numbers_from_the_tables(r: Results) -> None:
    rows = {row["what"]: row["run"] for row in reference.comparison(r, ANALYSES)}
    assert len(rows) == len(reference.numbers()["numbers"]) and "not measured" not in rows.values()
    cosine = rows["cosine of base- and reasoning-derived backtracking vectors"]
    assert cosine.startswith(f"{r.vectors['cosine'][1]:.3f} at layer 1; ")
    null = next(x for x in r.tables["similarity"] if (x["label"], x["layer"]) == ("backtracking", 1))
    assert cosine.endswith(
        f"sections shuffled within traces have {null['shuffled']:.3f}, 95 % of draws below {null['shuffled_95']:.3f}"
    )
    more = copied(r)
    found = cells.highest(more, more.cells("reasoning", "noise", ""), either_way=True)
    noise = {row["what"]: row["run"] for row in reference.comparison(more, ANALYSES)}["noise: highest rate, % of words"]
    assert found is not None and noise == cells.at_magnitude(found.cell) + ", 6 problems that did not choose it"
    same = {row["setting"]: row["same"] for row in reference.settings(r)}
    assert same["window"] == "no" and same["contrast"] == "yes" and same["base model"] == "no"


def test_the_reference_holds_the_papers_numbers(ward2025: Path) -> None:
    released = json.loads((ward2025 / "reference_numbers.json").read_text())
    ours = reference.numbers()["numbers"]
    found = released["vectors"]["norms"]["backtracking"]
    assert ours["cosine"]["released"] == round(found["cosine"], 3)
    assert ours["norm_base"]["released"] == round(found["base"], 3)
    assert ours["norm_reasoning"]["released"] == pytest.approx(found["reasoning"], abs=6e-4)
    grid = released["offset_magnitude_grid"]["combined_percent"]
    assert ours["best_offset"]["released"].startswith(str(max(max(row) for row in grid)))


def test_the_summary_holds_every_cell(r: Results) -> None:
    text = summary.markdown(r, ANALYSES)
    assert text.count("\n| base | ") + text.count("\n| reasoning | ") == len(r.tables["rates"])
    assert "nan" not in text
    more = copied(r)
    best = cells.highest(more, more.cells("reasoning", "backtracking", "base"))
    assert best is not None and cells.rate(best.cell) in " ".join(summary.sentences(more, ANALYSES))


def test_one_model_alone(r: Results) -> None:
    """What needs two models is left out, the rest stands."""
    e = tiny.get_config()
    e.roles = ("base",)
    kept = {name: [row for row in rows if "reasoning" not in row.values()] for name, rows in r.tables.items()}
    for row in kept["similarity"]:
        row["cosine"] = math.nan
    written = [reply for reply in r.replies if reply.condition.target == "base"]
    alone = Results(e, r.vectors, kept, {"base": r.projections["base"]}, written, r.annotations, r.environment)
    names = [plot.name for plot in all_plots(alone)]
    assert "cosine_by_layer" not in names and {"fig3_pairs", "fig5_logit_lens", "reliability"} <= set(names)
    for plot in all_plots(alone):
        static.draw(plot)
        interactive.figure(plot)
    said = " ".join(summary.sentences(alone, ANALYSES))
    assert "reasoning" not in said and "nan" not in said


def test_of_sections_that_start_together_the_experiments_own_is_marked() -> None:
    starts = [("other", 0), ("deduction", 3), ("backtracking", 3), ("other", 3), ("deduction", 5), ("other", 5)]
    assert trace_figures.start_labels(starts, "backtracking") == {0: "other", 3: "backtracking", 5: "deduction"}


def test_tokens_of_a_trace_are_marked() -> None:
    trace = {"tokens": ["a", " b", "\n\n", "Wait", " c"], "starts": [["deduction", 0], ["backtracking", 3]]}
    found = trace_figures.tokens(trace | {"read": [1, 2]}, [0.0, 1.0, 2.0, 3.0, 4.0], "backtracking")
    assert [t.read for t in found] == [False, True, True, False, False]
    assert [t.start for t in found] == ["deduction", "", "", "backtracking", ""]
    figure = trace_figures.draw(found, "backtracking", "t", "c", 2.0)
    assert "".join(text.get_text() for text in figure.axes[0].texts) == "abWaitc"
    assert sum(colors.to_rgba(patch.get_edgecolor())[3] > 0 for patch in figure.axes[0].patches) == 1


def test_a_dollar_sign_begins_no_mathematics(tmp_path: Path) -> None:
    """Names come from data: a wrong formula in one would stop the figure, a right one would change it."""
    names = ("$\\frac{$", "a$b$c", "$", "50 %")
    series = [plots.Series(name, [0.0, 1.0], [1.0, 2.0]) for name in names]
    panel = plots.Panel(names[0], names[1], names[2], series, categories=names[:2])
    static.write(plots.Plot("dollar", names[1], " ".join(names), [[panel]], [{"a": 1}]), tmp_path)
    assert (tmp_path / "dollar.pdf").stat().st_size > 1000
