"""The list of analyses: what is computed again when it or a setting changes, and what is taken over."""

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny

from backtrack_jax import pipeline, plan
from backtrack_jax.analysis.base import Analysis, Material, asked
from backtrack_jax.analysis.registry import ANALYSES
from backtrack_jax.config import Experiment
from backtrack_jax.files import tables
from backtrack_jax.files.tables import Table
from backtrack_jax.models import checkpoint
from backtrack_jax.report.stage import ReportStage
from backtrack_jax.stages import analysis as stage
from backtrack_jax.stages.analysis import AnalysisStage

HOWTO = Path(__file__).parents[2] / "docs" / "howto" / "analysis.md"
WRITTEN: dict[str, Any] = {}
exec(HOWTO.read_text().split("```python\n")[1].split("```")[0], WRITTEN)  # the analysis that is shown there
Lengths, LENGTHS = WRITTEN["Lengths"], WRITTEN["LENGTHS"]
DEFAULT = asked(ANALYSES, tiny.get_config())


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Analyses that computed something since, with the role where there is one; models that were loaded."""
    found: list[str] = []
    load = checkpoint.load

    def loading(path: str, **kwargs: Any) -> Any:
        found.append(f"load {path}")
        return load(path, **kwargs)

    monkeypatch.setattr(checkpoint, "load", loading)
    for kind in {type(analysis) for analysis in (*DEFAULT, LENGTHS)}:
        for method in {"of_role", "finish"} & set(vars(kind)):
            _record(monkeypatch, kind, method, found)
    return found


def _record(monkeypatch: pytest.MonkeyPatch, kind: type[Analysis], method: str, found: list[str]) -> None:
    original = getattr(kind, method)

    def recording(self: Analysis, material: Material, *arguments: Any) -> dict[str, Table]:
        found.append(" ".join([self.name, *arguments[:-1]]))
        return original(self, material, *arguments)

    monkeypatch.setattr(kind, method, recording)


def run(e: Experiment, analyses: Sequence[Analysis] = ANALYSES) -> pipeline.Run:
    made = planned(e, analyses)
    made.run()
    return made


def planned(e: Experiment, analyses: Sequence[Analysis] = ANALYSES) -> pipeline.Run:
    return pipeline.Run(e, (), (*pipeline.STAGES[:4], AnalysisStage(analyses), ReportStage(analyses)))


def contents(folder: Path) -> dict[str, bytes]:
    left_out = ("run.json", "inputs.json", "DONE", "analyses.json")
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in left_out}


def test_an_analysis_that_is_added_computes_its_own_tables_alone(
    finished: Path, computed: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """One class and one line in the list: its table, figure, sentence and number are where the others' are."""
    before = contents(finished / "5-analysis")
    text = plan.describe(planned(tiny.get_config(), (*ANALYSES, LENGTHS)))
    assert "computes lengths; other tables are taken over from earlier results; no model is held" in text
    run(tiny.get_config(), (*ANALYSES, LENGTHS))
    assert computed == ["lengths"]
    after = contents(finished / "5-analysis")
    lengths = tables.read(finished / "5-analysis" / "lengths.csv")
    assert after.pop("lengths.csv") and after == before
    assert [(line["target"], line["magnitude"]) for line in lengths] == [
        (role, magnitude) for role in ("base", "reasoning") for magnitude in (-4.0, 0.0, 8.0)
    ]
    report = finished / "6-report"
    assert tables.read(report / "lengths.csv") == lengths and (report / "lengths.png").exists()
    page, summary = (report / "report.html").read_text(), (report / "summary.md").read_text()
    longest = max(line["tokens"] for line in lengths)
    assert all(f"Replies have up to {longest:.3g} tokens on average." in shown for shown in (page, summary))
    assert page.index('<figure id="figure-reliability">') < page.index('<figure id="figure-lengths">')
    said = capsys.readouterr().err
    assert "5-analysis: runs again, since analyses.lengths changed" in said
    assert re.search("taken over from earlier results: rates, .*similarity, lens, .*agreement", said)
    computed.clear()
    run(tiny.get_config())
    assert not computed and contents(finished / "5-analysis") == before


def test_a_setting_makes_its_own_analysis_run_again(finished: Path, computed: list[str]) -> None:
    before = contents(finished / "5-analysis")
    e = tiny.get_config()
    e.analysis.folds = 3
    run(e)
    assert computed == ["probe base", "load base", "probe reasoning", "load reasoning"]
    after = contents(finished / "5-analysis")
    changed = {name for name, content in after.items() if before[name] != content}
    assert changed == {"base.probe.csv", "reasoning.probe.csv"}


@pytest.mark.slow
def test_a_version_makes_its_own_analysis_run_again(finished: Path, computed: list[str]) -> None:
    class Newer(type(next(a for a in DEFAULT if a.name == "windows"))):
        version = 2

    run(tiny.get_config(), [Newer() if analysis.name == "windows" else analysis for analysis in ANALYSES])
    assert computed == ["windows"]


@pytest.mark.slow
def test_what_reads_the_files_of_another_runs_again_with_it(finished: Path, computed: list[str]) -> None:
    class Longest(Lengths):
        name, tables, reads = "longest", ("longest",), ("lengths",)

        def finish(self, material: Material, folder: Path) -> dict[str, Table]:
            computed.append(self.name)
            return {"longest": [max(tables.read(folder / "lengths.csv"), key=lambda line: line["tokens"])]}

    class Newer(Lengths):
        version = 2

    for lengths in (LENGTHS, Newer()):
        run(tiny.get_config(), (*ANALYSES, lengths, Longest()))
        assert computed == ["lengths", "longest"]
        computed.clear()
    assert len(tables.read(finished / "5-analysis" / "longest.csv")) == 1
    with pytest.raises(ValueError, match="the analysis 'longest' reads 'lengths', which is not listed before it"):
        AnalysisStage((Longest(), LENGTHS))


