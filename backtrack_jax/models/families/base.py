"""What a family of models says about itself, and how `config.json` is read and written with it.

A family is one `Family` in a file of its own: the fields of Hugging Face's `config.json` that are understood, required
or without effect, and how GGUF files name it. Everything else (name tables, sharding, the forward pass) follows from
the `ModelConfig` that the fields become. A file that is not understood in full is refused.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from backtrack_jax.models.config import Llama3RopeScaling, ModelConfig

# Fields of any family that change nothing in a forward pass over given token ids. Ids of BOS, EOS and padding are among
# them because the tokenizer, not the model, decides which ids go in and which stop a reply.
_IGNORED = frozenset(
    {
        "_attn_implementation_autoset",
        "_name_or_path",
        "attention_dropout",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "initializer_range",
        "max_position_embeddings",
        "max_sequence_length",
        "pad_token_id",
        "torch_dtype",
        "transformers.js_config",
        "transformers_version",
        "unsloth_fixed",
        "unsloth_version",
        "use_cache",
    }
)
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "intermediate_size": "d_mlp",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
}
_ROPE_FIELDS = frozenset({"rope_theta", "rope_scaling", "rope_parameters"})
_UNDERSTOOD = frozenset(
    {"architectures", "head_dim", "layer_types", "model_type", "num_key_value_heads", "rms_norm_eps"}
    | {"tie_word_embeddings"}
    | _ROPE_FIELDS
    | _SIZES.keys()
)
_DEFAULT_ROPE_THETA = 10000.0  # Hugging Face's, where the file says nothing: Llama 1 and 2
_LLAMA3_FIELDS = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "original_context",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GgufNames:
    """How GGUF files describe a family.

    Attributes:
      architecture: value of `general.architecture`, and prefix of the family's keys.
      permuted: whether llama.cpp reorders the rows of q and k for its rotary embedding.
      in_block: names of a block's tensors, without `.weight` or `.bias`, and Hugging Face's names.
      outside: likewise of tensors outside the blocks.
      ignored: keys, without prefix, that change nothing here.
      accepted: keys, without prefix, of which some values are accepted: those of a model as it is implemented.
    """

    architecture: str
    permuted: bool
    in_block: Mapping[str, str] = dataclasses.field(
        default_factory=lambda: {
            "attn_norm": "input_layernorm",
            "attn_q": "self_attn.q_proj",
            "attn_k": "self_attn.k_proj",
            "attn_v": "self_attn.v_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_norm": "post_attention_layernorm",
            "ffn_gate": "mlp.gate_proj",
            "ffn_up": "mlp.up_proj",
            "ffn_down": "mlp.down_proj",
        }
    )
    outside: Mapping[str, str] = dataclasses.field(
        default_factory=lambda: {
            "token_embd": "model.embed_tokens",
            "output_norm": "model.norm",
            "output": "lm_head",
        }
    )
    ignored: frozenset[str] = frozenset({"context_length"})
    accepted: Mapping[str, tuple[Any, ...]] = dataclasses.field(
        default_factory=lambda: {
            "expert_count": (0,),
            "expert_used_count": (0,),
            "rope.scaling.type": ("none",),
        }
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One family of models.

    Attributes:
      name: Hugging Face's `model_type`, and `ModelConfig.family`.
      architecture: Hugging Face's class of the model with its unembedding.
      ignored: fields of `config.json`, beside those of any family, that change nothing in a forward pass.
      accepted: fields of which one value, the architecture implemented here, is accepted.
      constants: of the `ModelConfig`, where the family fixes them.
      rope_types: kinds of rotary embeddings, by Hugging Face's names: `default` or `llama3`.
      gguf: how GGUF files describe it.
      released: hub id to architecture, so that a run can be planned before its weights are fetched.
    """

    name: str
    architecture: str
    ignored: frozenset[str] = frozenset()
    accepted: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    constants: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rope_types: tuple[str, ...] = ("default",)
    gguf: GgufNames
    released: Mapping[str, ModelConfig] = dataclasses.field(default_factory=dict)

    def from_hf(self, fields: Mapping[str, Any]) -> ModelConfig:
        """Reads the contents of a `config.json` of this family, in its old form or with `rope_parameters`.

        Raises:
          ValueError: names, at once, every field that is missing, unknown, or has a value that is not implemented.
        """
        faults = self._faults(fields)
        theta, scaling = _DEFAULT_ROPE_THETA, None
        try:
            theta, scaling = _rope_from_hf(fields, self.rope_types)
        except ValueError as error:
            faults.append(str(error))
        if faults:
            raise ValueError(
                f"config.json is not a {self.name} model that this program implements:\n  " + "\n  ".join(faults)
            )
        n_heads = fields["num_attention_heads"]
        head_dim = fields.get("head_dim")
        return ModelConfig(
            family=self.name,
            **{ours: fields[theirs] for theirs, ours in _SIZES.items()},
            n_kv_heads=fields.get("num_key_value_heads") or n_heads,
            head_dim=head_dim if head_dim is not None else fields["hidden_size"] // n_heads,
            norm_eps=fields["rms_norm_eps"],
            rope_theta=theta,
            rope_scaling=scaling,
            tied=fields.get("tie_word_embeddings", False),
            **self.constants,
        )

    def to_hf(self, config: ModelConfig) -> dict[str, Any]:
        """Contents of a `config.json` (old form) that `from_hf` and Hugging Face transformers read back."""
        scaling = None
        if config.rope_scaling is not None:
            values = dataclasses.asdict(config.rope_scaling)
            scaling = {"rope_type": "llama3"} | {theirs: values[ours] for theirs, ours in _LLAMA3_FIELDS.items()}
        return {
            "architectures": [self.architecture],
            "model_type": self.name,
            "hidden_act": "silu",
            **self.accepted,
            **{theirs: getattr(config, ours) for theirs, ours in _SIZES.items()},
            "num_key_value_heads": config.n_kv_heads,
            "head_dim": config.head_dim,
            "rms_norm_eps": config.norm_eps,
            "rope_theta": config.rope_theta,
            "rope_scaling": scaling,
            "max_position_embeddings": 8192 if config.rope_scaling is None else 131072,
            "tie_word_embeddings": config.tied,
        }

    def _faults(self, fields: Mapping[str, Any]) -> list[str]:
        accepted = {"hidden_act": "silu"} | dict(self.accepted)
        known = _IGNORED | _UNDERSTOOD | self.ignored | accepted.keys()
        faults = [
            f"unknown field {name}={fields[name]!r}"
            for name in sorted(fields.keys() - known)
            if fields[name] is not None
        ]
        faults += [f"missing field {name}" for name in (*_SIZES, "rms_norm_eps") if fields.get(name) is None]
        faults += [
            f"{name}={fields[name]!r}, only {value!r} is implemented"
            for name, value in accepted.items()
            if fields.get(name, value) != value
        ]
        if set(fields.get("layer_types") or []) - {"full_attention"}:
            faults.append(f"layer_types={fields['layer_types']!r}, only 'full_attention' is implemented")
        architectures = fields.get("architectures")
        if architectures is not None and architectures != [self.architecture]:
            faults.append(f"architectures={architectures!r}, only {[self.architecture]!r} is implemented")
        return faults


def _rope_from_hf(fields: Mapping[str, Any], rope_types: tuple[str, ...]) -> tuple[float, Llama3RopeScaling | None]:
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
    if len(kinds) > 1 or not kinds <= set(rope_types):
        raise ValueError(f"rope_type={sorted(kinds)}, only {' and '.join(map(repr, rope_types))} are implemented")
    expected = set(_LLAMA3_FIELDS) if kinds == {"llama3"} else set()
    if parameters.keys() != expected:
        raise ValueError(
            f"RoPE of type {sorted(kinds)[0]!r} has fields {sorted(parameters)}, expected {sorted(expected)}"
        )
    if kinds == {"default"}:
        return float(theta), None
    return float(theta), Llama3RopeScaling(**{ours: parameters[theirs] for theirs, ours in _LLAMA3_FIELDS.items()})
