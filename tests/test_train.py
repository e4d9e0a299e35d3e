import dataclasses
import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

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
from backtrack_jax.models.decoder import Decoder, Recompute
from backtrack_jax.models.products import matmul
from backtrack_jax.training import fit as train
from backtrack_jax.training import lora

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


def sequences(count: int, seed: int = 0) -> list[train.Tokens]:
    rng = np.random.default_rng(seed)
    return [train.Tokens(rng.integers(0, 37, rng.integers(2, 12)).tolist(), 1 + i % 2) for i in range(count)]


def test_pack_keeps_every_token_once() -> None:
    packed = train.pack(sequences(40), 16)
    found = [
        tuple(
            packed.ids[row, packed.segments[row] == segment][
                packed.positions[row][packed.segments[row] == segment] >= 0
            ]
        )
        for row in range(len(packed.ids))
        for segment in range(packed.segments[row].max() + 1)
    ]
    assert sorted(found) == sorted(tuple(sequence.ids) for sequence in sequences(40))
    assert packed.weights.sum() == sum(len(sequence.ids) - sequence.start for sequence in sequences(40))
    assert not packed.weights[packed.positions == PAD].any() and not packed.weights[packed.positions == 0].any()
    assert (packed.positions >= 0).mean() > 0.8


def test_pack_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="sequence 1 has 9 tokens, a row holds 8"):
        train.pack([train.Tokens([1] * 8), train.Tokens([1] * 9)], 8)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_gradient_computed_again_is_that_of_what_was_kept(dtype: jnp.dtype) -> None:
    llama, batch = model(), train.pack(sequences(12), 24)
    products, memory, gradients = {}, {}, {}
    for recompute in Recompute:
        loss = functools.partial(train.cross_entropy, batch=batch, dtype=dtype, recompute=recompute)
        lowered = jax.jit(jax.grad(lambda llama, loss=loss: loss(llama)[0])).lower(llama)
        compiled: Any = lowered.compile()
        products[recompute] = lowered.as_text().count("stablehlo.dot_general")
        memory[recompute] = compiled.memory_analysis().temp_size_in_bytes
        gradients[recompute] = compiled(llama)
    again = 2 if dtype == jnp.float32 else 0  # attention's; in 16 bits its own backward pass computes scores again
    assert products[Recompute.CHEAP] == products[Recompute.NOTHING] + again
    # Six products with weights in a block: the seventh's result is of no use to a gradient.
    assert products[Recompute.BLOCKS] == products[Recompute.NOTHING] + 6 + 2
    assert memory[Recompute.BLOCKS] < 0.9 * memory[Recompute.CHEAP] < 0.7 * memory[Recompute.NOTHING]
    tolerance = 1e-5 if dtype == jnp.float32 else 0.02
    expected = gradients.pop(Recompute.NOTHING)
    for found in gradients.values():
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


def test_what_is_no_way_to_recompute_is_refused() -> None:
    with pytest.raises(ValueError, match="recompute=False, expected one of nothing, cheap, blocks"):
        train.cross_entropy(model(), train.pack(sequences(2), 24), recompute=cast(Any, False))


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


@pytest.fixture(params=[(37, 1), (37, 4), (40, 4)], ids=["at once", "in parts with a rest", "in equal parts"])
def vocab_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """V of a vocabulary whose logits the loss computes so."""
    V, parts = request.param
    if parts > 1:
        monkeypatch.setattr(train, "_logits_at_a_time", lambda: 0)
        monkeypatch.setattr(train, "_LEAST_PART", 10)
    assert len(train._vocabulary_in_parts(jnp.zeros((V, 16)), 24)) == parts
    return V


