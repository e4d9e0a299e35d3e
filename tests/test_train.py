import dataclasses
import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from backtrack_jax.models.attention import PAD
from backtrack_jax.models.batching import right_pad
from backtrack_jax.models.config import ModelConfig
from backtrack_jax.models.decoder import Decoder
from backtrack_jax.training import fit as train
from backtrack_jax.training import lora
from backtrack_jax.training.loss import cross_entropy
from backtrack_jax.training.packing import Batch, Tokens, pack

pytestmark = pytest.mark.usefixtures("optax_promotes")

CONFIG = ModelConfig(
    vocab_size=37,
    d_model=16,
    d_mlp=24,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    norm_eps=1e-5,
    rope_theta=10000.0,
    rope_scaling=None,
    tied=False,
)


@functools.cache
def model(vocab_size: int = 37) -> Decoder:
    made = jax.jit(lambda: Decoder(dataclasses.replace(CONFIG, vocab_size=vocab_size), rngs=nnx.Rngs(0)))()
    return jax.tree.map(lambda weight: 5 * weight if weight.ndim > 1 else weight, made)  # far from uniform


def sequences(count: int, seed: int = 0) -> list[Tokens]:
    rng = np.random.default_rng(seed)
    return [Tokens(rng.integers(0, 37, rng.integers(2, 12)).tolist(), 1 + i % 2) for i in range(count)]


def test_pack_keeps_every_token_once() -> None:
    packed = pack(sequences(40), 16)
    found = []
    for ids, positions in zip(packed.ids, packed.positions, strict=True):
        sequence = np.cumsum(positions == 0)
        found += [tuple(ids[(sequence == n) & (positions >= 0)]) for n in range(1, sequence[-1] + 1)]
    assert sorted(found) == sorted(tuple(sequence.ids) for sequence in sequences(40))
    assert packed.weights.sum() == sum(len(sequence.ids) - sequence.start for sequence in sequences(40))
    assert not packed.weights[packed.positions == PAD].any() and not packed.weights[packed.positions == 0].any()
    assert (packed.positions >= 0).mean() > 0.8


def test_pack_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="sequence 1 has 9 tokens, a row holds 8"):
        pack([Tokens([1] * 8), Tokens([1] * 9)], 8)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_recomputed_blocks_have_the_same_gradient_in_less_memory(dtype: jnp.dtype) -> None:
    batch = pack(sequences(12), 24)
    loss = lambda llama: cross_entropy(train.with_matrices_in(llama, dtype), batch)[0]  # noqa: E731
    memory, gradients = [], []
    for prepare in (lambda llama: llama, train.recomputing_blocks):
        gradient = jax.jit(jax.grad(lambda llama, prepare=prepare: loss(prepare(llama))))
        compiled: Any = gradient.lower(model()).compile()
        memory.append(compiled.memory_analysis().temp_size_in_bytes)
        gradients.append(compiled(model()))
    assert memory[1] < 0.7 * memory[0]
    for a, b in zip(*map(jax.tree.leaves, gradients), strict=True):
        assert np.linalg.norm(a - b) <= (1e-5 if dtype == jnp.float32 else 0.02) * np.linalg.norm(b)


def test_a_folder_with_a_model_that_no_training_made_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(ValueError, match=r"holds model, but no settings\.json: no training made them\. Name another"):
        train.keep_to(tmp_path, {"rate": 1e-3})
    assert not (tmp_path / "settings.json").exists()


def test_a_folder_belongs_to_one_training_once_that_has_begun(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    train.keep_to(folder, {"dtype": "bfloat17", "rate": 1e-3})
    train.keep_to(folder, {"dtype": "bfloat16", "rate": 1e-3})  # the mistyped one stopped before it wrote anything
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "0").write_text("")
    train.keep_to(folder, {"dtype": "bfloat16", "rate": 1e-3})
    with pytest.raises(
        ValueError, match=r"training with rank=None, not 8; rate=0.001, not 0.002\. Name another folder"
    ):
        train.keep_to(folder, {"dtype": "bfloat16", "rate": 2e-3, "rank": 8})


def test_packed_loss_is_that_of_the_sequences_one_by_one() -> None:
    llama = model()
    total, weight = jax.jit(cross_entropy)(llama, pack(sequences(12), 24))
    expected = 0.0
    forward = jax.jit(lambda ids, positions: jax.nn.log_softmax(llama.logits(llama(ids, positions).resid)))
    for sequence in sequences(12):
        ids, positions = right_pad([sequence.ids], 12)
        chances = np.asarray(forward(jnp.asarray(ids), jnp.asarray(positions)))[0]
        expected -= sum(chances[t - 1, sequence.ids[t]] for t in range(sequence.start, len(sequence.ids)))
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert weight == sum(len(sequence.ids) - sequence.start for sequence in sequences(12))


