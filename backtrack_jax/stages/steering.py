"""Stage 4: replies under every condition of the sweeps.

generations.jsonl   one line per steered reply, see `data.records.Reply`
{role}.lengths.csv  where `steering.unit` is `kl`: the length of every condition, and what it costs there
"""

import dataclasses
import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from backtrack_jax import conditions, directions, generate, inputs, kinds, vectors
from backtrack_jax.analysis import equal_divergence
from backtrack_jax.config import Experiment
from backtrack_jax.data import records
from backtrack_jax.files import store, tables
from backtrack_jax.files.console import say
from backtrack_jax.files.paths import shown
from backtrack_jax.stages import estimates
from backtrack_jax.stages.base import Context, Stage, spec_values
from backtrack_jax.stages.sampling import sample_rows
from backtrack_jax.stages.traces import TRACES
from backtrack_jax.stages.vectors import VECTORS

_GENERATIONS = "generations.jsonl"


class SteeringStage(Stage):
    """Samples every problem under every condition."""

    name = "4-steering"
    format = 4

    def inputs(self, e: Experiment) -> dict[str, Any]:
        """The sweeps, vector files by content, and the seed. The size of a batch is left out, as in stage 1."""
        layers = e.steering.kind_layers
        steering = spec_values(e.steering, "batch_size") | {"layer": layers[0] if len(layers) == 1 else layers}
        files = {file: inputs.vector_file_id(file) for file in e.steering.vector_files}
        wanted = [list(dataclasses.astuple(wanted)) for wanted in conditions.wanted_conditions(e)]
        extra = {"wanted": wanted} if wanted else {}
        return {"steering": steering, "vector_files": files, "seed": e.seed} | extra

    def model_roles(self, e: Experiment) -> Sequence[str]:
        """All."""
        return e.roles

    def prepare(self, context: Context) -> None:
        """Problems that are not steered, where the unit needs their texts."""
        e = context.experiment
        there, asked = len(estimates.problem_texts(e)), estimates.asked_problems(e)
        if e.steering.unit == "kl" and asked == there:
            raise ValueError(
                f"steering.limit={e.steering.limit} steers all {there} problems, expected fewer for "
                "steering.unit='kl': lengths are found on the traces of the others"
            )

    def plan(self, context: Context) -> list[str]:
        """Conditions, rows and memory."""
        e, spec = context.experiment, context.experiment.steering
        problems, cells = estimates.asked_problems(e), len(conditions.planned(e))
        lines = [f"{cells} conditions, {problems} problems at most, {spec.samples} sample(s) each"]
        prompt = estimates.longest_prompt(e)
        if spec.unit == "kl":
            texts = min(equal_divergence.TEXTS, len(estimates.problem_texts(e)) - problems)
            lines.append(f"lengths found on {texts} traces of other problems, about ten passes for every condition")
        for role, rows in estimates.steered_rows(e).items():
            lines += estimates.sampling(e, role, rows, prompt, spec.max_new_tokens, spec.batch_size)
        return lines

    def run(self, context: Context, folder: Path) -> None:
        """Model by model, so that one is held at a time."""
        e = context.experiment
        partials = {role: folder / f"{role}.replies.jsonl" for role in e.roles}
        if not (folder / _GENERATIONS).exists():
            readings = load_readings(context)
            traces = TRACES.read(context.folder(TRACES))
            asked = inputs.spread(list({trace.problem_id: trace for trace in traces}.values()), e.steering.limit)
            replies = [
                reply for role in e.roles for reply in _steer_model(context, role, partials[role], readings, asked)
            ]
            text = "".join(json.dumps(reply.line(), ensure_ascii=False) + "\n" for reply in replies)
            store.write_text(folder / _GENERATIONS, text)
        for partial in partials.values():
            partial.unlink(missing_ok=True)

    def read(self, folder: Path) -> list[records.Reply]:
        """The steered replies in its folder."""
        return [records.Reply.from_line(line) for line in store.read_lines(folder / _GENERATIONS)]


