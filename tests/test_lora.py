import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import hf_llama, relative_error, save
from torch_reference import CONFIG

from backtrack_jax.models import checkpoint
from backtrack_jax.models.decoder import Decoder
from backtrack_jax.training import fit as train
from backtrack_jax.training import lora as lora_
from backtrack_jax.training.lora import Lora
from backtrack_jax.training.loss import cross_entropy
from backtrack_jax.training.packing import Tokens, pack

pytestmark = pytest.mark.usefixtures("optax_promotes")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(hf_llama(), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Decoder:
    return checkpoint.load(str(folder), "float32")


def weights(model: Decoder) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model))]


def trained(model: Decoder, lora: Lora) -> lora_.Adapters:
    """Adapters as training leaves them: B is no longer zero."""
    rng = np.random.default_rng(0)
    new = lora_.init(model, lora, jax.random.key(0))
    return {path: {"A": a["A"], "B": a["B"] + 0.1 * rng.standard_normal(a["B"].shape)} for path, a in new.items()}


def merged_with(model: Decoder, adapters: lora_.Adapters, lora: Lora) -> Decoder:
    return lora_.fold(lora_.attach(model, adapters, lora))


def test_new_adapters_change_nothing(model: Decoder) -> None:
    lora = Lora(rank=2)
    merged = merged_with(model, lora_.init(model, lora, jax.random.key(0)), lora)
    for a, b in zip(weights(model), weights(merged), strict=True):
        np.testing.assert_array_equal(a, b)


def test_only_targets_change_and_by_the_given_rank(model: Decoder) -> None:
    lora = Lora(rank=2, alpha=6.0, targets=("q_proj", "down_proj"))
    adapters = trained(model, lora)
    merged = merged_with(model, adapters, lora)
    difference = np.asarray(merged.layers.self_attn.q_proj.weight[...] - model.layers.self_attn.q_proj.weight[...])
    pair = adapters["self_attn.q_proj"]
    np.testing.assert_allclose(difference, 3.0 * np.asarray(pair["A"] @ pair["B"]), atol=1e-5)
    assert np.linalg.matrix_rank(difference[0], tol=1e-4) == 2
    np.testing.assert_array_equal(merged.layers.mlp.up_proj.weight[...], model.layers.mlp.up_proj.weight[...])


def test_unknown_targets_and_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"targets \['lm_head'\] are not matrices of a block"):
        Lora(targets=("lm_head",))
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"rank": 0}, "rank=0, expected an integer of at least 1"),
        ({"rank": 2.5}, "rank=2.5, expected an integer of at least 1"),
        ({"alpha": np.nan}, "alpha=nan, expected a finite number"),
        ({"targets": ()}, r"targets=\(\), expected some of q_proj"),
    )
    for nonsense, message in cases:
        with pytest.raises(ValueError, match=message):
            Lora(**nonsense)


DEFAULTS = {  # as PEFT writes them
    "use_rslora": False,
    "use_dora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "bias": "none",
    "alora_invocation_tokens": None,
    "init_lora_weights": True,
    "lora_bias": False,
    "lora_dropout": 0.05,
    "layer_replication": None,
    "layers_to_transform": [0, 1, 2],
    "loftq_config": {},
    "megatron_core": "megatron.core",
    "qalora_group_size": 16,
    "peft_version": "0.21.2",
    "revision": None,
}


@pytest.mark.parametrize("options", [{}, DEFAULTS], ids=["ours", "PEFT's"])
def test_saved_adapters_load_back_as_the_merged_model(
    options: dict[str, Any], model: Decoder, folder: Path, tmp_path: Path
) -> None:
    lora = Lora(rank=3, alpha=5.0)
    adapters = trained(model, lora)
    lora_.save(adapters, lora, tmp_path / "adapter", str(folder))
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | options))
    loaded = lora_.load(tmp_path / "adapter", "float32")
    for a, b in zip(weights(merged_with(model, adapters, lora)), weights(loaded), strict=True):
        np.testing.assert_array_equal(a, b)


