"""What a family of models says about itself, and how `config.json` is read and written with it.

A family is one `Family` in a file of its own: the fields of Hugging Face's `config.json` that are understood, required
or without effect, and how GGUF files name it. Everything else (name tables, sharding, the forward pass) follows from
the `ModelConfig` that the fields become. A file that is not understood in full is refused.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from backtrack_jax.models.config import (
    LayerKind,
    LinearRopeScaling,
    Llama3RopeScaling,
    ModelConfig,
    RopeScaling,
    YarnRopeScaling,
)

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
    {"architectures", "head_dim", "layer_types", "max_position_embeddings", "model_type", "num_key_value_heads"}
    | {"rms_norm_eps", "tie_word_embeddings"}
    | _ROPE_FIELDS
    | _SIZES.keys()
)
DEFAULT_ROPE_THETA = 10000.0
"""Hugging Face's, where neither the file nor the family says anything: Llama 1 and 2."""
_SCALINGS: dict[str, type[RopeScaling]] = {
    kind.rope_type: kind for kind in (LinearRopeScaling, YarnRopeScaling, Llama3RopeScaling)
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
    ignored: frozenset[str] = frozenset()
    accepted: Mapping[str, tuple[Any, ...]] = dataclasses.field(
        default_factory=lambda: {
            "expert_count": (0,),
            "expert_used_count": (0,),
        }
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One family of models; what differs between its blocks is said by a subclass.

    Attributes:
      name: Hugging Face's `model_type`, and `ModelConfig.family`.
      architecture: Hugging Face's class of the model with its unembedding.
      ignored: fields of `config.json`, beside those of any family, that change nothing in a forward pass.
      accepted: fields of which one value, the architecture implemented here, is accepted.
      defaults: of fields that a file may leave out, as Hugging Face's class has them.
      constants: of the `ModelConfig`, where the family fixes them.
      layer_fields: fields that `layer_kinds` reads.
      gguf: how GGUF files describe it; None if they are not read, or call it by another family's name.
      released: hub id to architecture, so that a run can be planned before its weights are fetched.
    """

    name: str
    architecture: str
    ignored: frozenset[str] = frozenset()
    accepted: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    constants: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    layer_fields: tuple[str, ...] = ()
    gguf: GgufNames | None = None
    released: Mapping[str, ModelConfig] = dataclasses.field(default_factory=dict)

    def layer_kinds(self, fields: Mapping[str, Any]) -> tuple[LayerKind, ...]:
        """The kinds of the blocks, out of `layer_types` and `layer_fields`; empty if all are `LayerKind()`.

        Raises:
          ValueError: names what is not implemented.
        """
        if set(fields.get("layer_types") or []) - {"full_attention"}:
            raise ValueError(f"layer_types={fields['layer_types']!r}, only 'full_attention' is implemented")
        return ()

    def layers_to_hf(self, config: ModelConfig) -> dict[str, Any]:
        """`layer_types` and `layer_fields` from which `layer_kinds` reads those of `config`."""
        return {}

    def rope(self, fields: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
        """Base frequency and scaling; ValueError names what is not implemented."""
        return rope_from_hf(fields, self.defaults.get("rope_theta", DEFAULT_ROPE_THETA))

    def from_hf(self, fields: Mapping[str, Any]) -> ModelConfig:
        """Reads the contents of a `config.json` of this family, in its old form or with `rope_parameters`.

        Raises:
          ValueError: names, at once, every field that is missing, unknown, or has a value that is not implemented.
        """
        faults = self._faults(fields)
        given = {**self.defaults, **fields}
        read: dict[str, Any] = {}
        for name, part in (("rope", lambda: self.rope(fields)), ("layer_kinds", lambda: self.layer_kinds(given))):
            try:
                read[name] = part()
            except ValueError as error:
                faults.append(str(error))
            except (KeyError, TypeError) as error:  # of a size that is missing, or no number
                faults += [] if faults else [f"{name} cannot be read: {error!r}"]
        if faults:
            raise ValueError(
                f"config.json is not a {self.name} model that this program implements:\n  " + "\n  ".join(faults)
            )
        theta, scaling = read["rope"]
        n_heads = given["num_attention_heads"]
        head_dim = given.get("head_dim")
        return ModelConfig(
            family=self.name,
            **{ours: given[theirs] for theirs, ours in _SIZES.items()},
            n_kv_heads=given.get("num_key_value_heads") or n_heads,
            head_dim=head_dim if head_dim is not None else given["hidden_size"] // n_heads,
            norm_eps=given["rms_norm_eps"],
            rope_theta=theta,
            rope_scaling=scaling,
            tied=given.get("tie_word_embeddings", False),
            layer_kinds=read["layer_kinds"],
            context=given.get("max_position_embeddings"),
            **self.constants,
        )

    def to_hf(self, config: ModelConfig) -> dict[str, Any]:
        """Contents of a `config.json` (old form) that `from_hf` and Hugging Face transformers read back."""
        scaling, rope = config.rope_scaling, None
        if scaling is not None:
            values = {theirs: getattr(scaling, ours) for theirs, ours in scaling.hf_fields.items()}
            rope = {"rope_type": scaling.rope_type} | {name: v for name, v in values.items() if v is not None}
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
            "rope_scaling": rope,
            "max_position_embeddings": config.context or (8192 if scaling is None else 131072),
            "tie_word_embeddings": config.tied,
            "pad_token_id": None,  # else transformers take their class's, which may lie outside the vocabulary
            **self.layers_to_hf(config),
        }

    def _faults(self, fields: Mapping[str, Any]) -> list[str]:
        accepted = {"hidden_act": "silu"} | dict(self.accepted)
        known = _IGNORED | _UNDERSTOOD | self.ignored | accepted.keys() | set(self.layer_fields)
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
        architectures = fields.get("architectures")
        if architectures is not None and architectures != [self.architecture]:
            faults.append(f"architectures={architectures!r}, only {[self.architecture]!r} is implemented")
        return faults


def rope_from_hf(fields: Mapping[str, Any], default_theta: float) -> tuple[float, RopeScaling | None]:
    """Base frequency and scaling out of `rope_parameters` (transformers >= 5) or `rope_theta` and `rope_scaling`.

    Raises:
      ValueError: they contradict each other, or are of a kind or have fields that are not implemented.
    """
    given = [dict(fields[name]) for name in ("rope_parameters", "rope_scaling") if fields.get(name)]
    scaled = [{k: v for k, v in one.items() if k != "rope_theta"} for one in given]
    if len(given) == 2 and scaled[0] != scaled[1]:
        raise ValueError(f"rope_parameters={given[0]!r} contradicts rope_scaling={given[1]!r}")
    parameters = given[0] if given else {}
    old = fields.get("rope_theta")
    theta = parameters.pop("rope_theta", old)
    theta = default_theta if theta is None else theta
    if old is not None and not math.isclose(old, theta):
        raise ValueError(f"rope_theta={old!r} contradicts rope_parameters.rope_theta={theta!r}")
    kinds = {parameters.pop(name) for name in ("rope_type", "type") if name in parameters} or {"default"}
    if len(kinds) > 1 or not kinds <= {"default", *_SCALINGS}:
        raise ValueError(
            f"rope_type={sorted(kinds)}, only {' and '.join(map(repr, ['default', *_SCALINGS]))} are implemented"
        )
    kind = _SCALINGS.get(kinds.pop(), RopeScaling)
    if "attn_factor" in parameters and parameters.get("attention_factor") is not None:
        del parameters["attn_factor"]  # what was meant is said
    elif "attn_factor" in parameters:
        raise ValueError(
            f"RoPE has attn_factor={parameters['attn_factor']!r}, which engines read differently: transformers ignores "
            "it, vLLM multiplies YaRN's own factor by it. Say what cosines and sines are multiplied by, as "
            "attention_factor beside it"
        )
    optional = {field.name for field in dataclasses.fields(kind) if field.default is not dataclasses.MISSING}
    needed = {theirs for theirs, ours in kind.hf_fields.items() if ours not in optional}
    if not needed <= parameters.keys() <= kind.hf_fields.keys():
        raise ValueError(
            f"RoPE of type {kind.rope_type!r} has fields {sorted(parameters)}, expected {sorted(kind.hf_fields)}"
            + (f", of which {sorted(needed)} are needed" if optional else "")
        )
    if kind is RopeScaling:
        return float(theta), None
    return float(theta), kind(**{kind.hf_fields[name]: value for name, value in parameters.items()})
