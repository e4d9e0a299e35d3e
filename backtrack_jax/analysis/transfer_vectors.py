"""Vectors of another family's base model, mapped into the model that writes the traces, beside own ones and controls.

All of them, and all maps, are read from the problems that no effect is measured on.
"""

import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from backtrack_jax import extract
from backtrack_jax.analysis import by_problem, paired_states, reliability, shuffles, transfer_maps
from backtrack_jax.analysis.base import Material
from backtrack_jax.analysis.by_problem import ProblemSums
from backtrack_jax.analysis.statistics import NAN, percentiles
from backtrack_jax.config import Experiment
from backtrack_jax.data.records import Trace
from backtrack_jax.files import store
from backtrack_jax.files.console import Progress
from backtrack_jax.files.tables import Table
from backtrack_jax.models import checkpoint
from backtrack_jax.models.config import ModelConfig
from backtrack_jax.models.prompts import PromptFormat
from backtrack_jax.readers import Reader

OWN, BASE, HALF = "own", "own, base-derived", "own, half of the problems"
RIDGE, PLAIN, ORTHOGONAL, ANCHORS, IDENTITY = "ridge", "ridge, problems alone", "orthogonal", "anchors", "identity"
SHUFFLED_PAIRS, SHUFFLED_LABELS, RANDOM = "shuffled pairs", "shuffled labels", "random"

MAPS = (RIDGE, PLAIN, ORTHOGONAL, ANCHORS, IDENTITY)
"""Directions that come from the other model."""

N_GROUPS = 20
"""Groups of problems that the jackknife leaves out in turn, with everything fitted anew."""

N_DRAWS = 200
"""Draws of each control."""

_OTHER = "other"


@dataclasses.dataclass(frozen=True)
class Directions:
    """What is added to the model that writes the traces.

    Attributes:
      of: name -> [R, D] float64, draws of a control, one row of all else; of any length.
      lines: a line for each, see the page on transfer.
    """

    of: dict[str, np.ndarray]
    lines: Table

    @property
    def best(self) -> str:
        """The map whose vector has the highest cosine with the own one, on the problems that it was fitted on.

        Of maps that differ by rounding alone it is the simplest.
        """
        cosines = {line["direction"]: round(line["cosine"], 5) for line in self.lines if line["direction"] in MAPS}
        return max(reversed(MAPS), key=lambda name: cosines.get(name, -math.inf))


def other_config(e: Experiment) -> ModelConfig:
    """Architecture of the other model, which is fetched if it is not here.

    Raises:
      FileNotFoundError, ValueError: it is not there, cannot be read, or has no such block.
    """
    model = e.questions.transfer.model
    path = checkpoint.resolve(model.path, model.revision or None)
    checkpoint.check(path)
    config = checkpoint.read_config(path)
    if e.questions.transfer.layer >= config.n_layers:
        raise ValueError(
            f"questions.transfer.layer={e.questions.transfer.layer} is not a block of {model.path}: it has blocks "
            f"0..{config.n_layers - 1}"
        )
    return config


def other_reader(e: Experiment) -> Reader:
    """How the other model reads texts.

    Raises:
      FileNotFoundError, ValueError: names the field, and what is wrong with its tokenizer.
    """
    q = e.questions.transfer
    system = e.prompt.system or None
    prompt = PromptFormat(q.prompt, e.prompt.think, None if q.prompt == "plain" else system)
    try:
        reader = Reader.load(q.model, prompt, q.tokenizer)
    except (FileNotFoundError, ValueError) as error:
        field = "tokenizer" if q.tokenizer else "model.path"
        value = q.tokenizer or q.model.path
        raise type(error)(f"questions.transfer.{field}={value!r}, prompt={q.prompt!r}: {error}") from error
    return reader


def layer_at_depth(layer: int, n_layers: int, n_other: int) -> int:
    """The block of a model of other depth that has the same share of blocks up to its end, nearest."""
    return min(n_other - 1, max(0, round((layer + 1) * n_other / n_layers) - 1))


