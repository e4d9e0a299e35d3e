"""The open questions on a laptop: those that the paper leaves, asked of the small pair that ships with the program.

    python -m backtrack_jax.run --config=configs/questions.py

Runs `configs/organism.py` and asks: do other directions contribute, why does noise raise backtracking, which
boundaries are stable, does the best offset depend on the kind of problem, and what else does the vector change. Answers
are sentences, figures and rows of the table of claims on the page; docs/questions/ says what each measures.
`configs/transfer.py` asks about another family, and `python -m backtrack_jax.compare` puts pairs of models side by
side.

Paper: its open questions. Hardware: 2 CPU cores, 4 GB. Duration: 6 to 8 minutes.
"""

import runpy
from pathlib import Path

from backtrack_jax.config import Experiment, QuestionsSpec


def get_config() -> Experiment:
    e: Experiment = runpy.run_path(str(Path(__file__).with_name("organism.py")))["get_config"]()
    e.name = "questions"
    # Offsets on all problems, so that groups of them can be compared; no sweep over layers.
    e.steering.grid_limit, e.steering.layers = 0, ()
    e.questions = QuestionsSpec(ask=("composition", "noise", "stability", "offsets", "side_effects"))
    return e
