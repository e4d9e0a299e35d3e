"""The benchmark on a tiny model: every program does the same work, and one that does not is found out."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
MEASURED = ("tokens_per_s", "runs_s", "warm_up_s", "load_s", "peak_gb", "busy_cores", "device", "threads")


def write_model(folder: Path) -> Path:
    tokenizer = tiny.tokenizer_json()
    tiny.write_model(folder, vocab_size=len(tokenizer["model"]["vocab"]) + len(tiny.MARKERS), seed=1)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    special = {"add_bos_token": True, "bos_token": tiny.BOS, "eos_token": tiny.EOS}
    (folder / "tokenizer_config.json").write_text(json.dumps(special), "utf-8")
    return folder


@pytest.mark.slow
@pytest.mark.hf
def test_programs_agree_and_are_reported(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(SCRIPTS / "benchmark.py"),
        f"--model={write_model(tmp_path / 'model')}",
        "--programs=ours_f32,hf_f32,ours_bf16,nnsight",
        "--rows=5",
        "--magnitudes=0,4,-8",
        "--prompt_tokens=12",
        "--new_tokens=6",
        "--sequences=3",
        "--sequence_tokens=64",
        "--batch=2",
        "--nnsight_rows=2",
        "--repeats=1",
        "--tasks=matmul,sweep,extract,finetune,lora",
        f"--json={tmp_path / 'report.json'}",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report == json.loads((tmp_path / "report.json").read_text())
    assert report["faults"] == []
    assert report["machine"]["cores"] >= 1 and "jax" in report["machine"]["versions"]
    for library in ("torch", "jax"):
        assert set(report["matmul"][library]) == {"float32", "bfloat16"}
        assert all(gflops > 0 for gflops in report["matmul"][library]["float32"].values())

    sweep, extract = report["sweep"], report["extract"]
    for results, tokens in ((sweep, 5 * 6), (extract, 3 * 64)):
        for name in ("ours_f32", "hf_f32", "ours_bf16"):
            assert results[name]["tokens"] == tokens
            assert results[name].keys() >= set(MEASURED)
        assert results["ours_f32"]["times_hf"] == pytest.approx(
            results["ours_f32"]["tokens_per_s"] / results["hf_f32"]["tokens_per_s"]
        )
    assert sweep["ours_f32"]["same_rows"] == 1 and sweep["ours_f32"]["logits_difference"] < 1e-4
    assert extract["ours_f32"]["sums_difference"] < 1e-4
    assert 1e-4 < extract["ours_bf16"]["sums_difference"] < 0.1  # another precision is seen, and not taken for a fault
    for results in (report["finetune"], report["lora"]):
        for name in ("ours_f32", "hf_f32", "ours_bf16"):
            assert results[name]["tokens"] == 2 * 64 and results[name].keys() >= set(MEASURED)
            assert results[name]["losses"] == sorted(results[name]["losses"], reverse=True)
        assert results["ours_f32"]["losses_difference"] < 1e-4
        assert results["nnsight"]["absent"] == "nnsight does not train"
    if importlib.util.find_spec("nnsight") is None:
        assert "nnsight" in sweep["nnsight"]["absent"] and "nnsight" in extract["nnsight"]["absent"]
    else:
        assert sweep["nnsight"]["same_rows"] == 1 and sweep["nnsight"]["tokens"] == 2 * 6
        assert extract["nnsight"]["sums_difference"] < 1e-4 and extract["nnsight"]["tokens"] == 2 * 64


def work(model: Path) -> dict[str, Any]:
    return {
        "model": str(model),
        "hf_folder": str(model),
        "layer": 1,
        "vector": [0.25] * 16,
        "prompts": [[1, 2, 3], [4, 5, 6]],
        "magnitudes": [0.0, 4.0],
        "new_tokens": 3,
        "sequences": [list(range(40))],
        "starts": [[[0, 30]]],
        "labels": ["deduction"],
        "offsets": [-1],
        "batch": 1,
        "copies": 1,
        "nnsight_rows": 1,
        "repeats": 1,
        "products": [[2, 3, 4]],
    }


def test_a_program_with_other_weights_is_not_timed(tmp_path: Path) -> None:
    (tmp_path / "work.json").write_text(json.dumps(work(write_model(tmp_path / "model"))))
    np.save(tmp_path / "logits.npy", np.random.default_rng(0).standard_normal((2, 1)))
    command = [sys.executable, str(SCRIPTS / "benchmark_programs.py"), "sweep", "ours_f32", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "logits differ from the reference" in done.stderr
    assert not (tmp_path / "sweep.ours_f32.json").exists()


def test_the_judge_is_measured_with_one_and_with_many_requests_in_flight() -> None:
    command = [sys.executable, str(SCRIPTS / "benchmark_judge.py"), "--latency=0.02", "--concurrency=4"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["latency_s"], found["concurrency"]) == (0.02, 4)
    assert found["one_s_per_call"] > 0.02 and found["many_s_per_call"] > 0.02 / 4
    assert found["speedup"] == pytest.approx(found["one_s_per_call"] / found["many_s_per_call"], abs=0.1)
