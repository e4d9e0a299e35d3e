"""Sparse autoencoders from both layouts: numbers of numpy, rows as kinds, and what is refused by name."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny
from safetensors.numpy import save_file

from backtrack_jax import conditions, inputs, kinds, pipeline, sae_files
from backtrack_jax.compatibility import check_planned
from backtrack_jax.data.records import Condition
from backtrack_jax.generate import row_key
from backtrack_jax.stages.steering import STEERING

D, F = 16, 40
RNG = np.random.default_rng(0)
W_ENC = RNG.standard_normal((D, F)).astype(np.float32)
W_DEC = (RNG.standard_normal((F, D)) * RNG.uniform(0.5, 2, (F, 1))).astype(np.float32)
B_ENC, B_DEC = RNG.standard_normal(F).astype(np.float32), RNG.standard_normal(D).astype(np.float32)
THRESHOLD = RNG.uniform(0.5, 3, F).astype(np.float32)
R_MAG, B_GATE = (0.1 * RNG.standard_normal(F)).astype(np.float32), RNG.standard_normal(F).astype(np.float32)
X = (3 * RNG.standard_normal((50, D))).astype(np.float32)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sae_files, "BLOCK", 7)  # of 40 features: the last block is a smaller one


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the models and chains of the tiny experiment, nothing of it run."""
    tiny.write(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def saelens(folder: Path, tensors: dict[str, np.ndarray] | None = None, **fields: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = {"architecture": "standard", "d_in": D, "d_sae": F, "hook_name": "blocks.1.hook_resid_post"} | fields
    (folder / "cfg.json").write_text(json.dumps(config))
    weights = {"W_enc": W_ENC, "W_dec": W_DEC, "b_enc": B_ENC, "b_dec": B_DEC} | (tensors or {})
    save_file({name: np.ascontiguousarray(w) for name, w in weights.items()}, folder / "sae_weights.safetensors")
    return folder


def llama_scope(
    folder: Path, tensors: dict[str, np.ndarray] | None = None, *, new: bool = False, **fields: Any
) -> Path:
    config = {
        "hook_point_in": "blocks.1.hook_resid_post",
        "hook_point_out": "blocks.1.hook_resid_post",
        "act_fn": "jumprelu",
        "jump_relu_threshold": 0.3,
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": 6.0, "out": 6.0},
        "apply_decoder_bias_to_pre_encoder": False,
        "sparsity_include_decoder_norm": True,
        "d_model": D,
        "d_sae": F,
        "top_k": 50,
    } | fields
    weights = {"encoder.weight": W_ENC.T, "encoder.bias": B_ENC, "decoder.weight": W_DEC.T, "decoder.bias": B_DEC}
    name = "sae_weights.safetensors" if new else "checkpoints/final.safetensors"
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / ("config.json" if new else "hyperparams.json")).write_text(json.dumps(config))
    save_file({k: w.copy(order="C") for k, w in (weights | (tensors or {})).items()}, folder / name)
    return folder


def encoded(sae: sae_files.SAE) -> np.ndarray:
    blocks = list(sae.encode(X))
    assert [len(features) for features, _ in blocks] == [7] * 5 + [5]
    return np.concatenate([values for _, values in blocks], axis=1)


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


def test_standard_of_saelens(tmp_path: Path) -> None:
    for centred in (False, True):
        sae = sae_files.load(saelens(tmp_path / str(centred), apply_b_dec_to_input=centred), d_model=D, n_layers=3)
        f = relu((X - centred * B_DEC) @ W_ENC + B_ENC)
        assert (sae.layer, sae.d_sae, sae.d_model) == (1, F, D)
        np.testing.assert_allclose(encoded(sae), f, atol=1e-4)
        out, active = sae.rebuild(X)
        np.testing.assert_allclose(out, f @ W_DEC + B_DEC, rtol=1e-4, atol=1e-3)
        np.testing.assert_array_equal(active, (encoded(sae) > 0).sum(1))
        np.testing.assert_array_equal(sae.row(23), W_DEC[23])


def test_architectures_of_saelens(tmp_path: Path) -> None:
    before = X @ W_ENC + B_ENC
    jump = sae_files.load(saelens(tmp_path / "jump", {"threshold": THRESHOLD}, architecture="jumprelu"))
    np.testing.assert_allclose(encoded(jump), relu(before) * (before > THRESHOLD), atol=1e-4)
    expected = np.zeros_like(before)
    top = np.argsort(-before, axis=1)[:, :5]
    np.put_along_axis(expected, top, relu(np.take_along_axis(before, top, 1)), 1)
    for number, fields in enumerate(
        (
            {"architecture": "topk", "k": 5},
            {"architecture": "topk", "activation_fn_kwargs": {"k": 5}, "activation_fn_str": "topk"},
            {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 5}},
        )
    ):
        np.testing.assert_allclose(
            encoded(sae_files.load(saelens(tmp_path / f"top{number}", **fields))), expected, atol=1e-4
        )
    gates = {"b_gate": B_GATE, "r_mag": R_MAG, "b_mag": B_ENC}
    gated = sae_files.load(saelens(tmp_path / "gated", gates, architecture="gated"))
    magnitude = relu(X @ (W_ENC * np.exp(R_MAG)) + B_ENC)
    np.testing.assert_allclose(encoded(gated), magnitude * (X @ W_ENC + B_GATE > 0), rtol=1e-4, atol=1e-4)


