"""Weights of 8 bits: rounded as numpy rounds them, from any file, onto any devices, close to the 16-bit model."""

from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import relative_error
from sizes import TINY, random_model

from backtrack_jax.generate import GREEDY, compiled_generate, row_key
from backtrack_jax.models import checkpoint
from backtrack_jax.models.batching import left_pad
from backtrack_jax.models.decoder import Decoder
from backtrack_jax.models.quantized import Int8Linear, abstract, quantize, rounded, weight_bytes

IDS = np.random.default_rng(0).integers(0, 131, (2, 12))
POSITIONS = np.broadcast_to(np.arange(12), IDS.shape)


@pytest.fixture(scope="module")
def model() -> Decoder:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), random_model(TINY, 3))


@pytest.fixture(scope="module")
def folder(model: Decoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("int8") / "model"
    checkpoint.save_hf(model, path)
    return path


def logits(model: Decoder) -> np.ndarray:
    return np.asarray(jax.jit(lambda m: m.logits(m(IDS, POSITIONS).resid))(model))


def test_rows_are_rounded_to_the_nearest_of_255_steps() -> None:
    rows = np.array([[0.0, 0.5, -1.27], [0, 0, 0], [2.54, 0.011, -0.03]], np.float32)
    integers, scales = rounded(rows)
    np.testing.assert_allclose(scales, [0.01, 1, 0.02], rtol=1e-6)
    np.testing.assert_array_equal(integers, [[0, 50, -127], [0, 0, 0], [127, 1, -2]])


def test_a_folder_is_read_in_8_bits_as_the_model_is_rounded(model: Decoder, folder: Path) -> None:
    loaded, expected = checkpoint.load(folder, "int8"), quantize(model)
    for ours, theirs in zip(jax.tree.leaves(loaded), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == theirs.dtype
        ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
        # A quotient that lies half-way between two steps may be rounded to either.
        assert np.mean(ours != theirs) < 5e-3 and np.abs(ours - theirs).max() <= 1
    up = loaded.layers.mlp.up_proj
    assert isinstance(up, Int8Linear)
    stored = np.asarray(model.layers.mlp.up_proj.weight[...], np.float32)
    step = np.asarray(up.scale[...])[:, None]
    assert (np.abs(np.asarray(up.weight[...], np.float32) * step - stored) <= 0.5001 * step).all()


def test_it_computes_what_its_weights_say_and_nearly_what_the_model_does(model: Decoder, folder: Path) -> None:
    loaded = checkpoint.load(folder, "int8")
    widened = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), model)
    for part in ("self_attn", "mlp"):
        for name in model.config.matrices:
            if isinstance(of := getattr(getattr(loaded.layers, part), name, None), Int8Linear):
                values = of.weight[...].astype(jnp.float32) * of.scale[...][:, None]
                getattr(getattr(widened.layers, part), name).weight[...] = values
    # Factors of 16 bits, against the same weights in float32.
    assert relative_error(logits(loaded), logits(widened)) < 0.02
    assert 1e-4 < relative_error(logits(loaded), logits(model)) < 0.1


def test_cached_steps_in_either_form_equal_the_full_pass(folder: Path) -> None:
    loaded = checkpoint.load(folder, "int8")
    full = logits(loaded)
    for unstacked in (False, True):
        cache = jax.jit(lambda m: m(IDS[:, :4], POSITIONS[:, :4]).cache.extended(8))(loaded)
        decoder = loaded.unstacked() if unstacked else loaded
        out = decoder(
            jnp.asarray(IDS[:, 4:]), jnp.asarray(POSITIONS[:, 4:]), cache=cache.unstacked() if unstacked else cache
        )
        assert relative_error(decoder.logits(out.resid), full[:, 4:]) < 0.01


def test_it_is_sampled_from(folder: Path) -> None:
    loaded = checkpoint.load(folder, "int8")
    ids, positions = left_pad([[1, 2, 3], [4, 5]], 4)
    keys = jnp.stack([row_key(0, "", i) for i in range(2)])
    out = compiled_generate(loaded, ids, positions, keys, None, GREEDY, np.zeros(0, np.int32), max_new_tokens=4)
    text = [4, 5, *np.asarray(out.ids)[1].tolist()]
    full = loaded.logits(loaded(jnp.array([text]), jnp.arange(len(text))[None]).resid)[0]
    assert full[1:-1].argmax(-1).tolist() == text[2:]


def test_a_gguf_file_is_read_in_8_bits(smollm2_gguf: Path) -> None:
    loaded = checkpoint.load(str(smollm2_gguf), "int8")
    (of,) = [t for t in gguf.GGUFReader(smollm2_gguf).tensors if t.name == "blk.7.ffn_up.weight"]
    integers, scales = rounded(gguf.dequantize(of.data, of.tensor_type))
    up = loaded.layers.mlp.up_proj
    np.testing.assert_array_equal(np.asarray(up.weight[7]).T, integers)
    np.testing.assert_array_equal(np.asarray(up.scale[7]), scales)


def test_what_is_not_finite_is_named(model: Decoder, tmp_path: Path) -> None:
    broken = jax.tree.map(lambda leaf: leaf, model)
    broken.layers.mlp.up_proj.weight[...] = model.layers.mlp.up_proj.weight[...].at[2, 3, 4].set(jnp.nan)
    checkpoint.save_hf(broken, tmp_path / "broken")
    with pytest.raises(ValueError, match=r"not finite \(read as int8\) in\n  model.layers.2.mlp.up_proj.weight"):
        checkpoint.load(tmp_path / "broken", "int8")


def test_8_bits_are_not_written(model: Decoder, tmp_path: Path) -> None:
    for write in (checkpoint.save_hf, checkpoint.save_orbax):
        with pytest.raises(ValueError, match="a model with 8-bit weights is not written"):
            write(quantize(model), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_bytes_of_weights() -> None:
    matrices = 3 * sum(d_in * d_out for d_in, d_out in TINY.matrices.values())
    scales = 3 * 4 * sum(d_out for _, d_out in TINY.matrices.values())
    others = TINY.n_parameters - matrices
    assert weight_bytes(TINY, "bfloat16") == 2 * TINY.n_parameters
    assert weight_bytes(TINY, "int8") == matrices + scales + 2 * others
    assert abstract(TINY, jnp.dtype("int8")).dtype == jnp.bfloat16
