"""The stages of an experiment: what each reads and writes, and how an interrupted run goes on.

    1-traces       traces.jsonl, labelled.jsonl    traces, imported or sampled; labels as they came with them
    2-annotations  annotations.jsonl, summary.txt  sections placed in the original traces; what was rejected and why
    3-vectors      {role}.sums.safetensors         window sums of every layer, window and label
                   {role}.{label}.safetensors      difference-of-means vectors of every layer; summary.json
    4-steering     generations.jsonl               one line per steered reply
    5-analysis     rates.csv                       backtracking rate and coherence per condition
    6-report       steering.png .pdf .csv, summary.md

Every folder also holds inputs.json, what the stage's results depend on, and run.json, what they were computed with. A
stage runs when the fingerprint of its inputs is not the one in its `DONE` file. Work inside a stage is kept batch by
batch, so a killed run loses at most the batch in flight.
"""

import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from backtrack_jax import conditions, environment, extract, generate, inputs, store, vectors
from backtrack_jax.analysis import backtracking
from backtrack_jax.config import Experiment, SteeringSpec, TraceSpec
from backtrack_jax.data import annotations as labels
from backtrack_jax.data import records
from backtrack_jax.intervention import no_intervention
from backtrack_jax.judges import keyword
from backtrack_jax.models import checkpoint, prompts
from backtrack_jax.models.config import LlamaConfig
from backtrack_jax.models.llama import Llama
from backtrack_jax.models.tokenizer import Tokenizer
from backtrack_jax.progress import Progress
from backtrack_jax.report import steering as steering_report

STAGES = ("1-traces", "2-annotations", "3-vectors", "4-steering", "5-analysis", "6-report")
_FORMAT = 1  # of the artifacts; a higher number makes every stage run again


def stage_names(wanted: Sequence[str]) -> tuple[str, ...]:
    """Full names of stages given by name, by number or by the word in them; all of them if none is given.

    Raises:
      ValueError: names a stage that does not exist.
    """
    names = {alias: name for name in STAGES for alias in (name, *name.split("-"))}
    if unknown := [w for w in wanted if w not in names]:
        raise ValueError(f"--stages: {unknown} unknown; there are {', '.join(STAGES)} (or their numbers)")
    chosen = {names[w] for w in wanted} or set(STAGES)
    return tuple(name for name in STAGES if name in chosen)


