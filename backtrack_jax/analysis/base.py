"""What an analysis is: tables that it computes, the plots and sentences that it makes of them.

`analysis.registry.ANALYSES` lists them. An analysis that is added there computes its own tables when the stage runs
again, and none of the others': each is told apart by its name, version, settings, and what it reads of earlier stages.
"""

import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from backtrack_jax.analysis.claims import Claim
from backtrack_jax.analysis.plots import Plot
from backtrack_jax.analysis.results import Results
from backtrack_jax.config import Experiment, ModelSpec
from backtrack_jax.data.records import Annotation, Condition, Reply, Trace, pair_annotations
from backtrack_jax.extract import TokenTrace, WindowSums
from backtrack_jax.files.tables import Table
from backtrack_jax.intervention import Intervention
from backtrack_jax.models.config import ModelConfig
from backtrack_jax.models.decoder import Decoder
from backtrack_jax.models.tokenizer import Tokenizer
from backtrack_jax.readers import Reader
from backtrack_jax.vectors import SteeringVector


@dataclasses.dataclass(frozen=True)
class Material:
    """What analyses read: the results of the earlier stages, and the models.

    Attributes:
      experiment: what was asked for.
      tokenizer: of both models.
      model: gives the model of a role. One is held at a time, so ask for it only in `Analysis.of_role`.
      load: gives a model that plays no role, by its spec and a name for the user, in place of the one that is held.
      reader: gives how the model of a role reads texts.
      prompt_ids: gives the prompt that the model of a role is given for a problem's text, token ids with BOS.
      token_trace: gives a trace with its annotation as the model of a role reads it.
      intervention: gives the row of a condition for the first reply to a problem, by its id.
      traces: all traces.
      annotations: their labels; a trace may have none, and a judge may have failed on one (`records.failure`).
      labels: labels of sections that were read.
      vectors: (role, label) -> difference-of-means vector; none for a label whose windows were all dropped.
      sums: role -> window sums; `mean_norm` of them is the mean residual norm of every layer.
      replies: all steered replies.
      judge: labels traces, or replies as traces, as `analysis.judge` does; None if there is no such judge.
    """

    experiment: Experiment
    tokenizer: Tokenizer
    model: Callable[[str], Decoder]
    load: Callable[[ModelSpec, str], Decoder]
    reader: Callable[[str], Reader]
    prompt_ids: Callable[[str, str], list[int]]
    token_trace: Callable[[str, Trace, Annotation], TokenTrace]
    intervention: Callable[[Condition, str], Intervention]
    traces: Sequence[Trace]
    annotations: Sequence[Annotation]
    labels: Sequence[str]
    vectors: Mapping[tuple[str, str], SteeringVector]
    sums: Mapping[str, WindowSums]
    replies: Sequence[Reply]
    judge: Callable[[Sequence[Trace]], Sequence[Annotation]] | None

    @property
    def pairs(self) -> list[tuple[Trace, Annotation]]:
        """The annotated traces, each with its annotation."""
        return pair_annotations(self.traces, self.annotations)

    def contrast_of(self, label: str) -> str:
        """The group of D of a label's vector."""
        spec = self.experiment.vectors
        return spec.contrast if label == spec.label else "all"

    def length(self, role: str, layer: int, magnitude: float) -> float:
        """Norm of what a magnitude in `steering.unit` adds to the model of a role at a layer.

        Raises:
          ValueError: the unit is `kl`, in which every edit has a length of its own.
        """
        e = self.experiment
        if e.steering.unit == "kl":
            raise ValueError("steering.unit='kl' gives every edit a length of its own; this needs one for all")
        if e.steering.unit == "relative":
            return magnitude * float(self.sums[role].mean_norm[layer])
        if e.steering.unit == "raw":
            return magnitude * float(self.vectors[role, e.vectors.label].norms[layer])
        return magnitude

    def means_by_trace(
        self, role: str, ids: Sequence[str], label: str, layer: int
    ) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray]]:
        """Each trace's means over the windows of D+ and of D of a label, and how much it counts in each.

        The weighted means are those whose difference is the run's vector of the label.

        Args:
          role: of the model that read the traces.
          ids: of n traces.
          label: of D+.
          layer: one of `vectors.layers`; ValueError if it is not.

        Returns:
          [n, D] float32 each, NaN where a trace has no window; weights, [n] each.
        """
        spec, sums = self.experiment.vectors, self.sums[role]
        groups = (label, self.contrast_of(label))
        positive, contrast = (sums.means_by_trace(ids, group, layer) for group in groups)
        of_positive, of_contrast = (sums.weights_by_trace(ids, group, spec.estimator) for group in groups)
        return positive, contrast, (of_positive, of_contrast)


@dataclasses.dataclass(frozen=True)
class Planned:
    """The work ahead of one model, as far as a plan knows it: estimates and upper bounds.

    Attributes:
      experiment: what is asked for.
      conditions: under which they are sampled.
      replies: number of steered replies.
      reply_tokens: tokens of the longest of them, with its prompt.
      trace_tokens: of every trace, with its prompt.
    """

    experiment: Experiment
    conditions: int
    replies: int
    reply_tokens: int
    trace_tokens: Sequence[int]


