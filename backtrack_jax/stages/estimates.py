"""Rows, tokens and memory that a plan speaks of: estimates, from the config and the traces, without a model."""

from collections.abc import Mapping, Sequence

from backtrack_jax import conditions
from backtrack_jax.config import Experiment
from backtrack_jax.data import records
from backtrack_jax.inputs import architecture, data_path, problems, spread
from backtrack_jax.judges.base import Judge
from backtrack_jax.models import ops
from backtrack_jax.models.batching import bucket
from backtrack_jax.models.config import ModelConfig
from backtrack_jax.models.quantized import activation_dtype, weight_bytes

CHARACTERS_PER_TOKEN = 4
"""Of English text, for estimates only."""

_CHARACTERS_PER_SENTENCE = 69  # measured on the released chains
_MARKER_TOKENS = 16  # of a prompt, around system text and problem


def imported_traces(e: Experiment) -> list[records.Trace]:
    """Traces of the experiment's source."""
    return spread(records.read_any_traces(data_path(e.traces.path)), e.traces.limit)


def trace_lengths(e: Experiment) -> list[int]:
    """Tokens of each trace with its prompt."""
    if not e.traces.path:
        prompts = [prompt_tokens(e, problem.problem) for problem in problems(e)]
        return [tokens + e.traces.max_new_tokens for tokens in prompts for _ in range(e.traces.samples)]
    traces = imported_traces(e)
    return [prompt_tokens(e, trace.problem) + len(trace.text) // CHARACTERS_PER_TOKEN for trace in traces]


def sections(tokens: int) -> int:
    """Sections of a trace of so many tokens, if each were a sentence."""
    return tokens * CHARACTERS_PER_TOKEN // _CHARACTERS_PER_SENTENCE


def prompt_tokens(e: Experiment, problem: str) -> int:
    """Tokens of a prompt."""
    return _MARKER_TOKENS + (len(e.prompt.system) + len(problem)) // CHARACTERS_PER_TOKEN


def asked_problems(e: Experiment) -> int:
    """Problems that replies are steered on, at most."""
    available = len(problem_texts(e))
    return min(available, e.steering.limit or available)


def longest_prompt(e: Experiment) -> int:
    """Tokens of the longest prompt that replies may be steered on."""
    return max(prompt_tokens(e, text) for text in problem_texts(e).values())


def problem_texts(e: Experiment) -> Mapping[str, str]:
    """Problem id -> its text, for every problem that has or will have a trace."""
    if e.traces.path:
        return {trace.problem_id: trace.problem for trace in imported_traces(e)}
    return {problem.id: problem.problem for problem in problems(e)}


def steered_rows(e: Experiment) -> dict[str, int]:
    """Role -> steered replies."""
    asked, cells = asked_problems(e), conditions.planned(e)
    return {
        role: e.steering.samples * sum(min(asked, limit or asked) for c, limit in cells.items() if c.target == role)
        for role in e.roles
    }


def judging(e: Experiment, judge: Judge, asked: Sequence[tuple[records.Problem, int]], tokens: int) -> list[str]:
    """A judge's plan for replies not sampled yet: each as long as it can be, in sentences of usual length.

    Args:
      e: the experiment.
      judge: who is to label them.
      asked: problem and number of the sample, of every reply.
      tokens: of a reply, at most.
    """
    n = round(tokens * CHARACTERS_PER_TOKEN / _CHARACTERS_PER_SENTENCE)
    sentence = "X" * (_CHARACTERS_PER_SENTENCE - 2) + ". "
    texts = [f"{i} {sample} {sentence * n}" for i, (_, sample) in enumerate(asked)]
    traces = [
        records.Trace(f"{problem.id}-{i}/{sample}", problem.id, problem.category, problem.problem, texts[i], sample)
        for i, (problem, sample) in enumerate(asked)
    ]
    lines = judge.plan(e, traces)
    assumed = f"as if every reply were {tokens} tokens of reasoning, the most it can be:"
    return [lines[0], assumed, *lines[1:]] if lines else []


def sampling(e: Experiment, role: str, rows: int, prompt_tokens: int, new_tokens: int, batch_size: int) -> list[str]:
    """What sampling so many rows takes."""
    lines = [f"{role} model: {rows} rows in batches of {batch_size}, up to {rows * new_tokens:,} new tokens"]
    config = architecture(e.model(role).path)
    if config is None:
        return [*lines, unknown_memory(e, role)]
    prompt, parts, rows_at_once = bucket(prompt_tokens), e.model_parallel, -(-batch_size // e.data_parallel)
    dtype = e.model(role).dtype
    cached = activation_dtype(dtype).itemsize
    per_token = 2 * config.n_layers * config.n_kv_heads // parts * config.head_dim * cached
    cache, logits = rows_at_once * (prompt + new_tokens) * per_token, 3 * 4 * rows_at_once * config.vocab_size // parts
    # Its own keys and values, before they are moved into the cache, and a block's activations: as compiled for a TPU.
    prefill = rows_at_once * prompt * (per_token + 6 * config.d_mlp // parts + 28 * config.d_model)
    rows_bytes = 4 * rows_at_once * config.n_layers * config.d_model  # of what is added
    embeddings = (1 if config.tied else 2) * config.vocab_size * config.d_model * cached
    second = gigabytes((weight_bytes(config, dtype) - embeddings) // parts)
    room = {"tpu": "", "cpu": f", second copy of the blocks {second}"}
    return [
        *lines,
        f"  {memory(e)}: weights {weights(e, role, config)}, cache {gigabytes(cache)}, "
        f"prefill {gigabytes(prefill)}, interventions and logits {gigabytes(rows_bytes + logits)}"
        + room.get(ops.target().platform, f", second copy of the blocks {second} if there is room"),
        *beyond_context(config, role, [prompt_tokens + new_tokens] * rows),
    ]


def beyond_context(config: ModelConfig, role: str, lengths: Sequence[int]) -> list[str]:
    """A warning if sequences are longer than a model was trained for, which its rotary embeddings do not refuse.

    Args:
      config: of the model.
      role: its role.
      lengths: tokens of each sequence.
    """
    over = [length for length in lengths if length > (config.context or length)]
    if not over:
        return []
    return [
        f"  WARNING: the {role} model was trained for {config.context:,} positions; "
        f"{len(over)} of {len(lengths)} sequences are longer, up to {max(over):,} tokens"
    ]


def weights(e: Experiment, role: str, config: ModelConfig) -> str:
    """Memory of a model's weights on each device."""
    return gigabytes(weight_bytes(config, e.model(role).dtype) // e.model_parallel)


def memory(e: Experiment) -> str:
    """Where the sizes apply: programs for a CPU hold another cache than those for a GPU."""
    devices = e.data_parallel * e.model_parallel
    return f"memory on {f'each of {devices} devices, ' if devices > 1 else ''}{ops.target().platform}"


def unknown_memory(e: Experiment, role: str) -> str:
    """The line for a model that is not on this machine."""
    return f"  memory: unknown until {e.model(role).path} is here"


def gigabytes(size: int) -> str:
    """Bytes in GB of 1e9."""
    return f"{size / 1e9:.2f} GB"
