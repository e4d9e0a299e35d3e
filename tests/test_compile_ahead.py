"""The compiler for TPUs, which needs none."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax import lax

SCRIPTS = Path(__file__).parents[1] / "scripts"
SIZES = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "vocab_size": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize("flags", [["--chips=1"], ["--chips=4", "--model_parallel=2"]], ids=["one chip", "2 x 2 chips"])
def test_sampling_and_reading_compile_and_copy_no_cache(tmp_path: Path, flags: list[str]) -> None:
    pytest.importorskip("libtpu", reason="needs libtpu, which the extra `tpu` brings")
    (tmp_path / "config.json").write_text(json.dumps(SIZES))
    shapes = ["--rows=16", "--prompt_tokens=128", "--new_tokens=128", "--read_rows=8", "--read_tokens=256"]
    command = [sys.executable, str(SCRIPTS / "compile_ahead.py"), f"--config_json={tmp_path / 'config.json'}"]
    done = subprocess.run([*command, "--topology=v5e:2x2", *flags, *shapes], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sampled, read = (json.loads(line) for line in done.stdout.splitlines())
    assert sampled["copied_per_block_gb"] == 0
    assert sampled["given_gb"] < 0.1
    assert read["on_the_way_gb"] < 0.1


def test_branches_and_loops_of_the_decode_loop_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a program of which they are known: a loop with a branch, which holds a loop, and another loop before it."""
    monkeypatch.syspath_prepend(SCRIPTS)
    loop_counts = importlib.import_module("hlo_loops").loop_counts

    def program(x: jax.Array) -> jax.Array:
        x = lax.while_loop(lambda s: jnp.sum(s) < 3, lambda s: s + 1, x)

        def inner(s: jax.Array) -> jax.Array:
            return lax.while_loop(lambda t: jnp.max(t) > 1, lambda t: jnp.sin(t) * 0.9, s)

        def body(s: jax.Array) -> jax.Array:
            s = lax.cond(jnp.sum(s) > 5, inner, jnp.cos, s)
            return jnp.sort(s @ s) + 1

        return lax.while_loop(lambda s: jnp.sum(s) < 1e6, body, x)

    text = jax.jit(program).lower(jnp.ones((8, 8))).compile().as_text()
    found = loop_counts(text)
    assert (found["conditionals"], found["whiles"]) == (1, 1) and 4 <= found["kernels"] < 40
    assert loop_counts(jax.jit(jnp.sin).lower(jnp.ones(3)).compile().as_text()) == {}