@pytest.mark.slow
def test_what_is_read_off_vectors_alone_outlasts_a_change_of_the_sweep(finished: Path, computed: list[str]) -> None:
    e = tiny.get_config()
    e.steering.magnitudes = (0.0, 8.0)
    run(e)
    models = [name for name in computed if name.startswith("load")]
    assert models == ["load base", "load reasoning", "load base"]  # twice for sampling, and once more for likelihoods
    done = [name for name in computed if name not in models]
    by_role = [f"{name} {role}" for role in ("reasoning", "base") for name in ("rates", "log_odds")]
    assert done == [*by_role, "rates", "agreement"]


@pytest.mark.slow
def test_what_a_killed_run_of_another_list_had_finished_is_used(finished: Path, computed: list[str]) -> None:
    folder = finished / "5-analysis"
    before = contents(folder)
    for name in ("DONE", "base.probe.csv", "rates.csv"):
        (folder / name).unlink()
    run(tiny.get_config(), (*ANALYSES, LENGTHS))
    # replies.csv is there: no likelihood is measured again, and the other model is not loaded.
    assert computed == ["rates base", "probe base", "load base", "rates reasoning", "rates", "lengths"]
    assert {name: content for name, content in contents(folder).items() if name != "lengths.csv"} == before


@pytest.mark.slow
def test_a_damaged_file_is_not_taken_over(finished: Path, computed: list[str]) -> None:
    folder = finished / "5-analysis"
    before = contents(folder)
    (folder / "similarity.csv").write_bytes(before["similarity.csv"][:-9])
    run(tiny.get_config(), (*ANALYSES, LENGTHS))
    assert computed == ["similarity", "lengths"]
    assert contents(folder)["similarity.csv"] == before["similarity.csv"]


@pytest.mark.slow
def test_results_of_another_commit_of_a_hub_id_are_not_taken_over(finished: Path, computed: list[str]) -> None:
    path = finished / "5-analysis" / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hub_commits": {"base": "a" * 40}}))
    run(tiny.get_config(), (*ANALYSES, LENGTHS))
    expected = {analysis.name for analysis in DEFAULT} - {"judged", "grids"}  # which write nothing here
    assert {name.split()[0] for name in computed} == {*expected, "load", "lengths"}


def test_an_analysis_without_the_table_that_it_names_is_refused(finished: Path) -> None:
    class Empty(Lengths):
        def finish(self, material: Material, folder: Path) -> dict[str, Table]:
            return {}

    with pytest.raises(ValueError, match="the analysis 'lengths' declares the table 'lengths' but did not make it"):
        run(tiny.get_config(), (*ANALYSES, Empty()))


def test_names_that_are_taken_are_refused() -> None:
    class Taken(Lengths):
        name, tables = "other", ("windows",)

    class Text(Lengths):
        tables = "lengths"

    for analysis, message in (
        (Taken(), "the analyses 'windows' and 'other' both use the name 'windows'"),
        (Text(), "the analysis 'lengths' has tables='lengths', not a tuple"),
    ):
        with pytest.raises(ValueError, match=message):
            AnalysisStage((*ANALYSES, analysis))


class Watched:
    """An object that notes which of its fields are read, dotted."""

    def __init__(self, watched: Any, seen: set[str], prefix: str = ""):
        self._of = watched, seen, prefix

    def __getattr__(self, name: str) -> Any:
        watched, seen, prefix = self._of
        value = getattr(watched, name)
        seen.add(prefix + name)
        return Watched(value, seen, f"{name}.") if name in ("analysis", "steering") else value


@pytest.mark.parametrize("analysis", [a for a in DEFAULT if a.files(tiny.get_config()) or a.role_files("base")])
def test_every_setting_that_is_read_is_in_the_fingerprint(finished: Path, tmp_path: Path, analysis: Analysis) -> None:
    """And no other: else a change would leave old results in place, or compute the same ones again."""
    seen: set[str] = set()
    e = tiny.get_config()
    material = dataclasses.replace(stage.gather(pipeline.Run(e).context), experiment=Watched(e, seen))
    if not analysis.of_replies:
        material = dataclasses.replace(material, replies=None)
    for role in e.roles:
        analysis.of_role(material, role, tmp_path)
    analysis.finish(material, tmp_path)
    read = {name for name in seen if name == "seed" or name.startswith(("analysis.", "steering."))}
    allowed = {"analysis.batch_size"}
    if analysis.of_replies:  # those of the sweep stand in the inputs of its stage
        allowed |= {name for name in read if name == "seed" or name.startswith("steering.")}
    assert read - allowed == set(analysis.settings)


def test_analyses_are_told_apart_by_name_and_table() -> None:
    names = [analysis.name for analysis in ANALYSES]
    written = [name for a in ANALYSES for name in (*a.tables, *a.role_tables)]
    assert len(set(names)) == len(names) and len(set(written)) == len(written)


def test_the_list_says_what_each_file_depends_on(finished: Path) -> None:
    listed = json.loads((finished / "5-analysis" / "analyses.json").read_text())
    assert list(listed) == [analysis.name for analysis in DEFAULT]
    scratch = {name for analysis in DEFAULT for role in tiny.get_config().roles for name in analysis.scratch(role)}
    files = {name for entry in listed.values() for name in entry["files"]} - scratch
    assert files == set(contents(finished / "5-analysis"))
    assert len({entry["fingerprint"] for entry in listed.values()}) > 5
