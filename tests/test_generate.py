"""Generation against torch with a hook, against itself without a cache, alone, and in other company.

Shapes are few on purpose: most tests run the one program that `generate_rows` compiles for prompts of up to 64 tokens.
"""

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from backtrack_jax import generate as generate_module
from backtrack_jax import sampling as sampling_module
from backtrack_jax.generate import (
    Completion,
    Generated,
    Row,
    Sampling,
    compiled_generate,
    generate,
    generate_rows,
    generate_text,
    noise_key,
    row_key,
    sample,
)
from backtrack_jax.intervention import (
    Add,
    Intervention,
    Span,
    ablate,
    add_vector,
    gaussian_noise,
    no_intervention,
    self_amplify,
    stack_rows,
    with_same_terms,
)
from backtrack_jax.models import checkpoint, ops
from backtrack_jax.models.batching import batches, left_pad, right_pad
from backtrack_jax.models.decoder import Decoder
from backtrack_jax.models.tokenizer import Tokenizer

pytest.importorskip("torch", reason="needs torch and transformers to compare with")

import torch
import transformers
from torch_reference import CONFIG, added, tiny_llama, torch_copy, torch_logits, unit_vectors

pytestmark = pytest.mark.hf

L, D, V = CONFIG.n_layers, CONFIG.d_model, CONFIG.vocab_size
B, T, G = 6, 64, 10
NEVER = (-1, -1)  # stop ids that no token has
GREEDY = Sampling()
PROMPTS = [np.random.default_rng(n).integers(0, V, n).tolist() for n in (5, 12, 1, 9, 7, 3)]
VECTORS = unit_vectors(3, D)
# Layer, length, span by name, the same span in positions. The last one starts in the prompt and ends in the reply.
CONDITIONS = [
    (1, 0.0, "all", (0, 99)),
    (0, 8.0, "all", (0, 99)),
    (2, -20.0, "all", (0, 99)),
    (1, 12.0, "prompt", (0, 9)),
    (1, 12.0, "generated", (7, 99)),
    (1, 12.0, (1, 7), (1, 7)),
]
MODEL = tiny_llama()


def steered(layer: int, length: float, span: Span = "all") -> Intervention:
    return add_vector(VECTORS[layer], layer, length, n_layers=L, span=span)


NOTHING = no_intervention(L, D)
STEERED = [steered(*condition[:3]) for condition in CONDITIONS]
KEYS = [row_key(0, "problem", i) for i in range(B)]
NOISY = [
    gaussian_noise(1, 9.0, noise_key(KEYS[0]), n_layers=L, d_model=D),
    gaussian_noise(0, 5.0, noise_key(KEYS[1]), n_layers=L, d_model=D, span="generated"),
    gaussian_noise(2, 9.0, noise_key(KEYS[2]), n_layers=L, d_model=D) + steered(1, 6.0),
    self_amplify(1, 15.0, n_layers=L, d_model=D),
    ablate(VECTORS[1], n_layers=L) + steered(1, 4.0),
    gaussian_noise(1, 9.0, noise_key(KEYS[5]), n_layers=L, d_model=D, span=(2, 6)),
]


def n_programs() -> int:
    """How often `compiled_generate` has been compiled."""
    return compiled_generate._cache_size()  # pyright: ignore[reportAttributeAccessIssue]


def run(
    prompts: Sequence[Sequence[int]],
    interventions: Sequence[Intervention],
    sampling: Sampling = GREEDY,
    stop_ids: Sequence[int] = NEVER,
    keys: Sequence[jax.Array] = KEYS,
    padded: int = T,
    model: Decoder = MODEL,
) -> Generated:
    """`compiled_generate` with arguments of the types that `generate_rows` gives it, so both share one program."""
    ids, positions = left_pad(prompts, padded)
    out = compiled_generate(
        model,
        ids,
        positions,
        jnp.stack(list(keys)),
        stack_rows(interventions),
        sampling,
        np.array(stop_ids, np.int32),
        max_new_tokens=G,
    )
    return jax.device_get(out)


Seen = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Recorded(Intervention):
    """An intervention that tells, at run time, what it does to every block's output."""

    seen: Seen = dataclasses.field(metadata={"static": True})

    def apply(self, x: jax.Array, at_layer: Any, layer: jax.Array, positions: jax.Array) -> jax.Array:
        after = super().apply(x, at_layer, layer, positions)
        jax.debug.callback(self.seen, layer, positions, x, after)
        return after


class Recorder:
    """Runs `generate` and notes every position that a pass changes and the logits of every step."""

    def __init__(self) -> None:
        self.changes: list[tuple[int, np.ndarray, np.ndarray]] = []  # layer, positions [B, T], changed [B, T]
        self.resid: dict[int, np.ndarray] = {}  # step -> [B, D] float32, what the step's token is sampled from
        self._n_prompt = np.zeros(B, np.int32)
        self._logits = jax.jit(MODEL.logits)

    def note(self, layer: jax.Array, positions: jax.Array, before: jax.Array, after: jax.Array) -> None:
        """One block's output in one pass."""
        at, resid = np.asarray(positions), np.asarray(after)
        self.changes.append((int(layer), at, np.any(np.asarray(before) != resid, axis=-1)))
        if int(layer) == L - 1:
            step = int(np.max(np.max(at, axis=1) + 1 - self._n_prompt))
            self.resid[step] = np.take_along_axis(resid, np.argmax(at, axis=1)[:, None, None], axis=1)[:, 0]

    def __call__(
        self,
        interventions: Sequence[Intervention],
        temperature: Sequence[float] = (0.0,) * B,
        stop_ids: Sequence[int] = NEVER,
        prompts: Sequence[Sequence[int]] = PROMPTS,
    ) -> np.ndarray:
        """The replies' ids; `changes` and `resid` then hold what happened."""
        self.changes.clear()
        self.resid.clear()
        self._n_prompt = np.array([len(prompt) for prompt in prompts])
        rows = stack_rows(interventions)
        recorded = Recorded(rows.terms, rows.span, rows.key, rows.n_layers, rows.d_model, self.note)
        ids, positions = left_pad(prompts, T)
        sampling = Sampling(jnp.array(temperature, jnp.float32))
        stop = np.array(stop_ids, np.int32)
        out = compiled_generate(MODEL, ids, positions, jnp.stack(KEYS), recorded, sampling, stop, max_new_tokens=G)
        jax.block_until_ready(out)
        jax.effects_barrier()
        return np.asarray(out.ids)

    @property
    def logits(self) -> np.ndarray:
        """[steps, B, V] float32."""
        return np.asarray(self._logits(np.stack([self.resid[step] for step in range(len(self.resid))])))

    def changed_positions(self, row: int) -> list[tuple[int, int]]:
        """(layer, position) of every change to a row, sorted; twice where it was changed twice."""
        return sorted(
            (layer, int(position))
            for layer, positions, changed in self.changes
            for position in positions[row][changed[row]]
        )