@pytest.mark.parametrize(
    ("vocab_size", "tokens", "parts", "size"),
    [
        (49152, 2048, 32, 1536),  # SmolLM2
        (128256, 2048, 167, 768),  # Llama 3: 1336 divides it too, but is no multiple of 128
        (128257, 2048, 84, 1536),  # a token more, of which nothing near 1536 is a factor
        (32000, 1 << 20, 50, 640),  # however many tokens, no fewer ids than make a product fast
        (311, 2048, 1, 311),
    ],
)
def test_a_vocabulary_in_parts_is_padded_where_nothing_divides_it(
    vocab_size: int, tokens: int, parts: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "_logits_at_a_time", lambda: 3 << 20)  # as on a CPU, wherever this runs
    made = jax.eval_shape(lambda: train._vocabulary_in_parts(jnp.zeros((vocab_size, 2)), tokens))
    assert made.shape == (parts, size, 2)


def test_packed_loss_is_that_of_the_sequences_one_by_one(vocab_size: int) -> None:
    llama = model(vocab_size)
    total, weight = jax.jit(train.cross_entropy)(llama, train.pack(sequences(12), 24))
    expected = 0.0
    forward = jax.jit(lambda ids, positions: jax.nn.log_softmax(llama.logits(llama(ids, positions).resid)))
    for sequence in sequences(12):
        ids, positions = right_pad([sequence.ids], 12)
        chances = np.asarray(forward(jnp.asarray(ids), jnp.asarray(positions)))[0]
        expected -= sum(chances[t - 1, sequence.ids[t]] for t in range(sequence.start, len(sequence.ids)))
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert weight == sum(len(sequence.ids) - sequence.start for sequence in sequences(12))


def test_an_id_beyond_the_vocabulary_has_no_finite_loss(vocab_size: int) -> None:
    batch = train.pack([train.Tokens([1, 2, 3])], 24)
    batch.ids[0, 2] = vocab_size
    assert not np.isfinite(train.cross_entropy(model(vocab_size), batch)[0])


@pytest.mark.parametrize("tied", [True, False])
def test_gradient_of_the_loss_is_that_of_its_definition(tied: bool, vocab_size: int) -> None:
    """Of the squared mean, so that what comes from outside the sum is not 1; of weights and of what tokens count."""
    llama = Decoder(dataclasses.replace(CONFIG, tied=tied, vocab_size=vocab_size), rngs=nnx.Rngs(0))
    params, build = train.trainable(llama)
    batch = train.pack(sequences(12), 24)

    def defined(params: Any, weights: jax.Array) -> jax.Array:
        out = build(params)(batch.ids, batch.positions, segments=batch.segments)
        chances = jax.nn.log_softmax(build(params).logits(out.resid[:, :-1]))
        picked = jnp.take_along_axis(chances, batch.ids[:, 1:, None], axis=-1)[..., 0]
        return jnp.square(-jnp.sum(picked * weights[:, 1:]) / jnp.sum(weights[:, 1:]))

    def computed(params: Any, weights: jax.Array) -> jax.Array:
        total, weight = train.cross_entropy(build(params), batch._replace(weights=weights))
        return jnp.square(total / weight)

    weights = batch.weights * np.random.default_rng(0).uniform(0.5, 2, batch.weights.shape).astype(np.float32)
    expected, found = (
        jax.jit(jax.value_and_grad(loss, (0, 1)))(params, jnp.asarray(weights)) for loss in (defined, computed)
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_16_bit_weights_have_gradients(dtype: jnp.dtype) -> None:
    """On a CPU they are looked up as integers, which have none."""
    batch = train.pack(sequences(12), 24)
    gradient = jax.jit(jax.grad(lambda llama: train.cross_entropy(llama, batch)[0] / 59))
    narrow = jax.tree.map(lambda weight: weight.astype(dtype), model())
    rounded, exact = gradient(narrow), gradient(jax.tree.map(lambda weight: weight.astype(jnp.float32), narrow))
    chex.assert_trees_all_equal_dtypes(rounded, narrow)
    for a, b in zip(jax.tree.leaves(rounded), jax.tree.leaves(exact), strict=True):
        assert np.linalg.norm(a.astype(jnp.float32) - b) < 0.1 * np.linalg.norm(b)


def test_float32_has_derivatives_in_forward_mode_too() -> None:
    """16-bit products have backward rules of their own, and no forward ones."""
    params, build = train.trainable(model())
    batch = train.pack(sequences(4), 24)
    change = jax.tree.map(lambda weight: jnp.cos(jnp.arange(weight.size, dtype=float)).reshape(weight.shape), params)

    def total(params: Any) -> jax.Array:
        return jnp.sum(jnp.sin(build(params)(batch.ids, batch.positions, segments=batch.segments).resid))

    _, along = jax.jit(lambda: jax.jvp(total, (params,), (change,)))()
    gradient = jax.jit(jax.grad(total))(params)
    expected = sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(change), strict=True))
    np.testing.assert_allclose(along, expected, rtol=1e-4)


