"""The viewer of read windows, on chains whose windows are known."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from commands import Command

from backtrack_jax import pipeline, show


def test_the_windows_of_a_chain(fresh: Path) -> None:
    """Nothing is written, no model is loaded; the window ends two tokens before the section."""
    run = pipeline.Run(tiny.get_config(), ("1-traces", "2-annotations"))
    before = sorted(Path.cwd().rglob("*"))
    text = show.describe(run, tiny.TASKS[0], colour=False)
    assert sorted(Path.cwd().rglob("*")) == before
    assert "trace verbal_0/0 (verbal), labelled by" in text and tiny.chains()[0]["problem"] in text
    for role in ("base", "reasoning"):
        assert f"as the {role} model reads it" in text
    read = re.findall(r"start (\d+) 'W' reads (.*)", text)
    assert len(read) == 2
    for start, window in read:
        positions = [int(p) for p in re.findall(r"(\d+):'", window)]
        assert positions == list(range(int(start) - 5, int(start) - 1))
    marked = re.findall(r"⟦(.*?)⟧", text, re.DOTALL)
    assert marked[:4] == marked[4:] and text.count("»W«") == 2
    whole = "".join(re.sub("[⟦⟧»«]", "", text))
    assert tiny.chains()[0]["reasoning_chain"].removeprefix("<think>") in whole
    coloured = show.describe(pipeline.Run(tiny.get_config(), ("1-traces", "2-annotations")), tiny.TASKS[0], colour=True)
    assert coloured.count("\x1b[30;42m") == 8 and coloured.count("\x1b[1;97;41m") == 2


def test_a_window_that_leaves_the_reply_is_named(finished: Path) -> None:
    run = pipeline.Run(tiny.get_config(), ("1-traces", "2-annotations"))
    text = show.describe(run, tiny.TASKS[5] + "/0", colour=False)
    assert re.search(r"start \d+ 'W': dropped, its window \d+\.\.\d+ leaves the reply", text)


def test_what_cannot_be_shown_is_an_error(fresh: Path) -> None:
    e = tiny.get_config()
    with pytest.raises(ValueError, match=r"no annotated trace 'x' among 12; available: verbal_0/0"):
        show.describe(pipeline.Run(e, ("1-traces", "2-annotations")), "x", colour=False)
    e.annotations.judge = "openai"
    with pytest.raises(ValueError, match=r"labels of this config are paid for; run it with --stages=1,2 first"):
        show.describe(pipeline.Run(e, ("1-traces", "2-annotations")), "x", colour=False)
    e.traces.path, e.annotations.judge, e.steering.kinds, e.steering.baselines = "", "keyword", ("noise",), ()
    with pytest.raises(ValueError, match=r"--stages=1,2 first$"):
        show.describe(pipeline.Run(e, ("1-traces", "2-annotations")), "x", colour=False)
    (fresh / "1-traces").mkdir(parents=True)
    (fresh / "1-traces" / "inputs.json").write_text("{}")  # of another config
    with pytest.raises(ValueError, match="those in results/tiny are from another config: give that run's overrides"):
        show.describe(pipeline.Run(e, ("1-traces", "2-annotations")), "x", colour=False)


def test_the_traces_are_those_that_a_run_reads_in_its_folder(fresh: Path, command: Command) -> None:
    """`traces.stand_in`, where traces would be sampled; and `--workdir` is that of the run."""
    experiment = Path("sampling.py")
    change = f"e.traces.path, e.traces.stand_in, e.annotations.judge = '', {tiny.CHAINS!r}, 'released-or-keyword'"
    experiment.write_text(
        f"import tiny\n\n\ndef get_config():\n    e = tiny.get_config()\n    {change}\n    return e\n"
    )
    arguments = ("verbal_1/0", "--workdir=else/where")
    shown, message = command(f"--config={experiment}", *arguments, program=show)
    assert "»" in shown, message
    e = tiny.get_config()
    e.workdir = "else/where"
    pipeline.Run(e, ("1-traces", "2-annotations")).run()
    (annotations,) = Path("else/where").glob("*/2-annotations/annotations.jsonl")
    annotations.write_text(annotations.read_text().replace("backtracking", "initializing"))
    done = annotations.with_name("DONE")  # as an earlier version wrote it, which vouches for sizes alone
    done.write_text(re.sub(r" [0-9a-f]{16} ", " ", done.read_text()))
    shown, message = command(f"--config={tiny.__file__}", *arguments, program=show)
    assert "no section is labelled 'backtracking'" in shown, message


@pytest.mark.slow
def test_the_command(fresh: Path, command: Command) -> None:
    started = [sys.executable, "-m", "backtrack_jax.show", f"--config={tiny.__file__}", "verbal_1/0"]
    done = subprocess.run(started, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    assert done.returncode == 0 and "»" in done.stdout, done.stderr
    assert command(f"--config={tiny.__file__}", program=show) == (
        "",
        "error: name one trace: python -m backtrack_jax.show TRACE --config=FILE",
    )
