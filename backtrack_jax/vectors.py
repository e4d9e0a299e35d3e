"""Steering vectors: difference of means, arithmetic, files."""

import dataclasses
import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from backtrack_jax.extract import Window, WindowSums

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
        """Refuses anything but [L, D]."""
        if self.directions.ndim != 2:
            raise ValueError(f"directions have shape {self.directions.shape}, expected [n_layers, d_model]")

    def at(self, layer: int) -> np.ndarray:
        """The raw direction [D] float32 at a layer; ValueError if the layer is out of range or absent."""
        if not 0 <= layer < len(self.directions):
            raise ValueError(f"layer={layer} is outside 0..{len(self.directions) - 1}")
        direction = self.directions[layer]
        if not np.isfinite(direction).all():
            raise ValueError(f"the vector has no finite direction at layer {layer}")
        return direction

    def unit(self, layer: int) -> np.ndarray:
        """The direction [D] float32 at a layer, scaled to norm 1; ValueError if it is zero."""
        direction = self.at(layer)
        norm = np.linalg.norm(direction)
        if norm == 0:
            raise ValueError(f"the vector is zero at layer {layer}")
        return direction / norm

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
    """Cosine similarity per layer, [L] float64."""
    _check_same_shape(a, b)
    x, y = a.directions.astype(np.float64), b.directions.astype(np.float64)
    return np.sum(x * y, axis=-1) / (np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1))


