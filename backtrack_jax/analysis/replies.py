"""Measures of steered replies: one line per reply, one per condition, and the effect on every problem."""

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from backtrack_jax.analysis import backtracking
from backtrack_jax.analysis.statistics import NAN, mean_interval, paired_interval, rate_interval
from backtrack_jax.data.records import UNSTEERED, Annotation, Condition, Reply, Section
from backtrack_jax.files.tables import Table
from backtrack_jax.judges import keyword

_OF_CONDITION = (*(field.name for field in dataclasses.fields(Condition)), "unit", "span")

Line = Mapping[str, Any]


def measure(
    reply: Reply,
    prompt: str,
    keyword_ids: Collection[int],
    log_likelihood: float,
    judged: Annotation | None = None,
    end_marks: tuple[str, ...] = (),
) -> dict[str, Any]:
    """What one reply looks like.

    Args:
      reply: the reply.
      prompt: the prompt as text, for the released counter.
      keyword_ids: ids of tokens that are a keyword of Eq. 1.
      log_likelihood: mean log-likelihood per token under the unsteered model, in nats.
      judged: labels of the reply by another judge than the keywords, if one was asked.
      end_marks: further texts that end a reasoning, `traces.end_marks`.

    Returns:
      The condition, with `unit` and `span`; `problem_id`, `category`, `sample`; `hits` and `words` (Eq. 1), the same
      over prompt and reply by substring (`substring_hits`, `substring_words`), `token_rate` (share of tokens that are a
      keyword), `sentences` and `keyword_sentences` (those the keyword judge calls backtracking), `judged_sentences` and
      `judged_backtracking` (sentences that the other judge labelled, and called backtracking), `tokens`,
      `finish_reason`, and the coherence: `log_likelihood`, `repeated_2grams`, `repeated_3grams`, `compression`.
    """
    text = reply.text
    words = backtracking.count_keywords(text)
    substring = backtracking.count_keywords(text, variant="substring", prompt=prompt)
    sentences = keyword.annotate(reply.trace(end_marks=end_marks)).sections
    backtracks = _judged(sentences, judged)
    return {
        **dataclasses.asdict(reply.condition),
        "unit": reply.unit,
        "span": reply.span,
        "problem_id": reply.problem_id,
        "category": reply.category,
        "sample": reply.sample,
        "hits": words.hits,
        "words": words.words,
        "substring_hits": substring.hits,
        "substring_words": substring.words,
        "token_rate": backtracking.token_id_rate(reply.ids, keyword_ids),
        "sentences": len(sentences),
        "keyword_sentences": sum(section.label == "backtracking" for section in sentences),
        "judged_sentences": len(backtracks),
        "judged_backtracking": sum(backtracks),
        "tokens": len(reply.ids),
        "finish_reason": reply.finish_reason,
        "log_likelihood": log_likelihood,
        "repeated_2grams": backtracking.repeated_ngrams(text, 2),
        "repeated_3grams": backtracking.repeated_ngrams(text, 3),
        "compression": backtracking.compression_ratio(text),
    }


def _judged(sentences: Sequence[Section], judged: Annotation | None) -> list[bool]:
    """Of the sentences that the judge gave a label, whether it is backtracking; a failed judge gave none."""
    sections = judged.sections if judged else ()
    labels = [{s.label for s in sections if s.start < one.stop and one.start < s.stop} for one in sentences]
    return ["backtracking" in given for given in labels if given]


def by_cell(lines: Iterable[Line]) -> dict[Condition, list[Line]]:
    """Replies of each condition, in the order in which conditions first occur."""
    cells: dict[Condition, list[Line]] = {}
    for line in lines:
        cells.setdefault(Condition.of(line), []).append(line)
    return cells


def _condition(members: Sequence[Line]) -> dict[str, Any]:
    """The columns that replies of one condition share."""
    return {name: members[0][name] for name in _OF_CONDITION}


def effects(lines: Sequence[Line]) -> Table:
    """Rate of every problem under every condition, and its difference from the unsteered model on the same problem.

    Returns:
      A line per condition and problem: the condition, with `unit` and `span`; `problem_id`, `rate`, `unsteered`,
      `effect`; replies to a problem are pooled. Empty where the unsteered model was not sampled.
    """
    cells = by_cell(lines)
    rates = {cell: {name: _rate(*sums) for name, sums in _by_problem(of).items()} for cell, of in cells.items()}
    plain = {cell.target: found for cell, found in rates.items() if cell.kind == UNSTEERED}
    return [
        _condition(members)
        | {"problem_id": problem, "rate": rate, "unsteered": plain[cell.target][problem]}
        | {"effect": rate - plain[cell.target][problem]}
        for cell, members in cells.items()
        if cell.kind != UNSTEERED and cell.target in plain
        for problem, rate in rates[cell].items()
        if problem in plain[cell.target]
    ]


def contrast(
    lines: Sequence[Line], factors: Mapping[Condition, float], *, level: float = 0.95
) -> tuple[float, tuple[float, float]]:
    """A sum of factors times the rates of conditions, over the problems that all of them have.

        contrast(lines, {with_the_vector: 1, with_noise: -1})

    Args:
      lines: of replies.csv.
      factors: condition -> factor.
      level: coverage of the interval.

    Returns:
      The value, in the unit of the rate, and its interval (`statistics.paired_interval`).

    Raises:
      ValueError: a condition without replies, or no problem that all conditions have.
    """
    counts = shared(by_cell(lines), list(factors))
    if not counts.problems:
        raise ValueError("no problem was asked under all of these conditions")
    weights = np.array(list(factors.values()))
    interval = paired_interval(counts.hits, counts.words, weights, level=level)
    return float(weights @ counts.rates), interval