class Run:
    """One experiment on disk."""

    def __init__(self, experiment: Experiment, stages: Sequence[str] = STAGES):
        """Finds every input and reads the small ones; nothing is computed or written yet.

        Raises:
          ValueError, FileNotFoundError: name what is missing or wrong.
        """
        self.experiment = experiment
        self.stages = tuple(stages)
        self.workdir = Path(experiment.workdir) / experiment.name
        self.prompt = prompts.PromptFormat(
            experiment.prompt.format, experiment.prompt.think, experiment.prompt.system or None
        )
        self._models: dict[tuple[str, str, str], Llama] = {}
        inputs.check_planned(experiment)
        self.inputs = _chained(inputs.stage_inputs(experiment))

    def run(self) -> None:
        """Runs the wanted stages that are not done, each after those it builds on."""
        needed = STAGES[: STAGES.index(self.stages[-1]) + 1]
        if absent := [name for name in needed if name not in self.stages and not self.done(name)]:
            raise ValueError(
                f"{self.stages[-1]} builds on {absent[0]}, which is not done for this config; add it to --stages"
            )
        with_models = {"3-vectors", "4-steering"} | (set() if self.experiment.traces.path else {"1-traces"})
        if any(not self.done(name) for name in with_models.intersection(self.stages)):
            self._check_models()
        self.workdir.mkdir(parents=True, exist_ok=True)
        for name in needed:
            folder = store.StageFolder(self.workdir, name, self.inputs[name])
            if folder.done:
                say(f"{name}: done before")
                continue
            if folder.changed:
                say(f"{name}: runs again, since {', '.join(folder.changed)} changed; old results are in superseded/")
            else:
                say(f"{name}:")
            described = {"config": dataclasses.asdict(self.experiment), **environment.describe()}
            store.write_text(folder.path / "run.json", json.dumps(described, indent=1) + "\n")
            _BODIES[name](self, folder.path)
            folder.finish()
        say(f"results are in {self.workdir}")

    def done(self, name: str) -> bool:
        """Whether a stage is complete under the present inputs."""
        return store.peek(self.workdir, name, self.inputs[name])

    def folder(self, name: str) -> Path:
        """Folder of a stage's results."""
        return self.workdir / name

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the experiment, checked on first use."""
        e = self.experiment
        revision = None if e.tokenizer else e.model(e.author).revision or None
        tokenizer = Tokenizer.load(checkpoint.resolve(e.tokenizer_path, revision))
        prompts.check_tokenizer(tokenizer)
        return tokenizer

    def model(self, role: str) -> Llama:
        """The model of a role; only one checkpoint is held at a time."""
        spec = self.experiment.model(role)
        key = (spec.path, spec.revision, spec.dtype)
        if key not in self._models:
            self._models.clear()
            say(f"  loading the {role} model, {spec.path}")
            self._models[key] = checkpoint.load(spec.path, revision=spec.revision or None, dtype=spec.dtype)
        return self._models[key]

    def for_role(self, role: str, ids: Sequence[int]) -> tuple[list[int], np.ndarray]:
        """Ids as the model of a role reads them, and where each old position went (-1: dropped)."""
        spec = self.experiment.model(role)
        if spec.markers == "keep":
            return list(ids), np.arange(len(ids))
        replacement = spec.marker_replacement if spec.markers == "replace" else None
        return prompts.map_markers(ids, prompts.r1_markers(self.tokenizer), spec.markers, replacement)

    def architecture(self, role: str) -> LlamaConfig:
        """Architecture of the model of a role, which is fetched if it is not here."""
        spec = self.experiment.model(role)
        return checkpoint.read_config(checkpoint.resolve(spec.path, spec.revision or None))

    def _check_models(self) -> None:
        """Finds, before any long work, what is wrong with one of the models or the tokenizer."""
        e = self.experiment
        inputs.check_fetched(e)
        for role in e.roles:
            not_read = () if e.model(role).markers == "keep" else prompts.r1_markers(self.tokenizer)
            inputs.check_vocabulary(role, self.architecture(role), self.tokenizer, not_read)


def _chained(own: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Inputs of each stage, with the fingerprint of those of the stage before."""
    chained: dict[str, dict[str, Any]] = {}
    before = ""
    for name in STAGES:
        # Through JSON, so that what is compared is what is written.
        chained[name] = json.loads(json.dumps({**own[name], "earlier stages": before, "format": _FORMAT}))
        before = store.fingerprint(chained[name])
    return chained


def say(text: str) -> None:
    """Prints a line of the run's log."""
    print(text, file=sys.stderr, flush=True)


def make_traces(run: Run, folder: Path) -> None:
    """Stage 1: imports traces, or samples them."""
    spec = run.experiment.traces
    if not spec.path:
        sample_traces(run, folder)
        return
    path = inputs.data_path(spec.path)
    if path.suffix == ".jsonl":
        traces = inputs.spread(records.read_traces(path), spec.limit)
    else:
        pairs = inputs.spread(list(zip(*records.read_released(path), strict=True)), spec.limit)
        lines = [json.dumps({"trace_id": trace.id, "annotated": text}) for trace, text in pairs]
        store.write_text(folder / "labelled.jsonl", "\n".join(lines) + "\n")
        traces = [trace for trace, _ in pairs]
    records.write_jsonl(folder / "traces.jsonl", traces)
    say(f"  {len(traces)} traces imported")


