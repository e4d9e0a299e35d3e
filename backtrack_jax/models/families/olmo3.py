"""OLMo 3: norms after attention and MLP, norms of queries and keys, windows in three of four blocks."""

from collections.abc import Mapping
from typing import Any

from backtrack_jax.models.config import LayerKind, ModelConfig, RopeScaling, YarnRopeScaling
from backtrack_jax.models.families.base import Family, rope_from_hf

_THETA = 500000.0
_FULL, _SLIDING = "full_attention", "sliding_attention"


class Olmo3(Family):
    """Blocks see a window, with plain rotary frequencies, or everything, with scaled ones."""

    def layer_kinds(self, fields: Mapping[str, Any]) -> tuple[LayerKind, ...]:
        """By `layer_types`; without them every fourth block sees everything."""
        n_layers, window = fields["num_hidden_layers"], fields["sliding_window"]
        types = fields.get("layer_types") or [_FULL if (i + 1) % 4 == 0 else _SLIDING for i in range(n_layers)]
        if len(types) != n_layers or set(types) - {_FULL, _SLIDING}:
            raise ValueError(f"layer_types={types!r}, expected {_FULL!r} or {_SLIDING!r} for each of {n_layers} layers")
        if window is None and _SLIDING in types:
            raise ValueError(f"sliding_window is null, expected a number of tokens, since layers are {_SLIDING!r}")
        return tuple(LayerKind() if kind == _FULL else LayerKind(scaled=False, window=window) for kind in types)

    def layers_to_hf(self, config: ModelConfig) -> dict[str, Any]:
        """The kinds of blocks and their window."""
        kinds = [config.kinds[kind] for kind in config.kind_of_layer]
        windows = {kind.window for kind in kinds} - {None}
        return {
            "layer_types": [_FULL if kind.window is None else _SLIDING for kind in kinds],
            "sliding_window": next(iter(windows), None),
        }

    def rope(self, fields: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
        """Of the blocks that see everything; the others have the same base and no scaling."""
        nested = fields.get("rope_parameters")
        if nested is None:
            theta, scaling = super().rope(fields)
            if theta != _THETA:
                raise ValueError(
                    f"rope_theta={theta}, only {_THETA} is implemented outside rope_parameters: transformers takes "
                    f"another one for the blocks of {_FULL!r} alone"
                )
            return theta, scaling
        if nested.keys() != {_FULL, _SLIDING}:
            raise ValueError(f"rope_parameters={nested!r}, expected them by kind of layer: {_FULL!r} and {_SLIDING!r}")
        others = {name: fields.get(name) for name in ("rope_theta", "rope_scaling")}
        theta, scaling = rope_from_hf({"rope_parameters": nested[_FULL]}, _THETA)
        of_windows = rope_from_hf({"rope_parameters": nested[_SLIDING]}, _THETA)
        if of_windows != (theta, None):
            raise ValueError(
                f"rope_parameters.{_SLIDING}={nested[_SLIDING]!r}, only rope_theta={theta} without scaling"
            )
        if any(others.values()):
            raise ValueError(f"rope_parameters are given and {others}, expected one of them")
        return theta, scaling


_7B = ModelConfig(
    family="olmo3",
    vocab_size=100278,
    d_model=4096,
    d_mlp=11008,
    n_layers=32,
    n_heads=32,
    n_kv_heads=32,
    head_dim=128,
    norm_eps=1e-6,
    rope_theta=_THETA,
    rope_scaling=YarnRopeScaling(factor=8.0, original_context=8192, attention_factor=1.2079441541679836),
    tied=False,
    qk_norm="width",
    norms_after=True,
    layer_kinds=((LayerKind(scaled=False, window=4096),) * 3 + (LayerKind(),)) * 8,
    context=65536,
)

OLMO3 = Olmo3(
    name="olmo3",
    architecture="Olmo3ForCausalLM",
    accepted={"attention_bias": False},
    defaults={"rope_theta": _THETA, "sliding_window": 4096},
    constants={"qk_norm": "width", "norms_after": True},
    layer_fields=("sliding_window",),
    released={
        "allenai/Olmo-3-1025-7B": _7B,
        "allenai/Olmo-3-7B-Think-SFT": _7B,
        "allenai/Olmo-3-7B-Think-DPO": _7B,
        "allenai/Olmo-3-7B-Think": _7B,
    },
)
