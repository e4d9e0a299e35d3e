"""An experiment as typed, unfrozen dataclasses, so that `--config.steering.layer=9` works and a misspelt name stops.

Strings are empty and numbers 0 where a field does not apply; every field says so. Types and documentation only, and
nothing but the standard library is imported here, so that reading a config is instant: `checks` says what may stand in
them.
"""

import dataclasses
from collections.abc import Sequence

from backtrack_jax.kinds import is_vector_file, parse

ROLES = ("base", "reasoning")
ESTIMATORS = ("trace_mean", "token_mean")
CONTRASTS = ("all", "rest", "trace")
UNITS = ("absolute", "relative", "raw", "kl")
FILTERS = ("boundary", "question")


@dataclasses.dataclass
class ModelSpec:
    """One of the two models.

    Attributes:
      path: folder in Hugging Face's layout, hub id `owner/name`, `.gguf` file, Orbax folder, or
        `package:module/file.gguf` for a file inside an installed Python package.
      revision: of a hub id; empty for the newest.
      dtype: `bfloat16`, `float16` or `float32`: of weights and matrix-product inputs. Sums are float32 whatever it is.
        `int8`: the blocks' matrices in 8 bits, all else in 16 (`models.quantized`); then of both models.
      markers: what this model reads in place of turn and think tokens (`models.markers`): `keep`, `replace`, `drop`.
      marker_replacement: the text for `replace`, one token of the experiment's tokenizer, such as ` ####`; else empty.
    """

    path: str = ""
    revision: str = ""
    dtype: str = "bfloat16"
    markers: str = "keep"
    marker_replacement: str = ""


@dataclasses.dataclass
class PromptSpec:
    """How a problem is put to the models, see `models.prompts`.

    Attributes:
      format: `r1`, `chat` or `plain`.
      think: what follows R1's `<｜Assistant｜>`: `primed`, `generated` or `none`.
      system: system text for `r1` and `chat`; empty for none (`chat`: for the template's own).
      template_arguments: for `chat`, JSON object of what the model's template asks for besides the messages, e.g.
        `{"enable_thinking": false}`; empty for none.
    """

    format: str = "r1"
    think: str = "primed"
    system: str = ""
    template_arguments: str = ""


@dataclasses.dataclass
class TraceSpec:
    """Stage 1: where reasoning traces come from.

    Attributes:
      path: a file or folder of annotated chains in the released format, or a `.jsonl` of traces; `package:module/file`
        for one that ships with a package. Empty: the reasoning model samples them.
      stand_in: annotated chains that a run takes in place of sampled traces if it reads vectors (stages 3-6): for
        a model that does not reason, and so has nothing to read in its own traces. Empty: vectors are read off the
        sampled traces. Stages 1 and 2 alone always sample.
      end_marks: texts that end the reasoning in these traces and in replies, beside those of `models.markers`, such as
        `</reasoning>`.
      limit: take only this many traces (problems, when sampling), spread evenly over the file; 0 takes all.
      problems: for sampling, `.json` or `.jsonl` of problems; empty for the 300 that ship with the program.
      samples: replies per problem.
      temperature: of sampling; 0 is greedy.
      top_p: of sampling.
      max_new_tokens: limit of a reply.
      batch_size: rows sampled at once.
    """

    path: str = ""
    stand_in: str = ""
    end_marks: tuple[str, ...] = ()
    limit: int = 0
    problems: str = ""
    samples: int = 1
    temperature: float = 0.7
    top_p: float = 1.0
    max_new_tokens: int = 500
    batch_size: int = 64


