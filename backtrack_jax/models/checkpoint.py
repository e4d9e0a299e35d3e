"""Weights from Hugging Face folders and hub ids, GGUF files and Orbax folders into a `Decoder`, and back.

A checkpoint that is not understood in full is refused, with all its faults in one message, before any weight is read.
Two kinds of superfluous tensors are known and accepted: `rotary_emb.inv_freq` of old files, which the configuration
determines, and the `lm_head.weight` of a model with tied embeddings if it equals the embedding bit for bit.

Memory: weights are filled one at a time and layer by layer, each device's part from a memory map of one tensor that
ends with it, so loading needs little more than the model (`scripts/make_random_checkpoint.py --load` measures it).
"""

import functools
import itertools
import json
import math
import os
import re
import shutil
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from huggingface_hub import snapshot_download, try_to_load_from_cache
from jax.sharding import Mesh, Sharding
from jax.typing import DTypeLike

from backtrack_jax.files.malformed import named
from backtrack_jax.files.paths import local_path
from backtrack_jax.models import families, gguf, safetensors
from backtrack_jax.models.config import ModelConfig
from backtrack_jax.models.decoder import Decoder
from backtrack_jax.models.quantized import abstract, activation_dtype, rounded
from backtrack_jax.models.safetensors import LazyTensor
from backtrack_jax.models.sharding import shardings

DTYPES = ("bfloat16", "float16", "float32", "int8")
SHARD_BYTES = 5_000_000_000

_CONFIG, _WEIGHTS, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_ORBAX = "params"  # subfolder with the weights, beside config.json
_HUB_FILES, _HUB_WEIGHTS = ["*.json", "*.jinja"], ["model*.safetensors"]
_EMBEDDING, _LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
_HARMLESS = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
_COMPARED_ROWS = 4096
_ALIGNMENT = 64  # bytes, of memory that JAX takes over
_TILE = 256  # rows and columns: two tiles fit into a core's cache

Keys = tuple[str, ...]  # of a weight in the model


def resolve(path_or_id: str | os.PathLike[str], revision: str | None = None, *, weights: bool = True) -> Path:
    """Finds a model on disk, fetching it from the Hugging Face hub if it is a hub id that is not there yet.

    Args:
      path_or_id: a folder or `.gguf` file; `package:NAME/FILE`, a file or folder inside an installed Python package;
        or else a hub id, `owner/name`.
      revision: commit, tag or branch of a hub id.
      weights: whether those of a hub id are fetched too, or no more than configuration and tokenizer.

    Returns:
      The folder or file; a tokenizer is in the same place.

    Raises:
      FileNotFoundError: there is nothing under that name, or its package is not installed; says what to install.
    """
    path_or_id = os.fspath(path_or_id)
    path = local_path(path_or_id)
    if path.exists():
        return path
    if not is_hub_id(path_or_id):
        raise FileNotFoundError(f"there is no folder or file {path_or_id}")
    try:
        return Path(
            snapshot_download(path_or_id, revision=revision, allow_patterns=_HUB_FILES + _HUB_WEIGHTS * weights)
        )
    except OSError as error:  # of the network and of the hub alike
        raise FileNotFoundError(
            f"{path_or_id} is not a folder or file here, and the Hugging Face hub did not give it "
            f"(revision {revision or 'main'}): {error}"
        ) from error


def is_hub_id(path_or_id: str | os.PathLike[str]) -> bool:
    """Whether the hub is asked for it where no folder or file has this name: `owner/name`."""
    return bool(re.fullmatch(r"(?!\.)[\w.-]+/[\w.-]+(?<!\.gguf)", os.fspath(path_or_id)))


def hub_commit(path_or_id: str | os.PathLike[str], revision: str | None = None) -> str | None:
    """Commit that a hub id stood for when it was fetched; None for anything else, or where it was not fetched."""
    if Path(path_or_id).expanduser().exists() or not is_hub_id(path_or_id):
        return None
    cached = try_to_load_from_cache(os.fspath(path_or_id), "config.json", revision=revision)
    return Path(cached).parent.name if isinstance(cached, str) else None


