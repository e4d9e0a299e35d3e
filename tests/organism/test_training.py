"""The training script: a killed run ends with the weights of an uninterrupted one."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHORT = ["--batch_size=2", "--base_steps=6", "--reasoning_steps=4", "--save_every=2"]


def train(out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "scripts/train_organism.py", f"--out={out}", *SHORT]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_killed_training_ends_with_the_same_weights(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole")
    _, log = whole.communicate(timeout=600)
    assert "less than 95 %" in log  # a pair of ten steps is none, and the script says so
    assert whole.returncode == 1
    killed = train(tmp_path / "killed")
    deadline = time.monotonic() + 300
    saved = tmp_path / "killed" / "checkpoints" / "base" / "4"
    while not saved.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert saved.exists()
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=60)
    assert not (tmp_path / "killed" / "reasoning").exists()
    train(tmp_path / "killed").communicate(timeout=600)
    for role in ("base", "reasoning"):
        one, other = (tmp_path / run / role / "model.safetensors" for run in ("whole", "killed"))
        assert one.read_bytes() == other.read_bytes()
