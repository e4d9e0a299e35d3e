"""The plan of a run, for `--dry_run`: rows, tokens and memory of every stage, and what is done, without computing."""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp

from backtrack_jax import conditions
from backtrack_jax.analysis import agreement
from backtrack_jax.config import Experiment
from backtrack_jax.data import records
from backtrack_jax.files import store
from backtrack_jax.inputs import architecture, data_path, problems, spread
from backtrack_jax.models import ops
from backtrack_jax.models.batching import bucket
from backtrack_jax.models.config import ModelConfig
from backtrack_jax.pipeline import STAGES, Run
from backtrack_jax.stages.annotations import ledger_path

_CHARACTERS_PER_TOKEN = 4  # of English text, for the estimate only
_MARKER_TOKENS = 16  # of a prompt, around system text and problem
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
    asked = problems(e)
    prompt = max(_prompt_tokens(e, problem.problem) for problem in asked)
    return _sampling(e, e.author, len(asked) * spec.samples, prompt, spec.max_new_tokens, spec.batch_size)


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
    from backtrack_jax.judges.openai.judge import estimate  # its package takes a second to import

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
        tokens = rows[role] * (_longest_prompt(e) + e.steering.max_new_tokens)
        lines.append(
            f"{role} model: likelihood of {rows[role]} replies, at most {tokens:,} tokens; activations of "
            f"{len(lengths)} traces, about {sum(lengths):,} tokens, {len(lengths) * spec.positions:,} of them kept"
        )
        config = architecture(e.model(role).path)
        if config is None:
            lines.append(f"  memory: unknown until {e.model(role).path} is here")
            continue
        rows_at_once = -(-spec.batch_size // e.data_parallel)
        layers = len({*e.vectors.layers, e.steering.main_layer})
        kept = 4 * len(lengths) * spec.positions * layers * config.d_model
        gathered = 4 * config.n_layers * rows_at_once * bucket(spec.positions) * config.d_model
        of_position = spec.batch_size * config.vocab_size
        logits = 4 * max(min(1 << 27, 256 * of_position), of_position) // (e.data_parallel * e.model_parallel)
        lines.append(
            f"  {_memory(e)}: weights {_weights(e, role, config)}, activations {_gigabytes(gathered)} and on the host "
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
    standing = records.Problem("-", "-", "X" * _CHARACTERS_PER_TOKEN * _longest_prompt(e))
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
        parts, rows_at_once = e.model_parallel, -(-e.vectors.batch_size // e.data_parallel)
        scores = config.n_heads // parts * longest**2 // 2  # half are never computed
        width = longest * (2 * config.d_mlp // parts + 6 * config.d_model) + windows * 14 * config.d_model
        held = 4 * rows_at_once * (scores + width)
        lines.append(f"  {_memory(e)}: weights {_weights(e, role, config)}, activations about {_gigabytes(held)}")
    return lines


def _steering(run: Run) -> list[str]:
    e, spec = run.experiment, run.experiment.steering
    lines = [f"{len(conditions.planned(e))} conditions, {_asked(e)} problems at most, {spec.samples} sample(s) each"]
    for role, rows in _rows(e).items():
        lines += _sampling(e, role, rows, _longest_prompt(e), spec.max_new_tokens, spec.batch_size)
    return lines


def _asked(e: Experiment) -> int:
    """Problems that replies are steered on."""
    there = len(_problem_texts(e))
    return min(there, e.steering.limit or there)


def _longest_prompt(e: Experiment) -> int:
    """Tokens of the longest prompt that replies may be steered on; an estimate."""
    return max(_prompt_tokens(e, text) for text in _problem_texts(e).values())


def _problem_texts(e: Experiment) -> dict[str, str]:
    """Problem -> its text, of all that there are traces of."""
    if e.traces.path:
        return {trace.problem_id: trace.problem for trace in _imported(e)}
    return {problem.id: problem.problem for problem in problems(e)}


def _prompt_tokens(e: Experiment, problem: str) -> int:
    """An estimate."""
    return _MARKER_TOKENS + (len(e.prompt.system) + len(problem)) // _CHARACTERS_PER_TOKEN


def _rows(e: Experiment) -> dict[str, int]:
    """Role -> steered replies."""
    asked, cells = _asked(e), conditions.planned(e)
    return {
        role: e.steering.samples * sum(min(asked, limit or asked) for c, limit in cells.items() if c.target == role)
        for role in e.roles
    }


def _sampling(e: Experiment, role: str, rows: int, prompt_tokens: int, new_tokens: int, batch_size: int) -> list[str]:
    lines = [f"{role} model: {rows} rows in batches of {batch_size}, up to {rows * new_tokens:,} new tokens"]
    config = architecture(e.model(role).path)
    if config is None:
        return [*lines, f"  memory: unknown until {e.model(role).path} is here"]
    prompt, parts, rows_at_once = bucket(prompt_tokens), e.model_parallel, -(-batch_size // e.data_parallel)
    cached = ops.cache_dtype(jnp.dtype(e.model(role).dtype)).itemsize
    per_token = 2 * config.n_layers * config.n_kv_heads // parts * config.head_dim * cached
    cache, logits = rows_at_once * (prompt + new_tokens) * per_token, 3 * 4 * rows_at_once * config.vocab_size // parts
    # Its own keys and values, before they are moved into the cache, and a block's activations: as compiled for a TPU.
    prefill = rows_at_once * prompt * (per_token + 6 * config.d_mlp // parts + 28 * config.d_model)
    rows_bytes = 2 * 4 * rows_at_once * config.n_layers * config.d_model
    blocks = config.n_parameters - (1 if config.tied else 2) * config.vocab_size * config.d_model
    second = _gigabytes(blocks * _BYTES[e.model(role).dtype] // parts)
    room = {"tpu": "", "cpu": f", second copy of the blocks {second}"}
    return [
        *lines,
        f"  {_memory(e)}: weights {_weights(e, role, config)}, cache {_gigabytes(cache)}, "
        f"prefill {_gigabytes(prefill)}, interventions and logits {_gigabytes(rows_bytes + logits)}"
        + room.get(ops.target().platform, f", second copy of the blocks {second} if there is room"),
    ]


def _trace_lengths(e: Experiment) -> list[int]:
    """Tokens of each trace with its prompt; estimates."""
    if not e.traces.path:
        prompts = [_prompt_tokens(e, problem.problem) for problem in problems(e)]
        return [tokens + e.traces.max_new_tokens for tokens in prompts for _ in range(e.traces.samples)]
    return [_prompt_tokens(e, trace.problem) + len(trace.text) // _CHARACTERS_PER_TOKEN for trace in _imported(e)]


def _imported(e: Experiment) -> list[records.Trace]:
    return spread(records.read_any_traces(data_path(e.traces.path)), e.traces.limit)


def _weights(e: Experiment, role: str, config: ModelConfig) -> str:
    return _gigabytes(config.n_parameters * _BYTES[e.model(role).dtype] // e.model_parallel)


def _memory(e: Experiment) -> str:
    """What the sizes are of: programs of a CPU hold another cache than those of a GPU."""
    devices = e.data_parallel * e.model_parallel
    return f"memory on {f'each of {devices} devices, ' if devices > 1 else ''}{ops.target().platform}"


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
