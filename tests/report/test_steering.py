"""The figure of the sweep by its CSV, and what it is drawn from."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from matplotlib import image
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from backtrack_jax.config import Experiment
from backtrack_jax.report import steering


def rows_of(tiny_run: Path) -> list[dict[str, Any]]:
    return steering.read_csv(tiny_run / "results" / "tiny" / "5-analysis" / "rates.csv")


def summary_of(tiny_run: Path) -> dict[str, Any]:
    return json.loads((tiny_run / "results" / "tiny" / "3-vectors" / "summary.json").read_text())


def test_the_csv_beside_the_figure_is_the_table_of_rates(tiny_run: Path) -> None:
    results = tiny_run / "results" / "tiny"
    csv = (results / "6-report" / "steering.csv").read_bytes()
    assert csv == (results / "5-analysis" / "rates.csv").read_bytes()
    assert csv.count(b"\n") == 1 + 38


def test_csv_round_trip(tmp_path: Path) -> None:
    rows = [
        {"target": "base", "kind": 'a,"b"', "source": "", "layer": 3, "magnitude": -0.1, "low": math.nan, "n_words": 9},
        {"target": "1", "kind": "2", "source": "3", "layer": -4, "magnitude": 1 / 3, "low": 1e-300, "n_words": 10**17},
    ]
    path = tmp_path / "rates.csv"
    path.write_text(steering.to_csv(rows), newline="")
    back = steering.read_csv(path)
    assert [{**row, "low": repr(row["low"])} for row in back] == [{**row, "low": repr(row["low"])} for row in rows]
    assert [type(row["layer"]) for row in back] == [int, int]
    assert steering.to_csv(back) == path.read_text()


def test_every_curve_starts_from_the_unsteered_model(tiny_run: Path) -> None:
    rows = rows_of(tiny_run)
    for target in ("base", "reasoning"):
        curves = steering.curves(rows, target)
        assert len(curves) == 9  # three kinds of two sources, three controls
        for (kind, source), cells in curves.items():
            assert [cell["magnitude"] for cell in cells] == [-4, 0, 8]
            assert [cell["kind"] for cell in cells] == [kind, "unsteered", kind]
            assert {cell["target"] for cell in cells} == {target}
            assert {cell["source"] for cell in cells} == {source, ""}


def drawn(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> Figure:
    """The figure that `draw` saves."""
    saved: list[Figure] = []
    save = Figure.savefig

    def keeping(figure: Figure, *args: Any, **kwargs: Any) -> None:
        saved.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keeping)
    steering.draw(*arguments)
    return saved[0]


def test_the_figure_shows_the_rates(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Points and bars are those of the CSV; every kind has a colour, every source a line style."""
    rows, summary = rows_of(tiny_run), summary_of(tiny_run)
    figure = drawn(monkeypatch, rows, tiny.get_config(), summary, tmp_path)
    assert len(figure.axes) == 4
    styles: dict[str, set[tuple]] = {}
    for column, target in enumerate(("base", "reasoning")):
        rate, repetition = figure.axes[column], figure.axes[2 + column]
        assert f"mean residual norm {summary[target]['mean_norm'][1]:.3g}" in repetition.get_xlabel()
        curves = steering.curves(rows, target)
        assert len(rate.containers) == len(repetition.lines) == len(curves)
        for ((kind, source), cells), container, line in zip(
            curves.items(), rate.containers, repetition.lines, strict=True
        ):
            assert isinstance(container, ErrorbarContainer)
            points, _, (bars,) = container.lines
            np.testing.assert_allclose(np.asarray(points.get_xdata(), float), [cell["magnitude"] for cell in cells])
            np.testing.assert_allclose(np.asarray(points.get_ydata(), float), [100 * cell["rate"] for cell in cells])
            ends = [segment[:, 1] for segment in bars.get_segments()]
            np.testing.assert_allclose(ends, [[100 * cell["low"], 100 * cell["high"]] for cell in cells], atol=1e-9)
            np.testing.assert_allclose(np.asarray(line.get_ydata(), float), [cell["repeated_3grams"] for cell in cells])
            assert line.get_color() == points.get_color() and line.get_linestyle() == points.get_linestyle()
            styles.setdefault(kind, set()).add((points.get_color(), points.get_marker()))
            assert points.get_linestyle() == {"base": "-", "reasoning": "--", "": ":"}[source]
            assert source in str(container.get_label()) and kind in str(container.get_label())
    assert all(len(used) == 1 for used in styles.values()) and len(styles) == 6
    assert len(set.union(*styles.values())) == 6
    (legend,) = figure.legends
    assert len(legend.get_texts()) == 9
    assert "layer 1" in figure.get_suptitle() and "6 replies to 3 problems" in figure.get_suptitle()


