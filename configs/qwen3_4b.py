"""The paper's protocol on Qwen3-4B-Base and Qwen3-4B-Thinking-2507.

    python -m backtrack_jax.run --config=configs/qwen3_4b.py --dry_run
    python -m backtrack_jax.run --config=configs/qwen3_4b.py

Qwen3 has no BOS; its chat template primes the thinking. Turn and think tokens are the same in both models, and stay.

Hardware: one GPU with 40 GB; by count weights are 8.0 GB in bfloat16, and sampling traces takes 24.7 GB in all, a half
of it the cache.
Paper: Fig. 2 to 5 and B.1; its second open question. Not run yet on the released weights: magnitudes are shares of the
mean residual norm, wide enough to find where replies break.
"""

from backtrack_jax.config import Experiment, ModelSpec, PromptSpec
from backtrack_jax.protocol import on_pair


def get_config() -> Experiment:
    return on_pair(
        "qwen3_4b",
        base=ModelSpec("Qwen/Qwen3-4B-Base", revision="906bfd4b4dc7f14ee4320094d8b41684abff8539"),
        reasoning=ModelSpec("Qwen/Qwen3-4B-Thinking-2507", revision="768f209d9ea81521153ed38c47d515654e938aea"),
        n_layers=36,
        prompt=PromptSpec(format="chat"),
    )
