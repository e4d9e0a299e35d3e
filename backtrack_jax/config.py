"""An experiment as typed, unfrozen dataclasses, so that `--config.steering.layer=9` works and a misspelt name stops.

Strings are empty and numbers 0 where a field does not apply; every field says so. Nothing here imports JAX: reading and
checking a config is instant.
"""

import dataclasses
import math

from backtrack_jax.data.records import LABELS, OTHER

ROLES = ("base", "reasoning")
ESTIMATORS = ("trace_mean", "token_mean")
UNITS = ("absolute", "relative", "raw")
CONTROLS = ("overall-mean", "noise", "self-amplification", "random")


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
    """How a problem is put to the models: `r1`, `chat` or `plain`, see `models.prompts`."""

    format: str = "r1"
    think: str = "primed"
    system: str = ""


@dataclasses.dataclass
class TraceSpec:
    """Stage 1: where reasoning traces come from.

    Attributes:
      path: a file or folder of annotated chains in the released format, or a `.jsonl` of traces; `package:module/file`
        for one that ships with a package. Empty: the reasoning model samples them.
      limit: take only so many traces (problems, when sampling), spread evenly over the file; 0 takes all.
      problems: for sampling, `.json` or `.jsonl` of problems; empty for the 300 that ship with the program.
      samples: replies per problem.
      temperature: of sampling; 0 is greedy.
      top_p: of sampling.
      max_new_tokens: limit of a reply.
      batch_size: rows sampled at once.
    """

    path: str = ""
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
      judge: `released` (the labels that came with the traces), `keyword` (offline) or `import` (a file).
      variant: of the keyword judge, see `judges.keyword`.
      path: for `import`, a JSONL of annotations with character spans.
    """

    judge: str = "released"
    variant: str = "wait_hmm"
    path: str = ""


@dataclasses.dataclass
class VectorSpec:
    """Stage 3: what is read off the residual stream.

    Attributes:
      label: D+ of Eq. 3.
      contrast: D of Eq. 3: `all` sections (paper) or the `rest`.
      estimator: `trace_mean` (Eq. 3) or `token_mean` (the released script).
      window: first and last offset from a section's first token, both included.
      offsets: single offsets whose sums are kept as well (Fig. 2).
      into_prompt: whether a window may reach back into the prompt, as in the paper's code, or is dropped.
      batch_size: traces per forward pass.
    """

    label: str = "backtracking"
    contrast: str = "all"
    estimator: str = "trace_mean"
    window: tuple[int, int] = (-13, -8)
    offsets: tuple[int, ...] = tuple(range(-20, 4))
    into_prompt: bool = False
    batch_size: int = 8


@dataclasses.dataclass
class SteeringSpec:
    """Stage 4: sampling with the residual stream changed.

    Attributes:
      kinds: what is added: a label's vector (D+ that label), or one of the controls `overall-mean`, `noise`,
        `self-amplification`, `random` (one fixed random direction). All have the norm of the magnitude.
      layer: output of which block (0-based) is changed, and where the vector was read.
      magnitudes: strengths; 0 is run once per model.
      unit: `absolute`: length of what is added; `relative`: share of the mean residual norm at that layer; `raw`:
        factor on the difference of means as it was found.
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
    unit: str = "absolute"
    span: str = "all"
    limit: int = 10
    samples: int = 1
    temperature: float = 0.7
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 128
    batch_size: int = 64