def test_16_bit_adapters_are_folded_in_float32(model: Decoder, folder: Path, tmp_path: Path) -> None:
    """As PEFT does, which multiplies the 16-bit values of such a file in the model's precision."""
    lora = Lora(rank=3, alpha=5.0)
    rounded = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), trained(model, lora))
    lora_.save(rounded, lora, tmp_path, str(folder))
    expected = merged_with(model, jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), rounded), lora)
    for a, b in zip(weights(expected), weights(lora_.load(tmp_path, "float32")), strict=True):
        np.testing.assert_array_equal(a, b)


def test_adapters_of_another_model_are_refused(model: Decoder, folder: Path, tmp_path: Path) -> None:
    lora = Lora(rank=3)
    lora_.save(trained(model, lora), lora, tmp_path, str(folder))
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"r": 2}))
    with pytest.raises(ValueError, match=r"lora_A.weight has shape \(3, 40\), expected \(2, 40\)"):
        lora_.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"holds no adapters: it has no adapter_config.json"):
        lora_.load(folder)


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"rank_pattern": {"q_proj": 4}},
        {"alpha_pattern": {"q_proj": 4}},
        {"fan_in_fan_out": True},
        {"modules_to_save": ["lm_head"]},
        {"bias": "lora_only"},
        {"alora_invocation_tokens": [1, 2]},
        {"layer_replication": [[1, 2], [0, 2]]},
        {"lora_bias": True},
        {"an_option_of_later_versions": 1},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "OLoRA"},
        {"target_modules": "all-linear"},
        {"target_modules": None},
        {"use_dora": True, "alpha_pattern": {"q_proj": 4}},
    ],
    ids=", ".join,
)
def test_options_of_peft_that_are_not_followed_are_refused(
    options: dict[str, Any], model: Decoder, folder: Path, tmp_path: Path
) -> None:
    lora = Lora(rank=3)
    lora_.save(trained(model, lora), lora, tmp_path, str(folder))
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | options))
    listed = ", ".join(f"{name}={value!r}" for name, value in options.items())
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path} holds adapters with {listed}; expected")):
        lora_.load(tmp_path, "float32")


def test_what_is_no_lora_or_names_no_model_is_refused(model: Decoder, folder: Path, tmp_path: Path) -> None:
    lora = Lora(rank=3)
    lora_.save(trained(model, lora), lora, str(tmp_path), str(folder))
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({"peft_type": "IA3", "base_model_name_or_path": str(folder)}))
    with pytest.raises(ValueError, match=f"{tmp_path} holds adapters with peft_type='IA3', expected 'LORA'"):
        lora_.load(str(tmp_path))
    path.write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="base_model_name_or_path=None, expected the folder or hub id of the model"):
        lora_.load(str(tmp_path))
    path.write_text(json.dumps(config))
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"has no adapter_model.safetensors, only adapter_model.bin; convert"):
        lora_.load(str(tmp_path))


def test_the_base_model_is_that_of_the_named_revision(
    model: Decoder, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = Lora(rank=3)
    lora_.save(trained(model, lora), lora, tmp_path, "owner/name")
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"revision": "v1"}))
    asked = []

    def resolve(name: str, revision: str | None = None) -> Path:
        asked.append((name, revision))
        return folder

    monkeypatch.setattr(checkpoint, "resolve", resolve)
    lora_.load(tmp_path)
    assert asked == [("owner/name", "v1")]


