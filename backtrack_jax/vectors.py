"""Steering vectors: difference of means, arithmetic, files."""

import dataclasses
import json
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors import SafetensorError, safe_open

from backtrack_jax.extract import Window, WindowSums
from backtrack_jax.files import store

LAYER_CONVENTION = "block_output_0based"
_SCHEMA = "backtrack_jax.steering_vector.v1"


@dataclasses.dataclass(frozen=True, eq=False)
class SteeringVector:
    """One direction per layer, as found: not normalised.

    `2 * a - b` works layer by layer on vectors of one shape.

    Attributes:
      directions: [L, D] float32; row l belongs to the output of block l, 0-based. A layer that is absent (a file may
        hold a single one) is NaN, and using it is an error.
      provenance: where it came from: model, labels, contrast, window, estimator, counts. JSON values.
    """

    directions: np.ndarray
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuses anything but [L, D] and a mapping; float16 would not hold a norm of 256."""
        if not isinstance(self.provenance, Mapping):
            raise ValueError(f"provenance={self.provenance!r}, expected a mapping of JSON values")
        object.__setattr__(self, "directions", np.asarray(self.directions, np.float32))
        if self.directions.ndim != 2:
            raise ValueError(f"directions have shape {self.directions.shape}, expected [n_layers, d_model]")

    def at(self, layer: int) -> np.ndarray:
        """The raw direction [D] float32 at a layer; ValueError if the layer is out of range or absent."""
        if isinstance(layer, bool) or layer not in range(len(self.directions)):
            raise ValueError(f"layer={layer!r} is outside 0..{len(self.directions) - 1}")
        direction = self.directions[int(layer)]
        if not np.isfinite(direction).all():
            raise ValueError(f"the vector has no finite direction at layer {layer}")
        return direction

    def unit(self, layer: int) -> np.ndarray:
        """The direction [D] float32 at a layer, scaled to norm 1; ValueError if it is zero."""
        direction = self.at(layer)
        norm = np.linalg.norm(direction.astype(np.float64))
        if norm == 0:
            raise ValueError(f"the vector is zero at layer {layer}")
        if 1e-15 < norm < 1e15:  # float32 holds the squares
            norm = np.linalg.norm(direction)
        return (direction / norm).astype(np.float32)

    @property
    def norms(self) -> np.ndarray:
        """Raw norm per layer, [L] float32."""
        return np.linalg.norm(self.directions, axis=-1)

    def __add__(self, other: "SteeringVector") -> "SteeringVector":
        """Sum, layer by layer."""
        _check_same_shape(self, other)
        terms = [dict(self.provenance), dict(other.provenance)]
        return SteeringVector(self.directions + other.directions, {"sum": terms})

    def __mul__(self, factor: float) -> "SteeringVector":
        """Scaled in every layer."""
        scaled = {"factor": float(factor), "of": dict(self.provenance)}
        return SteeringVector((self.directions * factor).astype(np.float32), scaled)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> "SteeringVector":
        """Divided in every layer."""
        return self * (1 / float(divisor))

    def __neg__(self) -> "SteeringVector":
        """The opposite direction."""
        return -1.0 * self

    def __sub__(self, other: "SteeringVector") -> "SteeringVector":
        """Difference, layer by layer."""
        return self + -other


def difference_of_means(
    sums: WindowSums,
    label: str,
    window: Window,
    *,
    contrast: str = "all",
    estimator: str = "trace_mean",
    provenance: Mapping[str, Any] | None = None,
) -> SteeringVector:
    """v = MeanAct(D+) - MeanAct(D), Eq. 3 of the paper, at every layer.

    Args:
      sums: of one model over the traces.
      label: the group of D+, for instance "backtracking".
      window: inclusive offsets from a section's first token.
      contrast: the group of D: "all" sections as in the paper, or another group, for instance "rest".
      estimator: "trace_mean" (Eq. 3: mean over traces of the mean over that trace's positions) or "token_mean" (all
        positions pooled, as the released script does).
      provenance: what else is to be remembered: model, data.

    Returns:
      The vector, with its counts in the provenance.

    Raises:
      ValueError: if a group, window or estimator was not summed or is empty.
    """
    difference = sums.mean(label, window, estimator) - sums.mean(contrast, window, estimator)
    groups = list(sums.plan.groups)
    w = sums.plan.windows.index(window)
    counts = {
        name: {"windows": int(sums.read[g, w]), "dropped": int(sums.dropped[g, w])}
        for name in (label, contrast)
        for g in [groups.index(name)]
    }
    origin = {
        **(provenance or {}),
        "label": label,
        "contrast": contrast,
        "window": list(window),
        "estimator": estimator,
        "into_prompt": sums.plan.into_prompt,
        "n_traces": len(sums.trace_ids),
        "counts": counts,
    }
    return SteeringVector(difference.astype(np.float32), origin)


def cosine(a: SteeringVector, b: SteeringVector) -> np.ndarray:
    """Cosine similarity per layer, [L] float64; NaN where either vector is zero or absent."""
    _check_same_shape(a, b)
    x, y = a.directions.astype(np.float64), b.directions.astype(np.float64)
    with np.errstate(invalid="ignore"):
        return np.sum(x * y, axis=-1) / (np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1))


def save(vector: SteeringVector, path: Path | str) -> None:
    """Writes a vector; the suffix chooses the format.

    `.safetensors`: `direction.{layer}` float32, with provenance and raw norms in the metadata; `.npz`: `directions`
    [L, D] and `provenance`; `.gguf`: a llama.cpp control vector, which has no place for layer 0.

    Raises:
      ValueError: if the suffix is another one, or a `.gguf` would hold no layer at all.
    """
    path = Path(path)
    writers: dict[str, Callable[[SteeringVector, Path], None]] = {
        ".safetensors": _save_safetensors,
        ".npz": _save_npz,
        ".gguf": _save_gguf,
    }
    if path.suffix not in writers:
        raise ValueError(f"{path}: a vector is saved as one of {sorted(writers)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp{path.suffix}")
    writers[path.suffix](vector, temporary)
    temporary.replace(path)


def load(
    path: Path | str, *, label: str = "backtracking", layer: int | None = None, n_layers: int | None = None
) -> SteeringVector:
    """Reads a vector from `.safetensors`, `.npz`, `.gguf` or `.pt` (weights only, never a pickle; needs torch).

    Args:
      path: the file.
      label: which entry of a `.pt` dictionary of labels, the paper's released form.
      layer: where a `.pt` tensor of shape [D] belongs.
      n_layers: L of the model. Needed to place a [D] tensor, and to recognise a [L + 1, D] tensor, whose row 0 belongs
        to the embeddings and is dropped; a GGUF file, which need not tell, is filled up to it.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: names the file and what is wrong with it, a number of layers other than `n_layers` included.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such vector file")
    readers: dict[str, Callable[[], SteeringVector]] = {
        ".safetensors": lambda: _load_safetensors(path),
        ".npz": lambda: _load_npz(path),
        ".gguf": lambda: _load_gguf(path, n_layers),
        ".pt": lambda: _load_pt(path, label, layer, n_layers),
    }
    if path.suffix not in readers:
        raise ValueError(f"{path}: a vector is read from one of {sorted(readers)}")
    try:
        vector = readers[path.suffix]()
        if n_layers is not None and len(vector.directions) != n_layers:
            raise ValueError(f"{len(vector.directions)} layers, expected {n_layers}")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return vector


