"""Parity with Hugging Face's torch code, from single modules to the real 135M model, and consistency of the model.

Tolerance is 1e-5 of the Frobenius norm in float32 everywhere, and is not to be loosened: a larger difference is a bug.
"""

import dataclasses
import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import LLAMA3_ROPE, hf_llama, relative_error, save

from backtrack_jax.intervention import Intervention, add_vector, gaussian_noise, no_intervention, stack_rows
from backtrack_jax.models import checkpoint
from backtrack_jax.models.attention import KVCache, rope_frequencies, rope_tables
from backtrack_jax.models.batching import left_pad, right_pad
from backtrack_jax.models.config import LayerKind
from backtrack_jax.models.decoder import Decoder, Output

pytest.importorskip("torch", reason="needs torch and transformers to compare with")

import torch
import transformers

pytestmark = pytest.mark.hf

TOLERANCE = 1e-5
KV_HEADS = {"mha": 4, "gqa": 2, "mqa": 1}
ROPES = {
    "default": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "rms_norm_eps": 1e-6},
    "llama3": {"rope_parameters": LLAMA3_ROPE},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}, "rms_norm_eps": 1e-2},
}
T = 12
IDS = np.random.default_rng(0).integers(0, 131, (3, T))


def forward(
    model: Decoder,
    ids: jax.Array,
    positions: jax.Array,
    cache: KVCache | None = None,
    intervention: Intervention | None = None,
) -> tuple[Output, jax.Array]:
    """Output with every `resid_post` captured, and logits."""
    out = model(ids, positions, cache=cache, intervention=intervention, capture=lambda block: block.resid_post)
    return out, model.logits(out.resid)


