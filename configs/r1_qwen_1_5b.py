"""The paper's protocol on Qwen2.5-Math-1.5B and its R1 distill.

    python -m backtrack_jax.run --config=configs/r1_qwen_1_5b.py --dry_run
    python -m backtrack_jax.run --config=configs/r1_qwen_1_5b.py

The base model was trained to 4,096 positions and has tied embeddings, the distill to 131,072 and its own unembedding.
R1's turn tokens are other, trained tokens in the base model's vocabulary, so that it reads ` ####` there.

Hardware: one GPU with 16 GB; by count weights are 3.6 GB in bfloat16, and sampling traces takes 8.2 GB in all.
Paper: Fig. 2 to 5 and B.1; its second open question. Not run yet on the released weights: magnitudes are shares of the
mean residual norm, wide enough to find where replies break.
"""

from backtrack_jax.config import Experiment, ModelSpec, PromptSpec
from backtrack_jax.protocol import on_pair


def get_config() -> Experiment:
    return on_pair(
        "r1_qwen_1_5b",
        base=ModelSpec(
            "Qwen/Qwen2.5-Math-1.5B",
            revision="4a83ca6e4526a4f2da3aa259ec36c259f66b2ab2",
            markers="replace",
            marker_replacement=" ####",
        ),
        reasoning=ModelSpec(
            "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", revision="ad9f0ae0864d7fbcd1cd905e3c6c5b069cc8b562"
        ),
        n_layers=28,
        prompt=PromptSpec(format="r1", think="primed"),
    )
