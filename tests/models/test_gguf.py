"""GGUF files against the `gguf` package, which wrote them, and against the loader of Hugging Face transformers."""

import os
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from helpers import LLAMA3_ROPE, hf_llama

from backtrack_jax.models import checkpoint, families
from backtrack_jax.models.config import ModelConfig
from backtrack_jax.models.gguf import open_gguf, read_header

pytest.importorskip("torch", reason="needs torch and transformers to compare with")

import torch
from transformers import LlamaConfig as TransformersConfig
from transformers import LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

pytestmark = pytest.mark.hf

N_HEADS, N_KV_HEADS, HEAD_DIM = 4, 2, 16
SIZES = {"hidden_size": 64, "intermediate_size": 96}  # quantised rows are whole blocks of 32
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if not stem.startswith("model.layers."):
        return f"{NAMES[stem]}.weight"
    layer, rest = stem.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{NAMES[rest]}.weight"


def permuted(weight: np.ndarray) -> np.ndarray:
    """Row 2i + s of a head, in llama.cpp's order, is row i + s * H/2 of Hugging Face's."""
    result = np.empty_like(weight)
    half = HEAD_DIM // 2
    for row in range(len(weight)):
        head, place = divmod(row, HEAD_DIM)
        result[row] = weight[head * HEAD_DIM + place // 2 + place % 2 * half]
    return result


def write(
    path: Path,
    reference: LlamaForCausalLM,
    kind: Kind = Kind.F32,
    *,
    keys: dict[str, Any] | None = None,
    without: str = "",
    tensors: dict[str, tuple[np.ndarray, Kind]] | None = None,
    arch: str = "llama",
) -> Path:
    """A model as llama.cpp's converter writes it: norms in F32, q and k permuted; with keys changed or left out."""
    c: Any = reference.config
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name("tiny")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "ç"])
    metadata = {
        "llama.block_count": c.num_hidden_layers,
        "llama.context_length": c.max_position_embeddings,
        "llama.embedding_length": c.hidden_size,
        "llama.feed_forward_length": c.intermediate_size,
        "llama.attention.head_count": c.num_attention_heads,
        "llama.attention.head_count_kv": c.num_key_value_heads,
        "llama.attention.key_length": c.head_dim,
        "llama.attention.value_length": c.head_dim,
        "llama.rope.dimension_count": c.head_dim,
        "llama.rope.freq_base": c.rope_parameters["rope_theta"],
        "llama.attention.layer_norm_rms_epsilon": c.rms_norm_eps,
        "llama.vocab_size": c.vocab_size,
    } | (keys or {})
    for key, value in metadata.items():
        if key != without:
            {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}[
                type(value)
            ](key, value)
    for name, tensor in reference.state_dict().items():
        weight = tensor.numpy()
        if (c.tie_word_embeddings and name == "lm_head.weight") or gguf_name(name) == without:
            continue
        if "q_proj" in name or "k_proj" in name:
            weight = permuted(weight)
        its_kind = Kind.F32 if weight.ndim == 1 else kind
        writer.add_tensor(gguf_name(name), gguf.quantize(weight, its_kind), raw_dtype=its_kind)
    for name, (array, its_kind) in (tensors or {}).items():
        writer.add_tensor(name, array, raw_dtype=its_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def scaling_divisors() -> np.ndarray:
    """`rope_freqs.weight` as llama.cpp's converter computes it for Llama 3.1."""
    divisors = []
    for i in range(HEAD_DIM // 2):
        wavelength = 2 * np.pi * 500_000.0 ** (2 * i / HEAD_DIM)
        if wavelength < 8192 / 4:
            divisors.append(1.0)
        elif wavelength > 8192 / 1:
            divisors.append(8.0)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            divisors.append(1 / ((1 - smooth) / 8 + smooth))
    return np.array(divisors, np.float32)


@pytest.fixture(scope="module")
def reference() -> LlamaForCausalLM:
    return hf_llama(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 20_000.0})


@pytest.fixture(scope="module")
def original(reference, tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "model.gguf", reference)


def theirs(path: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """Configuration and dequantised weights by transformers' own loader."""
    config = TransformersConfig(**load_gguf_checkpoint(path)["config"])
    with torch.device("meta"):
        skeleton = LlamaForCausalLM(config)
    return config, load_gguf_checkpoint(path, return_tensors=True, model_to_load=skeleton)["tensors"]


KINDS = [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_kind_of_tensor(kind, tied, tmp_path):
    reference = hf_llama(**SIZES, tie_word_embeddings=tied)
    path = write(
        tmp_path / "model.gguf",
        reference,
        kind,
        tensors={"rope_freqs.weight": (scaling_divisors(), Kind.F32)},
    )
    config, tensors = open_gguf(path)
    fields = reference.config.to_dict()
    assert families.to_hf(config) == {name: fields.get(name) for name in families.to_hf(config)} | {
        "architectures": ["LlamaForCausalLM"],
        "rope_theta": LLAMA3_ROPE["rope_theta"],
        "rope_scaling": {name: value for name, value in LLAMA3_ROPE.items() if name != "rope_theta"},
    }
    their_config, their_tensors = theirs(path)
    assert their_config.num_key_value_heads == config.n_kv_heads
    assert (their_config.tie_word_embeddings, their_config.head_dim) == (tied, HEAD_DIM)
    for name, tensor in reference.state_dict().items():
        if tied and name == "lm_head.weight":
            assert name not in tensors
            continue
        its_kind = Kind.F32 if tensor.ndim == 1 else kind
        rounded = gguf.dequantize(gguf.quantize(tensor.numpy(), its_kind), its_kind)
        ours = tensors[name].read()
        assert ours.shape == tensors[name].shape == tuple(tensor.shape)
        assert ours.dtype == tensors[name].dtype
        np.testing.assert_array_equal(ours.astype(np.float32), rounded, err_msg=name)
        np.testing.assert_array_equal(ours.astype(np.float32), np.asarray(their_tensors[name]), err_msg=name)
    model = checkpoint.load(str(path))
    assert model.dtype == np.float32
    assert model.config == config


@pytest.mark.parametrize("kind", [Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K], ids=lambda kind: kind.name)
def test_kinds_that_only_llama_cpp_writes(kind, reference, tmp_path):
    """Blocks of random bits, as there is no quantiser for them in Python; scales stay finite without high bits."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    data = np.random.default_rng(0).integers(0, 64, (4100, 2 * block_bytes), dtype=np.uint8)
    path = write(tmp_path / "model.gguf", reference, tensors={"more.weight": (data, kind)})
    _, tensors = open_gguf(path)
    values = tensors["more.weight"].read()
    assert values.shape == (4100, 2 * block)
    np.testing.assert_array_equal(values, gguf.dequantize(data, kind))
    assert np.std(values) > 0


def test_sixteen_bit_files_load_in_their_own_dtype_if_asked(reference, tmp_path):
    path = write(tmp_path / "model.gguf", reference, Kind.BF16)
    model = checkpoint.load(str(path), dtype="bfloat16")
    expected = reference.model.layers[1].mlp.up_proj.weight.bfloat16().float().numpy().T
    np.testing.assert_array_equal(np.asarray(model.layers.mlp.up_proj.weight[...], np.float32)[1], expected)


def test_header_equals_the_package_s_reader(original):
    header, reader = read_header(original), gguf.GGUFReader(original)
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert header.metadata == fields
    assert header.metadata["tokenizer.ggml.tokens"] == ["a", "b", "ç"]
    places = {t.name: (tuple(t.shape.tolist())[::-1], t.tensor_type, t.data_offset) for t in reader.tensors}
    assert {name: tuple(tensor) for name, tensor in header.tensors.items()} == places


def test_what_a_file_may_leave_unsaid(reference, tmp_path):
    """llama.cpp's defaults: RoPE base 10,000, as many key/value heads as heads, heads that share the width."""
    reference = hf_llama(**SIZES, num_key_value_heads=N_HEADS)
    for number, key in enumerate(
        ("llama.rope.freq_base", "llama.attention.head_count_kv", "llama.attention.key_length", "llama.vocab_size")
    ):
        config, _ = open_gguf(write(tmp_path / f"{number}.gguf", reference, without=key))
        assert (config.n_kv_heads, config.head_dim, config.vocab_size) == (N_HEADS, HEAD_DIM, 131)
        assert config.rope_theta == (10_000.0 if key == "llama.rope.freq_base" else 500_000.0)
        assert config.norm_eps == 1e-5  # not 9.999999747378752e-06


def test_keys_that_change_nothing(reference, tmp_path):
    keys = {
        "mradermacher.quantized_by": "mradermacher",
        "llama.tensor_data_layout": "Meta AI original pth",
        "llama.expert_count": 0,
        "llama.expert_used_count": 0,
        "split.no": 0,
        "split.count": 1,
        "split.tensors.count": 30,
    }
    plain, extended = (open_gguf(write(tmp_path / f"{len(k)}.gguf", reference, keys=k)) for k in ({}, keys))
    assert plain[0] == extended[0]
    assert plain[1].keys() == extended[1].keys()


def refused(path: Path) -> str:
    with pytest.raises(ValueError) as caught:
        checkpoint.load(str(path))
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"keys": {"llama.expert_count": 8}}, "llama.expert_count=8, only 0 is implemented"),
        ({"keys": {"llama.attention.sliding_window": 512}}, "unknown key llama.attention.sliding_window=512"),
        ({"keys": {"split.count": 3}}, "split.count=3, only 0 or 1 is implemented"),
        ({"keys": {"adapter.type": "lora"}}, "unknown key adapter.type='lora'"),
        ({"keys": {"llama.rope.scaling.type": "longrope"}}, "llama.rope.scaling.type='longrope', only 'none' or"),
        ({"keys": {"llama.attention.head_count_kv": [2, 4]}}, "head_count_kv differs between layers"),
        ({"keys": {"llama.rope.dimension_count": 8}}, "llama.rope.dimension_count=8, expected 16"),
        ({"keys": {"llama.vocab_size": 130}}, "llama.vocab_size=130, expected 131"),
        ({"without": "llama.block_count"}, "missing key llama.block_count"),
        ({"without": "token_embd.weight"}, "there is no tensor token_embd.weight"),
        ({"without": "blk.1.attn_q.weight"}, "missing tensor model.layers.1.self_attn.q_proj.weight of shape (64, 64)"),
        ({"arch": "gemma"}, "general.architecture is 'gemma', only 'llama' or 'qwen2'"),
        (
            {"tensors": {"blk.0.attn_q.bias": (np.ones(64, np.float32), Kind.F32)}},
            "unknown tensor model.layers.0.self_attn.q_proj.bias",
        ),
        ({"tensors": {"blk.3.ffn_up.weight": (np.ones((96, 64), np.float32), Kind.F32)}}, "model.layers.3.mlp.up_proj"),
        ({"tensors": {"x": (np.ones(2, np.float64), Kind.F64)}}, "tensor x is stored as F64, expected one of"),
        ({"tensors": {"rope_freqs.weight": (2 * np.ones(8, np.float32), Kind.F32)}}, "divisors in rope_freqs.weight"),
        ({"tensors": {"rope_freqs.weight": (np.ones(4, np.float32), Kind.F32)}}, "divisors in rope_freqs.weight"),
    ],
)
def test_other_models_are_refused_by_name(changes, words, reference, tmp_path):
    assert words in refused(write(tmp_path / "model.gguf", reference, **changes))