@pytest.mark.slow
def test_adapters_beside_the_weights_compute_what_the_folded_model_does(model: Decoder) -> None:
    lora = Lora(rank=3, alpha=5.0)
    adapters = trained(model, lora)
    ids = np.random.default_rng(1).integers(0, 40, 24)
    batch = pack([Tokens(ids[:14].tolist()), Tokens(ids[14:].tolist())], 16)

    def loss(adapters: lora_.Adapters, build: Callable[[Decoder], Decoder]) -> jax.Array:
        return cross_entropy(build(lora_.attach(model, adapters, lora)), batch)[0]

    beside, folded = (jax.value_and_grad(loss)(adapters, build) for build in (lambda attached: attached, lora_.fold))
    np.testing.assert_allclose(beside[0], folded[0], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(beside[1]), jax.tree.leaves(folded[1]), strict=True):
        assert relative_error(a, b) < 1e-4 and np.abs(b).max() > 0


def test_adapters_train_beside_16_bit_weights_that_stay_as_they_are(folder: Path) -> None:
    model = checkpoint.load(str(folder), "bfloat16")
    before = weights(model)
    params, frozen, build = lora_.trainable(model, Lora(rank=2), jax.random.key(0))
    optimizer = optax.adam(0.01)
    batch = pack([Tokens([1, 2, 3, 4, 5, 6, 7])], 8)
    step = train.make_step(build, optimizer)
    state = train.new_state(params, optimizer, frozen)
    losses = []
    for _ in range(5):
        state, loss = step(state, batch)
        losses.append(float(loss))
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
    for a, b, c in zip(before, jax.tree.leaves(state.frozen), weights(model), strict=True):
        np.testing.assert_array_equal(a, np.asarray(b))
        np.testing.assert_array_equal(a, c)  # the model is still there, to be compared with
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {np.dtype("float32")}


def test_a_step_holds_no_second_copy_of_the_frozen_weights() -> None:
    config = dataclasses.replace(CONFIG, d_model=64, d_mlp=512, n_layers=12)
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    params, frozen, build = lora_.trainable(model, Lora(rank=1), jax.random.key(0))
    optimizer = optax.sgd(0.01)
    batch = pack([Tokens([1, 2, 3, 4])], 4)
    step: Any = jax.jit(train.make_step(build, optimizer))
    memory = step.lower(train.new_state(params, optimizer, frozen), batch).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.5 * sum(
        leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(model.layers)
    )


@pytest.mark.hf
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft reads it
def test_peft_applies_the_same_adapters(model: Decoder, folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft, which these files are for, is not installed")
    import torch

    lora = Lora(rank=3, alpha=5.0)
    adapters = trained(model, lora)
    lora_.save(adapters, lora, tmp_path, str(folder))
    ids = np.arange(12)[None]
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(hf_llama(), tmp_path)(torch.tensor(ids)).logits
    merged = merged_with(model, adapters, lora)
    ours = merged.logits(merged(jax.numpy.asarray(ids), jax.numpy.arange(12)[None]).resid)
    assert relative_error(ours, theirs) < 1e-4


@pytest.mark.hf
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft reads it
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": "all-linear"},
        {"target_modules": ["self_attn.q_proj", "mlp.up_proj"]},
        {"target_modules": ["v_proj"], "use_rslora": True},
        {"target_modules": ["v_proj"], "init_lora_weights": "mica"},
        {"target_modules": ["v_proj"], "init_lora_weights": "gaussian", "layers_to_transform": [0, 1, 2]},
    ],
    ids=str,
)
def test_what_peft_saves_is_applied_as_peft_applies_it(options: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft, which these files are for, is not installed")
    import torch

    theirs = peft.get_peft_model(hf_llama(), peft.LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=5, **options))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.2, generator=generator)
        theirs.save_pretrained(tmp_path)
        config = tmp_path / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(folder)}))
        ids = np.arange(12)[None]
        expected, plain = theirs(torch.tensor(ids)).logits, hf_llama()(torch.tensor(ids)).logits
    ours = lora_.load(tmp_path, "float32")
    logits = ours.logits(ours(jnp.asarray(ids), jnp.arange(12)[None]).resid)
    assert relative_error(logits, expected) < 1e-4 < relative_error(plain, expected)