@pytest.fixture(scope="module")
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture(scope="module")
def reference() -> transformers.LlamaForCausalLM:
    return torch_copy(MODEL)


@jax.jit
def forward(model: Decoder, ids: jax.Array, positions: jax.Array, intervention: Intervention | None) -> jax.Array:
    """Logits [B, T, V] of one pass without a cache."""
    return model.logits(model(ids, positions, intervention=intervention).resid)


def uncached_logits(replies: np.ndarray, interventions: Sequence[Intervention], model: Decoder = MODEL) -> np.ndarray:
    """Logits of one pass over prompts and replies, at the positions that the replies were sampled from: [G, B, V]."""
    lengths = np.array([len(prompt) for prompt in PROMPTS])
    ids, positions = right_pad([p + r.tolist()[:-1] for p, r in zip(PROMPTS, replies, strict=True)], 24)
    out = forward(model, ids, positions, stack_rows(interventions).resolve(jnp.array(lengths)))
    return np.stack([out[np.arange(B), lengths - 1 + step] for step in range(G)])


def test_every_step_equals_torch_with_a_hook(recorder: Recorder, reference: transformers.LlamaForCausalLM) -> None:
    """T12, T13: ragged prompts, six spans and magnitudes in one batch, each against a full pass of its row alone."""
    replies = recorder(STEERED)
    for row, (layer, magnitude, _, span) in enumerate(CONDITIONS):
        text = PROMPTS[row] + replies[row].tolist()
        with added(reference, layer, magnitude * np.asarray(VECTORS[layer]), span):
            expected = torch_logits(reference, text[:-1])[len(PROMPTS[row]) - 1 :]
        np.testing.assert_allclose(recorder.logits[:, row], expected, atol=1e-4, err_msg=f"row {row}")
        shortfall = expected.max(-1) - expected[np.arange(G), replies[row]]
        assert (shortfall < 1e-4).all(), "the reply is the most likely token of every step"


def test_texts_vary_between_prompts_and_conditions() -> None:
    """Otherwise the test above could hardly fail."""
    steered_replies, plain_replies = run(PROMPTS, STEERED).ids, run(PROMPTS, [NOTHING] * B).ids
    assert [np.array_equal(*pair) for pair in zip(steered_replies, plain_replies, strict=True)] == [True] + [False] * 5
    assert len({tuple(reply) for reply in plain_replies.tolist()}) == B
    assert all(len(set(reply)) > 3 for reply in plain_replies.tolist()), "texts vary"


@pytest.mark.parametrize("magnitude", [0.0, 8.0])
def test_greedy_equals_hugging_face_generate(reference: Any, magnitude: float) -> None:
    prompts = PROMPTS[:3]
    ids, positions = left_pad(prompts, 12)
    with added(reference, 1, magnitude * np.asarray(VECTORS[1])):
        expected = reference.generate(
            torch.tensor(ids),
            attention_mask=torch.tensor((positions >= 0).astype(np.int64)),
            do_sample=False,
            max_new_tokens=G,
            pad_token_id=0,
            eos_token_id=None,
        )
    mine = run(prompts * 2, [steered(1, m) for m in (magnitude, 20.0) for _ in prompts])
    np.testing.assert_array_equal(mine.ids[:3], expected[:, 12:].numpy())


@pytest.mark.parametrize("interventions", [STEERED, NOISY], ids=["steered", "noisy"])
def test_cached_decoding_equals_the_full_pass(recorder: Recorder, interventions: Sequence[Intervention]) -> None:
    """T12, also for noise, which is drawn by position, and for the interventions that depend on the activation."""
    replies = recorder(interventions, temperature=[0.0, 1.0] * 3)
    np.testing.assert_allclose(recorder.logits, uncached_logits(replies, interventions), atol=1e-4)
    others = [*interventions[1:], interventions[0]]
    assert np.abs(recorder.logits - uncached_logits(replies, others)).max() > 0.1, "the interventions matter"


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_16_bit_replies_are_those_of_the_full_pass(platform: str) -> None:
    """Also in the form for accelerators, whose cache is of 16 bits."""
    model = jax.tree.map(lambda weight: weight.astype(jnp.bfloat16), MODEL)
    with ops.compiling_for(platform, 10**9):
        replies = np.asarray(run(PROMPTS, STEERED, model=model).ids)
        rounded, exact = (uncached_logits(replies, STEERED, model=m) for m in (model, MODEL))
    assert 0.01 < np.abs(rounded - exact).max() < 0.3, "of logits with a standard deviation of 1.2"
    chosen = np.take_along_axis(rounded, replies.T[:, :, None], axis=-1)[..., 0]
    assert (rounded.max(-1) - chosen).max() < 0.05


def test_blocks_one_by_one_or_under_a_scan_give_the_same_cached_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, positions = map(jnp.asarray, left_pad(PROMPTS, T))
    replies = []
    for one_by_one in (True, False):
        monkeypatch.setattr(ops, "unstacks", lambda blocks, answer=one_by_one: answer)
        program = jax.jit(lambda rows: generate(MODEL, ids, positions, jnp.stack(KEYS), rows, max_new_tokens=G))
        replies.append(program(stack_rows(STEERED)).ids)
    np.testing.assert_array_equal(*replies)


