"""The plan of a run, for `--dry_run`: rows, tokens and memory of every stage, and what is done, without computing."""

from backtrack_jax import conditions, store
from backtrack_jax.config import Experiment
from backtrack_jax.data import records
from backtrack_jax.inputs import architecture, data_path, problems, spread
from backtrack_jax.models.batching import bucket
from backtrack_jax.models.config import LlamaConfig
from backtrack_jax.pipeline import STAGES, Run
from backtrack_jax.stages.annotations import ledger_path

_CHARACTERS_PER_TOKEN = 4  # of English text, for the estimate only
_PROMPT_TOKENS = 100
_CHARACTERS_PER_SENTENCE = 69  # measured on the released chains
_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


def describe(run: Run) -> str:
    """The plan as text. Tokens of traces are estimates; rows and memory follow from the config."""
    lines = [f"plan of {run.experiment.name}, results in {run.workdir}"]
    work = {
        "1-traces": _traces,
        "2-annotations": _annotations,
        "3-vectors": _vectors,
        "4-steering": _steering,
        "5-analysis": _analysis,
        "6-report": _report,
    }
    for name in STAGES:
        state = "done" if run.done(name) else "to do" if name in run.stages else "not asked for"
        lines.append(f"{name:<14} {state}")
        if name in work and state == "to do":
            lines += [f"  {line}" for line in work[name](run)]
    return "\n".join(lines)


def _traces(run: Run) -> list[str]:
    e, spec = run.experiment, run.experiment.traces
    if spec.path:
        return [f"import {data_path(spec.path)}"]
    return _sampling(e, e.author, len(problems(e)) * spec.samples, spec.max_new_tokens, spec.batch_size)


def _annotations(run: Run) -> list[str]:
    e, spec = run.experiment, run.experiment.annotations.openai
    if e.judge != "openai":
        lengths = _trace_lengths(e)
        return [f"{len(lengths)} traces, about {sum(lengths):,} tokens, by {e.judge}; no calls, no model is held"]
    from backtrack_jax.judges.openai import estimate  # its package takes a second to import

    traces = _traces_to_label(run)
    planned = estimate(traces or _unsampled(e), spec.prompt(), spec.settings(), ledger_path(e), spec.votes)
    lines = [f"judge: {spec.model} at {spec.base_url}, {spec.votes} vote(s) a trace, format {spec.format}"]
    if not traces:
        lines.append(f"as if every reply were {e.traces.max_new_tokens} tokens of reasoning, the most it can be:")
    return [*lines, str(planned)]


def _traces_to_label(run: Run) -> list[records.Trace]:
    """The traces of stage 1, if they are there or can be imported; none if they are still to be sampled."""
    if folder := store.peek(run.workdir, "1-traces", run.inputs["1-traces"]):
        return records.read_traces(folder / "traces.jsonl")
    return _imported(run.experiment) if run.experiment.traces.path else []


def _unsampled(e: Experiment) -> list[records.Trace]:
    """Stand-ins for traces that are not sampled yet: as long as they can be, in sentences of usual length."""
    n = round(e.traces.max_new_tokens * _CHARACTERS_PER_TOKEN / _CHARACTERS_PER_SENTENCE)
    sentence = "X" * (_CHARACTERS_PER_SENTENCE - 2) + ". "
    return [
        records.Trace(f"{p.id}/{sample}", p.id, p.category, p.problem, f"{sample} {sentence * n}", sample)
        for p in problems(e)
        for sample in range(e.traces.samples)
    ]


def _analysis(run: Run) -> list[str]:
    """Likelihoods of all replies, activations of sampled and of shown tokens."""
    e, spec = run.experiment, run.experiment.analysis
    lengths, rows = _trace_lengths(e), _rows(e)
    lines = []
    for role in e.roles:
        tokens = rows[role] * (_PROMPT_TOKENS + e.steering.max_new_tokens)
        lines.append(
            f"{role} model: likelihood of {rows[role]} replies, at most {tokens:,} tokens; activations of "
            f"{len(lengths)} traces, about {sum(lengths):,} tokens, {len(lengths) * spec.positions:,} of them kept"
        )
        config = architecture(e.model(role).path)
        if config is None:
            lines.append(f"  memory: unknown until {e.model(role).path} is here")
            continue
        layers = len({*e.vectors.layers, e.steering.layer})
        kept = 4 * len(lengths) * spec.positions * layers * config.d_model
        gathered = 4 * config.n_layers * spec.batch_size * bucket(spec.positions) * config.d_model
        logits = 4 * max(min(1 << 27, spec.batch_size * 256 * config.vocab_size), 256 * config.vocab_size)
        lines.append(
            f"  memory: weights {_weights(e, role, config)}, activations {_gigabytes(gathered)} and on the host "
            f"{_gigabytes(kept)}, logits about {_gigabytes(logits)}"
        )
    return lines