def test_an_id_beyond_the_vocabulary_has_no_finite_loss() -> None:
    batch = pack([Tokens([1, 2, 3])], 24)
    batch.ids[0, 2] = 37
    assert not np.isfinite(cross_entropy(model(), batch)[0])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_16_bit_weights_have_gradients(dtype: jnp.dtype) -> None:
    """On a CPU they are looked up as integers, which have none."""
    batch = pack(sequences(12), 24)
    gradient = jax.jit(jax.grad(lambda llama: cross_entropy(llama, batch)[0] / 59))
    narrow = jax.tree.map(lambda weight: weight.astype(dtype), model())
    rounded, exact = gradient(narrow), gradient(jax.tree.map(lambda weight: weight.astype(jnp.float32), narrow))
    chex.assert_trees_all_equal_dtypes(rounded, narrow)
    for a, b in zip(jax.tree.leaves(rounded), jax.tree.leaves(exact), strict=True):
        assert np.linalg.norm(a.astype(jnp.float32) - b) < 0.1 * np.linalg.norm(b)


@pytest.mark.slow
def test_gradients_of_many_tokens_stay_within_float16() -> None:
    """The gradient of their summed loss would not: the head's reaches 130,000."""
    params, build = train.trainable(model())
    ids = np.where(np.random.default_rng(0).random((512, 256)) < 0.8, 5, 1).astype(np.int32)
    batch = pack([Tokens(row.tolist()) for row in ids], 256)

    def mean(params: Any) -> jax.Array:
        total, weight = cross_entropy(train.with_matrices_in(build(params), jnp.dtype(jnp.float16)), batch)
        return total / weight

    assert train.finite(jax.jit(jax.grad(mean))(params))


def test_a_packed_batch_needs_no_jit() -> None:
    batch = pack(sequences(12), 24)
    chex.assert_trees_all_close(cross_entropy(model(), batch), jax.jit(cross_entropy)(model(), batch), rtol=1e-5)


def test_gradient_of_16_bit_products_is_close_to_that_of_float32() -> None:
    params, build = train.trainable(
        jax.tree.map(lambda w: 0.4 * w if w.ndim > 1 else w, model())
    )  # less sure of itself
    batch = pack(sequences(12), 24)

    def gradients(dtype: jnp.dtype) -> np.ndarray:
        loss = jax.jit(jax.grad(lambda params: cross_entropy(train.with_matrices_in(build(params), dtype), batch)[0]))
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(loss(params))])

    exact, rounded = gradients(jnp.float32), gradients(jnp.bfloat16)
    assert np.linalg.norm(exact) > 1
    assert not np.array_equal(exact, rounded)
    assert np.linalg.norm(rounded - exact) < 0.01 * np.linalg.norm(exact)


def test_steps_lower_the_loss_and_donate_the_state() -> None:
    params, build = train.trainable(model())
    optimizer = train.muon(train.warmup_cosine(0.02, 30, 2), train.warmup_cosine(3e-3, 30, 2))
    step = train.make_step(build, optimizer)
    state, batch = train.new_state(params, optimizer), pack(sequences(12), 24)
    start, losses = state, []
    for _ in range(30):
        state, loss = step(state, batch)
        losses.append(float(loss))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(start.params))
    assert losses[-1] < 0.8 * losses[0]
    assert state.step == 30


@pytest.mark.parametrize("placed", [False, True], ids=["as JAX likes", "on a device, as a loaded checkpoint"])
@pytest.mark.parametrize("rank", [0, 2])
def test_steps_are_compiled_once(rank: int, placed: bool, caplog: pytest.LogCaptureFixture) -> None:
    weights = jax.device_put(model(), jax.devices()[0]) if placed else model()
    frozen: Any = ()
    if rank:
        params, frozen, build = lora.trainable(weights, lora.Lora(rank), jax.random.key(0))
    else:
        params, build = train.trainable(weights)
    optimizer = optax.adamw(1e-3)
    step, state = train.make_step(build, optimizer), train.new_state(params, optimizer, frozen)
    batch = pack(sequences(3), 24)
    with jax.log_compiles():
        for _ in range(3):
            state, _ = step(state, batch)
    assert caplog.text.count("Compiling jit(update)") == 1


def test_muon_takes_a_step_of_equal_size_along_all_directions_of_every_layer() -> None:
    params, _ = train.trainable(model())
    optimizer = train.muon(optax.constant_schedule(1.0), optax.constant_schedule(0.0))
    rng = np.random.default_rng(0)
    gradients = jax.tree.map(lambda weight: jnp.float32(rng.standard_normal(weight.shape)), params)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    for update in jax.tree.leaves(updates):
        if update.ndim == 3:
            values = np.linalg.svd(update, compute_uv=False)
            assert values.shape[0] == CONFIG.n_layers
            assert values.max() / values.min() < 2.5
        else:
            assert not np.any(update)


