"""Does it compute what it should? The user's own files, on the user's own device, before a long run.

    python -m backtrack_jax.selfcheck --config=configs/smollm2.py
    python -m backtrack_jax.selfcheck --config=FILE --json=selfcheck.json --config.base.dtype=int8

Prints a line for every check: pass, fail, or skipped and why; on how many rows; the largest difference and the bound it
must keep; what was compared with what. Exits with 1 if a check failed. Prompts are those of the config's own problems,
the shortest ones, each followed by the same few words of a reply; positions are those of these sequences, a few hundred
at most. A further check is a function and a line in `CHECKS`.

Bounds. A difference is the norm of what two ways of computing differ by over the norm of one of them, taken over all
rows and tokens: of the states after each block, of which the block that differs most counts, and of the logits less
their mean, which no probability depends on. With float32 weights it is at most `FLOAT32`, the tolerance of the tests
for a whole model. With 16-bit weights every factor of every product is rounded by half a step of the dtype at most, in
random directions, so that states differ from exact ones, or from others rounded elsewhere, by about a step: 0.4 to 1 %
as measured in bfloat16, where a step is 0.8 %. The bound is `STEPS_OF_DTYPE` of them. What these checks are for, a
wrong position, mask, layer or tensor, changes states by a good part of their norm; a wrong constant, such as the
epsilon of a norm, shows in float32 alone, `--config.base.dtype=float32`.
"""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax import lax

from backtrack_jax import compatibility, inputs
from backtrack_jax.checks import check
from backtrack_jax.config import ROLES, Experiment
from backtrack_jax.files import environment, store
from backtrack_jax.files.console import ends_in_one_line
from backtrack_jax.generate import GREEDY, compiled_generate, row_key
from backtrack_jax.intervention import Intervention, Span, add_vector, no_intervention, stack_rows, with_same_terms
from backtrack_jax.models import checkpoint, families, markers, ops, prompts
from backtrack_jax.models.batching import bucket, left_pad, right_pad
from backtrack_jax.models.config import ModelConfig
from backtrack_jax.models.decoder import BlockOutput, Decoder
from backtrack_jax.models.quantized import activation_dtype
from backtrack_jax.models.sharding import place_rows
from backtrack_jax.run import CONFIG, divide_cpu, parse_flags, silence_routine_messages
from backtrack_jax.stages.base import Context
from backtrack_jax.stages.estimates import problem_texts

ROWS, STEPS = 4, 16
"""Sequences that a model reads, and tokens of each that it is given one at a time."""

FLOAT32 = 1e-4
"""Bound of a difference with float32 weights."""

STEPS_OF_DTYPE = 4
"""Bound of a difference with 16-bit weights, in steps between neighbouring numbers of the dtype near 1."""

KL, AGREEMENT, COSINE = 0.1, 0.85, 0.98
"""Bounds of int8 against 16 bits, well beyond those of sound files (docs/measurements/int8.md)."""

_PROBLEMS = 100  # at most, whose prompts are looked at
_REPLY = (
    "Okay, let me see. First we add two and three, and that gives five. Wait, no, the second number was four, so the "
    "sum should be seven. Let me check it again."
)
_JSON = flags.DEFINE_string("json", "", "File to which the results are written as well, as JSON.")


@dataclasses.dataclass(frozen=True)
class Line:
    """What one check found.

    Attributes:
      status: `pass`, `fail` or `skipped`.
      compared: what was compared with what; of a check that failed or was skipped, why.
      rows: how many texts or sequences were compared.
      difference: the largest one, None where nothing was measured.
      bound: the largest that is accepted.
      check: name of the check.
      model: role of the model, empty for the tokenizer.
      seconds: that it took.
    """

    status: str
    compared: str
    rows: int = 0
    difference: float | None = None
    bound: float | None = None
    check: str = ""
    model: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        """A line of the table."""
        numbers = "" if self.difference is None else f"{self.difference:.1e} of {self.bound:.1e}"
        rows = str(self.rows or "")
        about = self.compared.replace("\n", " ")
        which = f"{self.status:<8} {self.model:<10} {self.check:<28}"
        return f"{which} {rows:>4} {numbers:<19} {self.seconds:>5.1f} s  {about}"