@pytest.mark.parametrize(
    ("platform", "gigabytes", "expected"),
    [("cpu", 0, True), ("tpu", 90, False), ("gpu", 60, True), ("gpu", 36, False), ("gpu", 0, False)],
)
def test_a_gpu_runs_blocks_one_by_one_if_it_has_room(platform: str, gigabytes: int, expected: bool) -> None:
    """60 and 36: what JAX takes of 80 and 48. An 8B model's blocks are 14 GB."""
    blocks = jax.ShapeDtypeStruct((14 * 10**9 // 2,), jnp.bfloat16)
    with ops.compiling_for(platform, gigabytes * 10**9):
        assert ops.unstacks(blocks) == expected


def test_every_pass_is_steered_inside_the_span_and_nowhere_else(recorder: Recorder) -> None:
    """Each position once, in prefill or in its decode step: prompt + G - 1 passes; the last token is never an input."""
    recorder(STEERED)
    for row, (layer, magnitude, _, (start, stop)) in enumerate(CONDITIONS):
        end = len(PROMPTS[row]) + G - 1
        expected = [(layer, t) for t in range(max(start, 0), min(stop, end)) if magnitude]
        assert recorder.changed_positions(row) == expected, f"row {row}"


def test_generated_cannot_change_the_first_token_and_prompt_can(recorder: Recorder) -> None:
    """T13: generated position j is the pass whose input is generated token j."""
    plain = recorder([NOTHING] * B), recorder.logits
    generated = recorder([steered(1, 30.0, "generated")] * B), recorder.logits
    prompt = recorder([steered(1, 30.0, "prompt")] * B), recorder.logits
    np.testing.assert_array_equal(generated[1][0], plain[1][0])
    np.testing.assert_array_equal(generated[0][:, 0], plain[0][:, 0])
    assert (np.abs(generated[1][1] - plain[1][1]).max(-1) > 0.1).all(), "the second token is reached in every row"
    assert (np.abs(prompt[1][0] - plain[1][0]).max(-1) > 0.1).all()
    assert (prompt[0][:, 0] != plain[0][:, 0]).any()


def test_recording_changes_nothing(recorder: Recorder) -> None:
    np.testing.assert_array_equal(recorder(STEERED), run(PROMPTS, STEERED).ids)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("interventions", [STEERED, NOISY], ids=["steered", "noisy"])
def test_each_row_equals_the_same_row_alone(interventions: Sequence[Intervention], temperature: float) -> None:
    """Complaint 1: without batch mates and with other padding (12 columns, not 64)."""
    together, rows = run(PROMPTS, interventions, Sampling(temperature)), with_same_terms(interventions)
    for row in range(B):
        alone = run([PROMPTS[row]], [rows[row]], Sampling(temperature), keys=[KEYS[row]], padded=12)
        np.testing.assert_array_equal(alone.ids[0], together.ids[row], err_msg=f"row {row}")


@pytest.mark.parametrize("interventions", [STEERED, NOISY], ids=["steered", "noisy"])
def test_text_does_not_depend_on_batch_mates(interventions: Sequence[Intervention]) -> None:
    first = run(PROMPTS, interventions, Sampling(1.0))
    mates = run(
        [*PROMPTS[3:], *PROMPTS[:3]],
        [NOTHING, STEERED[2], NOISY[0], *interventions[:3]],
        Sampling(1.0),
        keys=[row_key(9, "other", 0)] * 3 + KEYS[:3],
    )
    np.testing.assert_array_equal(mates.ids[3:], first.ids[:3])


def test_noise_differs_between_samples_and_not_between_runs() -> None:
    noisy = [gaussian_noise(1, 30.0, noise_key(key), n_layers=L, d_model=D) for key in KEYS]
    replies = run([PROMPTS[1]] * B, noisy).ids
    assert len({tuple(reply) for reply in replies.tolist()}) == B
    np.testing.assert_array_equal(run([PROMPTS[1]] * B, noisy).ids, replies)


def test_a_reply_ends_at_its_first_stop_token() -> None:
    free = run(PROMPTS, STEERED)
    stops = [int(free.ids[3, 4]), int(free.ids[4, 0])]
    out = run(PROMPTS, STEERED, stop_ids=stops)
    for row in range(B):
        hits = np.flatnonzero(np.isin(free.ids[row], stops))
        length = hits[0] + 1 if len(hits) else G
        assert out.lengths[row] == length
        assert out.stopped[row] == bool(len(hits))
        np.testing.assert_array_equal(out.ids[row, :length], free.ids[row, :length])
    assert (out.lengths[4], out.lengths[3]) == (1, 5)
    assert G in out.lengths, "later steps were made, and did not change what had ended"


def test_a_stop_token_as_the_last_one_counts_as_stopped() -> None:
    free = run(PROMPTS, STEERED)
    last = int(free.ids[0, -1])
    assert last not in free.ids[0, :-1]
    out = run(PROMPTS, STEERED, stop_ids=[last, -1])
    assert (out.lengths[0], bool(out.stopped[0])) == (G, True)


def test_no_pass_is_made_after_the_last_row_has_stopped(recorder: Recorder) -> None:
    free = recorder([NOTHING] * B, prompts=[PROMPTS[0]] * B)
    assert len(recorder.resid) == G
    step = next(step for step in range(2, G - 1) if free[0, step] not in free[0, :step])
    recorder([NOTHING] * B, prompts=[PROMPTS[0]] * B, stop_ids=[free[0, step], -1])
    assert len(recorder.resid) == step + 1


def test_same_keys_same_text_and_other_keys_other_text() -> None:
    def text(keys: Sequence[jax.Array]) -> list[list[int]]:
        return run([PROMPTS[1]] * B, [NOTHING] * B, Sampling(1.0), keys=keys).ids.tolist()

    first = text(KEYS)
    assert text([row_key(0, "problem", i) for i in range(B)]) == first
    assert len({tuple(reply) for reply in first}) == B, "samples differ"
    others = [row_key(1, "problem", 0), row_key(0, "problem 2", 0), row_key(0, "problem", 0)]
    replies = text(others + others)
    assert replies[:3] == replies[3:]
    assert replies[2] == first[0]
    assert len({tuple(reply) for reply in replies}) == 3, "seed and problem enter the key"


def test_conditions_meet_the_same_random_numbers() -> None:
    """Rows of one key draw alike whatever is done to them: here something is done only after the reply's end."""
    late = [steered(layer, magnitude, (50, 60)) for layer in range(L) for magnitude in (4.0, -4.0)]
    replies = run([PROMPTS[1]] * B, late, Sampling(1.0), keys=[KEYS[0]] * B).ids
    np.testing.assert_array_equal(replies, np.broadcast_to(replies[0], replies.shape))
    np.testing.assert_array_equal(replies, run([PROMPTS[1]] * B, [NOTHING] * B, Sampling(1.0), keys=[KEYS[0]] * B).ids)


def test_noise_and_sampling_use_different_keys() -> None:
    fold = jax.vmap(jax.random.fold_in, (None, 0))
    of_steps, of_layers = (
        {tuple(data) for data in jax.random.key_data(keys).tolist()}
        for keys in (fold(KEYS[0], jnp.arange(100_000)), fold(noise_key(KEYS[0]), jnp.arange(200)))
    )
    assert len(of_steps) == 100_000 and len(of_layers) == 200
    assert not of_steps & of_layers


def test_row_key_needs_no_order() -> None:
    keys = {(p, s): row_key(3, p, s) for p in ("a/1", "a/2", "b") for s in range(4)}
    again = {(p, s): row_key(3, p, s) for p in ("b", "a/2", "a/1") for s in reversed(range(4))}
    data = {name: tuple(jax.random.key_data(key).tolist()) for name, key in keys.items()}
    assert data == {name: tuple(jax.random.key_data(again[name]).tolist()) for name in data}
    assert len(set(data.values())) == len(data)


def test_zero_strength_is_the_unsteered_program_to_the_bit() -> None:
    """T29: `intervention=None` compiles another program; rows that change nothing give its bits and its text."""
    nothing = stack_rows([NOTHING, steered(2, 0.0), self_amplify(0, 0.0, n_layers=L, d_model=D)] * 2)
    ids, positions = right_pad(PROMPTS, 24)
    resolved = nothing.resolve(jnp.array([len(prompt) for prompt in PROMPTS]))
    np.testing.assert_array_equal(forward(MODEL, ids, positions, resolved), forward(MODEL, ids, positions, None))
    arguments = (MODEL, *left_pad(PROMPTS, T), jnp.stack(KEYS))
    unsteered = compiled_generate(*arguments, None, Sampling(1.0), np.array(NEVER, np.int32), max_new_tokens=G)
    zero = compiled_generate(*arguments, nothing, Sampling(1.0), np.array(NEVER, np.int32), max_new_tokens=G)
    np.testing.assert_array_equal(unsteered.ids, zero.ids)


def test_a_sweep_compiles_nothing() -> None:
    """Complaints 9 and 15: vector, layer, length, span, key, temperature, top-p, top-k and stop ids are values."""
    run(PROMPTS, STEERED)
    run(PROMPTS, NOISY)
    compiled = n_programs()
    run(PROMPTS, [steered(i % L, 3.0 * i, (i, i + 4)) for i in range(B)], Sampling(0.7), keys=KEYS[::-1])
    others = [self_amplify(0, -1.0, n_layers=L, d_model=D), ablate(VECTORS[2], [0], -0.5, n_layers=L), NOTHING]
    run(PROMPTS[::-1], [*NOISY[1:4], *others], Sampling(0.6, 0.95, 20), stop_ids=[3, 4])
    run(PROMPTS, [add_vector(VECTORS[2] * 2, 0, m, n_layers=L, span="prompt") for m in range(B)])
    assert n_programs() == compiled


def test_vmap_over_lengths_equals_rows() -> None:
    lengths = np.array([0.0, 8.0, -20.0], np.float32)
    ids, positions = map(jnp.array, left_pad(PROMPTS[:2], T))
    keys = jnp.stack(KEYS[:2])

    @jax.jit
    @jax.vmap
    def sweep(length: jax.Array) -> Generated:
        row = add_vector(VECTORS[1], 1, length=length, n_layers=L)
        both = stack_rows([row, row])
        return generate(MODEL, ids, positions, keys, both, Sampling(1.0), NEVER, max_new_tokens=G)

    rows = run(
        PROMPTS[:2] * 3, [steered(1, length) for length in lengths for _ in range(2)], Sampling(1.0), keys=KEYS[:2] * 3
    )
    swept = sweep(lengths)
    np.testing.assert_array_equal(swept.ids.reshape(B, G), rows.ids)
    assert len({tuple(reply) for reply in rows.ids.tolist()}) == B


@pytest.mark.parametrize("n", [0, -1])
def test_no_token_at_all_is_refused(n: int) -> None:
    with pytest.raises(ValueError, match=f"max_new_tokens={n}, expected at least 1"):
        generate(MODEL, jnp.zeros((B, T), int), jnp.zeros((B, T), int), jnp.stack(KEYS), max_new_tokens=n)


def test_a_row_without_finite_logits_stops_the_run(rows: list[Row]) -> None:
    """Whatever is sampled from NaN is no reply, and may not even be a token."""
    infinite = dataclasses.replace(NOTHING, terms=(Add(jnp.ones(L), jnp.full((L, D), jnp.inf)),))  # as none is built
    broken = [*rows[:2], dataclasses.replace(rows[2], intervention=infinite), *rows[3:]]
    for sampling in (GREEDY, Sampling(1.0), Sampling(1.0, top_p=0.9), Sampling(1.0, top_k=3)):
        with pytest.raises(FloatingPointError, match="row 2: "):
            replies_of(broken, sampling=sampling)
    broken[2] = dataclasses.replace(broken[2], name="the third")
    with pytest.raises(FloatingPointError, match="the third: "):
        replies_of(broken)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sampling": Sampling(-0.7)}, "temperature=-0.7, expected a finite number of at least 0"),
        ({"sampling": Sampling(jnp.array([0.7, jnp.nan]))}, "temperature=.*nan.*, expected a finite number"),
        ({"sampling": Sampling(jnp.array([0.7, 0.0]))}, r"temperature has shape \(2,\), expected one number for all"),
        ({"sampling": Sampling(1.0, top_p=95)}, "top_p=95, expected more than 0 and at most 1"),
        ({"sampling": Sampling(1.0, top_k=jnp.array(0.5))}, "top_k=0.5, expected an integer"),
        ({"batch_size": 0}, "batch_size=0, expected at least 1"),
        ({"prompt": [1, V]}, f"row 1 has the token id {V}, expected 0 to {V - 1}; is it another model's tokenizer"),
        ({"prompt": [-1]}, "row 1 has the token id -1, expected 0 to"),
        ({"prompt": []}, "row 1 has no token"),
    ],
)
def test_invalid_values_are_refused_before_anything_is_sampled(
    rows: list[Row], changed: dict[str, Any], message: str
) -> None:
    if "prompt" in changed:
        rows = [rows[0], dataclasses.replace(rows[1], prompt=changed.pop("prompt"))]
    with pytest.raises(ValueError, match=message):
        replies_of(rows, **changed)


