"""What every stage is, and what it works with.

A `Stage` says what its results depend on, what it would do, and does it; `pipeline` runs a list of them and names none.
A `Context` holds what they share: the experiment, the folders, the tokenizer, one model at a time, the devices.
"""

import abc
import dataclasses
import functools
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
from jax.sharding import Mesh

from backtrack_jax.config import Experiment
from backtrack_jax.data import records
from backtrack_jax.extract import TokenTrace
from backtrack_jax.files import store
from backtrack_jax.files.console import say
from backtrack_jax.models import checkpoint, prompts
from backtrack_jax.models.config import ModelConfig
from backtrack_jax.models.decoder import Decoder
from backtrack_jax.models.quantized import weight_bytes
from backtrack_jax.models.sharding import make_mesh
from backtrack_jax.models.tokenizer import Tokenizer

SHUFFLED = "shuffled"
"""Label of the sections that the control of this name takes as D+."""


class Context:
    """What the stages of one run share.

    Attributes:
      experiment: what is run, its roles in the order of `config.ROLES`.
      workdir: folder of the run's results.
      inputs: name of a stage -> its inputs, those of the stages before it included; set by the pipeline.
      last: name of the last stage that was asked for.
      prompt: how problems are put to the models.
    """

    def __init__(self, experiment: Experiment, workdir: Path, last: str):
        """Looks at no file and computes nothing."""
        e = self.experiment = experiment
        self.workdir, self.last = workdir, last
        self.inputs: dict[str, dict[str, Any]] = {}
        arguments = json.loads(e.prompt.template_arguments or "{}")
        self.prompt = prompts.PromptFormat(e.prompt.format, e.prompt.think, e.prompt.system or None, arguments)
        self._models: dict[tuple[str, str, str], Decoder] = {}

    def folder(self, stage: "Stage") -> Path:
        """Folder of a stage's results."""
        return stage.path(self.workdir)

    def finished(self, stage: "Stage") -> Path | None:
        """Folder of a stage that is complete under the present inputs, in place or aside; None if it is not."""
        return store.peek(self.workdir, stage.name, self.inputs[stage.name])

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
          ValueError: there are not that many.
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
            config = self.architecture(role)
            n, size = config.n_parameters, weight_bytes(config, spec.dtype) / 1e9
            say(f"  loading the {role} model, {spec.path}: {n / 1e6:.4g} million weights, {spec.dtype}, {size:.2f} GB")
            revision = spec.revision or None
            self._models[key] = checkpoint.load(spec.path, revision=revision, dtype=spec.dtype, mesh=self.mesh)
        return self._models[key]

    def release(self) -> None:
        """Lets go of the model that is held, where the memory is needed for something else."""
        self._models.clear()

    def roles_by_need(self) -> list[str]:
        """Roles, the one whose model is held first, so that it is not loaded again."""
        held = {path for path, _, _ in self._models}
        return sorted(self.experiment.roles, key=lambda role: self.experiment.model(role).path not in held)

    def architecture(self, role: str) -> ModelConfig:
        """Architecture of the model of a role, which is fetched if it is not here."""
        spec = self.experiment.model(role)
        return checkpoint.read_config(checkpoint.resolve(spec.path, spec.revision or None))

    def for_role(self, role: str, ids: Sequence[int]) -> tuple[list[int], np.ndarray]:
        """Ids as the model of a role reads them, and where each old position went (-1: dropped)."""
        spec = self.experiment.model(role)
        if spec.markers == "keep":
            return list(ids), np.arange(len(ids))
        return prompts.map_markers(ids, self._markers, spec.markers, self._replacements[role])

    @functools.cached_property
    def _markers(self) -> tuple[int, ...]:
        return prompts.marker_ids(self.tokenizer)

    @functools.cached_property
    def _replacements(self) -> dict[str, int | None]:
        """Role -> id of the token that the model reads in place of markers; None if it reads none."""
        texts = {role: self.experiment.model(role).marker_replacement for role in self.experiment.roles}
        return {role: prompts.replacement_id(self.tokenizer, text) if text else None for role, text in texts.items()}

    def prompt_ids(self, role: str, problem: str) -> list[int]:
        """The prompt that the model of a role is given for a problem, token ids with BOS."""
        return self.for_role(role, prompts.prompt_ids(self.tokenizer, problem, self.prompt))[0]

    def encoded(self, trace: records.Trace) -> prompts.EncodedTrace:
        """A trace as token ids, before a role's markers are changed; ValueError names one that cannot be encoded."""
        try:
            return prompts.encode_trace(
                self.tokenizer,
                trace.problem,
                trace.text,
                self.prompt,
                token_ids=trace.token_ids,
                end_marks=trace.end_marks,
            )
        except ValueError as error:
            raise ValueError(f"trace {trace.id!r}: {error}") from error

    def token_trace(
        self, role: str, trace: records.Trace, annotation: records.Annotation, drawn: Collection[int] = ()
    ) -> TokenTrace:
        """A trace as the model of a role reads it, with each section's first token.

        Args:
          role: of the model.
          trace: the trace.
          annotation: its sections.
          drawn: numbers of the sections that have the label `SHUFFLED` as well.

        Raises:
          ValueError: names the trace that cannot be encoded, and why.
        """
        encoded = self.encoded(trace)
        ids, index = self.for_role(role, encoded.ids)
        places = [_first_token(trace.text, encoded, index, section) for section in annotation.sections]
        placed = [(section.label, at) for section, at in zip(annotation.sections, places, strict=True)]
        placed += [(SHUFFLED, places[number]) for number in sorted(drawn)]
        starts = [(label, at) for label, at in placed if at is not None]
        reply_start = int(np.sum(index[: encoded.reply_start] >= 0))
        return TokenTrace(trace.id, ids, reply_start, starts)


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


