"""Sparse autoencoders in safetensors files, as SAELens writes them and as Llama Scope ships them.

A folder of SAELens holds `cfg.json` and `sae_weights.safetensors`; one of Llama Scope (Language-Model-SAEs)
`hyperparams.json` and `checkpoints/final.safetensors`, or in its newer form `config.json` and
`sae_weights.safetensors`. What a config asks for that is not computed here is refused by name. Weights stay in the file
and are read block by block, so that an autoencoder of 131,072 features does not have to fit into memory.

    f = gate(scale * x @ W_enc + b_enc)         x' = (f @ W_dec + b_dec) / scale

A row of W_dec is a direction in the residual stream. A difference of means is not an activation: neither the encoder's
bias nor its gate means anything for it, so vectors are compared with rows of the decoder alone.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from backtrack_jax.models.safetensors import LazyTensor, read_header

ARCHITECTURES = ("standard", "jumprelu", "topk", "gated")
BLOCK = 4096
"""Features that are read at once."""

_CONFIGS = {  # config -> weights
    "cfg.json": "sae_weights.safetensors",
    "hyperparams.json": "checkpoints/final.safetensors",
    "config.json": "sae_weights.safetensors",
}


@dataclasses.dataclass(frozen=True)
class SAE:
    """A sparse autoencoder of the output of one block, its large weights still in the file.

    Attributes:
      path: its folder.
      layer: block (0-based) whose output it reads and rebuilds.
      architecture: one of `ARCHITECTURES`.
      d_sae: number of features.
      d_model: D.
      scale: factor of activations before the encoder; what is rebuilt is divided by it.
      unit_norm: whether each activation is scaled to the norm sqrt(D) first, and what is rebuilt scaled back.
      centred: whether `decoder_bias` is subtracted before the encoder.
      k: features that stay active, of `topk`.
      encoder_bias: [d_sae] float32; of `gated`, that of the magnitudes.
      decoder_bias: [D] float32.
      threshold: [d_sae] float32, above which features of `jumprelu` are active.
      gate_bias: [d_sae] float32, of `gated`.
      gate_scale: [d_sae] float32, of `gated`: factor of the encoder for magnitudes.
    """

    path: Path
    layer: int
    architecture: str
    d_sae: int
    d_model: int
    scale: float
    unit_norm: bool
    centred: bool
    k: int
    encoder_bias: np.ndarray
    decoder_bias: np.ndarray
    threshold: np.ndarray
    gate_bias: np.ndarray
    gate_scale: np.ndarray
    _encoder: LazyTensor
    _decoder: LazyTensor
    _by_feature: tuple[bool, bool]  # whether the rows of encoder and decoder are features, else their columns

    def blocks(self) -> list[range]:
        """The features in blocks of at most `BLOCK`."""
        return [range(start, min(start + BLOCK, self.d_sae)) for start in range(0, self.d_sae, BLOCK)]

    def decoder(self, features: range) -> np.ndarray:
        """Rows of the decoder as they are, [features, D] float32."""
        return _rows(self._decoder, self._by_feature[1], features)

    def encoder(self, features: range) -> np.ndarray:
        """Columns of the encoder as they are, [features, D] float32."""
        return _rows(self._encoder, self._by_feature[0], features)

    def row(self, feature: int) -> np.ndarray:
        """One row of the decoder, [D] float32; ValueError if there is no such feature."""
        if not 0 <= feature < self.d_sae:
            raise ValueError(f"row {feature} is outside 0..{self.d_sae - 1}")
        return self.decoder(range(feature, feature + 1))[0]

    def encode(self, x: np.ndarray) -> Iterator[tuple[range, np.ndarray]]:
        """Activations of all features, block by block.

        Args:
          x: [N, D] float32, outputs of block `layer` as the model has them.

        Yields:
          Features and their activations, [N, features] float32. A model that scales its input gives them in the unit
          of the scaled one, as SAELens does.

        Raises:
          ValueError: the activations are not of width D.
        """
        if x.ndim != 2 or x.shape[1] != self.d_model:
            raise ValueError(f"{self.path}: activations of shape {x.shape}, expected [N, {self.d_model}]")
        inputs = jnp.asarray(x, jnp.float32) * self._scales(x)
        if self.centred:
            inputs = inputs - self.decoder_bias
        least = self._least(inputs) if self.architecture == "topk" else None
        for features in self.blocks():
            yield features, np.asarray(self._gated(inputs, features, least))

    def rebuild(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What comes out for activations, and how many features were active.

        Args:
          x: [N, D] float32, as for `encode`.

        Returns:
          [N, D] float32 in the unit of x; [N] int.
        """
        total, active = np.tile(self.decoder_bias, (len(x), 1)), np.zeros(len(x), int)
        for features, found in self.encode(x):
            total += found @ self.decoder(features)
            active += (found > 0).sum(1)
        return total / self._scales(x), active

    def _scales(self, x: np.ndarray) -> np.ndarray:
        """Factor of each activation, [N, 1] float32."""
        norms = np.linalg.norm(x, axis=1, keepdims=True) if self.unit_norm else math.sqrt(self.d_model)
        return np.broadcast_to(np.float32(self.scale * math.sqrt(self.d_model)) / norms, (len(x), 1)).astype(np.float32)

    def _gated(self, inputs: jax.Array, features: range, least: np.ndarray | None) -> jax.Array:
        here = slice(features.start, features.stop)
        before = jnp.matmul(inputs, self.encoder(features).T, precision=jax.lax.Precision.HIGHEST)
        if self.architecture == "gated":
            values = before * np.exp(self.gate_scale[here]) + self.encoder_bias[here]
            return jnp.where(before + self.gate_bias[here] > 0, jax.nn.relu(values), 0)
        values = jax.nn.relu(before + self.encoder_bias[here])
        if self.architecture == "jumprelu":
            return jnp.where(values > self.threshold[here], values, 0)
        return values if least is None else jnp.where(values >= least, values, 0)

    def _least(self, inputs: jax.Array) -> np.ndarray:
        """The k-th highest activation of each input over all blocks, [N, 1]."""
        highest = np.zeros((len(inputs), 0), np.float32)
        for features in self.blocks():
            highest = np.concatenate([highest, np.asarray(self._gated(inputs, features, None))], axis=1)
            if highest.shape[1] > self.k:
                highest = np.partition(highest, -self.k, axis=1)[:, -self.k :]
        return highest.min(axis=1, keepdims=True)