def test_there_is_a_key_for_every_row() -> None:
    with pytest.raises(ValueError, match=r"keys have shape \(\), expected one for each of 6 rows"):
        compiled_generate(MODEL, *left_pad(PROMPTS, T), KEYS[0], max_new_tokens=G)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.0)])
def test_padding_may_stand_behind_the_prompts(sampling: Sampling) -> None:
    """An answer to the padding behind a prompt would look like one to the prompt."""
    expected = run(PROMPTS, STEERED, sampling)
    ids, positions = right_pad(PROMPTS, T)
    found = compiled_generate(
        MODEL, ids, positions, jnp.stack(KEYS), stack_rows(STEERED), sampling, NEVER, max_new_tokens=G
    )
    np.testing.assert_array_equal(found.ids, expected.ids)


@pytest.mark.parametrize(
    ("interventions", "shape"),
    [
        (stack_rows([add_vector(jnp.ones(1), 1, 2.0, n_layers=L)] * B), (B, L, 1)),
        (stack_rows([add_vector(VECTORS[1], 1, 2.0, n_layers=L + 1)] * B), (B, L + 1, D)),
        (stack_rows([add_vector(VECTORS[1], 1, 2.0, n_layers=L)] * (B - 1)), (B - 1, L, D)),
        (add_vector(VECTORS[1], 1, 2.0, n_layers=L), (L, D)),
    ],
    ids=["vector of width 1", "another depth", "too few rows", "a single row"],
)
def test_an_intervention_of_other_shapes_is_refused(interventions: Intervention, shape: tuple[int, ...]) -> None:
    ids, positions = left_pad(PROMPTS, T)
    with pytest.raises(ValueError, match=re.escape(f"has shape {shape}, expected (rows, layers, width) = ")):
        compiled_generate(MODEL, ids, positions, jnp.stack(KEYS), interventions, max_new_tokens=2)


