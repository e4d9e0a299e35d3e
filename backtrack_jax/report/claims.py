"""The paper's claims with their verdicts: as a table for summary and page, and as `claims.json`."""

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

from backtrack_jax.analysis import dose
from backtrack_jax.analysis.base import Analysis, asked
from backtrack_jax.analysis.claims import Claim, number
from backtrack_jax.analysis.results import Results
from backtrack_jax.analysis.statistics import FEWEST_PROBLEMS
from backtrack_jax.report.reference import settings

_IN_WORDS = {"holds": "hold", "fails": "fail", "undecided": "undecided"}


def claims(r: Results, analyses: Sequence[Analysis]) -> list[Claim]:
    """Every claim that the run can say something about, in the order of the analyses."""
    return [claim for analysis in asked(analyses, r.experiment) for claim in analysis.claims(r)]


def table(found: Sequence[Claim]) -> list[dict[str, str]]:
    """Rows of `claim`, `where`, `verdict`, `estimate`, `rule`, `seen`, `n`, `note`, `figure`."""
    return [
        {
            "claim": claim.title,
            "where": claim.where,
            "verdict": claim.verdict,
            "estimate": _estimate(claim),
            "rule": claim.rule,
            "seen": number(claim.detectable),
            "n": str(claim.n),
            "note": claim.note,
            "figure": claim.figure,
        }
        for claim in found
    ]


def columns(found: Sequence[Claim]) -> list[dict[str, str]]:
    """`table` with the headings of summary.md."""
    heads = {"claim": "claim", "where": "where", "verdict": "verdict", "estimate": "measured (92 % interval)"}
    heads |= {"rule": "holds if", "seen": "could be seen", "n": "problems", "note": "note"}
    return [{head: row[name] or "-" for name, head in heads.items()} for row in table(found)]


def as_json(r: Results, found: Sequence[Claim]) -> str:
    """claims.json: the verdicts with all their numbers, and the settings in which the run differs from the paper."""
    differing = [row for row in settings(r) if row["same"] != "yes"]
    lines = [{name: _json(value) for name, value in dataclasses.asdict(claim).items()} for claim in found]
    return json.dumps({"claims": lines, "settings that differ": differing}, indent=1, ensure_ascii=False) + "\n"


def tally(found: Sequence[Claim]) -> str:
    """How many claims hold, fail and are undecided, and how that is decided."""
    counts = {verdict: sum(claim.verdict == verdict for claim in found) for verdict in _IN_WORDS}
    head = ", ".join(f"{counts[verdict]} {text}" for verdict, text in _IN_WORDS.items())
    decided = (
        f"A claim holds if the {100 * dose.LEVEL:g} % interval over problems lies inside the region of its rule, fails "
        f"if it lies wholly outside, and is undecided otherwise, as with fewer than {FEWEST_PROBLEMS} problems."
    )
    seen = 'The column "could be seen" says how far from a bound of the region a number must lie to be told from it.'
    return f"{len(found)} claims: {head}. {decided} {seen} {dose.DEFINITION}"


def _estimate(claim: Claim) -> str:
    if math.isnan(claim.estimate):
        return "not measured"
    return f"{number(claim.estimate)} ({number(claim.low)} to {number(claim.high)}) {claim.unit}".rstrip()


def _json(value: Any) -> Any:
    """Numbers that JSON does not have as null, or as text where they are ends of an interval without a bound."""
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value
