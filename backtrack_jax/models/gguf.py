"""Llama models in GGUF files, the format of llama.cpp: metadata, dequantised tensors, and the q/k permutation undone.

The header is read here rather than by `gguf.GGUFReader`, which takes seconds for a vocabulary of 49,152 tokens (and
maps the whole file for as long as it lives); the dequantisation is that of the `gguf` package.
"""

import dataclasses
import itertools
import math
import mmap
import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, dequantize

from backtrack_jax.models.attention import rope_frequencies
from backtrack_jax.models.config import Llama3RopeScaling, ModelConfig
from backtrack_jax.models.safetensors import LazyTensor

_STORED_AS_IS = {
    GGMLQuantizationType.F32: np.dtype(np.float32),
    GGMLQuantizationType.F16: np.dtype(np.float16),
    GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
}
_QUANTIZED = {
    GGMLQuantizationType[name]
    for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
}
_KIND_CODES = frozenset(kind.value for kind in GGMLQuantizationType)
_ROWS = 4096  # dequantised at a time, because its temporaries are several times the result

_SCALARS = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.BOOL: "<?",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
}
_VERSIONS = (2, 3)

# GGUF's names of tensors, in a block and outside of blocks, and Hugging Face's.
_IN_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_ROPE_FACTORS = "rope_freqs.weight"

_PREFIXES = ("llama.", "split.", "adapter.")  # of the keys that may change the model; who made the file, say, does not
_REQUIRED = (
    "llama.block_count",
    "llama.embedding_length",
    "llama.feed_forward_length",
    "llama.attention.head_count",
    "llama.attention.layer_norm_rms_epsilon",
)
_OPTIONAL = (
    "llama.attention.head_count_kv",
    "llama.attention.key_length",
    "llama.attention.value_length",
    "llama.context_length",  # changes nothing here
    "llama.rope.dimension_count",
    "llama.rope.freq_base",
    "llama.tensor_data_layout",  # says that q and k are permuted, as they are in every file
    "llama.vocab_size",
    "split.no",
    "split.tensors.count",
)
# Keys of which some values, those of a model in one file as it is implemented here, are accepted.
_ACCEPTED = {
    "llama.expert_count": (0,),
    "llama.expert_used_count": (0,),
    "llama.rope.scaling.type": ("none",),
    "split.count": (0, 1),
}
_DEFAULT_ROPE_THETA = 10000.0  # llama.cpp's, where the file says nothing


class GgufTensor(NamedTuple):
    """Where a tensor lies in a GGUF file.

    Attributes:
      shape: rows first, as in numpy (the file lists dimensions the other way round).
      kind: storage format.
      offset: first byte in the file.
    """

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int


class GgufHeader(NamedTuple):
    """What a GGUF file says before its data.

    Attributes:
      metadata: key to value; arrays are lists.
      tensors: name to place.
    """

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


class _Cursor:
    """Reads the values of a header one after another."""

    def __init__(self, data: mmap.mmap):
        self.data = data
        self.offset = 0

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from(code, self.data, self.offset)
        self.offset += struct.calcsize(code)
        return value

    def string(self) -> str:
        length = self.scalar("<Q")
        end = self.offset + length
        if end > len(self.data):
            raise ValueError(f"a string of {length} bytes at byte {self.offset} ends after the file")
        text = self.data[self.offset : end].decode()
        self.offset = end
        return text

    def value(self, kind: GGUFValueType) -> Any:
        if kind == GGUFValueType.STRING:
            return self.string()
        if kind == GGUFValueType.ARRAY:
            item, length = GGUFValueType(self.scalar("<I")), self.scalar("<Q")
            return [self.value(item) for _ in range(length)]
        return self.scalar(_SCALARS[kind])


def read_header(path: str | os.PathLike[str]) -> GgufHeader:
    """Reads metadata and the list of tensors.

    Args:
      path: the file.

    Returns:
      The header.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is empty, truncated, of another version or no GGUF file, or tensors overlap.
    """
    path = Path(path)
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"{path} is empty, expected a GGUF file")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:4] != b"GGUF":
            raise ValueError(f"{path} is no GGUF file: it starts with {data[:4]!r}, expected b'GGUF'")
        cursor = _Cursor(data)
        cursor.offset = 4
        try:
            header = _parse_header(cursor)
        except (struct.error, ValueError) as error:
            raise ValueError(
                f"{path}, of {size} bytes, is truncated, malformed or of a kind that is not read: {error}"
            ) from error
    ends = {name: tensor.offset + _stored_bytes(tensor) for name, tensor in header.tensors.items()}
    beyond = [f"{name} ends at byte {end}" for name, end in ends.items() if end > size]
    if beyond:
        raise ValueError(f"{path} is truncated: it has {size} bytes, but\n  " + "\n  ".join(beyond))
    in_order = sorted(header.tensors, key=lambda name: (header.tensors[name].offset, ends[name]))
    overlaps = [
        f"{later} starts at byte {header.tensors[later].offset}, where {earlier} ends at {ends[earlier]}"
        for earlier, later in itertools.pairwise(in_order)
        if header.tensors[later].offset < ends[earlier]
    ]
    if overlaps:
        raise ValueError(f"{path} is malformed: tensors overlap\n  " + "\n  ".join(overlaps))
    return header