STEERING = SteeringStage()


def _say_what_is_long(target: str, planned: Sequence[records.Condition], readings: conditions.Readings) -> None:
    """Reports the largest addition if it exceeds the residual stream's norm: replies will hardly be sentences."""
    norm = readings.mean_norm[target]
    added = (c for c in planned if kinds.parse(c.kind).what.strength == "length" and abs(c.length) > norm[c.layer])
    if longest := max(added, key=lambda c: abs(c.length), default=None):
        share = abs(longest.length) / norm[longest.layer]
        say(f"  magnitude {longest.magnitude:g} adds {share:.3g} times the mean residual norm; see steering.unit")


def _steer_model(
    context: Context, target: str, partial: Path, readings: conditions.Readings, asked: Sequence[records.Trace]
) -> list[records.Reply]:
    """Replies of one model under all its conditions."""
    e, spec = context.experiment, context.experiment.steering
    config = context.architecture(target)
    texts = context.token_texts
    built = conditions.Interventions(readings, config.n_layers, config.d_model, spec.span, texts)
    made = {condition: limit for condition, limit in conditions.make(e, readings).items() if condition.target == target}
    if spec.unit == "kl":
        file = partial.with_name(f"{target}.lengths.csv")
        lengths = _equal_lengths(context, target, file, list(made), readings, built, asked)
        made = {dataclasses.replace(condition, length=lengths[condition]): limit for condition, limit in made.items()}
    todo = [
        (condition, trace, sample)
        for condition, limit in made.items()
        for trace in inputs.spread(asked, limit)
        for sample in range(spec.samples)
    ]
    _say_what_is_long(target, [condition for condition, _, _ in todo], readings)
    rows = []
    for condition, trace, sample in todo:
        ids = context.prompt_ids(target, trace.problem)
        key = generate.row_key(e.seed, trace.problem_id, sample)
        name = f"problem {trace.problem_id!r}, sample {sample}, {condition.name}"
        rows.append(generate.Row(ids, key, built.row(condition, key), name))
    sampling = generate.Sampling(spec.temperature, spec.top_p, spec.top_k)
    replies = sample_rows(context, partial, target, rows, sampling, spec)
    return [
        records.Reply(
            problem_id=trace.problem_id,
            category=trace.category,
            problem=trace.problem,
            sample=sample,
            model=shown(e.model(target).path),
            condition=condition,
            unit=spec.unit,
            span=spec.span,
            vector_hash=built.vector_hash(condition, row.key),
            seed=e.seed,
            ids=tuple(reply["ids"]),
            text=reply["text"],
            finish_reason=reply["finish_reason"],
            dtype=e.model(target).dtype,
        )
        for (condition, trace, sample), row, reply in zip(todo, rows, replies, strict=True)
    ]