@dataclasses.dataclass(frozen=True)
class Wanted:
    """Conditions that an analysis needs besides those of the sweeps: one entry of the language of `steering.kinds`.

    Attributes:
      target: role of the model that is steered.
      kind: what is done, as in `steering.kinds`.
      magnitudes: strengths, in `steering.unit`.
      sources: roles of the models that directions come from; those of `target` alone where it is empty. Does not matter
        for a kind that comes from no model's activations.
      layer: block; None for the first of `steering.layer`.
      limit: number of problems; 0 for `steering.limit`.
    """

    target: str
    kind: str
    magnitudes: tuple[float, ...]
    sources: tuple[str, ...] = ()
    layer: int | None = None
    limit: int = 0


class Analysis:
    """One analysis. A subclass overrides what it has: a table, a plot, a sentence.

    Attributes:
      name: of the analysis.
      version: a higher number makes this analysis run again, and no other.
      settings: config fields that its tables depend on, dotted, e.g. `analysis.folds`. Those of the stages whose
        results it reads need not be named; `analysis.judge` stands for all that labels by that judge depend on;
        `analysis.batch_size` must not matter.
      of_replies: whether it may read steered replies. Where it does not, a change of the sweep leaves its tables as
        they are.
      reads: names of analyses before it whose files it reads.
      tables: tables of the whole run, each written as `{table}.csv`.
      role_tables: tables of one model, each written as `{role}.{table}.csv`; a reader finds those of all roles joined.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    settings: ClassVar[tuple[str, ...]] = ()
    of_replies: ClassVar[bool] = True
    reads: ClassVar[tuple[str, ...]] = ()
    tables: ClassVar[tuple[str, ...]] = ()
    role_tables: ClassVar[tuple[str, ...]] = ()

    def asked(self, e: Experiment) -> bool:
        """Whether this config asks for it; nothing of it is computed or shown otherwise."""
        del e
        return True

    def conditions(self, e: Experiment) -> Sequence[Wanted]:
        """Conditions that stage 4 samples for it besides those of the sweeps; one that both ask for is sampled once."""
        del e
        return []

    def inputs(self, e: Experiment) -> dict[str, Any]:
        """Its settings with their values."""
        return {name: operator.attrgetter(name)(e) for name in self.settings}

    def files(self, e: Experiment) -> list[str]:
        """Names of the files of the whole run that it writes under this config."""
        del e
        return [f"{table}.csv" for table in self.tables]

    def role_files(self, role: str) -> list[str]:
        """Names of the files that it writes for the model of a role."""
        return [f"{role}.{table}.csv" for table in self.role_tables]

    def scratch(self, role: str) -> list[str]:
        """Names of files that hold unfinished work on the model of a role; the stage deletes them at its end."""
        del role
        return []

    def check(self, e: Experiment) -> None:
        """Refuses, before the first stage runs, what it needs beside the models of the experiment and cannot use."""
        del e

    def of_role(self, material: Material, role: str, folder: Path) -> dict[str, Table]:
        """Its tables of one role's model; the only place to ask for a model. Files other than tables it writes itself.

        Called for every role before `finish`, except for roles whose files exist already.

        Args:
          material: what there is to read.
          role: of the model.
          folder: where the files of all analyses are.
        """
        del material, role, folder
        return {}

    def finish(self, material: Material, folder: Path) -> dict[str, Table]:
        """Its tables of the whole run, from what `of_role` left or other material. Other files it writes itself."""
        del material, folder
        return {}

    def plots(self, r: Results) -> Sequence[Plot | None]:
        """Its figures; None for one whose conditions were not sampled."""
        del r
        return []

    def sentences(self, r: Results) -> Sequence[str]:
        """What it found, one finding a sentence, for the top of summary and page; empty where it was not measured."""
        del r
        return []

    def reference(self, r: Results) -> dict[str, str]:
        """Key of report/reference.json -> what this run gave in place of the paper's number, as text."""
        del r
        return {}

    def claims(self, r: Results) -> Sequence[Claim]:
        """Claims of the paper that its numbers settle, or leave open; none of what was not sampled."""
        del r
        return []

    def plan(self, planned: Planned) -> str:
        """What it asks of one model, in words; empty if it reads none."""
        del planned
        return ""

    def memory(self, planned: Planned, config: ModelConfig) -> dict[str, int]:
        """What that takes on each device besides the weights: name -> bytes."""
        del planned, config
        return {}


class Question(Analysis):
    """An analysis that runs only where `questions.ask` names it; its settings are the fields of `questions.{name}`."""

    def asked(self, e: Experiment) -> bool:
        """Whether `questions.ask` has its name."""
        return self.name in e.questions.ask

    def inputs(self, e: Experiment) -> dict[str, Any]:
        """Its settings with their values."""
        return super().inputs(e) | dataclasses.asdict(getattr(e.questions, self.name))


def asked(analyses: Sequence[Analysis], e: Experiment) -> list[Analysis]:
    """Those that a config asks for."""
    return [analysis for analysis in analyses if analysis.asked(e)]
