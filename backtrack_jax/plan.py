"""The plan of a run, for `--dry_run`: rows, tokens and memory of every stage, and what is done, without computing."""

from collections.abc import Mapping, Sequence

from backtrack_jax import conditions, store
from backtrack_jax.analysis import agreement
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
    e = run.experiment
    if e.judge != "openai":
        lengths = _trace_lengths(e)
        return [f"{len(lengths)} traces, about {sum(lengths):,} tokens, by {e.judge}; no calls, no model is held"]
    if traces := _traces_to_label(run):
        return _asking(e, traces)
    sampled = [(problem, sample) for problem in problems(e) for sample in range(e.traces.samples)]
    return _asking_unsampled(e, sampled, e.traces.max_new_tokens)


def _asking(e: Experiment, traces: Sequence[records.Trace]) -> list[str]:
    """Calls, tokens and cost of asking the online judge about traces."""
    from backtrack_jax.judges.openai import estimate  # its package takes a second to import

    spec = e.annotations.openai
    planned = estimate(traces, spec.prompt(), spec.settings(), ledger_path(e), spec.votes)
    head = f"judge: {spec.model} at {spec.base_url}, {spec.votes} vote(s) a trace, format {spec.format}"
    return [head, str(planned)]


def _asking_unsampled(e: Experiment, sampled: Sequence[tuple[records.Problem, int]], tokens: int) -> list[str]:
    """The same for replies that are not sampled yet: as if each were as long as it can be, in usual sentences."""
    n = round(tokens * _CHARACTERS_PER_TOKEN / _CHARACTERS_PER_SENTENCE)
    sentence = "X" * (_CHARACTERS_PER_SENTENCE - 2) + ". "
    head, planned = _asking(
        e,
        [
            records.Trace(f"{p.id}-{i}/{sample}", p.id, p.category, p.problem, f"{i} {sample} {sentence * n}", sample)
            for i, (p, sample) in enumerate(sampled)
        ],
    )
    return [head, f"as if every reply were {tokens} tokens of reasoning, the most it can be:", planned]


def _traces_to_label(run: Run) -> list[records.Trace]:
    """The traces of stage 1, if they are there or can be imported; none if they are still to be sampled."""
    if folder := store.peek(run.workdir, "1-traces", run.inputs["1-traces"]):
        return records.read_traces(folder / "traces.jsonl")
    return _imported(run.experiment) if run.experiment.traces.path else []


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
    return [*lines, *_judged_replies(run, rows)]


def _judged_replies(run: Run, rows: Mapping[str, int]) -> list[str]:
    """What labelling the steered replies costs, where the online judge does it."""
    e = run.experiment
    if e.analysis.judge != "openai":
        return []
    if folder := store.peek(run.workdir, "4-steering", run.inputs["4-steering"]):
        lines = store.read_lines(folder / "generations.jsonl")
        return _asking(e, agreement.reply_traces(lines)[0])
    standing = records.Problem("-", "-", "X" * 4 * _PROMPT_TOKENS)
    return _asking_unsampled(e, [(standing, 0)] * sum(rows.values()), e.steering.max_new_tokens)


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
    prompt = bucket(_PROMPT_TOKENS)
    per_token = 2 * config.n_layers * config.n_kv_heads * config.head_dim * _BYTES[e.model(role).dtype]
    cache, logits = batch_size * (prompt + new_tokens) * per_token, 3 * 4 * batch_size * config.vocab_size
    # Its own keys and values, before they are moved into the cache, and a block's activations: as compiled for a TPU.
    prefill = batch_size * prompt * (per_token + 6 * config.d_mlp + 28 * config.d_model)
    rows_bytes = 2 * 4 * batch_size * config.n_layers * config.d_model
    return [
        *lines,
        f"  memory: weights {_weights(e, role, config)}, cache {_gigabytes(cache)}, prefill {_gigabytes(prefill)}, "
        f"interventions and logits {_gigabytes(rows_bytes + logits)}",
    ]


def _trace_lengths(e: Experiment) -> list[int]:
    """Tokens of each trace with its prompt; estimates."""
    if not e.traces.path:
        return [_PROMPT_TOKENS + e.traces.max_new_tokens] * (len(problems(e)) * e.traces.samples)
    return [_PROMPT_TOKENS + len(trace.text) // _CHARACTERS_PER_TOKEN for trace in _imported(e)]


def _imported(e: Experiment) -> list[records.Trace]:
    return spread(records.read_any_traces(data_path(e.traces.path)), e.traces.limit)


def _weights(e: Experiment, role: str, config: LlamaConfig) -> str:
    size = config.n_parameters * _BYTES[e.model(role).dtype]
    return _gigabytes(size) + (f" over {e.model_parallel} devices" if e.model_parallel > 1 else "")


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
