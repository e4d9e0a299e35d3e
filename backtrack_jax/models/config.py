"""Architecture of a Llama, read from a Hugging Face `config.json` that is understood in full or refused."""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Fields that change nothing in a forward pass over given token ids. Ids of BOS, EOS and padding are among them because
# the tokenizer, not the model, decides which ids go in and which stop a reply.
_IGNORED = frozenset(
    {
        "_attn_implementation_autoset",
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "initializer_range",
        "is_llama_config",
        "max_position_embeddings",
        "max_sequence_length",
        "pad_token_id",
        "pretraining_tp",  # how a matrix product was split, which is the same product
        "torch_dtype",
        "transformers.js_config",
        "transformers_version",
        "unsloth_fixed",
        "unsloth_version",
        "use_cache",
    }
)
# Fields of which one value, the architecture implemented here, is accepted.
_REQUIRED_VALUES = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rope_interleaved": False,
}
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "intermediate_size": "d_mlp",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
}
_ROPE_FIELDS = frozenset({"rope_theta", "rope_scaling", "rope_parameters"})
_HANDLED = _ROPE_FIELDS | {"num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings", "layer_types"}
_DEFAULT_ROPE_THETA = 10000.0  # Hugging Face's, where the file says nothing: Decoder 1 and 2
_LLAMA3_FIELDS = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "original_context",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3RopeScaling:
    """Llama 3.1's change of the rotary frequencies; it acts at every length, not only beyond `original_context`.

    Attributes:
      factor: what wavelengths longer than `original_context / low_freq_factor` are stretched by.
      low_freq_factor: lower end of the blended band.
      high_freq_factor: wavelengths shorter than `original_context / high_freq_factor` stay as they are.
      original_context: positions that the model was pretrained on, in tokens.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and constants of one Llama; hashable, so it can be a static argument of a compiled function.

    Attributes:
      vocab_size: V, rows of the embedding.
      d_model: D, width of the residual stream.
      d_mlp: F, width of the gated MLP.
      n_layers: L, number of blocks.
      n_heads: N, query heads.
      n_kv_heads: K, key and value heads; each serves N / K query heads.
      head_dim: H.
      norm_eps: epsilon inside every RMSNorm.
      rope_theta: base of the rotary frequencies.
      rope_scaling: Decoder 3.1's scaling, or None for plain rotary embeddings.
      tied: whether the unembedding is the transposed embedding.
    """

    vocab_size: int
    d_model: int
    d_mlp: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    rope_scaling: Llama3RopeScaling | None
    tied: bool

    def __post_init__(self) -> None:
        """Refuses sizes that do not fit together."""
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"num_attention_heads={self.n_heads} is not a multiple of num_key_value_heads={self.n_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; rotary embeddings need an even one")

    @property
    def n_parameters(self) -> int:
        """Number of scalar weights."""
        attention = self.d_model * self.head_dim * (2 * self.n_heads + 2 * self.n_kv_heads)
        block = attention + 3 * self.d_model * self.d_mlp + 2 * self.d_model
        embeddings = self.vocab_size * self.d_model * (1 if self.tied else 2)
        return self.n_layers * block + embeddings + self.d_model

    def flops_per_token(self, context: int, *, unembed: bool = True) -> int:
        """Floating-point operations of one token's forward pass that attends to `context` positions."""
        matrices = self.n_parameters - self.vocab_size * self.d_model * (1 if self.tied else 2)
        head = self.vocab_size * self.d_model if unembed else 0
        attention = 2 * self.n_layers * self.n_heads * self.head_dim * context
        return 2 * (matrices + head + attention)

    @classmethod
    def from_hf(cls, fields: Mapping[str, Any]) -> "ModelConfig":
        """Reads the contents of a Hugging Face `config.json`, in its old form or with `rope_parameters`.

        Args:
          fields: the parsed JSON object.

        Returns:
          The architecture.

        Raises:
          ValueError: names, at once, every field that is missing, unknown, or has a value that is not implemented.
        """
        faults = _faults(fields)
        theta, scaling = _DEFAULT_ROPE_THETA, None
        try:
            theta, scaling = _rope_from_hf(fields)
        except ValueError as error:
            faults.append(str(error))
        if faults:
            raise ValueError("config.json is not a Llama that this program implements:\n  " + "\n  ".join(faults))
        n_heads = fields["num_attention_heads"]
        head_dim = fields.get("head_dim")
        return cls(
            **{ours: fields[theirs] for theirs, ours in _SIZES.items()},
            n_kv_heads=fields.get("num_key_value_heads") or n_heads,
            head_dim=head_dim if head_dim is not None else fields["hidden_size"] // n_heads,
            norm_eps=fields["rms_norm_eps"],
            rope_theta=theta,
            rope_scaling=scaling,
            tied=fields.get("tie_word_embeddings", False),
        )

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> "ModelConfig":
        """Reads a `config.json`; raises ValueError naming the file when it is not JSON or not such a Llama."""
        try:
            fields = json.loads(Path(path).read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        try:
            return cls.from_hf(fields)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def to_hf(self) -> dict[str, Any]:
        """Contents of a `config.json` (old form) that `from_hf` and Hugging Face transformers read back."""
        scaling = None
        if self.rope_scaling is not None:
            values = dataclasses.asdict(self.rope_scaling)
            scaling = {"rope_type": "llama3"} | {theirs: values[ours] for theirs, ours in _LLAMA3_FIELDS.items()}
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            **{theirs: getattr(self, ours) for theirs, ours in _SIZES.items()},
            "num_key_value_heads": self.n_kv_heads,
            "head_dim": self.head_dim,
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling,
            "max_position_embeddings": 8192 if self.rope_scaling is None else 131072,
            "tie_word_embeddings": self.tied,
        }


