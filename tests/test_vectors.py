"""Steering vectors: files read back by other libraries, arithmetic, the released vectors, and every refusal."""

import io
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from sklearn.metrics.pairwise import cosine_similarity

from backtrack_jax.extract import WindowPlan, WindowSums
from backtrack_jax.vectors import LAYER_CONVENTION, SteeringVector, cosine, difference_of_means, load, save

L, D = 4, 6
SUFFIXES = (".safetensors", ".npz", ".gguf")
PROVENANCE = {"label": "backtracking", "window": [-13, -8], "counts": {"all": {"windows": 7}}, "model": "Größe — 8B"}


def random_vector(seed: int = 0) -> SteeringVector:
    return SteeringVector(np.random.default_rng(seed).normal(size=(L, D)).astype(np.float32), PROVENANCE)


def with_absent(*layers: int) -> SteeringVector:
    directions = random_vector().directions.copy()
    directions[list(layers)] = np.nan
    return SteeringVector(directions, PROVENANCE)


# Directions


def test_at_and_unit_and_norms() -> None:
    vector = SteeringVector(np.array([[3, 4, 0], [0, 0, -2]], np.float32))
    np.testing.assert_array_equal(vector.at(0), [3, 4, 0])
    np.testing.assert_allclose(vector.unit(0), [0.6, 0.8, 0])
    np.testing.assert_array_equal(vector.unit(1), [0, 0, -1])
    np.testing.assert_array_equal(vector.norms, [5, 2])
    assert vector.at(0).dtype == vector.unit(0).dtype == np.float32


@pytest.mark.parametrize("layer", [-1, L, 99])
def test_a_layer_out_of_range_is_refused(layer: int) -> None:
    with pytest.raises(ValueError, match=rf"layer={layer} is outside 0\.\.3"):
        random_vector().at(layer)


def test_an_absent_layer_is_refused() -> None:
    vector = with_absent(2)
    for use in (vector.at, vector.unit):
        with pytest.raises(ValueError, match="no finite direction at layer 2"):
            use(2)
    assert np.isfinite(vector.unit(1)).all()


def test_a_zero_direction_has_no_unit() -> None:
    with pytest.raises(ValueError, match="the vector is zero at layer 1"):
        (0 * random_vector()).unit(1)


@pytest.mark.parametrize("shape", [(D,), (1, L, D)])
def test_directions_are_layers_by_width(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected \[n_layers, d_model\]"):
        SteeringVector(np.zeros(shape, np.float32))


# Arithmetic


def test_activations_of_16_bits_make_a_vector_of_32() -> None:
    """The norm of 5000 numbers of 8 is no float16."""
    vector = SteeringVector(np.full((2, 5000), 8.0, np.float16))
    assert vector.directions.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vector.unit(1)), 1.0, rtol=1e-6)
    np.testing.assert_allclose(vector.norms, 8 * 5000**0.5, rtol=1e-6)


def test_a_provenance_is_kept_whatever_its_numbers_are(tmp_path: Path) -> None:
    vector = SteeringVector(np.ones((L, D)), {"n": np.int64(3), "share": np.float32(0.5), "file": Path("a/b")})
    for suffix in SUFFIXES:
        save(vector, tmp_path / f"v{suffix}")
        assert load(tmp_path / f"v{suffix}").provenance.items() >= {"n": 3, "share": 0.5, "file": "a/b"}.items()
    with pytest.raises(ValueError, match="provenance='happy', expected a mapping"):
        SteeringVector(np.ones((L, D)), "happy")  # pyright: ignore[reportArgumentType]


def test_arithmetic_works_layer_by_layer() -> None:
    a, b = random_vector(0), random_vector(1)
    combined = 2 * a - b
    np.testing.assert_allclose(combined.directions, 2 * a.directions - b.directions, rtol=1e-6)
    np.testing.assert_array_equal((a * np.float64(0.5)).directions, a.directions / 2)
    np.testing.assert_array_equal((-a).directions, -a.directions)
    np.testing.assert_array_equal((a + b).directions, (b + a).directions)
    assert combined.directions.dtype == np.float32
    np.testing.assert_array_equal(a.directions, random_vector(0).directions, "operands stay as they were")


