"""Qwen3 without experts, its base models, and R1-0528's distill of the 8B one."""

import dataclasses

from backtrack_jax.models.config import ModelConfig
from backtrack_jax.models.families.base import Family, GgufNames

QWEN3_8B = ModelConfig(
    family="qwen3",
    vocab_size=151936,
    d_model=4096,
    d_mlp=12288,
    n_layers=36,
    n_heads=32,
    n_kv_heads=8,
    head_dim=128,
    norm_eps=1e-6,
    rope_theta=1e6,
    rope_scaling=None,
    tied=False,
    qk_norm="head",
    context=40960,
)
QWEN3_4B = dataclasses.replace(QWEN3_8B, d_model=2560, d_mlp=9728, tied=True)

_OF_BLOCK = GgufNames(architecture="qwen3", permuted=False).in_block

QWEN3 = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    # Without use_sliding_window the next two say nothing.
    ignored=frozenset({"max_window_layers", "sliding_window"}),
    accepted={"attention_bias": False, "use_sliding_window": False},
    defaults={"num_key_value_heads": 32, "head_dim": 128},
    constants={"qk_norm": "head"},
    gguf=GgufNames(
        architecture="qwen3",
        permuted=False,
        in_block={**_OF_BLOCK, "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"},
    ),
    released={
        "Qwen/Qwen3-8B-Base": dataclasses.replace(QWEN3_8B, context=32768),
        "Qwen/Qwen3-8B": QWEN3_8B,
        "Qwen/Qwen3-4B-Base": dataclasses.replace(QWEN3_4B, context=32768),
        "Qwen/Qwen3-4B-Thinking-2507": dataclasses.replace(QWEN3_4B, rope_theta=5e6, context=262144),
    },
)
