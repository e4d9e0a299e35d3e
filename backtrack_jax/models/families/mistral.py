"""Mistral and the text models of Mistral Small, Magistral's among them. GGUF files call them `llama`."""

from collections.abc import Mapping
from typing import Any

from backtrack_jax.models.config import LayerKind, ModelConfig
from backtrack_jax.models.families.base import Family


class Mistral(Family):
    """All blocks have the same window, or none."""

    def layer_kinds(self, fields: Mapping[str, Any]) -> tuple[LayerKind, ...]:
        """A window in every block, unless `sliding_window` is null."""
        super().layer_kinds(fields)  # layer_types would say something else
        window = fields["sliding_window"]
        return () if window is None else (LayerKind(window=window),) * fields["num_hidden_layers"]

    def layers_to_hf(self, config: ModelConfig) -> dict[str, Any]:
        """The window."""
        return {"sliding_window": config.kinds[0].window}


MISTRAL = Mistral(
    name="mistral",
    architecture="MistralForCausalLM",
    defaults={"num_key_value_heads": 8, "sliding_window": 4096},
    layer_fields=("sliding_window",),
    released={
        "mistralai/Mistral-7B-v0.3": ModelConfig(
            family="mistral",
            vocab_size=32768,
            d_model=4096,
            d_mlp=14336,
            n_layers=32,
            n_heads=32,
            n_kv_heads=8,
            head_dim=128,
            norm_eps=1e-5,
            rope_theta=1e6,
            rope_scaling=None,
            tied=False,
            context=32768,
        ),
    },
)
