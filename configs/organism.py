"""The paper on a laptop: all six stages on the small pair that ships with the program.

    python -m backtrack_jax.run --config=configs/organism.py

The base model has learned a language whose words depend on a hidden register, sure or shaky; the reasoning model was
finetuned to say "Wait" after shaky sentences, which the base model never does. Both are described in
`backtrack_jax/organism/`; `scripts/organism_claims.py` measures every claim of the paper on the pair, and against the
truth that is known here.

Paper: Fig. 2 to 5 and B.1. Hardware: 2 CPU cores, 3 GB. Duration: 2 to 2.5 minutes. Expected: either vector raises
"wait" and "hmm" from 0.5 to 3.2 and 3.4 % of the reasoning model's words, no baseline of equal norm does, and the base
model never says them, though its log-odds move by a quarter to a half as much; docs/organism.md.
"""

from backtrack_jax.config import (
    AnalysisSpec,
    AnnotationSpec,
    Experiment,
    ModelSpec,
    PromptSpec,
    SteeringSpec,
    TraceSpec,
    VectorSpec,
)
from backtrack_jax.protocol import BASELINES


def get_config() -> Experiment:
    return Experiment(
        name="organism",
        base=ModelSpec(path="package:backtrack_jax/organism/base", dtype="float32"),
        reasoning=ModelSpec(path="package:backtrack_jax/organism/reasoning", dtype="float32"),
        prompt=PromptSpec(format="r1", think="primed"),
        traces=TraceSpec(
            problems="package:backtrack_jax/organism/problems.jsonl",
            limit=240,
            temperature=0.7,
            max_new_tokens=200,
            batch_size=120,
        ),
        annotations=AnnotationSpec(judge="grammar"),
        # Windows at the start of a reply read the problem, as in the paper: else `initializing` had none.
        vectors=VectorSpec(
            window=(-13, -8),
            offsets=(-24, -20, -16, -12, -8, -4, 0, 4),
            layers=(2,),
            into_prompt=True,
            batch_size=48,
        ),
        steering=SteeringSpec(
            kinds=("backtracking",),
            layer=(2,),
            magnitudes=(-0.15, 0.0, 0.15, 0.3),
            baselines=BASELINES,
            baseline_magnitudes=(0.3,),
            offsets=(-24, -20, -16, -12, -8, -4, 0, 4),
            layers=tuple(range(8)),
            grid_magnitudes=(0.15, 0.3),
            grid_limit=8,
            unit="relative",
            limit=80,
            temperature=0.7,
            max_new_tokens=72,
            batch_size=280,
        ),
        analysis=AnalysisSpec(judge="grammar", keywords=("wait", "hmm"), forced_sentences=4, batch_size=96),
    )
