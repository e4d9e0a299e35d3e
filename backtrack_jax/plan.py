"""The plan of a run, for `--dry_run`: what every stage says of its own work, and what is done, without computing."""

from backtrack_jax.pipeline import Run


def describe(run: Run) -> str:
    """The plan as text. Tokens of traces are estimates; rows and memory follow from the config."""
    lines = [f"plan of {run.experiment.name}, results in {run.workdir}"]
    for stage in run.stages:
        state = "done" if run.done(stage) else "to do" if stage in run.wanted else "not asked for"
        reason = run.reason(stage) if state != "not asked for" else ""
        lines.append(f"{stage.name:<14} {state}" + (f": {reason}" if reason else ""))
        if state == "to do":
            lines += [f"  {line}" for line in stage.plan(run.context)]
    return "\n".join(lines)
