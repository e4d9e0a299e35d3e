"""The self-check passes on what is sound, and each of its checks fails, by name, on what it is for."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from commands import Command
from helpers import need_torch
from sizes import TINY, random_model

from backtrack_jax import selfcheck
from backtrack_jax.config import AnnotationSpec, Experiment, ModelSpec, PromptSpec, TraceSpec
from backtrack_jax.intervention import Intervention
from backtrack_jax.models import checkpoint, decoder, families
from backtrack_jax.models.config import LayerKind, ModelConfig, YarnRopeScaling
from backtrack_jax.readers import Reader
from backtrack_jax.stages.base import Context

CONFIG = f"--config={tiny.__file__}"
ALONE = ["tokenizer", "prompt holds the problem", "one BOS", "markers"]
COMPUTED = [check.name for check in selfcheck.CHECKS if check.name not in (*ALONE, "files")]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny experiment, in the working directory."""
    tiny.write(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def retraced() -> Iterator[None]:
    """Programs are traced anew, with what a test has put in the place of parts of the model, and not kept."""
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.fixture
def no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else found(name))


@pytest.fixture
def no_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the check that takes longest to compile, where nothing that it could find is at stake."""
    kept = tuple(check for check in selfcheck.CHECKS if check.name != "sampling follows steering")
    monkeypatch.setattr(selfcheck, "CHECKS", kept)


def results(e: Experiment) -> dict[str, str]:
    """Check -> status, of a single model."""
    lines = list(selfcheck.run(e))
    assert len(lines) == 1 + len(selfcheck.CHECKS)
    assert all(line.compared and line.seconds >= 0 for line in lines)
    return {line.check: line.status for line in lines}


def failed(e: Experiment) -> list[str]:
    return [name for name, status in results(e).items() if status == "fail"]


def alone(role: str = "reasoning", **changes: Any) -> Experiment:
    e = dataclasses.replace(tiny.get_config(), roles=(role,))
    return dataclasses.replace(e, **changes)


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_sound_experiment_passes_and_says_what_was_compared(folder: Path, command: Command) -> None:
    need_torch()
    printed, message = command(CONFIG, "--json=found.json", program=selfcheck)
    assert not message
    found = json.loads(Path("found.json").read_text())
    assert found["passed"] and found["versions"]["jax"] and found["config"]["name"] == "tiny"
    names = [check.name for check in selfcheck.CHECKS]
    expected = [("tokenizer", "")] + [(name, role) for role in ("base", "reasoning") for name in names]
    assert [(line["check"], line["model"]) for line in found["checks"]] == expected
    for line in found["checks"]:
        skipped = line["check"] == "int8 like 16 bits"
        assert line["status"] == ("skipped" if skipped else "pass"), line
        if line["check"] in COMPUTED and not skipped:
            assert line["rows"] >= 4 and 0 <= line["difference"] <= line["bound"] <= 1e-4, line
        assert line["check"] in printed and line["compared"] in printed
    assert "19 passed, 0 failed, 2 skipped" in printed
    base = next(line for line in found["checks"] if (line["check"], line["model"]) == ("markers", "base"))
    assert "this model reads none of them" in base["compared"]


def test_a_tokenizer_that_loses_characters(folder: Path, command: Command) -> None:
    """What follows means nothing then, and nothing is loaded."""
    squeeze = {"type": "Replace", "pattern": {"String": "  "}, "content": " "}
    edit_json(folder / "reasoning" / "tokenizer.json", lambda spec: spec.update(normalizer=squeeze))
    printed, message = command(CONFIG, "--json=found.json", program=selfcheck)
    assert message == "error: failed: tokenizer (both models)" and "1 failed, 20 skipped" in printed
    found = json.loads(Path("found.json").read_text())
    assert not found["passed"]
    first, *others = found["checks"]
    assert (first["check"], first["status"]) == ("tokenizer", "fail") and "comes back as" in first["compared"]
    assert {(line["status"], line["compared"]) for line in others} == {("skipped", "'tokenizer' failed")}


def test_a_tokenizer_with_other_ids_than_its_vocabulary_has(folder: Path) -> None:
    """The id of BOS is Llama-3's, and the texts known of that vocabulary have other ids here."""
    added = {"id": 128000, "content": tiny.BOS}

    def renumber(spec: dict[str, Any]) -> None:
        vocabulary = spec["model"]["vocab"]
        vocabulary |= {f"Ġfill{i}": i for i in range(len(vocabulary), 128000)}
        for number, token in enumerate(spec["added_tokens"]):
            token["id"] = added["id"] + number

    edit_json(folder / "reasoning" / "tokenizer.json", renumber)
    assert failed(alone())[0] == "tokenizer"


