"""The run in a few sentences, each built from its numbers, and as a Markdown file."""

from collections.abc import Sequence

from backtrack_jax.analysis.base import Analysis, asked
from backtrack_jax.analysis.cells import interval
from backtrack_jax.analysis.results import Cell, Results
from backtrack_jax.data.records import UNSTEERED
from backtrack_jax.kinds import parse
from backtrack_jax.report import claims
from backtrack_jax.report.reference import comparison, settings


def sentences(r: Results, analyses: Sequence[Analysis]) -> list[str]:
    """What came out, one finding a sentence; what was not measured is not mentioned."""
    return [text for analysis in asked(analyses, r.experiment) for text in analysis.sentences(r) if text]


def markdown(r: Results, analyses: Sequence[Analysis]) -> str:
    """summary.md: the sentences, the paper beside this run, sections and windows, and every cell."""
    lines = [f"# {r.experiment.name}", "", *(f"- {text}" for text in sentences(r, analyses))]
    found = claims.claims(r, analyses)
    if found:
        lines += ["", "## Claims", "", claims.tally(found), "", *_table(claims.columns(found))]
    lines += ["", "## Paper and this run", "", *_table(comparison(r, analyses))]
    lines += ["", "Settings (a `no` says that a number need not agree):", "", *_table(settings(r))]
    lines += ["", "## Sections", "", "```", r.annotations.strip(), "```", "", "## Vectors", ""]
    for role in r.roles:
        windows = r.vectors[role]["windows"]
        counts = ", ".join(f"{label} {n['read']} ({n['dropped']} dropped)" for label, n in windows.items())
        norm = f"mean residual norm at layer {r.layer}: {r.mean_norm(role, r.layer):.4g}"
        lines.append(f"- {role} model: windows read: {counts}; {norm}")
    lines += ["", "## Steering", "", _explain(r), "", *_table(_cells(r.tables["rates"]))]
    return "\n".join(lines) + "\n"


def _explain(r: Results) -> str:
    s = r.experiment.steering
    return (
        f"Span `{s.span}`; magnitude in unit `{s.unit}`. Rate: share of words in {{wait, hmm}} (Eq. 1), with a 95 % "
        "interval over problems (Clopper-Pearson at the effective sample size). Log-likelihood: mean per token under "
        "the unsteered model, nats. Repetition: mean share of repeated 3-grams."
    )


def _cells(rates: Sequence[Cell]) -> list[dict[str, str]]:
    return [
        {
            "model": cell["target"],
            "added": cell["kind"],
            "source": cell["source"] or "-",
            "layer": "-" if cell["kind"] == UNSTEERED else str(cell["layer"]),
            "window": cell["window"] or "-",
            "magnitude": f"{cell['magnitude']:g}",
            "norm added": f"{cell['length']:.3g}" if parse(cell["kind"]).what.strength == "length" else "-",
            "rate %": f"{100 * cell['rate']:.2f}",
            "interval %": interval(cell) or "-",
            "log-likelihood": f"{cell['log_likelihood']:.2f}",
            "repetition": f"{cell['repeated_3grams']:.2f}",
            "words": str(cell["n_words"]),
            "replies": str(cell["n_replies"]),
        }
        for cell in rates
    ]


def _table(rows: list[dict[str, str]]) -> list[str]:
    """Rows as a Markdown table."""
    clean = [[text.replace("|", "\\|").replace("\n", " ") for text in row.values()] for row in rows]
    return [f"| {' | '.join(texts)} |" for texts in [list(rows[0]), ["---"] * len(rows[0]), *clean]]
