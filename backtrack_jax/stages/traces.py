"""Stage 1: reasoning traces, imported or sampled.

traces.jsonl      the traces
labelled.jsonl    labels as they came with imported chains
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from backtrack_jax import generate, inputs
from backtrack_jax.config import Experiment
from backtrack_jax.data import records
from backtrack_jax.data.text import reasoning
from backtrack_jax.files import store
from backtrack_jax.files.console import say
from backtrack_jax.intervention import no_intervention
from backtrack_jax.models.markers import unknown_end
from backtrack_jax.stages import estimates
from backtrack_jax.stages.base import Context, Stage, spec_values
from backtrack_jax.stages.sampling import sample_rows

_TRACES, _LABELLED, _PARTIAL = "traces.jsonl", "labelled.jsonl", "replies.jsonl"


class TracesStage(Stage):
    """Imports traces, or samples them."""

    name = "1-traces"
    reads_vectors = False

    def inputs(self, e: Experiment) -> dict[str, Any]:
        """The file by content; or the sampling, the problems and the model that answers them.

        The size of a batch is left out, so that a run that ran out of memory resumes with smaller ones.
        """
        if e.traces.path:
            # Of a folder, only what is read: results or a git repository in it would change it at every run.
            path = inputs.data_path(e.traces.path)
            files = {file.name if path.is_dir() else "": store.file_hash(file) for file in records.chain_files(path)}
            return {"traces": {"file": store.fingerprint(files), "limit": e.traces.limit} | _marks(e)}
        asked = store.fingerprint({"problems": [dataclasses.asdict(problem) for problem in inputs.problems(e)]})
        left_out = ("path", "stand_in", "end_marks", "problems", "limit", "batch_size")
        sampling = spec_values(e.traces, *left_out) | _marks(e) | {"problems": asked}
        model = inputs.model_inputs(e, e.author)
        return {"traces": sampling, "prompt": inputs.prompt_inputs(e), "model": model, "seed": e.seed}

    def model_roles(self, e: Experiment) -> Sequence[str]:
        """The model that writes the traces, where they are sampled."""
        return () if e.traces.path else (e.author,)

    def plan(self, context: Context) -> list[str]:
        """What is imported, or what sampling takes."""
        e, spec = context.experiment, context.experiment.traces
        if spec.path:
            return [f"import {inputs.data_path(spec.path)}"]
        asked = inputs.problems(e)
        prompt = max(estimates.prompt_tokens(e, problem.problem) for problem in asked)
        rows = len(asked) * spec.samples
        return estimates.sampling(e, e.author, rows, prompt, spec.max_new_tokens, spec.batch_size)

    def run(self, context: Context, folder: Path) -> None:
        """Imports or samples."""
        if context.experiment.traces.path:
            _import(context.experiment, folder)
        else:
            _sample(context, folder)
        _say_unknown_ends(self.read(folder))

    def read(self, folder: Path) -> list[records.Trace]:
        """The traces in its folder."""
        return records.read_traces(folder / _TRACES)

    def read_labels(self, folder: Path) -> dict[str, str] | None:
        """Trace id -> its chain with the labels that came with it; None where the traces came without."""
        file = folder / _LABELLED
        if not file.exists():
            return None
        return {line["trace_id"]: line["annotated"] for line in store.read_lines(file)}


TRACES = TracesStage()


def _marks(e: Experiment) -> dict[str, Any]:
    """Further marks of the end of reasoning; nothing where there are none, as in earlier results."""
    return {"end_marks": list(e.traces.end_marks)} if e.traces.end_marks else {}


def _say_unknown_ends(traces: Sequence[records.Trace]) -> None:
    """Names texts that seem to end a reasoning and are not known to, each with the number of traces that hold it."""
    found = Counter(mark for trace in traces if (mark := unknown_end(reasoning(trace))))
    for mark, times in found.most_common():
        say(
            f"  WARNING: {times} of {len(traces)} traces hold {mark!r}, which is not known to end a reasoning, so what "
            f"follows it is labelled and read; if it does, set traces.end_marks=({mark!r},)"
        )


def _united(marks: tuple[str, ...], e: Experiment) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*marks, *e.traces.end_marks)))


def _import(e: Experiment, folder: Path) -> None:
    path = inputs.data_path(e.traces.path)
    if not records.is_released(path):
        traces = inputs.spread(records.read_traces(path), e.traces.limit)
        traces = [dataclasses.replace(trace, end_marks=_united(trace.end_marks, e)) for trace in traces]
    else:
        pairs = inputs.spread(list(zip(*records.read_released(path), strict=True)), e.traces.limit)
        lines = [json.dumps({"trace_id": trace.id, "annotated": text}) for trace, text in pairs]
        store.write_text(folder / _LABELLED, "\n".join(lines) + "\n")
        traces = [dataclasses.replace(trace, end_marks=e.traces.end_marks) for trace, _ in pairs]
    records.write_jsonl(folder / _TRACES, traces)
    say(f"  {len(traces)} traces imported")


def _sample(context: Context, folder: Path) -> None:
    """Samples the author's replies to the problems; a killed run resumes at the first missing batch."""
    e, spec = context.experiment, context.experiment.traces
    partial = folder / _PARTIAL
    if not (folder / _TRACES).exists():
        asked = [(problem, sample) for problem in inputs.problems(e) for sample in range(spec.samples)]
        config = context.architecture(e.author)
        nothing = no_intervention(config.n_layers, config.d_model)
        rows = [
            generate.Row(
                context.prompt_ids(e.author, problem.problem),
                generate.row_key(e.seed, problem.id, sample),
                nothing,
                f"problem {problem.id!r}, sample {sample}",
            )
            for problem, sample in asked
        ]
        replies = sample_rows(context, partial, e.author, rows, generate.Sampling(spec.temperature, spec.top_p), spec)
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
                end_marks=e.traces.end_marks,
            )
            for (problem, sample), reply in zip(asked, replies, strict=True)
        ]
        records.write_jsonl(folder / _TRACES, traces)
    partial.unlink(missing_ok=True)