def split(material: Material) -> tuple[list[str], list[str]]:
    """Problems for vectors and maps, and problems for effects, drawn at random from those with annotated traces.

    Raises:
      ValueError: there are too few of them.
    """
    e = material.experiment
    problems = sorted({trace.problem_id for trace, _ in material.pairs})
    n = round(e.questions.transfer.held_out * len(problems))
    if n < 1 or len(problems) - n < 4:
        raise ValueError(
            f"questions.transfer.held_out={e.questions.transfer.held_out:.3g} of {len(problems)} problems leaves "
            f"{len(problems) - n} for vectors and maps and {n} for effects; expected at least 4 and 1"
        )
    drawn = np.random.default_rng(e.seed).permutation(len(problems))
    held_out = {problems[i] for i in drawn[:n]}
    return [name for name in problems if name not in held_out], sorted(held_out)


def magnitude(e: Experiment) -> float:
    """The magnitude of the setting, or the smallest positive one of the sweep."""
    return e.questions.transfer.magnitude or min(m for m in e.steering.magnitudes if m > 0)


def length(material: Material, role: str) -> float:
    """Norm of what is added, in the scale of the residual stream."""
    e = material.experiment
    return material.length(role, e.steering.main_layer, magnitude(e))


def directions(material: Material, role: str, files: tuple[Path, Path, Path]) -> Directions:
    """Reads both models, fits the maps, and compares what they make of the other model's vector with the own one.

    Args:
      material: what there is to read; the other model is held first, then that of the role.
      role: of the model that vectors are mapped into.
      files: for unfinished work: the other model's window sums, its states, and the role's states.

    Raises:
      ValueError: too few problems, no pair of tokens, or no window of the label in what the other model reads.
    """
    e, q = material.experiment, material.experiment.questions.transfer
    fitted, _ = split(material)
    chosen = set(fitted)
    pairs = [(trace, annotation) for trace, annotation in material.pairs if trace.problem_id in chosen]
    fit = dataclasses.replace(material, traces=[trace for trace, _ in pairs], annotations=[a for _, a in pairs])
    reader, config = other_reader(e), other_config(e)
    _, n_layers, _, _, width = material.sums[role].sums.shape
    layer = layer_at_depth(e.steering.main_layer, n_layers, config.n_layers) if q.layer < 0 else q.layer

    readers = (reader, material.reader(role))
    plain = PromptFormat("plain")
    asked = {trace.problem_id: trace.problem for trace, _ in pairs}
    problems = [Trace(name, name, "", "", text) for name, text in asked.items()]
    both = (
        paired_states.pair(fit.traces, readers, q.positions),
        paired_states.pair(
            problems,
            (dataclasses.replace(readers[0], prompt=plain), dataclasses.replace(readers[1], prompt=plain)),
            q.positions,
        ),
    )
    sums = _other_sums(fit, role, reader, layer, files[0])
    fit = dataclasses.replace(fit, sums={**material.sums, _OTHER: sums})
    x, x_plain = _states(
        files[1], lambda: material.load(q.model, "the other base model"), "the other model", both, 0, layer, e
    )
    main_layer = e.steering.main_layer
    y, y_plain = _states(files[2], lambda: material.model(role), f"the {role} model", both, 1, main_layer, e)
    return _directions(fit, role, layer, width, ((x, y, both[0].problems), (x_plain, y_plain, both[1].problems)))


def _other_sums(fit: Material, role: str, reader: Reader, layer: int, file: Path) -> extract.WindowSums:
    """Window sums of the other model over the traces, at one block, saved on the way."""
    e, q = fit.experiment, fit.experiment.questions.transfer
    plan = fit.sums[role].plan
    plan = dataclasses.replace(plan, windows=plan.windows[:1], layers=(layer,))
    sums = extract.load_sums(file, plan) if file.exists() else None
    seen = len(sums.trace_ids) if sums else 0
    if sums and seen == len(fit.traces):
        return sums
    traces = [
        reader.token_trace(dataclasses.replace(trace, token_ids=None), annotation) for trace, annotation in fit.pairs
    ]
    counted = [extract.count_windows(trace, plan, len(trace.ids))[0] for trace in traces]
    at = plan.labels.index(e.vectors.label)
    if not any(reads[at].any() for reads in counted):
        raise ValueError(
            f"no window {e.vectors.window} of {e.vectors.label!r} lies inside a text as {q.model.path} reads it; "
            "choose another vectors.window, or vectors.into_prompt=True"
        )
    model = fit.load(q.model, "the other base model")
    sums = sums or extract.WindowSums.zeros(plan, model.config.n_layers, model.config.d_model)
    tokens = {trace.id: len(trace.ids) for trace in traces}
    saver = store.Saver(lambda: extract.save_sums(sums, file))
    with Progress("  reading the other model", len(traces), seen) as progress:
        for new in extract.add_traces(sums, model, traces, batch_size=e.vectors.batch_size):
            saver.turn()
            progress.update(len(new), sum(tokens[i] for i in new))
    saver.end()
    return sums


