"""The paper, Ward et al. 2025 (arXiv 2507.12638): every figure and table on Llama-3.1-8B and its R1 distill.

    python -m backtrack_jax.run --config=configs/paper.py --dry_run
    python -m backtrack_jax.run --config=configs/paper.py
    python -m backtrack_jax.run --config=configs/paper.py --config.traces.path=CHAINS

Traces are sampled by R1-Distill-Llama-8B and labelled by GPT-4o as in the paper, with the key in the environment
variable OPENAI_API_KEY; `--dry_run` says what that costs. With CHAINS, a file or folder of annotated chains in the
released format, both are imported instead. `--config.annotations.openai.format=sentences` has answers a fifth as long,
with spans that are exact. `--config.annotations.judge=keyword` needs neither key nor network, but knows one label only:
leave the others out with `--config.steering.baselines="('overall-mean', 'noise', 'self-amplification')"`.

Reads base- and reasoning-derived vectors at every layer, window -13..-8, and adds them to either model while it
answers (Fig. 3), beside baselines of equal norm (Fig. 4), from other offsets (Fig. 2), and at other layers (Fig. B.1).
Llama-3.1-8B is gated on the hub: accept its licence and log in, or give folders (`--config.base.path=FOLDER`).

Hardware: one GPU with 40 GB, of which JAX takes 30 (weights are 16.06 GB in bfloat16; one model is held at a time;
sampling traces comes to 28 GB in all as compiled for an H100). With 80 GB decoding reads a third of the bytes.
Expected (paper): both vectors raise Wait/Hmm of the reasoning model, comparably, from about 0.7 % of words to about
36 % at magnitude 12; the base model stays at 0; cosine of the two vectors at layer 10 about 0.74.
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
from backtrack_jax.protocol import BASELINES, gpt_4o


def get_config() -> Experiment:
    return Experiment(
        name="paper",
        roles=("base", "reasoning"),
        # The base model never trained R1's turn and think tokens; as in the authors' later code it reads ` ####` there.
        base=ModelSpec(path="meta-llama/Llama-3.1-8B", markers="replace", marker_replacement=" ####"),
        reasoning=ModelSpec(
            path="deepseek-ai/DeepSeek-R1-Distill-Llama-8B", revision="6a6f4aa4197940add57724a7707d069478df56b1"
        ),
        prompt=PromptSpec(format="r1", think="primed"),
        traces=TraceSpec(path="", temperature=0.7, max_new_tokens=500, batch_size=128),
        annotations=AnnotationSpec(judge="released-or-openai", openai=gpt_4o("inline")),
        vectors=VectorSpec(
            window=(-13, -8),
            contrast="all",
            estimator="trace_mean",
            offsets=(-20, -16, -12, -8, -4, 0),  # of the authors' sweep, which read six positions at each
            offset_window=(-1, 4),
            layers=(10,),
            into_prompt=True,  # as in the authors' code: else nothing is read before the first section of a reply
            batch_size=16,
        ),
        steering=SteeringSpec(
            kinds=("backtracking",),
            layer=(10,),
            magnitudes=tuple(float(m) for m in range(0, 21, 2)),
            baselines=BASELINES,
            offsets=(-20, -16, -12, -8, -4, 0),
            layers=tuple(range(0, 32, 2)),
            grid_magnitudes=(0.0, 4.0, 8.0, 12.0, 16.0),
            unit="absolute",
            limit=10,
            max_new_tokens=128,
            temperature=0.6,  # R1's default, on which the released sweep relied
            top_p=0.95,
            batch_size=128,
        ),
    )
