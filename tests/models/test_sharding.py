"""Weights and rows spread over several devices, which here are parts of one CPU."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from helpers import hf_llama, relative_error, save

from backtrack_jax import extract, generate, pipeline
from backtrack_jax.analysis import activations, coherence
from backtrack_jax.files import store
from backtrack_jax.intervention import add_vector, stack_rows
from backtrack_jax.models import checkpoint, families
from backtrack_jax.models.config import ModelConfig
from backtrack_jax.models.decoder import Decoder
from backtrack_jax.models.sharding import batch_sharding, make_mesh, place_rows, shardings

pytestmark = pytest.mark.hf

B, T = 4, 9


@pytest.fixture(scope="module")
def devices() -> list:
    found = jax.devices("cpu")
    if len(found) < 4:
        pytest.skip("needs 4 CPU devices: test_all_of_this_on_four_devices runs it in a process that has them")
    return found[:4]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save(hf_llama(vocab_size=132), tmp_path_factory.mktemp("sharding") / "model")


def weights(model: Decoder) -> dict:
    return nnx.to_pure_dict(nnx.state(model))


@functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
def run(model: Decoder, ids: jax.Array, positions: jax.Array, vector: jax.Array) -> tuple[jax.Array, jax.Array]:
    rows = stack_rows([add_vector(vector, 1, float(row), n_layers=3) for row in range(B)])
    out = model(ids, positions, intervention=rows, capture=lambda block: block.resid_post)
    return out.captured, model.logits(out.resid)


def test_meshes(devices):
    for parts in (1, 2, 4):
        mesh = make_mesh(parts, devices)
        assert dict(mesh.shape) == {"data": 4 // parts, "model": parts}
        assert mesh.axis_types == (jax.sharding.AxisType.Auto,) * 2
    for parts in (0, 3, 8):
        with pytest.raises(ValueError, match=f"model_parallel={parts} does not divide the number of devices, 4"):
            make_mesh(parts, devices)


@pytest.mark.parametrize("source", ["hf", "orbax"])
def test_every_device_holds_its_part(source, devices, folder, tmp_path):
    mesh = make_mesh(2, devices)
    whole = weights(checkpoint.load(str(folder)))
    path = folder
    if source == "orbax":
        path = tmp_path / "orbax"
        checkpoint.save_orbax(checkpoint.load(str(folder), mesh=make_mesh(1, devices)), path)
    split = weights(checkpoint.load(str(path), mesh=mesh))
    expected = shardings(families.from_hf_file(folder / "config.json"), mesh)
    assert jax.tree.structure(split) == jax.tree.structure(expected)
    for (keys, leaf), place, other in zip(
        jax.tree.leaves_with_path(split), jax.tree.leaves(expected), jax.tree.leaves(whole), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim), keys
        np.testing.assert_array_equal(leaf, other)
        module = keys[-2].key
        axis = -2 if module in ("o_proj", "down_proj", "embed_tokens", "lm_head") else -1
        if "norm" in module:
            assert place.is_fully_replicated
            continue
        shapes = {shard.data.shape for shard in leaf.addressable_shards}
        half = list(leaf.shape)
        half[axis] //= 2
        assert shapes == {tuple(half)}
        assert leaf.shape[axis] != 40  # the residual stream is never split


@pytest.mark.parametrize("parts", [1, 2])
def test_8_bit_weights_in_parts_are_the_whole(devices, folder, parts):
    """Scales are of whole columns, also where a device holds some of their rows."""
    whole = checkpoint.load(str(folder), "int8")
    spread = checkpoint.load(str(folder), "int8", mesh=make_mesh(parts, devices))
    for ours, theirs in zip(jax.tree.leaves(spread), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
    assert len(spread.layers.self_attn.o_proj.weight[...].sharding.device_set) == 4


def test_the_forward_pass_is_the_same_on_a_mesh(devices, folder):
    """With an intervention that differs between rows, which lie on different devices."""
    ids = np.random.default_rng(0).integers(0, 132, (B, T))
    positions = np.tile(np.arange(T), (B, 1))
    positions[1, :4] = -1  # a padded row
    positions[1, 4:] = np.arange(T - 4)
    vector = np.asarray(jax.random.normal(jax.random.key(0), (40,)))
    plain = run(checkpoint.load(str(folder)), ids, positions, vector)
    mesh = make_mesh(2, devices)
    rows = batch_sharding(mesh)
    model = checkpoint.load(str(folder), mesh=mesh)
    split = run(model, jax.device_put(ids, rows), jax.device_put(positions, rows), vector)
    for ours, expected in zip(split, plain, strict=True):
        assert relative_error(ours, expected) < 1e-5
    assert {shard.data.shape[0] for shard in split[1].addressable_shards} == {B // 2}


@pytest.mark.parametrize("parts", [1, 2])
def test_long_runs_come_to_the_same_on_a_mesh(devices, folder, parts):
    """Steered sampling, window sums, single activations, likelihoods; the last batch of each is incomplete."""
    rng = np.random.default_rng(0)
    vector = jax.random.normal(jax.random.key(0), (40,))
    prompts = [rng.integers(0, 131, n).tolist() for n in (5, 9, 3, 7, 8, 2)]
    rows = [
        generate.Row(prompt, generate.row_key(0, "p", n), add_vector(vector, 1, float(n), n_layers=3))
        for n, prompt in enumerate(prompts)
    ]
    traces = [extract.TokenTrace(str(n), prompt, 1, [("a", 1)]) for n, prompt in enumerate(prompts)]
    plan = extract.WindowPlan(("a",), {"a": ("a",)}, ((0, 0),), (1,))

    def everything(model: Decoder) -> tuple[list, ...]:
        steered = generate.generate_rows(
            model, rows, sampling=generate.Sampling(1.0, 0.9), stop_ids=(3,), max_new_tokens=6, batch_size=B
        )
        replies = [pair for batch in steered for pair in batch]
        sums = extract.window_sums(model, traces, plan, batch_size=B).sums
        at = [np.array([0, len(prompt) - 1]) for prompt in prompts]
        states = [x for batch in activations.read(model, traces, at, (0, 1), batch_size=B) for _, x in batch]
        likely = coherence.log_likelihoods(model, prompts, [reply.ids for _, reply in sorted(replies)], batch_size=B)
        return replies, [sums, *states, np.array([x for batch in likely for _, x in batch])]

    replies, numbers = everything(checkpoint.load(str(folder)))
    model = checkpoint.load(str(folder), mesh=make_mesh(parts, devices))
    placed = place_rows(model, (np.zeros((B, 7)), jnp.zeros(B)))
    assert {shard.data.shape[0] for leaf in placed for shard in leaf.addressable_shards} == {B * parts // 4}
    on_mesh, same = everything(model)
    assert on_mesh == replies
    for ours, expected in zip(same, numbers, strict=True):
        assert relative_error(ours, expected) < 1e-5


def test_an_experiment_on_four_devices_comes_to_the_same(devices, tmp_path, monkeypatch):
    """Reading and steering, from the chains to the replies."""
    tiny.write(tmp_path)
    monkeypatch.chdir(tmp_path)
    e = tiny.get_config()
    e.steering.offsets = e.steering.layers = ()
    e.steering.kinds, e.steering.limit = ("backtracking", "noise"), 1
    pipeline.Run(e, pipeline.stage_names("1234")).run()
    e.name, e.data_parallel = "four", 4
    pipeline.Run(e, pipeline.stage_names("1234")).run()
    alone, four = (store.read_lines(Path("results", name, "4-steering/generations.jsonl")) for name in ("tiny", "four"))
    assert [line["ids"] for line in four] == [line["ids"] for line in alone]  # vectors differ in their last bits


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("data_parallel", 8, "data_parallel=8 x model_parallel=1 takes 8 devices, there are 4"),
        ("model_parallel", 2, "model axis of 2 devices does not divide num_key_value_heads=1"),
    ],
)
def test_devices_that_an_experiment_cannot_use_stop_it(devices, tmp_path, monkeypatch, field, value, message):
    tiny.write(tmp_path)
    monkeypatch.chdir(tmp_path)
    e = tiny.get_config()
    setattr(e, field, value)
    with pytest.raises(ValueError, match=message):
        pipeline.Run(e).run()
    assert not Path("results").exists()


def test_sizes_that_the_mesh_does_not_divide_are_refused_together(devices, folder):
    config = families.from_hf_file(folder / "config.json")
    with pytest.raises(ValueError, match=r"model axis of 4 devices does not divide num_key_value_heads=2$"):
        shardings(config, make_mesh(4, devices))
    odd = ModelConfig(
        vocab_size=131,
        d_model=40,
        d_mlp=72,
        n_layers=3,
        n_heads=3,
        n_kv_heads=3,
        head_dim=16,
        norm_eps=1e-5,
        rope_theta=1e4,
        rope_scaling=None,
        tied=False,
    )
    with pytest.raises(ValueError, match=r"2 devices does not divide num_key_value_heads=3, vocab_size=131$"):
        shardings(odd, make_mesh(2, devices))


def test_released_8b_over_eight_devices_without_its_weights(folder):
    """Everything that is large is an eighth: 2.0 GB a device."""
    config = ModelConfig(
        vocab_size=128256,
        d_model=4096,
        d_mlp=14336,
        n_layers=32,
        n_heads=32,
        n_kv_heads=8,
        head_dim=128,
        norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=None,
        tied=False,
    )
    mesh = jax.sharding.AbstractMesh((1, 8), ("data", "model"))
    places = shardings(config, mesh)
    abstract = nnx.eval_shape(lambda: Decoder(config, jnp.dtype(jnp.bfloat16), rngs=nnx.Rngs(0)))
    sizes = jax.tree.map(
        lambda leaf, place: np.prod(place.shard_shape(leaf.shape)), nnx.to_pure_dict(nnx.state(abstract)), places
    )
    assert sum(jax.tree.leaves(sizes)) < config.n_parameters / 8 * 1.001


@pytest.mark.skipif(len(jax.devices("cpu")) >= 4, reason="this process has four devices")
def test_all_of_this_on_four_devices():
    """How many devices a CPU is parted into is settled when JAX starts."""
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(tests, env=os.environ | {"JAX_NUM_CPU_DEVICES": "4"}, capture_output=True, text=True)
    assert done.returncode == 0 and ", 1 skipped" in done.stdout, done.stdout