@dataclasses.dataclass
class OpenAISpec:
    """The online judge: any OpenAI-compatible endpoint, what every request asks of it, and the limits.

    Attributes:
      model: name at the endpoint; a dated snapshot gives the same labels next month, an alias may not.
      base_url: of the API, version included. Answers are kept by what was asked, not by address: for another server
        that gives its model the same name, name another `ledger`.
      key_variable: environment variable that holds the key, which is read from nowhere else.
      format: of the answers: `sentences` (numbered, answered by JSON) or `inline` (the paper's; five times as long).
      backtracking: definition of backtracking in the instructions, see `judges.openai.prompts.BACKTRACKING`.
      response_format: how `sentences` asks for JSON: `json_schema`, `json_object` or `none`.
      votes: answers per trace. With several, a section is kept if more than half of them have it (same label, same
        first character); it ends where the first of these answers ends it.
      reask: how often an unusable answer is asked for again. Each repetition is paid for and has its own ledger entry.
      temperature: of the judge; below 0 it is left out of the request, for models that refuse it.
      seed: of the judge, the number of the vote is added; below 0 it is left out.
      max_tokens: limit of an answer; 0 leaves it out.
      extra_body: JSON object of more fields of the request, e.g. `{"reasoning_effort": "low"}`; empty for none.
      concurrency: calls at the same time.
      request_timeout: seconds for one attempt, from connecting to the last byte.
      call_timeout: seconds for one call, all its attempts and pauses together; no attempt starts later.
      run_timeout: seconds after which no new call starts, in each stage of a run; 0 for no limit.
      max_retries: attempts after the first.
      backoff: seconds before the first retry, doubled for each further one; half of it is random.
      max_backoff: limit of that doubling in seconds; Retry-After may ask for more.
      input_price: US dollars per million tokens of prompts; 0 where prices are not known, then no cost is given.
      cached_price: the same for tokens that the provider served from its prefix cache; 0 takes `input_price`.
      output_price: the same for tokens of answers.
      max_cost: US dollars after which no new call starts, in each stage of a run that asks the judge; needs the prices.
        Calls in flight can exceed it. 0 for no limit.
      ledger: file of the answers that were paid for; empty for `judge-ledger.jsonl` in `workdir`, shared by all runs.
      allow_unanswered: whether the stage may end with calls that got no answer after all retries. Their traces are
        counted as failed then; else the run stops, and the same command asks for these alone.
    """

    model: str = "gpt-4o-2024-08-06"
    base_url: str = "https://api.openai.com/v1"
    key_variable: str = "OPENAI_API_KEY"
    format: str = "sentences"
    backtracking: str = "revise"
    response_format: str = "json_schema"
    votes: int = 1
    reask: int = 0
    temperature: float = 0.0
    seed: int = 0
    max_tokens: int = 4096
    extra_body: str = ""
    concurrency: int = 32
    request_timeout: float = 120.0
    call_timeout: float = 900.0
    run_timeout: float = 0.0
    max_retries: int = 8
    backoff: float = 1.0
    max_backoff: float = 60.0
    input_price: float = 0.0
    cached_price: float = 0.0
    output_price: float = 0.0
    max_cost: float = 0.0
    ledger: str = ""
    allow_unanswered: bool = False


