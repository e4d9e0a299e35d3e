"""Stage 3: window sums of every model, and the vectors that follow from them."""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from backtrack_jax import conditions, extract, vectors
from backtrack_jax.data import records
from backtrack_jax.files import store
from backtrack_jax.files.console import Progress, say
from backtrack_jax.models import prompts

if TYPE_CHECKING:
    from backtrack_jax.pipeline import Run

_SHUFFLED = "shuffled"


def read_vectors(run: "Run", folder: Path) -> None:
    """Stage 3: window sums of every model, and from them the difference-of-means vectors of every layer."""
    e = run.experiment
    traces = records.read_traces(run.folder("1-traces") / "traces.jsonl")
    annotated = records.read_annotations(run.folder("2-annotations") / "annotations.jsonl")
    pairs = records.pair_annotations(traces, annotated)
    found = sorted({section.label for _, annotation in pairs for section in annotation.sections})
    wanted = {e.vectors.label} | (conditions.needed_labels(e) if "4-steering" in run.stages else set())
    if e.vectors.contrast == "all" and found == [e.vectors.label]:
        raise ValueError(
            f"every section is labelled {found[0]!r}, so that D+ and D of vectors.contrast='all' are the same sections "
            "and their difference is zero; expected sections with other labels too"
        )
    if missing := sorted(wanted - set(found)):
        raise ValueError(
            f"no section is labelled {missing[0]!r}, which vectors.label or steering.kinds asks for; "
            f"labels that occur: {', '.join(found) or 'none'}"
        )
    windows = [e.vectors.window, *map(e.vectors.window_at, e.vectors.offsets)]
    plan = extract.WindowPlan(
        labels=(*found, _SHUFFLED),
        groups={label: (label,) for label in (*found, _SHUFFLED)}
        | {"all": tuple(found), "rest": tuple(label for label in found if label != e.vectors.label)},
        windows=tuple(dict.fromkeys(windows)),
        layers=e.vectors.layers,
        into_prompt=e.vectors.into_prompt,
    )
    summary: dict[str, Any] = {"labels": found}
    added = {_SHUFFLED} & set(e.steering.names) if "4-steering" in run.stages else set()
    for role in e.roles:
        sums = _sums_of_role(run, folder, role, pairs, plan, wanted | added | {e.vectors.contrast})
        summary[role] = _write_vectors(run, folder, role, sums)
    if len(e.roles) == 2:
        base, reasoning = (vectors.load(folder / f"{role}.{e.vectors.label}.safetensors") for role in e.roles)
        summary["cosine"] = vectors.cosine(base, reasoning).tolist()
    store.write_text(folder / "summary.json", json.dumps(summary, indent=1) + "\n")


def _sums_of_role(
    run: "Run",
    folder: Path,
    role: str,
    pairs: Sequence[tuple[records.Trace, records.Annotation]],
    plan: extract.WindowPlan,
    wanted: Collection[str],
) -> extract.WindowSums:
    """Window sums of one model, saved on the way; ValueError if a wanted group has no window."""
    e = run.experiment
    file = folder / f"{role}.sums.safetensors"
    sums = extract.load_sums(file, plan) if file.exists() else None
    seen = len(sums.trace_ids) if sums else 0
    if sums and seen == len(pairs):
        return sums
    drawn = _drawn_sections([annotation for _, annotation in pairs], e.vectors.label)
    traces = [token_trace(run, role, *pair, drawn=numbers) for pair, numbers in zip(pairs, drawn, strict=True)]
    swept = {e.vectors.label, e.vectors.contrast}
    _require_windows(
        traces, plan, {e.vectors.window_at(o): swept for o in e.steering.offsets} | {plan.windows[0]: wanted}
    )
    model = run.model(role)
    length = {trace.id: len(trace.ids) for trace in traces}
    sums = sums or extract.WindowSums.zeros(plan, model.config.n_layers, model.config.d_model)
    saver = store.Saver(lambda: extract.save_sums(sums, file))
    try:
        with Progress(f"  reading the {role} model", len(traces), seen) as progress:
            for new in extract.add_traces(sums, model, traces, batch_size=e.vectors.batch_size):
                saver.turn()
                progress.update(len(new), sum(length[i] for i in new))
    except (FloatingPointError, RuntimeError):  # of the device; what is in the sums by then are whole batches
        saver.end()
        raise
    saver.end()
    return sums