def _equal_lengths(
    context: Context,
    target: str,
    file: Path,
    planned: Sequence[records.Condition],
    readings: conditions.Readings,
    built: conditions.Interventions,
    asked: Sequence[records.Trace],
) -> dict[records.Condition, float]:
    """Length of every condition of a model in the unit `kl`, from `file` if an earlier attempt got so far.

    On traces of problems that are not asked for, the first of each, as far as a reply may become long.
    """
    e = context.experiment
    searched = [c for c in planned if c.magnitude and kinds.parse(c.kind).what.strength == "length"]
    if searched and not file.exists():
        steered = {trace.problem_id for trace in asked}
        traces = {trace.problem_id: trace for trace in reversed(TRACES.read(context.folder(TRACES)))}
        others = [trace for problem, trace in reversed(traces.items()) if problem not in steered]
        others = inputs.spread(others, equal_divergence.TEXTS)
        keys = [generate.row_key(e.seed, trace.problem_id, 0) for trace in others]
        texts = []
        for trace in others:
            read = context.token_trace(target, trace, records.Annotation(trace.id, "", ()))
            texts.append((read.ids[: read.reply_start + e.steering.max_new_tokens], read.reply_start))
        say(f"  lengths of {len(searched)} conditions that cost the {target} model equally, on {len(texts)} traces")
        lengths, costs = equal_divergence.lengths(
            context.model(target),
            texts,
            lambda i, length, j: built.row(dataclasses.replace(searched[i], length=length), keys[j]),
            [abs(c.magnitude) for c in searched],
            [math.copysign(float(readings.mean_norm[target][c.layer]), c.magnitude) for c in searched],
            [c.name for c in searched],
            batch_size=e.steering.batch_size,
        )
        lines = [
            dataclasses.asdict(c) | {"length": float(length), "kl": float(cost)}
            for c, length, cost in zip(searched, lengths, costs, strict=True)
        ]
        tables.write(file, lines)
    found = [records.Condition.of(line) for line in tables.read(file)] if searched else []
    lengths_of = {(c.kind, c.source, c.layer, c.window, c.magnitude): c.length for c in found}
    return {c: lengths_of.get((c.kind, c.source, c.layer, c.window, c.magnitude), c.length) for c in planned}


def load_readings(context: Context) -> conditions.Readings:
    """The vectors and norms that stage 3 wrote.

    Raises:
      ValueError: a vector that the sweep needs was not written, or does not fit the models.
    """
    folder, e = context.folder(VECTORS), context.experiment
    summary = VECTORS.read_summary(folder)
    shapes = {role: (config.n_layers, config.d_model) for role in e.roles for config in [context.architecture(role)]}
    found = {}
    for role in e.roles:
        for kind in conditions.needed_vectors(e):
            found[role, kind] = vector = VECTORS.load(folder, role, kind)
            for target, shape in shapes.items():
                if vector.directions.shape != shape:
                    raise ValueError(
                        f"the {kind} vector of the {role} model has directions of shape {vector.directions.shape} "
                        f"(layers, width); the {target} model takes {shape}"
                    )
    norms = {role: np.array(summary[role]["mean_norm"]) for role in e.roles}
    for file, expected in context.inputs[SteeringStage.name]["vector_files"].items():
        if inputs.vector_file_id(file) != expected:
            raise ValueError(f"{file} has changed since this run began; run it again")
    files = inputs.vector_files(e, max(n_layers for n_layers, _ in shapes.values()))
    sections = functools.cache(functools.partial(_sections, context, folder))
    return conditions.Readings(found, norms, _offset_vectors(context, folder), files, sections)


def _sections(context: Context, folder: Path, role: str) -> directions.Sections:
    """All that stage 3 read of a model."""
    spec = context.experiment.vectors
    labels = VECTORS.read_summary(folder)["labels"]
    found = {label: VECTORS.load(folder, role, label) for label in labels if VECTORS.has(folder, role, label)}
    sums = VECTORS.read_sums(folder, role)
    problem_of = {trace.id: trace.problem_id for trace in TRACES.read(context.folder(TRACES))}
    problems = [problem_of[trace_id] for trace_id in sums.trace_ids]
    return directions.Sections(spec.label, spec.contrast, found, sums, problems)


def _offset_vectors(context: Context, folder: Path) -> dict[tuple[str, str], vectors.SteeringVector]:
    """Vectors of the offsets that are swept, out of the window sums of the model that they are added to."""
    e = context.experiment
    windows = [window for window in map(e.vectors.window_at, e.steering.offsets) if window != e.vectors.window]
    if not windows:
        return {}
    sums = VECTORS.read_sums(folder, e.author)
    return {
        (e.author, records.window_name(window)): vectors.difference_of_means(
            sums, e.vectors.label, window, contrast=e.vectors.contrast, estimator=e.vectors.estimator
        )
        for window in windows
    }
