"""The paper's protocol on Qwen2.5-Math-7B and its R1 distill.

    python -m backtrack_jax.run --config=configs/r1_qwen_7b.py --dry_run
    python -m backtrack_jax.run --config=configs/r1_qwen_7b.py

The base model was trained to 4,096 positions, the distill to 131,072. R1's turn tokens are other, trained tokens in the
base model's vocabulary, so that it reads ` ####` there.

Hardware: one GPU with 40 GB; by count weights are 15.2 GB in bfloat16, and sampling traces takes 24.6 GB in all.
Paper: Fig. 2 to 5 and B.1; its second open question. Not run yet on the released weights: magnitudes are shares of the
mean residual norm, wide enough to find where replies break.
"""

from backtrack_jax.config import Experiment, ModelSpec, PromptSpec
from backtrack_jax.protocol import on_pair


def get_config() -> Experiment:
    return on_pair(
        "r1_qwen_7b",
        base=ModelSpec(
            "Qwen/Qwen2.5-Math-7B",
            revision="b101308fe89651ea5ce025f25317fea6fc07e96e",
            markers="replace",
            marker_replacement=" ####",
        ),
        reasoning=ModelSpec(
            "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", revision="916b56a44061fd5cd7d6a8fb632557ed4f724f60"
        ),
        n_layers=28,
        prompt=PromptSpec(format="r1", think="primed"),
    )
