"""The paper's protocol on Olmo-3-7B and Olmo-3-7B-Think, of which all data and every stage of training are open.

    python -m backtrack_jax.run --config=configs/olmo3_7b.py --dry_run
    python -m backtrack_jax.run --config=configs/olmo3_7b.py

For the stages in between, `--config.reasoning.path=allenai/Olmo-3-7B-Think-SFT` or `-DPO`. Think tokens are ordinary
text in OLMo's vocabulary, which both models read.

Hardware: one GPU with 80 GB; by count weights are 14.6 GB in bfloat16, and sampling traces takes 42 GB in all, a half
of it the cache, since every head has keys of its own.
Paper: Fig. 2 to 5 and B.1; its second open question. Not run yet on the released weights: magnitudes are shares of the
mean residual norm, wide enough to find where replies break.
"""

from backtrack_jax.config import Experiment, ModelSpec, PromptSpec
from backtrack_jax.protocol import on_pair


def get_config() -> Experiment:
    return on_pair(
        "olmo3_7b",
        base=ModelSpec("allenai/Olmo-3-1025-7B"),
        reasoning=ModelSpec("allenai/Olmo-3-7B-Think"),
        n_layers=32,
        prompt=PromptSpec(format="chat"),
        batch_size=64,
    )
