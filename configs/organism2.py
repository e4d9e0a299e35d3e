"""The paper on a laptop, on the second small pair: of Qwen3's family, with a tokenizer of its own.

    python -m backtrack_jax.run --config=configs/organism2.py

What `configs/organism.py` does, on models with norms of queries and keys, tied embeddings, ten narrower blocks and a
padded vocabulary, which read ChatML without BOS; docs/organism.md. Families can so be compared on a laptop.

Paper: Fig. 2 to 5 and B.1. Hardware: 2 CPU cores, 3 GB. Duration: 2 to 3 minutes.
"""

import runpy
from pathlib import Path

from backtrack_jax.config import Experiment, PromptSpec


def get_config() -> Experiment:
    e: Experiment = runpy.run_path(str(Path(__file__).with_name("organism.py")))["get_config"]()
    e.name = "organism2"
    e.base.path, e.reasoning.path = (f"package:backtrack_jax/organism/qwen3/{role}" for role in ("base", "reasoning"))
    e.prompt = PromptSpec(format="chat")
    e.steering.layers = tuple(range(10))
    return e