def read_config(path: str | os.PathLike[str]) -> ModelConfig:
    """Reads the configuration of a checkpoint and none of its weights.

    Args:
      path: what `resolve` returned.

    Raises:
      FileNotFoundError: there is no checkpoint.
      ValueError: it is not a model that this program implements.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        with named(path, "a GGUF file of a model"):
            return gguf.open_gguf(path)[0]
    if not (path / _CONFIG).is_file():
        raise FileNotFoundError(
            f"{path} is not a checkpoint: it has no {_CONFIG} and is not a .gguf file{_others(path)}"
        )
    with named(path / _CONFIG, "the configuration of a model"):
        return families.from_hf_file(path / _CONFIG)


def check(path: str | os.PathLike[str]) -> None:
    """Refuses a checkpoint that `load` would refuse, as far as that shows without reading weights; takes no time.

    Args:
      path: what `resolve` returned.

    Raises:
      FileNotFoundError, ValueError: as `load`.
    """
    path = Path(path)
    with named(path, "a checkpoint"):
        if (path / _ORBAX).is_dir():
            read_config(path)
        else:
            _open(path)


def load(
    path_or_id: str | os.PathLike[str],
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    revision: str | None = None,
) -> Decoder:
    """Loads a model.

    Args:
      path_or_id: what `resolve` takes: a Hugging Face folder or hub id, a GGUF file, a folder of `save_orbax`.
      dtype: `bfloat16`, `float16` or `float32`, or such a dtype; `int8` for the blocks' matrices in 8 bits, see
        `quantized`; None for the smallest float that holds every stored weight exactly.
      mesh: devices to spread the weights over, from `sharding.make_mesh`; None for the default device.
      revision: commit, tag or branch of a hub id.

    Returns:
      The model.

    Raises:
      FileNotFoundError: there is no such model.
      ValueError: names everything in the checkpoint that is unknown, missing, of the wrong shape or dtype, there twice,
        in contradiction to its index, truncated or not finite.
    """
    name = None if dtype is None else _dtype_name(dtype)
    path = resolve(path_or_id, revision)
    if (path / _ORBAX).is_dir():
        if name == "int8":
            raise ValueError(f"{path} is an Orbax folder, which is not read in 8 bits; expected Hugging Face's or GGUF")
        return _load_orbax(path, name, mesh)
    config, tensors = _open(path)
    target_dtype = jnp.dtype(name or _exact_dtype(tensors[name].dtype for name in expected_tensors(config)))
    return _fill(config, tensors, target_dtype, mesh)


def _dtype_name(dtype: DTypeLike) -> str:
    try:
        name = jnp.dtype(dtype).name
    except TypeError:  # no dtype at all
        name = None
    if name not in DTYPES:
        raise ValueError(f"dtype={dtype!r}, expected one of {DTYPES} or None")
    return name


def save_hf(model: Decoder, folder: str | os.PathLike[str]) -> None:
    """Writes `config.json` and safetensors for Hugging Face transformers; an interrupted write leaves no such folder.

    Raises:
      FileExistsError: the folder exists.
    """
    _refuse_int8(model)
    tensors = {}
    for path, array in _weights(model).items():
        for layer, name in enumerate(_hf_names(path, model.config.n_layers)):
            read = functools.partial(_hf_array, path, array, layer)
            tensors[name] = LazyTensor(_hf_shape(path, array.shape), array.dtype, read, "the model in memory")
    write_hf(model.config, tensors, folder)


def write_hf(
    config: ModelConfig,
    tensors: Mapping[str, LazyTensor],
    folder: str | os.PathLike[str],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a Hugging Face folder from tensors that are read one at a time.

    Args:
      config: architecture.
      tensors: Hugging Face name to tensor.
      folder: made here, complete or not at all.
      shard_bytes: largest file.

    Raises:
      FileExistsError: the folder exists.
      ValueError: the tensors are not those of the architecture.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists; a checkpoint is never overwritten")
    faults = _faults(config, tensors, set())
    if faults:
        raise ValueError("these are not the weights that the configuration describes:\n  " + "\n  ".join(faults))
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed run
    partial.mkdir(parents=True)
    safetensors.write_shards(partial, tensors, shard_bytes)
    _write_config(config, partial)
    partial.rename(folder)


def save_orbax(model: Decoder, folder: str | os.PathLike[str]) -> None:
    """Writes weights with Orbax, each device its part, beside a `config.json`; `load` reads the folder back.

    Orbax gives `params` its name when it is complete, so an interrupted write is not taken for a checkpoint.

    Raises:
      FileExistsError: the folder holds a checkpoint.
    """
    _refuse_int8(model)
    folder = Path(folder)
    if (folder / _ORBAX).exists():
        raise FileExistsError(f"{folder} holds a checkpoint, which is never overwritten")
    folder.mkdir(parents=True, exist_ok=True)
    _write_config(model.config, folder)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((folder / _ORBAX).absolute(), nnx.to_pure_dict(nnx.state(model)))


def _refuse_int8(model: Decoder) -> None:
    if any(path[-1] == "scale" for path in _weights(model)):
        raise ValueError("a model with 8-bit weights is not written: load it with another dtype, and write that")


def _write_config(config: ModelConfig, folder: Path) -> None:
    (folder / _CONFIG).write_text(json.dumps(families.to_hf(config), indent=2) + "\n")


def _open(path: Path) -> tuple[ModelConfig, Mapping[str, LazyTensor]]:
    """Configuration and tensors of a Hugging Face folder or GGUF file; ValueError lists what does not fit."""
    file_faults, unreadable = [], set()
    if path.suffix == ".gguf":
        config, tensors = gguf.open_gguf(path)
    else:
        config = read_config(path)
        tensors, file_faults, unreadable = _open_folder(path)
    if faults := file_faults + _faults(config, tensors, unreadable):
        raise ValueError(
            f"{path} does not hold the weights that its configuration describes:\n  " + "\n  ".join(faults)
        )
    return config, tensors


def _open_folder(path: Path) -> tuple[dict[str, LazyTensor], list[str], set[str]]:
    """Tensors of the file, or of the files that the index names; the folder is not searched for others.

    Returns:
      Name to tensor, all faults, and the names of tensors in files that cannot be read at all.
    """
    single, index = path / _WEIGHTS, path / _INDEX
    if single.is_file() and index.is_file():
        raise ValueError(f"{path} has both {_WEIGHTS} and {_INDEX}; remove the one that is not wanted")
    if single.is_file():
        found, faults = safetensors.read_header(single)
        if not found:
            raise ValueError("\n  ".join(faults) or f"{single} holds no tensor")
        return found, faults, set()
    if not index.is_file():
        raise FileNotFoundError(
            f"{path} has neither {_WEIGHTS} nor {_INDEX} nor an Orbax folder {_ORBAX}{_others(path)}"
        )
    try:
        weight_map = {name: str(file) for name, file in json.loads(index.read_text())["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not an index of safetensors files: {error!r}") from error
    tensors: dict[str, LazyTensor] = {}
    faults, unreadable = [], set()
    for file in sorted(set(weight_map.values())):
        listed = {name for name, where in weight_map.items() if where == file}
        if Path(file).name != file:
            faults.append(f"{_INDEX} places {len(listed)} tensors in {file!r}, expected a file of the folder itself")
            unreadable |= listed
            continue
        if not (path / file).is_file():
            faults.append(f"{path / file} is missing; {_INDEX} places {len(listed)} tensors in it")
            unreadable |= listed
            continue
        found, its_faults = safetensors.read_header(path / file)
        faults += its_faults
        if not found:
            faults += [] if its_faults else [f"{path / file} holds no tensor; {_INDEX} places {len(listed)} in it"]
            unreadable |= listed
            continue
        faults += [
            f"{_INDEX} places {name} in {file}, which does not hold it" for name in sorted(listed - found.keys())
        ]
        faults += [
            f"{name} is in {file} and in {tensors[name].source}" for name in sorted(found.keys() & tensors.keys())
        ]
        faults += [
            f"{file} holds {name}, which {_INDEX} does not name" for name in sorted(found.keys() - weight_map.keys())
        ]
        tensors |= found
    return tensors, faults, unreadable | weight_map.keys() - tensors.keys()


def _others(path: Path) -> str:
    """End of a message that names weights in forms that are not read."""
    found = sorted(file.name for pattern in ("pytorch_model*", "consolidated*") for file in path.glob(pattern))
    return f"; it has {', '.join(found)}: convert that to Hugging Face's safetensors" if found else ""


@functools.cache
def _shapes(config: ModelConfig) -> Mapping[Keys, tuple[int, ...]]:
    """Path such as ("layers", "mlp", "up_proj", "weight") to shape; of `layers` with a leading axis L."""
    return {path: weight.shape for path, weight in _weights(abstract(config, jnp.dtype(jnp.float32))).items()}


def _weights(model: Decoder) -> dict[Keys, Any]:
    return _flat(nnx.to_pure_dict(nnx.state(model)))


def _with_weights(config: ModelConfig, dtype: jnp.dtype, weights: Mapping[Keys, jax.Array]) -> Decoder:
    graphdef, state = nnx.split(abstract(config, dtype))
    nnx.replace_by_pure_dict(state, unflatten_dict(weights))
    return nnx.merge(graphdef, state)


def _flat(tree: Mapping[str, Any]) -> dict[Keys, Any]:
    flat: Any = flatten_dict(tree)
    return flat


def _hf_names(path: Keys, n_layers: int) -> list[str]:
    """Hugging Face's names of what a weight holds, which are the paths of modules here: one per layer, or one."""
    stem = ".".join(path)
    if path[0] == "layers":
        return [f"model.layers.{layer}.{stem.removeprefix('layers.')}" for layer in range(n_layers)]
    return [stem if path[0] == "lm_head" else f"model.{stem}"]