def _faults(fields: Mapping[str, Any]) -> list[str]:
    known = _IGNORED | _HANDLED | _SIZES.keys() | _REQUIRED_VALUES.keys()
    faults = [
        f"unknown field {name}={fields[name]!r}" for name in sorted(fields.keys() - known) if fields[name] is not None
    ]
    required = [*_SIZES, "rms_norm_eps", "model_type"]
    faults += [f"missing field {name}" for name in required if fields.get(name) is None]
    faults += [
        f"{name}={fields[name]!r}, only {value!r} is implemented"
        for name, value in _REQUIRED_VALUES.items()
        if fields.get(name, value) != value
    ]
    if set(fields.get("layer_types") or []) - {"full_attention"}:
        faults.append(f"layer_types={fields['layer_types']!r}, only 'full_attention' is implemented")
    architectures = fields.get("architectures")
    if architectures is not None and architectures != ["LlamaForCausalLM"]:
        faults.append(f"architectures={architectures!r}, only ['LlamaForCausalLM'] is implemented")
    return faults


def _rope_from_hf(fields: Mapping[str, Any]) -> tuple[float, Llama3RopeScaling | None]:
    """Base frequency and scaling out of `rope_parameters` (transformers >= 5) or `rope_theta` and `rope_scaling`."""
    given = [dict(fields[name]) for name in ("rope_parameters", "rope_scaling") if fields.get(name)]
    scaled = [{k: v for k, v in one.items() if k != "rope_theta"} for one in given]
    if len(given) == 2 and scaled[0] != scaled[1]:
        raise ValueError(f"rope_parameters={given[0]!r} contradicts rope_scaling={given[1]!r}")
    parameters = given[0] if given else {}
    theta = parameters.pop("rope_theta", fields.get("rope_theta"))
    old = fields.get("rope_theta")
    if theta is None:
        theta = _DEFAULT_ROPE_THETA
    if old is not None and not math.isclose(old, theta):
        raise ValueError(f"rope_theta={old!r} contradicts rope_parameters.rope_theta={theta!r}")
    kinds = {parameters.pop(name) for name in ("rope_type", "type") if name in parameters} or {"default"}
    if kinds not in ({"default"}, {"llama3"}):
        raise ValueError(f"rope_type={sorted(kinds)}, only 'default' and 'llama3' are implemented")
    wanted = set(_LLAMA3_FIELDS) if kinds == {"llama3"} else set()
    if parameters.keys() != wanted:
        raise ValueError(
            f"RoPE of type {sorted(kinds)[0]!r} has fields {sorted(parameters)}, expected {sorted(wanted)}"
        )
    if kinds == {"default"}:
        return float(theta), None
    return float(theta), Llama3RopeScaling(**{ours: parameters[theirs] for theirs, ours in _LLAMA3_FIELDS.items()})


LLAMA_3_1_8B = ModelConfig(
    vocab_size=128256,
    d_model=4096,
    d_mlp=14336,
    n_layers=32,
    n_heads=32,
    n_kv_heads=8,
    head_dim=128,
    norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=Llama3RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192),
    tied=False,
)
"""Llama-3.1-8B and its R1 distill."""

HUB_CONFIGS = {
    "meta-llama/Llama-3.1-8B": LLAMA_3_1_8B,
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": LLAMA_3_1_8B,
}
"""Architectures by hub id, so that a run can be planned before 16 GB are fetched."""
