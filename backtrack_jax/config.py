"""An experiment as typed, unfrozen dataclasses, so that `--config.steering.layer=9` works and a misspelt name stops.

Strings are empty and numbers 0 where a field does not apply; every field says so. Nothing here imports JAX: reading and
checking a config is instant.
"""

import dataclasses
import math
import re
import sys
from collections.abc import Sequence
from typing import Any

from backtrack_jax.data import records
from backtrack_jax.data.records import LABELS, OTHER
from backtrack_jax.files.paths import local_path
from backtrack_jax.judges import keyword
from backtrack_jax.judges.openai.settings import OpenAISpec

ROLES = ("base", "reasoning")
ESTIMATORS = ("trace_mean", "token_mean")
UNITS = ("absolute", "relative", "raw")
CONTROLS = ("overall-mean", "noise", "self-amplification", "random", "shuffled")
VECTOR_SUFFIXES = (".safetensors", ".npz", ".gguf", ".pt")
REPLY_JUDGES = ("", "grammar", "openai")
JUDGES = ("released", "keyword", "grammar", "openai", "import", "released-or-keyword", "released-or-openai")


@dataclasses.dataclass
class ModelSpec:
    """One of the two models.

    Attributes:
      path: folder in Hugging Face's layout, hub id `owner/name`, `.gguf` file, Orbax folder, or
        `package:module/file.gguf` for a file inside an installed Python package.
      revision: of a hub id; empty for the newest.
      dtype: `bfloat16`, `float16` or `float32`: of weights and matrix-product inputs. Sums are float32 whatever it is.
      markers: what this model reads in the place of R1's turn and think tokens: `keep`, `replace`, `drop`.
      marker_replacement: the token id for `replace`; -1 otherwise.
    """

    path: str = ""
    revision: str = ""
    dtype: str = "bfloat16"
    markers: str = "keep"
    marker_replacement: int = -1


@dataclasses.dataclass
class PromptSpec:
    """How a problem is put to the models, see `models.prompts`.

    Attributes:
      format: `r1`, `chat` or `plain`.
      think: what follows R1's `<｜Assistant｜>`: `primed`, `generated` or `none`.
      system: system text for `r1` and `chat`; empty for none (`chat`: for the template's own).
    """

    format: str = "r1"
    think: str = "primed"
    system: str = ""


@dataclasses.dataclass
class TraceSpec:
    """Stage 1: where reasoning traces come from.

    Attributes:
      path: a file or folder of annotated chains in the released format, or a `.jsonl` of traces; `package:module/file`
        for one that ships with a package. Empty: the reasoning model samples them.
      stand_in: annotated chains that a run takes in the place of sampled traces if it reads vectors (stages 3-6): for
        a model that does not reason, and so has nothing to read in its own traces. Empty: vectors are read off the
        sampled traces. Stages 1 and 2 alone always sample.
      limit: take only so many traces (problems, when sampling), spread evenly over the file; 0 takes all.
      problems: for sampling, `.json` or `.jsonl` of problems; empty for the 300 that ship with the program.
      samples: replies per problem.
      temperature: of sampling; 0 is greedy.
      top_p: of sampling.
      max_new_tokens: limit of a reply.
      batch_size: rows sampled at once.
    """

    path: str = ""
    stand_in: str = ""
    limit: int = 0
    problems: str = ""
    samples: int = 1
    temperature: float = 0.7
    top_p: float = 1.0
    max_new_tokens: int = 500
    batch_size: int = 64


@dataclasses.dataclass
class AnnotationSpec:
    """Stage 2: who labels the sections of a trace.

    Attributes:
      judge: `released` (the labels that came with the traces), `keyword` (offline), `grammar` (exact, for traces of the
        small pair), `openai` (a language model behind an endpoint) or `import` (a file). `released-or-keyword` and
        `released-or-openai`: the labels that came with the traces where they are chains in the released format, the
        judge where they are sampled or come without labels.
      variant: of the keyword judge, see `judges.keyword`.
      path: for `import`, a JSONL of annotations with character spans.
      openai: the judge `openai`.
    """

    judge: str = "released"
    variant: str = "wait_hmm"
    path: str = ""
    openai: OpenAISpec = dataclasses.field(default_factory=OpenAISpec)


