"""Where weights and rows lie on several devices: a mesh of `data` (rows of a batch) x `model` (parts of every weight).

Each head lives on one device of the `model` axis. The matrices that read the residual stream are split by output and
those that write it by input, so each block adds up its parts twice, after attention and after the MLP. Embeddings are
split by vocabulary; norms are whole everywhere. The compiler derives everything else from that.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from backtrack_jax.models.config import ModelConfig
from backtrack_jax.models.decoder import Decoder
from backtrack_jax.models.quantized import abstract

DATA, MODEL = "data", "model"

# Which axis of a module's weights is split, counted from the last: blocks have a leading axis L that is never split.
# A bias, or the scale of 8-bit weights, is split where its matrix is split by output; else it is whole everywhere.
_BY_ROWS = ("embed_tokens", "lm_head", "o_proj", "down_proj")
_BY_COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_SPLIT_AXIS: dict[str, dict[str, int]] = {name: {"weight": -2} for name in _BY_ROWS}
_SPLIT_AXIS |= {name: {"weight": -1, "bias": -1, "scale": -1} for name in _BY_COLUMNS}


def make_mesh(model_parallel: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """Arranges devices as `data` x `model`.

    Args:
      model_parallel: devices that one copy of the weights is spread over.
      devices: JAX devices, default all.

    Returns:
      The mesh; the compiler chooses the sharding of intermediate values (`AxisType.Auto`).

    Raises:
      ValueError: the number of devices is not a multiple of `model_parallel`.
    """
    devices = jax.devices() if devices is None else devices
    if model_parallel < 1 or len(devices) % model_parallel:
        raise ValueError(f"model_parallel={model_parallel} does not divide the number of devices, {len(devices)}")
    shape = (len(devices) // model_parallel, model_parallel)
    return jax.make_mesh(shape, (DATA, MODEL), axis_types=(AxisType.Auto, AxisType.Auto), devices=devices)


def shardings(config: ModelConfig, mesh: Mesh | AbstractMesh, dtype: str = "float32") -> dict[str, Any]:
    """Placement of every weight of a model.

    Args:
      config: architecture.
      mesh: from `make_mesh`.
      dtype: of the weights; `int8` has scales too.

    Returns:
      Nested dict of NamedSharding, with the keys of `nnx.to_pure_dict(nnx.state(model))`.

    Raises:
      ValueError: names every size that the `model` axis does not divide.
    """
    check_parts(config, mesh.shape[MODEL])
    return jax.tree.map_with_path(
        lambda path, leaf: NamedSharding(mesh, _spec(path[-2].key, path[-1].key, leaf.ndim)),
        nnx.to_pure_dict(nnx.state(abstract(config, jnp.dtype(dtype)))),
    )


def check_parts(config: ModelConfig, parts: int) -> None:
    """ValueError if a model cannot be spread over so many devices; names every size that they do not divide."""
    sizes = {
        "num_key_value_heads": config.n_kv_heads,
        "intermediate_size": config.d_mlp,
        "vocab_size": config.vocab_size,
    }
    if faults := [f"{name}={size}" for name, size in sizes.items() if size % parts]:
        raise ValueError(f"the mesh's model axis of {parts} devices does not divide {', '.join(faults)}")


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Placement of arrays whose leading axis is the batch (ids, positions, rows of an intervention)."""
    return NamedSharding(mesh, PartitionSpec(DATA))


def place_rows(model: Decoder, rows: Any) -> Any:
    """Arrays whose leading axis is the batch, divided among the copies of a model; as they are on a single device.

    A batch that the copies do not divide is left to each of them whole.
    """
    sharding = model.embed_tokens.weight[...].sharding
    if not isinstance(sharding, NamedSharding) or len(jax.tree.leaves(rows)[0]) % sharding.mesh.shape[DATA]:
        return rows
    return jax.device_put(rows, batch_sharding(sharding.mesh))


def _spec(module: str, leaf: str, n_axes: int) -> PartitionSpec:
    axes: list[str | None] = [None] * n_axes
    split = _SPLIT_AXIS.get(module, {}).get(leaf)
    if split is not None:
        axes[split] = MODEL
    return PartitionSpec(*axes)
