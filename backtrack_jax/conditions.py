"""The conditions of a steering experiment, as rows of compiled batches: which model, what is done, how strongly."""

import dataclasses
import functools
import hashlib
import operator
import pkgutil
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from backtrack_jax.analysis.base import Wanted, asked
from backtrack_jax.analysis.registry import ANALYSES
from backtrack_jax.config import Experiment
from backtrack_jax.data.records import UNSTEERED, Condition, window_name
from backtrack_jax.directions import Place, Sections
from backtrack_jax.generate import noise_key
from backtrack_jax.intervention import (
    Intervention,
    Span,
    keeping_norm,
    no_intervention,
    when_component,
    when_token,
)
from backtrack_jax.kinds import Edit, arguments_of, direction_of, is_vector_file, labels_of, parse
from backtrack_jax.vectors import SteeringVector


@dataclasses.dataclass(frozen=True)
class Readings:
    """What stage 3 found, as far as steering needs it.

    Attributes:
      vectors: (role, kind) -> vector of every layer; kinds are labels, `overall-mean` and `shuffled`.
      mean_norm: role -> [L] mean norm of the residual stream over reply tokens.
      offsets: (role, window name) -> vector of the experiment's label at another window than the experiment's.
      files: path, as in the config -> vector.
      sections: role -> what else was read of that model; for directions that are made of it (`directions`).
    """

    vectors: Mapping[tuple[str, str], SteeringVector]
    mean_norm: Mapping[str, np.ndarray]
    offsets: Mapping[tuple[str, str], SteeringVector] = dataclasses.field(default_factory=dict)
    files: Mapping[str, SteeringVector] = dataclasses.field(default_factory=dict)
    sections: Callable[[str], Sections] | None = None

    def vector(self, source: str, kind: str, window: str = "") -> SteeringVector:
        """The vector of a role, kind and window (empty: the experiment's); ValueError names what there is."""
        if kind in self.files:
            return self.files[kind]
        if (source, window) in self.offsets:
            return self.offsets[source, window]
        if (source, kind) not in self.vectors:
            known = sorted({k for s, k in self.vectors if s == source})
            raise ValueError(f"no {kind!r} vector of the {source} model was read; available: {known}")
        return self.vectors[source, kind]


def make(experiment: Experiment, readings: Readings) -> dict[Condition, int]:
    """All conditions of the experiment's sweeps, each once, with the number of problems it is sampled on (0: all).

    Magnitude 0 becomes one `unsteered` condition per steered model. A condition that two sweeps share, such as the
    experiment's own layer in Fig. 3 and Fig. B.1, takes the larger number of problems.
    """
    return _conditions(experiment, functools.partial(_scale, experiment, readings))


def planned(experiment: Experiment) -> dict[Condition, int]:
    """What `make` gives except for the lengths; known before anything is read."""
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

    def add_kind(
        target: str, kind: str, sources: Sequence[str], layer: int, magnitudes: Sequence[float] = s.magnitudes
    ) -> None:
        for source in sources if parse(kind).read else ("",):
            add(target, kind, source, layer, own if source else "", magnitudes, s.limit)

    own = window_name(e.vectors.window)
    grid, grid_limit = s.grid_magnitudes or s.magnitudes, s.grid_limit or s.limit
    for target in e.roles:
        for kind in s.kinds:
            for layer in s.kind_layers:
                add_kind(target, kind, e.roles, layer)
        if target != e.author:
            continue
        for kind in s.baselines:
            add_kind(target, kind, (target,), s.main_layer, s.baseline_magnitudes or s.magnitudes)
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
    for wanted in wanted_conditions(e):
        layer = s.main_layer if wanted.layer is None else wanted.layer
        sources = (wanted.sources or (wanted.target,)) if parse(wanted.kind).read else ("",)
        for source in sources:
            limit = wanted.limit or s.limit
            add(wanted.target, wanted.kind, source, layer, own if source else "", wanted.magnitudes, limit)
    return made


def wanted_conditions(e: Experiment) -> list[Wanted]:
    """What the analyses that are asked for need besides the sweeps."""
    found = [wanted for analysis in asked(ANALYSES, e) for wanted in analysis.conditions(e)]
    return [wanted for wanted in found if wanted.target in e.roles and set(wanted.sources) <= set(e.roles)]