def _hf_shape(path: Keys, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without L, and matrices of the blocks, [in, out] here, as [out, in]."""
    return shape[:0:-1] if path[0] == "layers" else shape


def _hf_array(path: Keys, array: jax.Array, layer: int) -> np.ndarray:
    return np.asarray(array)[layer].T if path[0] == "layers" else np.asarray(array)


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face name to shape of all that a checkpoint must hold."""
    return {
        name: _hf_shape(path, shape)
        for path, shape in _shapes(config).items()
        for name in _hf_names(path, config.n_layers)
    }


def _faults(config: ModelConfig, tensors: Mapping[str, LazyTensor], unreadable: Container[str]) -> list[str]:
    """What keeps the tensors from being the model's; of `unreadable` ones another message speaks."""
    expected = expected_tensors(config)
    faults = [
        f"unknown tensor {name}"
        for name in tensors
        if name not in expected and not _HARMLESS.fullmatch(name) and not (config.tied and name == _LM_HEAD)
    ]
    if config.tied and _LM_HEAD in tensors and _EMBEDDING in tensors and not _same(tensors, _LM_HEAD, _EMBEDDING):
        faults.append(f"{_LM_HEAD} differs from {_EMBEDDING}, but tie_word_embeddings is true")
    faults += [
        f"missing tensor {name} of shape {shape}"
        for name, shape in expected.items()
        if name not in tensors and name not in unreadable
    ]
    faults += [
        f"{name} has shape {tensors[name].shape}, expected {shape}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    return faults


def _same(tensors: Mapping[str, LazyTensor], first: str, second: str) -> bool:
    """Equal bit for bit; compared a few rows at a time, so that little of either is in memory."""
    a, b = tensors[first], tensors[second]
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    x, y = a.read(), b.read()
    chunks = (slice(row, row + _COMPARED_ROWS) for row in range(0, len(x), _COMPARED_ROWS))
    return all(np.array_equal(x[chunk].view(np.uint8), y[chunk].view(np.uint8)) for chunk in chunks)


def _exact_dtype(stored: Iterable[np.dtype]) -> np.dtype:
    """The smallest float that holds numbers of all of these without rounding."""
    different = set(stored)
    return different.pop() if len(different) == 1 else np.dtype(np.float32)


def _places(config: ModelConfig, mesh: Mesh | None, dtype: str = "float32") -> dict[Keys, Sharding]:
    if mesh is None:  # the default device
        return dict.fromkeys(_weights(abstract(config, jnp.dtype(dtype))), jnp.zeros(()).sharding)
    return _flat(shardings(config, mesh, dtype))


def _fill(config: ModelConfig, tensors: Mapping[str, LazyTensor], dtype: np.dtype, mesh: Mesh | None) -> Decoder:
    places = _places(config, mesh, dtype.name)
    floats = activation_dtype(dtype.name)
    weights: dict[Keys, jax.Array] = {}
    not_finite: set[str] = set()

    def size_of_one_tensor(path: Keys) -> int:
        return math.prod(_hf_shape(path, _shapes(config)[path]))

    # Largest tensors first: each is in memory twice while it is copied out of its file.
    for path in sorted(_shapes(config), key=size_of_one_tensor, reverse=True):
        sources = {name: tensors[name] for name in _hf_names(path, config.n_layers)}
        scale = (*path[:-1], "scale")
        if scale in places:
            weights[path], weights[scale] = _read_int8(
                _shapes(config)[path], places[path], places[scale], sources, not_finite
            )
        else:
            weights[path] = _read_weight(path, _shapes(config)[path], floats, places[path], sources, not_finite)
    if not_finite:
        raise ValueError(f"some values are not finite (read as {dtype}) in\n  " + "\n  ".join(sorted(not_finite)))
    return _with_weights(config, dtype, weights)


def _read_weight(
    path: Keys,
    shape: tuple[int, ...],
    dtype: np.dtype,
    place: Sharding,
    sources: Mapping[str, LazyTensor],
    not_finite: set[str],
) -> jax.Array:
    """One weight on its devices, from one tensor per layer; adds the names of tensors that are not finite."""
    stacked = path[0] == "layers"
    parts: dict[str, np.ndarray] = {}

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        """What a device holds; read once if several hold the same."""
        assert index is not None  # it is None only in the type that JAX declares
        key = str(index)
        if key not in parts:
            parts[key] = _aligned_empty(place.shard_shape(shape), dtype)
            for layer, (name, source) in enumerate(sources.items()):
                # The file has no axis L, and the other axes the other way round.
                target = parts[key][layer].T if stacked else parts[key]
                _copy(target, source.read().view(np.ndarray)[index[:0:-1] if stacked else index])
                if not _is_finite(target):
                    not_finite.add(f"{name} of {source.source}")
        return parts[key]

    return jax.block_until_ready(jax.make_array_from_callback(shape, place, part))


def _read_int8(
    shape: tuple[int, ...],
    place: Sharding,
    scale_place: Sharding,
    sources: Mapping[str, LazyTensor],
    not_finite: set[str],
) -> tuple[jax.Array, jax.Array]:
    """A matrix of all blocks in 8 bits [L, in, out] and its scales [L, out]; few rows are float32 at a time."""
    n_layers, _, d_out = shape
    scales = np.empty((n_layers, d_out), np.float32)
    parts: dict[str, np.ndarray] = {}

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        key = str(index)
        if key not in parts:
            _, inputs, outputs = index
            parts[key] = _aligned_empty(place.shard_shape(shape), np.dtype(np.int8))
            first, last, _ = outputs.indices(d_out)
            for layer, (name, source) in enumerate(sources.items()):
                stored = source.read().view(np.ndarray)  # [out, in]
                for row in range(first, last, _COMPARED_ROWS):
                    rows = slice(row, min(row + _COMPARED_ROWS, last))
                    integers, scales[layer, rows] = rounded(stored[rows])
                    if not np.isfinite(scales[layer, rows]).all():
                        not_finite.add(f"{name} of {source.source}")
                    _copy(parts[key][layer].T[rows.start - first : rows.stop - first], integers[:, inputs])
        return parts[key]

    weight = jax.block_until_ready(jax.make_array_from_callback(shape, place, part))
    return weight, jax.make_array_from_callback(scales.shape, scale_place, lambda index: scales[index])


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Uninitialised memory that JAX uses as it is where it computes in the host's memory; elsewhere it makes a copy."""
    n_bytes = math.prod(shape) * dtype.itemsize
    buffer = np.empty(n_bytes + _ALIGNMENT, np.uint8)
    offset = -buffer.ctypes.data % _ALIGNMENT
    return buffer[offset : offset + n_bytes].view(dtype).reshape(shape)


def _copy(target: np.ndarray, stored: np.ndarray) -> None:
    """target[...] = stored, five times faster where one of the two is transposed."""
    with np.errstate(over="ignore"):  # found afterwards, as not finite
        if target.ndim == 1:
            target[...] = stored
            return
        rows, columns = (range(0, n, _TILE) for n in target.shape)
        for row, column in itertools.product(rows, columns):
            tile = np.s_[row : row + _TILE, column : column + _TILE]
            target[tile] = stored[tile]


def _is_finite(x: np.ndarray) -> bool:
    """No infinity and no NaN. Either sign's have the highest bits of all, so two maxima tell; faster than isfinite."""
    signed, unsigned = f"i{x.itemsize}", f"u{x.itemsize}"
    infinities = np.array([np.inf, -np.inf]).astype(x.dtype)
    positive = x.view(signed).max() < infinities.view(signed)[0]
    negative = x.view(unsigned).max() < infinities.view(unsigned)[1]
    return bool(positive and negative)


def _load_orbax(folder: Path, dtype: str | None, mesh: Mesh | None) -> Decoder:
    config = read_config(folder)
    path = (folder / _ORBAX).absolute()
    with ocp.StandardCheckpointer() as checkpointer:
        stored_as = _flat(checkpointer.metadata(path).item_metadata.tree)
        # Before version 0.2 a matrix was stored under its module's name alone.
        stored = {_now_called(name): weight for name, weight in stored_as.items()}
        expected = _shapes(config)
        faults = [f"unknown weight {'.'.join(name)}" for name in stored.keys() - expected.keys()]
        faults += [f"missing weight {'.'.join(name)}" for name in expected.keys() - stored.keys()]
        faults += [
            f"{'.'.join(name)} has shape {stored[name].shape}, expected {expected[name]}"
            for name in stored.keys() & expected.keys()
            if stored[name].shape != expected[name]
        ]
        if faults:
            raise ValueError(f"{path} does not hold the weights of {folder / _CONFIG}:\n  " + "\n  ".join(faults))
        target_dtype = jnp.dtype(dtype or _exact_dtype(weight.dtype for weight in stored.values()))
        places = _places(config, mesh)
        target = {
            name: jax.ShapeDtypeStruct(expected[_now_called(name)], target_dtype, sharding=places[_now_called(name)])
            for name in stored_as
        }
        weights = _flat(checkpointer.restore(path, unflatten_dict(target)))
    return _with_weights(config, target_dtype, {_now_called(name): weight for name, weight in weights.items()})


def _now_called(name: Keys) -> Keys:
    return name if name[-1] in ("weight", "bias") else (*name, "weight")
