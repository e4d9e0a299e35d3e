"""Measuring a pair against the paper's claims and against the truth: replies of a cell, vectors, exact beliefs."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from scipy import special
from sklearn import linear_model

from backtrack_jax import generate
from backtrack_jax.analysis import activations
from backtrack_jax.analysis.backtracking import count_keywords
from backtrack_jax.analysis.statistics import rate_interval
from backtrack_jax.data.records import Problem, Trace
from backtrack_jax.extract import TokenTrace
from backtrack_jax.intervention import Intervention, no_intervention
from backtrack_jax.models import checkpoint, prompts
from backtrack_jax.models.decoder import Decoder
from backtrack_jax.models.tokenizer import Tokenizer
from backtrack_jax.organism import judge, vocabulary
from backtrack_jax.organism.belief import log_odds
from backtrack_jax.organism.grammar import BASE, REASONING, Process

WINDOW = (-13, -8)
LONGEST = 200  # tokens of a whole reply
_NEW_TOKENS = 110
_TEMPERATURE = 0.7
_BATCH = 192


@dataclasses.dataclass(frozen=True)
class Cell:
    """Replies of one model under one condition.

    Attributes:
      rate: share of {wait, hmm} among the words (Eq. 1).
      low: lower end of its 95 % interval over problems (`statistics.rate_interval`).
      high: its upper end.
      fitting: share of sentences that fit the grammar.
      problems: how many were asked.
    """

    rate: float
    low: float
    high: float
    fitting: float
    problems: int


class Pair:
    """Both models of a pair and their tokenizer.

    Attributes:
      models: role -> model, float32.
      tokenizer: of both.
      prompt: the format of their prompts.
    """

    def __init__(self, folder: Path):
        """Loads `folder/base` and `folder/reasoning`."""
        self.models = {role: checkpoint.load(str(folder / role), dtype="float32") for role in ("base", "reasoning")}
        self.tokenizer = Tokenizer.load(folder / "reasoning")
        self.prompt = vocabulary.dialect_of(self.tokenizer).prompt

    @property
    def shape(self) -> tuple[int, int]:
        """Layers and width."""
        config = self.models["base"].config
        return config.n_layers, config.d_model

    def sample(
        self, role: str, problems: Sequence[Problem], rows: Sequence[Intervention], seed: int, new_tokens: int
    ) -> list[list[int]]:
        """One reply to each problem under each intervention, intervention by intervention, as token ids.

        Conditions share the random numbers of a problem. The noise of an intervention is its key's, folded with the
        problem's number.
        """
        asked = []
        for row in rows:
            for i, problem in enumerate(problems):
                ids = prompts.prompt_ids(self.tokenizer, problem.problem, self.prompt)
                mine = dataclasses.replace(row, key=jax.random.fold_in(row.key, i))
                asked.append(generate.Row(ids, generate.row_key(seed, problem.id, 0), mine, f"problem {problem.id!r}"))
        found: dict[int, tuple[int, ...]] = {}
        for batch in generate.generate_rows(
            self.models[role],
            asked,
            sampling=generate.Sampling(_TEMPERATURE),
            stop_ids=self.tokenizer.stop_ids,
            max_new_tokens=new_tokens,
            batch_size=_BATCH,
        ):
            found |= {number: reply.ids for number, reply in batch}
        return [list(found[i]) for i in range(len(asked))]

    def replies(
        self, role: str, problems: Sequence[Problem], rows: Sequence[Intervention], seed: int, new_tokens: int
    ) -> list[str]:
        """What `sample` gives, as text."""
        sampled = self.sample(role, problems, rows, seed, new_tokens)
        return [self.tokenizer.decode([i for i in ids if i not in self.tokenizer.stop_ids]) for ids in sampled]

    def cells(
        self, role: str, problems: Sequence[Problem], conditions: Mapping[str, Intervention], seed: int
    ) -> dict[str, Cell]:
        """Rate and coherence of a model under each condition, one reply a problem."""
        replies = self.replies(role, problems, list(conditions.values()), seed, _NEW_TOKENS)
        n = len(problems)
        return {name: cell(replies[i * n : (i + 1) * n]) for i, name in enumerate(conditions)}

    def traces(self, problems: Sequence[Problem], seed: int) -> list[Trace]:
        """Unsteered replies of the reasoning model, up to their end."""
        nothing = no_intervention(*self.shape)
        replies = self.sample("reasoning", problems, [nothing], seed, LONGEST)
        made = []
        for problem, ids in zip(problems, replies, strict=True):
            stopped = ids[-1] in self.tokenizer.stop_ids
            text = self.tokenizer.decode(ids[:-1] if stopped else ids)
            made.append(
                Trace(
                    f"{problem.id}/0",
                    problem.id,
                    problem.category,
                    problem.problem,
                    text,
                    token_ids=tuple(ids),
                    finish_reason="stop" if stopped else "length",
                )
            )
        return made

    def read(self, traces: Sequence[Trace]) -> list[TokenTrace]:
        """Traces with their sections' first tokens, labelled by the grammar."""
        placed = []
        for trace in traces:
            encoded = prompts.encode_trace(
                self.tokenizer, trace.problem, trace.text, self.prompt, token_ids=trace.token_ids
            )
            starts = [(s.label, encoded.position_of_char(s.start)) for s in judge.annotate(trace).sections]
            found = [(label, at) for label, at in starts if at is not None]
            placed.append(TokenTrace(trace.id, encoded.ids, encoded.reply_start, found))
        return placed