def test_nothing_is_cut_off_or_covered(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for roles in (("base", "reasoning"), ("base",)):
        e = tiny.get_config()
        e.roles = roles
        figure = drawn(monkeypatch, rows_of(tiny_run), e, summary_of(tiny_run), tmp_path)
        page = figure.bbox
        boxes = [axis.get_tightbbox() for axis in figure.axes]
        (legend,) = figure.legends
        for box in (*boxes, legend.get_window_extent()):
            assert box is not None
            assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= page.x1 + 1 and box.y1 <= page.y1 + 1
        assert not any(box.overlaps(legend.get_window_extent()) for box in boxes if box)


def test_equal_rates_give_equal_files(tiny_run: Path, tmp_path: Path) -> None:
    """No date and no random name is in them."""
    for suffix in ("png", "pdf", "csv"):
        (tmp_path / suffix).mkdir()
    for folder in (tmp_path / "png", tmp_path / "pdf"):
        steering.draw(rows_of(tiny_run), tiny.get_config(), summary_of(tiny_run), folder)
    for suffix in ("png", "pdf", "csv"):
        one, two = ((tmp_path / folder / f"steering.{suffix}").read_bytes() for folder in ("png", "pdf"))
        assert one == two
    pixels = image.imread(tmp_path / "png" / "steering.png")
    assert pixels.shape[1] > 1000 and len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 100
    assert (tmp_path / "pdf" / "steering.pdf").read_bytes().startswith(b"%PDF")


def test_one_problem_has_no_interval(tmp_path: Path) -> None:
    """Nothing can be resampled; the point is drawn without bars, and the table says so."""
    e = Experiment(name="one", roles=("base",))
    row = {"target": "base", "source": "", "layer": 10, "unit": "absolute", "span": "all", "repeated_3grams": 0.0}
    row |= {"n_words": 9, "n_replies": 1, "n_problems": 1, "low": math.nan, "high": math.nan}
    e.steering.kinds = ("noise",)
    rows = [row | {"kind": "unsteered", "magnitude": 0.0, "length": 0.0, "rate": 0.0}]
    rows += [row | {"kind": "noise", "magnitude": 4.0, "length": 4.0, "rate": 0.5}]
    summary = {"base": {"mean_norm": [1.0] * 11, "windows": {"all": {"read": 3, "dropped": 1}}}}
    steering.draw(rows, e, summary, tmp_path)
    assert (tmp_path / "steering.png").stat().st_size > 1000
    text = steering.summarise(rows, e, summary, "")
    assert "nan" not in text


def test_the_summary_has_every_number(tiny_run: Path) -> None:
    text = (tiny_run / "results" / "tiny" / "6-report" / "summary.md").read_text("utf-8")
    rows, summary = rows_of(tiny_run), summary_of(tiny_run)
    table = [line.split(" | ") for line in text.splitlines() if line.startswith(("| base", "| reasoning"))]
    assert len(table) == len(rows)
    for cells, row in zip(table, rows, strict=True):
        assert cells[0] == f"| {row['target']}" and cells[1] == row["kind"] and cells[2] == (row["source"] or "-")
        assert float(cells[3]) == row["magnitude"] and float(cells[5]) == pytest.approx(100 * row["rate"], abs=0.005)
    assert f"at layer 1: {summary['cosine'][1]:.3f}" in text
    for role in ("base", "reasoning"):
        assert f"{summary[role]['mean_norm'][1]:.4g}" in text
    assert "backtracking 17 (1 dropped)" in text
    assert "rejected: 1" in text and "Layer 1, span `all`" in text and "`absolute`" in text
