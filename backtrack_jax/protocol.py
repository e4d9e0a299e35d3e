"""The paper's protocol on other pairs of models: the same stages, with depth and magnitudes as shares.

`configs/paper.py` says what the authors did on Llama-3.1-8B, layer by layer and number by number. Here the layer is the
one at the same share of the depth, and a magnitude is a multiple of the mean residual norm there, so that pairs of
different sizes can stand side by side.
"""

from backtrack_jax.config import (
    AnnotationSpec,
    Experiment,
    ModelSpec,
    OpenAISpec,
    PromptSpec,
    SteeringSpec,
    TraceSpec,
    VectorSpec,
)

DEPTH = 10 / 31
"""Of the paper's layer 10 in 32: 0 is the first block, 1 the last."""

BASELINES = ("overall-mean", "noise", "self-amplification", "random", "shuffled", "deduction", "initializing")
"""What stands beside the vector at equal norm (Fig. 4), and two controls of our own: another direction in every reply,
and a vector of shuffled labels."""


def gpt_4o(answer_format: str) -> OpenAISpec:
    """The paper's judge, with its prices in US dollars per million tokens as the provider listed them."""
    return OpenAISpec(
        model="gpt-4o-2024-08-06",
        format=answer_format,
        temperature=0.0,
        input_price=2.5,
        cached_price=1.25,
        output_price=10.0,
        max_cost=20.0,
    )


def on_pair(
    name: str, base: ModelSpec, reasoning: ModelSpec, *, n_layers: int, prompt: PromptSpec, batch_size: int = 128
) -> Experiment:
    """The experiment for a pair, ready to be changed further.

    Args:
      name: of the run.
      base: the base model.
      reasoning: the model that was finetuned from it.
      n_layers: L of either.
      prompt: how problems are put to both.
      batch_size: rows sampled at once; a sixth as many traces are read at once.

    Returns:
      300 sampled traces labelled by GPT-4o, vectors at every offset of the paper's sweep, Fig. 2 to 5 and B.1.
    """
    layer = round(DEPTH * (n_layers - 1))
    return Experiment(
        name=name,
        roles=("base", "reasoning"),
        base=base,
        reasoning=reasoning,
        prompt=prompt,
        traces=TraceSpec(temperature=0.7, max_new_tokens=500, batch_size=batch_size),
        # Spans that are exact, at a fifth of the price of the paper's format.
        annotations=AnnotationSpec(judge="released-or-openai", openai=gpt_4o("sentences")),
        vectors=VectorSpec(
            window=(-13, -8),
            offsets=(-20, -16, -12, -8, -4, 0),
            offset_window=(-1, 4),
            layers=(layer,),
            into_prompt=True,
            batch_size=max(1, batch_size // 8),
        ),
        steering=SteeringSpec(
            kinds=("backtracking",),
            layer=(layer,),
            magnitudes=(-0.2, 0.0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0),
            baselines=BASELINES,
            offsets=(-20, -16, -12, -8, -4, 0),
            layers=tuple(sorted({round(share / 8 * (n_layers - 1)) for share in range(9)})),
            grid_magnitudes=(0.2, 0.4, 0.8),
            unit="relative",
            limit=80,
            max_new_tokens=128,
            temperature=0.6,
            top_p=0.95,
            batch_size=batch_size,
        ),
    )