@dataclasses.dataclass
class AnnotationSpec:
    """Stage 2: who labels the sections of a trace.

    Attributes:
      judge: `released` (the labels that came with the traces), `keyword` (offline), `grammar` (exact, for traces of the
        small pair), `openai` (a language model behind an endpoint) or `import` (a file). `released-or-keyword`,
        `released-or-grammar` and `released-or-openai`: the labels that came with the traces where they are chains in
        the released format, the judge where they are sampled or come without labels. `labelling` lists the judges.
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
      contrast: D of Eq. 3: `all` sections (paper), the `rest`, or all sections of each `trace` of which a window of D+
        is read, so that what sets such traces apart from others cancels. Vectors of other labels are against `all`.
      estimator: `trace_mean` (Eq. 3) or `token_mean` (the released script).
      window: first and last offset from a section's first token, both included.
      offsets: offsets whose sums are kept as well (Fig. 2).
      offset_window: what is read at an offset o: positions o + first to o + last; (0, 0) is the single position,
        (-1, 4) the six that the authors' sweep read at each of its offsets.
      layers: blocks (0-based) at which every section's own mean is kept as well, for intervals, probes and vectors of
        shuffled sections: 4 bytes times the width of the model for every section and block.
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
      kinds: what is done, one condition each. A label adds that label's vector (D+ of Eq. 3), and so does one of the
        controls: `overall-mean`, `noise`, `self-amplification`, `random` (a random direction, another one in every
        reply), `shuffled` (D+ drawn at random from all sections, as many as there are of `vectors.label`), or a vector
        file that `vectors.load` reads, by its path, or a row of the decoder of a sparse autoencoder, `folder#row`, at
        its layer. `backtracking + 0.5 * deduction` adds a sum: each direction is scaled to norm 1, weighted and summed,
        and the sum is scaled to norm 1 again (signs stand between spaces, since labels have hyphens).
        `docs/howto/steer.md` has the rest of the language: several edits, gates, subspaces. `ablate:` before either of
        them removes the component along the direction that would be added; see `magnitudes`. Each is done to every
        model, with directions from every model's activations (Fig. 3). At one magnitude all that come from one model's
        activations are equally long, whatever the kind, and so are files, but for the units `raw` and `kl`.
      layer: output of which block (0-based) is changed, and where the direction was read. An ablation changes the
        outputs of the later blocks as well, which would otherwise restore the component. Give several to have all of
        `kinds` at each of them; `baselines` and `offsets` are at the first, and figures, lens and probe are about it. A
        single number is accepted too.
      magnitudes: strengths, in `unit`; negative ones go the other way, and 0 is run once per model. For an ablation the
        share of the component that is removed, whatever the unit: 1 removes it all, a negative one adds to it.
      baselines: further kinds, done only to the model that writes the traces, from its own activations (Fig. 4).
      baseline_magnitudes: strengths of `baselines`; empty for `magnitudes`.
      offsets: of `vectors.offsets`, those whose vectors are added to that model as well (Fig. 2).
      layers: blocks at which the vectors of `vectors.label` of every model are added to that model as well (Fig. B.1).
      grid_magnitudes: strengths at `offsets` and `layers`; empty for `magnitudes`.
      grid_limit: number of problems at `offsets` and `layers`, at most `limit`; 0 for `limit`.
      unit: `absolute`: length of what is added; `relative`: share of the steered model's mean residual norm at that
        layer; `raw`: share of the norm that the difference of means of `vectors.label` was found with, or that the
        vector of a kind which is a file has, so that 1 adds it as it is; `kl`: what it costs, in nats per token, on the
        traces of problems that are not steered, for which the length of every condition is searched for.
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
    layer: tuple[int, ...] = (10,)
    magnitudes: tuple[float, ...] = (0.0, 4.0, 8.0, 12.0)
    baselines: tuple[str, ...] = ()
    baseline_magnitudes: tuple[float, ...] = ()
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
    def kind_layers(self) -> tuple[int, ...]:
        """The blocks at which `kinds` are done."""
        return (self.layer,) if isinstance(self.layer, int) else tuple(self.layer)

    @property
    def main_layer(self) -> int:
        """The block that figures, lens and probe are about: the first of `layer`."""
        return self.kind_layers[0]

    @property
    def all_kinds(self) -> tuple[str, ...]:
        """`kinds` and `baselines`, once."""
        return tuple(dict.fromkeys((*self.kinds, *self.baselines)))

    @property
    def vector_files(self) -> tuple[str, ...]:
        """The vector files that the kinds are made of."""
        return tuple(name for name in self.names if is_vector_file(name))

    @property
    def names(self) -> tuple[str, ...]:
        """The labels, controls and vector files that the kinds are made of, once."""
        return tuple(dict.fromkeys(name for kind in self.all_kinds for name in parse(kind).names))


@dataclasses.dataclass
class AnalysisSpec:
    """Stages 5 and 6: what is measured and shown. Probes and split halves are taken at `vectors.layers`.

    Attributes:
      judge: who labels the sentences of steered replies beside the keywords: `openai` (as `annotations.openai` says) or
        `grammar` (exact, for the small pair); empty for none.
      keywords: lower-case; vocabulary items whose text contains one are those of Eq. 2.
      horizons: a token is positive if a section of `vectors.label` starts within this many tokens after it.
      positions: tokens of each trace that probes are fitted and scored on, drawn at random from the reply.
      folds: of problems; what is scored on one was fitted on the others.
      shown: traces that the report shows token by token.
      forced_texts: texts of each kind, one a problem, on which the log-odds of the keywords are measured under every
        condition; 0 takes none.
      forced_sentences: how many sentences of each of them count, after the first one; 0 for all.
      examples: sections of `vectors.label` that the positive control of the log-odds shows a model first.
      batch_size: sequences per forward pass.
    """

    judge: str = ""
    keywords: tuple[str, ...] = ("wait", "but")
    horizons: tuple[int, ...] = (13,)
    positions: int = 48
    folds: int = 5
    shown: int = 6
    forced_texts: int = 80
    forced_sentences: int = 12
    examples: int = 8
    batch_size: int = 16


@dataclasses.dataclass
class StabilitySpec:
    """Which boundaries recur when the model that writes the traces goes on from the same prefix once more.

    Attributes:
      boundaries: sections of `vectors.label` whose prefixes are continued, at most, spread over problems; as many of
        other labels beside them. 0 takes all of the label.
      draws: continuations of each prefix, an even number: one half sorts boundaries, the other half scores them.
      tokens: limit of a continuation, of which the first sentence counts.
      filter_by: `boundary`: each by its own draws; `question`: by those of all boundaries of its problem.
      random: how often the boundaries are sorted at random, among those of the same third of a trace, for comparison;
        below 19, no difference can be told from chance.
      magnitude: of the vectors whose effects are compared, in `steering.unit`; 0 takes the smallest positive one of
        `steering.magnitudes`.
    """

    boundaries: int = 120
    draws: int = 10
    tokens: int = 24
    filter_by: str = "boundary"
    random: int = 19
    magnitude: float = 0.0


@dataclasses.dataclass
class TransferSpec:
    """Whether a vector of another family's base model, mapped into the model that writes the traces, acts there.

    Attributes:
      model: the other base model, of any width, which reads the same texts through its own tokenizer.
      tokenizer: where its tokenizer is; empty for the model's own path.
      prompt: how problems are put to it: `plain`, `chat` (its own template) or `r1`.
      layer: block (0-based) of it that is read; -1 takes that at the depth of `steering.layer`.
      held_out: share of the problems on which effects are measured; vectors and maps are of the others.
      positions: ends of words at which states of both models are paired, at most.
      rank: number of principal components that the orthogonal map and the anchors have left.
      anchors: paired positions whose states are the coordinates of the anchor map.
      replies: problems that are answered under the own vector, the best map's and that of shuffled pairs; 0 for none.
      magnitude: of all vectors, in `steering.unit`; 0 takes the smallest positive one of `steering.magnitudes`.
    """

    model: ModelSpec = dataclasses.field(default_factory=ModelSpec)
    tokenizer: str = ""
    prompt: str = "plain"
    layer: int = -1
    held_out: float = 1 / 3
    positions: int = 5000
    rank: int = 32
    anchors: int = 256
    replies: int = 80
    magnitude: float = 0.0


@dataclasses.dataclass
class SaeSpec:
    """Which features of a sparse autoencoder the vector is made of, and whether they act as it does.

    Attributes:
      path: folder of the autoencoder, as SAELens or Llama Scope writes it; see `sae_files`.
      top: rows of the decoder, those nearest to the vector by cosine, whose sum is compared with it.
      singles: how many of them are added one by one as well, from the nearest on.
      controls: sets of as many other rows, matched with them in keyword logit.
      magnitude: of all that is added, in `steering.unit`; 0 takes the largest of `steering.magnitudes`.
      traces: on which features' activations are read, spread over all; 0 takes all.
      listed: rows in the table by each of the three rankings.
    """

    path: str = ""
    top: int = 8
    singles: int = 3
    controls: int = 4
    magnitude: float = 0.0
    traces: int = 120
    listed: int = 20


@dataclasses.dataclass
class CompositionSpec:
    """Whether other directions contribute beside the vector, and whether they combine linearly with it.

    Attributes:
      magnitude: of all directions, in `steering.unit`; 0 takes the smallest positive one of `steering.magnitudes`.
      components: principal components of what is read before the label's sections, and as many of its differences
        between problems.
      pair: the direction that is added beside the vector on the grid, such as `deduction, own part`; empty for the one
        without a part along the vector that does most on half of the texts.
      random: directions drawn at random that the pair is compared with.
      ranks: of the spans of labels that are removed from later layers while the vector is added.
      subspaces: random ones that each span is compared with; for m ranks at least m / .05 - 1.
      ablated_texts: on which that is measured; 0 for all.
    """

    magnitude: float = 0.0
    components: int = 2
    pair: str = ""
    random: int = 20
    ranks: tuple[int, ...] = (1, 2, 4)
    subspaces: int = 59
    ablated_texts: int = 12


@dataclasses.dataclass
class OffsetsSpec:
    """Whether the advantage of one offset over another differs between groups of problems (category, difficulty).

    Attributes:
      chosen: the one, of `steering.offsets`.
      reference: the other one, of `steering.offsets`.
      magnitude: of their vectors, one of `steering.grid_magnitudes` (of `steering.magnitudes` where that is empty); 0
        takes the smallest positive one.
    """

    chosen: int = -12
    reference: int = 0
    magnitude: float = 0.0


@dataclasses.dataclass
class NoiseSpec:
    """Why Gaussian noise raises backtracking: rows of noise on given text, and in replies.

    Attributes:
      magnitude: of all noise and of the vector beside it, in `steering.unit`; 0 takes the largest at which baselines
        are added.
      draws: of the noise, on each text, at least 2; slopes are over these.
      seeds: directions that are frozen for the run, and random subspaces of the dimensions of `ranks`.
      ranks: dimensions of the principal components, first and last, and of the random subspaces inside of which noise
        is drawn.
      margin: within which two kinds of noise are called equivalent, in nats.
      burst: tokens of a reply, from its first one, that noise is added at and then no more.
      replies: problems that are answered under noise, at most; 0 for none.
    """

    magnitude: float = 0.0
    draws: int = 2
    seeds: int = 10
    ranks: tuple[int, ...] = (4, 32)
    margin: float = 0.02
    burst: int = 16
    replies: int = 80


@dataclasses.dataclass
class SideEffectsSpec:
    """What steering does beside backtracking: to answers, to the length of replies, to every other token.

    Attributes:
      margin: share of right answers that may be lost before answers are said to suffer.
      texts: replies of the unsteered model, one a problem, on which the divergence from it is measured; 0 takes all.
      magnitude: of the primary contrast, a positive one of `steering.magnitudes`; 0 takes the largest. A random
        direction is added at it too.
    """

    margin: float = 0.1
    texts: int = 80
    magnitude: float = 0.0


@dataclasses.dataclass
class QuestionsSpec:
    """The open questions: analyses that run where they are asked for. Each has a field with its settings.

    Attributes:
      ask: names of the questions, each the name of another field here; empty for none.
      composition: whether other directions contribute, and whether they combine linearly with the vector.
      offsets: whether the best offset differs between groups of problems.
      sae: which features of a sparse autoencoder the vector is made of.
      side_effects: what steering does to answers, to length and to every other token.
      stability: which boundaries recur from the same prefix, and what their vectors do.
      transfer: whether a vector of another family's base model acts, mapped into this one.
      noise: why Gaussian noise raises backtracking.
    """

    ask: tuple[str, ...] = ()
    composition: CompositionSpec = dataclasses.field(default_factory=CompositionSpec)
    offsets: OffsetsSpec = dataclasses.field(default_factory=OffsetsSpec)
    sae: SaeSpec = dataclasses.field(default_factory=SaeSpec)
    side_effects: SideEffectsSpec = dataclasses.field(default_factory=SideEffectsSpec)
    stability: StabilitySpec = dataclasses.field(default_factory=StabilitySpec)
    transfer: TransferSpec = dataclasses.field(default_factory=TransferSpec)
    noise: NoiseSpec = dataclasses.field(default_factory=NoiseSpec)

    @property
    def known(self) -> tuple[str, ...]:
        """All that can be asked."""
        return tuple(field.name for field in dataclasses.fields(self) if field.name != "ask")


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
      questions: what is asked beyond the paper's figures.
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
    questions: QuestionsSpec = dataclasses.field(default_factory=QuestionsSpec)

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
    def tokenizer_path(self) -> str:
        """Where the tokenizer is read from."""
        return self.tokenizer or self.model(self.author).path

    def shown_vectors(self, labels: Sequence[str]) -> list[str]:
        """Kinds of vectors that traces are shaded by: the experiment's label first, then the other labels."""
        return [self.vectors.label, *(label for label in labels if label != self.vectors.label)]