def test_gradients_of_many_tokens_stay_within_float16() -> None:
    """The gradient of their summed loss would not: the head's reaches 130,000."""
    params, build = train.trainable(model())
    ids = np.where(np.random.default_rng(0).random((512, 256)) < 0.8, 5, 1).astype(np.int32)
    batch = train.pack([train.Tokens(row.tolist()) for row in ids], 256)

    def mean(params: Any) -> jax.Array:
        total, weight = train.cross_entropy(build(params), batch, jnp.dtype(jnp.float16))
        return total / weight

    assert train.finite(jax.jit(jax.grad(mean))(params))


def test_a_packed_batch_needs_no_jit() -> None:
    batch = train.pack(sequences(12), 24)
    chex.assert_trees_all_close(
        train.cross_entropy(model(), batch), jax.jit(train.cross_entropy)(model(), batch), rtol=1e-5
    )


def _memory_of_gradient(config: ModelConfig, loss: Callable[[Decoder, train.Batch], jax.Array]) -> int:
    """Bytes that the gradient of a loss of 8 rows of 64 tokens holds beside the weights and their gradient."""
    llama = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    batch = train.Batch(*(jnp.zeros((8, 64), dtype) for dtype in (np.int32, np.int32, np.int32, np.float32)))
    compiled: Any = jax.jit(jax.grad(loss)).lower(llama, batch).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_a_gradient_of_the_loss_holds_logits_of_a_part_of_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "_logits_at_a_time", lambda: 1000 * 8 * 64)
    config = dataclasses.replace(CONFIG, vocab_size=20_000)
    held = _memory_of_gradient(config, lambda llama, batch: train.cross_entropy(llama, batch)[0])
    assert held < 20_000 * 8 * 64 * 4 / 4  # a quarter of all