# Sampling

inverse_cdf = jax.jit(sampling_module._inverse_cdf)
compiled_sample = jax.jit(sample)
N = 200
DRAW_KEYS = jax.random.split(jax.random.key(5), N)


def draw(logits: np.ndarray, temperature: np.ndarray, top_p: np.ndarray, top_k: np.ndarray, step: int) -> np.ndarray:
    """N tokens from [N, V] logits with settings [N]."""
    sampling = Sampling(jnp.float32(temperature), jnp.float32(top_p), jnp.int32(top_k))
    tokens = compiled_sample(jnp.float32(logits), sampling, DRAW_KEYS, jnp.int32(step))
    assert tokens.dtype == jnp.int32
    return np.asarray(tokens)


@jax.jit
def uniforms(keys: jax.Array, step: int) -> jax.Array:
    """The numbers in [0, 1) that each row draws with at a step, [rows, 8]; the first one, unless it meets top-p."""
    rounds = [jax.vmap(jax.random.fold_in, (0, None))(keys, step)]
    for _ in range(7):
        rounds.append(jax.vmap(jax.random.fold_in, (0, None))(rounds[-1], 1))
    return jnp.stack([jax.vmap(jax.random.uniform)(keys) for keys in rounds], axis=1)


def draw_by_hand(logits: np.ndarray, temperature: float, top_p: float, top_k: int, u: Sequence[float]) -> int:
    """One token from [V], in float64: sort, find the top-p set, walk up the cumulative distribution until inside it."""
    logits = logits.astype(np.float64) / temperature
    order = np.argsort(-logits)
    probabilities = np.exp(logits - logits.max())
    probabilities[order[top_k or len(order) :]] = 0
    probabilities /= probabilities.sum()
    kept = order[: int(np.searchsorted(np.cumsum(probabilities[order]), top_p)) + 1]
    for number in u:
        token = int(np.searchsorted(np.cumsum(probabilities) / probabilities.sum(), number, side="right"))
        if token in kept:
            return token
        probabilities[logits <= logits[token]] = 0
    raise AssertionError("more rounds than numbers")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_pad_an_embedding_are_never_sampled(temperature: float) -> None:
    """Even where they are the most likely ones; and fewer ids than rows change nothing of what else is drawn."""
    rows = [Row(prompt, key, row) for prompt, key, row in zip(PROMPTS, KEYS, STEERED, strict=True)]

    def with_head(change: Callable[[jax.Array], jax.Array]) -> Decoder:
        return jax.tree_util.tree_map_with_path(
            lambda path, x: change(x) if "lm_head" in jax.tree_util.keystr(path) else x, MODEL
        )

    def sampled(model: Decoder, vocab_size: int | None) -> np.ndarray:
        batches = generate_rows(
            model,
            rows,
            sampling=Sampling(temperature),
            stop_ids=NEVER,
            max_new_tokens=G,
            batch_size=B,
            vocab_size=vocab_size,
        )
        return np.array([reply.ids for _, reply in sorted(pair for batch in batches for pair in batch)])

    padded = with_head(lambda x: x.at[V - 40 :].multiply(1e3))
    assert sampled(padded, None).max() >= V - 40
    without = sampled(padded, V - 40)
    assert without.max() < V - 40
    broken = with_head(lambda x: x.at[V - 40 :].set(jnp.nan))
    np.testing.assert_array_equal(sampled(broken, V - 40), without)
    plain = run(PROMPTS, STEERED, Sampling(temperature)).ids
    for vocab_size in (None, V, V + 5):  # markers may be beyond an embedding
        np.testing.assert_array_equal(sampled(MODEL, vocab_size), plain)


