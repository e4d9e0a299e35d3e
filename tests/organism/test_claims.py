"""The command that reads the claims off runs: what it refuses, and what it prints of a small run."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from backtrack_jax.config import Experiment
from backtrack_jax.models import checkpoint

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = checkpoint.resolve("package:backtrack_jax/organism")


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("organism_claims", ROOT / "scripts" / "organism_claims.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pairs_that_are_not_there_or_of_one_name_are_refused(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for pairs, message in (
        ([tmp_path], f"{tmp_path} has no base and reasoning model"),
        ([SHIPPED, SHIPPED], "folders are named organism, organism, and runs after them; expected different names"),
    ):
        with pytest.raises(SystemExit):
            script.main(["--pairs", *map(str, pairs), f"--out={tmp_path / 'out'}"])
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_experiment_asks_for_verdicts_in_every_figure(script: ModuleType, tmp_path: Path) -> None:
    e = script.experiment("mine", SHIPPED, tmp_path / "out")
    assert (e.base.path, e.reasoning.path) == (str(SHIPPED / "base"), str(SHIPPED / "reasoning"))
    assert e.steering.grid_limit == e.steering.limit >= 80 and e.analysis.forced_texts >= 80
    assert e.vectors.layers == tuple(range(8)) and e.prompt.format == "r1"
    second = script.experiment("second", SHIPPED / "qwen3", tmp_path / "out")
    assert second.vectors.layers == tuple(range(10)) and second.prompt.format == "chat"


def test_trainings_are_a_factor_of_their_own(script: ModuleType) -> None:
    values = [0.5, 0.6, 0.9]
    mean, low, high = script.over_trainings(values, ratio=False)
    spread = np.std(values, ddof=1) / np.sqrt(3)
    t = 3.3197  # 96 % quantile of a t with two degrees of freedom
    np.testing.assert_allclose((mean, low, high), (2 / 3, 2 / 3 - t * spread, 2 / 3 + t * spread), rtol=1e-3)
    ratios = script.over_trainings([2.0, 8.0], ratio=True)
    assert ratios[0] == pytest.approx(4.0) and ratios[1] * ratios[2] == pytest.approx(16.0)
    claims = [{"estimate": v, "low": v, "high": v, "unit": "share", "verdict": "holds"} for v in values]
    named = [claim | {"name": "a", "title": "A claim."} for claim in claims]
    table = script.overview({f"seed{i}": [claim] for i, claim in enumerate(named)})
    assert table.splitlines()[0].endswith("| mean over trainings |")
    assert table.splitlines()[2].endswith("| 0.667 (0.268 to 1.07) |")
    assert "mean over" not in script.overview({"seed0": [named[0]]})


@pytest.mark.slow
def test_the_claims_of_a_run_beside_the_truth(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = script.experiment

    def small(*arguments: object) -> Experiment:
        e: Experiment = whole(*arguments)
        e.traces.limit, e.traces.max_new_tokens = 24, 120
        e.steering.limit = e.steering.grid_limit = 4
        e.steering.baselines, e.steering.layers, e.steering.offsets, e.vectors.layers = ("noise",), (), (), (2,)
        e.steering.magnitudes, e.steering.baseline_magnitudes, e.steering.max_new_tokens = (0.0, 0.3), (), 24
        e.analysis.forced_texts, e.analysis.forced_sentences = 4, 3
        return e

    monkeypatch.setattr(script, "experiment", small)
    script.main([f"--out={tmp_path}"])
    printed = capsys.readouterr().out
    claims = json.loads((tmp_path / "organism" / "6-report" / "claims.json").read_text())["claims"]
    assert {claim["verdict"] for claim in claims} == {"undecided"}  # of four problems
    for claim in claims:
        assert f"| {claim['title']} | **undecided**: " in printed
    rows = [line.split(" | ") for line in printed.splitlines() if line.startswith("| ") and line[2].isdigit()]
    assert len(rows) == 8  # layers
    cosines = np.array([[float(value) for value in (row[1], row[4])] for row in rows])
    assert (cosines[:6] > 0.6).all() and (cosines <= 1).all()  # v points along the belief, see docs/organism.md
