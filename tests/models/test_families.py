"""A second family of models is one `Family` and its line in the registry: here Qwen2, a Llama with a bias on q, k, v.

Nothing else of the package knows it. What it computes is compared with Hugging Face's torch code.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import relative_error
from jax.sharding import PartitionSpec

from backtrack_jax.models import checkpoint, families
from backtrack_jax.models.decoder import Decoder
from backtrack_jax.models.families.base import Family, GgufNames
from backtrack_jax.models.sharding import make_mesh, shardings
from backtrack_jax.training import lora

pytest.importorskip("torch", reason="needs torch and transformers to compare with")

import torch
import transformers

pytestmark = pytest.mark.hf

QWEN2 = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    ignored=frozenset({"max_window_layers", "sliding_window"}),
    accepted={"use_sliding_window": False},
    constants={"biases": ("q_proj", "k_proj", "v_proj")},
    gguf=GgufNames(architecture="qwen2", permuted=False),
)
SIZES: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}
IDS = np.random.default_rng(0).integers(0, 131, (2, 12))
GGUF_NAMES = {theirs: ours for ours, theirs in {**QWEN2.gguf.in_block, **QWEN2.gguf.outside}.items()}


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(families.FAMILIES, "qwen2", QWEN2)


@pytest.fixture(scope="module")
def reference() -> Iterator[Any]:
    """A random Qwen2, whose biases are far from zero."""
    config = transformers.Qwen2Config(**SIZES)
    config._attn_implementation = "eager"
    model = transformers.Qwen2ForCausalLM(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        mean, deviation = (1.0, 0.3) if "norm" in name else (0.0, 1.0 if name.endswith("bias") else 64**-0.5)
        parameter.normal_(mean, deviation, generator=generator)
    yield model


@pytest.fixture(scope="module")
def folder(reference: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen2")
    reference.save_pretrained(path)
    return path


def logits(model: Decoder) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(IDS.shape[1]), IDS.shape)
    return jax.jit(lambda m: m.logits(m(IDS, positions).resid))(model)


def theirs(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(IDS), use_cache=False).logits.numpy()


def test_its_folder_is_read_and_written(reference: Any, folder: Path, tmp_path: Path) -> None:
    model = checkpoint.load(str(folder))
    assert (model.config.family, len(model.config.biases)) == ("qwen2", 3)
    assert model.config.n_parameters == sum(parameter.numel() for parameter in reference.parameters())
    assert relative_error(logits(model), theirs(reference)) < 1e-5
    checkpoint.save_hf(model, tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert type(again) is transformers.Qwen2ForCausalLM
    assert relative_error(theirs(again), theirs(reference)) < 1e-6
    assert checkpoint.read_config(tmp_path / "again") == model.config


def test_a_bias_that_is_missing_is_named(folder: Path) -> None:
    model = checkpoint.load(str(folder))
    names = checkpoint.expected_tensors(model.config)
    assert names["model.layers.2.self_attn.k_proj.bias"] == (32,)
    assert "model.layers.2.self_attn.o_proj.bias" not in names


def test_fields_of_its_own_are_understood_or_refused(folder: Path) -> None:
    fields = families.to_hf(checkpoint.read_config(folder))
    with pytest.raises(ValueError, match=r"not a qwen2 model .*\n.*use_sliding_window=True, only False is implemented"):
        families.from_hf(fields | {"use_sliding_window": True})
    with pytest.raises(ValueError, match="unknown field pretraining_tp=1"):  # which is Llama's
        families.from_hf(fields | {"pretraining_tp": 1})
    with pytest.raises(ValueError, match=r"model_type='qwen9', only 'llama'.* is implemented"):
        families.from_hf(fields | {"model_type": "qwen9"})


def test_its_gguf_file_is_read(reference: Any, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", reference)
    model = checkpoint.load(str(path))
    assert model.config.biases
    assert relative_error(logits(model), theirs(reference)) < 1e-5


def write_gguf(path: Path, reference: Any) -> Path:
    """As llama.cpp's converter writes it: q and k in Hugging Face's order."""
    c = reference.config
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(32768)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    for name, tensor in reference.state_dict().items():
        module, _, leaf = name.rpartition(".")
        prefix = ""
        if module.startswith("model.layers."):
            _, _, layer, module = module.split(".", 3)
            prefix = f"blk.{layer}."
        writer.add_tensor(f"{prefix}{GGUF_NAMES[module]}.{leaf}", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_its_biases_are_sharded_with_their_heads(folder: Path) -> None:
    config = checkpoint.read_config(folder)
    places = shardings(config, make_mesh(1, jax.devices()[:1]))
    attention = places["layers"]["self_attn"]
    assert attention["q_proj"]["bias"].spec == PartitionSpec(None, "model")
    assert attention["q_proj"]["weight"].spec == PartitionSpec(None, None, "model")
    assert attention["o_proj"]["weight"].spec == PartitionSpec(None, "model", None)


def test_adapters_stand_beside_its_biased_projections(folder: Path) -> None:
    model = checkpoint.load(str(folder))
    chosen = lora.Lora(rank=2, targets=("q_proj",))
    adapters = lora.init(model, chosen, jax.random.key(0))
    adapters["self_attn.q_proj"]["B"] += 0.3
    attached = lora.attach(model, adapters, chosen)
    folded = lora.fold(attached)
    assert relative_error(logits(attached), logits(folded)) < 1e-5 < relative_error(logits(model), logits(folded))
    np.testing.assert_array_equal(folded.layers.self_attn.q_proj.bias[...], model.layers.self_attn.q_proj.bias[...])