def names(experiment: Experiment) -> tuple[str, ...]:
    """The labels, controls and vector files that all conditions are made of, once."""
    extra = (name for wanted in wanted_conditions(experiment) for name in parse(wanted.kind).names)
    return tuple(dict.fromkeys((*experiment.steering.names, *extra)))


def _scale(
    experiment: Experiment, readings: Readings, target: str, kind: str, source: str, layer: int, window: str
) -> float:
    """Length of magnitude 1. What has no source takes the target's own vector as its measure."""
    what = parse(kind).what
    if what.strength == "share":
        return 1.0
    if experiment.steering.unit == "relative":
        return float(readings.mean_norm[target][layer])
    if experiment.steering.unit == "raw":
        measure = kind if is_vector_file(kind) else experiment.vectors.label
        return float(readings.vector(source or target, measure, window).norms[layer])
    return 1.0


class Interventions:
    """Builds the intervention of a row; what rows of a condition share is built once."""

    def __init__(
        self,
        readings: Readings,
        n_layers: int,
        d_model: int,
        span: Span,
        token_texts: Callable[[], Sequence[str]] = tuple,
    ):
        """Prepares for a model of L layers and width D; `token_texts` gives the text of every id, for token gates."""
        self._readings = readings
        self._n_layers, self._d_model = n_layers, d_model
        self._span: Span = span
        self._token_texts = functools.cache(token_texts)
        self._built: dict[Condition, Intervention] = {}
        self._made: dict[tuple[str, str, int], np.ndarray] = {}

    def row(self, condition: Condition, key: jax.Array) -> Intervention:
        """The intervention of one row under `condition`; `key` is the row's key, from which all that is drawn comes."""
        if condition not in self._built or parse(condition.kind).drawn:
            self._built[condition] = self._build(condition, key)
        return dataclasses.replace(self._built[condition], key=noise_key(key))

    def _build(self, c: Condition, key: jax.Array) -> Intervention:
        if c.kind == UNSTEERED:
            return no_intervention(self._n_layers, self._d_model, self._span)
        kind = parse(c.kind)
        row = functools.reduce(operator.add, [self._edit(c, edit, key) for edit in kind.edits])
        if kind.gate is not None and kind.gate.tokens:
            texts = self._token_texts()
            row = when_token(row, token_set(kind.gate.tokens, texts), len(texts))
        if kind.gate is not None and kind.gate.name:
            norm = float(self._readings.mean_norm[c.target][c.layer])
            direction = self._unit_of(c, key, kind.gate.name)
            row = when_component(row, jnp.asarray(direction, jnp.float32), kind.gate.above * norm)
        return keeping_norm(row) if kind.keeps_norm else row

    def _edit(self, c: Condition, edit: Edit, key: jax.Array) -> Intervention:
        """One change of an entry."""
        what = edit.what
        by_magnitude = what.strength != "share" or parse(c.kind).what.strength == "share"
        strength = c.length * edit.weight if by_magnitude else edit.weight
        make, span = pkgutil.resolve_name(what.make), edit.during or self._span
        if not what.directed:
            return make(c.layer, strength, n_layers=self._n_layers, d_model=self._d_model, span=span)
        direction = jnp.asarray(self._unit(c, edit, key), jnp.float32)
        return make(direction, c.layer, strength, n_layers=self._n_layers, span=span)

    def vector_hash(self, c: Condition, key: jax.Array) -> str:
        """Hash of the float32 directions of a row at the condition's layer, empty where there is none.

        A single direction is hashed as its file holds it, a sum at norm 1.
        """
        edits = [] if c.kind == UNSTEERED else [edit for edit in parse(c.kind).edits if edit.parts]
        found = hashlib.sha256()
        for edit in edits:
            names = [name for _, name in edit.parts]
            direction = self._direction(c, key, names[0]) if len(names) == 1 else self._unit(c, edit, key)
            found.update(np.ascontiguousarray(direction, "<f4").tobytes())
        return found.hexdigest()[:16] if edits else ""

    def _unit(self, c: Condition, edit: Edit, key: jax.Array) -> np.ndarray:
        """The direction [D] float32 of an edit that has one, scaled to norm 1, or several [R, D] as they are.

        Raises:
          ValueError: it is zero.
        """
        units = [(weight, self._unit_of(c, key, name)) for weight, name in edit.parts]
        if len(units) == 1:
            return units[0][1]
        summed = np.sum([weight * unit.astype(np.float64) for weight, unit in units], axis=0)
        norm = np.linalg.norm(summed)
        if norm < 1e-6 * sum(abs(weight) for weight, _ in units):
            raise ValueError(f"steering.kinds={c.kind!r}: the sum is zero at layer {c.layer}, and so has no direction")
        return (summed / norm).astype(np.float32)

    def _unit_of(self, c: Condition, key: jax.Array, name: str) -> np.ndarray:
        found = direction_of(name)
        if found is None or not (found.draw or found.make):
            return self._readings.vector(c.source, name, c.window).unit(c.layer)
        direction = self._direction(c, key, name)
        return direction if found.subspace else (direction / np.linalg.norm(direction)).astype(np.float32)

    def _direction(self, c: Condition, key: jax.Array, name: str) -> np.ndarray:
        """The direction [D] float32 of one name, as it was found, or several [R, D]."""
        found = direction_of(name)
        if found is not None and found.draw:
            return pkgutil.resolve_name(found.draw)(key, name, self._d_model)
        if found is not None and found.make:
            place = (name, c.source, c.layer)
            if place not in self._made:
                self._made[place] = self._make(c, name, found.make)
            return self._made[place]
        return self._readings.vector(c.source, name, c.window).at(c.layer)

    def _make(self, c: Condition, name: str, make: str) -> np.ndarray:
        def read() -> Sections:
            if self._readings.sections is None:
                raise ValueError(f"steering.kinds={c.kind!r}: nothing was read of which {name!r} could be made")
            return self._readings.sections(c.source)

        try:
            found = pkgutil.resolve_name(make)(Place(c.layer, self._d_model, read), *arguments_of(name))
        except ValueError as error:
            raise ValueError(f"steering.kinds={c.kind!r}, at layer {c.layer}: {error}") from error
        return np.asarray(found, np.float32)


