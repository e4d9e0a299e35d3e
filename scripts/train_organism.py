"""Trains the small pair from a seed: tokenizer, base model, reasoning model.

    python scripts/train_organism.py --out=results/pair              # as shipped; at most 8 minutes on 2 quiet cores
    python scripts/train_organism.py --out=results/pair2 --seed=2    # another pair of the same recipe
    python scripts/train_organism.py --out=results/pair3 --family=qwen3   # of another family, with another tokenizer

Checkpoints are kept under OUT/checkpoints; the same command resumes where a killed one left off, with the same weights
bit for bit. The models are written to OUT/base and OUT/reasoning as Hugging Face folders, after which both are tried
out on problems that they have not seen; the command fails if they do not behave as a pair should.
"""

import argparse
import dataclasses
import itertools
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from backtrack_jax.files import store
from backtrack_jax.files.console import Help, ends_in_one_line
from backtrack_jax.intervention import no_intervention
from backtrack_jax.models import checkpoint, ops, prompts
from backtrack_jax.models.config import ModelConfig
from backtrack_jax.models.decoder import Decoder
from backtrack_jax.models.tokenizer import Tokenizer
from backtrack_jax.organism import corpus, grammar, vocabulary
from backtrack_jax.organism.measure import LONGEST, Cell, Pair, cell
from backtrack_jax.training import fit as train
from backtrack_jax.training.packing import Batch, Tokens, pack

ROW = 240  # tokens: a problem and its reply; the few that are longer are left out


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
      save_every: steps between checkpoints.
    """

    batch_size: int = 18
    base_steps: int = 480
    base_rate: float = 0.02
    base_adam_rate: float = 3e-3
    reasoning_steps: int = 220
    reasoning_rate: float = 0.005
    reasoning_adam_rate: float = 1e-4
    save_every: int = 50


ARCHITECTURES = {
    "llama": ModelConfig(
        family="llama",
        vocab_size=1,  # stands for the tokenizer's
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
    ),
    "qwen3": ModelConfig(
        family="qwen3",
        vocab_size=1,
        d_model=112,
        d_mlp=320,
        n_layers=10,
        n_heads=4,
        n_kv_heads=1,
        head_dim=32,  # not d_model / n_heads, as in Qwen3-4B
        norm_eps=1e-6,
        rope_theta=10000.0,
        rope_scaling=None,
        tied=True,
        qk_norm="head",
    ),
}
"""1.6M and 1.5M parameters."""
PADDED_TO = {"llama": 1, "qwen3": 64}
"""Rows of the embedding are a multiple of this; the last ones stand for no token, as in most released models."""


def architecture(family: str, vocab_size: int) -> ModelConfig:
    """The model of a family for a vocabulary."""
    rows = -(-vocab_size // PADDED_TO[family]) * PADDED_TO[family]
    return dataclasses.replace(ARCHITECTURES[family], vocab_size=rows)


def packed_corpus(tokenizer: Tokenizer, process: grammar.Process, stories: float, rows: int, seed: int) -> Batch:
    """Rows of documents of a process. Problems are only read: what they are about is chance, and would be noise."""
    documents = corpus.documents(process, seed, stories=stories)
    texts = (tokens_of(tokenizer, document) for document in itertools.islice(documents, 2 * rows))
    batch = pack([text for text in texts if len(text.ids) <= ROW], ROW)
    return Batch(*(array[:rows] for array in batch))


def tokens_of(tokenizer: Tokenizer, document: corpus.Document) -> Tokens:
    """A document as both models read and write it."""
    if document.problem is None:
        bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        return Tokens([*bos, *tokenizer.encode(document.answer), *tokenizer.stop_ids])
    prompt = prompts.prompt_ids(tokenizer, document.problem.problem, vocabulary.dialect_of(tokenizer).prompt)
    return Tokens([*prompt, *tokenizer.encode(document.reply), *tokenizer.stop_ids], len(prompt))


def train_model(
    model: Decoder, rows: Batch, rates: tuple[float, float], steps: int, recipe: Recipe, **rest: Any
) -> Decoder:
    """One training run with Muon and AdamW; see `train.fit` for the rest."""
    optimizer = train.muon(*(train.warmup_cosine(rate, steps) for rate in rates))
    params, build = train.trainable(model)
    # On a CPU in float32, which is fast there.
    step = train.make_step(build, optimizer, None if ops.target().platform == "cpu" else jnp.dtype(jnp.bfloat16))
    state = train.new_state(params, optimizer)
    r = recipe
    state, _ = train.fit(step, state, rows, steps=steps, batch_size=r.batch_size, save_every=r.save_every, **rest)
    return build(state.params)


def train_pair(recipe: Recipe, out: Path, family: str, seed: int) -> None:
    """Trains and writes tokenizer, base and reasoning model, going on where a killed run was."""
    dialect = vocabulary.DIALECTS[family]
    vocabulary.write(out, dialect)
    tokenizer = Tokenizer.load(out)
    model = Decoder(architecture(family, tokenizer.vocab_size), rngs=nnx.Rngs(seed))
    r = recipe
    for role, process, stories, steps, rates in (
        ("base", grammar.BASE, corpus.STORY_SHARE, r.base_steps, (r.base_rate, r.base_adam_rate)),
        ("reasoning", grammar.REASONING, 0.0, r.reasoning_steps, (r.reasoning_rate, r.reasoning_adam_rate)),
    ):
        folder = out / "checkpoints" / role
        if (out / "reasoning").exists() and not folder.exists():
            continue  # the pair is whole, and its checkpoints were removed
        rows = packed_corpus(tokenizer, process, stories, steps * r.batch_size, seed)
        model = train_model(model, rows, rates, steps, r, seed=seed, folder=folder, title=f"{role} model")
        if not (out / role).exists():
            checkpoint.save_hf(jax.tree.map(lambda weight: weight.astype(jnp.bfloat16), model), out / role)
        vocabulary.write(out / role, dialect)


def try_out(pair: Pair, role: str, seed: int) -> Cell:
    """A model's rate and coherence, unsteered, on problems that it has not seen; shows one reply."""
    problems = corpus.problems(96, seed=1000 + seed)
    replies = pair.replies(role, problems, [no_intervention(*pair.shape)], seed, LONGEST)
    print(f"--- {role} model, a reply:\n{replies[0]}", file=sys.stderr)
    return cell(replies)


