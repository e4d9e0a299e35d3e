"""The run in a few sentences, each built from its numbers, and as a Markdown file."""

import math
from typing import Any

from backtrack_jax.data.records import UNSTEERED
from backtrack_jax.report.figures import TOO_NARROW
from backtrack_jax.report.reference import LABEL, comparison, highest, interval, on_fewer, percent, settings
from backtrack_jax.report.results import Results, Rows


def sentences(r: Results) -> list[str]:
    """What came out, one finding a sentence; what was not measured is not mentioned."""
    return [
        text
        for text in (*_steering(r), _baselines(r), _judged(r), _coherence(r), _cosine(r), _probe(r), _dropped(r))
        if text
    ]


def _steering(r: Results) -> list[str]:
    label, author, plain = r.experiment.vectors.label, r.author, r.unsteered(r.author)
    found, texts, reached = {source: highest(r.cells(author, label, source)) for source in r.roles}, [], []
    for source, best in found.items():
        if best:
            before, cell = r.beside_unsteered(best)
            text = f"{percent(cell)} % at magnitude {cell['magnitude']:g} with the {source}-derived {label} vector"
            if before and cell["n_problems"] < r.n_problems:
                text += f" (on {cell['n_problems']} problems, and {percent(before)} % unsteered on these)"
            reached.append(text)
    if reached and plain:
        texts.append(
            f"Unsteered, the {author} model says wait or hmm in {percent(plain)} % of its words{on_fewer(r, plain)}."
        )
    if reached:
        says = "it says so" if plain else f"the {author} model says wait or hmm"
        texts.append(f"Steered, {says} in up to {', and '.join(reached)} (in brackets 95 % intervals over problems).")
    if author != "base" and "base" in r.roles:
        base = highest([cell for source in r.roles for cell in r.cells("base", label, source)])
        if base:
            texts.append(f"The base model reached at most {percent(base)} % with either vector.")
    return texts


def _baselines(r: Results) -> str:
    label, author, s = r.experiment.vectors.label, r.author, r.experiment.steering
    others = [kind for kind in s.all_kinds if kind != label]
    directions = f"{len(others)} other direction{'s' * (len(others) > 1)}"
    directions += "" if s.unit == "raw" and s.vector_files else " of equal norm"
    tried = [cell for kind in others for source in (author, "") for cell in r.cells(author, kind, source)]
    best = highest(tried, either_way=True)
    if not best:
        return ""
    if not best["rate"]:
        return f"None of {directions} on the {author} model made it say so."
    return (
        f"Of {directions} on the {author} model, {best['kind']} reached most: "
        f"{percent(best)} % at magnitude {best['magnitude']:g}."
    )


