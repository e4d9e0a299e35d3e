"""Measures of steered replies: one line per reply, one per condition, and the effect on every problem."""

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from backtrack_jax.analysis import backtracking
from backtrack_jax.analysis.statistics import NAN, bootstrap_interval, contrast_interval
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
) -> dict[str, Any]:
    """What one reply looks like.

    Args:
      reply: the reply.
      prompt: the prompt as text, for the released counter.
      keyword_ids: ids of tokens that are a keyword of Eq. 1.
      log_likelihood: mean log-likelihood per token under the unsteered model, in nats.
      judged: labels of the reply by another judge than the keywords, if one was asked.

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
    sentences = keyword.annotate(reply.trace()).sections
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
    lines: Sequence[Line], factors: Mapping[Condition, float], *, seed: int = 0
) -> tuple[float, tuple[float, float]]:
    """A sum of factors times the rates of conditions, over the problems that all of them have.

        contrast(lines, {with_the_vector: 1, with_noise: -1})

    Args:
      lines: of replies.csv.
      factors: condition -> factor.
      seed: of the bootstrap.

    Returns:
      The value, in the unit of the rate, and its 95 % bootstrap interval over problems, in which all conditions have
      the same ones.

    Raises:
      ValueError: a condition without replies, or no problem that all conditions have.
    """
    cells = by_cell(lines)
    if absent := [cell for cell in factors if cell not in cells]:
        raise ValueError(f"no reply was sampled under {absent[0].name}")
    of_cell = [(factor, _by_problem(cells[cell])) for cell, factor in factors.items()]
    shared = sorted(set.intersection(*(set(found) for _, found in of_cell)))
    if not shared:
        raise ValueError("no problem was asked under all of these conditions")
    counted = [(factor, np.array([found[name] for name in shared], float).T) for factor, found in of_cell]
    value = sum(factor * _rate(hits.sum(), words.sum()) for factor, (hits, words) in counted)
    return value, contrast_interval([(factor, hits, words) for factor, (hits, words) in counted], seed=seed)


def _by_problem(members: Iterable[Line]) -> dict[str, tuple[int, int]]:
    """Problem -> hits and words of the replies to it."""
    sums: dict[str, tuple[int, int]] = {}
    for line in members:
        hits, words = sums.get(line["problem_id"], (0, 0))
        sums[line["problem_id"]] = hits + line["hits"], words + line["words"]
    return sums


def _rate(hits: float, words: float) -> float:
    return float(hits / words) if words else 0.0


def summarise(lines: Sequence[Line], *, seed: int = 0) -> Table:
    """One line per condition.

    Returns:
      The condition, with `unit`, `span`; `rate` (Eq. 1, pooled over replies); `mean_rate` and `std_rate` of the single
      replies (the paper's bars); the variants `substring_rate`, `token_rate`, `sentence_rate`, and `judge_rate`, the
      share of sentences that the other judge calls backtracking, of the `n_judged` replies that it labelled (NaN if
      none); counts; the coherence, as means over replies; `effect` (mean over problems of the difference from the
      unsteered model), and `share_lowered`, the problems on which the condition lowered the rate. `low` and `high` are
      the ends of the 95 % bootstrap interval over problems of `rate`; those of another measure begin with its name, as
      in `effect_low`.
    """
    changed = by_cell(effects(lines))
    return [
        _condition(members) | _summary(members, seed) | _effect(changed.get(cell, []), seed)
        for cell, members in by_cell(lines).items()
    ]


def _summary(members: Sequence[Line], seed: int) -> dict[str, Any]:
    names, group = np.unique([line["problem_id"] for line in members], return_inverse=True)

    def column(name: str) -> np.ndarray:
        return np.array([line[name] for line in members], float)

    def ratio(name: str, above: np.ndarray, below: np.ndarray, empty: float = 0.0) -> dict[str, float]:
        """Sum over sum, with its interval over problems; if `empty` is NaN, over problems that have a value."""
        if not below.any():
            return {name: empty, f"{name}_low": NAN, f"{name}_high": NAN}
        sums = np.bincount(group, above), np.bincount(group, below)
        counted = sums[1] > 0 if np.isnan(empty) else np.ones(len(names), bool)
        low, high = bootstrap_interval(sums[0][counted], sums[1][counted], seed=seed)
        return {name: float(above.sum() / below.sum()), f"{name}_low": low, f"{name}_high": high}

    def mean(name: str) -> dict[str, float]:
        values = column(name)
        measured = np.isfinite(values)
        return ratio(name, np.where(measured, values, 0.0), measured.astype(float), NAN)

    hits, words = column("hits"), column("words")
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
        **mean("token_rate"),
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


def _effect(members: Sequence[Line], seed: int) -> dict[str, float]:
    if not members:
        return dict.fromkeys(("effect", "effect_low", "effect_high", "share_lowered"), NAN)
    values = np.array([line["effect"] for line in members])
    low, high = bootstrap_interval(values, np.ones(len(values)), seed=seed)
    lowered = float(np.mean(values < 0))
    return {"effect": float(values.mean()), "effect_low": low, "effect_high": high, "share_lowered": lowered}