def token_set(names: Sequence[str], texts: Sequence[str]) -> list[int]:
    """Ids whose text is one of the names, whatever its case and the white space around it, or belongs to a `GATES` set.

    Raises:
      ValueError: a name is no token's text.
    """
    tests: dict[str, Callable[[str], bool]] = {
        "sentence-ends": lambda text: text.rstrip().endswith((".", "!", "?")),
        "paragraph-breaks": lambda text: "\n\n" in text,
    }
    found: set[int] = set()
    for name in names:
        test = tests.get(name, lambda text, name=name: text.strip().casefold() == name.casefold())
        ids = [i for i, text in enumerate(texts) if test(text)]
        if not ids:
            raise ValueError(f"no token of the vocabulary is {name!r}, by which an entry of steering.kinds is gated")
        found.update(ids)
    return sorted(found)


def random_direction(key: jax.Array, name: str, d_model: int) -> np.ndarray:
    """A unit vector [D] float32, drawn from a row's key and a name.

    Every reply has one of its own, so that an interval over problems is one over directions too.
    """
    seed = [*np.asarray(jax.random.key_data(key)).tolist(), zlib.crc32(name.encode())]
    e = np.random.default_rng(seed).standard_normal(d_model)
    return (e / np.linalg.norm(e)).astype(np.float32)


def needed_vectors(experiment: Experiment) -> set[str]:
    """Names of the vectors that the sweep takes from stage 3."""
    raw = {experiment.vectors.label} if experiment.steering.unit == "raw" else set()
    found = {name: direction_of(name) for name in names(experiment)}
    read = {name for name, d in found.items() if d is not None and not (d.draw or d.make)}
    return needed_labels(experiment) | raw | read


def needed_labels(experiment: Experiment) -> set[str]:
    """Labels whose vectors the sweeps need."""
    s = experiment.steering
    swept = {experiment.vectors.label} if s.offsets or s.layers else set()
    return swept | {label for name in names(experiment) for label in labels_of(name)}
