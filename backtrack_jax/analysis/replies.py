"""Measures of steered replies: one row per reply, one per condition, and the effect on every problem."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from backtrack_jax.analysis import backtracking
from backtrack_jax.data.records import UNSTEERED, Annotation, Section, Trace
from backtrack_jax.judges import keyword

CELL = ("target", "kind", "source", "layer", "window", "magnitude", "length", "unit", "span")
"""Columns that tell one condition from another."""

Row = Mapping[str, Any]


def measure(
    trace: Trace,
    line: Row,
    prompt: str,
    keyword_ids: Collection[int],
    log_likelihood: float,
    judged: Annotation | None = None,
) -> dict[str, Any]:
    """What one reply looks like.

    Args:
      trace: the reply, from `agreement.reply_traces`.
      line: of generations.jsonl.
      prompt: the prompt as text, for the released counter.
      keyword_ids: ids of tokens that are a keyword of Eq. 1.
      log_likelihood: mean log-likelihood per token under the unsteered model, in nats.
      judged: labels of the reply by another judge than the keywords, if one was asked.

    Returns:
      The cell's columns, `problem_id`, `category`, `sample`; `hits` and `words` (Eq. 1), the same over prompt and reply
      by substring (`substring_hits`, `substring_words`), `token_rate` (share of tokens that are a keyword),
      `sentences` and `keyword_sentences` (those the keyword judge calls backtracking), `judged_sentences` and
      `judged_backtracking` (sentences that the other judge labelled, and called backtracking), `tokens`,
      `finish_reason`, and the coherence: `log_likelihood`, `repeated_2grams`, `repeated_3grams`, `compression`.
    """
    text = line["text"]
    words = backtracking.count_keywords(text)
    substring = backtracking.count_keywords(text, variant="substring", prompt=prompt)
    sentences = keyword.annotate(trace).sections
    backtracks = _judged(sentences, judged)
    return {
        **{name: line[name] for name in (*CELL, "problem_id", "category", "sample")},
        "hits": words.hits,
        "words": words.words,
        "substring_hits": substring.hits,
        "substring_words": substring.words,
        "token_rate": backtracking.token_id_rate(line["ids"], keyword_ids),
        "sentences": len(sentences),
        "keyword_sentences": sum(section.label == "backtracking" for section in sentences),
        "judged_sentences": len(backtracks),
        "judged_backtracking": sum(backtracks),
        "tokens": len(line["ids"]),
        "finish_reason": line["finish_reason"],
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


def by_cell(rows: Iterable[Row]) -> dict[tuple[Any, ...], list[Row]]:
    """Rows of each condition, in the order in which conditions first occur."""
    cells: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        cells.setdefault(tuple(row[name] for name in CELL), []).append(row)
    return cells


def effects(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rate of every problem under every condition, and its difference from the unsteered model on the same problem.

    Returns:
      One row per condition and problem: the cell's columns, `problem_id`, `rate`, `unsteered`, `effect`; replies to a
      problem are pooled. Empty where the unsteered model was not sampled.
    """
    plain = {
        cell[0]: {problem: rate for problem, (rate, _) in _by_problem(members).items()}
        for cell, members in by_cell(rows).items()
        if cell[1] == UNSTEERED
    }
    return [
        dict(zip(CELL, cell, strict=True))
        | {"problem_id": problem, "rate": rate, "unsteered": plain[cell[0]][problem]}
        | {"effect": rate - plain[cell[0]][problem]}
        for cell, members in by_cell(rows).items()
        if cell[1] != UNSTEERED and cell[0] in plain
        for problem, (rate, _) in _by_problem(members).items()
        if problem in plain[cell[0]]
    ]


def _by_problem(members: Iterable[Row]) -> dict[str, tuple[float, int]]:
    """Problem -> its pooled rate and words."""
    sums: dict[str, list[int]] = {}
    for row in members:
        total = sums.setdefault(row["problem_id"], [0, 0])
        total[0] += row["hits"]
        total[1] += row["words"]
    return {problem: (hits / words if words else 0.0, words) for problem, (hits, words) in sums.items()}


def summarise(rows: Sequence[Row], *, seed: int = 0) -> list[dict[str, Any]]:
    """One row per condition.

    Returns:
      The cell's columns; `rate` (Eq. 1, pooled over replies); `mean_rate` and `std_rate` of the single replies (the
      paper's bars); the variants `substring_rate`, `token_rate`, `sentence_rate`, and `judge_rate`, the share of
      sentences that the other judge calls backtracking, of the `n_judged` replies that it labelled (NaN if none);
      counts; the coherence, as means over replies; `effect` (mean over problems of the difference from the unsteered
      model), and `share_lowered`, the problems on which the condition lowered the rate. `low` and `high` are the ends
      of the 95 % bootstrap interval over problems of `rate`; those of another measure begin with its name, as in
      `effect_low`.
    """
    changed = by_cell(effects(rows))
    return [
        dict(zip(CELL, cell, strict=True)) | _summary(members, seed) | _effect(changed.get(cell, []), seed)
        for cell, members in by_cell(rows).items()
    ]


def _summary(members: Sequence[Row], seed: int) -> dict[str, Any]:
    names, group = np.unique([row["problem_id"] for row in members], return_inverse=True)

    def column(name: str) -> np.ndarray:
        return np.array([row[name] for row in members], float)

    def ratio(name: str, above: np.ndarray, below: np.ndarray, empty: float = 0.0) -> dict[str, float]:
        """Sum over sum, with its interval over problems; over those alone that count, where none would give NaN."""
        if not below.any():
            return {name: empty, f"{name}_low": float("nan"), f"{name}_high": float("nan")}
        sums = np.bincount(group, above), np.bincount(group, below)
        counted = sums[1] > 0 if np.isnan(empty) else np.ones(len(names), bool)
        low, high = backtracking.bootstrap_interval(sums[0][counted], sums[1][counted], seed=seed)
        return {name: float(above.sum() / below.sum()), f"{name}_low": low, f"{name}_high": high}

    def mean(name: str) -> dict[str, float]:
        values = column(name)
        measured = np.isfinite(values)
        return ratio(name, np.where(measured, values, 0.0), measured.astype(float), float("nan"))

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
        **ratio("judge_rate", *judged, empty=float("nan")),
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


def _effect(members: Sequence[Row], seed: int) -> dict[str, float]:
    if not members:
        return dict.fromkeys(("effect", "effect_low", "effect_high", "share_lowered"), float("nan"))
    values = np.array([row["effect"] for row in members])
    low, high = backtracking.bootstrap_interval(values, np.ones(len(values)), seed=seed)
    lowered = float(np.mean(values < 0))
    return {"effect": float(values.mean()), "effect_low": low, "effect_high": high, "share_lowered": lowered}
