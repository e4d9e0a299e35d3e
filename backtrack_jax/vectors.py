"""Steering vectors: difference of means and arithmetic; `vector_files` has their formats."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from backtrack_jax import vector_files
from backtrack_jax.extract import Window, WindowSums
from backtrack_jax.vector_files import LAYER_CONVENTION as LAYER_CONVENTION


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
      contrast: the group of D: "all" sections as in the paper, or another group, for instance "rest", or "trace", the
        sections of those traces of which a window of D+ is read.
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
    vector_files.write(Path(path), vector.directions, vector.provenance)


def load(
    path: Path | str, *, label: str = "backtracking", layer: int | None = None, n_layers: int | None = None
) -> SteeringVector:
    """Reads a vector from `.safetensors`, `.npz`, `.gguf` or `.pt` (weights only, never a pickle; needs torch).

    Args:
      path: the file.
      label: which entry of a `.pt` dictionary of labels, the paper's released form.
      layer: where a `.pt` tensor of shape [D] belongs.
      n_layers: L of the model. Needed to place a [D] tensor, and to recognise a [L + 1, D] tensor, whose row 0 belongs
        to the embeddings and is dropped; a GGUF file, which may not say, is filled up to it.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: names the file and what is wrong with it, a number of layers other than `n_layers` included.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such vector file")
    try:
        vector = SteeringVector(*vector_files.read(path, label, layer, n_layers))
        if n_layers is not None and len(vector.directions) != n_layers:
            raise ValueError(f"{len(vector.directions)} layers, expected {n_layers}")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return vector


def _check_same_shape(a: SteeringVector, b: SteeringVector) -> None:
    if a.directions.shape != b.directions.shape:
        raise ValueError(
            f"vectors of shapes {a.directions.shape} and {b.directions.shape} (layers, d_model) do not match"
        )
