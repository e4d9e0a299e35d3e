"""The conditions of a steering experiment, as rows of compiled batches: which model, what is added, how strongly."""

import dataclasses
import functools
import hashlib
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from backtrack_jax.config import CONTROLS, Experiment, is_vector_file
from backtrack_jax.data.records import UNSTEERED, Condition, window_name
from backtrack_jax.generate import noise_key
from backtrack_jax.intervention import (
    Intervention,
    Span,
    add_vector,
    gaussian_noise,
    key_of,
    no_intervention,
    self_amplify,
)
from backtrack_jax.vectors import SteeringVector


@dataclasses.dataclass(frozen=True)
class Readings:
    """What stage 3 found, as far as steering needs it.

    Attributes:
      vectors: (role, kind) -> vector of every layer; kinds are labels, `overall-mean` and `shuffled`.
      mean_norm: role -> [L] mean norm of the residual stream over reply tokens.
      offsets: (role, window name) -> vector of the experiment's label at another window than the experiment's.
      files: path, as in the config -> vector.
    """

    vectors: Mapping[tuple[str, str], SteeringVector]
    mean_norm: Mapping[str, np.ndarray]
    offsets: Mapping[tuple[str, str], SteeringVector] = dataclasses.field(default_factory=dict)
    files: Mapping[str, SteeringVector] = dataclasses.field(default_factory=dict)

    def vector(self, source: str, kind: str, window: str = "") -> SteeringVector:
        """The vector of a role, kind and window (empty: the experiment's); ValueError names what there is."""
        if kind in self.files:
            return self.files[kind]
        if (source, window) in self.offsets:
            return self.offsets[source, window]
        if (source, kind) not in self.vectors:
            known = sorted({k for s, k in self.vectors if s == source})
            raise ValueError(f"no {kind!r} vector of the {source} model was read; there are {known}")
        return self.vectors[source, kind]


def make(experiment: Experiment, readings: Readings) -> dict[Condition, int]:
    """All conditions of the experiment's sweeps, each once, with the number of problems it is sampled on (0: all).

    Magnitude 0 becomes one `unsteered` condition per steered model. A condition that two sweeps share, such as the
    experiment's own layer in Fig. 3 and Fig. B.1, takes the larger number of problems.
    """
    return _conditions(experiment, functools.partial(_scale, experiment, readings))


def planned(experiment: Experiment) -> dict[Condition, int]:
    """What `make` gives but for the lengths, known before anything was read."""
    return _conditions(experiment, lambda *condition: 1.0)


def _conditions(e: Experiment, scale: Callable[[str, str, str, int, str], float]) -> dict[Condition, int]:
    s, made = e.steering, {}

    def add(target: str, kind: str, source: str, layer: int, window: str, magnitudes: Iterable[float], limit: int):
        length = scale(target, kind, source, layer, window)
        for m in magnitudes:
            c = Condition(target, kind, source, layer, window, m, m * length)
            if m == 0:
                c = Condition(target, UNSTEERED, "", s.main_layer, "", 0.0, 0.0)
            made[c] = max(made.get(c, limit), limit) if limit and made.get(c, limit) else 0

    def add_kind(target: str, kind: str, sources: Sequence[str]) -> None:
        for source in sources if _has_source(kind) else ("",):
            add(target, kind, source, s.main_layer, own if source else "", s.magnitudes, s.limit)

    own = window_name(e.vectors.window)
    grid, grid_limit = s.grid_magnitudes or s.magnitudes, s.grid_limit or s.limit
    for target in e.roles:
        for kind in s.kinds:
            add_kind(target, kind, e.roles)
        if target != e.author:
            continue
        for kind in s.baselines:
            add_kind(target, kind, (target,))
        for offset in s.offsets:
            add(
                target,
                e.vectors.label,
                target,
                s.main_layer,
                window_name(e.vectors.window_at(offset)),
                grid,
                grid_limit,
            )
        for layer in s.layers:
            for source in e.roles:
                add(target, e.vectors.label, source, layer, own, grid, grid_limit)
    return made


def _has_source(kind: str) -> bool:
    """Whether a kind comes from a model's activations; what does not is run once per steered model."""
    return kind not in ("noise", "self-amplification", "random") and not is_vector_file(kind)


def _scale(
    experiment: Experiment, readings: Readings, target: str, kind: str, source: str, layer: int, window: str
) -> float:
    """Length of magnitude 1. A control without a source takes the target's own vector as its measure."""
    if experiment.steering.unit == "relative":
        return float(readings.mean_norm[target][layer])
    if experiment.steering.unit == "raw":
        measure = kind if is_vector_file(kind) else experiment.vectors.label
        return float(readings.vector(source or target, measure, window).norms[layer])
    return 1.0


class Interventions:
    """Builds the intervention of a row; what rows of a condition share is built once."""

    def __init__(self, readings: Readings, n_layers: int, d_model: int, span: Span, seed: int):
        """Prepares for a model of L layers and width D."""
        self._readings, self._seed = readings, seed
        self._n_layers, self._d_model = n_layers, d_model
        self._span: Span = span
        self._built: dict[Condition, Intervention] = {}

    def row(self, condition: Condition, key: jax.Array) -> Intervention:
        """The intervention of one row under `condition`; `key` is the row's key, from which noise is drawn."""
        if condition not in self._built:
            self._built[condition] = self._build(condition)
        return dataclasses.replace(self._built[condition], key=noise_key(key))

    def _build(self, c: Condition) -> Intervention:
        n_layers, d_model, span = self._n_layers, self._d_model, self._span
        if c.kind == UNSTEERED:
            return no_intervention(n_layers, d_model, span)
        if c.kind == "noise":
            return gaussian_noise(c.layer, c.length, key_of(0), n_layers=n_layers, d_model=d_model, span=span)
        if c.kind == "self-amplification":
            return self_amplify(c.layer, c.length, n_layers=n_layers, d_model=d_model, span=span)
        if c.kind == "random":
            direction = random_direction(self._seed, "random", d_model)
        else:
            direction = self._readings.vector(c.source, c.kind, c.window).unit(c.layer)
        return add_vector(jnp.asarray(direction), c.layer, c.length, n_layers=n_layers, span=span)

    def vector_hash(self, c: Condition) -> str:
        """Hash of the float32 direction at the condition's layer as its file holds it; empty where there is none."""
        if c.kind == "random":
            direction = random_direction(self._seed, "random", self._d_model)
        elif c.source or is_vector_file(c.kind):
            direction = self._readings.vector(c.source, c.kind, c.window).at(c.layer)
        else:
            return ""
        return hashlib.sha256(np.ascontiguousarray(direction, "<f4").tobytes()).hexdigest()[:16]


def random_direction(seed: int, name: str, d_model: int) -> np.ndarray:
    """A fixed unit vector [D] float32, drawn from the run's seed and a name."""
    e = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(d_model)
    return (e / np.linalg.norm(e)).astype(np.float32)


def needed_vectors(experiment: Experiment) -> set[str]:
    """Names of the vectors that the sweep takes from stage 3."""
    raw = {experiment.vectors.label} if experiment.steering.unit == "raw" else set()
    return needed_labels(experiment) | raw | ({"overall-mean", "shuffled"} & set(experiment.steering.all_kinds))


def needed_labels(experiment: Experiment) -> set[str]:
    """Labels whose vectors the sweeps add."""
    s = experiment.steering
    swept = {experiment.vectors.label} if s.offsets or s.layers else set()
    return swept | {kind for kind in s.all_kinds if kind not in CONTROLS and not is_vector_file(kind)}
