"""Transfer between families on a laptop: a vector of the second small base model, mapped into the first pair.

    python -m backtrack_jax.run --config=configs/transfer.py

Runs `configs/organism.py` and asks the question `transfer` of it: the base model of `configs/organism2.py`, which is of
another family, narrower, and has a tokenizer and a prompt of its own, reads the same traces. Its vector is mapped into
the reasoning model by maps that were fitted on other problems than those it is tried on; docs/questions/transfer.md.

Paper: none; it asks beyond it. Hardware: 2 CPU cores, 3 GB. Duration: a minute more than `configs/organism.py`.
"""

import runpy
from pathlib import Path

from backtrack_jax.config import Experiment, ModelSpec, QuestionsSpec, TransferSpec


def get_config() -> Experiment:
    e: Experiment = runpy.run_path(str(Path(__file__).with_name("organism.py")))["get_config"]()
    e.name = "transfer"
    e.questions = QuestionsSpec(
        ask=("transfer",),
        transfer=TransferSpec(
            model=ModelSpec("package:backtrack_jax/organism/qwen3/base", dtype="float32"), prompt="chat"
        ),
    )
    return e
