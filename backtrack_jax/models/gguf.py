"""Models in GGUF files, the format of llama.cpp: metadata, dequantised tensors, and the q/k permutation undone.

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

from backtrack_jax.models import families
from backtrack_jax.models.attention import rope_frequencies
from backtrack_jax.models.config import LinearRopeScaling, Llama3RopeScaling, ModelConfig, RopeScaling, YarnRopeScaling
from backtrack_jax.models.families.base import Family, GgufNames
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

_ROPE_FACTORS = "rope_freqs.weight"

# Keys of any family, behind its prefix. Which others are accepted is said by its `GgufNames`.
_REQUIRED = (
    "block_count",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
)
_OPTIONAL = (
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "context_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.factor",
    "rope.scaling.finetuned",  # which llama.cpp does not use
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "vocab_size",
)
_OTHER_PREFIXES = ("split.", "adapter.")  # of the keys that may change the model; who made the file, say, does not
_SPLIT = {"split.no": None, "split.tensors.count": None, "split.count": (0, 1)}  # a model in one file
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
      ValueError: it is empty, truncated, of another version or not a GGUF file, or tensors overlap.
    """
    path = Path(path)
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"{path} is empty, expected a GGUF file")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:4] != b"GGUF":
            raise ValueError(f"{path} is not a GGUF file: it starts with {data[:4]!r}, expected b'GGUF'")
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
            raise ValueError(f"{key} occurs twice")
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
            raise ValueError(f"tensor {name} occurs twice")
        if offset % alignment:
            raise ValueError(f"tensor {name} starts at byte {offset} of the data, not a multiple of {alignment}")
        placed[name] = GgufTensor(shape, GGMLQuantizationType(code), offset)
    start = -(-cursor.offset // alignment) * alignment
    return GgufHeader(metadata, {name: t._replace(offset=start + t.offset) for name, t in placed.items()})


def open_gguf(path: str | os.PathLike[str]) -> tuple[ModelConfig, dict[str, LazyTensor]]:
    """Reads a model's configuration and lists its tensors under their Hugging Face names.

    Tensors stored as F32, F16 or BF16 keep that dtype; quantised ones are float32 when read. The rows of `q_proj` and
    `k_proj`, where llama.cpp reorders them for its rotary embedding, are back in Hugging Face's order.

    Args:
      path: the file.

    Returns:
      The configuration, and name to tensor. Tensors that the family does not have keep their GGUF name.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged, or its model is not one that is implemented; names every key and tensor at fault.
    """
    path = Path(path)
    metadata, tensors = read_header(path)
    try:
        family = families.of_gguf(metadata.get("general.architecture"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    assert family.gguf is not None  # it was found by its architecture
    faults = _metadata_faults(metadata, family.gguf)
    faults += [
        f"tensor {name} is stored as {tensor.kind.name}, expected one of "
        f"{sorted(kind.name for kind in _QUANTIZED | _STORED_AS_IS.keys())}"
        for name, tensor in tensors.items()
        if tensor.kind not in _QUANTIZED | _STORED_AS_IS.keys()
    ]
    if "token_embd.weight" not in tensors:
        faults.append("there is no tensor token_embd.weight")
    if faults:
        raise ValueError(f"{path} is not a {family.name} model that this program implements:\n  " + "\n  ".join(faults))
    try:
        config = _config(family, metadata, tensors, path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    heads = {"attn_q": config.n_heads, "attn_k": config.n_kv_heads} if family.gguf.permuted else {}
    lazy = {}
    for name, tensor in tensors.items():
        if name == _ROPE_FACTORS and config.rope_scaling is not None:
            continue
        hf_name = _hf_name(name, family.gguf)
        lazy[hf_name or name] = _lazy(path, tensor, heads.get(name.split(".")[-2]) if hf_name else None)
    return config, lazy


def _hf_name(name: str, names: GgufNames) -> str | None:
    """Hugging Face's name of a tensor; None for one that the family does not have."""
    parts = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if parts is None:
        return None
    layer, module, leaf = parts.groups()
    known = names.outside if layer is None else names.in_block
    if module not in known:
        return None
    return ("" if layer is None else f"model.layers.{layer}.") + f"{known[module]}.{leaf}"


def _metadata_faults(metadata: Mapping[str, Any], names: GgufNames) -> list[str]:
    def key(name: str) -> str:
        return f"{names.architecture}.{name}"

    accepted = {key(name): values for name, values in names.accepted.items()} | {
        name: values for name, values in _SPLIT.items() if values is not None
    }
    known = {*map(key, (*_REQUIRED, *_OPTIONAL, *names.ignored)), *accepted, *_SPLIT}
    faults = [
        f"unknown key {name}={metadata[name]!r}"
        for name in sorted(metadata.keys() - known)
        if name.startswith((f"{names.architecture}.", *_OTHER_PREFIXES))
    ]
    faults += [f"missing key {key(name)}" for name in _REQUIRED if key(name) not in metadata]
    faults += [
        f"{key(name)} differs between layers, expected one number"
        for name in ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
        if isinstance(metadata.get(key(name)), list)
    ]
    faults += [
        f"{name}={metadata[name]!r}, only {' or '.join(map(repr, values))} is implemented"
        for name, values in accepted.items()
        if name in metadata and metadata[name] not in values
    ]
    return faults


def _config(family: Family, metadata: Mapping[str, Any], tensors: Mapping[str, GgufTensor], path: Path) -> ModelConfig:
    assert family.gguf is not None
    prefix = f"{family.gguf.architecture}."
    fields = {name.removeprefix(prefix): value for name, value in metadata.items() if name.startswith(prefix)}
    d_model, n_heads = fields["embedding_length"], fields["attention.head_count"]
    head_dim = fields.get("attention.key_length", d_model // n_heads)
    vocab_size = tensors["token_embd.weight"].shape[0]
    agreeing = {"attention.value_length": head_dim, "rope.dimension_count": head_dim, "vocab_size": vocab_size}
    contradictions = [
        f"{prefix}{name}={fields[name]}, expected {expected}"
        for name, expected in agreeing.items()
        if fields.get(name, expected) != expected
    ]
    if contradictions:
        raise ValueError("the metadata contradict each other:\n  " + "\n  ".join(contradictions))
    theta = float(fields.get("rope.freq_base", _DEFAULT_ROPE_THETA))
    scaling = _named_scaling(fields, prefix)
    if _ROPE_FACTORS in tensors:
        if scaling is not None:
            raise ValueError(f"{_ROPE_FACTORS} is given and {prefix}rope.scaling.type={fields['rope.scaling.type']!r}")
        scaling = _rope_scaling(_read(path, tensors[_ROPE_FACTORS]).astype(np.float64), head_dim, theta)
    elif scaling is None and _is_llama_3_1(family, vocab_size, theta, fields.get("context_length", 0)):
        raise ValueError(
            f"it has the vocabulary, base frequency and context of a Llama 3.1, but no tensor {_ROPE_FACTORS}, so that "
            "its rotary frequencies would be wrong. Converters before July 2024 left it out: convert the model again"
        )
    return ModelConfig(
        family=family.name,
        vocab_size=vocab_size,
        d_model=d_model,
        d_mlp=fields["feed_forward_length"],
        n_layers=fields["block_count"],
        n_heads=n_heads,
        n_kv_heads=fields.get("attention.head_count_kv", n_heads),
        head_dim=head_dim,
        norm_eps=_shortest_float32(fields["attention.layer_norm_rms_epsilon"]),
        rope_theta=theta,
        rope_scaling=scaling,
        tied="output.weight" not in tensors,
        context=fields.get("context_length"),
        **family.constants,
    )


def _named_scaling(fields: Mapping[str, Any], prefix: str) -> RopeScaling | None:
    """The scaling that the metadata name, which for Llama 3.1 they do not."""
    kind = fields.get("rope.scaling.type", "none")
    needed = {"none": (), "linear": ("factor",), "yarn": ("factor", "original_context_length")}
    if kind not in needed:
        raise ValueError(f"{prefix}rope.scaling.type={kind!r}, only {' or '.join(map(repr, needed))} is implemented")
    if missing := [f"{prefix}rope.scaling.{name}" for name in needed[kind] if f"rope.scaling.{name}" not in fields]:
        raise ValueError(f"{prefix}rope.scaling.type={kind!r} without {', '.join(missing)}")
    if kind == "none":
        return None
    factor = _shortest_float32(fields["rope.scaling.factor"])
    if kind == "linear":
        return LinearRopeScaling(factor=factor)
    return YarnRopeScaling(factor=factor, original_context=fields["rope.scaling.original_context_length"])


def _is_llama_3_1(family: Family, vocab_size: int, theta: float, context: int) -> bool:
    """Whether Llama 3 was trained on: Llama 3 itself has a context of 8192."""
    return (family.name, vocab_size, theta) == ("llama", 128256, 500000.0) and context > 8192


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
    """Rows [N * H, ...] of each head from llama.cpp's order (pairs 2i, 2i + 1) to Hugging Face's (pairs i, i + H/2)."""
    pairs = weight.reshape(n_heads, -1, 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _stored_bytes(tensor: GgufTensor) -> int:
    block, block_bytes = GGML_QUANT_SIZES[tensor.kind]
    return math.prod(tensor.shape) // block * block_bytes