def test_scaled_activations_of_saelens(tmp_path: Path) -> None:
    nested = {"metadata": {"hook_name": "blocks.1.hook_resid_post"}, "hook_name": None}
    factors = {
        "constant_norm_rescale": math.sqrt(D) / np.linalg.norm(X, axis=1, keepdims=True),
        "expected_average_only_in": 0.4,
    }
    for way, factor in factors.items():
        sae = sae_files.load(saelens(tmp_path / way, normalize_activations=way, norm_scaling_factor=0.4, **nested))
        f = relu(factor * X @ W_ENC + B_ENC)
        np.testing.assert_allclose(encoded(sae), f, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(sae.rebuild(X)[0], (f @ W_DEC + B_DEC) / factor, rtol=1e-4, atol=1e-2)


def test_llama_scope_as_its_authors_use_it(tmp_path: Path) -> None:
    """Against their own order of steps: the norm folded into biases, rows at norm 1, a threshold on raw activations."""
    scale, norms = math.sqrt(D) / 6.0, np.linalg.norm(W_DEC, axis=1)
    before = (X @ W_ENC + B_ENC / scale) * norms
    raw = relu(before) * (before > 0.3)
    for act_fn in ("jumprelu", "topk"):
        sae = sae_files.load(llama_scope(tmp_path / act_fn, act_fn=act_fn), d_model=D, n_layers=2)
        np.testing.assert_allclose(encoded(sae), raw / norms * scale, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(
            sae.rebuild(X)[0], raw @ (W_DEC / norms[:, None]) + B_DEC / scale, rtol=1e-4, atol=1e-2
        )
        np.testing.assert_array_equal(sae.row(39), W_DEC[39])
        assert sae.layer == 1


def test_newer_llama_scope_has_its_threshold_among_the_weights(tmp_path: Path) -> None:
    hook = "blocks.1.hook_resid_post"
    beside = {
        "log_jumprelu_threshold": np.log(THRESHOLD),
        f"dataset_average_activation_norm.{hook}": np.full((), 6.0, np.float32),
    }
    folder = llama_scope(tmp_path / "new", beside, new=True, dataset_average_activation_norm=None)
    scale, norms = math.sqrt(D) / 6.0, np.linalg.norm(W_DEC, axis=1)
    before = scale * X @ W_ENC + B_ENC
    expected = relu(before) * (before * norms > THRESHOLD)
    np.testing.assert_allclose(encoded(sae_files.load(folder)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"hook_name": "blocks.1.hook_mlp_out"}, "hook 'blocks.1.hook_mlp_out', expected the output of a block"),
        ({"hook_name": "blocks.0.hook_resid_pre"}, "hook 'blocks.0.hook_resid_pre'"),
        ({"architecture": "matryoshka"}, "architecture='matryoshka' is not handled, expected 'standard'"),
        ({"architecture": "topk"}, "k=0, expected the number of features"),
        ({"architecture": "jumprelu"}, "no tensor 'threshold' among the weights"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations='layer_norm' is not handled"),
        ({"normalize_activations": "expected_average_only_in"}, "without the factor; expected norm_scaling_factor"),
        ({"finetuning_scaling_factor": True}, "finetuning_scaling_factor=True is not handled"),
        ({"reshape_activations": "hook_z"}, "reshape_activations='hook_z' is not handled"),
        ({"activation_fn": "tanh-relu"}, "activation_fn='tanh-relu' is not handled, expected 'relu'"),
        ({"hook_name": "blocks.3.hook_resid_post"}, "reads block 3, the model has blocks 0..2"),
    ],
)
def test_what_is_not_handled_is_refused_by_name(tmp_path: Path, fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=r"sae: .*") as error:
        sae_files.load(saelens(tmp_path / "sae", **fields), d_model=D, n_layers=3)
    assert says in str(error.value)


def test_other_files_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected the folder of a sparse autoencoder, with one of cfg\.json"):
        sae_files.load(tmp_path)
    good = saelens(tmp_path / "wide")
    with pytest.raises(ValueError, match="reads activations of width 16, the model has 24"):
        sae_files.load(good, d_model=24)
    with pytest.raises(ValueError, match=r"the encoder has the shape \(16, 39\), expected \(16, 40\)"):
        sae_files.load(saelens(tmp_path / "odd", {"W_enc": W_ENC[:, 1:]}))
    with pytest.raises(ValueError, match="row 40 is outside 0\\.\\.39"):
        sae_files.load(good).row(40)
    with pytest.raises(ValueError, match="a transcoder"):
        sae_files.load(llama_scope(tmp_path / "tc", hook_point_out="blocks.1.hook_mlp_out"))
    with pytest.raises(ValueError, match="dataset_average_activation_norm=None, expected the mean norm"):
        sae_files.load(llama_scope(tmp_path / "norm", dataset_average_activation_norm=None))
    (good / "sae_weights.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match="truncated or not a safetensors file"):
        sae_files.load(good)


def test_names_of_hooks_are_translated() -> None:
    assert sae_files.layer_of("blocks.10.hook_resid_post") == sae_files.layer_of("blocks.11.hook_resid_pre") == 10


def test_a_row_is_a_kind_and_steers(written: Path) -> None:
    """Alone, in a sum and ablated, at the layer of the autoencoder alone; told apart by content."""
    saelens(written / "folder" / "sae")
    name = "folder/sae#23"
    assert kinds.is_vector_file(name) and kinds.sae_row(name) == ("folder/sae", 23) and not kinds.parse(name).read
    assert not any(map(kinds.is_vector_file, (f"ablate:{name}", f"{name} + deduction", "folder/sae#x", "sae#")))
    e = tiny.get_config()
    e.steering.kinds, e.steering.layer = (name, f"ablate:{name}", f"{name} + 0.5 * deduction"), (1,)
    check_planned(e)
    run = pipeline.Run(e)
    loaded = inputs.vector_files(e, 3)[name]
    np.testing.assert_array_equal(loaded.at(1), W_DEC[23])
    made = conditions.Interventions(conditions.Readings({}, {}, {}, {name: loaded}), 3, D, "all")
    row = made.row(Condition("base", name, "", 1, "", 8.0, 8.0), row_key(0, "p", 0))
    (added,) = (leaf for leaf in jax.tree.leaves(row.terms) if leaf.shape == (3, D))
    np.testing.assert_allclose(added[1], 8 * W_DEC[23] / np.linalg.norm(W_DEC[23]), rtol=1e-5)
    assert not np.asarray(added)[[0, 2]].any()
    before = run.inputs[STEERING.name]
    saelens(written / "folder" / "sae", {"W_dec": 2 * W_DEC})
    assert STEERING.inputs(e)["vector_files"] != before["vector_files"]
    e.steering.layer = (2,)
    with pytest.raises(
        ValueError, match=r"sae#23: the vector has no finite direction at layer 2, which is steering\.layer"
    ):
        check_planned(e)
    shutil.rmtree(written / "folder")
    with pytest.raises(FileNotFoundError, match="folder/sae: no such file or folder"):
        check_planned(e)
