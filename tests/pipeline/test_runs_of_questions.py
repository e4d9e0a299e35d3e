"""Both configs of open questions through all stages, on pairs of two families at reduced size."""

import dataclasses
import json
import runpy
import shutil
from pathlib import Path

import pytest
import tiny
from runs import run
from test_runs_of_families import reduced

from backtrack_jax.config import Experiment
from backtrack_jax.files import tables
from backtrack_jax.models import families

CONFIGS = Path(__file__).parents[2] / "configs"


def at_reduced_size(name: str) -> Experiment:
    """The experiment with the tiny pair, its chains and labels, and fewer of everything; what it asks is as it was."""
    e: Experiment = runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"]()
    small = tiny.get_config()
    e.base, e.reasoning, e.traces, e.annotations = small.base, small.reasoning, small.traces, small.annotations
    e.traces.samples = 1
    e.vectors = dataclasses.replace(
        e.vectors,
        window=(-5, -2),
        offsets=(-12, -4, 0),
        offset_window=(0, 0),
        layers=(1,),
        into_prompt=True,
        batch_size=8,
    )
    e.steering = dataclasses.replace(
        e.steering,
        layer=(1,),
        offsets=(-12, 0),
        magnitudes=e.steering.magnitudes[:3] if e.steering.unit == "relative" else (-4.0, 0.0, 8.0),
        baseline_magnitudes=(0.15 if e.steering.unit == "relative" else 8.0,),
        grid_magnitudes=(0.15 if e.steering.unit == "relative" else 8.0,),
        limit=6,
        max_new_tokens=8,
        batch_size=64,
    )
    e.analysis = dataclasses.replace(e.analysis, judge="", folds=3, positions=8, forced_texts=3, examples=2)
    q = e.questions
    q.stability = dataclasses.replace(q.stability, boundaries=6, draws=4, tokens=4, magnitude=0.0)
    q.noise = dataclasses.replace(q.noise, seeds=2, ranks=(2, 4), burst=4, replies=3)
    q.composition = dataclasses.replace(
        q.composition, components=1, random=2, ranks=(1, 2), subspaces=3, ablated_texts=2, magnitude=0.0
    )
    q.side_effects = dataclasses.replace(q.side_effects, texts=3)
    return e


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("name", ["questions", "paper_questions"])
def test_all_stages_run(name: str, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every question has its table and a section of the page; what 12 problems can decide, they are asked."""
    monkeypatch.chdir(tmp_path)
    tiny.write(tmp_path)
    if family != "llama":
        released = next(iter(families.FAMILIES[family].released.values()))
        for role in ("base", "reasoning"):
            tokenizer = {path: path.read_bytes() for path in (tmp_path / role).glob("tokenizer*")}
            shutil.rmtree(tmp_path / role)
            tiny.write_weights(tmp_path / role, reduced(released, tied=role == "base", padding=3), seed=len(role))
            for path, content in tokenizer.items():
                path.write_bytes(content)
    e = at_reduced_size(name)
    made = run(e)
    claims = {line["name"] for line in json.loads((made.workdir / "6-report" / "claims.json").read_text())["claims"]}
    assert (
        set(e.questions.ask) == TABLES.keys() and "noise_direction" in claims and {"accuracy", "disturbance"} & claims
    )
    page = (made.workdir / "6-report" / "report.html").read_text("utf-8")
    for question, table in TABLES.items():
        assert tables.read(made.workdir / "5-analysis" / table), question
        assert (
            f'data-figure="{FIGURES[question]}"' in page
            and (made.workdir / "6-report" / f"{FIGURES[question]}.png").exists()
        )


TABLES = {
    "composition": "composition_interaction.csv",
    "noise": "noise_effects.csv",
    "stability": "stability_vectors.csv",
    "offsets": "offsets_tests.csv",
    "side_effects": "side_effects.csv",
}
FIGURES = {name: name for name in TABLES} | {"offsets": "offsets_by_group"}
