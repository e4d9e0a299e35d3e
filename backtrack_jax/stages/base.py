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

from backtrack_jax.config import Experiment, ModelSpec
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
from backtrack_jax.readers import Reader


class Context:
    """What the stages of one run share.

    Attributes:
      experiment: what is run, its roles in the order of `config.ROLES`.
      workdir: folder of the run's results.
      inputs: name of a stage -> its inputs, those of the stages before it included; set by the pipeline.
      last: name of the last stage that was asked for.
      redone: names of the stages whose finished results do not count, as they are to be computed anew.
      prompt: how problems are put to the models.
    """

    def __init__(self, experiment: Experiment, workdir: Path, last: str):
        """Looks at no file and computes nothing."""
        e = self.experiment = experiment
        self.workdir, self.last = workdir, last
        self.inputs: dict[str, dict[str, Any]] = {}
        self.redone: set[str] = set()
        arguments = json.loads(e.prompt.template_arguments or "{}")
        self.prompt = prompts.PromptFormat(e.prompt.format, e.prompt.think, e.prompt.system or None, arguments)
        self._models: dict[tuple[str, str, str], Decoder] = {}
        self._readers: dict[str, Reader] = {}

    def folder(self, stage: "Stage") -> Path:
        """Folder of a stage's results."""
        return stage.path(self.workdir)

    def finished(self, stage: "Stage") -> Path | None:
        """Folder of a stage that is complete under the present inputs, here or in a run beside this; None if not."""
        own = (self.workdir, stage.name, self.inputs[stage.name])
        if stage.name in self.redone:
            return None
        return store.peek(*own) or store.peek_beside(*own)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the experiment, checked on first use."""
        e = self.experiment
        revision = None if e.tokenizer else e.model(e.author).revision or None
        tokenizer = Tokenizer.load(checkpoint.resolve(e.tokenizer_path, revision, weights=False))
        prompts.check_tokenizer(tokenizer)
        return tokenizer

    def token_texts(self) -> list[str]:
        """Text of every id of the tokenizer."""
        return [self.tokenizer.decode([i]) for i in range(self.tokenizer.vocab_size)]

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
        return self.load(self.experiment.model(role), f"the {role} model")

    def load(self, spec: ModelSpec, what: str) -> Decoder:
        """Any model, in place of the one that is held, which is let go; `what` names it for the user."""
        key = (spec.path, spec.revision, spec.dtype)
        if key not in self._models:
            self._models.clear()
            config = checkpoint.read_config(checkpoint.resolve(spec.path, spec.revision or None))
            n, size = config.n_parameters, weight_bytes(config, spec.dtype) / 1e9
            say(f"  loading {what}, {spec.path}: {n / 1e6:.4g} million weights, {spec.dtype}, {size:.2f} GB")
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

    def reader(self, role: str) -> Reader:
        """How the model of a role reads texts."""
        if role not in self._readers:
            spec = self.experiment.model(role)
            self._readers[role] = Reader(self.tokenizer, self.prompt, spec.markers, spec.marker_replacement)
        return self._readers[role]

    def for_role(self, role: str, ids: Sequence[int]) -> tuple[list[int], np.ndarray]:
        """Ids as the model of a role reads them, and where each old position went (-1: dropped)."""
        return self.reader(role).for_model(ids)

    def prompt_ids(self, role: str, problem: str) -> list[int]:
        """The prompt that the model of a role is given for a problem, token ids with BOS."""
        return self.reader(role).prompt_ids(problem)

    def token_trace(
        self, role: str, trace: records.Trace, annotation: records.Annotation, drawn: Collection[int] = ()
    ) -> TokenTrace:
        """A trace as the model of a role reads it, with each section's first token; see `Reader.token_trace`."""
        return self.reader(role).token_trace(trace, annotation, drawn)


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
