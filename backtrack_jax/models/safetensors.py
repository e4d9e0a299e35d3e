"""Tensors as they lie in safetensors files: headers checked in full, data read one tensor at a time."""

import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_PREFIX = 8  # bytes that give the header's length


class LazyTensor(NamedTuple):
    """A tensor that takes no memory until it is read.

    Attributes:
      shape: its shape.
      dtype: dtype of what `read` returns.
      read: returns the data, [*shape]; as a memory map where the file holds it in that form.
      source: where it comes from, for messages.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    source: str


def read_header(path: Path) -> tuple[dict[str, LazyTensor], list[str]]:
    """Lists the tensors of a safetensors file without reading them.

    Args:
      path: the file.

    Returns:
      Name to tensor (`read` maps that tensor alone, and the map ends with the returned array), and all that is wrong
      with the file: empty, truncated, malformed, dtypes other than `DTYPES`. A tensor must not be read if anything is.

    Raises:
      FileNotFoundError: there is no such file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_PREFIX), "little")
        if size < _PREFIX or _PREFIX + length > size:
            announced = f", shorter than the {length}-byte header that it announces" if size >= _PREFIX else ""
            return {}, [f"{path} is truncated or not a safetensors file: it has {size} bytes{announced}"]
        try:
            header = json.loads(file.read(length), object_pairs_hook=_without_duplicates)
        except ValueError as error:
            return {}, [f"{path} is not a safetensors file: its header is not JSON with unique names: {error}"]
    header.pop("__metadata__", None)
    faults = [fault for name, entry in header.items() for fault in _entry_faults(name, entry)]
    if not faults:
        faults = _layout_faults(header, size - _PREFIX - length)
    tensors = {name: _lazy(path, entry, _PREFIX + length) for name, entry in header.items() if _is_entry(entry)}
    return tensors, [f"{path}: {fault}" for fault in faults]


def write_shards(folder: Path, tensors: Mapping[str, LazyTensor], shard_bytes: int) -> None:
    """Writes `model.safetensors`, or numbered shards with their index, named as on the Hugging Face hub.

    Args:
      folder: an existing folder.
      tensors: what to write, in this order; each is read, written and let go before the next.
      shard_bytes: size that a shard does not exceed unless a single tensor does.
    """
    shards: list[dict[str, LazyTensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + _n_bytes(tensor) > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += _n_bytes(tensor)
    if len(shards) == 1:
        _write_file(folder / "model.safetensors", tensors)
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_file(folder / file_name, shard)
        weight_map |= dict.fromkeys(shard, file_name)
    index = {"metadata": {"total_size": sum(map(_n_bytes, tensors.values()))}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _write_file(path: Path, tensors: Mapping[str, LazyTensor]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses files without it
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + _n_bytes(tensor)
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % _PREFIX)  # tensors start aligned
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(_PREFIX, "little") + encoded)
        for tensor in tensors.values():
            file.write(np.ascontiguousarray(tensor.read()).reshape(-1).view(np.uint8).data)


def _without_duplicates(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"{name} occurs twice")
        result[name] = value
    return result


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"}


def _entry_faults(name: str, entry: Any) -> list[str]:
    if not _is_entry(entry):
        return [f"{name}: expected dtype, shape and data_offsets, got {entry!r}"]
    if entry["dtype"] not in DTYPES:
        return [f"{name} has dtype {entry['dtype']!r}, expected one of {sorted(DTYPES)}"]
    start, end = entry["data_offsets"]
    wanted = int(np.prod(entry["shape"], dtype=np.int64)) * DTYPES[entry["dtype"]].itemsize
    if end - start != wanted:
        return [f"{name} of shape {entry['shape']} and dtype {entry['dtype']} takes {wanted} bytes, not {end - start}"]
    return []


def _layout_faults(header: Mapping[str, Any], data_bytes: int) -> list[str]:
    """Tensors must cover the data without a hole or overlap."""
    expected = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, end = entry["data_offsets"]
        if start != expected:
            return [f"{name} starts at byte {start} of the data, where the tensor before it ends at {expected}"]
        expected = end
    if expected != data_bytes:
        kind = "truncated" if data_bytes < expected else "too long"
        return [f"the file is {kind}: its header describes {expected} bytes of data, it holds {data_bytes}"]
    return []


def _lazy(path: Path, entry: Mapping[str, Any], data_start: int) -> LazyTensor:
    shape, dtype = tuple(entry["shape"]), DTYPES.get(entry["dtype"], np.dtype(np.void))
    offset = data_start + entry["data_offsets"][0]
    return LazyTensor(shape, dtype, partial(np.memmap, path, dtype, "r", offset, shape), str(path))


def _n_bytes(tensor: LazyTensor) -> int:
    return int(np.prod(tensor.shape, dtype=np.int64)) * tensor.dtype.itemsize
