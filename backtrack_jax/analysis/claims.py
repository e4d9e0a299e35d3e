"""What a run says of one claim of the paper: a number, its interval, and whether that settles the claim."""

import dataclasses
import math

from backtrack_jax.analysis.statistics import FEWEST_PROBLEMS, Region, detectable, verdict


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim with its verdict.

    Attributes:
      name: short key, e.g. `comparable`.
      title: one plain sentence, what the paper claims.
      figure: name of the plot that it stands beside; empty if there is none.
      where: section or figure of the paper.
      rule: what was measured, and the region in which the claim holds, in words with its numbers.
      estimate: the number.
      low: lower end of its 92 % interval over problems.
      high: upper end.
      unit: of the three.
      verdict: "holds", "fails" or "undecided".
      detectable: what lies this far from a bound of the region would have been told from it; NaN if not defined.
      n: number of problems.
      note: settings that differ, controls, why it is undecided.
    """

    name: str
    title: str
    figure: str
    where: str
    rule: str
    estimate: float
    low: float
    high: float
    unit: str
    verdict: str
    detectable: float
    n: int
    note: str = ""


def measured(
    name: str,
    title: str,
    *,
    figure: str,
    where: str,
    rule: str,
    estimate: float,
    interval: tuple[float, float],
    unit: str,
    region: Region,
    n: int,
    note: str = "",
    given: str = "",
) -> Claim:
    """A claim, decided by its interval.

    Takes the fields of `Claim` that are not decided here, and:

    Args:
      interval: of 92 %.
      region: where the number lies if the claim is true.
      given: the verdict, where more than this interval decides; it is "undecided" all the same with too few problems.
    """
    low, high = interval
    found = verdict(low, high, region, n)
    if given:
        found = given if n >= FEWEST_PROBLEMS else "undecided"
    notes = [note] if note else []
    if n < FEWEST_PROBLEMS:
        notes.append(f"undecided on {n} problems, at least {FEWEST_PROBLEMS} are needed")
    width = detectable(low, high)
    return Claim(name, title, figure, where, rule, estimate, low, high, unit, found, width, n, "; ".join(notes))


def number(value: float) -> str:
    """Three digits; `-` where it is not defined."""
    return "-" if math.isnan(value) else f"{value:.3g}"


def all_of(verdicts: list[str]) -> str:
    """The verdict on a claim of several parts: it fails if one does, and holds if all do."""
    if "fails" in verdicts:
        return "fails"
    return "holds" if verdicts and set(verdicts) == {"holds"} else "undecided"
