"""The directions of `kinds.DIRECTIONS` that are made of what stage 3 read: one function each.

    fixed(n)       a random direction, the same in every reply; n is its seed. Noise that is frozen for a run.
    own(label)     the label's vector without its projection on the span of the other labels' vectors
    ordered(label) the same, without those before it alone: the experiment's label first, then the others as in names
    symmetric(label)  the label's vector after symmetric orthogonalisation of all (Loewdin)
    pc(n)          n-th principal component of window activations of the experiment's label, counted from 1
    difference(n)  n-th singular vector of the problems' own differences of means, counted from 1
    labels(r)      span of the first r labels' vectors, in the order of `ordered`
    pcs(k)         span of the first k principal components of the window activations of all sections
    last-pcs(k)    span of the last k of them
    covariance     all of them, each as long as its standard deviation
    subspace(k, n) a random subspace of k dimensions, the same in every reply; n is its seed

A window activation is a section's mean over the experiment's window, at a layer of `vectors.layers`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from backtrack_jax import subspaces
from backtrack_jax.extract import WindowSums
from backtrack_jax.vectors import SteeringVector


@dataclasses.dataclass(frozen=True)
class Sections:
    """What stage 3 read of one model, as far as directions are made of it.

    Attributes:
      label: the experiment's.
      contrast: group of D of its vector.
      vectors: label -> vector, of every label that was read.
      sums: window sums.
      problems: id of the problem of each of `sums.trace_ids`.
    """

    label: str
    contrast: str
    vectors: Mapping[str, SteeringVector]
    sums: WindowSums
    problems: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a direction is to be made.

    Attributes:
      layer: block, 0-based.
      d_model: D.
      read: gives what was read of the model that it comes from.
    """

    layer: int
    d_model: int
    read: Callable[[], Sections]


def fixed(at: Place, seed: str) -> np.ndarray:
    """[D] of norm 1."""
    return subspaces.random_subspace(np.random.default_rng([int(seed), 1]), 1, at.d_model)[0]


def fixed_subspace(at: Place, rank: str, seed: str) -> np.ndarray:
    """[rank, D] orthonormal."""
    _check_rank(int(rank), at.d_model)
    return subspaces.random_subspace(np.random.default_rng([int(seed), 2]), int(rank), at.d_model)


def own(at: Place, label: str) -> np.ndarray:
    """[D]."""
    names, vectors = label_vectors(at.read(), at.layer)
    return subspaces.own(vectors, _index(label, names))


def ordered(at: Place, label: str) -> np.ndarray:
    """[D] of norm 1."""
    names, vectors = label_vectors(at.read(), at.layer)
    number = _index(label, names)
    return subspaces.ordered(vectors[: number + 1])[number]


def symmetric(at: Place, label: str) -> np.ndarray:
    """[D] of norm 1."""
    names, vectors = label_vectors(at.read(), at.layer)
    return subspaces.symmetric(vectors)[_index(label, names)]


def labels(at: Place, rank: str) -> np.ndarray:
    """[rank, D] orthonormal."""
    vectors = label_vectors(at.read(), at.layer)[1]
    if not 1 <= int(rank) <= len(vectors):
        raise ValueError(f"labels({rank}): expected 1 to {len(vectors)}, the labels that were read")
    return subspaces.ordered(vectors[: int(rank)])


def principal(at: Place, number: str) -> np.ndarray:
    """[D] of norm 1."""
    read = at.read()
    return _one(subspaces.principal_components(activations(read, read.label, at.layer))[0], "pc", number)


def difference(at: Place, number: str) -> np.ndarray:
    """[D] of norm 1."""
    return _one(subspaces.principal_components(problem_differences(at.read(), at.layer))[0], "difference", number)


def principal_components(at: Place, rank: str) -> np.ndarray:
    """[rank, D] orthonormal."""
    found = subspaces.principal_components(activations(at.read(), "all", at.layer))[0]
    _check_rank(int(rank), len(found))
    return found[: int(rank)]


def last_components(at: Place, rank: str) -> np.ndarray:
    """[rank, D] orthonormal."""
    found = subspaces.principal_components(activations(at.read(), "all", at.layer))[0]
    _check_rank(int(rank), len(found))
    return found[-int(rank) :]


def covariance(at: Place) -> np.ndarray:
    """[R, D], each as long as its standard deviation."""
    found, variances = subspaces.principal_components(activations(at.read(), "all", at.layer))
    return found * np.sqrt(variances)[:, None]


def label_vectors(read: Sections, layer: int) -> tuple[list[str], np.ndarray]:
    """Labels, the experiment's first and the others as in names, and their vectors [n, D] as they were found."""
    names = [read.label, *sorted(set(read.vectors) - {read.label})]
    return names, np.stack([read.vectors[name].at(layer).astype(np.float64) for name in names])


def activations(read: Sections, group: str, layer: int) -> np.ndarray:
    """[S, D] float64, the window activations of a group's sections.

    Raises:
      ValueError: they were not kept at the layer.
    """
    kept = read.sums.plan.layers
    if layer not in kept:
        raise ValueError(f"layer {layer} is not one of vectors.layers={kept}, where the means of sections are kept")
    members = read.sums.members(group)
    return read.sums.section_means[members, kept.index(layer)].astype(np.float64)


def problem_differences(read: Sections, layer: int) -> np.ndarray:
    """[P, D] float64, each problem's mean over its traces of D+ less D, where it has both."""
    activations(read, read.label, layer)  # refuses a layer that was not kept
    ids = read.sums.trace_ids
    groups = (read.label, read.contrast)
    positive, contrast = (read.sums.means_by_trace(ids, group, layer).astype(np.float64) for group in groups)
    differences = positive - contrast
    of_problem: dict[str, list[np.ndarray]] = {}
    for problem, difference in zip(read.problems, differences, strict=True):
        if np.isfinite(difference).all():
            of_problem.setdefault(problem, []).append(difference)
    if len(of_problem) < 2:
        raise ValueError(f"{len(of_problem)} problems have windows of D+ and D, expected at least 2")
    return np.stack([np.mean(found, axis=0) for found in of_problem.values()])


def _index(label: str, names: Sequence[str]) -> int:
    if label not in names:
        raise ValueError(f"no vector of {label!r} was read; available: {', '.join(names)}")
    return names.index(label)


def _one(found: np.ndarray, name: str, number: str) -> np.ndarray:
    if not 1 <= int(number) <= len(found):
        raise ValueError(f"{name}({number}): expected 1 to {len(found)}")
    return found[int(number) - 1]


def _check_rank(rank: int, most: int) -> None:
    if not 1 <= rank <= most:
        raise ValueError(f"{rank} dimensions, expected 1 to {most}")