@pytest.mark.parametrize("part", [1000, 100], ids=["at once", "in parts"])
@pytest.mark.parametrize(
    ("of", "products"), [(None, 1), (0, 2), ((0, 1), 4)], ids=["value alone", "adapters", "all weights"]
)
def test_the_loss_multiplies_by_the_unembedding_as_often_as_it_must(
    of: int | tuple[int, int] | None, products: int, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapters need its gradient with respect to the residual stream alone; what exists at once is computed once."""
    monkeypatch.setattr(train, "_logits_at_a_time", lambda: 0)
    monkeypatch.setattr(train, "_LEAST_PART", part)
    B, T, D, V = 2, 12, 64, 1000
    given = jnp.zeros((B, T, D)), jnp.zeros((V, D)), jnp.zeros((B, T), jnp.int32), jnp.ones((B, T))
    function = train._summed_loss if of is None else jax.grad(train._summed_loss, of)
    with jax.default_device(jax.devices("cpu")[0]):  # others have no `dot`, but names of their libraries
        compiled = jax.jit(function).lower(*given).compile()
    assert (compiled.as_text() or "").count(" dot(") == products - (part == V and products == 4)


def test_gradient_of_16_bit_products_is_close_to_that_of_float32(vocab_size: int) -> None:
    params, build = train.trainable(
        jax.tree.map(lambda w: 0.4 * w if w.ndim > 1 else w, model(vocab_size))
    )  # less sure of itself
    batch = train.pack(sequences(12), 24)

    def gradients(dtype: jnp.dtype | None) -> np.ndarray:
        loss = jax.jit(jax.grad(lambda params: train.cross_entropy(build(params), batch, dtype)[0]))
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(loss(params))])

    exact, rounded = gradients(None), gradients(jnp.bfloat16)
    assert np.linalg.norm(exact) > 1
    assert not np.array_equal(exact, rounded)
    assert np.linalg.norm(rounded - exact) < 0.01 * np.linalg.norm(exact)


def test_a_token_of_which_a_16_bit_model_is_sure_has_a_gradient(vocab_size: int) -> None:
    """Its chance is .999 or more, 1 in bfloat16."""
    rng = np.random.default_rng(0)
    unembedding = jnp.asarray(rng.standard_normal((vocab_size, 16)), jnp.bfloat16)
    ids = jnp.arange(24, dtype=jnp.int32).reshape(2, 12)
    x = 2 * unembedding[ids].astype(jnp.float32)  # not rounded itself

    def gradient(unembedding: jax.Array) -> jax.Array:
        return jax.grad(train._summed_loss)(x, unembedding, ids, jnp.ones(ids.shape))

    rounded, exact = gradient(unembedding), gradient(unembedding.astype(jnp.float32))
    sizes = jnp.linalg.norm(exact, axis=-1)
    assert jnp.sum((sizes > 1e-6) & (sizes < 1e-3)) > 3
    errors = jnp.linalg.norm(rounded - exact, axis=-1) / sizes
    assert jnp.max(errors[sizes > 1e-6]) < 0.01


@pytest.mark.parametrize("leading", [(), (6,), (2, 3), (0, 3)])
@pytest.mark.parametrize("spec", ["...d,df->...f", "...d,vd->...v"])
def test_gradients_of_a_float32_product(spec: str, leading: tuple[int, ...]) -> None:
    """That of the weight is a sum over one axis, of all tokens: over two it takes a CPU twice as long."""
    rng = np.random.default_rng(0)
    x, out = (rng.standard_normal((*leading, n)).astype(np.float32) for n in (8, 5))
    weight = rng.standard_normal((8, 5) if "df" in spec else (5, 8)).astype(np.float32)
    found, gradients = jax.vjp(functools.partial(matmul, spec=spec), jnp.asarray(x), jnp.asarray(weight))
    forward = weight if "df" in spec else weight.T
    of_weight = x.reshape(-1, 8).T @ out.reshape(-1, 5)
    expected = x @ forward, out @ forward.T, of_weight if "df" in spec else of_weight.T
    for ours, theirs in zip((found, *gradients(jnp.asarray(out))), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    products = [e for e in jax.make_jaxpr(gradients)(out).eqns if e.primitive.name == "dot_general"]
    assert [len(e.params["dimension_numbers"][0][0]) for e in products] == [1, 1]


@pytest.mark.parametrize("leading", [(), (6,), (2, 3)])
@pytest.mark.parametrize("spec", ["...d,df->...f", "...d,vd->...v"])
def test_gradients_of_a_16_bit_product(spec: str, leading: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    x, out = rng.standard_normal((*leading, 8)), rng.standard_normal((*leading, 5))
    weight = rng.standard_normal((8, 5) if "df" in spec else (5, 8))

    def of(dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
        scalar = lambda x, w: jnp.sum(matmul(x, w.astype(dtype), spec) * out)  # noqa: E731
        return jax.grad(scalar, (0, 1))(jnp.float32(x), jnp.float32(weight))

    for rounded, exact in zip(of(jnp.bfloat16), of(jnp.float32), strict=True):
        np.testing.assert_allclose(rounded, exact, atol=0.03 * np.abs(exact).max())


def test_steps_lower_the_loss_and_donate_the_state() -> None:
    params, build = train.trainable(model())
    optimizer = train.muon(train.warmup_cosine(0.02, 30, 2), train.warmup_cosine(3e-3, 30, 2))
    step = train.make_step(build, optimizer)
    state, batch = train.new_state(params, optimizer), train.pack(sequences(12), 24)
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
    batch = train.pack(sequences(3), 24)
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
def adamw_step() -> tuple[
    train.TrainState, Callable[[train.TrainState, train.Batch], tuple[train.TrainState, jax.Array]]
]:
    """A state to start from, which is to be copied, and the compiled step."""
    optimizer = optax.adamw(1e-2)
    params, build = train.trainable(model())
    return train.new_state(params, optimizer), train.make_step(build, optimizer)


def test_resumed_training_ends_with_the_same_weights(tmp_path: Path) -> None:
    before, step = adamw_step()
    rows = train.pack(sequences(30), 24)

    calls: list[int] = []

    def fit(folder: Path, kill_at: int = -1) -> train.TrainState:
        calls.clear()

        def maybe_killed(state: train.TrainState, batch: train.Batch) -> tuple[train.TrainState, jax.Array]:
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
    rows = train.pack(sequences(30), 24)
    arguments: dict[str, Any] = {"batch_size": 4, "seed": 0, "folder": tmp_path, "save_every": 2, "title": "test"}
    whole, _ = train.fit(step, jax.tree.map(jnp.copy, before), rows, steps=4, **arguments)
    for file in (tmp_path / "4").rglob("*"):
        if file.is_file():
            os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(ValueError, match=r"/4 cannot be read .*Remove it, and the same command goes on after step 2"):
        train.fit(step, jax.tree.map(jnp.copy, before), rows, steps=4, **arguments)
    shutil.rmtree(tmp_path / "4")
    mended, _ = train.fit(step, jax.tree.map(jnp.copy, before), rows, steps=4, **arguments)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(mended), strict=True):
        np.testing.assert_array_equal(a, b)


def test_rows_come_in_a_new_order_every_time_and_none_is_missed() -> None:
    rows = train.pack(sequences(30), 24)
    n = len(rows.ids)
    numbered = rows._replace(weights=np.repeat(np.arange(n, dtype=np.float32)[:, None], 24, axis=1))
    seen = np.concatenate([train._rows_of_step(numbered, step, 2, seed=0).weights[:, 0] for step in range(n)])
    first, second = seen[:n], seen[n:]
    assert sorted(first) == sorted(second) == list(range(n))
    assert list(first) != list(second)


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    """The loss of a step is that before it: the last step's weights are in none."""
    state, step = adamw_step()

    def to_infinity(state: train.TrainState, batch: train.Batch) -> tuple[train.TrainState, jax.Array]:
        state, loss = step(state, batch)
        return dataclasses.replace(state, params=jax.tree.map(lambda weight: weight * jnp.inf, state.params)), loss

    arguments: dict[str, Any] = {"batch_size": 4, "seed": 0, "folder": tmp_path, "save_every": 2, "title": "test"}
    with pytest.raises(FloatingPointError, match="weights are not finite after step 0"):
        train.fit(to_infinity, jax.tree.map(jnp.copy, state), train.pack(sequences(30), 24), steps=1, **arguments)
    assert not any(path.name.isdigit() for path in tmp_path.iterdir())


def test_a_loss_that_is_not_finite_stops_training(tmp_path: Path) -> None:
    state, step = adamw_step()
    state = dataclasses.replace(state, params=jax.tree.map(lambda weight: weight * jnp.nan, state.params))
    with pytest.raises(FloatingPointError, match="the loss of step 0 is nan"):
        train.fit(
            step,
            jax.tree.map(jnp.copy, state),
            train.pack(sequences(30), 24),
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
