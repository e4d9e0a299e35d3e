"""A run that is killed, at any moment, goes on to the same bytes."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
from matplotlib.figure import Figure
from runs import STAGES, TINY, contents, lines_of, run


def command(*arguments: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """The program, as its own process, in the working directory."""
    return subprocess.run(
        [sys.executable, "-m", "backtrack_jax.run", f"--config={TINY}", *arguments],
        capture_output=True,
        text=True,
        **kwargs,
    )


class Killed(BaseException):
    """Stands for SIGKILL in the process of the tests: after it, nothing reaches the disk."""


class Disk:
    """Lets `left` changes through, then tears what is being written and dies, again at every later change."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left = 0
        self._change(monkeypatch, Path, "replace")
        self._change(monkeypatch, Path, "unlink")
        self._change(monkeypatch, os, "truncate")
        fsync = os.fsync

        def torn_fsync(descriptor: int) -> None:
            if self.left <= 0:
                os.ftruncate(descriptor, os.fstat(descriptor).st_size * 2 // 3)
                raise Killed
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", torn_fsync)

    def _change(self, monkeypatch: pytest.MonkeyPatch, holder: Any, name: str) -> None:
        original = getattr(holder, name)

        def change(*args: Any, **kwargs: Any) -> Any:
            if self.left <= 0:
                raise Killed
            self.left -= 1
            return original(*args, **kwargs)

        monkeypatch.setattr(holder, name, change)


def test_death_at_any_change_on_disk(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that dies again and again, after a few changes each time, comes to the artifacts of one that does not."""
    e = tiny.get_config()
    e.steering.kinds, e.steering.limit = ("backtracking", "noise"), 2  # two batches for each model
    e.steering.baselines = e.steering.offsets = e.steering.layers = ()
    # All files of the report are written, but none takes long: it is drawn anew after every death.
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, format, **_: file.write(f"a {format}".encode()))
    with monkeypatch.context() as patch:
        disk = Disk(patch)
        rng = random.Random(0)
        deaths = 0
        while deaths < 200:
            disk.left = rng.randint(2, 9 + deaths)  # grows: stage 3 writes its vectors anew each time
            try:
                run(e)
                break
            except Killed:
                deaths += 1
        assert 10 < deaths < 200
    died = contents(fresh)
    shutil.rmtree(fresh)
    run(e)
    assert {name: content for name, content in died.items() if not name.endswith(".tmp")} == contents(fresh)


KILLER = """
import os, runpy, signal, sys
from backtrack_jax.files import store
name, calls = sys.argv.pop(1), int(sys.argv.pop(1))
original = getattr(store, name)
def killing(path, *args):
    global calls
    original(path, *args)
    calls -= path.name.endswith(("sums.safetensors", "replies.jsonl"))
    if calls == 0:
        os.kill(os.getpid(), signal.SIGKILL)
setattr(store, name, killing)
runpy.run_module("backtrack_jax.run", run_name="__main__")
"""


@pytest.mark.slow
def test_sigkill_in_the_long_stages(fresh: Path, tiny_run: Path) -> None:
    """After one batch of stage 3, then after two of stage 4, from where smaller ones go on to the same bytes."""
    for name, calls in (("write_safetensors", 1), ("append_lines", 2)):
        started = [sys.executable, "-c", KILLER, name, str(calls), f"--config={TINY}"]
        assert subprocess.run(started, capture_output=True).returncode == -signal.SIGKILL
    partial = fresh / "4-steering" / "base.replies.jsonl"
    assert len(lines_of(partial)) == 2 * 32
    with partial.open("a") as file:
        file.write('{"row": 64, "ids": [1')  # torn, as by a loss of power
    (fresh / "4-steering" / ".generations.jsonl.tmp").write_text("{")
    ended = command("--config.steering.batch_size=7")
    assert ended.returncode == 0, ended.stderr
    assert "3-vectors: done before" in ended.stderr
    assert re.search(r"base model: 114 of 114 rows, ", ended.stderr)
    resumed, whole = contents(fresh), contents(tiny_run / "results" / "tiny")
    for page in (resumed, whole):
        page.pop("6-report/report.html")  # where the settings stand
        page.pop("6-report/DONE")  # which has its size
    assert resumed == whole
    described = json.loads((fresh / "4-steering" / "run.json").read_text())
    assert described["config"]["steering"]["batch_size"] == 7
    assert [before["config"]["steering"]["batch_size"] for before in described["earlier"]] == [32]


@pytest.mark.slow
def test_sigkill_at_random_moments(fresh: Path, tiny_run: Path) -> None:
    rng = random.Random(0)
    died_in = set()
    for _ in range(40):
        process = subprocess.Popen(
            [sys.executable, "-m", "backtrack_jax.run", f"--config={TINY}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            assert process.wait(timeout=rng.uniform(2, 9)) == 0
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            died_in.add(sum(1 for name in STAGES if (fresh / name / "DONE").exists()))
    else:
        assert command().returncode == 0
    assert len(died_in) > 1
    whole = {name: content for name, content in contents(fresh).items() if not name.endswith(".tmp")}
    assert whole == contents(tiny_run / "results" / "tiny")