# These tests compile many programs and run each on a few numbers.
RUN = jax.jit(forward, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def pair(heads: str = "gqa", rope: str = "llama3", tied: bool = False) -> tuple[transformers.LlamaForCausalLM, Decoder]:
    """The same model in torch and, loaded from the folder that torch's wrote, here."""
    reference = hf_llama(num_key_value_heads=KV_HEADS[heads], tie_word_embeddings=tied, **ROPES[rope])
    with tempfile.TemporaryDirectory() as folder:
        return reference, checkpoint.load(str(save(reference, Path(folder))))


def hf_states(
    reference: transformers.LlamaForCausalLM, ids: np.ndarray, positions: np.ndarray
) -> tuple[list[np.ndarray], np.ndarray]:
    """Outputs of all blocks, before the final norm, and logits; read by hooks."""
    states: list[np.ndarray] = []

    def hook(module: torch.nn.Module, args: tuple, output: torch.Tensor | tuple) -> None:
        hidden = output if isinstance(output, torch.Tensor) else output[0]  # depends on the version of transformers
        assert hidden.shape[:2] == ids.shape
        states.append(hidden.numpy())

    handles = [layer.register_forward_hook(hook) for layer in reference.model.layers]
    with torch.no_grad():
        logits = reference(torch.tensor(ids), position_ids=torch.tensor(positions), use_cache=False).logits.numpy()
    for handle in handles:
        handle.remove()
    return states, logits


@pytest.mark.parametrize("offset", [0, 8185])
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("heads", KV_HEADS)
def test_every_hidden_state_and_logit_equals_hugging_face(heads, rope, offset):
    tied = (list(KV_HEADS).index(heads) + list(ROPES).index(rope)) % 2 == 1  # each with either kind of each other
    reference, model = pair(heads, rope, tied)
    positions = np.broadcast_to(np.arange(T) + offset, IDS.shape)
    states, logits = hf_states(reference, IDS, positions)
    out, our_logits = RUN(model, IDS, positions)
    assert [relative_error(*both) < TOLERANCE for both in zip(out.captured, states, strict=True)] == [True] * 3
    assert relative_error(out.resid, states[-1]) < TOLERANCE
    assert relative_error(our_logits, logits) < TOLERANCE
    np.testing.assert_array_equal(our_logits.argmax(-1), logits.argmax(-1))
    assert len(np.unique(logits.argmax(-1))) > 10  # not a degenerate model


@pytest.mark.parametrize("pad", [left_pad, right_pad])
def test_long_rows_are_attended_in_chunks(pad):
    """Three chunks of queries, of which the last is cut short; rows end in, at, and before a chunk's end."""
    reference, model = pair()
    lengths = (300, 256, 129, 40)
    rows = [np.random.default_rng(n).integers(0, 131, n).tolist() for n in lengths]
    ids, positions = pad(rows, max(lengths))
    out, logits = RUN(model, ids, positions)
    for row, tokens in enumerate(rows):
        states, expected = hf_states(reference, np.array([tokens]), np.arange(len(tokens))[None])
        real = positions[row] >= 0
        assert relative_error(out.captured[-1][row][real], states[-1][0]) < TOLERANCE
        assert relative_error(logits[row][real], expected[0]) < TOLERANCE


@pytest.mark.parametrize(
    "change",
    [{"rope_scaling": None}, {"rope_theta": 490_000.0}, {"rms_norm_eps": 1e-4}],
    ids=["without scaling", "other theta", "other eps"],
)
def test_parity_would_fail_with_another_constant(change, tmp_path):
    reference, model = pair()
    checkpoint.save_hf(model, tmp_path / "other")
    path = tmp_path / "other" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    positions = np.broadcast_to(np.arange(T), IDS.shape)
    out, _ = RUN(checkpoint.load(str(path.parent)), IDS, positions)
    states, _ = hf_states(reference, IDS, positions)
    assert relative_error(out.captured[-1], states[-1]) > 2 * TOLERANCE


def rotary(reference: transformers.LlamaForCausalLM) -> Any:
    return reference.model.rotary_emb


@functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
def modules(model: Decoder, x: jax.Array, positions: jax.Array) -> dict[str, jax.Array]:
    ours = jax.tree.map(lambda leaf: leaf[1], model.layers)
    cos, sin = rope_tables(positions, model.config, LayerKind())
    mask = jnp.tril(jnp.ones((len(x), T, T), bool))
    return {
        "norm": ours.input_layernorm(x),
        "final norm": model.norm(x),
        "cosines": jnp.concatenate([cos, cos], -1),
        "sines": jnp.concatenate([sin, sin], -1),
        "attention": ours.self_attn(x, (cos, sin), mask, None)[0],
        "mlp": ours.mlp(x),
        "layer": ours(x, (cos, sin), mask, None, lambda resid: resid)[0].resid_post,
    }


def test_modules_equal_hugging_face():
    reference, model = pair()
    x = torch.tensor(np.random.default_rng(1).normal(size=(2, T, 40)), dtype=torch.float32)
    positions = torch.stack([torch.arange(T), torch.arange(T) + 100])
    mask = torch.where(torch.ones(T, T).tril().bool(), 0.0, -torch.inf)[None, None]
    layer: Any = reference.model.layers[1]
    with torch.no_grad():
        cos, sin = rotary(reference)(x, positions)
        expected = {
            "norm": layer.input_layernorm(x),
            "final norm": reference.model.norm(x),
            "cosines": cos,
            "sines": sin,
            "attention": layer.self_attn(x, position_embeddings=(cos, sin), attention_mask=mask)[0],
            "mlp": layer.mlp(x),
            "layer": layer(x, position_embeddings=(cos, sin), attention_mask=mask),
        }
    ours = modules(model, x.numpy(), positions.numpy())
    errors = {name: relative_error(ours[name], expected[name]) for name in expected}
    assert {name: error for name, error in errors.items() if not error < TOLERANCE} == {}


def test_angles_at_far_positions_are_at_least_as_exact_as_hugging_face():
    """There float32 leaves errors above 1e-5 in either; float64 decides."""
    reference, model = pair()
    positions = np.arange(8185, 20_000, 500)[None]
    exact = positions[..., None] * np.asarray(scaled_frequencies(16))
    ours = np.stack(rope_tables(jnp.asarray(positions), model.config, LayerKind()))
    theirs = torch.stack(rotary(reference)(torch.zeros(1), torch.tensor(positions)))[..., :8]
    expected = np.stack([np.cos(exact), np.sin(exact)])
    assert relative_error(ours, expected) < 1.1 * relative_error(theirs, expected) < 1e-3


def scaled_frequencies(head_dim: int) -> list[float]:
    """Llama 3.1's, in float64, as Meta's reference code defines them."""
    scaled = []
    for i in range(head_dim // 2):
        frequency = 500_000.0 ** (-2 * i / head_dim)
        wavelength = 2 * np.pi / frequency
        smooth = (8192 / wavelength - 1) / 3
        if wavelength > 8192:
            frequency /= 8
        elif wavelength >= 2048:
            frequency = (1 - smooth) * frequency / 8 + smooth * frequency
        scaled.append(frequency)
    return scaled


@pytest.mark.parametrize("head_dim", [16, 128])
def test_llama3_frequencies_equal_the_definition(head_dim):
    _, model = pair()
    frequencies = rope_frequencies(head_dim, 500_000.0, model.config.rope_scaling)
    np.testing.assert_allclose(frequencies, scaled_frequencies(head_dim), rtol=1e-6)


LENGTHS = (5, 12, 9)


def hf_keys(reference: transformers.LlamaForCausalLM, ids: np.ndarray) -> np.ndarray:
    """Rotated keys [L, K, T, H] of one sequence."""
    with torch.no_grad():
        cache = reference(torch.tensor(ids)[None], use_cache=True).past_key_values
    return np.stack([layer.keys[0].numpy() for layer in cache.layers])


@pytest.mark.parametrize("pad", [left_pad, right_pad])
def test_padded_rows_equal_hugging_face_on_each_row_alone(pad):
    """Keys show the positions themselves: attention alone would not, as it sees only differences of positions."""
    reference, model = pair()
    sequences = [row[:n].tolist() for row, n in zip(IDS, LENGTHS, strict=True)]
    ids, positions = pad(sequences, T)
    out, logits = jax.device_get(RUN(model, ids, positions))
    for row, sequence in enumerate(sequences):
        tokens = positions[row] >= 0
        alone = np.array(sequence)[None]
        states, their_logits = hf_states(reference, alone, np.arange(len(sequence))[None])
        assert relative_error(out.captured[:, row, tokens], np.stack(states)[:, 0]) < TOLERANCE
        assert relative_error(logits[row, tokens], their_logits[0]) < TOLERANCE
        keys = np.swapaxes(out.cache.k[:, row], -1, -2)
        assert relative_error(keys[:, :, tokens], hf_keys(reference, alone[0])) < TOLERANCE


@pytest.mark.parametrize(
    ("ids", "positions", "message"),
    [
        ([[1, 2, 3]], [[1, 1, 0]], r"positions of row 0 are \[1, 1, 0\].*an attention mask is something else"),
        ([1, 2, 3], [0, 1, 2], r"ids are int32 of shape \(3,\), expected integers of shape \[rows, tokens\]"),
        ([[1, 2]], [[0, 1, 2]], r"positions are int32 of shape \(1, 3\).*ids have the shape \(1, 2\)"),
        ([[1, 2], [3, 4]], [[0, 1]], r"positions are int32 of shape \(1, 2\)"),
        ([[1.0, 2.0]], [[0, 1]], "ids are float32"),
    ],
)
def test_tokens_that_no_model_can_be_run_on_are_refused(ids, positions, message):
    with pytest.raises(ValueError, match=message):
        pair()[1](ids, positions)


def test_ids_at_padding_change_nothing():
    _, model = pair()
    ids, positions = left_pad([row[:n].tolist() for row, n in zip(IDS, LENGTHS, strict=True)], T)
    tokens = positions >= 0
    out, _ = jax.device_get(RUN(model, ids, positions))
    other, _ = jax.device_get(RUN(model, np.where(tokens, ids, 77), positions))
    np.testing.assert_array_equal(out.captured[:, tokens], other.captured[:, tokens])


def decode(
    model: Decoder, sequences: list[list[int]], n_prompt: list[int], pad, intervention: Intervention | None, loop: bool
) -> list[np.ndarray]:
    """Hidden states [L, T, D] of each sequence by prefill and one step per further token, through the cache.

    The steps scan over the blocks, or with `loop` take them one by one.
    """
    rows = len(sequences)
    ids, positions = pad([s[:n] for s, n in zip(sequences, n_prompt, strict=True)], max(n_prompt))
    steps = len(sequences[0]) - n_prompt[0]
    out, _ = RUN(model, ids, positions, None, intervention)
    cache = out.cache.extended(steps)
    if loop:
        model, cache = model.unstacked(), cache.unstacked()
    captured = np.asarray(out.captured)
    states = [[captured[:, row, positions[row] >= 0]] for row in range(rows)]
    for step in range(steps):
        ids = np.array([[s[n + step]] for s, n in zip(sequences, n_prompt, strict=True)])
        positions = np.array(n_prompt, np.int32)[:, None] + step
        out, _ = RUN(model, ids, positions, cache, intervention)
        cache = out.cache
        captured = np.asarray(out.captured)
        for row in range(rows):
            states[row].append(captured[:, row])
    return [np.concatenate(parts, axis=1) for parts in states]


@pytest.mark.parametrize(
    ("pad", "intervened", "loop"),
    [(left_pad, False, False), (left_pad, True, False), (right_pad, True, False), (left_pad, True, True)],
    ids=["plain", "intervened", "right-padded", "block by block"],
)
def test_cached_decoding_equals_the_full_pass(pad, intervened, loop):
    """Ragged prompts; with an intervention in the prompt, in the generated part, in a range, with noise, with none."""
    _, model = pair()
    n_prompt = [3, 7, 5, 7, 1]
    sequences = [row[: n + 4].tolist() for row, n in zip(IDS[[0, 1, 2, 0, 1]], n_prompt, strict=True)]
    vector = jnp.linspace(-1, 1, 40)
    rows = [add_vector(vector, 1, 2.0, n_layers=3, span=span) for span in ("prompt", "generated", (4, 7))]
    rows += [gaussian_noise(1, 2.0, jax.random.key(0), n_layers=3, d_model=40), no_intervention(3, 40)]
    interventions = stack_rows(rows).resolve(jnp.array(n_prompt))
    cached = decode(model, sequences, n_prompt, pad, interventions if intervened else None, loop)
    ids, positions = right_pad(sequences, T)
    full = np.asarray(RUN(model, ids, positions, None, interventions if intervened else None)[0].captured)
    plain = np.asarray(RUN(model, ids, positions)[0].captured)
    for row, (sequence, states) in enumerate(zip(sequences, cached, strict=True)):
        expected = full[:, row, : len(sequence)]
        assert relative_error(states, expected) < TOLERANCE
        changed = np.any(expected[1] != plain[1, row, : len(sequence)], axis=-1)
        n, length = n_prompt[row], len(sequence)
        span = [(0, n), (n, length), (4, 7), (0, length), (0, 0)][row] if intervened else (0, 0)
        np.testing.assert_array_equal(changed, (np.arange(length) >= span[0]) & (np.arange(length) < span[1]))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_pass_that_stops_at_a_layer_is_the_beginning_of_the_whole(stop, dtype):
    _, model = pair()
    model = jax.tree.map(lambda leaf: leaf.astype(dtype), model)
    positions = np.broadcast_to(np.arange(T), IDS.shape)
    rows = stack_rows([add_vector(jnp.linspace(-1, 1, 40), layer, 2.0, n_layers=3) for layer in range(3)])
    whole, _ = RUN(model, IDS, positions, None, rows)
    part = jax.jit(
        lambda m: m(IDS, positions, intervention=rows, capture=lambda block: block.resid_post, stop_at_layer=stop)
    )(model)
    assert part.captured.shape[0] == stop
    assert relative_error(part.captured, whole.captured[:stop]) < TOLERANCE
    np.testing.assert_array_equal(part.resid, part.captured[-1])


def test_a_stop_that_cannot_be_had_is_refused():
    _, model = pair()
    ids, positions = jnp.asarray(IDS), jnp.broadcast_to(jnp.arange(T), IDS.shape)
    for stop in (-1, 0, 4):
        with pytest.raises(ValueError, match=rf"stop_at_layer={stop} is outside 1\.\.3"):
            model(ids, positions, stop_at_layer=stop)
    cache = jax.eval_shape(lambda: model(ids, positions).cache.extended(T))
    with pytest.raises(ValueError, match=r"stop_at_layer=2 was given with a cache; expected it without one"):
        model(ids, positions, stop_at_layer=2, cache=cache)


@pytest.fixture(params=["nnx_graph_mode", "nnx_graph_updates"], ids=["tree mode", "simple graph mode"])
def other_nnx_mode(request):
    """NNX is moving from graph to tree mode."""
    flax.config.update(request.param, False)
    yield
    flax.config.update(request.param, True)


def test_other_modes_of_nnx_give_the_same(other_nnx_mode, tmp_path):
    _, model = pair()
    checkpoint.save_hf(model, tmp_path / "hf")
    loaded = checkpoint.load(str(tmp_path / "hf"))
    random = nnx.eval_shape(lambda: Decoder(model.config, rngs=nnx.Rngs(0)))
    assert jax.tree.structure(random) == jax.tree.structure(loaded)
    positions = np.broadcast_to(np.arange(T), IDS.shape)
    states, _ = hf_states(pair()[0], IDS, positions)
    out, _ = RUN(loaded, IDS, positions)
    assert relative_error(out.captured, np.stack(states)) < TOLERANCE


def test_the_forward_pass_changes_no_weight():
    _, model = pair()
    before = jax.tree.leaves(model)
    jax.eval_shape(lambda ids: forward(model, ids, ids), jnp.asarray(IDS))
    assert all(a is b for a, b in zip(before, jax.tree.leaves(model), strict=True))


def test_sizes_of_the_released_8b_without_its_weights():
    _, model = pair()
    config = dataclasses.replace(
        model.config,
        vocab_size=128256,
        d_model=4096,
        d_mlp=14336,
        n_layers=32,
        n_heads=32,
        n_kv_heads=8,
        head_dim=128,
    )
    abstract = nnx.eval_shape(lambda: Decoder(config, jnp.dtype(jnp.bfloat16), rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.to_pure_dict(nnx.state(abstract)))
    assert sum(leaf.size for leaf in leaves) == config.n_parameters == 8_030_261_248
    ids = jax.ShapeDtypeStruct((2, 16), jnp.int32)
    _, logits = jax.eval_shape(forward, abstract, ids, ids)
    assert (logits.shape, logits.dtype) == ((2, 16, 128256), jnp.float32)


def test_real_smollm2_equals_hugging_face(smollm2_gguf, tmp_path):
    """The weights of a trained model, dequantised to float32, with its sharp attention and its outliers."""
    model = checkpoint.load(str(smollm2_gguf), dtype="float32")
    checkpoint.save_hf(model, tmp_path / "smollm2")
    reference = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "smollm2", attn_implementation="eager")
    ids = np.random.default_rng(0).integers(0, 49152, (1, 32))
    positions = np.arange(32)[None]
    states, logits = hf_states(reference, ids, positions)
    out, our_logits = jax.jit(forward)(model, ids, positions)
    errors = [relative_error(*both) for both in zip(out.captured, states, strict=True)]
    assert len(errors) == 30
    assert max(errors) < TOLERANCE
    assert relative_error(our_logits, logits) < TOLERANCE
    np.testing.assert_array_equal(our_logits.argmax(-1), logits.argmax(-1))