def test_a_sum_remembers_its_terms() -> None:
    a, b = (SteeringVector(np.ones((1, 2), np.float32), {"label": label}) for label in "ab")
    assert (2 * a - b).provenance == {
        "sum": [{"factor": 2.0, "of": {"label": "a"}}, {"factor": -1.0, "of": {"label": "b"}}]
    }


def test_an_absent_layer_stays_absent() -> None:
    total = with_absent(1) + random_vector(1)
    assert np.isnan(total.directions).all(axis=1).tolist() == [False, True, False, False]


@pytest.mark.parametrize("shape", [(L, D + 1), (L + 1, D), (L, 1), (1, D)])
def test_unlike_shapes_never_combine(shape: tuple[int, ...]) -> None:
    """Complaint 12: shapes that numpy would broadcast included."""
    other = SteeringVector(np.ones(shape, np.float32))
    for combine in (lambda a, b: a + b, lambda a, b: a - b, cosine):
        with pytest.raises(ValueError, match=r"\(4, 6\) and .* do not match"):
            combine(random_vector(), other)


def test_cosine_equals_scikit_learn() -> None:
    a, b = random_vector(0), random_vector(1)
    expected = np.diag(cosine_similarity(a.directions.astype(float), b.directions.astype(float)))
    np.testing.assert_allclose(cosine(a, b), expected, rtol=1e-12)
    np.testing.assert_allclose(cosine(a, -3 * a), -1, rtol=1e-6)


def test_cosine_is_nan_where_there_is_no_direction() -> None:
    zero = SteeringVector(random_vector().directions * np.array([[1], [0], [1], [1]], np.float32))
    assert np.isnan(cosine(zero, with_absent(3))).tolist() == [False, True, False, True]


# Difference of means


@pytest.fixture
def sums() -> WindowSums:
    """Sums of three traces with known means: backtracking 5, all 2, rest 1 (of tokens: 7, 3, 1)."""
    groups = {"backtracking": ("b",), "all": ("b", "d"), "rest": ("d",)}
    plan = WindowPlan(("b", "d"), groups, ((-1, 0), (-13, -8)), layers=())
    total = WindowSums.zeros(plan, L, D)
    total.counts[:, :, 1] = [[2, 3, 3], [12, 36, 24]]
    for e, means in enumerate([(5.0, 2.0, 1.0), (7.0, 3.0, 1.0)]):
        total.sums[e, :, :, 1] = (np.array(means) * total.counts[e, :, 1])[:, None] * np.arange(1, L + 1)[:, None, None]
    total.read[:, 1], total.dropped[:, 1] = (2, 6, 4), (1, 3, 2)
    total.trace_ids += ["a/0", "b/0", "c/0"]
    return total


@pytest.mark.parametrize(
    ("contrast", "estimator", "expected"),
    [("all", "trace_mean", 3), ("rest", "trace_mean", 4), ("all", "token_mean", 4), ("rest", "token_mean", 6)],
)
def test_difference_of_means(sums: WindowSums, contrast: str, estimator: str, expected: int) -> None:
    """Eq. 3 at every layer; layer l holds l + 1 times the means."""
    vector = difference_of_means(sums, "backtracking", (-13, -8), contrast=contrast, estimator=estimator)
    assert vector.directions.dtype == np.float32
    np.testing.assert_allclose(vector.directions, expected * np.arange(1.0, L + 1)[:, None] * np.ones(D))


def test_a_vector_says_where_it_comes_from(sums: WindowSums) -> None:
    vector = difference_of_means(sums, "backtracking", (-13, -8), contrast="rest", provenance={"model": "m"})
    assert vector.provenance == {
        "model": "m",
        "label": "backtracking",
        "contrast": "rest",
        "window": [-13, -8],
        "estimator": "trace_mean",
        "into_prompt": False,
        "n_traces": 3,
        "counts": {"backtracking": {"windows": 2, "dropped": 1}, "rest": {"windows": 4, "dropped": 2}},
    }
    assert json.loads(json.dumps(vector.provenance)) == vector.provenance


def test_paper_defaults(sums: WindowSums) -> None:
    """Contrast `all`, estimator `trace_mean`."""
    vector = difference_of_means(sums, "backtracking", (-13, -8))
    assert (vector.provenance["contrast"], vector.provenance["estimator"]) == ("all", "trace_mean")