@dataclasses.dataclass
class VectorSpec:
    """Stage 3: what is read off the residual stream.

    Attributes:
      label: D+ of Eq. 3.
      contrast: D of Eq. 3: `all` sections (paper) or the `rest`. Vectors of other labels are against `all` of them.
      estimator: `trace_mean` (Eq. 3) or `token_mean` (the released script).
      window: first and last offset from a section's first token, both included.
      offsets: offsets whose sums are kept as well (Fig. 2).
      offset_window: what is read at an offset o: positions o + first to o + last; (0, 0) is the single position,
        (-1, 4) the six that the authors' sweep read at each of its offsets.
      layers: blocks (0-based) at which every trace's own mean is kept as well, for intervals and probes.
      into_prompt: whether a window may reach back into the prompt, as in the paper's code, or is dropped.
      batch_size: traces per forward pass.
    """

    label: str = "backtracking"
    contrast: str = "all"
    estimator: str = "trace_mean"
    window: tuple[int, int] = (-13, -8)
    offsets: tuple[int, ...] = tuple(range(-20, 4))
    offset_window: tuple[int, int] = (0, 0)
    layers: tuple[int, ...] = ()
    into_prompt: bool = False
    batch_size: int = 8

    def window_at(self, offset: int) -> tuple[int, int]:
        """The window that is read at an offset."""
        return offset + self.offset_window[0], offset + self.offset_window[1]


@dataclasses.dataclass
class SteeringSpec:
    """Stage 4: sampling with the residual stream changed.

    Attributes:
      kinds: what is added: a label's vector (D+ that label), or one of the controls `overall-mean`, `noise`,
        `self-amplification`, `random` (one fixed random direction), `shuffled` (D+ drawn at random from all sections,
        as many as there are of `vectors.label`), or a vector file that `vectors.load` reads, by its path. Each is added
        to every model, from every model's activations (Fig. 3). At one magnitude all that come from one model's
        activations are equally long, whatever the kind, and so are files, but for the unit `raw`.
      layer: output of which block (0-based) is changed, and where the vector was read.
      magnitudes: strengths; 0 is run once per model.
      baselines: further kinds, added only to the model that writes the traces, from its own activations (Fig. 4).
      offsets: of `vectors.offsets`, those whose vectors are added to that model as well (Fig. 2).
      layers: blocks at which the vectors of `vectors.label` of every model are added to that model as well (Fig. B.1).
      grid_magnitudes: strengths at `offsets` and `layers`; empty for `magnitudes`.
      grid_limit: number of problems at `offsets` and `layers`, at most `limit`; 0 for `limit`.
      unit: `absolute`: length of what is added; `relative`: share of the steered model's mean residual norm at that
        layer; `raw`: share of the norm that the difference of means of `vectors.label` was found with, or that a file's
        vector has, so that 1 adds it as it is.
      span: `all` positions (paper), `prompt`, or `generated` ones.
      limit: number of problems, spread evenly over those of the traces; 0 takes all.
      samples: replies per problem and condition.
      temperature: of sampling; 0 is greedy.
      top_p: of sampling.
      top_k: of sampling; 0 keeps all.
      max_new_tokens: limit of a reply.
      batch_size: rows sampled at once.
    """

    kinds: tuple[str, ...] = ("backtracking",)
    layer: int = 10
    magnitudes: tuple[float, ...] = (0.0, 4.0, 8.0, 12.0)
    baselines: tuple[str, ...] = ()
    offsets: tuple[int, ...] = ()
    layers: tuple[int, ...] = ()
    grid_magnitudes: tuple[float, ...] = ()
    grid_limit: int = 0
    unit: str = "absolute"
    span: str = "all"
    limit: int = 10
    samples: int = 1
    temperature: float = 0.7
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 128
    batch_size: int = 64

    @property
    def all_kinds(self) -> tuple[str, ...]:
        """Everything that is added anywhere, once."""
        return tuple(dict.fromkeys((*self.kinds, *self.baselines)))

    @property
    def vector_files(self) -> tuple[str, ...]:
        """The kinds that are files."""
        return tuple(kind for kind in self.all_kinds if is_vector_file(kind))