class Reading(NamedTuple):
    """What a model made of B sequences, at their last N tokens.

    Attributes:
      logits: [B, N, V] float32, of the tokenizer's ids, less their mean.
      states: [L, B, N, D] float32, the residual stream after every block.
      vectors: [L, D] float32, mean state over the reply's tokens less that over the prompt's, position 0 in neither.
    """

    logits: np.ndarray
    states: np.ndarray
    vectors: np.ndarray


class Subject:
    """A model of an experiment with what it is given.

    Attributes:
      context: of the experiment.
      role: of the model.
      problems: the texts that its prompts put to it.
    """

    def __init__(self, context: Context, role: str, problems: Sequence[str]):
        """Loads nothing yet."""
        self.context, self.role, self.problems = context, role, problems
        self.spec = context.experiment.model(role)
        self.layer = context.experiment.steering.main_layer

    @functools.cached_property
    def prompts(self) -> list[list[int]]:
        """The prompt of every problem."""
        return [self.context.prompt_ids(self.role, problem) for problem in self.problems]

    @functools.cached_property
    def sequences(self) -> list[list[int]]:
        """Prompts of different lengths, the shortest ones, each with `STEPS` tokens of a reply behind it."""
        of_length = {len(ids): ids for ids in reversed(self.prompts)}
        shortest = [of_length[length] for length in sorted(of_length)]
        copies = self.context.experiment.data_parallel
        reply = self.context.tokenizer.encode(_REPLY)[:STEPS]
        return [[*shortest[row % len(shortest)], *reply] for row in range(-(-ROWS // copies) * copies)]

    @property
    def width(self) -> int:
        """Columns of a padded batch of the sequences."""
        return bucket(max(map(len, self.sequences)))

    @functools.cached_property
    def config(self) -> ModelConfig:
        """Its architecture."""
        return self.context.architecture(self.role)

    @property
    def model(self) -> Decoder:
        """The model as the run has it."""
        return self.context.model(self.role)

    @functools.cached_property
    def plain(self) -> Reading:
        """What the model makes of the sequences, in one batch and without a cache."""
        return self.read(self.model, self.sequences)

    @functools.cached_property
    def model_in_16_bits(self) -> Decoder:
        """The model with the weights of which int8 ones were made; any other model as it is."""
        if self.spec.dtype != "int8":
            return self.model
        self.context.release()
        return checkpoint.load(self.spec.path, ops.half(), self.context.mesh, self.spec.revision or None)

    @functools.cached_property
    def plain_in_16_bits(self) -> Reading:
        """`plain` of `model_in_16_bits`."""
        return self.plain if self.spec.dtype != "int8" else self.read(self.model_in_16_bits, self.sequences)

    def release(self) -> None:
        """Lets go of the weights."""
        self.context.release()
        self.__dict__.pop("model_in_16_bits", None)

    def bound(self) -> float:
        """The largest difference that rounding accounts for."""
        eps = float(jnp.finfo(activation_dtype(self.spec.dtype)).eps)
        return FLOAT32 if eps < 1e-6 else STEPS_OF_DTYPE * eps

    @functools.cached_property
    def vector(self) -> np.ndarray:
        """[D], half as long as states at `steering.layer` are on the average."""
        length = np.linalg.norm(self.plain.states[self.layer], axis=-1).mean() / 2
        return length * np.asarray(_direction(self.config.d_model))

    def added(self, share: float, n_rows: int) -> Intervention:
        """Rows that add a share of `vector` at `steering.layer`, all positions; 0 adds nothing by the same program."""
        config = self.config
        vector = jnp.asarray(self.vector) if share else _direction(config.d_model)
        return stack_rows([add_vector(vector, self.layer, share, n_layers=config.n_layers)] * n_rows)

    @functools.cached_property
    def steered(self) -> Reading:
        """`plain` with `vector` added."""
        return self.read(self.model, self.sequences, share=1.0)

    @functools.cached_property
    def plain_by_steps(self) -> Reading:
        """`plain`, but that the last `STEPS` tokens come one by one, as in sampling."""
        return self._read_by_steps(0.0)

    @functools.cached_property
    def steered_by_steps(self) -> Reading:
        """`plain_by_steps` with `vector` added."""
        return self._read_by_steps(1.0)

    def read(
        self,
        model: Decoder,
        sequences: Sequence[Sequence[int]],
        *,
        share: float = 0.0,
        pad: Any = left_pad,
        more: int = 0,
    ) -> Reading:
        """What a model makes of sequences in one batch, without a cache.

        Args:
          model: `model` or `model_in_16_bits`.
          sequences: some of `sequences`.
          share: of `vector` that is added.
          pad: `left_pad` or `right_pad`.
          more: further columns of padding.
        """
        ids, positions = pad(sequences, self.width + more)
        ends = positions.argmax(axis=1)[:, None] + 1
        columns = ends + np.arange(-STEPS - 1, 0)
        replies = positions >= positions.max(axis=1, keepdims=True) + 1 - STEPS
        asked = (positions > 0) & ~replies
        weights = replies / replies.sum() - asked / max(asked.sum(), 1)
        rows = (ids, positions, columns.astype(np.int32), weights.astype(np.float32), self.added(share, len(sequences)))
        return self._reading(_read_whole(model, *place_rows(model, rows)))

    def _read_by_steps(self, share: float) -> Reading:
        model, steering = self.model, self.added(share, len(self.sequences))
        ids, positions = left_pad(self.sequences, self.width)
        logits, states = _read_by_steps(model, *place_rows(model, (ids, positions, steering)))
        return self._reading((logits, states, jnp.zeros(0)))

    def _reading(self, arrays: tuple[jax.Array, ...]) -> Reading:
        logits, states, vectors = map(np.asarray, jax.device_get(arrays))
        logits = logits[..., : self.context.tokenizer.vocab_size]
        return Reading(logits - logits.mean(axis=-1, keepdims=True), states, vectors)


@jax.jit
def _read_whole(
    model: Decoder, ids: jax.Array, positions: jax.Array, columns: jax.Array, weights: jax.Array, steering: Intervention
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Logits [B, N, V] and states [L, B, N, D] at some columns, and sums [L, D] of all states with weights [B, T]."""

    def at_columns(x: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, columns[..., None], axis=1)

    def capture(out: BlockOutput) -> tuple[jax.Array, jax.Array]:
        return at_columns(out.resid_post), jnp.einsum("bt,btd->d", weights, out.resid_post, precision="highest")

    out = model(ids, positions, intervention=steering, capture=capture)
    states, sums = out.captured
    return model.logits(at_columns(out.resid)), states, sums


@jax.jit
def _read_by_steps(
    model: Decoder, ids: jax.Array, positions: jax.Array, steering: Intervention
) -> tuple[jax.Array, jax.Array]:
    """Logits [B, N, V] and states [L, B, N - 1, D] of the last tokens, the first of which has its logits in prefill."""
    n = ids.shape[1] - STEPS
    prefill = model(ids[:, :n], positions[:, :n], intervention=steering)
    decoder, start = model.for_decoding(prefill.cache.extended(STEPS))

    def step(cache: Any, column: tuple[jax.Array, jax.Array]) -> tuple[Any, tuple[jax.Array, jax.Array]]:
        token, at = (x[:, None] for x in column)
        out = decoder(token, at, cache=cache, intervention=steering, capture=lambda block: block.resid_post[:, 0])
        return out.cache, (decoder.logits(out.resid[:, 0]), out.captured)

    _, (logits, states) = lax.scan(step, start, (ids[:, n:].T, positions[:, n:].T))
    logits = jnp.concatenate([model.logits(prefill.resid[:, -1])[None], logits])
    return jnp.moveaxis(logits, 0, 1), jnp.moveaxis(states, 0, 2)


def _direction(d_model: int) -> jax.Array:
    """[D], a random direction of norm 1."""
    direction = np.random.default_rng(0).standard_normal(d_model).astype(np.float32)
    return jnp.asarray(direction / np.linalg.norm(direction))


def _difference(ours: Reading, theirs: Reading) -> float:
    """The norm of the difference over that of `theirs`, of the logits or the layer that differs most."""
    n = min(ours.states.shape[2], theirs.states.shape[2])  # of single steps, prefill's token has logits alone
    pairs = [(ours.logits, theirs.logits), *zip(ours.states[:, :, -n:], theirs.states[:, :, -n:], strict=True)]
    return max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs)


def _within(compared: str, rows: int, difference: float, bound: float) -> Line:
    return Line("pass" if difference <= bound else "fail", compared, rows, difference, bound)  # NaN fails


def _skipped(reason: str) -> Line:
    return Line("skipped", reason)


def tokenizer(s: Subject) -> Line:
    """Texts and problems come back from their ids; known texts have the ids that their vocabulary gives them."""
    found = s.context.tokenizer  # refused if fixed texts do not come back, or have other ids than they should
    texts = [unicodedata.normalize("NFC", problem) for problem in s.problems]
    prompts.check_tokenizer(found, texts)
    golden = len(prompts.golden_ids(found))
    known = f"{golden} texts have the ids known of this vocabulary" if golden else "no ids of this vocabulary are known"
    return Line("pass", f"problems come back from their ids; {known}", len(texts))


def prompt_holds_problem(s: Subject) -> Line:
    """The text of every prompt has the problem in it."""

    def text_of(text: str) -> str:
        return unicodedata.normalize("NFC", text).strip()

    decoded = [text_of(s.context.tokenizer.decode(ids)) for ids in s.prompts]
    for problem, text in zip(s.problems, decoded, strict=True):
        if text_of(problem) not in text:
            return Line("fail", f"the problem {problem[:60]!r} is not in its prompt, {text[-200:]!r}", len(decoded))
    return Line("pass", "the decoded prompt has the problem's text in it", len(decoded))


def one_bos(s: Subject) -> Line:
    """BOS stands first and nowhere else."""
    bos = s.context.tokenizer.bos_id
    if bos is None:
        first = s.context.tokenizer.decode(s.prompts[0][:1])
        return _skipped(f"sequences of this tokenizer begin with no BOS; the first token is {first!r}")
    for problem, ids in zip(s.problems, s.prompts, strict=True):
        if (at := [place for place, token in enumerate(ids) if token == bos]) != [0]:
            return Line(
                "fail", f"the prompt of {problem[:60]!r} has BOS, id {bos}, at {at}, expected [0]", len(s.prompts)
            )
    return Line("pass", f"BOS, id {bos}, is at position 0 of every prompt and nowhere else", len(s.prompts))


def marks(s: Subject) -> Line:
    """Marks of turns and thinking are one token each, stay text in a problem, and are read as the config says."""
    t = s.context.tokenizer
    known = (*markers.TURNS, *markers.START_OF_THOUGHT, *markers.END_OF_THOUGHT)
    ids = {text: t.markers[text] for text in known if text in t.markers and t.markers[text] != t.bos_id}
    if not ids:
        return _skipped("no token of this tokenizer marks a turn or thinking")
    faults = [
        f"{text!r} is {t.encode(text)}, expected [{token}]" for text, token in ids.items() if t.encode(text) != [token]
    ]
    problem = s.problems[0]

    def count(text: str) -> int:
        return sum(token in ids.values() for token in prompts.prompt_ids(t, text, s.context.prompt))

    if count(f"{problem} {' '.join(ids)}") != count(problem):
        faults.append("a problem that quotes them has ids of them in its prompt, expected text")
    read = {token for prompt in s.prompts for token in prompt} & set(ids.values())
    if read and s.spec.markers != "keep":
        faults.append(f"the {s.role} model reads {sorted(read)}, expected none with markers={s.spec.markers!r}")
    there = f"{', '.join(ids)} are one id each, and text where a problem quotes them"
    said = {"keep": "", "drop": "; this model reads none of them"}.get(
        s.spec.markers, f"; this model reads {s.spec.marker_replacement!r} instead"
    )
    return Line("fail" if faults else "pass", "; ".join(faults) or there + said, len(ids))


def files(s: Subject) -> Line:
    """The checkpoint is understood in full, finite, and fits config and tokenizer."""
    e, config = s.context.experiment, s.config
    _ = s.model  # refused if a tensor is unknown, missing, misshapen or not finite
    compatibility.check_architectures(e, {s.role: config})
    not_read = compatibility.check_markers(e, s.role, config, s.context.tokenizer)
    compatibility.check_vocabulary(s.role, config, s.context.tokenizer, not_read)
    padding = config.vocab_size - s.context.tokenizer.vocab_size
    more = f", {padding} rows of the embedding beyond the tokenizer's ids" if padding > 0 else ""
    tied = "tied" if config.tied else "untied"
    return Line(
        "pass",
        f"{config.family}, {config.n_layers} blocks of width {config.d_model}, {config.n_parameters / 1e6:.4g} million "
        f"weights in {s.spec.dtype}, {tied}{more}: fits config and tokenizer",
    )


def batch_equals_single(s: Subject) -> Line:
    """A row of a batch has the states and logits that it has alone, padded more and on the other side."""
    # With as much padding as in the batch, padding that is attended to would change nothing.
    alone = [s.read(s.model, [sequence], pad=right_pad, more=64) for sequence in s.sequences]
    logits, states = (
        np.concatenate([one.logits for one in alone]),
        np.concatenate([one.states for one in alone], axis=1),
    )
    difference = _difference(s.plain, Reading(logits, states, s.plain.vectors))
    what = "states and logits: rows padded in front, in one batch, with each alone and padded behind"
    return _within(what, len(alone), difference, s.bound())


def cached_equals_uncached(s: Subject) -> Line:
    """Tokens one by one, with a cache, give what all give together; unsteered and steered."""
    pairs = ((s.plain_by_steps, s.plain), (s.steered_by_steps, s.steered))
    difference = max(_difference(by_steps, whole) for by_steps, whole in pairs)
    what = f"states and logits, unsteered and steered: {STEPS} tokens one by one behind a prompt with all at once"
    return _within(what, 2 * len(s.sequences), difference, s.bound())


def steering_reaches_every_step(s: Subject) -> Line:
    """What is added at the steering layer is there at every step of decoding, and no block before it changes."""
    added = s.steered_by_steps.states - s.plain_by_steps.states
    added[s.layer] -= s.vector
    difference = float(np.linalg.norm(added[: s.layer + 1], axis=-1).max() / np.linalg.norm(s.vector))
    what = f"the vector added, with what layer {s.layer} has more at each of {STEPS} steps, and nothing in those before"
    return _within(what, len(s.sequences), difference, FLOAT32)  # the residual stream has no other dtype


def sampling_follows_steering(s: Subject) -> Line:
    """Where a vector that leaves one token possible is added after the last block, that one is drawn."""
    model, n_rows = s.model, len(s.sequences)
    config, prompt = s.config, s.sequences[0][:-STEPS]
    vector = 1e4 * np.linalg.norm(s.plain.states[-1], axis=-1).mean() * _direction(config.d_model)
    vocab_size = s.context.tokenizer.vocab_size
    only = int(np.asarray(model.logits(jnp.asarray(vector)[None, None])).ravel()[:vocab_size].argmax())
    at = len(prompt)
    # Position p is that of the token that goes in; what comes out of prompt token P - 1 is reply token 0.
    spans: list[tuple[Span, range]] = [
        ("all", range(STEPS)),
        ("generated", range(1, STEPS)),
        ((at + 2, at + 5), range(3, 6)),
        ("prompt", range(1)),
    ]
    spans = [spans[row % len(spans)] for row in range(n_rows)]
    rows = [add_vector(vector, config.n_layers - 1, 1.0, n_layers=config.n_layers, span=span) for span, _ in spans]
    nothing = no_intervention(config.n_layers, config.d_model)
    unsteered, *rows = with_same_terms([nothing, *rows])
    ids, positions = left_pad([prompt] * n_rows, bucket(at))
    keys = jnp.stack([row_key(0, "selfcheck", 0)] * n_rows)
    replies = []
    for batch in ([unsteered] * n_rows, rows):
        out = compiled_generate(
            model,
            *place_rows(model, (ids, positions, keys, stack_rows(batch))),
            GREEDY,
            np.zeros(0, np.int32),
            max_new_tokens=STEPS,
            vocab_size=vocab_size,
        )
        if not np.asarray(out.finite).all():
            return Line("fail", "logits are not finite", n_rows)
        replies.append(np.asarray(out.ids))
    wrong = 0
    for (_, steered), expected, reply in zip(spans, *replies, strict=True):
        wrong += int(np.sum(reply[steered] != only)) + int(np.sum(reply[: steered.start] != expected[: steered.start]))
    named = s.context.tokenizer.decode([only])
    what = f"steps without {named!r}, all that steering leaves possible; spans all, generated, 3 positions, prompt"
    return _within(what, n_rows, wrong, 0)


def int8_like_16_bits(s: Subject) -> Line:
    """Weights of 8 bits: how far from the same model in 16."""
    if s.spec.dtype != "int8":
        return _skipped(f"the weights are {s.spec.dtype}, not int8")
    ours, theirs = s.plain, s.plain_in_16_bits
    kl = float(divergence(theirs.logits, ours.logits).mean())
    agreement = float(np.mean(ours.logits.argmax(-1) == theirs.logits.argmax(-1)))
    a, b = ours.vectors[s.layer], theirs.vectors[s.layer]
    cosine = float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    what = (
        f"with {ops.half().name}: KL {kl:.4f} nats a token (at most {KL}), argmax equal at {agreement:.1%} of "
        f"{ours.logits[..., 0].size} tokens (at least {AGREEMENT:.0%}), cosine of the vectors reply - prompt at layer "
        f"{s.layer} {cosine:.5f} (at least {COSINE})"
    )
    line = _within(what, len(s.sequences), kl, KL)
    return line if agreement >= AGREEMENT and cosine >= COSINE else dataclasses.replace(line, status="fail")


def divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(p || q) in nats of distributions given by logits [..., V], in float64: [...]."""
    p, q = (x.astype(np.float64) - np.logaddexp.reduce(x.astype(np.float64), -1, keepdims=True) for x in (p, q))
    return np.sum(np.exp(p) * (p - q), axis=-1)


def parity_with_torch(s: Subject) -> Line:
    """States and logits are those of Hugging Face's torch code with the same weights, in float32 on the CPU."""
    if absent := [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]:
        return _skipped(f"{absent[0]} is not installed")
    config, dtype = s.config, ops.half().name if s.spec.dtype == "int8" else s.spec.dtype
    needed, memory = 4 * config.n_parameters, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > 0.75 * memory:
        return _skipped(f"torch takes {needed / 1e9:.1f} GB for float32 weights, of {memory / 1e9:.1f} GB in all")
    ours = s.plain_in_16_bits
    path = checkpoint.resolve(s.spec.path, s.spec.revision or None)
    with tempfile.TemporaryDirectory() as copied:
        source = "files"
        if not any(path.glob("*.safetensors")):  # GGUF, Orbax: transformers reads one of them slowly, the other not
            if (free := shutil.disk_usage(copied).free) < needed:
                return _skipped(
                    f"a copy for torch takes up to {needed / 1e9:.1f} GB in {copied}, {free / 1e9:.1f} are free"
                )
            source, path = "weights as read here", Path(copied) / "model"
            checkpoint.save_hf(s.model_in_16_bits, path)
        s.release()
        states, logits = _in_torch(config.family, path, dtype, s.sequences)
    logits = logits[..., : ours.logits.shape[-1]]
    theirs = Reading(logits - logits.mean(axis=-1, keepdims=True), states, ours.vectors)
    difference = _difference(ours._replace(states=ours.states[:-1]), theirs)
    version = importlib.metadata.version("transformers")
    what = f"states and logits with those of transformers {version} in float32, each row alone, from the same {source}"
    return _within(what, len(s.sequences), difference, s.bound())


def _in_torch(family: str, path: Path, dtype: str, sequences: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """States [L - 1, B, N, D] after every block but the last, and logits [B, N, V], of torch's model.

    Its weights are of `dtype`, and widened to float32.

    Raises:
      ValueError: transformers has no such class of models.
    """
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    name = families.FAMILIES[family].architecture
    if not hasattr(transformers, name):
        raise ValueError(f"transformers {transformers.__version__} has no {name}; expected a version that has it")
    model = getattr(transformers, name).from_pretrained(
        str(path), dtype=getattr(torch, dtype), attn_implementation="eager", local_files_only=True
    )
    model = model.float().eval()
    states, logits = [], []
    for sequence in sequences:
        with torch.no_grad():
            out = model(torch.tensor([list(sequence)]), use_cache=False, output_hidden_states=True)
        logits.append(out.logits[0, -STEPS - 1 :].numpy())
        # The first is the embedding, the last is normed.
        states.append(np.stack([state[0, -STEPS - 1 :].numpy() for state in out.hidden_states[1:-1]]))
    return np.stack(states, axis=1), np.stack(logits)


class Check(NamedTuple):
    """One check.

    Attributes:
      name: in the table.
      run: the check.
      vital: whether those after it mean nothing if it fails: of this model, or, of the tokenizer, all.
    """

    name: str
    run: Callable[[Subject], Line]
    vital: bool = False


TOKENIZER = Check("tokenizer", tokenizer, vital=True)
"""Done once: both models read the ids of one tokenizer."""

CHECKS = (
    Check("prompt holds the problem", prompt_holds_problem, vital=True),
    Check("one BOS", one_bos),
    Check("markers", marks),
    Check("files", files, vital=True),
    Check("batch = single", batch_equals_single),
    Check("cached = uncached", cached_equals_uncached),
    Check("steering reaches every step", steering_reaches_every_step),
    Check("sampling follows steering", sampling_follows_steering),
    Check("int8 like 16 bits", int8_like_16_bits),
    Check("parity with torch", parity_with_torch),
)
"""Done with each model, in this order: the last ones let go of its weights."""


def run(e: Experiment) -> Iterator[Line]:
    """Runs all checks of an experiment's tokenizer and models, one model at a time.

    Args:
      e: the experiment.

    Yields:
      The result of each as it is known.

    Raises:
      ValueError, FileNotFoundError: the problems of the config cannot be read.
    """
    roles = tuple(role for role in ROLES if role in e.roles)
    e = dataclasses.replace(e.for_vectors(), roles=roles)
    context = Context(e, Path(e.workdir), "")
    problems = inputs.spread(list(problem_texts(e).values()), _PROBLEMS)
    line = _run(TOKENIZER, Subject(context, e.author, problems))
    yield dataclasses.replace(line, model="")
    failed_before = "" if line.status == "pass" else TOKENIZER.name
    for role in roles:
        failed = failed_before
        subject = Subject(context, role, problems)
        for one in CHECKS:
            if failed:
                yield dataclasses.replace(_skipped(f"{failed!r} failed"), check=one.name, model=role)
                continue
            line = _run(one, subject)
            yield line
            failed = one.name if one.vital and line.status == "fail" else ""
        subject.release()


def _run(one: Check, subject: Subject) -> Line:
    started = time.monotonic()
    try:
        line = one.run(subject)
    except (ValueError, OSError, FloatingPointError) as error:
        line = Line("fail", str(error))
    seconds = round(time.monotonic() - started, 1)
    return dataclasses.replace(line, check=one.name, model=subject.role, seconds=seconds)


def main(argv: Sequence[str]) -> None:
    """Checks the experiment that the flags describe; exits with 1 if a check fails."""
    silence_routine_messages()
    with ends_in_one_line(remedy="run it where more is free", resumed="nothing was changed"):
        if len(argv) > 1:
            raise ValueError(f"unexpected arguments {argv[1:]}; overrides look like --config.steering.layer=9")
        e: Experiment = CONFIG.value
        check(e)
        divide_cpu(e.data_parallel * e.model_parallel)
        lines = []
        for line in run(e):
            print(line, flush=True)
            lines.append(line)
        counts = {status: sum(line.status == status for line in lines) for status in ("pass", "fail", "skipped")}
        seconds = sum(line.seconds for line in lines)
        print(f"{counts['pass']} passed, {counts['fail']} failed, {counts['skipped']} skipped, in {seconds:.0f} s")
        if _JSON.value:
            found = {"passed": not counts["fail"], "config": dataclasses.asdict(e), **environment.describe()}
            found["checks"] = [dataclasses.asdict(line) for line in lines]
            store.write_text(Path(_JSON.value), json.dumps(found, indent=1) + "\n")
    if counts["fail"]:
        names = [f"{line.check} ({line.model or 'both models'})" for line in lines if line.status == "fail"]
        sys.exit(f"error: failed: {', '.join(names)}")


def console() -> None:
    """The command line."""
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=parse_flags)


if __name__ == "__main__":
    console()
