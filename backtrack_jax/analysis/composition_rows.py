"""The rows of the question of composition: which directions, alone and in pairs, and what is removed while one acts."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from backtrack_jax import subspaces
from backtrack_jax.analysis import logit_lens, noise_forced, resumable
from backtrack_jax.analysis.base import Material
from backtrack_jax.analysis.forced import REASONING_TRACES, Forced, given_text, texts_of
from backtrack_jax.config import Experiment
from backtrack_jax.data.problems import spread
from backtrack_jax.data.records import UNSTEERED, Trace
from backtrack_jax.data.text import KEYWORDS, sentence_spans
from backtrack_jax.files.console import say
from backtrack_jax.files.tables import Table
from backtrack_jax.intervention import Intervention, ablate, add_vector, no_intervention

ALONE, ORDERED, SYMMETRIC, OWN, WITHOUT, NEGATIVE = (
    *("as it is", "Gram-Schmidt", "Loewdin", "own part", "without v"),
    "without v, negative",
)
"""What is taken of a direction: all; orthogonalised in order or symmetrically; less the span of the others, or v."""

WITHIN, OUTSIDE = "part within the others' span", "part outside of it"
"""What of v is added at the length that it has of v's."""

DIFFERENCE, COMPONENT, SINGULAR, RANDOM = "reasoning less base", "component", "difference of problems", "random"
"""Directions that are no labels'; `component` and `difference of problems` are numbered from 1."""

SPAN, NOTHING = "span of labels", "nothing"

APART = (OWN, WITHOUT, NEGATIVE)
"""Forms without a part along v."""