Settled = Callable[[Mapping[str, Any]], Path | None]
"""Folder of the stage's results that are complete under given inputs, None if there are none."""


class Stage(abc.ABC):
    """One step of an experiment, with a folder of its own.

    Attributes:
      name: of the stage and its folder, a number and a word.
      format: of its artifacts and of what a seed draws; a higher number makes this stage and those after it run again.
      reads_vectors: whether it, or a stage before it, reads activations: traces are then those that vectors are read
        off (`traces.stand_in`).
      page: the file that a reader opens first, if it has one.
    """

    name: ClassVar[str]
    format: ClassVar[int] = 3
    reads_vectors: ClassVar[bool] = True
    page: ClassVar[str] = ""

    @abc.abstractmethod
    def inputs(self, e: Experiment) -> dict[str, Any]:
        """What the results depend on besides the stages before, as JSON values: config, and files by content."""

    @abc.abstractmethod
    def plan(self, context: Context) -> list[str]:
        """What the stage would do, line by line: rows, tokens, memory, cost. Computes nothing."""

    @abc.abstractmethod
    def run(self, context: Context, folder: Path) -> None:
        """Does the work. What a killed run left in the folder is used, and the result is the same."""

    def settle(self, e: Experiment, own: dict[str, Any], found: Settled) -> dict[str, Any]:
        """The inputs that hold where more than one set of them may; `own` unless a stage says otherwise."""
        del e, found
        return own

    def model_roles(self, e: Experiment) -> Sequence[str]:
        """Roles of the models that it reads or samples with; none by default."""
        del e
        return ()

    def prepare(self, context: Context) -> None:
        """Refuses, before the first stage runs and any model is looked at, what would stop this one."""
        del context

    def check(self, context: Context) -> None:
        """The same, once models and tokenizer are here and checked."""
        del context

    def notes(self, context: Context) -> list[str]:
        """What a user may not expect, said before the first stage runs."""
        del context
        return []

    def mark_stale(self, folder: Path, reason: str) -> None:
        """Shows in the file that a reader opens that it is out of date, or, with an empty reason, that it is not."""
        del folder, reason

    def path(self, workdir: Path) -> Path:
        """Its folder."""
        return workdir / self.name


def spec_values(spec: Any, *left_out: str) -> dict[str, Any]:
    """Fields of a spec but for some; numbers as the field has them, so that 0 and 0.0 are the same magnitude."""
    kept = [field for field in dataclasses.fields(spec) if field.name not in left_out]
    return {field.name: _as_declared(field.type, getattr(spec, field.name)) for field in kept}


def _as_declared(kind: Any, value: Any) -> Any:
    if kind is float:
        return float(value)
    return [float(item) for item in value] if kind == tuple[float, ...] else value
