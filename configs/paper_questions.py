"""The open questions on Llama-3.1-8B and its R1 distill.

    python -m backtrack_jax.run --config=configs/paper_questions.py --dry_run
    python -m backtrack_jax.run --config=configs/paper_questions.py

What `configs/questions.py` asks, of the paper's pair. Traces are of the 180 graded problems, two a problem, so that
what groups problems comes from another sample than the one that is measured. Labels are GPT-4o's, as in
`configs/paper.py`, in the cheaper format.

Paper: its open questions. Hardware: one GPU with 80 GB. `--dry_run` says rows, tokens, memory and the judge's cost.
"""

import runpy
from pathlib import Path

from backtrack_jax.config import Experiment, QuestionsSpec, StabilitySpec


def get_config() -> Experiment:
    e: Experiment = runpy.run_path(str(Path(__file__).with_name("paper.py")))["get_config"]()
    e.name = "paper_questions"
    e.traces.problems = "package:backtrack_jax/data/graded.jsonl"
    e.traces.samples = 2
    e.traces.max_new_tokens = 1000
    e.annotations.openai.format = "sentences"
    e.steering.magnitudes = (-12.0, 0.0, 4.0, 8.0, 12.0)
    e.steering.baseline_magnitudes = (12.0,)
    e.steering.offsets = (-20, -16, -12, -8, -4, 0)
    e.steering.layers = ()
    e.steering.grid_magnitudes = (12.0,)
    e.steering.limit = 180
    e.steering.max_new_tokens = 512
    e.analysis.forced_texts = 120
    e.questions = QuestionsSpec(
        ask=("composition", "noise", "stability", "offsets", "side_effects"),
        stability=StabilitySpec(boundaries=400, tokens=48, magnitude=8.0),
    )
    return e
