"""Vectors of sections whose labels were shuffled within their traces: the null of what a label's vector shows.

In each trace as many sections as have the label are drawn from all its sections, so that a drawn vector has in common
with the label's what sets such traces apart, how many sections it rests on, and the noise that models have in common on
one text; only which sections of a trace are D+ is left to chance.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from backtrack_jax.analysis.base import Material
from backtrack_jax.extract import WindowSums

N_DRAWS = 200


@dataclasses.dataclass(frozen=True)
class Shuffles:
    """Sections drawn in the place of those with a label, the same ones for every model.

    Attributes:
      rows: role -> [S] int, where the sections that may be drawn stand in the model's window sums. They are those whose
        first window every model has read, in traces of which all models read the same sections.
      traces: [S] int, which trace each of them is of, ascending.
      drawn: [R, S] bool, which of them are D+ in each draw.
    """

    rows: Mapping[str, np.ndarray]
    traces: np.ndarray
    drawn: np.ndarray


def shuffle(
    sums: Mapping[str, WindowSums], trace_ids: Sequence[str], label: str, *, n_draws: int = N_DRAWS, seed: int = 0
) -> Shuffles:
    """Draws sections in each trace, as many as have the label.

    Args:
      sums: role -> window sums.
      trace_ids: traces, which `Shuffles.traces` counts; all of them summed.
      label: of D+.
      n_draws: number of draws.
      seed: of the draws.
    """
    of_trace = {role: _sections_by_trace(found) for role, found in sums.items()}
    read = {role: found.members("all") for role, found in sums.items()}
    rows: dict[str, list[np.ndarray]] = {role: [np.zeros(0, np.int64)] for role in sums}
    traces = [np.zeros(0, np.int64)]
    for number, trace_id in enumerate(trace_ids):
        places = {role: of_trace[role].get(trace_id, np.zeros(0, np.int64)) for role in sums}
        labels = [sums[role].section_labels[places[role]].tolist() for role in sums]
        if any(other != labels[0] for other in labels):  # a model is shown no token of one of them
            continue
        kept = np.all([read[role][places[role]] for role in sums], axis=0)
        traces.append(np.full(int(kept.sum()), number))
        for role in sums:
            rows[role].append(places[role][kept])
    of_section = np.concatenate(traces)
    joined = {role: np.concatenate(found) for role, found in rows.items()}
    role = next(iter(sums))
    own = sums[role].section_labels[joined[role]] == sums[role].plan.labels.index(label)
    return Shuffles(joined, of_section, _draw(of_section, own, n_draws, seed))


@dataclasses.dataclass(frozen=True)
class ShuffledSums:
    """Differences of means of every draw, as sums over G groups of traces.

    Attributes:
      positive: [G, R, D] float32, sums over traces of their weighted means of the sections drawn.
      contrast: [G, R, D] likewise of D; [G, 1, D] where it is the same in every draw.
      n_positive: [G], sums of the weights.
      n_contrast: [G], likewise.
    """

    positive: np.ndarray
    contrast: np.ndarray
    n_positive: np.ndarray
    n_contrast: np.ndarray

    def vectors(self, groups: np.ndarray) -> np.ndarray:
        """The vectors of some groups ([G] bool) together, [R, D]; NaN where these have no window of D+ or D."""
        parts = ((self.positive, self.n_positive), (self.contrast, self.n_contrast))
        sums = [(x[groups].sum(0), n[groups].sum()) for x, n in parts]
        positive, contrast = (x / n if n else np.full_like(x, np.nan) for x, n in sums)
        return positive - contrast


def shuffled_sums(
    shuffles: Shuffles,
    material: Material,
    role: str,
    trace_ids: Sequence[str],
    label: str,
    layer: int,
    group: np.ndarray,
) -> ShuffledSums:
    """What the run's vector of a label would be, had the draws its label.

    Args:
      shuffles: of the label in these traces.
      material: with the window sums.
      role: of the model that read them.
      trace_ids: the traces.
      label: of D+.
      layer: one of `vectors.layers`.
      group: [n] int, group of each trace, from 0 up.
    """
    sums, estimator = material.sums[role], material.experiment.vectors.estimator
    n_groups = int(group.max()) + 1
    states = sums.section_means[shuffles.rows[role], sums.plan.layers.index(layer)]

    def summed(taken: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        in_trace = np.bincount(shuffles.traces, taken[0], len(group))  # as many in each draw
        count = in_trace if estimator == "token_mean" else np.minimum(in_trace, 1)
        share = np.divide(count, in_trace, out=np.zeros(len(group)), where=in_trace > 0)[shuffles.traces]
        weights, of_section = (taken * share).astype(np.float32), group[shuffles.traces]
        totals = [weights[:, of_section == g] @ states[of_section == g] for g in range(n_groups)]
        return np.stack(totals), np.bincount(group, count, n_groups)

    positive, n_positive = summed(shuffles.drawn)
    if material.contrast_of(label) == "rest":
        contrast, n_contrast = summed(~shuffles.drawn)
    else:
        _, means, (_, counts) = material.means_by_trace(role, trace_ids, label, layer)
        contrast = np.zeros((n_groups, 1, means.shape[-1]))
        np.add.at(contrast[:, 0], group, np.where(counts[:, None] > 0, counts[:, None] * means.astype(np.float64), 0))
        n_contrast = np.bincount(group, counts, n_groups)
    return ShuffledSums(positive, contrast, n_positive, n_contrast)


def _sections_by_trace(sums: WindowSums) -> dict[str, np.ndarray]:
    """Id of a trace -> where its sections stand."""
    names, first = np.unique(sums.section_traces, return_index=True)
    places = np.split(np.arange(len(sums.section_traces)), first[1:])
    return {sums.trace_ids[name]: of_trace for name, of_trace in zip(names, places, strict=False)}


def _draw(traces: np.ndarray, own: np.ndarray, n_draws: int, seed: int) -> np.ndarray:
    """[R, S] bool: in each trace as many sections as are marked, at random; `traces` ascends."""
    rng = np.random.default_rng(seed)
    names, start, at, n = np.unique(traces, return_index=True, return_inverse=True, return_counts=True)
    wanted = np.bincount(at, own, len(names))
    rank = np.arange(len(traces)) - np.repeat(start, n)
    taken = rank < wanted[at]  # of each trace's sections in random order, the first
    drawn = np.zeros((n_draws, len(traces)), bool)
    for draw in drawn:
        draw[np.argsort(traces + rng.random(len(traces)), kind="stable")[taken]] = True
    return drawn