def sample_traces(run: Run, folder: Path) -> None:
    """Samples the author's replies to the problems; a killed run goes on at the first missing batch."""
    e, spec = run.experiment, run.experiment.traces
    partial = folder / "replies.jsonl"
    if not (folder / "traces.jsonl").exists():
        asked = [(problem, sample) for problem in inputs.problems(e) for sample in range(spec.samples)]
        config = run.architecture(e.author)
        nothing = no_intervention(config.n_layers, config.d_model)
        rows = [
            generate.Row(
                run.for_role(e.author, prompts.prompt_ids(run.tokenizer, problem.problem, run.prompt))[0],
                generate.row_key(e.seed, problem.id, sample),
                nothing,
            )
            for problem, sample in asked
        ]
        replies = sample_rows(run, partial, e.author, rows, generate.Sampling(spec.temperature, spec.top_p), spec)
        traces = [
            records.Trace(
                id=f"{problem.id}/{sample}",
                problem_id=problem.id,
                category=problem.category,
                problem=problem.problem,
                text=reply["text"],
                sample=sample,
                token_ids=tuple(reply["ids"]),
                finish_reason=reply["finish_reason"],
            )
            for (problem, sample), reply in zip(asked, replies, strict=True)
        ]
        records.write_jsonl(folder / "traces.jsonl", traces)
    partial.unlink(missing_ok=True)


def sample_rows(
    run: Run,
    partial: Path,
    role: str,
    rows: Sequence[generate.Row],
    sampling: generate.Sampling,
    spec: TraceSpec | SteeringSpec,
) -> list[dict[str, Any]]:
    """Samples all rows, appending each batch to `partial`, and returns them in order; rows already there are kept."""
    done = {line["row"]: line for line in store.recover_lines(partial)}
    if len(done) == len(rows):
        return [done[row] for row in range(len(rows))]
    stop_ids = set(run.tokenizer.stop_ids)
    batches = generate.generate_rows(
        run.model(role),
        rows,
        sampling=sampling,
        stop_ids=run.tokenizer.stop_ids,
        max_new_tokens=spec.max_new_tokens,
        batch_size=spec.batch_size,
        done=done,
    )
    with Progress(f"  sampling from the {role} model", len(rows), len(done)) as progress:
        for batch in batches:
            lines = [
                {
                    "row": row,
                    "ids": reply.ids,
                    "text": run.tokenizer.decode([i for i in reply.ids if i not in stop_ids]),
                    "finish_reason": reply.finish_reason,
                }
                for row, reply in batch
                if row not in done
            ]
            store.append_lines(partial, lines)
            done |= {line["row"]: line for line in lines}
            progress.update(len(lines), sum(len(line["ids"]) for line in lines))
    return [done[row] for row in range(len(rows))]


def annotate(run: Run, folder: Path) -> None:
    """Stage 2: labels the sections of every trace and reports what could not be placed."""
    spec = run.experiment.annotations
    source = run.folder("1-traces")
    traces = records.read_traces(source / "traces.jsonl")
    if spec.judge == "import":
        annotated = records.read_annotations(inputs.data_path(spec.path))
    elif spec.judge == "keyword":
        annotated = [keyword.annotate(trace, spec.variant) for trace in traces]
    else:
        if not (source / "labelled.jsonl").exists():
            raise ValueError(
                f"annotations.judge='released', but {run.experiment.traces.path} holds traces without labels"
            )
        labelled = {line["trace_id"]: line["annotated"] for line in store.read_lines(source / "labelled.jsonl")}
        annotated = [labels.align(trace, labelled[trace.id]) for trace in traces]
    records.pair_annotations(traces, annotated)  # raises where a span does not fit its trace
    records.write_jsonl(folder / "annotations.jsonl", annotated)
    table = labels.format_summary(labels.summarise(annotated))
    store.write_text(folder / "summary.txt", table + "\n")
    say("\n".join("  " + line for line in table.split("\n")))