def parse(argv: Sequence[str] | None) -> tuple[Path, str, int, Recipe]:
    """Folder, family, seed and recipe of the command line; the recipe's help is its docstring.

    Raises:
      ValueError: names the numbers that no training can have.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--out", type=Path, required=True, default=argparse.SUPPRESS, help="folder of the pair")
    parser.add_argument("--family", choices=list(ARCHITECTURES), default="llama", help="of models and tokenizer")
    parser.add_argument("--seed", type=int, default=1, help="of weights and texts")
    meant = dict(re.findall(r"^ +(\w+): (.+)\.$", Recipe.__doc__ or "", re.MULTILINE))
    for field in dataclasses.fields(Recipe):
        kind = type(field.default)
        parser.add_argument(f"--{field.name}", type=kind, default=field.default, help=meant.get(field.name))
    arguments = vars(parser.parse_args(argv))
    out, family = arguments.pop("out"), arguments.pop("family")
    train.check_numbers(arguments, {"seed": 0})
    return out, family, arguments.pop("seed"), Recipe(**arguments)


def main(argv: Sequence[str] | None = None) -> None:
    start = time.monotonic()
    resumed = "the same command resumes at the last checkpoint"
    with ends_in_one_line(remedy="run it again where more is free", resumed=resumed):
        out, family, seed, recipe = parse(argv)
        out = out.expanduser()
        # Before there were several families, none was written down.
        other = {} if family == "llama" else {"family": family}
        train.keep_to(out, dataclasses.asdict(recipe) | {"seed": seed} | other)
        with store.locked(out):
            train_pair(recipe, out, family, seed)
    print(f"trained in {time.monotonic() - start:.0f} s", file=sys.stderr)
    pair, failed = Pair(out), []
    for role, lowest, highest in (("base", 0.0, 0.0005), ("reasoning", 0.002, 0.01)):
        of = try_out(pair, role, seed)
        print(
            f"{role} model: {100 * of.rate:.2f} % of words are wait or hmm, {100 * of.fitting:.1f} % of sentences fit"
        )
        if not lowest <= of.rate <= highest:
            failed.append(f"the {role} model's rate is outside {100 * lowest:g} to {100 * highest:g} %")
        if of.fitting < 0.95:
            failed.append(f"less than 95 % of the {role} model's sentences fit the grammar")
    sys.exit("; ".join(failed) or 0)


if __name__ == "__main__":
    main()
