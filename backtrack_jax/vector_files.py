"""Files of steering vectors: safetensors, npz, GGUF control vectors, and the paper's released .pt.

`.safetensors`: `direction.{layer}` float32, with provenance and raw norms in the metadata; `.npz`: `directions` [L, D]
and `provenance`; `.gguf`: a llama.cpp control vector, which has no place for layer 0. Never a pickle.
"""

import json
import math
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
from safetensors import SafetensorError, safe_open

from backtrack_jax.files import store
from backtrack_jax.files.malformed import named

LAYER_CONVENTION = "block_output_0based"
_SCHEMA = "backtrack_jax.steering_vector.v1"


def write(path: Path, directions: np.ndarray, provenance: Mapping[str, Any]) -> None:
    """Writes the directions of all layers; the suffix chooses the format, and the file is whole or absent.

    Args:
      path: the file; its folder is created if missing.
      directions: [L, D] float32, NaN at layers that are absent.
      provenance: JSON values.

    Raises:
      ValueError: if the suffix is not one of `WRITTEN`, or a `.gguf` would hold no layer at all.
    """
    writers: dict[str, Callable[[Path, np.ndarray, str], None]] = {
        ".safetensors": _write_safetensors,
        ".npz": _write_npz,
        ".gguf": _write_gguf,
    }
    if path.suffix not in writers:
        raise ValueError(f"{path}: a vector is saved as one of {sorted(writers)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp{path.suffix}")
    writers[path.suffix](temporary, directions, _json(provenance))
    temporary.replace(path)


def read(path: Path, label: str, layer: int | None, n_layers: int | None) -> tuple[np.ndarray, dict[str, Any]]:
    """Directions [L, D] float32 (NaN at layers that are absent) and provenance of a file; see `vectors.load`.

    Raises:
      ValueError: says what is wrong with the file.
    """
    readers: dict[str, Callable[[], tuple[np.ndarray, dict[str, Any]]]] = {
        ".safetensors": lambda: _read_safetensors(path),
        ".npz": lambda: _read_npz(path),
        ".gguf": lambda: _read_gguf(path, n_layers),
        ".pt": lambda: _read_pt(path, label, layer, n_layers),
    }
    if path.suffix not in readers:
        raise ValueError(f"a vector is read from one of {sorted(readers)}")
    with named(path, "a file of vectors"):
        return readers[path.suffix]()


def _write_safetensors(path: Path, directions: np.ndarray, provenance: str) -> None:
    tensors = {f"direction.{i}": row for i, row in enumerate(directions) if np.isfinite(row).all()}
    norms = np.linalg.norm(directions, axis=-1).tolist()
    metadata = {
        "schema": _SCHEMA,
        "layer_convention": LAYER_CONVENTION,
        "n_layers": str(len(directions)),
        "raw_norms": json.dumps([norm if np.isfinite(norm) else None for norm in norms]),
        "provenance": provenance,
    }
    rows = {name: np.ascontiguousarray(row, np.float32) for name, row in tensors.items()}
    store.write_safetensors(path, rows, metadata)