GRID = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Shares of the magnitude on either axis of the grid."""

_TOGETHER = 1e-2  # of a direction's norm: what is left of one that others make up is noise


@dataclasses.dataclass(frozen=True)
class Direction:
    """A direction that is added.

    Attributes:
      name: of what it is made of: a label, or one of those above.
      form: what is taken of it.
      vector: [D] float64, of norm 1.
      length: share of the magnitude's length at which it is added.
    """

    name: str
    form: str
    vector: np.ndarray
    length: float = 1.0


def magnitude(e: Experiment) -> float:
    """The magnitude of the setting, or the smallest positive one of the sweep."""
    return e.questions.composition.magnitude or min(m for m in e.steering.magnitudes if m > 0)


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


class Directions:
    """Directions at the steered layer, and rows that add or remove them.

    Attributes:
      v: [D], the vector's direction.
      labels: labels with a part of their own, that of the vector first: all but those that earlier ones make up.
      of: every direction that is added alone.
    """

    def __init__(self, material: Material, role: str):
        """Of the model of a role, from what stage 3 read."""
        self.material, self.role = material, role
        e = self.e = material.experiment
        self.layer, label = e.steering.main_layer, e.vectors.label
        units = {
            name: vector.unit(self.layer).astype(np.float64)
            for (of, name), vector in material.vectors.items()
            if of == role
        }
        self.v = units[label]
        self.n_layers, self.d_model = material.vectors[role, label].directions.shape
        self.length = material.length(role, self.layer, magnitude(e))
        sums = material.sums[role]
        at = sums.plan.layers.index(self.layer)
        self.states = sums.section_means[sums.members("all"), at].astype(np.float64)
        self.labels: list[str] = []
        for name in (label, *sorted(units.keys() - {label})):
            if np.linalg.norm(_left(units[name], [units[kept] for kept in self.labels])) > 0.05:
                self.labels.append(name)
        self.of = [Direction(label, ALONE, self.v)]
        self._add_labels(units)
        self._add_others(sums.section_means[sums.members(label), at].astype(np.float64))

    def _add_labels(self, units: Mapping[str, np.ndarray]) -> None:
        kept = np.stack([units[name] for name in self.labels])
        for name in units:
            if name != self.labels[0]:
                self.of.append(Direction(name, ALONE, units[name]))
        if len(kept) < 2:
            return
        forms = {ORDERED: subspaces.ordered(kept), SYMMETRIC: subspaces.symmetric(kept)}
        forms[OWN] = np.stack([_unit(subspaces.own(kept, n)) for n in range(len(kept))])
        for form, vectors in forms.items():
            first = 1 if form == ORDERED else 0  # the first of Gram-Schmidt's is v
            self.of += [Direction(self.labels[n], form, vectors[n]) for n in range(first, len(kept))]
        outside = subspaces.own(kept, 0)
        for form, part in ((WITHIN, self.v - outside), (OUTSIDE, outside)):
            if (norm := float(np.linalg.norm(part))) > _TOGETHER:
                self.of.append(Direction(self.labels[0], form, part / norm, norm))

    def _add_others(self, of_label: np.ndarray) -> None:
        """Directions that are no labels', each turned towards v, and what of it is not along v in either direction."""
        e, n, found = self.e, self.e.questions.composition.components, {}
        other = [self.material.vectors.get((role, e.vectors.label)) for role in e.roles if role != self.role]
        if other and other[0] is not None:
            difference = self.v - other[0].unit(self.layer).astype(np.float64)
            if np.linalg.norm(difference) > _TOGETHER:
                found[DIFFERENCE] = difference if self.role == "reasoning" else -difference
        finite = of_label[np.isfinite(of_label).all(axis=1)]
        if len(finite) > n:
            components, _ = subspaces.principal_components(finite)
            found |= {f"{COMPONENT} {i + 1}": vector for i, vector in enumerate(components[:n])}
        by_problem = self._differences()
        if len(by_problem) > n:
            components, _ = subspaces.principal_components(by_problem)
            found |= {f"{SINGULAR} {i + 1}": vector for i, vector in enumerate(components[:n])}
        for name, vector in found.items():
            unit = _unit(vector)
            if name != DIFFERENCE and unit @ self.v < 0:
                unit = -unit
            self.of.append(Direction(name, ALONE, unit))
            left = _left(unit, [self.v])
            if np.linalg.norm(left) > 0.05:
                self.of += [Direction(name, WITHOUT, _unit(left)), Direction(name, NEGATIVE, -_unit(left))]

    def _differences(self) -> np.ndarray:
        """Mean of D+ less mean of D of each problem that has both, [P, D]."""
        problems: dict[str, list[str]] = {}
        for trace, _ in self.material.pairs:
            problems.setdefault(trace.problem_id, []).append(trace.id)
        ids = [name for names in problems.values() for name in names]
        positive, contrast, _ = self.material.means_by_trace(self.role, ids, self.e.vectors.label, self.layer)
        difference = dict(zip(ids, np.asarray(positive, np.float64) - contrast, strict=True))
        rows = [np.stack([difference[name] for name in names]) for names in problems.values()]
        means = [row[finite].mean(0) for row in rows if (finite := np.isfinite(row).all(axis=1)).any()]
        return np.stack(means) if means else np.zeros((0, self.d_model))

    def added(self, *parts: tuple[np.ndarray, float]) -> Intervention:
        """A row that adds directions [D], each at a share of the magnitude's length."""
        total = np.sum([share * vector for vector, share in parts], axis=0)
        norm = float(np.linalg.norm(total))
        shape: dict[str, Any] = {"n_layers": self.n_layers, "span": self.e.steering.span}
        if norm < 1e-12:
            return no_intervention(self.n_layers, self.d_model, self.e.steering.span)
        return add_vector(jnp.asarray(total / norm, jnp.float32), self.layer, norm * self.length, **shape)

    def random(self, number: int) -> np.ndarray:
        """A direction [D] drawn at random, orthogonal to v."""
        rng = np.random.default_rng([self.e.seed, number, 7])
        return _unit(_left(rng.standard_normal(self.d_model), [self.v]))

    def without(self, basis: np.ndarray, added: float) -> Intervention:
        """A row that adds v at a share of its length, and removes a subspace [R, D] from all later layers."""
        later = range(self.layer + 1, self.n_layers)
        shape: dict[str, Any] = {"n_layers": self.n_layers, "span": self.e.steering.span}
        return self.added((self.v, added)) + ablate(jnp.asarray(basis, jnp.float32), later, **shape)

    def removed(self) -> dict[str, np.ndarray]:
        """Subspaces [R, D] that are removed: the own part of each label, and the spans of the first labels."""
        found = {d.name: d.vector[None] for d in self.of if d.form == OWN and d.name != self.labels[0]}
        basis = subspaces.ordered(np.stack([self._unit_of(name) for name in self.labels]))
        ranks = [rank for rank in self.e.questions.composition.ranks if rank <= len(basis)]
        return found | {f"{SPAN}, {rank}": basis[:rank] for rank in ranks}

    def _unit_of(self, name: str) -> np.ndarray:
        return next(d.vector for d in self.of if (d.name, d.form) == (name, ALONE))

    def random_subspaces(self, rank: int, like: np.ndarray) -> list[np.ndarray]:
        """Subspaces [rank, D] drawn at random that hold as much of the variance of windows as `like`; [] if none do."""
        components, variances = subspaces.principal_components(self.states)
        share = subspaces.energy(like, self.states[np.isfinite(self.states).all(axis=1)])
        found = []
        for draw in range(self.e.questions.composition.subspaces):
            rng = np.random.default_rng([self.e.seed, draw, rank, 11])
            try:
                found.append(subspaces.matched_subspace(rng, rank, components, variances, share))
            except ValueError as error:
                say(f"  no random subspaces beside the span of {rank} labels: {error}")
                return []
        return found


def _left(vector: np.ndarray, others: Sequence[np.ndarray]) -> np.ndarray:
    """A vector less its projection on the span of others."""
    if not len(others):
        return vector
    basis = np.linalg.qr(np.stack(others).T)[0]
    return vector - basis @ (basis.T @ vector)