def save(vector: SteeringVector, path: Path) -> None:
    """Writes a vector; the suffix chooses the format.

    `.safetensors`: `direction.{layer}` float32, with provenance and raw norms in the metadata; `.npz`: `directions`
    [L, D] and `provenance`; `.gguf`: a llama.cpp control vector.

    Raises:
      ValueError: if the suffix is another one.
    """
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
    path: Path, *, label: str = "backtracking", layer: int | None = None, n_layers: int | None = None
) -> SteeringVector:
    """Reads a vector from `.safetensors`, `.npz`, `.gguf` or `.pt` (weights only, never a pickle; needs torch).

    Args:
      path: the file.
      label: which entry of a `.pt` dictionary of labels, the paper's released form.
      layer: where a `.pt` tensor of shape [D] belongs.
      n_layers: L of the model, needed to place a [D] tensor, and to recognise a [L + 1, D] tensor, whose row 0 belongs
        to the embeddings and is dropped.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: names the file and what is wrong with it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such vector file")
    if path.suffix == ".pt":
        return _load_pt(path, label, layer, n_layers)
    readers: dict[str, Callable[[Path], SteeringVector]] = {
        ".safetensors": _load_safetensors,
        ".npz": _load_npz,
        ".gguf": _load_gguf,
    }
    if path.suffix not in readers:
        raise ValueError(f"{path}: a vector is read from one of {[*sorted(readers), '.pt']}")
    return readers[path.suffix](path)


def _save_safetensors(vector: SteeringVector, path: Path) -> None:
    tensors = {f"direction.{i}": row for i, row in enumerate(vector.directions) if np.isfinite(row).all()}
    metadata = {
        "schema": _SCHEMA,
        "layer_convention": LAYER_CONVENTION,
        "n_layers": str(len(vector.directions)),
        "raw_norms": json.dumps(vector.norms.tolist()),
        "provenance": json.dumps(vector.provenance, sort_keys=True),
    }
    save_file({name: np.ascontiguousarray(row, np.float32) for name, row in tensors.items()}, path, metadata)


def _load_safetensors(path: Path) -> SteeringVector:
    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            rows = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dictionary
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    if metadata.get("layer_convention") != LAYER_CONVENTION:
        found = metadata.get("layer_convention")
        raise ValueError(f"{path}: layer_convention={found!r} in the metadata, expected {LAYER_CONVENTION!r}")
    directions = _by_layer(path, rows, int(metadata["n_layers"]))
    return SteeringVector(directions, json.loads(metadata["provenance"]))


def _save_npz(vector: SteeringVector, path: Path) -> None:
    provenance = json.dumps(vector.provenance, sort_keys=True)
    np.savez(path, directions=vector.directions, provenance=provenance, layer_convention=LAYER_CONVENTION)


def _load_npz(path: Path) -> SteeringVector:
    with np.load(path, allow_pickle=False) as file:
        if "directions" not in file:
            raise ValueError(f"{path} has arrays {sorted(file)}, expected 'directions' [n_layers, d_model]")
        provenance = json.loads(str(file["provenance"])) if "provenance" in file else {"file": path.name}
        return SteeringVector(file["directions"].astype(np.float32), provenance)


def _save_gguf(vector: SteeringVector, path: Path) -> None:
    """A llama.cpp control vector: `direction.{layer}` from 1 up, since llama.cpp has no direction for block 0.

    llama.cpp adds it at the prompt as well, and ignores the metadata.
    """
    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_uint32("controlvector.layer_count", len(vector.directions) - 1)
    writer.add_string("backtrack_jax.provenance", json.dumps(vector.provenance, sort_keys=True))
    for layer, row in enumerate(vector.directions[1:], start=1):
        writer.add_tensor(f"direction.{layer}", np.nan_to_num(row).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _load_gguf(path: Path) -> SteeringVector:
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError) as error:
        raise ValueError(f"{path} is not a GGUF file: {error}") from error
    rows = {tensor.name: np.array(tensor.data, np.float32) for tensor in reader.tensors}
    count = reader.get_field("controlvector.layer_count")
    layers = [_layer_of(path, name) for name in rows]
    n_layers = max([*layers, int(count.contents()) if count else 0]) + 1
    provenance = reader.get_field("backtrack_jax.provenance")
    return SteeringVector(
        _by_layer(path, rows, n_layers), json.loads(provenance.contents()) if provenance else {"file": path.name}
    )


def _load_pt(path: Path, label: str, layer: int | None, n_layers: int | None) -> SteeringVector:
    try:
        import torch
    except ImportError as error:
        raise ValueError(f"{path}: reading .pt needs torch (pip install torch)") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is not a .pt file of plain tensors: {error}") from error
    if isinstance(content, dict):
        if label not in content:
            raise ValueError(f"{path} has labels {sorted(content)}, not {label!r}")
        content = content[label]
    tensor = content.float().numpy()
    provenance = {"file": path.name, "label": label}
    if tensor.ndim == 1:
        if layer is None or n_layers is None:
            raise ValueError(
                f"{path} holds one direction [{len(tensor)}]: say at which `layer` of `n_layers` it belongs"
            )
        return SteeringVector(_by_layer(path, {f"direction.{layer}": tensor}, n_layers), provenance)
    if n_layers is not None and len(tensor) == n_layers + 1:
        tensor = tensor[1:]
    return SteeringVector(tensor, provenance)


def _by_layer(path: Path, rows: Mapping[str, np.ndarray], n_layers: int) -> np.ndarray:
    """[L, D] float32 out of `direction.{layer}` tensors; NaN at layers that are absent."""
    widths = {row.shape for row in rows.values()}
    if len(widths) != 1 or len(next(iter(widths))) != 1:
        raise ValueError(f"{path} has directions of shapes {sorted(widths)}, expected one [d_model] for all layers")
    directions = np.full((n_layers, *widths.pop()), np.nan, np.float32)
    for name, row in rows.items():
        layer = _layer_of(path, name)
        if not 0 <= layer < n_layers:
            raise ValueError(f"{path}: {name} is outside layers 0..{n_layers - 1}")
        directions[layer] = row
    return directions


def _layer_of(path: Path, name: str) -> int:
    prefix, _, number = name.partition(".")
    if prefix != "direction" or not number.isdigit():
        raise ValueError(f"{path} has a tensor {name!r}, expected direction.0, direction.1, ...")
    return int(number)


def _check_same_shape(a: SteeringVector, b: SteeringVector) -> None:
    if a.directions.shape != b.directions.shape:
        raise ValueError(
            f"vectors of shapes {a.directions.shape} and {b.directions.shape} (layers, d_model) do not match"
        )