class _Killed(Exception):
    pass


@functools.cache
def adamw_step() -> tuple[train.TrainState, Callable[[train.TrainState, Batch], tuple[train.TrainState, jax.Array]]]:
    """A state to start from, which is to be copied, and the compiled step."""
    optimizer = optax.adamw(1e-2)
    params, build = train.trainable(model())
    return train.new_state(params, optimizer), train.make_step(build, optimizer)


def test_resumed_training_ends_with_the_same_weights(tmp_path: Path) -> None:
    before, step = adamw_step()
    rows = pack(sequences(30), 24)

    calls: list[int] = []

    def fit(folder: Path, kill_at: int = -1) -> train.TrainState:
        calls.clear()

        def maybe_killed(state: train.TrainState, batch: Batch) -> tuple[train.TrainState, jax.Array]:
            if len(calls) == kill_at:
                raise _Killed
            calls.append(int(state.step))
            return step(state, batch)

        start = jax.tree.map(jnp.copy, before)
        return train.fit(
            maybe_killed, start, rows, steps=12, batch_size=4, seed=3, folder=folder, save_every=4, title="test"
        )[0]

    whole = fit(tmp_path / "whole")
    with pytest.raises(_Killed):
        fit(tmp_path / "killed", kill_at=6)
    resumed = fit(tmp_path / "killed")
    assert calls == list(range(4, 12))  # from the checkpoint on, not from the start
    again = fit(tmp_path / "killed")  # everything is done: what was saved comes back
    assert not calls
    for state in (resumed, again):
        for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(state), strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_serves(tmp_path: Path) -> None:
    before, step = adamw_step()
    rows = pack(sequences(30), 24)
    arguments: dict[str, Any] = {"batch_size": 4, "seed": 0, "folder": tmp_path, "save_every": 2, "title": "test"}
    whole, _ = train.fit(step, jax.tree.map(jnp.copy, before), rows, steps=4, **arguments)
    for file in (tmp_path / "4").rglob("*"):
        if file.is_file():
            os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(ValueError, match=r"/4 cannot be read .*Remove it, and the same command resumes after step 2"):
        train.fit(step, jax.tree.map(jnp.copy, before), rows, steps=4, **arguments)
    shutil.rmtree(tmp_path / "4")
    mended, _ = train.fit(step, jax.tree.map(jnp.copy, before), rows, steps=4, **arguments)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(mended), strict=True):
        np.testing.assert_array_equal(a, b)


def test_rows_come_in_a_new_order_every_time_and_none_is_missed() -> None:
    rows = pack(sequences(30), 24)
    n = len(rows.ids)
    numbered = rows._replace(weights=np.repeat(np.arange(n, dtype=np.float32)[:, None], 24, axis=1))
    seen = np.concatenate([train._rows_of_step(numbered, step, 2, seed=0).weights[:, 0] for step in range(n)])
    first, second = seen[:n], seen[n:]
    assert sorted(first) == sorted(second) == list(range(n))
    assert list(first) != list(second)


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    """The loss of a step is that before it: the last step's weights are in none."""
    state, step = adamw_step()

    def to_infinity(state: train.TrainState, batch: Batch) -> tuple[train.TrainState, jax.Array]:
        state, loss = step(state, batch)
        return dataclasses.replace(state, params=jax.tree.map(lambda weight: weight * jnp.inf, state.params)), loss

    arguments: dict[str, Any] = {"batch_size": 4, "seed": 0, "folder": tmp_path, "save_every": 2, "title": "test"}
    with pytest.raises(FloatingPointError, match="weights are not finite after step 0"):
        train.fit(to_infinity, jax.tree.map(jnp.copy, state), pack(sequences(30), 24), steps=1, **arguments)
    assert not any(path.name.isdigit() for path in tmp_path.iterdir())


def test_a_loss_that_is_not_finite_stops_training(tmp_path: Path) -> None:
    state, step = adamw_step()
    state = dataclasses.replace(state, params=jax.tree.map(lambda weight: weight * jnp.nan, state.params))
    with pytest.raises(FloatingPointError, match="the loss of step 0 is nan"):
        train.fit(
            step,
            jax.tree.map(jnp.copy, state),
            pack(sequences(30), 24),
            steps=2,
            batch_size=4,
            seed=0,
            folder=tmp_path,
            save_every=2,
            title="test",
        )


@pytest.mark.parametrize("steps", [3, 20, 500])
def test_the_learning_rate_falls_to_a_tenth_however_few_the_steps(steps: int) -> None:
    rates = [np.asarray(train.warmup_cosine(1.0, steps)(step)).item() for step in range(steps + 1)]
    assert max(rates) == 1.0 and rates.index(1.0) <= min(20, steps / 5)
    assert rates[-1] == pytest.approx(0.1)