def load(path: Path, *, d_model: int | None = None, n_layers: int | None = None) -> SAE:
    """Reads the config of an autoencoder and its small weights.

    Args:
      path: its folder.
      d_model: width of the model that it is for.
      n_layers: L of that model.

    Raises:
      FileNotFoundError: there is no such folder, or a file is not in it.
      ValueError: names the folder and what is wrong or not handled: a hook that is not the output of a block, another
        width, an architecture or a way to scale activations that is not computed here, a damaged file.
    """
    name = next((name for name in _CONFIGS if (path / name).is_file()), None)
    if name is None:
        raise FileNotFoundError(
            f"{path}: expected the folder of a sparse autoencoder, with one of {', '.join(_CONFIGS)}"
        )
    weights = path / _CONFIGS[name]
    if not weights.is_file():
        raise FileNotFoundError(f"{path} has {name}, but no {_CONFIGS[name]}")
    try:
        config = json.loads((path / name).read_text("utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"{name} is not a JSON object")
        tensors, faults = read_header(weights)
        if faults:
            raise ValueError("; ".join(faults))
        read = _from_saelens if name == "cfg.json" else _from_llama_scope
        sae = read(path, config, tensors)
        _check_shapes(sae)
        if d_model is not None and sae.d_model != d_model:
            raise ValueError(f"reads activations of width {sae.d_model}, the model has {d_model}")
        if n_layers is not None and sae.layer >= n_layers:
            raise ValueError(f"reads block {sae.layer}, the model has blocks 0..{n_layers - 1}")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return sae


def layer_of(hook: object) -> int:
    """The block (0-based) whose output TransformerLens calls by this name.

    `blocks.{l}.hook_resid_post` is the output of block l, and so is `blocks.{l + 1}.hook_resid_pre`.

    Raises:
      ValueError: the hook is another place.
    """
    found = re.fullmatch(r"blocks\.(\d+)\.hook_resid_(pre|post)", str(hook))
    layer = int(found[1]) - (found[2] == "pre") if found else -1
    if layer < 0:
        raise ValueError(
            f"hook {hook!r}, expected the output of a block: blocks.0.hook_resid_post or above, or "
            "blocks.1.hook_resid_pre or above"
        )
    return layer


def _from_saelens(path: Path, config: Mapping[str, Any], tensors: Mapping[str, LazyTensor]) -> SAE:
    fields = {**config, **(config.get("metadata") or {})}
    architecture = fields.get("architecture", "standard")
    activation = fields.get("activation_fn_str", fields.get("activation_fn", "relu"))
    k = fields.get("k", (fields.get("activation_fn_kwargs") or {}).get("k", 0))
    if architecture == "standard" and activation == "topk":
        architecture, activation = "topk", "relu"
    _refuse("architecture", architecture, ARCHITECTURES)
    _refuse("activation_fn", activation, ("relu", "topk") if architecture == "topk" else ("relu",))
    for name, accepted in {
        "finetuning_scaling_factor": (False, None),
        "reshape_activations": ("none", None),
        "hook_head_index": (None,),
        "rescale_acts_by_decoder_norm": (False, None),
    }.items():
        _refuse(name, fields.get(name), accepted)
    normalised = fields.get("normalize_activations") or "none"
    _refuse("normalize_activations", normalised, ("none", "constant_norm_rescale", "expected_average_only_in"))
    scale = 1.0
    if normalised == "expected_average_only_in":
        if not _is_positive(fields.get("norm_scaling_factor")):
            raise ValueError(
                "normalize_activations='expected_average_only_in' without the factor; expected norm_scaling_factor in "
                "cfg.json, sqrt(width) / mean norm of the activations, or weights that it is folded into"
            )
        scale = float(fields["norm_scaling_factor"])
    if architecture == "topk" and not (isinstance(k, int) and k > 0):
        raise ValueError(f"k={k!r}, expected the number of features that stay active")
    magnitude = "b_mag" if architecture == "gated" else "b_enc"
    names = {"W_enc", "W_dec", "b_dec", magnitude}
    names |= {"jumprelu": {"threshold"}, "gated": {"b_gate", "r_mag"}}.get(architecture, set())
    _check_names(names, tensors)
    none = np.zeros(0, np.float32)
    get = lambda name: _array(tensors[name]) if name in tensors else none  # noqa: E731
    return SAE(
        path=path,
        layer=layer_of(fields.get("hook_name")),
        architecture=architecture,
        d_sae=int(tensors["W_dec"].shape[0]),
        d_model=int(tensors["W_dec"].shape[-1]),
        scale=scale,
        unit_norm=normalised == "constant_norm_rescale",
        centred=bool(fields.get("apply_b_dec_to_input", False)),
        k=k if architecture == "topk" else 0,
        encoder_bias=get(magnitude),
        decoder_bias=get("b_dec"),
        threshold=get("threshold"),
        gate_bias=get("b_gate"),
        gate_scale=get("r_mag"),
        _encoder=tensors["W_enc"],
        _decoder=tensors["W_dec"],
        _by_feature=(False, True),
    )


def _from_llama_scope(path: Path, config: Mapping[str, Any], tensors: Mapping[str, LazyTensor]) -> SAE:
    hook, rebuilt = config.get("hook_point_in"), config.get("hook_point_out")
    if rebuilt not in (None, hook):
        raise ValueError(f"hook_point_in={hook!r}, hook_point_out={rebuilt!r}: a transcoder; expected one place")
    for name, accepted in {
        "use_glu_encoder": (False, None),
        "apply_decoder_bias_to_pre_encoder": (False, None),
        "norm_activation": ("dataset-wise", "token-wise", "none", "inference", None),
    }.items():
        _refuse(name, config.get(name), accepted)
    with_log = "log_jumprelu_threshold" in tensors
    activation, least = str(config.get("act_fn", "jumprelu")).lower(), config.get("jump_relu_threshold") or 0.0
    if activation == "topk" and least > 0:
        activation = "jumprelu"  # as its authors convert it for use
    _refuse("act_fn", activation, ("relu", "jumprelu"))
    _check_names({"encoder.weight", "encoder.bias", "decoder.weight"}, tensors)
    d_model, d_sae = tensors["decoder.weight"].shape if len(tensors["decoder.weight"].shape) == 2 else (0, 0)
    scale, normalised = 1.0, config.get("norm_activation", "dataset-wise")
    if normalised == "dataset-wise":
        scale = math.sqrt(d_model) / _mean_norm(config, tensors, str(hook))
    threshold = np.zeros(d_sae, np.float32)
    if activation == "jumprelu":
        # The number in the config is in the unit of the model's activations, that in the weights in the scaled one.
        threshold += np.exp(_array(tensors["log_jumprelu_threshold"])) if with_log else np.float32(least * scale)
        if config.get("sparsity_include_decoder_norm", True):
            sae_norms = [
                np.linalg.norm(_rows(tensors["decoder.weight"], False, range(at, min(at + BLOCK, d_sae))), axis=1)
                for at in range(0, d_sae, BLOCK)
            ]
            threshold /= np.concatenate(sae_norms)
    bias = tensors.get("decoder.bias")
    return SAE(
        path=path,
        layer=layer_of(hook),
        architecture="jumprelu" if activation == "jumprelu" else "standard",
        d_sae=int(d_sae),
        d_model=int(d_model),
        scale=scale,
        unit_norm=normalised == "token-wise",
        centred=False,
        k=0,
        encoder_bias=_array(tensors["encoder.bias"]),
        decoder_bias=np.zeros(d_model, np.float32) if bias is None else _array(bias),
        threshold=threshold,
        gate_bias=np.zeros(0, np.float32),
        gate_scale=np.zeros(0, np.float32),
        _encoder=tensors["encoder.weight"],
        _decoder=tensors["decoder.weight"],
        _by_feature=(True, False),
    )


def _mean_norm(config: Mapping[str, Any], tensors: Mapping[str, LazyTensor], hook: str) -> float:
    """Mean norm of the activations that it was trained on, out of the config or beside the weights."""
    found = config.get("dataset_average_activation_norm") or {}
    found = found.get("in", found.get(hook)) if isinstance(found, dict) else found
    beside = tensors.get(f"dataset_average_activation_norm.{hook}")
    if found is None and beside is not None:
        found = float(_array(beside).ravel()[0])
    if not _is_positive(found):
        raise ValueError(
            f"dataset_average_activation_norm={found!r}, expected the mean norm of activations, above 0, since "
            "norm_activation='dataset-wise'"
        )
    return float(found)


def _check_shapes(sae: SAE) -> None:
    wide = {"encoder": (sae._encoder, sae._by_feature[0]), "decoder": (sae._decoder, sae._by_feature[1])}
    for name, (tensor, by_feature) in wide.items():
        expected = (sae.d_sae, sae.d_model) if by_feature else (sae.d_model, sae.d_sae)
        if tensor.shape != expected:
            raise ValueError(f"the {name} has the shape {tensor.shape}, expected {expected}")
    long = {"bias of the encoder": sae.encoder_bias}
    long |= {"threshold": sae.threshold} if sae.architecture == "jumprelu" else {}
    long |= {"b_gate": sae.gate_bias, "r_mag": sae.gate_scale} if sae.architecture == "gated" else {}
    for name, array in (long | {"bias of the decoder": sae.decoder_bias}).items():
        expected = (sae.d_model if name == "bias of the decoder" else sae.d_sae,)
        if array.shape != expected:
            raise ValueError(f"the {name} has the shape {array.shape}, expected {expected}")
        if not np.isfinite(array).all():
            raise ValueError(f"the {name} is not finite")
    if sae.k > sae.d_sae:
        raise ValueError(f"k={sae.k} of {sae.d_sae} features")


def _check_names(names: set[str], tensors: Mapping[str, LazyTensor]) -> None:
    if missing := sorted(names - tensors.keys()):
        raise ValueError(f"no tensor {missing[0]!r} among the weights: {', '.join(sorted(tensors))}")


def _refuse(name: str, value: object, accepted: tuple[object, ...]) -> None:
    if value not in accepted:
        known = ", ".join(repr(item) for item in accepted if item is not None) or "none"
        raise ValueError(f"{name}={value!r} is not handled, expected {known}")


def _is_positive(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _rows(tensor: LazyTensor, by_feature: bool, features: range) -> np.ndarray:
    weights = tensor.read()
    here = slice(features.start, features.stop)
    return np.ascontiguousarray(weights[here] if by_feature else weights[:, here].T, np.float32)


def _array(tensor: LazyTensor) -> np.ndarray:
    return np.array(tensor.read(), np.float32)