def read_vectors(run: Run, folder: Path) -> None:
    """Stage 3: window sums of every model, and from them the difference-of-means vectors of every layer."""
    e = run.experiment
    traces = records.read_traces(run.folder("1-traces") / "traces.jsonl")
    annotated = records.read_annotations(run.folder("2-annotations") / "annotations.jsonl")
    pairs = records.pair_annotations(traces, annotated)
    found = sorted({section.label for _, annotation in pairs for section in annotation.sections})
    wanted = {e.vectors.label} | (conditions.needed_labels(e) if "4-steering" in run.stages else set())
    if missing := sorted(wanted - set(found)):
        raise ValueError(
            f"no section is labelled {missing[0]!r}, which vectors.label or steering.kinds asks for; "
            f"labels that occur: {', '.join(found) or 'none'}"
        )
    plan = extract.WindowPlan(
        labels=tuple(found),
        groups={label: (label,) for label in found}
        | {"all": tuple(found), "rest": tuple(label for label in found if label != e.vectors.label)},
        windows=(e.vectors.window, *((offset, offset) for offset in e.vectors.offsets)),
        layers=e.vectors.layers,
        into_prompt=e.vectors.into_prompt,
    )
    summary: dict[str, Any] = {"labels": found}
    for role in e.roles:
        sums = _sums_of_role(run, folder, role, pairs, plan, wanted | {e.vectors.contrast})
        summary[role] = _write_vectors(run, folder, role, sums)
    if len(e.roles) == 2:
        base, reasoning = (vectors.load(folder / f"{role}.{e.vectors.label}.safetensors") for role in e.roles)
        summary["cosine"] = vectors.cosine(base, reasoning).tolist()
    store.write_text(folder / "summary.json", json.dumps(summary, indent=1) + "\n")


def _sums_of_role(
    run: Run,
    folder: Path,
    role: str,
    pairs: Sequence[tuple[records.Trace, records.Annotation]],
    plan: extract.WindowPlan,
    wanted: Collection[str],
) -> extract.WindowSums:
    """Window sums of one model, saved after every batch; ValueError if a wanted group has no window."""
    e = run.experiment
    file = folder / f"{role}.sums.safetensors"
    sums = extract.load_sums(file, plan) if file.exists() else None
    seen = len(sums.trace_ids) if sums else 0
    if sums and seen == len(pairs):
        return sums
    traces = [_token_trace(run, role, trace, annotation) for trace, annotation in pairs]
    _require_windows(traces, plan, wanted)
    model = run.model(role)
    length = {trace.id: len(trace.ids) for trace in traces}
    sums = sums or extract.WindowSums.zeros(plan, model.config.n_layers, model.config.d_model)
    with Progress(f"  reading the {role} model", len(traces), seen) as progress:
        for new in extract.add_traces(sums, model, traces, batch_size=e.vectors.batch_size):
            extract.save_sums(sums, file)
            progress.update(len(new), sum(length[i] for i in new))
    return sums


def _require_windows(traces: Sequence[extract.TokenTrace], plan: extract.WindowPlan, wanted: Collection[str]) -> None:
    """Refuses, before the model is loaded, a group of labels of which no window could be read."""
    counted = [extract.count_windows(trace, plan, len(trace.ids)) for trace in traces]
    readable = {label for reads, _ in counted for row, label in enumerate(plan.labels) if reads[row, 0].any()}
    for group in sorted(wanted):
        if not readable.intersection(plan.groups[group]):
            raise ValueError(
                f"no window {plan.windows[0]} of {group!r} lies inside a reply, so it has no mean; "
                "choose another vectors.window, or vectors.into_prompt=True"
            )