def _highest(r: Results) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The unsteered cell of the model that writes the traces, and its highest one under the experiment's vectors.

    Both over the problems that both have; None if one of them was not sampled.
    """
    best = highest([c for source in r.roles for c in r.cells(r.author, r.experiment.vectors.label, source)])
    plain, best = r.beside_unsteered(best) if best else (None, None)
    return (plain, best) if plain and best else None


def _judged(r: Results) -> str:
    pair = _highest(r)
    if not pair or math.isnan(pair[1]["judge_rate"]):
        return ""
    plain, best = pair
    rates = [f"{100 * cell['judge_rate']:.0f} %" for cell in (best, plain)]
    return (
        f"At the highest rate of these vectors the judge ({r.experiment.analysis.judge}) calls {rates[0]} of the "
        f"sentences backtracking (unsteered {rates[1]}); it labelled {best['n_judged']} of {best['n_replies']} replies "
        f"(unsteered {plain['n_judged']} of {plain['n_replies']})."
    )


def _coherence(r: Results) -> str:
    pair = _highest(r)
    if not pair:
        return ""
    plain, best = pair
    return (
        "At the highest rate the replies' mean log-likelihood under the unsteered model is "
        f"{best['log_likelihood']:.2f} nats a token (unsteered {plain['log_likelihood']:.2f}), and "
        f"{100 * best['repeated_3grams']:.0f} % of their 3-grams are repeated (unsteered "
        f"{100 * plain['repeated_3grams']:.0f} %)."
    )


def _cosine(r: Results) -> str:
    key = (r.experiment.vectors.label, r.experiment.steering.main_layer)
    found = [row["cosine"] for row in r.tables["similarity"] if (row["label"], row["layer"]) == key]
    if not found or math.isnan(found[0]):
        return ""
    paper = " (paper: 0.74)" if key[0] == LABEL else ""
    return f"Base- and reasoning-derived {key[0]} vectors have cosine {found[0]:.3f} at layer {key[1]}{paper}."


def _probe(r: Results) -> str:
    layer = r.experiment.steering.main_layer
    rows = {row["method"]: row for row in r.tables["probe"] if (row["role"], row["layer"]) == (r.author, layer)}
    row = rows.get("base-derived direction") or rows.get(f"{r.author}-derived direction")
    if not row or math.isnan(row["auc"]):
        return ""
    other = rows.get("logistic regression")
    beside = ""
    if other and not math.isnan(other["auc"]):
        on = "the same" if other["n_tokens"] == row["n_tokens"] else f"{other['n_tokens']} of the {row['n_tokens']}"
        beside = f"; a logistic regression on {on} tokens has {other['auc']:.2f}"
    return (
        f"As a probe for what begins within {row['horizon']} tokens, the {row['method']} has a ROC-AUC of "
        f"{row['auc']:.2f} ({row['low']:.2f} to {row['high']:.2f}) at layer {layer}{beside}."
    )


def _dropped(r: Results) -> str:
    windows = r.vectors[r.author]["windows"]
    own, total = windows[r.experiment.vectors.label], windows["all"]
    leave = "leave the text or reach its BOS token" if r.experiment.vectors.into_prompt else "leave the reply"
    return (
        f"The {r.author}-derived vector rests on {own['read']} of {own['read'] + own['dropped']} windows "
        f"({total['dropped']} of all were dropped because they {leave})."
    )


def markdown(r: Results) -> str:
    """summary.md: the sentences, the paper beside this run, sections and windows, and every cell."""
    layer = r.experiment.steering.main_layer
    lines = [f"# {r.experiment.name}", "", *(f"- {text}" for text in sentences(r))]
    lines += ["", "## Paper and this run", "", *_table(comparison(r))]
    lines += ["", "Settings (a `no` says that a number need not agree):", "", *_table(settings(r))]
    lines += ["", "## Sections", "", "```", r.annotations.strip(), "```", "", "## Vectors", ""]
    for role in r.roles:
        windows = r.vectors[role]["windows"]
        counts = ", ".join(f"{label} {n['read']} ({n['dropped']} dropped)" for label, n in windows.items())
        norm = f"mean residual norm at layer {layer}: {r.mean_norm(role, layer):.4g}"
        lines.append(f"- {role} model: windows read: {counts}; {norm}")
    lines += ["", "## Steering", "", _explain(r), "", *_table(_cells(r.tables["rates"]))]
    return "\n".join(lines) + "\n"


def _explain(r: Results) -> str:
    s = r.experiment.steering
    return (
        f"Span `{s.span}`; magnitude in unit `{s.unit}`. Rate: share of words in {{wait, hmm}} (Eq. 1), with a 95 % "
        f"bootstrap interval over problems, {TOO_NARROW}. Where no word is one of them, the upper bound is 3 / words "
        "(rule of three). Log-likelihood: mean per token under the unsteered model, nats. Repetition: mean share of "
        "repeated 3-grams."
    )


def _cells(rates: Rows) -> list[dict[str, str]]:
    return [
        {
            "model": row["target"],
            "added": row["kind"],
            "source": row["source"] or "-",
            "layer": "-" if row["kind"] == UNSTEERED else str(row["layer"]),
            "window": row["window"] or "-",
            "magnitude": f"{row['magnitude']:g}",
            "norm added": f"{row['length']:.3g}",
            "rate %": f"{100 * row['rate']:.2f}",
            "interval %": interval(row) or "-",
            "log-likelihood": f"{row['log_likelihood']:.2f}",
            "repetition": f"{row['repeated_3grams']:.2f}",
            "words": str(row["n_words"]),
            "replies": str(row["n_replies"]),
        }
        for row in rates
    ]


def _table(rows: list[dict[str, str]]) -> list[str]:
    """Rows as a Markdown table."""
    clean = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row.values()] for row in rows]
    return [f"| {' | '.join(cells)} |" for cells in [list(rows[0]), ["---"] * len(rows[0]), *clean]]
