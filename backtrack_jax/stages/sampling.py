"""Sampling of many rows with a model of the run, kept batch by batch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from backtrack_jax import generate
from backtrack_jax.config import SteeringSpec, TraceSpec
from backtrack_jax.files import store
from backtrack_jax.files.console import Progress, say
from backtrack_jax.stages import estimates
from backtrack_jax.stages.base import Context


def sample_rows(
    context: Context,
    partial: Path,
    role: str,
    rows: Sequence[generate.Row],
    sampling: generate.Sampling,
    spec: TraceSpec | SteeringSpec,
) -> list[dict[str, Any]]:
    """Samples all rows, appending each batch to `partial`, and returns them in order; rows already there are kept."""
    done = {line["row"]: line for line in store.recover_lines(partial)}
    if len(done) == len(rows):
        return [done[row] for row in range(len(rows))]
    stop_ids = set(context.tokenizer.stop_ids)
    lengths = [len(row.prompt) + spec.max_new_tokens for row in rows]
    for line in estimates.beyond_context(context.architecture(role), role, lengths):
        say(line)
    batches = generate.generate_rows(
        context.model(role),
        rows,
        sampling=sampling,
        stop_ids=context.tokenizer.stop_ids,
        vocab_size=context.tokenizer.vocab_size,
        max_new_tokens=spec.max_new_tokens,
        batch_size=spec.batch_size,
        done=done,
    )
    with Progress(f"  sampling from the {role} model", len(rows), len(done)) as progress:
        for batch in batches:
            lines = [
                {
                    "row": row,
                    "ids": reply.ids,
                    "text": context.tokenizer.decode([i for i in reply.ids if i not in stop_ids]),
                    "finish_reason": reply.finish_reason,
                }
                for row, reply in batch
                if row not in done
            ]
            store.append_lines(partial, lines)
            done |= {line["row"]: line for line in lines}
            progress.update(len(lines), sum(len(line["ids"]) for line in lines))
    return [done[row] for row in range(len(rows))]