def _save_safetensors(vector: SteeringVector, path: Path) -> None:
    tensors = {f"direction.{i}": row for i, row in enumerate(vector.directions) if np.isfinite(row).all()}
    metadata = {
        "schema": _SCHEMA,
        "layer_convention": LAYER_CONVENTION,
        "n_layers": str(len(vector.directions)),
        "raw_norms": json.dumps([norm if np.isfinite(norm) else None for norm in vector.norms.tolist()]),
        "provenance": _provenance_json(vector),
    }
    rows = {name: np.ascontiguousarray(row, np.float32) for name, row in tensors.items()}
    store.write_safetensors(path, rows, metadata)


def _load_safetensors(path: Path) -> SteeringVector:
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
    return SteeringVector(_by_layer(rows, int(metadata["n_layers"])), _provenance(path, metadata.get("provenance")))


def _save_npz(vector: SteeringVector, path: Path) -> None:
    provenance = _provenance_json(vector)
    np.savez(path, directions=vector.directions, provenance=provenance, layer_convention=LAYER_CONVENTION)


def _load_npz(path: Path) -> SteeringVector:
    if not zipfile.is_zipfile(path):
        raise ValueError("not an .npz file")
    try:
        with np.load(path, allow_pickle=False) as file:
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
    return SteeringVector(arrays["directions"].astype(np.float32), _provenance(path, provenance))


def _save_gguf(vector: SteeringVector, path: Path) -> None:
    """A llama.cpp control vector: `direction.{layer}` from 1 up, since llama.cpp has no direction for block 0.

    llama.cpp adds it at the prompt as well, and ignores the metadata. It adds nothing at a layer that is absent.
    """
    rows = {layer: row for layer, row in enumerate(vector.directions) if layer > 0 and np.isfinite(row).all()}
    if not rows:
        raise ValueError("a GGUF control vector cannot hold layer 0, and this vector has no other")
    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_uint32("controlvector.layer_count", len(vector.directions) - 1)
    writer.add_string("backtrack_jax.provenance", _provenance_json(vector))
    for layer, row in rows.items():
        writer.add_tensor(f"direction.{layer}", np.ascontiguousarray(row, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _load_gguf(path: Path, n_layers: int | None) -> SteeringVector:
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
    told = int(count.contents()) + (0 not in layers) if count else 0  # the number of directions, and block 0 has none
    known = max([*layers, -1]) + 1
    provenance = reader.get_field("backtrack_jax.provenance")
    return SteeringVector(
        _by_layer(rows, max(known, n_layers or told)), _provenance(path, provenance.contents() if provenance else None)
    )


def _load_pt(path: Path, label: str, layer: int | None, n_layers: int | None) -> SteeringVector:
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
        return SteeringVector(_by_layer({f"direction.{layer}": tensor}, n_layers), provenance)
    if tensor.ndim == 2 and n_layers is not None and len(tensor) == n_layers + 1:
        tensor = tensor[1:]
    return SteeringVector(tensor, provenance)


def _provenance(path: Path, text: str | None) -> dict[str, Any]:
    """What the file says of itself, or at least its name."""
    try:
        told = {} if text is None else json.loads(text)
    except json.JSONDecodeError:  # somebody's own words
        told = text
    return told if isinstance(told, dict) and told else {"file": path.name} | ({"note": told} if told else {})


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


def _provenance_json(vector: SteeringVector) -> str:
    """JSON; numpy's numbers as numbers, what JSON has no word for (a path) as text."""
    plain = lambda value: value.item() if isinstance(value, np.generic) else str(value)  # noqa: E731
    return json.dumps(dict(vector.provenance), sort_keys=True, default=plain)


def _check_same_shape(a: SteeringVector, b: SteeringVector) -> None:
    if a.directions.shape != b.directions.shape:
        raise ValueError(
            f"vectors of shapes {a.directions.shape} and {b.directions.shape} (layers, d_model) do not match"
        )
