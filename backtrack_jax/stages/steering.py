"""Stage 4: replies under every condition of the sweeps."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from backtrack_jax import conditions, extract, generate, inputs, kinds, vectors
from backtrack_jax.data import records
from backtrack_jax.files import store
from backtrack_jax.files.console import say
from backtrack_jax.models import prompts
from backtrack_jax.stages.sampling import sample_rows

if TYPE_CHECKING:
    from backtrack_jax.pipeline import Run


def steer(run: "Run", folder: Path) -> None:
    """Stage 4: samples every problem under every condition."""
    e = run.experiment
    partials = {role: folder / f"{role}.replies.jsonl" for role in e.roles}
    if not (folder / "generations.jsonl").exists():
        readings = load_readings(run)
        traces = records.read_traces(run.folder("1-traces") / "traces.jsonl")
        asked = inputs.spread(list({trace.problem_id: trace for trace in traces}.values()), e.steering.limit)
        lines = [line for role in e.roles for line in _steer_model(run, role, partials[role], readings, asked)]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        store.write_text(folder / "generations.jsonl", text)
    for partial in partials.values():
        partial.unlink(missing_ok=True)


def _say_what_is_long(target: str, planned: Sequence[records.Condition], readings: conditions.Readings) -> None:
    """Names the longest that is added, if it is longer than the residual stream: replies will hardly be sentences."""
    norm = readings.mean_norm[target]
    added = [c for c in planned if not kinds.parse(c.kind).ablates]
    if longest := max((c for c in added if abs(c.length) > norm[c.layer]), key=lambda c: abs(c.length), default=None):
        share = abs(longest.length) / norm[longest.layer]
        say(f"  magnitude {longest.magnitude:g} adds {share:.3g} times the mean residual norm; see steering.unit")


def _steer_model(
    run: "Run", target: str, partial: Path, readings: conditions.Readings, asked: Sequence[records.Trace]
) -> list[dict[str, Any]]:
    """Replies of one model under all its conditions, as lines of generations.jsonl."""
    e, spec = run.experiment, run.experiment.steering
    config = run.architecture(target)
    built = conditions.Interventions(readings, config.n_layers, config.d_model, spec.span, e.seed)
    todo = [
        (condition, trace, sample)
        for condition, limit in conditions.make(e, readings).items()
        if condition.target == target
        for trace in inputs.spread(asked, limit)
        for sample in range(spec.samples)
    ]
    _say_what_is_long(target, [condition for condition, _, _ in todo], readings)
    rows = []
    for condition, trace, sample in todo:
        ids, _ = run.for_role(target, prompts.prompt_ids(run.tokenizer, trace.problem, run.prompt))
        key = generate.row_key(e.seed, trace.problem_id, sample)
        name = f"problem {trace.problem_id!r}, sample {sample}, {condition.name}"
        rows.append(generate.Row(ids, key, built.row(condition, key), name))
    sampling = generate.Sampling(spec.temperature, spec.top_p, spec.top_k)
    replies = sample_rows(run, partial, target, rows, sampling, spec)
    return [
        {
            "problem_id": trace.problem_id,
            "category": trace.category,
            "problem": trace.problem,
            "sample": sample,
            "model": e.model(target).path,
            **dataclasses.asdict(condition),
            "unit": spec.unit,
            "span": spec.span,
            "vector_hash": built.vector_hash(condition),
            "seed": e.seed,
            "ids": reply["ids"],
            "text": reply["text"],
            "finish_reason": reply["finish_reason"],
        }
        for (condition, trace, sample), reply in zip(todo, replies, strict=True)
    ]


def load_readings(run: "Run") -> conditions.Readings:
    """The vectors and norms that stage 3 wrote.

    Raises:
      ValueError: a vector that the sweep needs was not written, or does not fit the models.
    """
    folder, e = run.folder("3-vectors"), run.experiment
    summary = store.read_json(folder / "summary.json")
    shapes = {role: (config.n_layers, config.d_model) for role in e.roles for config in [run.architecture(role)]}
    found = {}
    for role in e.roles:
        for kind in conditions.needed_vectors(e):
            file = folder / f"{role}.{kind}.safetensors"
            if not file.exists():
                known = sorted(path.name.split(".")[1] for path in folder.glob(f"{role}.*.safetensors"))
                raise ValueError(f"steering.kinds: no {kind!r} vector of the {role} model was read; there are {known}")
            found[role, kind] = vector = vectors.load(file)
            for target, shape in shapes.items():
                if vector.directions.shape != shape:
                    raise ValueError(
                        f"{file} has directions of shape {vector.directions.shape} (layers, width); "
                        f"the {target} model takes {shape}"
                    )
    norms = {role: np.array(summary[role]["mean_norm"]) for role in e.roles}
    for file, expected in run.inputs["4-steering"]["vector_files"].items():
        if store.file_hash(inputs.data_path(file)) != expected:
            raise ValueError(f"{file} has changed since this run began; run it again")
    files = inputs.vector_files(e, max(n_layers for n_layers, _ in shapes.values()))
    return conditions.Readings(found, norms, _offset_vectors(run, folder), files)


def _offset_vectors(run: "Run", folder: Path) -> dict[tuple[str, str], vectors.SteeringVector]:
    """Vectors of the offsets that are swept, out of the window sums of the model that they are added to."""
    e = run.experiment
    windows = [window for window in map(e.vectors.window_at, e.steering.offsets) if window != e.vectors.window]
    if not windows:
        return {}
    sums = extract.load_sums(folder / f"{e.author}.sums.safetensors")
    return {
        (e.author, records.window_name(window)): vectors.difference_of_means(
            sums, e.vectors.label, window, contrast=e.vectors.contrast, estimator=e.vectors.estimator
        )
        for window in windows
    }