@dataclasses.dataclass
class Experiment:
    """Everything that decides what a run computes.

    Attributes:
      name: of the run; its results go to `workdir/name`.
      workdir: folder for results.
      seed: of all sampling.
      roles: which models take part: `base`, `reasoning` or both.
      tokenizer: where the tokenizer is; empty for the reasoning model's path (the base model's, if it is alone). Traces
        are tokenised once, and both models read the same ids.
      base: the pretrained model.
      reasoning: the finetuned model.
    """

    name: str = "experiment"
    workdir: str = "results"
    seed: int = 0
    roles: tuple[str, ...] = ROLES
    tokenizer: str = ""
    prompt: PromptSpec = dataclasses.field(default_factory=PromptSpec)
    base: ModelSpec = dataclasses.field(default_factory=ModelSpec)
    reasoning: ModelSpec = dataclasses.field(default_factory=ModelSpec)
    traces: TraceSpec = dataclasses.field(default_factory=TraceSpec)
    annotations: AnnotationSpec = dataclasses.field(default_factory=AnnotationSpec)
    vectors: VectorSpec = dataclasses.field(default_factory=VectorSpec)
    steering: SteeringSpec = dataclasses.field(default_factory=SteeringSpec)

    def model(self, role: str) -> ModelSpec:
        """The model that plays a role."""
        return {"base": self.base, "reasoning": self.reasoning}[role]

    @property
    def tokenizer_path(self) -> str:
        """Where the tokenizer is read from."""
        return self.tokenizer or self.model(self.roles[-1]).path


def check(experiment: Experiment) -> None:
    """Refuses an experiment that could not run, before any long work.

    Raises:
      ValueError: lists every field that is wrong, its value, and what is accepted.
    """
    faults: list[str] = []

    def require(holds: bool, field: str, value: object, accepted: str) -> None:
        if not holds:
            faults.append(f"{field}={value!r}, expected {accepted}")

    def one_of(field: str, value: str, accepted: tuple[str, ...]) -> None:
        require(value in accepted, field, value, f"one of {', '.join(accepted)}")

    e, s, v, t = experiment, experiment.steering, experiment.vectors, experiment.traces
    require(bool(e.roles) and set(e.roles) <= set(ROLES), "roles", e.roles, f"some of {', '.join(ROLES)}")
    for role in set(e.roles) & set(ROLES):
        require(bool(e.model(role).path), f"{role}.path", "", "a folder, hub id, .gguf file or package:module/file")
        one_of(f"{role}.dtype", e.model(role).dtype, ("bfloat16", "float16", "float32"))
        one_of(f"{role}.markers", e.model(role).markers, ("keep", "replace", "drop"))
    one_of("prompt.format", e.prompt.format, ("r1", "chat", "plain"))
    one_of("prompt.think", e.prompt.think, ("primed", "generated", "none"))
    one_of("annotations.judge", e.annotations.judge, ("released", "keyword", "import"))
    one_of("vectors.estimator", v.estimator, ESTIMATORS)
    one_of("vectors.contrast", v.contrast, ("all", "rest"))
    one_of("vectors.label", v.label, (*LABELS, OTHER))
    ordered = len(v.window) == 2 and v.window[0] <= v.window[-1]
    require(ordered, "vectors.window", v.window, "(first, last), first <= last")
    for kind in s.kinds:
        one_of("steering.kinds", kind, (*LABELS, OTHER, *CONTROLS))
    one_of("steering.unit", s.unit, UNITS)
    one_of("steering.span", s.span, ("all", "prompt", "generated"))
    require(s.layer >= 0, "steering.layer", s.layer, "a block number >= 0")
    finite = bool(s.magnitudes) and all(isinstance(m, int | float) and math.isfinite(m) for m in s.magnitudes)
    require(finite, "steering.magnitudes", s.magnitudes, "finite numbers")
    for name, spec in (("traces", t), ("steering", s)):
        require(spec.temperature >= 0, f"{name}.temperature", spec.temperature, "a number >= 0")
        require(0 < spec.top_p <= 1, f"{name}.top_p", spec.top_p, "a number above 0, at most 1")
        require(spec.samples > 0, f"{name}.samples", spec.samples, "at least 1")
        require(spec.limit >= 0, f"{name}.limit", spec.limit, "at least 0")
        require(spec.max_new_tokens > 0, f"{name}.max_new_tokens", spec.max_new_tokens, "at least 1")
    for name, size in (("traces", t.batch_size), ("vectors", v.batch_size), ("steering", s.batch_size)):
        require(size > 0, f"{name}.batch_size", size, "at least 1")
    if not t.path and "reasoning" not in e.roles and e.annotations.judge == "released":
        faults.append("annotations.judge='released' needs traces.path: sampled traces come without labels")
    if faults:
        raise ValueError("the config cannot run:\n  " + "\n  ".join(faults))
