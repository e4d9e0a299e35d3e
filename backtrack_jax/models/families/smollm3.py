"""SmolLM3: a Llama without rotary embeddings in some of its blocks."""

from collections.abc import Mapping
from typing import Any

from backtrack_jax.models.config import LayerKind, ModelConfig
from backtrack_jax.models.families.base import Family


class SmolLM3(Family):
    """`no_rope_layers` has a 0 for each block without rotary embeddings and a 1 for the others."""

    def layer_kinds(self, fields: Mapping[str, Any]) -> tuple[LayerKind, ...]:
        """Rotary or not, by `no_rope_layers` or, without it, every `no_rope_layer_interval`-th block not."""
        super().layer_kinds(fields)
        n_layers, rotary = fields["num_hidden_layers"], fields.get("no_rope_layers")
        if rotary is None:
            interval = fields["no_rope_layer_interval"]
            rotary = [(layer + 1) % interval != 0 for layer in range(n_layers)]
        if len(rotary) < n_layers:
            raise ValueError(f"no_rope_layers has {len(rotary)} entries, expected one for each of {n_layers} layers")
        return tuple(LayerKind(rotary=bool(turned)) for turned in rotary[:n_layers])

    def layers_to_hf(self, config: ModelConfig) -> dict[str, Any]:
        """Which blocks are rotary."""
        return {"no_rope_layers": [int(config.kinds[kind].rotary) for kind in config.kind_of_layer]}


_3B = ModelConfig(
    family="smollm3",
    vocab_size=128256,
    d_model=2048,
    d_mlp=11008,
    n_layers=36,
    n_heads=16,
    n_kv_heads=4,
    head_dim=128,
    norm_eps=1e-6,
    rope_theta=5e6,
    rope_scaling=None,
    tied=True,
    layer_kinds=tuple(LayerKind(rotary=(layer + 1) % 4 != 0) for layer in range(36)),
    context=65536,
)

SMOLLM3 = SmolLM3(
    name="smollm3",
    architecture="SmolLM3ForCausalLM",
    ignored=frozenset({"max_window_layers", "sliding_window", "pretraining_tp"}),  # without use_sliding_window
    accepted={"attention_bias": False, "mlp_bias": False, "use_sliding_window": False},
    defaults={
        "num_key_value_heads": 4,
        "no_rope_layer_interval": 4,
        "rope_theta": 2e6,
        "tie_word_embeddings": True,
    },
    layer_fields=("no_rope_layers", "no_rope_layer_interval"),
    released={"HuggingFaceTB/SmolLM3-3B-Base": _3B, "HuggingFaceTB/SmolLM3-3B": _3B},
)