@dataclasses.dataclass
class AnalysisSpec:
    """Stages 5 and 6: what is measured and shown. Probes and split halves are taken at `vectors.layers`.

    Attributes:
      judge: who labels the sentences of steered replies beside the keywords: `openai` (as `annotations.openai` says) or
        `grammar` (exact, for the small pair); empty for nobody.
      keywords: lower-case; vocabulary items whose text contains one are those of Eq. 2.
      horizons: a token is positive if a section of `vectors.label` starts within so many tokens after it.
      positions: tokens of each trace that probes are fitted and scored on, drawn at random from the reply.
      folds: of problems; what is scored on one was fitted on the others.
      shown: traces that the report shows token by token.
      batch_size: sequences per forward pass.
    """

    judge: str = ""
    keywords: tuple[str, ...] = ("wait", "but")
    horizons: tuple[int, ...] = (13,)
    positions: int = 48
    folds: int = 5
    shown: int = 6
    batch_size: int = 16


@dataclasses.dataclass
class Experiment:
    """Everything that decides what a run computes.

    Attributes:
      name: of the run; its results go to `workdir/name`.
      workdir: folder for results.
      seed: of all sampling.
      data_parallel: copies of the model, among which the rows of a batch are divided.
      model_parallel: devices that each copy is spread over. Both at 1 use the default device alone.
      roles: which models take part: `base`, `reasoning` or both.
      tokenizer: where the tokenizer is; empty for the reasoning model's path (the base model's, if it is alone). Traces
        are tokenised once, and both models read the same ids.
      prompt: how a problem is put to the models.
      base: the pretrained model.
      reasoning: the finetuned model.
      traces: stage 1.
      annotations: stage 2.
      vectors: stage 3.
      steering: stage 4.
      analysis: stages 5 and 6.
    """

    name: str = "experiment"
    workdir: str = "results"
    seed: int = 0
    data_parallel: int = 1
    model_parallel: int = 1
    roles: tuple[str, ...] = ROLES
    tokenizer: str = ""
    prompt: PromptSpec = dataclasses.field(default_factory=PromptSpec)
    base: ModelSpec = dataclasses.field(default_factory=ModelSpec)
    reasoning: ModelSpec = dataclasses.field(default_factory=ModelSpec)
    traces: TraceSpec = dataclasses.field(default_factory=TraceSpec)
    annotations: AnnotationSpec = dataclasses.field(default_factory=AnnotationSpec)
    vectors: VectorSpec = dataclasses.field(default_factory=VectorSpec)
    steering: SteeringSpec = dataclasses.field(default_factory=SteeringSpec)
    analysis: AnalysisSpec = dataclasses.field(default_factory=AnalysisSpec)

    def model(self, role: str) -> ModelSpec:
        """The model that plays a role."""
        return {"base": self.base, "reasoning": self.reasoning}[role]

    @property
    def author(self) -> str:
        """Role of the model that samples traces where none are given: reasoning, or the base model if it is alone."""
        return "reasoning" if "reasoning" in self.roles else "base"

    def for_vectors(self) -> "Experiment":
        """The experiment as a run that reads vectors sees it: with `traces.stand_in` where traces would be sampled."""
        path = self.traces.path or self.traces.stand_in
        return dataclasses.replace(self, traces=dataclasses.replace(self.traces, path=path))

    @property
    def judge(self) -> str:
        """Who labels the traces, `released-or-...` resolved: `released`, `keyword`, `openai` or `import`."""
        first, _, otherwise = self.annotations.judge.partition("-or-")
        labelled = self.traces.path and records.is_released(local_path(self.traces.path))
        return otherwise if otherwise and not labelled else first

    @property
    def tokenizer_path(self) -> str:
        """Where the tokenizer is read from."""
        return self.tokenizer or self.model(self.author).path

    def shown_vectors(self, labels: Sequence[str]) -> list[str]:
        """Kinds of vectors that traces are shaded by: the experiment's label first, then the other labels."""
        return [self.vectors.label, *(label for label in labels if label != self.vectors.label)]


def is_vector_file(kind: str) -> bool:
    """Whether a kind of `steering.kinds` names a file, by its suffix."""
    return str(kind).endswith(VECTOR_SUFFIXES)


