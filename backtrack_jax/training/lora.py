"""Low-rank adapters (LoRA, Hu et al., arXiv 2106.09685): W + alpha / rank * A B, with W frozen.

While they are trained, adapters stand beside the weights, which may be in 16 bits and get no gradient; afterwards they
are folded into them, and the model is like any other. Files are those of Hugging Face's PEFT.
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict
from jax.typing import DTypeLike
from safetensors import safe_open

from backtrack_jax.files import store
from backtrack_jax.models import checkpoint, ops
from backtrack_jax.models.decoder import Decoder
from backtrack_jax.models.layers import Linear

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Fields of PEFT's file that are followed, or that change nothing in a forward pass over the tensors that are there. A
# field that is not here may mean another change than alpha / rank * A B: it is refused unless it has PEFT's default.
_KNOWN = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "ensure_weight_tying",  # of embeddings, which are not adapted here
        "eva_config",  # how A and B were initialised
        "exclude_modules",  # as with the layers, what is left out is found to be missing
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_dropout",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "revision",
        "target_modules",
        "task_type",
        "use_rslora",
    }
)
_INITIALISATIONS = ("none", "true", "false", "gaussian", "eva", "mica", "orthogonal")  # that leave W itself as it is

Adapters = dict[str, dict[str, jax.Array]]


class AdaptedLinear(nnx.Module):
    """x W + b + (x A) B, without forming W + A B.

    The gradient of A and B then costs a product with their few columns instead of the whole gradient of W.
    """

    def __init__(self, linear: Linear, a: jax.Array, b: jax.Array):
        """Wraps a module, or a stack of them.

        Args:
          linear: W [..., in, out] and its bias; leading axes are layers.
          a: [..., in, R].
          b: [..., R, out].
        """
        self.linear = linear
        self.a, self.b = nnx.Param(a), nnx.Param(b)

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of W."""
        return self.linear.dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., in] to [..., out] float32."""
        return self.linear(x) + ops.matmul(ops.matmul(x, self.a[...]), self.b[...])

    def folded(self) -> Linear:
        """The module with W + A B in the dtype of W, summed in float32."""
        change = jnp.einsum("...ir,...ro->...io", self.a[...], self.b[...], precision=jax.lax.Precision.HIGHEST)
        linear = jax.tree.map(lambda leaf: leaf, self.linear)
        linear.weight = nnx.Param((linear.weight[...].astype(jnp.float32) + change).astype(linear.dtype))
        return linear


@dataclasses.dataclass(frozen=True)
class Lora:
    """Which matrices are adapted, and how.

    Attributes:
      rank: of the change.
      alpha: the change is alpha / rank * A B.
      targets: names of the blocks' matrices.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self) -> None:
        """Refuses a rank below 1, an alpha that is not finite, and targets that are empty or unknown."""
        if self.rank < 1 or self.rank != int(self.rank):
            raise ValueError(f"rank={self.rank}, expected an integer of at least 1")
        if not math.isfinite(self.alpha):
            raise ValueError(f"alpha={self.alpha}, expected a finite number")
        if not self.targets:
            raise ValueError(f"targets=(), expected some of {', '.join(TARGETS)}")
        if unknown := set(self.targets) - set(TARGETS):
            raise ValueError(
                f"targets {sorted(unknown)} are not matrices of a block; expected some of {', '.join(TARGETS)}"
            )


def init(model: Decoder, lora: Lora, key: jax.Array) -> Adapters:
    """Adapters that change nothing yet: A random, B zero.

    Returns:
      "self_attn.q_proj" and the like -> {"A": [L, in, rank], "B": [L, rank, out]}, float32.
    """
    adapters: Adapters = {}
    for path, weight in _matrices(model, lora).items():
        key, mine = jax.random.split(key)
        n_layers, d_in, d_out = weight.shape
        a = jax.random.normal(mine, (n_layers, d_in, lora.rank)) / d_in**0.5
        adapters[path] = {"A": a, "B": jnp.zeros((n_layers, lora.rank, d_out))}
    return adapters


def attach(model: Decoder, adapters: Adapters, lora: Lora) -> Decoder:
    """The model with the adapters beside its weights, as they are trained."""
    model = jax.tree.map(lambda leaf: leaf, model)
    for path, pair in adapters.items():
        parent, name = _parent(model, path)
        adapted = AdaptedLinear(getattr(parent, name), pair["A"], lora.alpha / lora.rank * pair["B"])
        setattr(parent, name, adapted)
    return model


def fold(model: Decoder) -> Decoder:
    """The model with what `attach` put beside its weights added to them, in their dtype: like any other."""
    model = jax.tree.map(lambda leaf: leaf, model)
    for part in (model.layers.self_attn, model.layers.mlp):
        for name in TARGETS:
            module = getattr(part, name, None)
            if isinstance(module, AdaptedLinear):
                setattr(part, name, module.folded())
    return model


def _parent(model: Decoder, path: str) -> tuple[Any, str]:
    """The part of the blocks that holds a module, and the module's name there: of "mlp.up_proj" and the like."""
    part, name = path.split(".")
    return getattr(model.layers, part), name


def trainable(model: Decoder, lora: Lora, key: jax.Array) -> tuple[Adapters, Any, Callable[[Adapters, Any], Decoder]]:
    """New adapters, the frozen weights, and how to build a model from both, for `fit.make_step`."""
    graphdef, state = nnx.split(model)

    def build(adapters: Adapters, frozen: Any) -> Decoder:
        return attach(nnx.merge(graphdef, frozen), adapters, lora)

    return init(model, lora, key), state, build


