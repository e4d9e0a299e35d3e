"""The stages of an experiment: what each reads and writes, and how an interrupted run goes on.

    1-traces       traces.jsonl, labelled.jsonl    traces, imported or sampled; labels as they came with them
    2-annotations  annotations.jsonl, summary.txt  sections placed in the original traces; what was rejected and why
    3-vectors      {role}.sums.safetensors         window sums of every layer, window and label
                   {role}.{label}.safetensors      difference-of-means vectors of every layer; summary.json
    4-steering     generations.jsonl               one line per steered reply
    5-analysis     replies.csv, rates.csv, effects.csv    rate and coherence per reply, condition, problem
                   similarity.csv, label_cosines.csv, reliability.csv, windows.csv    what vectors share; counts
                   {role}.lens.csv, {role}.lens_tokens.csv      what vectors spell through each unembedding
                   {role}.probe.csv, {role}.projections.json    how far projections tell what comes
                   agreement.csv                                keyword judge against the labels of the run
                   judged.jsonl, judge_agreement.csv            labels of the replies, with analysis.judge
    6-report       report.html, summary.md; every figure as .png, .pdf and .csv

Every folder also holds inputs.json, what the stage's results depend on, and run.json, what they were computed with. A
stage runs when the fingerprint of its inputs is not the one in its `DONE` file, or a file that it lists is not as it
was. Work inside a stage is kept batch by batch, so a killed run loses at most the batch in flight, and in stage 3 what
was read since its sums were last written, twenty times as long as that takes at most.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from backtrack_jax import inputs
from backtrack_jax.analysis.logit_lens import keyword_ids
from backtrack_jax.checks import check_windows
from backtrack_jax.config import ROLES, Experiment
from backtrack_jax.data import records
from backtrack_jax.data.records import failure
from backtrack_jax.files import environment, store
from backtrack_jax.files.console import say
from backtrack_jax.judges.openai.ledger import read_entries
from backtrack_jax.judges.openai.settings import UNANSWERED, read_key
from backtrack_jax.models import checkpoint, prompts
from backtrack_jax.models.config import ModelConfig
from backtrack_jax.models.decoder import Decoder
from backtrack_jax.models.sharding import make_mesh
from backtrack_jax.models.tokenizer import Tokenizer
from backtrack_jax.stages import analysis, annotations, report, steering, traces, vectors

STAGES = ("1-traces", "2-annotations", "3-vectors", "4-steering", "5-analysis", "6-report")
# Of a stage's artifacts and of what a seed draws; a higher number makes this stage and those after it run again.
_FORMAT = dict.fromkeys(STAGES, 3) | {"3-vectors": 5, "5-analysis": 4}


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
        self.stages = tuple(stages)
        reads_vectors = not set(stages) <= {"1-traces", "2-annotations"}
        if reads_vectors:
            experiment = experiment.for_vectors()
            check_windows(experiment)
        # In one order, as conditions are numbered by it.
        roles = tuple(role for role in ROLES if role in experiment.roles)
        self.experiment = experiment = dataclasses.replace(experiment, roles=roles)
        self.workdir = Path(os.path.expanduser(experiment.workdir)) / experiment.name
        self.prompt = prompts.PromptFormat(
            experiment.prompt.format, experiment.prompt.think, experiment.prompt.system or None
        )
        self._models: dict[tuple[str, str, str], Decoder] = {}
        inputs.check_planned(experiment)
        self.inputs = self._find_inputs()

    def _find_inputs(self) -> dict[str, dict[str, Any]]:
        """Inputs of every stage. Labels of traces or replies that may have gaps are other inputs than those without.

        So `allow_unanswered` changes nothing where every call was answered, and without it the gaps are asked for, and
        whatever was read off traces with gaps is read anew.
        """
        e, own = self.experiment, inputs.stage_inputs(self.experiment)
        judged = (("2-annotations", e.judge, "annotations.jsonl"), ("5-analysis", e.analysis.judge, "judged.jsonl"))
        for name, judge, labels in judged:
            with_gaps = own | {name: own[name] | {"unanswered": "allowed"}}
            if judge != "openai" or store.peek(self.workdir, name, _chained(own)[name]):
                continue
            folder = store.peek(self.workdir, name, _chained(with_gaps)[name])
            if e.annotations.openai.allow_unanswered or (folder and not _has_gaps(folder / labels)):
                own = with_gaps
        return _chained(own)

    def run(self) -> None:
        """Runs the wanted stages that are not done, each after those it builds on."""
        needed = self.needed()
        asked = {"2-annotations": self.experiment.judge, "5-analysis": self.experiment.analysis.judge}
        if any(who == "openai" and name in self.stages and not self.done(name) for name, who in asked.items()):
            # Before the first stage, which may take hours.
            read_key(self.experiment.annotations.openai.settings())
            read_entries(annotations.ledger_path(self.experiment))
        if any(not self.done(name) for name in self.with_models.intersection(self.stages)):
            self._check_models()
        self.workdir.mkdir(parents=True, exist_ok=True)
        with store.locked(self.workdir):
            self._say_what_is_not_read()
            for name in needed:
                self._run_stage(name)
        page = "6-report/report.html" if self.stages[-1] == "6-report" else ""
        say(f"results are in {self.workdir / page}")

    @property
    def with_models(self) -> set[str]:
        """The stages that read or sample with a model."""
        return {"3-vectors", "4-steering", "5-analysis"} | (set() if self.experiment.traces.path else {"1-traces"})

    def _say_what_is_not_read(self) -> None:
        for role in (role for role in ROLES if role not in self.experiment.roles and self.experiment.model(role).path):
            say(f"{role}.path={self.experiment.model(role).path} is not read: roles={self.experiment.roles}")
        layer, kept = self.experiment.steering.main_layer, self.experiment.vectors.layers
        if "5-analysis" in self.stages and kept and layer not in kept:
            say(f"probe and reliability are of vectors.layers={kept}; add steering.layer={layer} there to have it")

    def needed(self) -> tuple[str, ...]:
        """The wanted stages and all that they build on; ValueError names one that is neither wanted nor done."""
        needed = STAGES[: STAGES.index(self.stages[-1]) + 1]
        if absent := [name for name in needed if name not in self.stages and not self.done(name)]:
            raise ValueError(
                f"{self.stages[-1]} builds on {absent[0]}, which is not done for this config; add it to --stages"
            )
        return needed

    def _run_stage(self, name: str) -> None:
        folder = store.StageFolder(self.workdir, name, self.inputs[name])
        if folder.done:
            say(f"{name}: done before")
            return
        if folder.changed:
            say(f"{name}: runs again, since {', '.join(folder.changed)} changed; old results are in superseded/")
        elif folder.misfits:
            say(f"{name}: runs again, since {', '.join(folder.misfits)} is missing or not as it was written")
        else:
            say(f"{name}:")
        self._check_commits(name)
        self._describe(folder.path / "run.json")
        _BODIES[name](self, folder.path)
        if changed := self._changed_since(name):
            folder.set_aside()  # as part of it may be of the old files and part of the new ones
            raise ValueError(f"{', '.join(changed)} has changed since this run began; run it again")
        folder.finish()

    def _changed_since(self, last: str) -> list[str]:
        """Inputs up to a stage that are no longer what the run found when it began: models and files, by content."""
        now = self._find_inputs()
        stages = STAGES[: STAGES.index(last) + 1]
        changed = {field for name in stages for field in store.changes(self.inputs[name], now[name])}
        return sorted(changed - {"earlier stages"})

    def _hub_commits(self) -> dict[str, str]:
        models = {role: self.experiment.model(role) for role in self.experiment.roles}
        commits = {role: checkpoint.hub_commit(spec.path, spec.revision or None) for role, spec in models.items()}
        return {role: commit for role, commit in commits.items() if commit}

    def _check_commits(self, name: str) -> None:
        """Refuses to go on from what another commit of a hub id was read or sampled with, which no fingerprint shows.

        Raises:
          ValueError: names both commits and the stage.
        """
        now = self._hub_commits() if name in self.with_models else {}
        for stage in STAGES[: STAGES.index(name) + 1]:
            path = self.folder(stage) / "run.json"
            if stage not in self.with_models or not path.exists():
                continue
            before = store.read_json(path).get("hub_commits", {})
            for role, commit in now.items():
                if before.get(role, commit) != commit:
                    raise ValueError(
                        f"{role}.path={self.experiment.model(role).path} is at commit {commit}, {stage} in "
                        f"{self.workdir} was computed with {before[role]}; set {role}.revision, or take another workdir"
                    )

    def _describe(self, path: Path) -> None:
        """Writes what a stage is computed with; what an interrupted run had computed its part with is kept."""
        described = {"config": dataclasses.asdict(self.experiment), **environment.describe()}
        described["hub_commits"] = self._hub_commits()
        if path.exists():
            before = store.read_json(path)
            earlier = before.pop("earlier", [])
            earlier += [before] * (before != json.loads(json.dumps(described)))
            described |= {"earlier": earlier} if earlier else {}
        store.write_text(path, json.dumps(described, indent=1) + "\n")

    def done(self, name: str) -> bool:
        """Whether a stage is complete under the present inputs."""
        return store.peek(self.workdir, name, self.inputs[name]) is not None

    def folder(self, name: str) -> Path:
        """Folder of a stage's results."""
        return self.workdir / name

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the experiment, checked on first use."""
        e = self.experiment
        revision = None if e.tokenizer else e.model(e.author).revision or None
        tokenizer = Tokenizer.load(checkpoint.resolve(e.tokenizer_path, revision, weights=False))
        prompts.check_tokenizer(tokenizer)
        return tokenizer

    @functools.cached_property
    def mesh(self) -> Mesh | None:
        """The devices of the run; None for the default one alone.

        Raises:
          ValueError: there are not so many.
        """
        copies, parts, there = self.experiment.data_parallel, self.experiment.model_parallel, jax.device_count()
        if copies * parts > there:
            raise ValueError(
                f"data_parallel={copies} x model_parallel={parts} takes {copies * parts} devices, there are {there}"
            )
        if idle := there - copies * parts:
            say(f"  {idle} of {there} devices idle; see data_parallel and model_parallel")
        return make_mesh(parts, jax.devices()[: copies * parts]) if copies * parts > 1 else None

    def model(self, role: str) -> Decoder:
        """The model of a role; only one checkpoint is held at a time."""
        spec = self.experiment.model(role)
        key = (spec.path, spec.revision, spec.dtype)
        if key not in self._models:
            self._models.clear()
            n = self.architecture(role).n_parameters
            size = n * jnp.dtype(spec.dtype).itemsize / 1e9
            say(f"  loading the {role} model, {spec.path}: {n / 1e6:.4g} million weights, {spec.dtype}, {size:.2f} GB")
            revision = spec.revision or None
            self._models[key] = checkpoint.load(spec.path, revision=revision, dtype=spec.dtype, mesh=self.mesh)
        return self._models[key]

    def roles_by_need(self) -> list[str]:
        """Roles, the one whose model is held first, so that it is not loaded again."""
        held = {path for path, _, _ in self._models}
        return sorted(self.experiment.roles, key=lambda role: self.experiment.model(role).path not in held)

    def for_role(self, role: str, ids: Sequence[int]) -> tuple[list[int], np.ndarray]:
        """Ids as the model of a role reads them, and where each old position went (-1: dropped)."""
        spec = self.experiment.model(role)
        if spec.markers == "keep":
            return list(ids), np.arange(len(ids))
        replacement = spec.marker_replacement if spec.markers == "replace" else None
        return prompts.map_markers(ids, prompts.r1_markers(self.tokenizer), spec.markers, replacement)

    def architecture(self, role: str) -> ModelConfig:
        """Architecture of the model of a role, which is fetched if it is not here."""
        spec = self.experiment.model(role)
        return checkpoint.read_config(checkpoint.resolve(spec.path, spec.revision or None))

    def _check_models(self) -> None:
        """Finds, before any long work, what is wrong with one of the models or the tokenizer."""
        e = self.experiment
        to_do = {name for name in self.with_models.intersection(self.stages) if not self.done(name)}
        roles = (e.author,) if to_do == {"1-traces"} else e.roles
        _ = self.mesh  # refuses more devices than there are, before anything is fetched
        inputs.check_fetched(e, roles)
        for role in roles:
            not_read = () if e.model(role).markers == "keep" else prompts.r1_markers(self.tokenizer)
            inputs.check_vocabulary(role, self.architecture(role), self.tokenizer, not_read)
        if "5-analysis" in self.stages and not self.done("5-analysis"):
            try:
                keyword_ids(self.tokenizer, e.analysis.keywords)
            except ValueError as error:
                raise ValueError(f"analysis.keywords={e.analysis.keywords}: {error}") from error


def _has_gaps(annotations_file: Path) -> bool:
    """Whether a call about a trace got no answer that a later one may get."""
    return any(failure(annotation) in UNANSWERED for annotation in records.read_annotations(annotations_file))


def _chained(own: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Inputs of each stage, with the fingerprint of those of the stage before."""
    chained: dict[str, dict[str, Any]] = {}
    before = ""
    for name in STAGES:
        # Through JSON, so that what is compared is what is written.
        chained[name] = json.loads(json.dumps({**own[name], "earlier stages": before, "format": _FORMAT[name]}))
        before = store.fingerprint(chained[name])
    return chained


_BODIES: dict[str, Callable[[Run, Path], None]] = dict(
    zip(
        STAGES,
        (
            traces.make_traces,
            annotations.annotate,
            vectors.read_vectors,
            steering.steer,
            analysis.analyse,
            report.report,
        ),
        strict=True,
    )
)