def _states(
    file: Path, model: Any, what: str, both: Iterable[paired_states.Pairs], number: int, layer: int, e: Experiment
) -> list[np.ndarray]:
    """States of one model at all pairs, read or taken from what an earlier run has left."""
    if not file.exists():
        title, size = f"  states of {what}", e.analysis.batch_size
        found = [paired_states.read_states(model(), title, pairs, number, layer, batch_size=size) for pairs in both]
        paired_states.save_states(file, found)
    return paired_states.load_states(file)


_Pairs = tuple[np.ndarray, np.ndarray, np.ndarray]
"""States of the other model [n, D], of the own one [n, E], and the problem of each [n]."""


def _directions(fit: Material, role: str, layer: int, width: int, both: tuple[_Pairs, _Pairs]) -> Directions:
    """From the states and window sums of the problems that are fitted."""
    e, q = fit.experiment, fit.experiment.questions.transfer
    label, main_layer = e.vectors.label, e.steering.main_layer
    own, other = by_problem.of_label(fit, role, label, main_layer), by_problem.of_label(fit, _OTHER, label, layer)
    if (n := min(own.n_problems, other.n_problems)) < 2:
        raise ValueError(
            f"{n} of the problems that vectors are read from have a window of {label!r} for both models; expected at "
            "least 2: more problems, a smaller questions.transfer.held_out, or vectors.into_prompt=True"
        )
    (x, y, problems), _ = both
    strengths = [transfer_maps.choose_strength(*pairs, e.analysis.folds) for pairs in both]
    names = sorted({trace.problem_id for trace in fit.traces})
    group = np.random.default_rng(e.seed).permutation(len(names)) % min(N_GROUPS, len(names))
    group_of = dict(zip(names, group.tolist(), strict=True))

    def mapped(left_out: int | None) -> dict[str, np.ndarray]:
        """The other model's vector through every map, and the own one, without a group of problems."""
        v = _vector(other, group != left_out)
        (a, b, _), (a_plain, b_plain, _) = (
            _without(pairs, [name for name in names if group_of[name] == left_out]) for pairs in both
        )
        found = {
            OWN: _vector(own, group != left_out),
            RIDGE: v @ transfer_maps.ridge(a, b, strengths[0].value),
            PLAIN: v @ transfer_maps.ridge(a_plain, b_plain, strengths[1].value),
            ORTHOGONAL: v @ transfer_maps.orthogonal(a, b, q.rank),
            ANCHORS: v @ transfer_maps.anchors(a, b, q.anchors, q.rank),
        }
        return found | ({IDENTITY: v} if len(v) == width else {})

    of_all = mapped(None)
    without = [mapped(left_out) for left_out in range(int(group.max()) + 1)]
    found = {name: vector[None] for name, vector in of_all.items()}
    lines: Table = [_line(OWN, 1.0, (NAN, NAN)) | {"problems": own.n_problems}]

    if e.author != "base" and "base" in e.roles:
        base = by_problem.of_label(fit, "base", label, main_layer)
        cosines = by_problem.cosine(base, own)
        n = min(base.n_problems, own.n_problems)
        ends = by_problem.cosine_interval(float(cosines[0]), by_problem.standard_error(cosines), n)
        found[BASE] = base.vectors()[:1]
        lines.append(_line(BASE, float(cosines[0]), ends) | {"problems": n})

    ids = [trace.id for trace in fit.traces]
    means = fit.means_by_trace(role, ids, label, main_layer)
    of_traces = [trace.problem_id for trace in fit.traces]
    halves = reliability.split_half(*means[:2], of_traces, weights=means[2], seed=e.seed)
    found[HALF] = _vector(own, _half(own, e.seed))[None]
    lines.append(_line(HALF, halves.cosine, (halves.low, halves.high)) | {"problems": own.n_problems // 2})

    for name in (name for name in MAPS if name in found):
        cosines = np.array([_cosine(vectors[name], vectors[OWN]) for vectors in (of_all, *without)])
        ends = by_problem.cosine_interval(float(cosines[0]), by_problem.standard_error(cosines), len(without))
        line = _line(name, float(cosines[0]), ends) | {"problems": other.n_problems}
        if name != IDENTITY:
            line["positions"] = len(both[1 if name == PLAIN else 0][0])
        if name in (RIDGE, PLAIN):
            line |= {"strength": strengths[name == PLAIN].value, "r2": strengths[name == PLAIN].r2}
        lines.append(line)

    v = _vector(other, np.ones(len(names), bool))
    strength = strengths[0].value
    # Of the other model's sections alone: those of a role hold the sections of a control a second time.
    drawn = shuffles.shuffle({_OTHER: fit.sums[_OTHER]}, ids, label, n_draws=N_DRAWS, seed=e.seed)
    together = np.zeros(len(ids), int)
    of_labels = shuffles.shuffled_sums(drawn, fit, _OTHER, ids, label, layer, together).vectors(np.array([True]))
    rng = np.random.default_rng(e.seed)
    controls = {
        SHUFFLED_PAIRS: transfer_maps.shuffled_pairs(x, y, strength, v, n_draws=N_DRAWS, seed=e.seed),
        SHUFFLED_LABELS: of_labels.astype(np.float64) @ transfer_maps.ridge(x, y, strength),
        RANDOM: rng.standard_normal((N_DRAWS, width)),
    }
    for name, of_draws in controls.items():
        cosines = np.array([_cosine(vector, of_all[OWN]) for vector in of_draws])
        line = _line(name, float(np.mean(cosines)), percentiles(cosines)) | {"draws": len(of_draws)}
        if name == SHUFFLED_PAIRS:
            order = np.random.default_rng(e.seed).permutation(len(y))
            again = transfer_maps.choose_strength(x, y[order], problems, e.analysis.folds)
            line |= {"strength": strength, "r2": again.r2, "positions": len(x)}
        lines.append(line)
    return Directions(found | controls, [{"role": role, "other_layer": layer} | line for line in lines])


def _line(name: str, cosine: float, ends: tuple[float, float]) -> dict[str, Any]:
    """A line of the table, without what only some directions have."""
    of_cosine = {"cosine": cosine, "cosine_low": ends[0], "cosine_high": ends[1]}
    return {"direction": name} | of_cosine | {"draws": 0, "strength": NAN, "r2": NAN, "positions": 0, "problems": 0}


def _vector(sums: ProblemSums, kept: np.ndarray) -> np.ndarray:
    """The vector of some of the problems, [P] bool; NaN where they have no window."""
    parts = ((sums.positive, sums.n_positive), (sums.contrast, sums.n_contrast))
    means = [x[kept].sum(0) / n[kept].sum() if n[kept].sum() else np.full(x.shape[1], np.nan) for x, n in parts]
    return means[0] - means[1]


def _half(sums: ProblemSums, seed: int) -> np.ndarray:
    """One half of the problems, [P] bool, and of those that have a window of D+."""
    kept, rng = np.zeros(len(sums.n_positive), bool), np.random.default_rng(seed)
    for members in (np.flatnonzero(sums.n_positive > 0), np.flatnonzero(sums.n_positive == 0)):
        kept[rng.permutation(members)[: -(-len(members) // 2)]] = True
    return kept


def _without(pairs: _Pairs, left_out: list[str]) -> _Pairs:
    """The pairs of other problems."""
    kept = ~np.isin(pairs[2], left_out)
    return pairs[0][kept], pairs[1][kept], pairs[2][kept]


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / norms) if norms > 0 else NAN
