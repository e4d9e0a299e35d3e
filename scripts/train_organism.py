"""Trains the small pair from a seed: tokenizer, base model, reasoning model.

    python scripts/train_organism.py --out=results/pair              # as shipped; at most 15 minutes on 2 quiet cores
    python scripts/train_organism.py --out=results/pair2 --seed=2    # another pair of the same recipe

Checkpoints are kept under OUT/checkpoints; the same command goes on where a killed one was, to the same weights bit for
bit. The models are written to OUT/base and OUT/reasoning as Hugging Face folders, after which both are tried out on
problems that they have not seen; the command fails if they do not behave as a pair should.
"""

import argparse
import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from backtrack_jax import generate, train
from backtrack_jax.analysis.backtracking import count_keywords
from backtrack_jax.intervention import no_intervention
from backtrack_jax.judges.keyword import split_sentences
from backtrack_jax.models import checkpoint, prompts
from backtrack_jax.models.config import LlamaConfig
from backtrack_jax.models.llama import Llama
from backtrack_jax.models.tokenizer import Tokenizer
from backtrack_jax.organism import corpus, grammar, vocabulary

ROW = 192  # tokens: a problem and its reply; the few that are longer are left out
PROMPT = prompts.PromptFormat("r1", "primed")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What the pair is trained with.

    Attributes:
      batch_size: rows a step.
      base_steps: of the base model.
      base_rate: Muon's learning rate, of the blocks' matrices.
      base_adam_rate: AdamW's, of embeddings and norms.
      reasoning_steps: of the finetune.
      reasoning_rate: as `base_rate`.
      reasoning_adam_rate: as `base_adam_rate`.
    """

    batch_size: int = 22
    base_steps: int = 500
    base_rate: float = 0.02
    base_adam_rate: float = 3e-3
    reasoning_steps: int = 250
    reasoning_rate: float = 0.01
    reasoning_adam_rate: float = 1e-3


def architecture(vocab_size: int) -> LlamaConfig:
    """Llama of 1.6M parameters."""
    return LlamaConfig(
        vocab_size=vocab_size,
        d_model=128,
        d_mlp=352,
        n_layers=8,
        n_heads=4,
        n_kv_heads=2,
        head_dim=32,
        norm_eps=1e-5,
        rope_theta=10000.0,
        rope_scaling=None,
        tied=False,
    )


def packed_corpus(tokenizer: Tokenizer, process: grammar.Process, stories: float, rows: int, seed: int) -> train.Batch:
    """At least so many rows of documents of a process, everything but BOS to be predicted."""
    documents = corpus.documents(process, seed, stories=stories)
    texts = (tokens_of(tokenizer, document) for document in itertools.islice(documents, 2 * rows))
    batch = train.pack([train.Tokens(ids) for ids in texts if len(ids) <= ROW], ROW)
    return train.Batch(*(array[:rows] for array in batch))


def tokens_of(tokenizer: Tokenizer, document: corpus.Document) -> list[int]:
    """A document as both models read and write it."""
    assert tokenizer.bos_id is not None
    if document.problem is None:
        return [tokenizer.bos_id, *tokenizer.encode(document.answer), *tokenizer.stop_ids]
    prompt = prompts.prompt_ids(tokenizer, document.problem.problem, PROMPT)
    return [*prompt, *tokenizer.encode(document.reply), *tokenizer.stop_ids]


def train_model(model: Llama, rows: train.Batch, rates: tuple[float, float], steps: int, recipe: Recipe, **kwargs) -> Llama:
    """One training run with Muon and AdamW; see `train.fit` for the rest."""
    optimizer = train.muon(*(train.warmup_cosine(rate, steps) for rate in rates))
    params, build = train.trainable(model)
    step = train.make_step(build, optimizer, jnp.bfloat16)
    state = train.new_state(params, optimizer)
    state, _ = train.fit(step, state, rows, steps=steps, batch_size=recipe.batch_size, save_every=50, **kwargs)
    return build(state.params)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    for field in dataclasses.fields(Recipe):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    arguments = parser.parse_args()
    recipe = Recipe(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(Recipe)})
    out, seed, start = arguments.out, arguments.seed, time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    vocabulary.write(out)
    tokenizer = Tokenizer.load(out)
    model = Llama(architecture(tokenizer.vocab_size), rngs=nnx.Rngs(seed))
    for role, process, stories, steps, rates in (
        ("base", grammar.BASE, corpus.STORY_SHARE, recipe.base_steps, (recipe.base_rate, recipe.base_adam_rate)),
        ("reasoning", grammar.REASONING, 0.0, recipe.reasoning_steps, (recipe.reasoning_rate, recipe.reasoning_adam_rate)),
    ):
        rows = packed_corpus(tokenizer, process, stories, steps * recipe.batch_size, seed)
        folder = out / "checkpoints" / role
        model = train_model(model, rows, rates, steps, recipe, seed=seed, folder=folder, title=f"{role} model")
        if not (out / role).exists():
            half = jax.tree.map(lambda weight: weight.astype(jnp.bfloat16), model)
            checkpoint.save_hf(half, out / role)
            vocabulary.write(out / role)
    print(f"trained in {time.monotonic() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