UP = b"blk.1.ffn_up.weight"


def with_entry_changed(path: Path, *, kind: int | None = None, shift: int = 0) -> Path:
    """The header's line of one tensor, name, number of axes, axes, kind, offset, with another kind or offset."""
    data = bytearray(path.read_bytes())
    place = data.index(UP) + len(UP)
    place += 4 + 8 * int.from_bytes(data[place : place + 4], "little")
    offset = int.from_bytes(data[place + 4 : place + 12], "little") + shift
    data[place + 4 : place + 12] = offset.to_bytes(8, "little")
    if kind is not None:
        data[place : place + 4] = kind.to_bytes(4, "little")
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": 31}, "tensor blk.1.ffn_up.weight is stored as type 31, which the gguf package does not know"),
        ({"kind": 24}, "tensor blk.1.ffn_up.weight is stored as I8, expected one of"),
        ({"shift": -4}, "tensor blk.1.ffn_up.weight starts at byte"),
        ({"shift": -64}, "tensors overlap\n  blk.1.ffn_up.weight starts at byte"),
    ],
)
def test_tensors_that_cannot_be_read_are_named(changes, words, reference, tmp_path):
    assert words in refused(with_entry_changed(write(tmp_path / "model.gguf", reference), **changes))


def test_a_llama_3_1_without_its_rotary_factors_is_refused(tmp_path):
    """As converters wrote it before they knew of the scaling: all else is as in a file that is right."""
    rope = {"rope_type": "default", "rope_theta": 500_000.0}
    large = hf_llama(**SIZES | {"vocab_size": 128256, "max_position_embeddings": 131072}, rope_parameters=rope)
    assert "no tensor rope_freqs.weight, so that its rotary frequencies would be wrong" in refused(
        write(tmp_path / "3.1.gguf", large)
    )
    config, _ = open_gguf(write(tmp_path / "3.gguf", large, keys={"llama.context_length": 8192}))
    assert config.rope_scaling is None