def _require_windows(
    traces: Sequence[extract.TokenTrace],
    plan: extract.WindowPlan,
    wanted: Mapping[extract.Window, Collection[str]],
) -> None:
    """Refuses, before the model is loaded, a window and group of labels that could be read nowhere."""
    counted = [extract.count_windows(trace, plan, len(trace.ids)) for trace in traces]
    for at, window in enumerate(plan.windows):
        readable = {label for reads, _ in counted for row, label in enumerate(plan.labels) if reads[row, at].any()}
        for group in sorted(wanted.get(window, ())):
            if not readable.intersection(plan.groups[group]):
                raise ValueError(
                    f"no window {window} of {group!r} lies inside a reply, so it has no mean; "
                    "choose another vectors.window or steering.offsets, or vectors.into_prompt=True"
                )


def _drawn_sections(annotated: Sequence[records.Annotation], label: str) -> list[set[int]]:
    """For each trace, which of its sections the `shuffled` vector takes as D+: as many in all as have the label."""
    sections = [(trace, number) for trace, a in enumerate(annotated) for number in range(len(a.sections))]
    count = sum(section.label == label for a in annotated for section in a.sections)
    drawn: list[set[int]] = [set() for _ in annotated]
    for at in np.random.default_rng(0).choice(len(sections), count, replace=False):
        trace, number = sections[at]
        drawn[trace].add(number)
    return drawn


def token_trace(
    run: "Run", role: str, trace: records.Trace, annotation: records.Annotation, drawn: Collection[int] = ()
) -> extract.TokenTrace:
    """A trace as the model of a role reads it, with each section's first token, those drawn under a second label."""
    try:
        encoded = prompts.encode_trace(run.tokenizer, trace.problem, trace.text, run.prompt, token_ids=trace.token_ids)
    except ValueError as error:
        raise ValueError(f"trace {trace.id!r}: {error}") from error
    ids, index = run.for_role(role, encoded.ids)
    places = [_first_token(trace.text, encoded, index, section) for section in annotation.sections]
    placed = [(section.label, at) for section, at in zip(annotation.sections, places, strict=True)]
    placed += [(_SHUFFLED, places[number]) for number in sorted(drawn)]
    starts = [(label, at) for label, at in placed if at is not None]
    reply_start = int(np.sum(index[: encoded.reply_start] >= 0))
    return extract.TokenTrace(trace.id, ids, reply_start, starts)


def _first_token(text: str, encoded: prompts.EncodedTrace, index: np.ndarray, section: records.Section) -> int | None:
    """Position of a section's first token among those that a model reads; None if it reads none of the section.

    A section may start with a marker that this model is not shown; it then starts with what follows the marker.
    """
    at = encoded.position_of_char(section.start)
    if at is None:
        return None
    for token, (start, stop) in enumerate(encoded.spans[at - encoded.reply_start :], at):
        if start >= section.stop:
            break
        if index[token] >= 0 and text[start:stop].strip():
            return int(index[token])
    return None


def _write_vectors(run: "Run", folder: Path, role: str, sums: extract.WindowSums) -> dict[str, Any]:
    """Writes a vector for every label that was read, and the overall mean; returns counts and norms."""
    spec = run.experiment.vectors
    model = run.experiment.model(role)
    origin = {
        "role": role,
        "model": model.path,
        "revision": model.revision,
        "inputs": store.fingerprint(run.inputs["3-vectors"]),
    }
    windows = {}
    for g, label in enumerate(sums.plan.groups):
        windows[label] = {"read": int(sums.read[g, 0]), "dropped": int(sums.dropped[g, 0])}
        if label in ("all", "rest") or not sums.read[g, 0]:
            continue
        contrast = spec.contrast if label == spec.label else "all"
        vector = vectors.difference_of_means(
            sums, label, spec.window, contrast=contrast, estimator=spec.estimator, provenance=origin
        )
        vectors.save(vector, folder / f"{role}.{label}.safetensors")
    mean = sums.mean("all", spec.window, spec.estimator).astype(np.float32)
    vectors.save(vectors.SteeringVector(mean, origin | {"mean": "all"}), folder / f"{role}.overall-mean.safetensors")
    layer = run.experiment.steering.main_layer
    counts = ", ".join(f"{windows[name]['read']} of {name}" for name in (spec.label, "all"))
    say(f"  {role} model, windows read: {counts}; dropped: {windows['all']['dropped']}")
    say(f"  {role} model, mean residual norm at layer {layer}: {sums.mean_norm[layer]:.4g}")
    return {"windows": windows, "mean_norm": sums.mean_norm.tolist()}
