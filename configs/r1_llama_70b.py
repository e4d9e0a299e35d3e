"""The paper's protocol on Llama-3.3-70B-Instruct and its R1 distill, over 8 devices.

    python -m backtrack_jax.run --config=configs/r1_llama_70b.py --dry_run
    python -m backtrack_jax.run --config=configs/r1_llama_70b.py

The distill was made from the instruct model, so that this is the pair that differs by the finetune alone.
`meta-llama/Llama-3.1-70B` is the base model of both.

Hardware: 8 devices with 40 GB each; by count weights are 17.6 GB of each in bfloat16, and sampling traces takes
26.1 GB of each in all.
Paper: Fig. 2 to 5 and B.1; its second open question. Not run yet on the released weights: magnitudes are shares of the
mean residual norm, wide enough to find where replies break.
"""

from backtrack_jax.config import Experiment, ModelSpec, PromptSpec
from backtrack_jax.protocol import on_pair


def get_config() -> Experiment:
    e = on_pair(
        "r1_llama_70b",
        base=ModelSpec(
            "meta-llama/Llama-3.3-70B-Instruct",
            revision="6f6073b423013f6a7d4d9f39144961bfbfbc386b",
            markers="replace",
            marker_replacement=" ####",
        ),
        reasoning=ModelSpec(
            "deepseek-ai/DeepSeek-R1-Distill-Llama-70B", revision="b1c0b44b4369b597ad119a196caf79a9c40e141e"
        ),
        n_layers=80,
        prompt=PromptSpec(format="r1", think="primed"),
    )
    e.model_parallel = 8
    return e
