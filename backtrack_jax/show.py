"""Which tokens are read? The read windows of one annotated chain, before any long work.

    python -m backtrack_jax.show verbal_0/0 --config=configs/smollm2.py --config.vectors.window=-13,-8

Prints the chain as the model reads it, with the tokens that a window reads in green (in a file: ⟦so⟧) and the first
token of each section of `vectors.label` in red (»so«), then every window token by token. No model is loaded. Traces
that the config samples have to be there: run `--stages=1,2` first.
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags

from backtrack_jax import labelling, pipeline
from backtrack_jax.checks import check
from backtrack_jax.data import records
from backtrack_jax.extract import TokenTrace, read_positions
from backtrack_jax.files import store
from backtrack_jax.files.console import ends_in_one_line
from backtrack_jax.run import CONFIG, WORKDIR, parse_flags
from backtrack_jax.stages.annotations import ANNOTATIONS, read_pairs
from backtrack_jax.stages.base import Context
from backtrack_jax.stages.traces import TRACES

_GREEN, _RED, _DIM, _PLAIN = "\x1b[30;42m", "\x1b[1;97;41m", "\x1b[2m", "\x1b[0m"


def main(argv: Sequence[str]) -> None:
    """Prints the windows of the trace that is named on the command line."""
    with ends_in_one_line(remedy="run it where more is free", resumed="nothing was changed"):
        experiment = CONFIG.value
        if WORKDIR.value:
            experiment.workdir = WORKDIR.value
        check(experiment)
        if len(argv) != 2:
            raise ValueError("name one trace: python -m backtrack_jax.show TRACE --config=FILE")
        run = pipeline.Run(experiment.for_vectors(), (TRACES.name, ANNOTATIONS.name))
        print(describe(run, argv[1], colour=sys.stdout.isatty()))


def describe(run: pipeline.Run, trace_id: str, *, colour: bool) -> str:
    """The chain with its windows marked, and each window token by token.

    Args:
      run: of the experiment; only its tokenizer is read.
      trace_id: id of a trace, or the part before the slash.
      colour: ANSI colours; else brackets.

    Raises:
      ValueError: no such trace, or it would have to be sampled.
    """
    pairs = _annotated(run)
    found = [pair for pair in pairs if trace_id in (pair[0].id, pair[0].problem_id)]
    if not found:
        known = ", ".join(trace.id for trace, _ in pairs[:5])
        raise ValueError(f"no annotated trace {trace_id!r} among {len(pairs)}; available: {known}, ...")
    e = run.experiment
    trace, annotation = found[0]
    lines = [f"trace {trace.id} ({trace.category}), labelled by {annotation.judge}", f"problem: {trace.problem}", ""]
    for role in e.roles:
        tokens = run.context.token_trace(role, trace, annotation)
        marked = _marked(run.context, tokens, colour)
        lines += [f"as the {role} model reads it, {len(tokens.ids)} tokens:", marked, ""]
        lines += [*_windows(run.context, tokens), ""]
    s = e.steering
    blocks = ", ".join(map(str, s.kind_layers))
    lines.append(f"steering changes {s.span} positions at the output of block {blocks} (0-based)")
    return "\n".join(lines)


def _annotated(run: pipeline.Run) -> list[tuple[records.Trace, records.Annotation]]:
    """Traces and annotations of the run; imported ones are read anew if they are not there."""
    if not run.done(ANNOTATIONS):
        if not run.experiment.traces.path:
            sampled = store.read_inputs(run.context.folder(TRACES)) is not None
            other = f"; those in {run.workdir} are from another config: give that run's overrides" if sampled else ""
            raise ValueError(f"the traces of this config are sampled; run it with --stages=1,2 first{other}")
        if labelling.judge_of(run.experiment).paid:
            raise ValueError("the labels of this config are paid for; run it with --stages=1,2 first")
        with tempfile.TemporaryDirectory() as folder:
            run.context.workdir = Path(folder)
            run.run()
            return read_pairs(run.context)
    run.run()  # results that were set aside come back
    return read_pairs(run.context)


def _starts(context: Context, tokens: TokenTrace) -> list[tuple[int, range | None]]:
    """For each section of the label, its start, and the positions that its window reads (None: it is dropped)."""
    v = context.experiment.vectors
    return [(at, read_positions(tokens, at, v.window, v.into_prompt)) for name, at in tokens.starts if name == v.label]


def _marked(context: Context, tokens: TokenTrace, colour: bool) -> str:
    found = _starts(context, tokens)
    starts = {at for at, _ in found}
    read = {position for _, window in found for position in window or ()}
    pieces = []
    for position, token in enumerate(tokens.ids):
        text = context.tokenizer.decode([token])
        if position in starts:
            text = f"{_RED}{text}{_PLAIN}" if colour else f"»{text}«"
        elif position in read:
            text = f"{_GREEN}{text}{_PLAIN}" if colour else f"⟦{text}⟧"
        elif position < tokens.reply_start and colour:
            text = f"{_DIM}{text}{_PLAIN}"
        pieces.append(text)
    return "".join(pieces)


def _windows(context: Context, tokens: TokenTrace) -> list[str]:
    lines = []
    first, last = context.experiment.vectors.window
    for at, window in _starts(context, tokens):
        start = context.tokenizer.decode(tokens.ids[at : at + 1])
        if window is None:
            lines.append(f"  start {at} {start!r}: dropped, its window {at + first}..{at + last} leaves the reply")
            continue
        texts = " ".join(f"{p}:{context.tokenizer.decode(tokens.ids[p : p + 1])!r}" for p in window)
        lines.append(f"  start {at} {start!r} reads {texts}")
    return lines or [f"  no section is labelled {context.experiment.vectors.label!r}"]


def console() -> None:
    """The command line."""
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=parse_flags)


if __name__ == "__main__":
    console()