def test_a_prompt_without_its_problem(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Context.prompt_ids
    monkeypatch.setattr(Context, "prompt_ids", lambda self, role, problem: whole(self, role, problem[:9]))
    statuses = results(alone())
    assert [name for name, status in statuses.items() if status == "fail"] == ["prompt holds the problem"]
    assert statuses["parity with torch"] == "skipped"


@pytest.mark.usefixtures("no_torch")
@pytest.mark.slow
def test_a_second_bos(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Context.prompt_ids
    bos = tiny.VOCAB_SIZE - len(tiny.MARKERS)
    monkeypatch.setattr(Context, "prompt_ids", lambda self, role, problem: [bos, *right(self, role, problem)])
    assert failed(alone()) == ["one BOS"]


@pytest.mark.usefixtures("no_torch")
def test_markers_that_a_model_was_not_to_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    e = alone("base", tokenizer="reasoning")
    assert results(e)["markers"] == "pass"
    monkeypatch.setattr(Reader, "for_model", lambda self, ids: (list(ids), np.arange(len(ids))))
    assert failed(e) == ["markers"]


def test_files_that_do_not_fit(folder: Path) -> None:
    edit_json(folder / "reasoning" / "config.json", lambda fields: fields.update(num_hidden_layers=4))
    statuses = results(alone())
    assert statuses["files"] == "fail" and {statuses[name] for name in COMPUTED} == {"skipped"}
    e = alone()
    e.steering.layer = (7,)
    assert failed(e) == ["files"]


@pytest.mark.usefixtures("no_torch", "retraced", "no_sampling")
@pytest.mark.slow
def test_padding_that_is_attended_to(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = decoder.packed_mask

    def wrong(positions: jax.Array, window: int | None) -> jax.Array:
        return right(positions, window) | (positions < 0)[:, None]

    monkeypatch.setattr(decoder, "packed_mask", wrong)
    assert "batch = single" in failed(alone())


@pytest.mark.usefixtures("no_torch", "retraced", "no_sampling")
def test_a_cache_of_which_a_token_is_not_seen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = decoder.causal_mask

    def wrong(queries: jax.Array, keys: jax.Array, window: int | None) -> jax.Array:
        return right(queries, keys, window) & (keys != 5)[:, None]

    monkeypatch.setattr(decoder, "causal_mask", wrong)
    assert failed(alone()) == ["cached = uncached"]


@pytest.mark.usefixtures("no_torch", "retraced")
@pytest.mark.parametrize("missed", ["every step", "one step"])
def test_steering_that_does_not_reach_a_step(missed: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Intervention.apply
    sequences = selfcheck.Subject(Context(alone(), Path("results"), ""), "reasoning", ["Add two."]).sequences
    one = len(sequences[0]) - 3

    def wrong(self: Intervention, x: jax.Array, at_layer: Any, layer: jax.Array, positions: jax.Array) -> jax.Array:
        steered = right(self, x, at_layer, layer, positions)
        if x.shape[1] > 1:  # prefill, and what is compared with
            return steered
        return jnp.where((positions == one)[..., None] | (missed == "every step"), x, steered)

    monkeypatch.setattr(Intervention, "apply", wrong)
    e = alone(traces=TraceSpec(problems="problems.jsonl"), annotations=AnnotationSpec(judge="keyword"))
    Path("problems.jsonl").write_text(json.dumps({"id": "0", "category": "verbal", "problem": "Add two."}) + "\n")
    assert failed(e) == ["cached = uncached", "steering reaches every step", "sampling follows steering"]


@pytest.mark.usefixtures("no_torch")
@pytest.mark.slow
def test_a_loop_that_samples_without_steering(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = selfcheck.compiled_generate

    def wrong(
        model: Any, ids: Any, positions: Any, keys: Any, steering: Intervention, *others: Any, **more: Any
    ) -> Any:
        start = jnp.maximum(steering.span, 0)
        late = dataclasses.replace(steering, span=start.at[:, 0].add(1))
        return right(model, ids, positions, keys, late, *others, **more)

    monkeypatch.setattr(selfcheck, "compiled_generate", wrong)
    assert failed(alone()) == ["sampling follows steering"]


@pytest.mark.hf
def test_weights_that_torch_has_otherwise(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need_torch()
    import transformers

    right = transformers.LlamaForCausalLM.from_pretrained

    def wrong(*args: Any, **kwargs: Any) -> Any:
        model = right(*args, **kwargs)
        model.get_parameter("model.layers.1.mlp.up_proj.weight").data[0, 0] += 0.1
        return model

    monkeypatch.setattr(transformers.LlamaForCausalLM, "from_pretrained", wrong)
    assert failed(alone()) == ["parity with torch"]


@pytest.mark.usefixtures("no_torch")
def test_what_is_skipped_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = {line.check: line for line in selfcheck.run(alone())}
    assert lines["parity with torch"].status == "skipped"
    assert lines["parity with torch"].compared == "torch is not installed"
    assert lines["int8 like 16 bits"].compared == "the weights are float32, not int8"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(os, "sysconf", lambda name: 100)
    subject = selfcheck.Subject(Context(alone(), Path("results"), ""), "reasoning", ["Add two."])
    assert "of 0.0 GB in all" in selfcheck.parity_with_torch(subject).compared


@pytest.mark.usefixtures("no_torch")
@pytest.mark.slow
def test_weights_of_8_bits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sound ones are near the 16-bit model; ones with scales of other channels are not."""
    e = alone(reasoning=ModelSpec("reasoning", dtype="int8"))
    lines = {line.check: line for line in selfcheck.run(e)}
    line = lines["int8 like 16 bits"]
    assert line.status == "pass" and line.difference is not None and 0 < line.difference < 0.05
    for said in ("with bfloat16: KL 0.0", "argmax equal at ", "cosine of the vectors reply - prompt at layer 1 0.99"):
        assert said in line.compared
    assert not [name for name, line in lines.items() if line.status == "fail"]
    right = checkpoint.rounded

    def wrong(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        integers, scales = right(rows)
        return np.roll(integers, 1, axis=0), scales

    monkeypatch.setattr(checkpoint, "rounded", wrong)
    assert failed(e) == ["int8 like 16 bits"]


def test_divergence() -> None:
    p, q = np.log([[0.5, 0.25, 0.25]]), np.log([[0.25, 0.5, 0.25]]) + 3
    np.testing.assert_allclose(selfcheck.divergence(p, q), [0.25 * np.log(2)])


SIZES = dataclasses.replace(TINY, n_layers=2, vocab_size=tiny.VOCAB_SIZE, rope_theta=1e4, rope_scaling=None)
WINDOW, FULL = LayerKind(scaled=False, window=6), LayerKind()
OF_FAMILY: dict[str, ModelConfig] = {
    "llama": dataclasses.replace(SIZES, rope_scaling=TINY.rope_scaling, tied=True, vocab_size=tiny.VOCAB_SIZE + 7),
    "qwen2": dataclasses.replace(SIZES, biases=("q_proj", "k_proj", "v_proj"), vocab_size=tiny.VOCAB_SIZE + 30),
    "qwen3": dataclasses.replace(SIZES, qk_norm="head", tied=True),
    "mistral": dataclasses.replace(SIZES, layer_kinds=(LayerKind(window=6),) * 2),
    "smollm3": dataclasses.replace(SIZES, layer_kinds=(FULL, LayerKind(rotary=False)), tied=True),
    "olmo3": dataclasses.replace(
        SIZES,
        qk_norm="width",
        norms_after=True,
        layer_kinds=(WINDOW, FULL),
        rope_theta=5e5,
        rope_scaling=YarnRopeScaling(factor=8.0, original_context=64),
    ),
}
WITH_BOS = ("llama", "mistral")


@pytest.mark.hf
@pytest.mark.usefixtures("no_sampling")
@pytest.mark.parametrize(
    "family", [name if name == "olmo3" else pytest.param(name, marks=pytest.mark.slow) for name in families.FAMILIES]
)
def test_every_family(family: str, tmp_path: Path) -> None:
    """Tied or not, with rows of the embedding beyond the tokenizer's, windows, and with or without BOS."""
    need_torch()
    config = dataclasses.replace(OF_FAMILY[family], family=family)
    checkpoint.save_hf(random_model(config), tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(tiny.tokenizer_json()), "utf-8")
    special = {"add_bos_token": family in WITH_BOS, "bos_token": tiny.BOS, "eos_token": tiny.EOS}
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(special), "utf-8")
    e = Experiment(
        roles=("base",),
        base=ModelSpec(str(tmp_path / "model"), dtype="float32"),
        prompt=PromptSpec(format="plain"),
        traces=TraceSpec(limit=12),
    )
    e.steering.layer = (1,)
    statuses = results(e)
    skipped = {"int8 like 16 bits"} | (set() if family in WITH_BOS else {"one BOS"})
    assert statuses == {name: "skipped" if name in skipped else "pass" for name in statuses}


@pytest.mark.slow
def test_the_command_on_two_devices(folder: Path) -> None:
    """Rows are divided between two copies of a model that is sound; the other one lacks its weights: exit code 1."""
    (folder / "base" / "model.safetensors").unlink()
    command = [sys.executable, "-m", "backtrack_jax.selfcheck", CONFIG, "--config.data_parallel=2", "--json=found.json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "error: failed: files (base)" in done.stderr, done.stdout + done.stderr
    found = json.loads(Path("found.json").read_text())
    assert found["device"]["count"] == 2 and not found["passed"]
    assert {line["status"] for line in found["checks"] if line["model"] == "reasoning"} == {"pass", "skipped"}