class Counts(NamedTuple):
    """What conditions count over the problems that all of them have.

    Attributes:
      problems: P ids, sorted.
      hits: [C, P], summed over the replies to a problem.
      words: [C, P].
    """

    problems: list[str]
    hits: np.ndarray
    words: np.ndarray

    @property
    def rates(self) -> np.ndarray:
        """Pooled rates, [C]; 0 without a word."""
        return np.array([_rate(*sums) for sums in zip(self.hits.sum(1), self.words.sum(1), strict=True)])


def shared(cells: Mapping[Condition, Sequence[Line]], conditions: Sequence[Condition]) -> Counts:
    """Hits and words of some conditions, problem by problem.

    Args:
      cells: replies of each condition, see `by_cell`.
      conditions: C of them.

    Raises:
      ValueError: a condition without replies.
    """
    if absent := [cell for cell in conditions if cell not in cells]:
        raise ValueError(f"no reply was sampled under {absent[0].name}")
    sums = [_by_problem(cells[cell]) for cell in conditions]
    problems = sorted(set.intersection(*map(set, sums)))
    hits, words = (
        np.array([[of[name][i] for name in problems] for of in sums], float).reshape(len(sums), -1) for i in range(2)
    )
    return Counts(problems, hits, words)


def _by_problem(members: Iterable[Line]) -> dict[str, tuple[int, int]]:
    """Problem -> hits and words of the replies to it."""
    sums: dict[str, tuple[int, int]] = {}
    for line in members:
        hits, words = sums.get(line["problem_id"], (0, 0))
        sums[line["problem_id"]] = hits + line["hits"], words + line["words"]
    return sums


def _rate(hits: float, words: float, empty: float = 0.0) -> float:
    return float(hits / words) if words else empty


def summarise(lines: Sequence[Line]) -> Table:
    """One line per condition.

    Returns:
      The condition, with `unit`, `span`; `rate` (Eq. 1, pooled over replies); `mean_rate` and `std_rate` of the single
      replies (the paper's bars); the variants `substring_rate`, `token_rate`, `sentence_rate`, pooled too, and
      `judge_rate`, the share of sentences that the other judge calls backtracking, of the `n_judged` replies that it
      labelled (NaN if none); counts; the coherence, as means over replies; and `effect`, the pooled rate less that of
      the unsteered model on the problems that both have. `low` and `high` are the ends of the 95 % interval over
      problems of `rate`; those of another measure begin with its name, as in `effect_low`. They are those of
      `statistics`: `rate_interval`, `mean_interval`, and of the effect `paired_interval`.
    """
    cells = by_cell(lines)
    plain = {cell.target: cell for cell in cells if cell.kind == UNSTEERED}
    return [
        _condition(members) | _summary(members) | _effect(cells, cell, plain.get(cell.target))
        for cell, members in cells.items()
    ]


def _summary(members: Sequence[Line]) -> dict[str, Any]:
    names, group = np.unique([line["problem_id"] for line in members], return_inverse=True)

    def column(name: str) -> np.ndarray:
        return np.array([line[name] for line in members], float)

    def ratio(name: str, above: np.ndarray, below: np.ndarray, empty: float = 0.0) -> dict[str, float]:
        """Sum over sum, with its interval over problems."""
        low, high = rate_interval(np.bincount(group, above), np.bincount(group, below))
        return {name: _rate(above.sum(), below.sum(), empty), f"{name}_low": low, f"{name}_high": high}

    def mean(name: str) -> dict[str, float]:
        """Over replies that have a value, with its interval over problems that have one."""
        values = column(name)
        measured = np.isfinite(values)
        sums, counts = np.bincount(group, np.where(measured, values, 0.0)), np.bincount(group, measured)
        low, high = mean_interval(sums[counts > 0], counts[counts > 0])
        return {name: _rate(sums.sum(), counts.sum(), NAN), f"{name}_low": low, f"{name}_high": high}

    hits, words, tokens = column("hits"), column("words"), column("tokens")
    rate = ratio("rate", hits, words)
    rates = np.divide(hits, words, out=np.zeros(len(members)), where=words > 0)
    judged = column("judged_backtracking"), column("judged_sentences")
    return {
        "rate": rate["rate"],
        "low": rate["rate_low"],
        "high": rate["rate_high"],
        "mean_rate": float(rates.mean()),
        "std_rate": float(rates.std()),
        **ratio("substring_rate", column("substring_hits"), column("substring_words")),
        **ratio("token_rate", np.rint(tokens * column("token_rate")), tokens),
        **ratio("sentence_rate", column("keyword_sentences"), column("sentences")),
        **ratio("judge_rate", *judged, empty=NAN),
        "n_replies": len(members),
        "n_problems": len(names),
        "n_judged": int((judged[1] > 0).sum()),
        "n_hits": int(hits.sum()),
        "n_words": int(words.sum()),
        **mean("log_likelihood"),
        **mean("repeated_2grams"),
        **mean("repeated_3grams"),
        **mean("compression"),
    }


def _effect(cells: Mapping[Condition, Sequence[Line]], cell: Condition, plain: Condition | None) -> dict[str, float]:
    if plain is None or cell == plain or not (counts := shared(cells, [cell, plain])).problems:
        return dict.fromkeys(("effect", "effect_low", "effect_high"), NAN)
    low, high = paired_interval(counts.hits, counts.words, [1, -1])
    return {"effect": float(counts.rates @ [1, -1]), "effect_low": low, "effect_high": high}
