"""Finished runs, read and compared: every number from the files of the runs by other code, and what is refused."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from scipy import stats

from backtrack_jax import compare, pipeline
from backtrack_jax.finished import load_run

ROLES = ("base", "reasoning")


def lines_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def both(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny run, and one with another sweep."""
    folder = tmp_path_factory.mktemp("both") / "tiny"
    shutil.copytree(tiny_run, folder)
    e = tiny.get_config()
    e.name, e.steering.magnitudes, e.steering.limit = "other", (0.0, 16.0), 4
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        pipeline.Run(e).run()
    return folder


@pytest.fixture
def two(both: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Both runs in a copy, which is the working directory."""
    shutil.copytree(both, tmp_path / "tiny")
    monkeypatch.chdir(tmp_path / "tiny")
    return [tmp_path / "tiny" / "results" / name for name in ("tiny", "other")]


def test_a_run_is_read_as_it_was_written(finished: Path) -> None:
    run = load_run(finished)
    assert run.experiment == pipeline.Run(tiny.get_config()).experiment
    assert sorted({role for role, _ in run.vectors}) == sorted(ROLES) and ("base", "backtracking") in run.vectors
    summary = json.loads((finished / "3-vectors" / "summary.json").read_text())
    assert run.norms("base") == summary["base"]["mean_norm"]
    written = [json.loads(line) for line in (finished / "4-steering" / "generations.jsonl").read_text().splitlines()]
    assert json.loads(json.dumps(run.replies())) == written
    assert len(run.traces) == 12 and all(annotation.sections for _, annotation in run.traces)
    assert len(run.tables["rates"]) == len(lines_of(finished / "5-analysis" / "rates.csv"))
    assert run.claims.keys() == {
        claim["name"] for claim in json.loads((finished / "6-report" / "claims.json").read_text())["claims"]
    }


def by_hand(folder: Path, magnitude: float) -> dict[tuple[str, str, str], np.ndarray]:
    """(text, source, target) -> changes of the log-odds by problem, from the tables."""
    found: dict[tuple[str, str, str], dict[str, float]] = {}
    for target in ROLES:
        lines = lines_of(folder / "5-analysis" / f"{target}.log_odds.csv")
        for text in ("reasoning traces", "base replies"):
            plain = {
                line["problem_id"]: float(line["log_odds"])
                for line in lines
                if line["kind"] == "unsteered" and line["text"] == text
            }
            for line in lines:
                if (line["kind"], line["layer"], line["window"], line["text"]) != ("backtracking", "1", "-5..-2", text):
                    continue
                if float(line["magnitude"]) == magnitude:
                    change = float(line["log_odds"]) - plain[line["problem_id"]]
                    found.setdefault((text, line["source"], target), {})[line["problem_id"]] = change
    finite = {key: {name: x for name, x in of.items() if np.isfinite(x)} for key, of in found.items()}
    return {key: np.array([of[name] for name in sorted(of)]) for key, of in finite.items()}


def test_effects_and_interactions_are_those_of_the_tables(two: list[Path]) -> None:
    pairs = compare.read_pairs(two)
    found = compare.compare(pairs)
    means, errors = [], []
    for pair, folder in zip(pairs, two, strict=True):
        changes = by_hand(folder, pair.magnitude)
        lines = {
            (line["measure"], line["text"], line["source"], line["target"]): line
            for line in found.effects
            if line["pair"] == pair.name
        }
        assert changes
        for (text, source, target), values in changes.items():
            if len(values) < 2:
                assert ("log-odds, nats", text, source, target) not in lines
                continue
            line = lines["log-odds, nats", text, source, target]
            np.testing.assert_allclose(line["estimate"], values.mean(), atol=1e-9)
            ends = stats.t.interval(0.95, len(values) - 1, values.mean(), stats.sem(values))
            np.testing.assert_allclose((line["low"], line["high"]), ends, atol=1e-9)
            assert line["n_problems"] == len(values)
        traces = {key[1:]: values for key, values in changes.items() if key[0] == "reasoning traces"}
        both = np.mean([traces[source, "reasoning"] - traces[source, "base"] for source in ROLES], axis=0)
        line = lines["log-odds, nats", "reasoning traces", "both", "interaction"]
        np.testing.assert_allclose(line["estimate"], both.mean(), atol=1e-9)
        means.append(both.mean())
        errors.append(stats.sem(both))
        np.testing.assert_allclose(
            lines["keywords a word", "sampled replies", "both", "interaction"]["estimate"],
            rates_by_hand(folder, pair.magnitude),
            atol=1e-9,
        )
    expected = compare.meta.random_effects(means, errors)
    assert found.mean is not None
    np.testing.assert_allclose(found.mean.mean, expected.mean, atol=1e-9)
    np.testing.assert_allclose((found.mean.low, found.mean.high), (expected.low, expected.high), atol=1e-6)


def rates_by_hand(folder: Path, magnitude: float) -> float:
    """What both vectors add to the pooled rate, reasoning less base, over the problems that all cells have."""
    lines = lines_of(folder / "5-analysis" / "replies.csv")

    def cell(target: str, kind: str, source: str, at: float) -> list[dict[str, str]]:
        return [
            line
            for line in lines
            if (line["target"], line["kind"], line["source"], float(line["magnitude"])) == (target, kind, source, at)
            and line["layer"] == "1"
            and line["window"] in ("", "-5..-2")
        ]

    cells = {(t, s): cell(t, "backtracking", s, magnitude) for t in ROLES for s in ROLES}
    cells |= {(t, ""): cell(t, "unsteered", "", 0.0) for t in ROLES}
    shared = set.intersection(*({line["problem_id"] for line in of} for of in cells.values()))

    def rate(of: list[dict[str, str]]) -> float:
        kept = [line for line in of if line["problem_id"] in shared]
        return sum(float(line["hits"]) for line in kept) / sum(float(line["words"]) for line in kept)

    effects = {t: np.mean([rate(cells[t, s]) for s in ROLES]) - rate(cells[t, ""]) for t in ROLES}
    return float(effects["reasoning"] - effects["base"])


def test_what_is_written(two: list[Path], tmp_path: Path) -> None:
    tmp_path = tmp_path / "out"
    found = compare.compare(compare.read_pairs([*two, _renamed(two[0])]))
    compare.write(found, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("compare.md", "compare.json", "pairs.csv", "effects.csv", "forest.png", "forest.pdf", "forest.csv")
    }
    values = json.loads((tmp_path / "compare.json").read_text())
    assert values["mean over pairs"]["k"] == 3 and len(values["pairs"]) == 3
    text = (tmp_path / "compare.md").read_text()
    assert "Over 3 pairs the vectors" in text and "A further pair is expected at" in text
    assert "Fewer than 80 problems, so undecided: tiny, other, again." in text
    plot = compare.forest(found)
    (panel,) = plot.panels[0]
    assert panel.categories == ["tiny", "other", "again", "mean of 3", "a further pair"]
    drawn = {series.label: series for series in panel.series}
    mean = found.mean
    assert mean is not None and drawn["mean over pairs"].y == [mean.mean] and drawn["prediction"].x == [4]
    both = drawn["mean of both vectors"]
    of_both = [line for line in found.effects if line["source"] == "both" and line["text"] == "reasoning traces"]
    assert list(both.y) == [line["estimate"] for line in of_both]
    alone = compare.compare(compare.read_pairs(two[:1]))
    assert alone.mean is None and "Of one pair there is no mean over pairs." in compare.sentence(alone)
    assert len(compare.forest(compare.compare(compare.read_pairs(two))).panels[0][0].categories) == 2


def _renamed(folder: Path) -> Path:
    copy = folder.parent / "again"
    shutil.copytree(folder, copy)
    return copy


def test_what_a_pair_is(two: list[Path]) -> None:
    (line, _) = (compare.description(pair) for pair in compare.read_pairs(two))
    (alike,) = (
        row
        for row in lines_of(two[0] / "5-analysis" / "similarity.csv")
        if (row["label"], row["layer"]) == ("backtracking", "1")
    )
    assert (line["architecture"], line["layers"], line["layer"], line["depth"]) == ("llama", 3, 1, 0.5)
    np.testing.assert_allclose([line["cosine"], line["corrected"]], [float(alike[x]) for x in ("cosine", "corrected")])
    run = load_run(two[0])
    norm = np.linalg.norm(run.vectors["base", "backtracking"].directions[1]) / run.norms("base")[1]
    np.testing.assert_allclose(line["base vector norm"], norm, rtol=1e-6)


def test_what_cannot_be_compared_is_named(two: list[Path], tmp_path: Path) -> None:
    def refused(message: str, *folders: Path) -> None:
        with pytest.raises(ValueError, match=message):
            compare.read_pairs(folders)

    refused("1-traces is not done there; expected the folder of a run", tmp_path)
    refused("a run is named twice", two[0], two[0])
    copy = _renamed(two[0])
    (copy / "5-analysis" / "STALE").write_text("made from old results\n")
    refused("5-analysis is stale: made from old results; run it again", copy)
    (copy / "5-analysis" / "STALE").unlink()
    described: dict[str, Any] = json.loads((copy / "4-steering" / "run.json").read_text())

    def with_config(**changes: Any) -> None:
        config = described["config"] | changes
        (copy / "4-steering" / "run.json").write_text(json.dumps(described | {"config": config}))

    with_config(reasoning=described["config"]["reasoning"] | {"dtype": "int8"})
    refused("again is of int8 weights and .*tiny is not; compare them apart", two[0], copy)
    with_config(roles=["reasoning"])
    refused("expected runs of a base and a reasoning model", copy)
    with_config(colour="red")
    refused("its config has the field 'colour', which this version does not know", copy)
    with_config()
    path = copy / "5-analysis" / "reasoning.log_odds.csv"
    path.write_text(path.read_text().splitlines()[0] + "\n")
    refused("no log-odds on given text at its dose; raise analysis.forced_texts", copy)


@pytest.mark.slow
def test_the_command(two: list[Path], tmp_path: Path) -> None:
    def said(*arguments: str) -> str:
        command = [sys.executable, "-m", "backtrack_jax.compare", *arguments]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert "Traceback" not in ended.stderr
        return ended.stdout + ended.stderr

    out = said(*map(str, two), f"--out={tmp_path / 'out'}")
    assert "Over 2 pairs" in out and "The interval of two pairs has one degree of freedom" in out
    assert (tmp_path / "out" / "compare.md").exists()
    assert "error: name runs" in said() and "error: --out: expected a folder" in said(str(two[0]))