def cell(replies: Sequence[str]) -> Cell:
    """Rate, interval over problems, and coherence of replies, one a problem."""
    counts = [count_keywords(reply) for reply in replies]
    hits, words = [count.hits for count in counts], [count.words for count in counts]
    fits = np.array([judge.fitting(reply) for reply in replies])
    low, high = rate_interval(hits, words)
    fitting = float(fits[:, 0].sum() / max(1, fits[:, 1].sum()))
    return Cell(sum(hits) / max(1, sum(words)), low, high, fitting, len(replies))


@dataclasses.dataclass(frozen=True)
class Belief:
    """How a model holds the exact belief about the hidden register, layer by layer.

    The belief is the probability that a token's sentence is shaky, given the words so far; a residual stream holds it
    linearly (Shai et al., arXiv 2405.15943). Its log-odds are the same knowledge on another scale: there, one in a
    million is as far from one in a thousand as that is from even odds, so that most of the variance is among sentences
    that are surely sure.

    Attributes:
      direction: [L, D], slope of the residual stream on the probability.
      log_odds_direction: [L, D], slope on its log-odds.
      r_squared: [L], of a linear probe of the probability, on problems that it was not fitted on.
      log_odds_r_squared: [L], of the same for the log-odds.
      tokens: how many were read. Where the words leave no doubt, as after a Wait, which makes the register sure, the
        probability is 0 and the log-odds are infinite: these tokens count for the former alone.
    """

    direction: np.ndarray
    log_odds_direction: np.ndarray
    r_squared: np.ndarray
    log_odds_r_squared: np.ndarray
    tokens: int


def belief(
    model: Decoder,
    tokenizer: Tokenizer,
    role: str,
    traces: Sequence[Trace],
    read: Sequence[TokenTrace],
    per_trace: int = 40,
) -> Belief:
    """Reads a model's residual stream against the exact filter of its own process.

    The base process knows no backtracking, so the base model is read up to a trace's first backtracking sentence.
    """
    process = BASE if role == "base" else REASONING
    rng = np.random.default_rng(0)
    places, values = [], []
    for trace, tokens in zip(traces, read, strict=True):
        odds = np.array(_log_odds_of_tokens(tokenizer, trace, process))
        known = np.flatnonzero(~np.isnan(odds))
        chosen = np.sort(rng.choice(known, min(per_trace, len(known)), replace=False))
        places.append(chosen + tokens.reply_start)
        values.append(odds[chosen])
    layers = range(model.config.n_layers)
    states: dict[int, np.ndarray] = {}
    for batch in activations.read(model, read, places, layers, batch_size=48):
        states |= dict(batch)
    x, odds = np.concatenate([states[i] for i in range(len(read))]), np.concatenate(values)
    n = sum(map(len, values[: len(values) // 2]))  # tokens of the problems that probes are fitted on
    finite = np.isfinite(odds)
    direction, score = _regressed(x, special.expit(odds), n)
    log_odds_direction, log_odds_score = _regressed(x[finite], odds[finite], int(finite[:n].sum()))
    return Belief(direction, log_odds_direction, score, log_odds_score, len(odds))


def _regressed(x: np.ndarray, y: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """By layer, slope of x [N, L, D] on y [N], and R^2 of probes fitted on the first n and tried on the others."""
    centred = y - y.mean()
    slope = np.einsum("nld,n->ld", x - x.mean(0), centred) / (centred**2).sum()
    scores = [r_squared(x[:n, layer], y[:n], x[n:, layer], y[n:]) for layer in range(x.shape[1])]
    return slope.astype(np.float32), np.array(scores)


def _log_odds_of_tokens(tokenizer: Tokenizer, trace: Trace, process: Process) -> list[float]:
    """Exact log-odds at each token of the reasoning; NaN elsewhere and where the process cannot have written it."""
    assert trace.token_ids is not None
    words = [tokenizer.decode([i]) for i in trace.token_ids]
    end = next((i for i, word in enumerate(words) if not word.strip() or word == "</think>"), len(words))
    return [*log_odds([word.strip() for word in words[:end]], process), *[np.nan] * (len(words) - end)]


def r_squared(x: np.ndarray, y: np.ndarray, x_test: np.ndarray, y_test: np.ndarray) -> float:
    """Of a ridge regression with intercept; the penalty is a thousandth of the mean variance of x [n, D]."""
    probe = linear_model.Ridge(alpha=1e-3 * len(x) * float(x.var(0).mean()))
    return float(probe.fit(x.astype(np.float64), y).score(x_test.astype(np.float64), y_test))


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine per layer of two [L, D]."""
    return np.sum(a * b, -1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
