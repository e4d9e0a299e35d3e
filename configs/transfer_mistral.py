"""Transfer from Mistral: a vector of Mistral-7B's base model, mapped into R1-Distill-Llama-8B.

    python -m backtrack_jax.run --config=configs/transfer_mistral.py --dry_run
    python -m backtrack_jax.run --config=configs/transfer_mistral.py

Runs `configs/paper.py` without its sweeps over offsets and layers and asks the question `transfer` of it. Both models
are 4,096 wide, so that the vector can be added as it is: the direction `identity`, whose null is among the controls;
docs/questions/transfer.md. Any other base model takes Mistral's place, e.g.
`--config.questions.transfer.model.path=allenai/Olmo-3-1025-7B`, of which the width is the same too.

Mistral-7B reads the same text through its own tokenizer, SentencePiece's; states are paired where a token of both ends.

Paper: none; it asks beyond it. Hardware: as `configs/paper.py`, and 20 GB of memory on the host for paired states.
"""

import runpy
from pathlib import Path

from backtrack_jax.config import Experiment, ModelSpec, QuestionsSpec, TransferSpec


def get_config() -> Experiment:
    e: Experiment = runpy.run_path(str(Path(__file__).with_name("paper.py")))["get_config"]()
    e.name = "transfer_mistral"
    e.steering.baselines, e.steering.offsets, e.steering.layers = (), (), ()
    e.analysis.forced_texts = 100
    e.questions = QuestionsSpec(
        ask=("transfer",),
        transfer=TransferSpec(
            model=ModelSpec("mistralai/Mistral-7B-v0.3"),
            positions=20_000,
            rank=256,
            anchors=1024,
            replies=100,
            magnitude=12.0,
        ),
    )
    return e