def save(adapters: Adapters, lora: Lora, folder: str | os.PathLike[str], base: str) -> None:
    """Writes adapters as PEFT does.

    Args:
      adapters: what was trained.
      lora: how they are applied.
      folder: made here.
      base: where the model that they belong to comes from.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for path, pair in adapters.items():
        for name, stacked in pair.items():
            for layer, array in enumerate(np.asarray(stacked)):
                tensors[_peft_name(path, layer, name)] = np.ascontiguousarray(array.T)
    store.write_safetensors(folder / _WEIGHTS, tensors, {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": list(lora.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    store.write_text(folder / _CONFIG, json.dumps(config, indent=1) + "\n")


def load(folder: str | os.PathLike[str], dtype: DTypeLike | None = None) -> Decoder:
    """The model that adapters belong to, with them folded into its weights.

    Args:
      folder: what `save` or PEFT wrote, with or without its rank-stabilised scaling.
      dtype: of the model, see `checkpoint.load`.

    Raises:
      FileNotFoundError: there are no adapters, or their model is not there.
      ValueError: the adapters are not LoRA, do not fit the model, do not say which it is, or PEFT would apply them in
        another way than `attach`.
    """
    folder = Path(folder)
    if not (folder / _CONFIG).is_file():
        raise FileNotFoundError(f"{folder} holds no adapters: it has no {_CONFIG}")
    config = store.read_json(folder / _CONFIG)
    _check_options(config, folder)
    if not (folder / _WEIGHTS).is_file():
        others = [path.name for path in folder.glob("adapter_model*")]
        raise FileNotFoundError(
            f"{folder} has no {_WEIGHTS}" + (f", only {', '.join(others)}; convert it to safetensors" if others else "")
        )
    # Rank-stabilised LoRA (arXiv 2312.03732) is alpha / sqrt(rank) A B. Targets may be whole names of modules.
    alpha = config["lora_alpha"] * (config["r"] ** 0.5 if config.get("use_rslora") else 1)
    targets = sorted({name.rpartition(".")[2] for name in config["target_modules"]})
    lora = Lora(config["r"], alpha, tuple(targets))
    model = checkpoint.load(config["base_model_name_or_path"], dtype, revision=config.get("revision"))
    with safe_open(folder / _WEIGHTS, "np") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dictionary
    return fold(attach(model, _stacked(stored, model, lora, folder), lora))


def _check_options(config: Mapping[str, Any], folder: Path) -> None:
    """ValueError lists the options of PEFT that are not followed here."""
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{folder} holds adapters with peft_type={config.get('peft_type')!r}, expected 'LORA'")
    if not config.get("base_model_name_or_path"):
        raise ValueError(
            f"{folder} holds adapters with base_model_name_or_path={config.get('base_model_name_or_path')!r}, expected "
            f"the folder or hub id of the model that they belong to; write it into {_CONFIG}"
        )
    refused = [name for name, value in config.items() if name not in _KNOWN and value and value != "none"]
    if str(config.get("init_lora_weights")).lower() not in _INITIALISATIONS:
        refused.append("init_lora_weights")
    if not isinstance(config.get("target_modules"), list):
        refused.append("target_modules")
    if refused:
        listed = ", ".join(f"{name}={config.get(name)!r}" for name in refused)
        raise ValueError(
            f"{folder} holds adapters with {listed}; expected a list of names as target_modules, and PEFT's defaults "
            "of the other options"
        )


def _stacked(stored: Mapping[str, np.ndarray], model: Decoder, lora: Lora, folder: Path) -> Adapters:
    """Adapters out of a file's tensors; ValueError lists what is missing, unknown or of the wrong shape."""
    expected = jax.eval_shape(lambda: init(model, lora, jax.random.key(0)))
    names = {
        _peft_name(path, layer, name): shaped.shape[:0:-1]
        for path, pair in expected.items()
        for name, shaped in pair.items()
        for layer in range(shaped.shape[0])
    }
    faults = [f"missing {name}" for name in names.keys() - stored.keys()]
    faults += [f"unknown {name}" for name in stored.keys() - names.keys()]
    faults += [
        f"{name} has shape {stored[name].shape}, expected {shape}"
        for name, shape in names.items()
        if name in stored and stored[name].shape != shape
    ]
    if faults:
        raise ValueError(f"{folder} does not hold adapters of this model:\n  " + "\n  ".join(sorted(faults)))
    return {
        path: {
            name: jnp.stack(
                [jnp.asarray(stored[_peft_name(path, i, name)].T, jnp.float32) for i in range(model.config.n_layers)]
            )
            for name in pair
        }
        for path, pair in expected.items()
    }


def _peft_name(path: str, layer: int, name: str) -> str:
    return f"base_model.model.model.layers.{layer}.{path}.lora_{name}.weight"


def _matrices(model: Decoder, lora: Lora) -> dict[str, jax.Array]:
    flat: Any = flatten_dict(nnx.to_pure_dict(nnx.state(model.layers)))
    chosen = {path[:-1]: weight for path, weight in flat.items() if path[-2] in lora.targets and path[-1] == "weight"}
    return {".".join(path): weight for path, weight in sorted(chosen.items())}
