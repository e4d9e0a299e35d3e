"""The paper's protocol on SmolLM3-3B-Base and SmolLM3-3B.

    python -m backtrack_jax.run --config=configs/smollm3_3b.py --dry_run
    python -m backtrack_jax.run --config=configs/smollm3_3b.py

SmolLM3's chat template writes a date, which is given here so that prompts are the same tomorrow, and has it think.

Hardware: one GPU with 24 GB; by count weights are 6.2 GB in bfloat16, and sampling traces takes 15.5 GB in all. With
16 GB: `--config.traces.batch_size=48 --config.steering.batch_size=48`.
Paper: Fig. 2 to 5 and B.1; its second open question. Not run yet on the released weights: magnitudes are shares of the
mean residual norm, wide enough to find where replies break.
"""

from backtrack_jax.config import Experiment, ModelSpec, PromptSpec
from backtrack_jax.protocol import on_pair


def get_config() -> Experiment:
    return on_pair(
        "smollm3_3b",
        base=ModelSpec("HuggingFaceTB/SmolLM3-3B-Base"),
        reasoning=ModelSpec("HuggingFaceTB/SmolLM3-3B", revision="a07cc9a04f16550a088caea529712d1d335b0ac1"),
        n_layers=36,
        prompt=PromptSpec(format="chat", template_arguments='{"strftime_now": "30 June 2025"}'),
    )