def check(experiment: Experiment) -> None:
    """Refuses an experiment that could not run, before any long work.

    Raises:
      ValueError: lists every field that is wrong, its value, and what is accepted.
    """
    e = experiment
    if faults := _type_faults(e):
        raise ValueError("the config cannot run:\n  " + "\n  ".join(faults))
    faults = [*_model_faults(e), *_source_faults(e), *_vector_faults(e), *_steering_faults(e), *_analysis_faults(e)]
    if not re.fullmatch(r"[^/\\\s.][^/\\]*", e.name):
        faults.append(_fault("name", e.name, "the name of a folder"))
    if not (isinstance(e.seed, int) and 0 <= e.seed < 2**32):
        faults.append(_fault("seed", e.seed, "0 to 2^32 - 1"))
    faults += _device_faults(e)
    if faults:
        raise ValueError("the config cannot run:\n  " + "\n  ".join(faults))


def check_windows(experiment: Experiment) -> None:
    """Refuses what stage 3 would only after the traces were sampled: windows that no reply of their length can hold.

    Raises:
      ValueError: lists every such window.
    """
    v, most = experiment.vectors, experiment.traces.max_new_tokens
    if experiment.traces.path:  # whose replies have any length
        return
    offsets = {f"steering.offsets={o}, which reads the window": v.window_at(o) for o in experiment.steering.offsets}
    faults = []
    for name, (first, last) in {"vectors.window": v.window, **offsets}.items():
        before, after = 0 if v.into_prompt else max(0, -first), max(0, last)
        if before + after >= most:
            faults.append(_fault(name, (first, last), f"one that replies of traces.max_new_tokens={most} can hold"))
    if faults:
        raise ValueError("no vector could be read:\n  " + "\n  ".join(faults))


def check_overrides(arguments: Sequence[str]) -> None:
    """Refuses what `check_override` does, and a list that is given twice: ValueError names it."""
    lists = [argument.lstrip("-").partition("=")[0] for argument in arguments if check_override(argument) is tuple]
    if twice := [name for name in lists if lists.count(name) > 1]:
        raise ValueError(f"--{twice[0]} is given {lists.count(twice[0])} times, expected once, as one list: 1,2")


