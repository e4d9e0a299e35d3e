"""Stage 3: window sums of every model, and the vectors that follow from them.

{role}.sums.safetensors      window sums of every layer, window and label
{role}.{label}.safetensors   difference-of-means vectors of every layer, and the overall mean
summary.json                 labels, windows read and dropped, mean residual norms, cosines
"""

import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from backtrack_jax import conditions, extract, inputs, vectors
from backtrack_jax.config import CONTRASTS, Experiment
from backtrack_jax.data import records
from backtrack_jax.files import store
from backtrack_jax.files.console import Progress, say
from backtrack_jax.files.paths import shown
from backtrack_jax.models.batching import bucket
from backtrack_jax.readers import SHUFFLED
from backtrack_jax.stages import estimates
from backtrack_jax.stages.annotations import read_pairs
from backtrack_jax.stages.base import Context, Stage

OVERALL_MEAN = "overall-mean"
_SUMMARY = "summary.json"


class VectorsStage(Stage):
    """Reads every model over the traces, and takes differences of means."""

    name = "3-vectors"
    format = 6

    def inputs(self, e: Experiment) -> dict[str, Any]:
        """What is read and how, and both models. Sums over traces can only be resumed in the same batches."""
        models = {role: inputs.model_inputs(e, role) for role in e.roles}
        return {"vectors": dataclasses.asdict(e.vectors), "models": models, "prompt": inputs.prompt_inputs(e)}

    def model_roles(self, e: Experiment) -> Sequence[str]:
        """All."""
        return e.roles

    def plan(self, context: Context) -> list[str]:
        """Tokens read by every model, and the memory of a batch."""
        e = context.experiment
        lengths = estimates.trace_lengths(e)
        longest = bucket(max(lengths))
        lines = []
        for role in e.roles:
            lines.append(f"{role} model: {len(lengths)} traces, about {sum(lengths):,} tokens")
            config = inputs.architecture(e.model(role).path)
            if config is None:
                lines.append(estimates.unknown_memory(e, role))
                continue
            windows = 1 + len(e.vectors.offsets)
            parts, rows_at_once = e.model_parallel, -(-e.vectors.batch_size // e.data_parallel)
            scores = config.n_heads // parts * longest**2 // 2  # half are never computed
            width = longest * (2 * config.d_mlp // parts + 6 * config.d_model) + windows * 14 * config.d_model
            slots = extract.section_slots(estimates.sections(longest)) if e.vectors.layers else 0
            # Held of all layers until the pass ends.
            held = estimates.gigabytes(4 * rows_at_once * (scores + width + config.n_layers * slots * config.d_model))
            weights = estimates.weights(e, role, config)
            kept = 4 * len(e.vectors.layers) * sum(map(estimates.sections, lengths)) * config.d_model
            on_host = f", means of sections on the host about {estimates.gigabytes(kept)}" if kept else ""
            lines.append(f"  {estimates.memory(e)}: weights {weights}, activations about {held}{on_host}")
            lines += estimates.beyond_context(config, role, lengths)
        return lines

    def run(self, context: Context, folder: Path) -> None:
        """Window sums of every model, and from them the difference-of-means vectors of every layer."""
        e = context.experiment
        pairs = read_pairs(context)
        found = sorted({section.label for _, annotation in pairs for section in annotation.sections})
        steered = context.last != self.name  # a later stage needs the vectors that are added
        wanted = {e.vectors.label} | (conditions.needed_labels(e) if steered else set())
        if e.vectors.contrast == "all" and found == [e.vectors.label]:
            raise ValueError(
                f"every section is labelled {found[0]!r}, so that D+ and D of vectors.contrast='all' are the same "
                "sections and their difference is zero; expected sections with other labels too"
            )
        if e.vectors.contrast == "trace" and not _has_others([annotation for _, annotation in pairs], e.vectors.label):
            raise ValueError(
                f"every section of the traces with {e.vectors.label!r} is labelled so, so that D+ and D of "
                "vectors.contrast='trace' are the same sections and their difference is zero; expected such traces to "
                "have sections with other labels too"
            )
        if missing := sorted(wanted - set(found)):
            raise ValueError(
                f"no section is labelled {missing[0]!r}, which vectors.label or steering.kinds asks for; "
                f"labels that occur: {', '.join(found) or 'none'}"
            )
        windows = [e.vectors.window, *map(e.vectors.window_at, e.vectors.offsets)]
        within = e.vectors.contrast == "trace"
        plan = extract.WindowPlan(
            labels=(*found, SHUFFLED),
            groups={label: (label,) for label in (*found, SHUFFLED)}
            | {"all": tuple(found), "rest": tuple(label for label in found if label != e.vectors.label)}
            | ({"trace": tuple(found)} if within else {}),
            windows=tuple(dict.fromkeys(windows)),
            layers=e.vectors.layers,
            into_prompt=e.vectors.into_prompt,
            beside={"trace": e.vectors.label} if within else {},
        )
        summary: dict[str, Any] = {"labels": found}
        added = {SHUFFLED} & set(conditions.names(e)) if steered else set()
        for role in e.roles:
            sums = _sums_of_role(context, folder, role, pairs, plan, wanted | added | {e.vectors.contrast})
            summary[role] = _write_vectors(context, folder, role, sums)
        if len(e.roles) == 2:
            base, reasoning = (self.load(folder, role, e.vectors.label) for role in e.roles)
            summary["cosine"] = vectors.cosine(base, reasoning).tolist()
        store.write_text(folder / _SUMMARY, json.dumps(summary, indent=1) + "\n")

    def read_summary(self, folder: Path) -> dict[str, Any]:
        """Labels that were read; by role, windows read and dropped and mean residual norms; cosines of the models."""
        return store.read_json(folder / _SUMMARY)

    def read_sums(self, folder: Path, role: str) -> extract.WindowSums:
        """Window sums of a model."""
        return extract.load_sums(folder / _sums_name(role))

    def has(self, folder: Path, role: str, kind: str) -> bool:
        """Whether there is a vector of a label, or the overall mean."""
        return (folder / _vector_name(role, kind)).exists()

    def load(self, folder: Path, role: str, kind: str) -> vectors.SteeringVector:
        """The vector of a label, or the overall mean; ValueError names those that were read."""
        file = folder / _vector_name(role, kind)
        if not file.exists():
            known = sorted(path.name.split(".")[1] for path in folder.glob(_vector_name(role, "*")))
            raise ValueError(f"steering.kinds: no {kind!r} vector of the {role} model was read; available: {known}")
        return vectors.load(file)


VECTORS = VectorsStage()


def _sums_name(role: str) -> str:
    return f"{role}.sums.safetensors"


def _vector_name(role: str, kind: str) -> str:
    return f"{role}.{kind}.safetensors"


def _sums_of_role(
    context: Context,
    folder: Path,
    role: str,
    pairs: Sequence[tuple[records.Trace, records.Annotation]],
    plan: extract.WindowPlan,
    wanted: Collection[str],
) -> extract.WindowSums:
    """Window sums of one model, saved on the way; ValueError if a wanted group has no window."""
    e = context.experiment
    file = folder / _sums_name(role)
    sums = extract.load_sums(file, plan) if file.exists() else None
    seen = len(sums.trace_ids) if sums else 0
    if sums and seen == len(pairs):
        return sums
    drawn = _drawn_sections([annotation for _, annotation in pairs], e.vectors.label)
    traces = [context.token_trace(role, *pair, drawn=numbers) for pair, numbers in zip(pairs, drawn, strict=True)]
    swept = {e.vectors.label, e.vectors.contrast}
    _require_windows(
        traces, plan, {e.vectors.window_at(o): swept for o in e.steering.offsets} | {plan.windows[0]: wanted}
    )
    model = context.model(role)
    for line in estimates.beyond_context(model.config, role, [len(trace.ids) for trace in traces]):
        say(line)
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
        for group, other in plan.beside.items():
            if group in wanted.get(window, ()) and not _differs(plan, [reads[:, at] for reads, _ in counted], other):
                raise ValueError(
                    f"windows {window} of {other!r} are the only ones that are read of their traces, so that the "
                    f"difference of vectors.contrast={group!r} is zero; choose another vectors.window or "
                    "steering.offsets, or vectors.contrast='all'"
                )


def _differs(plan: extract.WindowPlan, reads: Sequence[np.ndarray], group: str) -> bool:
    """Whether a trace of which windows of a group are read has others: reads are [labels, T] of each trace."""
    own = np.array([label in plan.groups[group] for label in plan.labels])
    others = np.array([label in plan.groups["rest"] for label in plan.labels])
    return any(of_trace[own].any() and of_trace[others].any() for of_trace in reads)


def _has_others(annotated: Sequence[records.Annotation], label: str) -> bool:
    """Whether a trace with a label has sections with another; also where no trace has it, which is another error."""
    found = [{section.label for section in annotation.sections} for annotation in annotated]
    marked = [labels for labels in found if label in labels]
    return any(len(labels) > 1 for labels in marked) or not marked


def _drawn_sections(annotated: Sequence[records.Annotation], label: str) -> list[set[int]]:
    """For each trace, which of its sections the `shuffled` vector takes as D+: as many in all as have the label."""
    sections = [(trace, number) for trace, a in enumerate(annotated) for number in range(len(a.sections))]
    count = sum(section.label == label for a in annotated for section in a.sections)
    drawn: list[set[int]] = [set() for _ in annotated]
    for at in np.random.default_rng(0).choice(len(sections), count, replace=False):
        trace, number = sections[at]
        drawn[trace].add(number)
    return drawn


def _write_vectors(context: Context, folder: Path, role: str, sums: extract.WindowSums) -> dict[str, Any]:
    """Writes a vector for every label that was read, and the overall mean; returns counts and norms."""
    spec = context.experiment.vectors
    model = context.experiment.model(role)
    origin = {
        "role": role,
        "model": shown(model.path),
        "revision": model.revision,
        "dtype": model.dtype,
        "inputs": store.fingerprint(context.inputs[VectorsStage.name]),
    }
    windows = {}
    for g, label in enumerate(sums.plan.groups):
        windows[label] = {"read": int(sums.read[g, 0]), "dropped": int(sums.dropped[g, 0])}
        if label in CONTRASTS or not sums.read[g, 0]:
            continue
        contrast = spec.contrast if label == spec.label else "all"
        vector = vectors.difference_of_means(
            sums, label, spec.window, contrast=contrast, estimator=spec.estimator, provenance=origin
        )
        vectors.save(vector, folder / _vector_name(role, label))
    mean = sums.mean("all", spec.window, spec.estimator).astype(np.float32)
    vectors.save(vectors.SteeringVector(mean, origin | {"mean": "all"}), folder / _vector_name(role, OVERALL_MEAN))
    layer = context.experiment.steering.main_layer
    counts = ", ".join(f"{windows[name]['read']} of {name}" for name in (spec.label, "all"))
    say(f"  {role} model, windows read: {counts}; dropped: {windows['all']['dropped']}")
    say(f"  {role} model, mean residual norm at layer {layer}: {sums.mean_norm[layer]:.4g}")
    return {"windows": windows, "mean_norm": sums.mean_norm.tolist()}