def texts(found: Directions, limit: int) -> list[tuple[str, tuple[Any, int, list[int]]]]:
    """(problem, the first fields of `Forced`) of texts with a sentence that counts, at most so many (0: all)."""

    def read(trace: Trace) -> tuple[Any, int, list[int]]:
        return given_text(found.material, found.role, trace, sentence_spans(trace)[1:])

    given = [(trace.problem_id, read(trace)) for trace in texts_of(found.material)[REASONING_TRACES]]
    return spread([one for one in given if one[1][2]], limit)


def effects(found: Directions, partial: Path) -> Table:
    """Log-odds and share of keywords on each text with each direction added, random ones among them."""
    e, q = found.e, found.e.questions.composition
    of = [Direction(UNSTEERED, "", found.v, 0.0), *found.of]
    edits = [found.added((d.vector, d.length)) for d in of]
    lines: Table = []
    rows: list[Forced] = []
    for number, (problem, given) in enumerate(texts(found, e.analysis.forced_texts)):
        draw = Direction(RANDOM, ALONE, found.random(number % max(1, q.random)))
        for direction, edit in zip([*of, draw], [*edits, found.added((draw.vector, 1.0))], strict=True):
            lines.append({"direction": direction.name, "form": direction.form, "problem_id": problem})
            rows.append(Forced(*given, edit))
    return _measured(found, lines, rows, partial, "texts under directions of")


def grid(found: Directions, other: Direction, problems: Sequence[str], partial: Path) -> Table:
    """Log-odds and share of keywords on texts of some problems, under v and another direction at once.

    `a` is the share of v's length and `b` that of the other direction's; `pair` says which: the direction itself, at
    the points of the grid and along a diagonal of equal total length; v once more, in its place; and random directions.
    """
    q = found.e.questions.composition
    diagonal = [(math.cos(at), math.sin(at)) for at in np.arange(1, 4) * math.pi / 8]
    points = [("direction", a, b, other.vector) for a in GRID for b in GRID]
    points += [("equal length", a, b, other.vector) for a, b in diagonal]
    points += [("v itself", a, 1.0, found.v) for a in (0.0, 1.0)]
    for draw in range(q.random):
        points += [(f"{RANDOM} {draw}", a, 1.0, found.random(draw)) for a in (0.0, 1.0)]
    edits = [found.added((found.v, a), (vector, b)) for _, a, b, vector in points]
    lines: Table = []
    rows: list[Forced] = []
    for problem, given in texts(found, found.e.analysis.forced_texts):
        if problem in problems:
            for (pair, a, b, _), edit in zip(points, edits, strict=True):
                lines.append({"pair": pair, "a": a, "b": b, "problem_id": problem})
                rows.append(Forced(*given, edit))
    return _measured(found, lines, rows, partial, "texts under pairs of directions of")


def ablated(found: Directions, partial: Path) -> Table:
    """Log-odds and share of keywords on texts with subspaces removed, those drawn at random numbered, and v `added`.

    Without v as well, since removing a subspace changes predictions by itself.
    """
    removed: list[tuple[str, int, int, np.ndarray | None]] = [(NOTHING, 0, -1, None)]
    if found.layer + 1 < found.n_layers:
        for name, basis in found.removed().items():
            removed.append((name, len(basis), -1, basis))
            if name.startswith(SPAN):
                drawn = found.random_subspaces(len(basis), basis)
                removed += [(RANDOM, len(basis), draw, one) for draw, one in enumerate(drawn)]
    edits = [
        (name, rank, draw, added, found.added((found.v, added)) if basis is None else found.without(basis, added))
        for name, rank, draw, basis in removed
        for added in (0.0, 1.0)
    ]
    lines: Table = []
    rows: list[Forced] = []
    for problem, given in texts(found, found.e.questions.composition.ablated_texts):
        for name, rank, draw, added, edit in edits:
            lines.append({"removed": name, "rank": rank, "draw": draw, "added": added, "problem_id": problem})
            rows.append(Forced(*given, edit))
    return _measured(found, lines, rows, partial, "texts without subspaces of")


def _measured(found: Directions, lines: Table, rows: list[Forced], partial: Path, title: str) -> Table:
    """The lines with `log_odds` [nats] and `share`, the probability of a keyword, means over the sentence starts."""
    material, role = found.material, found.role
    read = resumable.lines(
        partial,
        f"  {title} the {role} model",
        [len(row.ids) for row in rows],
        lambda done: noise_forced.measure(
            material.model(role),
            rows,
            logit_lens.word_ids(material.tokenizer, KEYWORDS),
            np.zeros((found.n_layers, found.d_model), np.float32),
            layer=found.layer,
            window=(0, 0),
            batch_size=found.e.analysis.batch_size,
            done=done,
        ),
    )
    odds = [np.asarray(one["log_odds"]) for one in read]
    return [
        {"role": role} | line | {"log_odds": float(np.mean(of)), "share": float(np.mean(1 / (1 + np.exp(-of))))}
        for line, of in zip(lines, odds, strict=True)
    ]