@pytest.mark.parametrize(
    ("label", "window", "changes", "message"),
    [
        ("humming", (-13, -8), {}, "group: 'humming' is not among"),
        ("backtracking", (-13, -9), {}, r"window: \(-13, -9\) is not among"),
        ("backtracking", (-13, -8), {"contrast": "none"}, "group: 'none' is not among"),
        ("backtracking", (-13, -8), {"estimator": "mode"}, "estimator: 'mode' is not among"),
        ("backtracking", (-1, 0), {}, r"no window \(-1, 0\) of group 'backtracking' was read"),
    ],
)
def test_a_difference_of_what_was_not_summed_is_refused(
    sums: WindowSums, label: str, window: tuple[int, int], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        difference_of_means(sums, label, window, **changes)


# Files


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("absent", [(0,), (0, 2), (0, 3), (0, 1, 2)])
def test_round_trip(tmp_path: Path, suffix: str, absent: tuple[int, ...]) -> None:
    """What a file holds is what was saved, to the bit; a GGUF file cannot hold layer 0, so it is absent here."""
    vector = with_absent(*absent)
    path = tmp_path / "deep" / f"vector{suffix}"
    save(vector, path)
    for n_layers in (None, L):
        read = load(path, n_layers=n_layers)
        np.testing.assert_array_equal(read.directions, vector.directions)
        assert read.directions.dtype == np.float32
        assert read.provenance == PROVENANCE
    assert [file.name for file in path.parent.iterdir()] == [path.name], "no temporary file stays"


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_layer_0_is_kept(tmp_path: Path, suffix: str) -> None:
    save(random_vector(), tmp_path / f"vector{suffix}")
    np.testing.assert_array_equal(load(tmp_path / f"vector{suffix}").directions, random_vector().directions)


def test_a_path_may_be_a_string(tmp_path: Path) -> None:
    save(random_vector(), f"{tmp_path}/v.safetensors")
    np.testing.assert_array_equal(load(f"{tmp_path}/v.safetensors").directions, random_vector().directions)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_saving_again_replaces(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"vector{suffix}"
    for seed in (0, 1):
        save(random_vector(seed), path)
        np.testing.assert_array_equal(load(path).directions[1:], random_vector(seed).directions[1:])


def test_safetensors_file_as_others_read_it(tmp_path: Path) -> None:
    """`direction.{layer}` float32, one tensor a layer; raw norms and layer convention in the metadata (T14, T27)."""
    vector = with_absent(1)
    save(vector, tmp_path / "vector.safetensors")
    tensors = load_file(tmp_path / "vector.safetensors")
    assert sorted(tensors) == ["direction.0", "direction.2", "direction.3"]
    assert {(tensor.dtype, tensor.shape) for tensor in tensors.values()} == {(np.dtype(np.float32), (D,))}
    for layer in (0, 2, 3):
        np.testing.assert_array_equal(tensors[f"direction.{layer}"], vector.directions[layer])
    with safe_open(tmp_path / "vector.safetensors", "np") as file:
        metadata = file.metadata()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    assert metadata["layer_convention"] == LAYER_CONVENTION == "block_output_0based"
    assert metadata["schema"] == "backtrack_jax.steering_vector.v1"
    assert int(metadata["n_layers"]) == L
    norms = json.loads(metadata["raw_norms"], parse_constant=refuse)
    assert norms[1] is None
    np.testing.assert_allclose(np.array(norms, float)[[0, 2, 3]], vector.norms[[0, 2, 3]])
    assert json.loads(metadata["provenance"], parse_constant=refuse) == PROVENANCE


def test_gguf_file_as_llama_cpp_reads_it(tmp_path: Path) -> None:
    """Architecture `controlvector`, 1-D F32 `direction.N` with N > 0; an absent layer is left out, not zero."""
    vector = with_absent(2)
    save(vector, tmp_path / "vector.gguf")
    reader = gguf.GGUFReader(tmp_path / "vector.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "controlvector"
    assert fields["controlvector.model_hint"] == "llama"
    assert fields["controlvector.layer_count"] == L - 1
    assert [tensor.name for tensor in reader.tensors] == ["direction.1", "direction.3"]
    for tensor, layer in zip(reader.tensors, (1, 3), strict=True):
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        np.testing.assert_array_equal(tensor.data, vector.directions[layer])


def write_gguf(path: Path, tensors: dict[str, np.ndarray], **fields: int) -> Path:
    writer = gguf.GGUFWriter(path, "controlvector")
    for name, value in fields.items():
        writer.add_uint32(f"controlvector.{name}", value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_file_of_repeng(tmp_path: Path) -> None:
    """It may hold a few layers only, in half precision, and tell nothing of the model's depth."""
    tensors = {f"direction.{layer}": np.full(D, layer, np.float16) for layer in (1, 2)}
    path = write_gguf(tmp_path / "repeng.gguf", tensors, layer_count=2)
    assert load(path).directions.shape == (3, D)
    vector = load(path, n_layers=L)
    np.testing.assert_array_equal(vector.directions[:, 0], [np.nan, 1, 2, np.nan])
    assert vector.provenance == {"file": "repeng.gguf"}


def test_gguf_file_with_a_direction_of_every_block(tmp_path: Path) -> None:
    """Some exporters count the directions and begin with block 0."""
    tensors = {f"direction.{layer}": np.full(D, layer, np.float32) for layer in range(L)}
    path = write_gguf(tmp_path / "all.gguf", tensors, layer_count=L)
    for vector in (load(path), load(path, n_layers=L)):
        np.testing.assert_array_equal(vector.directions[:, 0], np.arange(L))


def test_npz_file_as_numpy_reads_it(tmp_path: Path) -> None:
    save(random_vector(), tmp_path / "vector.npz")
    with np.load(tmp_path / "vector.npz", allow_pickle=False) as file:
        np.testing.assert_array_equal(file["directions"], random_vector().directions)
        assert json.loads(str(file["provenance"])) == PROVENANCE
        assert str(file["layer_convention"]) == LAYER_CONVENTION


def test_npz_file_of_others(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", directions=np.ones((L, D)))
    vector = load(tmp_path / "other.npz")
    assert vector.directions.dtype == np.float32
    assert vector.provenance == {"file": "other.npz"}


# Files of torch


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch", reason="reading .pt needs torch")


def test_pt_file_of_labels(tmp_path: Path, torch: Any) -> None:
    """The paper's released form: label -> [D], of one layer."""
    torch.save({"backtracking": torch.arange(D), "deduction": -torch.arange(D)}, tmp_path / "v.pt")
    vector = load(tmp_path / "v.pt", layer=2, n_layers=L)
    np.testing.assert_array_equal(vector.at(2), np.arange(D))
    assert np.isnan(vector.directions).all(axis=1).tolist() == [True, True, False, True]
    assert vector.provenance == {"file": "v.pt", "label": "backtracking"}
    np.testing.assert_array_equal(load(tmp_path / "v.pt", label="deduction", layer=2, n_layers=L).at(2), -np.arange(D))


@pytest.mark.parametrize("extra", [0, 1], ids=["layers", "embeddings and layers"])
def test_pt_file_of_layers(tmp_path: Path, torch: Any, extra: int) -> None:
    """[L + 1, D] starts with the embeddings, as Hugging Face's hidden states do (T14)."""
    rows = torch.nn.Parameter(torch.randn(L + extra, D, dtype=torch.bfloat16))
    torch.save(rows, tmp_path / "v.pt")
    vector = load(tmp_path / "v.pt", n_layers=L)
    np.testing.assert_array_equal(vector.directions, rows.detach().float().numpy()[extra:])
    assert vector.provenance == {"file": "v.pt"}


class Malicious:
    """Writes a file where it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_malicious_pickle_is_refused(tmp_path: Path, torch: Any) -> None:
    for number, contents in enumerate([Malicious(tmp_path / "owned"), {"backtracking": Malicious(tmp_path / "owned")}]):
        torch.save(contents, tmp_path / f"{number}.pt")
        (tmp_path / f"plain {number}.pt").write_bytes(pickle.dumps(contents, protocol=2))
        for name in (f"{number}.pt", f"plain {number}.pt"):
            with pytest.raises(ValueError, match=r"\.pt: not a \.pt file of plain tensors"):
                load(tmp_path / name)
    assert not (tmp_path / "owned").exists()
    torch.load(tmp_path / "0.pt", weights_only=False)
    assert (tmp_path / "owned").exists(), "the file is malicious"


@pytest.mark.parametrize(
    ("contents", "arguments", "message"),
    [
        ([D], {}, r"holds one direction \[6\]: say at which `layer` of `n_layers` it belongs"),
        ([D], {"layer": 1}, "say at which `layer` of `n_layers`"),
        ([D], {"layer": L, "n_layers": L}, r"direction\.4 is outside layers 0\.\.3"),
        ([L + 2, D], {"n_layers": L}, "6 layers, expected 4"),
        ([1, L, D], {}, r"shape \(1, 4, 6\), expected \[n_layers, d_model\]"),
        ([], {}, r"shape \(\), expected"),
        ({"deduction": 1, "initializing": 1}, {}, r"labels \['deduction', 'initializing'\], not 'backtracking'"),
        ({"backtracking": "text"}, {}, "holds a str, expected a tensor"),
        ({1: 1, "deduction": 1}, {}, r"labels \['1', 'deduction'\], not 'backtracking'"),
    ],
)
def test_pt_files_that_are_no_vector(
    tmp_path: Path, torch: Any, contents: Any, arguments: dict[str, Any], message: str
) -> None:
    torch.save(torch.zeros(contents) if isinstance(contents, list) else contents, tmp_path / "v.pt")
    with pytest.raises(ValueError, match=rf"v\.pt: .*{message}"):
        load(tmp_path / "v.pt", **arguments)


# Refusals


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".pt"])
@pytest.mark.parametrize("contents", [b"", b"not a vector\n" * 9], ids=["empty", "text"])
def test_a_file_of_another_format_is_named(tmp_path: Path, suffix: str, contents: Any) -> None:
    if suffix == ".pt":
        pytest.importorskip("torch", reason="reading .pt needs torch")
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(contents)
    with pytest.raises(ValueError, match=rf"broken\{suffix}: not an? \.?\w+ file"):
        load(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_truncated_file_is_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"cut{suffix}"
    save(random_vector(), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"cut\{suffix}: not an? "):
        load(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_vector_of_another_model_is_named(tmp_path: Path, suffix: str) -> None:
    save(random_vector(), tmp_path / f"vector{suffix}")
    with pytest.raises(ValueError, match=rf"vector\{suffix}: 4 layers, expected 3"):
        load(tmp_path / f"vector{suffix}", n_layers=3)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.npz: no such vector file"):
        load(tmp_path / "absent.npz")


def test_an_unknown_suffix_is_named(tmp_path: Path) -> None:
    (tmp_path / "vector.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"vector\.bin: a vector is read from one of \['\.gguf', .*'\.safetensors'\]"):
        load(tmp_path / "vector.bin")
    with pytest.raises(ValueError, match=r"vector\.pt: a vector is saved as one of \['\.gguf', '\.npz'"):
        save(random_vector(), tmp_path / "vector.pt")


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"direction.0": (D,)}, {"layer_convention": None}, "layer_convention=None in the metadata, expected"),
        ({"direction.0": (D,)}, {"layer_convention": "embeddings_first"}, "layer_convention='embeddings_first'"),
        ({"direction.0": (D,)}, {"n_layers": None}, "n_layers=None in the metadata, expected a number"),
        ({"direction.4": (D,)}, {}, r"direction\.4 is outside layers 0\.\.3"),
        ({"base/backtracking": (D,)}, {}, r"holds 'base/backtracking', expected direction\.0"),
        ({"direction.0": (D,), "direction.1": (D + 1,)}, {}, r"shapes \[\(6,\), \(7,\)\], expected one \[d_model\]"),
        ({"direction.0": (L, D)}, {}, r"shapes \[\(4, 6\)\], expected one \[d_model\]"),
        ({}, {}, r"shapes \[\], expected one \[d_model\]"),
    ],
)
def test_safetensors_files_that_are_no_vector(
    tmp_path: Path, tensors: dict[str, Any], metadata: dict[str, Any], message: str
) -> None:
    metadata = {"layer_convention": LAYER_CONVENTION, "n_layers": str(L)} | metadata
    arrays = {name: np.zeros(shape, np.float32) for name, shape in tensors.items()}
    save_file(arrays, tmp_path / "v.safetensors", {key: value for key, value in metadata.items() if value is not None})
    with pytest.raises(ValueError, match=rf"v\.safetensors: .*{message}"):
        load(tmp_path / "v.safetensors")


def test_tensors_that_are_not_plain_numbers(tmp_path: Path, torch: Any) -> None:
    for tensor in (torch.zeros((L, D), dtype=torch.complex64), torch.zeros((L, D)).to_sparse()):
        torch.save(tensor, tmp_path / "v.pt")
        with pytest.raises(ValueError, match=r"v\.pt: holds a tensor of .*, expected real and dense numbers"):
            load(tmp_path / "v.pt")


def test_units_of_extreme_vectors_have_norm_one() -> None:
    for factor in (1e-30, 1e-22, 1.0, 1e30):
        unit = SteeringVector((factor * np.ones((1, D))).astype(np.float32)).unit(0)
        assert unit.dtype == np.float32 and np.linalg.norm(unit) == pytest.approx(1, abs=1e-6)


def test_provenance_in_somebody_s_own_words(tmp_path: Path) -> None:
    np.savez(tmp_path / "v.npz", directions=np.ones((L, D)), provenance="mine, by hand")
    assert load(tmp_path / "v.npz").provenance == {"file": "v.npz", "note": "mine, by hand"}


def test_a_damaged_npz_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "v.npz", directions=np.ones((L, D)))
    content = bytearray((tmp_path / "v.npz").read_bytes())
    content[200] ^= 1
    (tmp_path / "v.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"v\.npz: a damaged \.npz file"):
        load(tmp_path / "v.npz")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"vector": np.zeros((L, D))}, r"arrays \['vector'\], expected 'directions'"),
        ({"directions": np.zeros(D)}, r"shape \(6,\), expected \[n_layers, d_model\]"),
        ({"directions": np.array([[None]])}, "allow_pickle=False"),
        ({"directions": np.zeros((L, D), complex)}, "directions of complex128, expected real numbers"),
        ({"directions": np.zeros((L, D)), "layer_convention": "other"}, "layer_convention='other', expected"),
    ],
)
def test_npz_files_that_are_no_vector(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "v.npz", **arrays)
    with pytest.raises(ValueError, match=rf"v\.npz: .*{message}"):
        load(tmp_path / "v.npz")


def test_gguf_files_that_are_no_vector(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", {"token_embd.weight": np.zeros((L, D), np.float32)})
    with pytest.raises(ValueError, match=r"model\.gguf: holds 'token_embd\.weight', expected direction\.0"):
        load(path)
    quantised = gguf.quantize(np.ones((1, 32), np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer = gguf.GGUFWriter(tmp_path / "small.gguf", "controlvector")
    writer.add_tensor("direction.1", quantised, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"small\.gguf: direction\.1 is of type Q8_0, expected F32 or F16"):
        load(tmp_path / "small.gguf")


def test_layer_0_alone_cannot_become_gguf(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot hold layer 0"):
        save(with_absent(1, 2, 3), tmp_path / "v.gguf")
    assert not list(tmp_path.iterdir())


# The released vectors


def test_released_vectors(ward2025: Path, torch: Any) -> None:
    """Set A of the authors: norms 0.631 (base) and 0.656 (reasoning), cosine 0.716."""
    base = load(ward2025 / "base_steering_vectors.pt", layer=10, n_layers=32)
    released = load_file(ward2025 / "layer10_vectors.safetensors")
    np.testing.assert_array_equal(base.at(10), released["base/backtracking"])
    directions = np.full_like(base.directions, np.nan)
    directions[10] = released["reasoning/backtracking"]
    reasoning = SteeringVector(directions)
    assert round(float(base.norms[10]), 3) == 0.631
    assert round(float(reasoning.norms[10]), 3) == 0.656
    assert round(float(cosine(base, reasoning)[10]), 3) == 0.716
    assert np.isnan(np.delete(cosine(base, reasoning), 10)).all()


def test_released_labels(ward2025: Path, torch: Any) -> None:
    with pytest.raises(ValueError, match=r"labels .*'uncertainty-estimation'.*, not 'wait'"):
        load(ward2025 / "base_steering_vectors.pt", label="wait", layer=10, n_layers=32)
    with pytest.raises(ValueError, match="layer_convention=None in the metadata"):
        load(ward2025 / "layer10_vectors.safetensors")


def test_an_array_that_announces_more_than_there_is_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "v.npz"
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (32, 1 << 27)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("directions.npy", header.getvalue() + bytes(64))
    with pytest.raises(ValueError, match=r"directions.npy announces 17,179,869,184 bytes and holds 192 at most"):
        load(path)