def test_every_sampled_token_by_hand(recorder: Recorder) -> None:
    """Step 0 to G - 1 draw with `fold_in(row key, step)`; rows at temperature 0 are greedy beside sampled ones."""
    temperature = [0.0, 1.0, 0.7, 0.0, 1.3, 1.0]
    replies = recorder(STEERED, temperature)
    u = [uniforms(jnp.stack(KEYS), step).tolist() for step in range(G)]
    for step, row in np.ndindex(G, B):
        logits = recorder.logits[step, row]
        expected = (
            draw_by_hand(logits, temperature[row], 1.0, 0, u[step][row]) if temperature[row] else np.argmax(logits)
        )
        assert replies[row, step] == expected, (row, step)


def test_filtered_samples_by_hand() -> None:
    rng = np.random.default_rng(0)
    logits = (3 * rng.normal(size=(N, V))).astype(np.float32)
    temperature = rng.uniform(0.3, 2, N)
    top_p = np.where(rng.random(N) < 0.3, 1, rng.uniform(0.05, 1, N))
    top_k = np.where(rng.random(N) < 0.3, 0, rng.integers(1, V, N))
    tokens = draw(logits, temperature, top_p, top_k, step=7)
    u = uniforms(DRAW_KEYS, 7).tolist()
    expected = [draw_by_hand(*row) for row in zip(logits, temperature, top_p, top_k, u, strict=True)]
    np.testing.assert_array_equal(tokens, expected)


@pytest.mark.parametrize("top_k", [0, 1, 2, 17, V - 1, V, V + 5])
@pytest.mark.parametrize("top_p", [1.0, 0.999, 0.9, 0.5, 0.01])
def test_filtered_samples_follow_the_distribution_of_hugging_face(top_k: int, top_p: float) -> None:
    """4,000 draws: none outside the tokens kept by its warpers, and Pearson's chi-square against their softmax."""
    logits = 2 * torch.randn((1, V), generator=torch.Generator().manual_seed(top_k))
    kept = logits
    if top_k:
        kept = transformers.TopKLogitsWarper(min(top_k, V))(torch.zeros(1), kept)  # type: ignore[arg-type]
    if top_p < 1:
        kept = transformers.TopPLogitsWarper(top_p)(torch.zeros(1), kept)  # type: ignore[arg-type]
    probabilities = torch.softmax(kept, -1)[0].double().numpy()
    sampling = Sampling(*(jnp.asarray(setting) for setting in settings_of_rows(1.0, top_p, top_k)))
    tokens = draws(jnp.tile(jnp.array(logits.numpy()), (N, 1)), sampling, jnp.arange(20))
    counts = np.bincount(np.ravel(tokens), minlength=V)
    assert counts[probabilities == 0].sum() == 0
    means = counts.sum() * probabilities
    common = means > 5
    degrees = common.sum() - 1
    if degrees:
        chi_square = np.sum((counts - means)[common] ** 2 / means[common])
        assert scipy.stats.chi2.sf(chi_square, degrees) > 1e-3


@jax.jit
def draws(logits: jax.Array, sampling: Sampling, steps: jax.Array) -> jax.Array:
    """Tokens of N rows at each of some steps, [steps, N]."""
    return jax.lax.map(lambda step: sample(logits, sampling, DRAW_KEYS, step), steps)


def settings_of_rows(*settings: float) -> list[np.ndarray]:
    """The same settings for N rows."""
    return [np.full(N, value) for value in settings]


@pytest.mark.parametrize("top_p", [0.0, 1e-30])
def test_top_p_of_nothing_keeps_the_most_likely_token(top_p: float) -> None:
    logits = np.asarray(jax.random.normal(jax.random.key(0), (N, V)))
    tokens = draw(logits, *settings_of_rows(1.0, top_p, 0), step=0)
    np.testing.assert_array_equal(tokens, np.argmax(logits, axis=-1))


def test_samples_follow_the_softmax() -> None:
    """Pearson's chi-square over 20,000 draws with fixed keys; the bound tells a temperature of 1.07 from 1."""
    logits = 1.5 * np.random.default_rng(1).normal(size=V)
    everywhere = np.ones(N)
    tokens = [draw(logits + 0 * everywhere[:, None], everywhere, everywhere, 0 * everywhere, i) for i in range(100)]
    observed = np.bincount(np.concatenate(tokens), minlength=V)

    def p_value(temperature: float) -> float:
        expected = observed.sum() * scipy.special.softmax(logits / temperature)
        rare = expected < 5
        counts, means = (np.append(x[~rare], x[rare].sum()) for x in (observed, expected))
        return float(scipy.stats.chi2.sf(np.sum((counts - means) ** 2 / means), len(counts) - 1))

    assert p_value(1.0) > 1e-3
    assert p_value(1.07) < 1e-6


