"""Qwen2, Qwen2.5 and Qwen2.5-Math, and R1's distills of them."""

import dataclasses

from backtrack_jax.models.config import ModelConfig
from backtrack_jax.models.families.base import Family, GgufNames

QWEN_2_5_MATH_7B = ModelConfig(
    family="qwen2",
    vocab_size=152064,
    d_model=3584,
    d_mlp=18944,
    n_layers=28,
    n_heads=28,
    n_kv_heads=4,
    head_dim=128,
    norm_eps=1e-6,
    rope_theta=10000.0,
    rope_scaling=None,
    tied=False,
    biases=("q_proj", "k_proj", "v_proj"),
    context=4096,
)
QWEN_2_5_MATH_1_5B = dataclasses.replace(
    QWEN_2_5_MATH_7B, vocab_size=151936, d_model=1536, d_mlp=8960, n_heads=12, n_kv_heads=2, tied=True
)

QWEN2 = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    # Without use_sliding_window the next two say nothing.
    ignored=frozenset({"max_window_layers", "sliding_window"}),
    accepted={"use_sliding_window": False, "use_mrope": False},
    defaults={"num_key_value_heads": 32},
    constants={"biases": ("q_proj", "k_proj", "v_proj")},  # no field says so
    gguf=GgufNames(architecture="qwen2", permuted=False),
    released={
        "Qwen/Qwen2.5-Math-1.5B": QWEN_2_5_MATH_1_5B,
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": dataclasses.replace(
            QWEN_2_5_MATH_1_5B, tied=False, context=131072
        ),
        "Qwen/Qwen2.5-Math-7B": QWEN_2_5_MATH_7B,
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": dataclasses.replace(QWEN_2_5_MATH_7B, context=131072),
    },
)
