"""Llama 1 to 3.3, SmolLM2, and R1's distills of Llama."""

import dataclasses

from backtrack_jax.models.config import Llama3RopeScaling, ModelConfig
from backtrack_jax.models.families.base import Family, GgufNames

LLAMA_3_1_8B = ModelConfig(
    family="llama",
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
    context=131072,
)
"""Llama-3.1-8B and its R1 distill."""

LLAMA_3_3_70B = dataclasses.replace(LLAMA_3_1_8B, d_model=8192, d_mlp=28672, n_layers=80, n_heads=64)
"""Llama-3.1 and -3.3-70B, and the latter's R1 distill."""

LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    ignored=frozenset(
        {"is_llama_config", "pretraining_tp"}
    ),  # how a matrix product was split, which is the same product
    accepted={"attention_bias": False, "mlp_bias": False, "rope_interleaved": False},
    gguf=GgufNames(
        architecture="llama",
        permuted=True,
        ignored=frozenset({"tensor_data_layout"}),  # says that q and k are permuted
    ),
    released={
        "meta-llama/Llama-3.1-8B": LLAMA_3_1_8B,
        "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": LLAMA_3_1_8B,
        "meta-llama/Llama-3.3-70B-Instruct": LLAMA_3_3_70B,
        "deepseek-ai/DeepSeek-R1-Distill-Llama-70B": LLAMA_3_3_70B,
    },
)