@pytest.mark.parametrize("size", [5, 128, 300])
def test_tokens_of_no_weight_are_never_drawn(size: int) -> None:
    """Also at the ends of the unit interval and where whole blocks, first and last ones among them, are empty."""
    rng = np.random.default_rng(size)
    weights = rng.exponential(size=(64, size)).astype(np.float32) * (rng.random((64, size)) < 0.05)
    weights[:, : size // 3] = 0
    weights[:, -size // 4 :] = 0
    weights[:, size // 2] = 1e-3
    for u in (0.0, 1e-7, 0.5, 1 - 2**-23, np.float32(1 - 2**-24)):
        tokens = np.asarray(inverse_cdf(jnp.array(weights), jnp.full(64, u, jnp.float32)))
        assert (weights[np.arange(64), tokens] > 0).all(), u
    lowest = inverse_cdf(jnp.array(weights), jnp.zeros(64))
    np.testing.assert_array_equal(lowest, np.argmax(weights > 0, axis=-1))


# Many rows


def test_batches_hold_every_row_once_in_few_shapes() -> None:
    lengths = [70, 3, 64, 1, 65, 130, 9, 128, 12]
    groups = batches(lengths, batch_size=2)
    assert groups == [(192, [5]), (128, [8, 0]), (128, [4, 7]), (64, [1, 2]), (64, [3, 6])]
    assert batches([1, 200], batch_size=3) == [(256, [0, 1])]
    assert batches([], batch_size=2) == []


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """A full batch and an incomplete one."""
    lengths = (40, 5, 12, 1, 9, 33, 7, 3, 64)
    prompts = [np.random.default_rng(100 + n).integers(0, V, n).tolist() for n in lengths]
    return [Row(prompt, row_key(0, "rows", i), steered(1, 3.0 * i)) for i, prompt in enumerate(prompts)]


def replies_of(rows: Sequence[Row], **changes: Any) -> list[list[tuple[int, Completion]]]:
    settings = {"sampling": GREEDY, "stop_ids": NEVER, "max_new_tokens": G, "batch_size": B} | changes
    return list(generate_rows(MODEL, rows, **settings))


def test_generate_rows_yields_every_row_under_its_number(
    rows: list[Row], reference: transformers.LlamaForCausalLM
) -> None:
    yielded = replies_of(rows)
    assert [[number for number, _ in batch] for batch in yielded] == [[0, 1, 2, 3, 4, 5], [6, 7, 8]]
    for number, reply in (pair for batch in yielded for pair in batch):
        assert reply.finish_reason == "length"
        with added(reference, 1, 3.0 * number * np.asarray(VECTORS[1])):
            logits = torch_logits(reference, [*rows[number].prompt, *reply.ids[:-1]])[len(rows[number].prompt) - 1 :]
        assert len(logits) == G
        assert (logits.max(-1) - logits[np.arange(G), list(reply.ids)] < 1e-4).all(), f"row {number}"


def test_generate_rows_keeps_shapes_few_and_rows_in_their_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of several buckets, on a stand-in for the model that replies with the prompt's length and last token."""
    shapes = []

    def echo(
        model: Decoder,
        ids: np.ndarray,
        positions: np.ndarray,
        keys: jax.Array,
        intervention: Intervention,
        sampling: Sampling,
        stop_ids: np.ndarray,
        *,
        max_new_tokens: int,
        vocab_size: int | None,
        repeats: int,
    ) -> Generated:
        shapes.append(ids.shape)
        assert positions.shape == ids.shape and repeats == 1
        assert keys.shape == intervention.shape[:1] == ids.shape[:1]
        lengths = positions.max(1) + 1
        replies = np.stack([lengths, ids[:, -1], jax.random.key_data(keys)[:, -1] % 1000], axis=1)
        yes = jnp.ones(len(ids), bool)
        return Generated(jnp.array(replies), jnp.full(len(ids), 3), yes, yes)

    monkeypatch.setattr(generate_module, "compiled_generate", echo)
    lengths = [70, 3, 64, 1, 65, 600, 9, 128, 12, 577]
    rows = [Row([n % V] * n, row_key(0, "p", n), NOTHING) for n in lengths]
    yielded = replies_of(rows, batch_size=4)
    assert shapes == [(4, 640), (4, 128), (4, 64)]
    replies = [pair for batch in yielded for pair in batch]
    assert sorted(number for number, _ in replies) == list(range(len(rows)))
    for number, reply in replies:
        key = int(jax.random.key_data(rows[number].key)[-1]) % 1000
        assert reply == Completion((lengths[number], lengths[number] % V, key), "stop")


def test_generate_rows_does_not_depend_on_order(rows: list[Row]) -> None:
    order = np.random.default_rng(0).permutation(len(rows))
    first = dict(pair for batch in replies_of(rows, sampling=Sampling(1.0)) for pair in batch)
    again = dict(pair for batch in replies_of([rows[i] for i in order], sampling=Sampling(1.0)) for pair in batch)
    assert {int(order[number]): reply for number, reply in again.items()} == first


def test_generate_rows_reports_stops(rows: list[Row]) -> None:
    free = dict(pair for batch in replies_of(rows) for pair in batch)
    stop = free[3].ids[2]
    stopped = dict(pair for batch in replies_of(rows, stop_ids=(stop, -1)) for pair in batch)
    for number, reply in stopped.items():
        ends = free[number].ids.index(stop) + 1 if stop in free[number].ids else G
        assert reply.ids == free[number].ids[:ends]
        assert reply.finish_reason == ("stop" if stop in free[number].ids else "length")
    assert stopped[3].finish_reason == "stop"
    assert dataclasses.astuple(stopped[3])[0][-1] == stop


def test_generate_rows_compiles_one_program_per_shape(rows: list[Row]) -> None:
    """And per kind of sampling: values of temperature, top-p and top-k are none."""
    replies_of(rows)
    replies_of(rows, sampling=Sampling(0.3, 0.5, 7))
    compiled = n_programs()
    replies_of(rows[::-1], sampling=Sampling(0.8, 0.9, 3))
    replies_of(rows[1:4])
    assert n_programs() == compiled
    replies_of(rows, sampling=Sampling(0.8, 0.9))
    replies_of(rows, sampling=Sampling(0.4, 0.7))
    assert n_programs() <= compiled + 1


def test_generate_rows_compiles_one_program_for_the_kinds_that_any_row_has(rows: list[Row]) -> None:
    """Though neither batch has all of them; and what a row says does not depend on the others' kinds."""
    done = [self_amplify(1, 15.0, n_layers=L, d_model=D), ablate(VECTORS, n_layers=L), ablate(VECTORS[0], n_layers=L)]
    mixed = [dataclasses.replace(row, intervention=done[n % 3]) for n, row in enumerate(rows)]
    mixed[-1] = rows[-1]
    compiled = n_programs()
    replies = dict(pair for batch in replies_of(mixed) for pair in batch)
    assert n_programs() == compiled + 1
    alone = dict(pair for batch in replies_of(mixed[::3]) for pair in batch)
    assert [replies[n] for n in range(0, len(rows), 3)] == [alone[n] for n in range(3)]


def test_texts_are_the_replies_of_every_prompt_under_every_intervention() -> None:
    """On the shipped model, since it has words."""
    path = checkpoint.resolve("package:backtrack_jax/organism/reasoning")
    model, tokenizer = checkpoint.load(str(path), dtype="float32"), Tokenizer.load(path)
    sizes: Any = {"n_layers": model.config.n_layers, "d_model": model.config.d_model}
    interventions = [no_intervention(**sizes), self_amplify(2, 3.0, **sizes)]
    prompts = [tokenizer.encode_chat([{"role": "user", "content": text}]) for text in ("lamp", "two of the lamps")]
    arguments = {"sampling": Sampling(1.0), "max_new_tokens": 24}
    texts = generate_text(model, tokenizer, prompts, interventions, seed=3, batch_size=3, **arguments)
    rows = [Row(p, row_key(3, str(n), 0), i) for n, p in enumerate(prompts) for i in interventions]
    batches = generate_rows(model, rows, stop_ids=tokenizer.stop_ids, batch_size=1, **arguments)
    ids = {number: reply.ids for batch in batches for number, reply in batch}
    expected = [tokenizer.decode([i for i in ids[number] if i not in tokenizer.stop_ids]) for number in range(4)]
    assert texts == [expected[:2], expected[2:]]
    assert len(set(expected)) > 2
    text = "two of the lamps"
    bare = generate_text(model, tokenizer, text, interventions[0], max_new_tokens=8)
    encoded = tokenizer.encode(text)
    ids = encoded if encoded[0] == tokenizer.bos_id else [tokenizer.bos_id, *encoded]
    assert bare == generate_text(model, tokenizer, [ids], interventions[:1], max_new_tokens=8)
    assert bare == generate_text(model, tokenizer, ids, interventions[:1], max_new_tokens=8)
    assert np.shape(bare) == (1, 1) and bare != [[""]]


@pytest.mark.slow
def test_a_row_is_the_same_where_numbers_are_64_bit_by_default() -> None:
    script = """
import jax, jax.numpy as jnp
from backtrack_jax.generate import Sampling, generate_text
from backtrack_jax.intervention import gaussian_noise
from backtrack_jax.models import checkpoint
from backtrack_jax.models.tokenizer import Tokenizer
path = checkpoint.resolve("package:backtrack_jax/organism/reasoning")
model, tokenizer = checkpoint.load(str(path)), Tokenizer.load(path)
noise = gaussian_noise(2, 100.0, jax.random.key(1), n_layers=8, d_model=128)
prompt = tokenizer.encode_chat([{"role": "user", "content": "lamp"}])
print(generate_text(model, tokenizer, [prompt], [noise], max_new_tokens=12, sampling=Sampling(0.7, 0.95)))
"""
    promoting = os.environ | {"JAX_NUMPY_DTYPE_PROMOTION": "standard"}  # 64-bit numbers meet 32-bit ones on purpose
    texts = [
        subprocess.run(
            [sys.executable, "-c", script], env=promoting | {"JAX_ENABLE_X64": x64}, capture_output=True, check=True
        ).stdout
        for x64 in ("0", "1")
    ]
    assert texts[0] == texts[1] and len(texts[0]) > 20


def test_texts_of_a_few_more_rows_compile_nothing_new() -> None:
    path = checkpoint.resolve("package:backtrack_jax/organism/reasoning")
    model, tokenizer = checkpoint.load(str(path), dtype="float32"), Tokenizer.load(path)
    nothing = no_intervention(model.config.n_layers, model.config.d_model)
    prompt = tokenizer.encode_chat([{"role": "user", "content": "lamp"}])
    generate_text(model, tokenizer, [prompt], [nothing] * 3, max_new_tokens=2)
    before = n_programs()
    generate_text(model, tokenizer, [prompt], [nothing] * 4, max_new_tokens=2)
    assert n_programs() == before


def test_texts_have_noise_of_their_own_for_every_prompt_seed_and_key() -> None:
    path = checkpoint.resolve("package:backtrack_jax/organism/reasoning")
    model, tokenizer = checkpoint.load(str(path), dtype="float32"), Tokenizer.load(path)
    sizes: Any = {"n_layers": model.config.n_layers, "d_model": model.config.d_model}
    noises = [gaussian_noise(2, 300.0, jax.random.key(n), **sizes) for n in (0, 1)]
    prompt = tokenizer.encode_chat([{"role": "user", "content": "lamp"}])
    first, again, other = (
        generate_text(model, tokenizer, [prompt] * 2, noises, max_new_tokens=12, seed=seed) for seed in (0, 0, 5)
    )
    assert first == again
    texts = [text for by_prompt in (*first, *other) for text in by_prompt]
    assert len(set(texts)) == len(texts)
