"""configs/paper.py through all stages: random weights of Llama-3.1's architecture, small, with R1's real tokenizer."""

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
from sizes import LLAMA_8B

from backtrack_jax import checks, config, pipeline
from backtrack_jax.data import records
from backtrack_jax.files import store, tables
from backtrack_jax.models import checkpoint
from backtrack_jax.models.safetensors import LazyTensor

PAPER = Path(__file__).parents[2] / "configs" / "paper.py"
# All but the vocabulary's size, which is R1's.
SMALL = dataclasses.replace(LLAMA_8B, d_model=32, d_mlp=112, n_layers=4, n_heads=4, n_kv_heads=1, head_dim=16)


def write_random(folder: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    lazy = {}
    for name, shape in checkpoint.expected_tensors(SMALL).items():
        weight = (rng.standard_normal(shape) / np.sqrt(shape[-1]) if len(shape) == 2 else np.ones(shape)).astype("f4")
        lazy[name] = LazyTensor(weight.shape, weight.dtype, lambda w=weight: w, name)
    checkpoint.write_hf(SMALL, lazy, folder)


def reduced() -> config.Experiment:
    spec = importlib.util.spec_from_file_location("paper", PAPER)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    e: config.Experiment = module.get_config()
    e.base.path, e.reasoning.path, e.reasoning.revision = "base", "reasoning", ""
    e.traces.path, e.annotations.judge = tiny.CHAINS, "released"  # a random model never says Wait
    e.vectors.layers, e.vectors.batch_size = (2,), 6
    s = e.steering
    s.layer, s.layers, s.magnitudes, s.grid_magnitudes = (2,), (0, 3), (0.0, 8.0), (0.0, 8.0)
    s.limit, s.max_new_tokens, s.batch_size = 2, 4, 32
    e.analysis.batch_size, e.analysis.positions, e.analysis.shown = 6, 8, 2
    return e


@pytest.mark.slow
def test_every_stage(r1_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for role, seed in (("base", 1), ("reasoning", 2)):
        write_random(Path(role), seed)
        for file in r1_folder.iterdir():
            shutil.copy(file, Path(role) / file.name)
    Path(tiny.CHAINS).write_text(json.dumps(tiny.chains()), "utf-8")
    e = reduced()
    checks.check(e)
    pipeline.Run(e).run()
    results = Path("results/paper")
    lines = store.read_lines(results / "4-steering" / "generations.jsonl")
    # Both models: unsteered and two sources; the reasoning model: 7 baselines, 5 offsets, 2 layers x 2 sources.
    assert len(lines) == 2 * (3 + 3 + 7 + 5 + 4)
    assert {line["window"] for line in lines} == {"", "-13..-8", "-21..-16", "-17..-12", "-9..-4", "-5..0", "-1..4"}
    drawn = {path.stem for path in (results / "6-report").glob("*.png")}
    assert {"fig1_trace", "fig2_offsets", "fig3_pairs", "fig4_baselines", "fig5_logit_lens", "fig6_projection"} <= drawn
    assert {"figB1_layers", "probe", "cosine_by_layer", "label_cosines", "reliability"} <= drawn
    keywords = {row["text"] for row in tables.read(results / "5-analysis" / "base.lens_tokens.csv")}
    assert len(keywords) > 50
    assert "paper" in (results / "6-report" / "report.html").read_text("utf-8")

    sampled = reduced()  # traces of the model's own, in R1's prompt format
    sampled.name, sampled.traces.path, sampled.annotations.judge = "sampled", "", "keyword"
    sampled.steering.baselines = ("noise",)
    sampled.traces.limit, sampled.traces.max_new_tokens, sampled.traces.batch_size = 3, 4, 32
    pipeline.Run(sampled, pipeline.stage_names(["1", "2"])).run()
    traces = records.read_traces("results/sampled/1-traces/traces.jsonl")
    assert len(traces) == 3 and all(trace.token_ids for trace in traces)