def _parse_header(cursor: _Cursor) -> GgufHeader:
    version, n_tensors, n_keys = cursor.scalar("<I"), cursor.scalar("<Q"), cursor.scalar("<Q")
    if int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS:
        raise ValueError("it is big-endian, only little-endian files are read")
    if version not in _VERSIONS:
        raise ValueError(f"GGUF version {version}, only {_VERSIONS} (little-endian) are read")
    metadata: dict[str, Any] = {}
    for _ in range(n_keys):
        key = cursor.string()
        if key in metadata:
            raise ValueError(f"{key} stands in it twice")
        metadata[key] = cursor.value(GGUFValueType(cursor.scalar("<I")))
    alignment = metadata.get("general.alignment", 32)
    placed: dict[str, GgufTensor] = {}
    for _ in range(n_tensors):
        name, n_axes = cursor.string(), cursor.scalar("<I")
        shape = tuple(cursor.scalar("<Q") for _ in range(n_axes))[::-1]
        code, offset = cursor.scalar("<I"), cursor.scalar("<Q")
        if code not in _KIND_CODES:
            raise ValueError(f"tensor {name} is stored as type {code}, which the gguf package does not know")
        if name in placed:
            raise ValueError(f"tensor {name} stands in it twice")
        if offset % alignment:
            raise ValueError(f"tensor {name} starts at byte {offset} of the data, no multiple of {alignment}")
        placed[name] = GgufTensor(shape, GGMLQuantizationType(code), offset)
    start = -(-cursor.offset // alignment) * alignment
    return GgufHeader(metadata, {name: t._replace(offset=start + t.offset) for name, t in placed.items()})


def open_gguf(path: str | os.PathLike[str]) -> tuple[ModelConfig, dict[str, LazyTensor]]:
    """Reads a Llama's configuration and lists its tensors under their Hugging Face names.

    Tensors stored as F32, F16 or BF16 keep that dtype; quantised ones are float32 when read. The rows of `q_proj` and
    `k_proj`, which llama.cpp reorders for its rotary embedding, are back in Hugging Face's order.

    Args:
      path: the file.

    Returns:
      The configuration, and name to tensor. Tensors that a Llama does not have keep their GGUF name.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged, or its model is none that is implemented; names every key and tensor at fault.
    """
    path = Path(path)
    metadata, tensors = read_header(path)
    faults = _metadata_faults(metadata)
    faults += [
        f"tensor {name} is stored as {tensor.kind.name}, expected one of "
        f"{sorted(kind.name for kind in _QUANTIZED | _STORED_AS_IS.keys())}"
        for name, tensor in tensors.items()
        if tensor.kind not in _QUANTIZED | _STORED_AS_IS.keys()
    ]
    if "token_embd.weight" not in tensors:
        faults.append("there is no tensor token_embd.weight")
    if faults:
        raise ValueError(f"{path} is not a Llama that this program implements:\n  " + "\n  ".join(faults))
    try:
        config = _config(metadata, tensors, path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    heads = {"attn_q": config.n_heads, "attn_k": config.n_kv_heads}
    lazy = {}
    for name, tensor in tensors.items():
        if name == _ROPE_FACTORS:
            continue
        block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
        if block and block[2] in _IN_BLOCK:
            hf_name = f"model.layers.{block[1]}.{_IN_BLOCK[block[2]]}.weight"
            lazy[hf_name] = _lazy(path, tensor, heads.get(block[2]))
        else:
            lazy[_OUTSIDE.get(name, name)] = _lazy(path, tensor, None)
    return config, lazy


def _metadata_faults(metadata: Mapping[str, Any]) -> list[str]:
    if metadata.get("general.architecture") != "llama":
        return [f"general.architecture is {metadata.get('general.architecture')!r}, only 'llama' is implemented"]
    unknown = metadata.keys() - {*_REQUIRED, *_OPTIONAL, *_ACCEPTED}
    faults = [f"unknown key {key}={metadata[key]!r}" for key in sorted(unknown) if key.startswith(_PREFIXES)]
    faults += [f"missing key {key}" for key in _REQUIRED if key not in metadata]
    faults += [
        f"{key} differs between layers, expected one number"
        for key in ("llama.attention.head_count", "llama.attention.head_count_kv", "llama.feed_forward_length")
        if isinstance(metadata.get(key), list)
    ]
    faults += [
        f"{key}={metadata[key]!r}, only {' or '.join(map(repr, accepted))} is implemented"
        for key, accepted in _ACCEPTED.items()
        if key in metadata and metadata[key] not in accepted
    ]
    return faults


def _config(metadata: Mapping[str, Any], tensors: Mapping[str, GgufTensor], path: Path) -> ModelConfig:
    d_model, n_heads = metadata["llama.embedding_length"], metadata["llama.attention.head_count"]
    head_dim = metadata.get("llama.attention.key_length", d_model // n_heads)
    vocab_size = tensors["token_embd.weight"].shape[0]
    agreeing = {
        "llama.attention.value_length": head_dim,
        "llama.rope.dimension_count": head_dim,
        "llama.vocab_size": vocab_size,
    }
    contradictions = [
        f"{key}={metadata[key]}, expected {wanted}"
        for key, wanted in agreeing.items()
        if metadata.get(key, wanted) != wanted
    ]
    if contradictions:
        raise ValueError("the metadata contradict each other:\n  " + "\n  ".join(contradictions))
    theta = float(metadata.get("llama.rope.freq_base", _DEFAULT_ROPE_THETA))
    scaling = None
    if _ROPE_FACTORS in tensors:
        scaling = _rope_scaling(_read(path, tensors[_ROPE_FACTORS]).astype(np.float64), head_dim, theta)
    return ModelConfig(
        vocab_size=vocab_size,
        d_model=d_model,
        d_mlp=metadata["llama.feed_forward_length"],
        n_layers=metadata["llama.block_count"],
        n_heads=n_heads,
        n_kv_heads=metadata.get("llama.attention.head_count_kv", n_heads),
        head_dim=head_dim,
        norm_eps=_shortest_float32(metadata["llama.attention.layer_norm_rms_epsilon"]),
        rope_theta=theta,
        rope_scaling=scaling,
        tied="output.weight" not in tensors,
    )


def _rope_scaling(divisors: np.ndarray, head_dim: int, theta: float) -> Llama3RopeScaling:
    """The scaling that divides each rotary frequency by these, [H/2].

    GGUF holds the divisors and not the parameters behind them. All released Llama 3.1 to 3.3 have the same three band
    limits and differ in the factor, which is the largest divisor; anything else is refused.
    """
    scaling = Llama3RopeScaling(
        factor=_shortest_float32(divisors.max()), low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192
    )
    plain, scaled = (rope_frequencies(head_dim, theta, s).astype(np.float64) for s in (None, scaling))
    if divisors.shape != plain.shape or not np.allclose(plain / scaled, divisors, rtol=1e-5, atol=0):
        raise ValueError(
            f"the divisors in {_ROPE_FACTORS} are not those of Llama 3.1's RoPE scaling, {dataclasses.asdict(scaling)}"
        )
    return scaling


def _shortest_float32(value: float) -> float:
    """The decimal number that was meant: 1e-05 for the float32 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _lazy(path: Path, tensor: GgufTensor, permuted_heads: int | None) -> LazyTensor:
    def read() -> np.ndarray:
        array = _read(path, tensor)
        return array if permuted_heads is None else _unpermute(array, permuted_heads)

    return LazyTensor(tensor.shape, _STORED_AS_IS.get(tensor.kind, np.dtype(np.float32)), read, str(path))


def _read(path: Path, tensor: GgufTensor) -> np.ndarray:
    """The tensor in its own dtype as a memory map, or dequantised to float32."""
    if tensor.kind in _STORED_AS_IS:
        return np.memmap(path, _STORED_AS_IS[tensor.kind], "r", tensor.offset, tensor.shape)
    shape = (tensor.shape[0], _stored_bytes(tensor) // tensor.shape[0])
    stored = np.memmap(path, np.uint8, "r", tensor.offset, shape).view(
        np.ndarray
    )  # slices of a memmap are slow to make
    result = np.empty((tensor.shape[0], math.prod(tensor.shape[1:])), np.float32)
    for row in range(0, len(result), _ROWS):
        result[row : row + _ROWS] = dequantize(stored[row : row + _ROWS], tensor.kind)
    return result.reshape(tensor.shape)


def _unpermute(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """Rows [N * H, D] of each head from llama.cpp's order (pairs 2i, 2i + 1) to Hugging Face's (pairs i, i + H/2)."""
    pairs = weight.reshape(n_heads, -1, 2, weight.shape[1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _stored_bytes(tensor: GgufTensor) -> int:
    block, block_bytes = GGML_QUANT_SIZES[tensor.kind]
    return math.prod(tensor.shape) // block * block_bytes