def test_all_faults_come_in_one_message(reference, tmp_path):
    path = write(
        tmp_path / "model.gguf",
        reference,
        keys={"llama.expert_count": 8, "llama.rope.scaling.attn_factor": 0.5},
        without="llama.block_count",
        tensors={"x": (np.ones(2, np.float64), Kind.F64)},
    )
    text = refused(path)
    for words in ("llama.expert_count", "attn_factor=0.5", "llama.block_count", "F64"):
        assert words in text


@pytest.mark.parametrize("size", [0, 3, 4, 20, 300, 1500, -8])
def test_empty_and_truncated_files_are_named(original, size, tmp_path):
    path = Path(shutil.copy(original, tmp_path / "model.gguf"))
    os.truncate(path, size % path.stat().st_size if size < 0 else size)
    text = refused(path)
    assert any(word in text for word in ("truncated", "empty", "no GGUF file"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"PK\x03\x04" + bytes(100), "it starts with b'PK\\x03\\x04', expected b'GGUF'"),
        (b"GGUF" + (1).to_bytes(4, "little") + bytes(100), "GGUF version 1"),
        (b"GGUF" + (3).to_bytes(4, "big") + bytes(100), "it is big-endian, only little-endian files are read"),
    ],
)
def test_other_files_are_refused(content, words, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    assert words in refused(path)


def test_a_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"there is no folder or file nowhere/model.gguf"):
        checkpoint.load("nowhere/model.gguf")


def test_real_file(smollm2_gguf):
    config, tensors = open_gguf(smollm2_gguf)
    assert config == ModelConfig(
        vocab_size=49152,
        d_model=576,
        d_mlp=1536,
        n_layers=30,
        n_heads=9,
        n_kv_heads=3,
        head_dim=64,
        norm_eps=1e-5,
        rope_theta=100_000.0,
        rope_scaling=None,
        tied=True,
        context=8192,
    )
    assert len(tensors) == 272
    assert sum(int(np.prod(tensor.shape)) for tensor in tensors.values()) == config.n_parameters
    assert 0.01 < tensors["model.embed_tokens.weight"].read().std() < 1


@pytest.mark.slow
def test_real_file_equals_transformers_loader(smollm2_gguf):
    config, tensors = open_gguf(smollm2_gguf)
    their_config, their_tensors = theirs(smollm2_gguf)
    assert their_config.rope_parameters["rope_theta"] == config.rope_theta
    assert tensors.keys() == their_tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor.read(), np.asarray(their_tensors[name]), err_msg=name)