def _token_trace(run: Run, role: str, trace: records.Trace, annotation: records.Annotation) -> extract.TokenTrace:
    """A trace as the model of a role reads it, with each section's first token."""
    encoded = prompts.encode_trace(run.tokenizer, trace.problem, trace.text, run.prompt, token_ids=trace.token_ids)
    ids, index = run.for_role(role, encoded.ids)
    placed = [(section.label, encoded.position_of_char(section.start)) for section in annotation.sections]
    starts = [(label, int(index[at])) for label, at in placed if at is not None and index[at] >= 0]
    reply_start = int(np.sum(index[: encoded.reply_start] >= 0))
    return extract.TokenTrace(trace.id, ids, reply_start, starts)


def _write_vectors(run: Run, folder: Path, role: str, sums: extract.WindowSums) -> dict[str, Any]:
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
    layer = run.experiment.steering.layer
    counts = ", ".join(f"{windows[name]['read']} of {name}" for name in (spec.label, "all"))
    say(f"  {role} model, windows read: {counts}; dropped: {windows['all']['dropped']}")
    say(f"  {role} model, mean residual norm at layer {layer}: {sums.mean_norm[layer]:.4g}")
    return {"windows": windows, "mean_norm": sums.mean_norm.tolist()}


def steer(run: Run, folder: Path) -> None:
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


def _steer_model(
    run: Run, target: str, partial: Path, readings: conditions.Readings, asked: Sequence[records.Trace]
) -> list[dict[str, Any]]:
    """Replies of one model under all its conditions, as lines of generations.jsonl."""
    e, spec = run.experiment, run.experiment.steering
    config = run.architecture(target)
    built = conditions.Interventions(readings, config.n_layers, config.d_model, spec.span, e.seed)
    todo = [
        (condition, trace, sample)
        for condition in conditions.make(e, readings)
        if condition.target == target
        for trace in asked
        for sample in range(spec.samples)
    ]
    rows = []
    for condition, trace, sample in todo:
        ids, _ = run.for_role(target, prompts.prompt_ids(run.tokenizer, trace.problem, run.prompt))
        key = generate.row_key(e.seed, trace.problem_id, sample)
        rows.append(generate.Row(ids, key, built.row(condition, key)))
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


def load_readings(run: Run) -> conditions.Readings:
    """The vectors and norms that stage 3 wrote.

    Raises:
      ValueError: a vector that the sweep needs was not written, or does not fit the models.
    """
    folder, e = run.folder("3-vectors"), run.experiment
    summary = json.loads((folder / "summary.json").read_text())
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
    return conditions.Readings(found, {role: np.array(summary[role]["mean_norm"]) for role in e.roles})


def analyse(run: Run, folder: Path) -> None:
    """Stage 5: backtracking rate (Eq. 1), its interval and the text's coherence, for every condition."""
    cells: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for line in store.read_lines(run.folder("4-steering") / "generations.jsonl"):
        cell = tuple(line[name] for name in steering_report.CELL)
        cells.setdefault(cell, []).append(line)
    rows = [
        dict(zip(steering_report.CELL, cell, strict=True))
        | backtracking.summarise_cell([line["text"] for line in lines], [line["problem_id"] for line in lines])
        for cell, lines in cells.items()
    ]
    store.write_text(folder / "rates.csv", steering_report.to_csv(rows))


def report(run: Run, folder: Path) -> None:
    """Stage 6: figure and summary."""
    rows = steering_report.read_csv(run.folder("5-analysis") / "rates.csv")
    summary = json.loads((run.folder("3-vectors") / "summary.json").read_text())
    placed = (run.folder("2-annotations") / "summary.txt").read_text()
    steering_report.draw(rows, run.experiment, summary, folder)
    text = steering_report.summarise(rows, run.experiment, summary, placed)
    store.write_text(folder / "summary.md", text)
    say(text)


_BODIES: dict[str, Callable[[Run, Path], None]] = dict(
    zip(STAGES, (make_traces, annotate, read_vectors, steer, analyse, report), strict=True)
)