def _read_safetensors(path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            rows = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dictionary
    except SafetensorError as error:
        raise ValueError(f"not a safetensors file: {error}") from error
    found = metadata.get("layer_convention")
    if found != LAYER_CONVENTION:
        raise ValueError(f"layer_convention={found!r} in the metadata, expected {LAYER_CONVENTION!r}")
    if not metadata.get("n_layers", "").isdecimal():
        raise ValueError(f"n_layers={metadata.get('n_layers')!r} in the metadata, expected a number")
    return _by_layer(rows, int(metadata["n_layers"])), _provenance(path, metadata.get("provenance"))


def _write_npz(path: Path, directions: np.ndarray, provenance: str) -> None:
    np.savez(path, directions=directions, provenance=provenance, layer_convention=LAYER_CONVENTION)


def _read_npz(path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    if not zipfile.is_zipfile(path):
        raise ValueError("not an .npz file")
    try:
        with path.open("rb") as stream:  # closed here: NumPy leaves a file open that it cannot read
            _refuse_empty_promises(stream)
            with np.load(stream, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file}
    except zipfile.BadZipFile as error:
        raise ValueError(f"a damaged .npz file: {error}") from error
    if "directions" not in arrays:
        raise ValueError(f"arrays {sorted(arrays)}, expected 'directions' [n_layers, d_model]")
    if np.iscomplexobj(arrays["directions"]):
        raise ValueError(f"directions of {arrays['directions'].dtype}, expected real numbers")
    found = str(arrays.get("layer_convention", LAYER_CONVENTION))
    if found != LAYER_CONVENTION:
        raise ValueError(f"layer_convention={found!r}, expected {LAYER_CONVENTION!r}")
    provenance = str(arrays["provenance"]) if "provenance" in arrays else None
    return arrays["directions"].astype(np.float32), _provenance(path, provenance)


def _refuse_empty_promises(stream: BinaryIO) -> None:
    """ValueError for an array of an .npz whose header announces more than the file holds, before memory is taken."""
    with zipfile.ZipFile(stream) as archive:
        for entry in archive.infolist():
            with archive.open(entry) as member:
                major = np.lib.format.read_magic(member)[0]
                read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(member)
            if (announced := math.prod(shape) * dtype.itemsize) > entry.file_size:
                raise ValueError(
                    f"{entry.filename} announces {announced:,} bytes and holds {entry.file_size:,} at most"
                )
    stream.seek(0)


def _write_gguf(path: Path, directions: np.ndarray, provenance: str) -> None:
    """A llama.cpp control vector: `direction.{layer}` from 1 up, since llama.cpp has no direction for block 0.

    llama.cpp adds it at the prompt as well, and ignores the metadata. It adds nothing at a layer that is absent.
    """
    rows = {layer: row for layer, row in enumerate(directions) if layer > 0 and np.isfinite(row).all()}
    if not rows:
        raise ValueError("a GGUF control vector cannot hold layer 0, and this vector has no other")
    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_uint32("controlvector.layer_count", len(directions) - 1)
    writer.add_string("backtrack_jax.provenance", provenance)
    for layer, row in rows.items():
        writer.add_tensor(f"direction.{layer}", np.ascontiguousarray(row, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _read_gguf(path: Path, n_layers: int | None) -> tuple[np.ndarray, dict[str, Any]]:
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError) as error:
        raise ValueError(f"not a GGUF file: {error}") from error
    for tensor in reader.tensors:
        if tensor.tensor_type not in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
            raise ValueError(f"{tensor.name} is of type {tensor.tensor_type.name}, expected F32 or F16")
    rows = {tensor.name: np.array(tensor.data, np.float32) for tensor in reader.tensors}
    count = reader.get_field("controlvector.layer_count")
    layers = [_layer_of(name) for name in rows]
    # The file gives the number of directions, and block 0 has none.
    stated = int(count.contents()) + (0 not in layers) if count else 0
    known = max([*layers, -1]) + 1
    provenance = reader.get_field("backtrack_jax.provenance")
    return _by_layer(rows, max(known, n_layers or stated)), _provenance(
        path, provenance.contents() if provenance else None
    )


def _read_pt(path: Path, label: str, layer: int | None, n_layers: int | None) -> tuple[np.ndarray, dict[str, Any]]:
    try:
        import torch
    except ImportError as error:
        raise ValueError("reading .pt needs torch (pip install torch)") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError("not a .pt file of plain tensors; other pickles are never loaded") from error
    provenance = {"file": path.name}
    if isinstance(content, dict):
        if label not in content:
            raise ValueError(f"labels {sorted(map(str, content))}, not {label!r}")
        content, provenance["label"] = content[label], label
    if not isinstance(content, torch.Tensor):
        raise ValueError(f"holds a {type(content).__name__}, expected a tensor or a dictionary of tensors")
    if content.is_complex() or content.layout != torch.strided:
        raise ValueError(f"holds a tensor of {content.dtype}, {content.layout}, expected real and dense numbers")
    tensor = content.detach().float().numpy()
    if tensor.ndim == 1:
        if layer is None or n_layers is None:
            raise ValueError(f"holds one direction [{len(tensor)}]: say at which `layer` of `n_layers` it belongs")
        return _by_layer({f"direction.{layer}": tensor}, n_layers), provenance
    if tensor.ndim == 2 and n_layers is not None and len(tensor) == n_layers + 1:
        tensor = tensor[1:]
    return tensor, provenance


def _provenance(path: Path, text: str | None) -> dict[str, Any]:
    """What the file says of itself, or at least its name."""
    try:
        said = {} if text is None else json.loads(text)
    except json.JSONDecodeError:  # free text
        said = text
    return said if isinstance(said, dict) and said else {"file": path.name} | ({"note": said} if said else {})


def _by_layer(rows: Mapping[str, np.ndarray], n_layers: int) -> np.ndarray:
    """[L, D] float32 out of `direction.{layer}` tensors; NaN at layers that are absent."""
    widths = {row.shape for row in rows.values()}
    if len(widths) != 1 or len(next(iter(widths))) != 1:
        raise ValueError(f"directions of shapes {sorted(widths)}, expected one [d_model] for all layers")
    directions = np.full((n_layers, *widths.pop()), np.nan, np.float32)
    for name, row in rows.items():
        layer = _layer_of(name)
        if not 0 <= layer < n_layers:
            raise ValueError(f"{name} is outside layers 0..{n_layers - 1}")
        directions[layer] = row
    return directions


def _layer_of(name: str) -> int:
    prefix, _, number = name.partition(".")
    if prefix != "direction" or not number.isdecimal():
        raise ValueError(f"holds {name!r}, expected direction.0, direction.1, ...")
    return int(number)


def _json(provenance: Mapping[str, Any]) -> str:
    """JSON; numpy's numbers as numbers, what JSON has no word for (a path) as text."""
    plain = lambda value: value.item() if isinstance(value, np.generic) else str(value)  # noqa: E731
    return json.dumps(dict(provenance), sort_keys=True, default=plain)