def check_override(argument: str) -> type:
    """Refuses `--config.steering.layr=9`: ValueError names the fields that there are. Returns the type of the field."""
    names = re.match(r"--?(?:no)?config\.([^=]+)", argument)
    kind: type = Experiment
    for name in names[1].split(".") if names else ():
        fields = {field.name: field for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else {}
        if name not in fields:
            there = f"; there are {', '.join(fields)}" if fields else ""
            raise ValueError(f"{argument}: there is no field {name!r}{there}")
        made_by = fields[name].default_factory
        kind = made_by if isinstance(made_by, type) else type(fields[name].default)
    return kind


def _fault(field: str, value: object, accepted: str) -> str:
    return f"{field}={value!r}, expected {accepted}"


def _type_faults(spec: Any, prefix: str = "") -> list[str]:
    """Fields of another type than their defaults have, such as a tuple of one that lacks its comma."""
    accepted = {bool: bool, int: int, float: (int, float), str: str, tuple: tuple}
    meant = {tuple: "a tuple, such as (1, 2) or (1,)", str: "text", bool: "True or False", int: "an integer"}
    faults = []
    for field in dataclasses.fields(spec):
        value, name = getattr(spec, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            faults += _type_faults(value, f"{name}.")
        elif (kind := type(field.default)) in accepted and (
            not isinstance(value, accepted[kind]) or (isinstance(value, bool) and kind is not bool)
        ):
            faults.append(_fault(name, value, meant.get(kind, "a number")))
    return faults


def _not_one_of(field: str, value: str, accepted: Sequence[str]) -> list[str]:
    return [] if value in accepted else [_fault(field, value, f"one of {', '.join(accepted)}")]


def _repeated(field: str, values: Sequence[object]) -> list[str]:
    again = [value for at, value in enumerate(values) if value in values[:at]]  # no set: a list has no hash
    return [_fault(field, values, "every entry once")] if again else []


def _device_faults(e: Experiment) -> list[str]:
    copies = e.data_parallel
    faults = [
        _fault(field, value, "at least 1")
        for field, value in (("data_parallel", copies), ("model_parallel", e.model_parallel))
        if value < 1
    ]
    sizes = {name: getattr(e, name).batch_size for name in ("traces", "vectors", "steering", "analysis")}
    return faults + [
        _fault(f"{name}.batch_size", size, f"a multiple of data_parallel={copies}")
        for name, size in sizes.items()
        if copies > 1 and size % copies
    ]


def _model_faults(e: Experiment) -> list[str]:
    faults = _repeated("roles", e.roles)
    if not e.roles or any(role not in ROLES for role in e.roles):
        faults.append(_fault("roles", e.roles, f"some of {', '.join(ROLES)}"))
    for role in (role for role in ROLES if role in e.roles):
        model = e.model(role)
        if not model.path:
            faults.append(_fault(f"{role}.path", "", "a folder, hub id, .gguf file or package:module/file"))
        faults += _not_one_of(f"{role}.dtype", model.dtype, ("bfloat16", "float16", "float32"))
        faults += _not_one_of(f"{role}.markers", model.markers, ("keep", "replace", "drop"))
        if (model.marker_replacement >= 0) != (model.markers == "replace"):
            accepted = "a token id for markers='replace', -1 otherwise"
            faults.append(_fault(f"{role}.marker_replacement", model.marker_replacement, accepted))
        if model.markers != "keep" and e.prompt.format != "r1":
            faults.append(_fault(f"{role}.markers", model.markers, "'keep': only prompt.format='r1' has R1's markers"))
    return faults


def _source_faults(e: Experiment) -> list[str]:
    faults = _not_one_of("prompt.format", e.prompt.format, ("r1", "chat", "plain"))
    faults += _not_one_of("prompt.think", e.prompt.think, ("primed", "generated", "none"))
    if e.prompt.format == "plain" and e.prompt.system:
        faults.append(_fault("prompt.system", e.prompt.system, "'': prompt.format='plain' has no system text"))
    return [*faults, *_judge_faults(e), *_sampling_faults("traces", e.traces)]


def _judge_faults(e: Experiment) -> list[str]:
    faults = _not_one_of("annotations.judge", e.annotations.judge, JUDGES)
    if e.judge == "keyword":
        faults += _not_one_of("annotations.variant", e.annotations.variant, keyword.VARIANTS)
    if e.judge != "import" and e.annotations.path:
        accepted = "nothing, or annotations.judge='import', which alone reads it"
        faults.append(_fault("annotations.path", e.annotations.path, accepted))
    if e.judge == "import" and not e.annotations.path:
        faults.append(_fault("annotations.path", "", "a .jsonl of annotations, for annotations.judge='import'"))
    if e.judge == "released" and not e.traces.path:
        faults.append("annotations.judge='released' needs traces.path: sampled traces come without labels")
    if "openai" in (e.judge, e.analysis.judge):
        spec = e.annotations.openai
        for field, least in (("votes", 1), ("reask", 0)):
            if getattr(spec, field) < least:
                faults.append(_fault(f"annotations.openai.{field}", getattr(spec, field), f"at least {least}"))
        for make in (spec.prompt, spec.settings):
            try:
                make()
            except ValueError as error:
                faults.append(f"annotations.openai: {error}")
    return faults


def _sampling_faults(name: str, spec: TraceSpec | SteeringSpec) -> list[str]:
    faults = []
    if not 0 <= spec.temperature < math.inf:
        faults.append(_fault(f"{name}.temperature", spec.temperature, "a finite number >= 0"))
    if not 0 < spec.top_p <= 1:
        faults.append(_fault(f"{name}.top_p", spec.top_p, "a number above 0, at most 1"))
    for field, least in (("limit", 0), ("samples", 1), ("max_new_tokens", 1), ("batch_size", 1)):
        value = getattr(spec, field)
        if value < least:
            faults.append(_fault(f"{name}.{field}", value, f"at least {least}"))
    return faults


def _labels(e: Experiment) -> Sequence[str] | None:
    """Labels that the judge gives traces of which vectors are read; None where it may give any."""
    given = {"released": LABELS, "openai": LABELS, "keyword": ("backtracking", OTHER), "grammar": (*LABELS, OTHER)}
    return given.get(e.for_vectors().judge)


def _vector_faults(e: Experiment) -> list[str]:
    v, labels = e.vectors, _labels(e)
    faults = _not_one_of("vectors.estimator", v.estimator, ESTIMATORS)
    faults += _not_one_of("vectors.contrast", v.contrast, ("all", "rest"))
    faults += _not_one_of("vectors.label", v.label, labels) if labels else []
    if len(v.window) != 2 or not _integers(v.window) or v.window[0] > v.window[1]:
        faults.append(_fault("vectors.window", v.window, "(first, last), integers, first <= last"))
    if not _integers(v.offsets):
        faults.append(_fault("vectors.offsets", v.offsets, "integers"))
    if len(v.offset_window) != 2 or not _integers(v.offset_window) or v.offset_window[0] > v.offset_window[1]:
        faults.append(_fault("vectors.offset_window", v.offset_window, "(first, last), integers, first <= last"))
    if not _integers(v.layers) or any(layer < 0 for layer in v.layers):
        faults.append(_fault("vectors.layers", v.layers, "block numbers >= 0"))
    faults += [*_repeated("vectors.offsets", v.offsets), *_repeated("vectors.layers", v.layers)]
    if v.batch_size < 1:
        faults.append(_fault("vectors.batch_size", v.batch_size, "at least 1"))
    return faults


def _integers(values: Sequence[object]) -> bool:
    return all(type(value) is int for value in values)  # which True is not


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and abs(value) <= sys.float_info.max


def _steering_faults(e: Experiment) -> list[str]:
    s, labels = e.steering, _labels(e)
    faults = [] if s.kinds else [_fault("steering.kinds", s.kinds, "at least one")]
    for field, kinds in (("steering.kinds", s.kinds), ("steering.baselines", s.baselines)):
        faults += _repeated(field, kinds)
        for kind in kinds:
            if not isinstance(kind, str):
                faults.append(_fault(field, kind, "labels, controls and vector files, as text"))
            elif labels and not is_vector_file(kind):
                faults += _not_one_of(field, kind, (*labels, *CONTROLS, f"a file ({', '.join(VECTOR_SUFFIXES)})"))
    faults += _not_one_of("steering.unit", s.unit, UNITS)
    faults += _not_one_of("steering.span", s.span, ("all", "prompt", "generated"))
    if s.layer < 0:
        faults.append(_fault("steering.layer", s.layer, "a block number >= 0"))
    if not _integers(s.layers) or any(layer < 0 for layer in s.layers):
        faults.append(_fault("steering.layers", s.layers, "block numbers >= 0"))
    faults += [*_repeated("steering.layers", s.layers), *_repeated("steering.offsets", s.offsets)]
    if not _integers(s.offsets) or any(offset not in e.vectors.offsets for offset in s.offsets):
        faults.append(_fault("steering.offsets", s.offsets, f"some of vectors.offsets, {e.vectors.offsets}"))
    for field, magnitudes in (("magnitudes", s.magnitudes), ("grid_magnitudes", s.grid_magnitudes or s.magnitudes)):
        if not any(magnitudes) or not all(map(_finite, magnitudes)):
            faults.append(_fault(f"steering.{field}", magnitudes, "finite numbers, at least one of them not 0"))
        faults += _repeated(f"steering.{field}", magnitudes)
    swept = s.offsets or s.layers
    if s.grid_limit < 0 or (swept and s.limit and s.grid_limit > s.limit):
        accepted = "at least 0" + (f", at most steering.limit={s.limit}" if s.limit else "")
        faults.append(_fault("steering.grid_limit", s.grid_limit, accepted))
    if s.top_k < 0:
        faults.append(_fault("steering.top_k", s.top_k, "at least 0"))
    return faults + _sampling_faults("steering", s)


def _analysis_faults(e: Experiment) -> list[str]:
    a = e.analysis
    faults = _not_one_of("analysis.judge", a.judge, REPLY_JUDGES)
    if not a.keywords or not all(isinstance(word, str) and word and word == word.casefold() for word in a.keywords):
        faults.append(_fault("analysis.keywords", a.keywords, "lower-case words"))
    if not a.horizons or not _integers(a.horizons) or min(a.horizons) < 1:
        faults.append(_fault("analysis.horizons", a.horizons, "integers >= 1"))
    faults += _repeated("analysis.horizons", a.horizons)
    for field, least in (("positions", 1), ("folds", 2), ("shown", 1), ("batch_size", 1)):
        value = getattr(a, field)
        if value < least:
            faults.append(_fault(f"analysis.{field}", value, f"at least {least}"))
    return faults
