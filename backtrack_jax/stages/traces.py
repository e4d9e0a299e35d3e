"""Stage 1: reasoning traces, imported or sampled."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

from backtrack_jax import generate, inputs
from backtrack_jax.config import Experiment
from backtrack_jax.data import records
from backtrack_jax.files import store
from backtrack_jax.files.console import say
from backtrack_jax.intervention import no_intervention
from backtrack_jax.models import prompts
from backtrack_jax.stages.sampling import sample_rows

if TYPE_CHECKING:
    from backtrack_jax.pipeline import Run


def make_traces(run: "Run", folder: Path) -> None:
    """Stage 1: imports traces, or samples them."""
    spec = run.experiment.traces
    if not spec.path:
        sample_traces(run, folder)
        return
    path = inputs.data_path(spec.path)
    if not records.is_released(path):
        traces = inputs.spread(records.read_traces(path), spec.limit)
    else:
        pairs = inputs.spread(list(zip(*records.read_released(path), strict=True)), spec.limit)
        lines = [json.dumps({"trace_id": trace.id, "annotated": text}) for trace, text in pairs]
        store.write_text(folder / "labelled.jsonl", "\n".join(lines) + "\n")
        traces = [trace for trace, _ in pairs]
    records.write_jsonl(folder / "traces.jsonl", traces)
    say(f"  {len(traces)} traces imported")


def ids_at_source(e: Experiment) -> set[str]:
    """Ids of all traces that `traces.limit` takes from, those that it leaves out too."""
    if not e.traces.path:
        unlimited = dataclasses.replace(e, traces=dataclasses.replace(e.traces, limit=0))
        return {
            f"{problem.id}/{sample}" for problem in inputs.problems(unlimited) for sample in range(e.traces.samples)
        }
    return {trace.id for trace in records.read_any_traces(inputs.data_path(e.traces.path))}


def sample_traces(run: "Run", folder: Path) -> None:
    """Samples the author's replies to the problems; a killed run goes on at the first missing batch."""
    e, spec = run.experiment, run.experiment.traces
    partial = folder / "replies.jsonl"
    if not (folder / "traces.jsonl").exists():
        asked = [(problem, sample) for problem in inputs.problems(e) for sample in range(spec.samples)]
        config = run.architecture(e.author)
        nothing = no_intervention(config.n_layers, config.d_model)
        rows = [
            generate.Row(
                run.for_role(e.author, prompts.prompt_ids(run.tokenizer, problem.problem, run.prompt))[0],
                generate.row_key(e.seed, problem.id, sample),
                nothing,
                f"problem {problem.id!r}, sample {sample}",
            )
            for problem, sample in asked
        ]
        replies = sample_rows(run, partial, e.author, rows, generate.Sampling(spec.temperature, spec.top_p), spec)
        traces = [
            records.Trace(
                id=f"{problem.id}/{sample}",
                problem_id=problem.id,
                category=problem.category,
                problem=problem.problem,
                text=reply["text"],
                sample=sample,
                token_ids=tuple(reply["ids"]),
                finish_reason=reply["finish_reason"],
            )
            for (problem, sample), reply in zip(asked, replies, strict=True)
        ]
        records.write_jsonl(folder / "traces.jsonl", traces)
    partial.unlink(missing_ok=True)
