"""Stage 2: labelled sections of every trace."""

from pathlib import Path
from typing import TYPE_CHECKING

from backtrack_jax import inputs, store
from backtrack_jax.data import annotations as labels
from backtrack_jax.data import records
from backtrack_jax.judges import grammar, keyword
from backtrack_jax.progress import say

if TYPE_CHECKING:
    from backtrack_jax.pipeline import Run


def annotate(run: "Run", folder: Path) -> None:
    """Stage 2: labels the sections of every trace and reports what could not be placed."""
    spec = run.experiment.annotations
    source = run.folder("1-traces")
    traces = records.read_traces(source / "traces.jsonl")
    if spec.judge == "import":
        annotated = records.read_annotations(inputs.data_path(spec.path))
    elif spec.judge == "keyword":
        annotated = [keyword.annotate(trace, spec.variant) for trace in traces]
    elif spec.judge == "grammar":
        annotated = [grammar.annotate(trace) for trace in traces]
    else:
        if not (source / "labelled.jsonl").exists():
            raise ValueError(
                f"annotations.judge='released', but {run.experiment.traces.path} holds traces without labels"
            )
        labelled = {line["trace_id"]: line["annotated"] for line in store.read_lines(source / "labelled.jsonl")}
        annotated = [labels.align(trace, labelled[trace.id]) for trace in traces]
    records.pair_annotations(traces, annotated)  # raises where a span does not fit its trace
    records.write_jsonl(folder / "annotations.jsonl", annotated)
    table = labels.format_summary(labels.summarise(annotated))
    store.write_text(folder / "summary.txt", table + "\n")
    say("\n".join("  " + line for line in table.split("\n")))