def _report(run: Run) -> list[str]:
    rows = sum(_rows(run.experiment).values())
    return [f"figures, summary and page from the tables of {rows} replies; no model is held"]


def _vectors(run: Run) -> list[str]:
    e = run.experiment
    lengths = _trace_lengths(e)
    longest = bucket(max(lengths))
    lines = []
    for role in e.roles:
        lines.append(f"{role} model: {len(lengths)} traces, about {sum(lengths):,} tokens")
        config = architecture(e.model(role).path)
        if config is None:
            lines.append(f"  memory: unknown until {e.model(role).path} is here")
            continue
        windows = 1 + len(e.vectors.offsets)
        scores = 4 * e.vectors.batch_size * config.n_heads * longest**2
        width = (
            4
            * e.vectors.batch_size
            * (longest * (config.d_mlp * 2 + config.d_model * 6) + windows * 14 * config.d_model)
        )
        lines.append(f"  memory: weights {_weights(e, role, config)}, activations about {_gigabytes(scores + width)}")
    return lines


def _steering(run: Run) -> list[str]:
    e, spec = run.experiment, run.experiment.steering
    lines = [f"{len(conditions.planned(e))} conditions, {_asked(e)} problems at most, {spec.samples} sample(s) each"]
    for role, rows in _rows(e).items():
        lines += _sampling(e, role, rows, spec.max_new_tokens, spec.batch_size)
    return lines


def _asked(e: Experiment) -> int:
    """Problems that replies are steered on."""
    traced = {trace.problem_id for trace in _imported(e)} if e.traces.path else {problem.id for problem in problems(e)}
    return min(len(traced), e.steering.limit or len(traced))


def _rows(e: Experiment) -> dict[str, int]:
    """Role -> steered replies."""
    asked, cells = _asked(e), conditions.planned(e)
    return {
        role: e.steering.samples * sum(min(asked, limit or asked) for c, limit in cells.items() if c.target == role)
        for role in e.roles
    }


def _sampling(e: Experiment, role: str, rows: int, new_tokens: int, batch_size: int) -> list[str]:
    lines = [f"{role} model: {rows} rows in batches of {batch_size}, up to {rows * new_tokens:,} new tokens"]
    config = architecture(e.model(role).path)
    if config is None:
        return [*lines, f"  memory: unknown until {e.model(role).path} is here"]
    slots = bucket(_PROMPT_TOKENS) + new_tokens
    per_token = 2 * config.n_layers * config.n_kv_heads * config.head_dim * _BYTES[e.model(role).dtype]
    cache, logits = batch_size * slots * per_token, 3 * 4 * batch_size * config.vocab_size
    rows_bytes = 2 * 4 * batch_size * config.n_layers * config.d_model
    return [
        *lines,
        f"  memory: weights {_weights(e, role, config)}, cache {_gigabytes(cache)}, "
        f"interventions and logits {_gigabytes(rows_bytes + logits)}",
    ]


def _trace_lengths(e: Experiment) -> list[int]:
    """Tokens of each trace with its prompt; estimates."""
    if not e.traces.path:
        return [_PROMPT_TOKENS + e.traces.max_new_tokens] * (len(problems(e)) * e.traces.samples)
    return [_PROMPT_TOKENS + len(trace.text) // _CHARACTERS_PER_TOKEN for trace in _imported(e)]


def _imported(e: Experiment) -> list[records.Trace]:
    path = data_path(e.traces.path)
    traces = records.read_traces(path) if path.suffix == ".jsonl" else records.read_released(path)[0]
    return spread(traces, e.traces.limit)


def _weights(e: Experiment, role: str, config: LlamaConfig) -> str:
    return _gigabytes(config.n_parameters * _BYTES[e.model(role).dtype])


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
