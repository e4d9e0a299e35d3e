"""Statistics of the question of noise, of numbers alone: contrasts, slopes within texts, shares, hazards.

The unit is the problem. Draws of one text's noise are averaged before anything is compared over problems.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, stats

from backtrack_jax.analysis import statistics
from backtrack_jax.analysis.log_odds import interval
from backtrack_jax.analysis.statistics import NAN
from backtrack_jax.files.tables import Table

LAGS = ((0, 8), (8, 16), (16, 32), (32, 65))
"""Half-open ranges of lags behind a burst."""


def equivalence_p(values: ArrayLike, margin: float) -> float:
    """Two one-sided t tests: p of the hypothesis that the mean lies outside of -margin to margin; NaN below two values.

    Schuirmann, Journal of Pharmacokinetics and Biopharmaceutics 15 (1987).
    """
    values = np.asarray(values, np.float64)
    if len(values) < 2:
        return NAN
    error, df = float(stats.sem(values)), len(values) - 1
    above, below = (values.mean() + margin) / error, (margin - values.mean()) / error
    return float(stats.t.sf(min(above, below), df))


def difference_p(values: ArrayLike) -> float:
    """Two-sided p of the t test of mean 0; NaN below two values."""
    values = np.asarray(values, np.float64)
    return float(2 * stats.t.sf(abs(values.mean() / stats.sem(values)), len(values) - 1)) if len(values) > 1 else NAN


def crossed_interval(values: ArrayLike, level: float = 0.95) -> tuple[float, float, float]:
    """Mean over problems and frozen seeds, both drawn: lower and upper end, and p of mean 0.

    The variance is the sum of those of the means of problems and of the means of seeds; what they share is counted
    twice, so that the interval is rather too wide. Degrees of freedom are those of the factor with fewer levels.

    Args:
      values: [P, S], one of each seed on each problem.
      level: coverage.
    """
    values = np.asarray(values, np.float64)
    if min(values.shape) < 2:
        return NAN, NAN, NAN
    by_problem, by_seed = values.mean(1), values.mean(0)
    error = math.sqrt(by_problem.var(ddof=1) / len(by_problem) + by_seed.var(ddof=1) / len(by_seed))
    df, mean = min(values.shape) - 1, float(values.mean())
    half = float(stats.t.isf((1 - level) / 2, df)) * error
    return mean - half, mean + half, float(2 * stats.t.sf(abs(mean) / error, df)) if error else NAN


def interval_p(ends: Callable[[float], tuple[float, float]]) -> float:
    """The p of 0 of a family of intervals: 1 less the coverage of the one that ends at 0; NaN where there is none."""
    if math.isnan(ends(0.5)[0]):
        return NAN

    def margin(p: float) -> float:
        low, high = ends(1 - p)
        return max(low, -high)  # above 0 where 0 lies outside

    least, most = 1e-9, 1 - 1e-9
    if margin(least) > 0:
        return least
    return float(optimize.root_scalar(margin, bracket=(least, most)).root) if margin(most) > 0 else 1.0


def within(x: ArrayLike, y: ArrayLike) -> tuple[float, float, float]:
    """Sums of squares and products of a text's draws about their means at each place: xx, xy, yy.

    What differs between texts, or between sentences of one, cancels: a slope of sums of these is of draws alone.

    Args:
      x: [draws, places].
      y: [draws, places].
    """
    u, v = (of - of.mean(0) for of in (np.asarray(x, np.float64), np.asarray(y, np.float64)))
    return float(np.sum(u * u)), float(np.sum(u * v)), float(np.sum(v * v))


def slope(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Slope of pooled sums of `within`, its 95 % interval over problems (Fieller), p, and squared correlation."""
    xx, xy, yy = (np.array([line[name] for line in lines], np.float64) for name in ("xx", "xy", "yy"))
    if len(lines) < 2 or not xx.sum():
        return {"slope": NAN, "low": NAN, "high": NAN, "p": NAN, "explained": NAN}
    low, high = statistics.mean_ratio_interval(xy, xx)
    explained = xy.sum() ** 2 / (xx.sum() * yy.sum()) if yy.sum() else NAN
    return {
        "slope": float(xy.sum() / xx.sum()),
        "low": low,
        "high": high,
        "p": difference_p(xy),
        "explained": float(explained),
    }


def mediated(clean: ArrayLike, added: ArrayLike, inserted: ArrayLike, removed: ArrayLike) -> np.ndarray:
    """What passes through the mediator of each problem, and the whole effect, [P, 2].

    The first is the mean of what the mediator does alone (inserted - clean) and of what is lost without it
    (added - removed): where they differ, the mediator and the rest interact, and this halves the interaction.

    Args:
      clean: [P] outcome without the cause.
      added: [P] outcome with it.
      inserted: [P] without it, but with the mediator of the run with it.
      removed: [P] with it, but with the mediator of the run without it.
    """
    none, whole, alone, without = (np.asarray(of, np.float64) for of in (clean, added, inserted, removed))
    return np.stack([(alone - none + whole - without) / 2, whole - none], axis=-1)


def first_after(positions: Sequence[int], begin: int, length: int) -> list[tuple[int, int]]:
    """Hits and tokens at risk of the first keyword in each range of `LAGS`.

    Args:
      positions: of the keywords in a reply, in tokens, rising.
      begin: position of lag 0.
      length: tokens of the reply.
    """
    first = next((at for at in positions if at >= begin), math.inf)
    found = []
    for low, high in LAGS:
        start, stop = begin + low, min(begin + high, length)
        last = min(stop, first + 1)
        found.append((int(start <= first < stop), int(max(0, last - start))))
    return found


def contrast(
    explanation: str,
    name: str,
    values: Mapping[str, float],
    *,
    unit: str = "nats",
    margin: float = NAN,
) -> dict[str, Any]:
    """A line of the table of contrasts: mean, 95 % interval and p; with a margin, by equivalence."""
    of = np.array(list(values.values()), np.float64)
    low, high = interval(of) if len(of) > 1 else (NAN, NAN)
    equivalence = math.isfinite(margin)
    return {
        "explanation": explanation,
        "contrast": name,
        "estimate": float(of.mean()) if len(of) else NAN,
        "low": low,
        "high": high,
        "unit": unit,
        "test": f"equivalence within {margin:g}" if equivalence else "difference",
        "p": equivalence_p(of, margin) if equivalence else difference_p(of),
        "problems": len(of),
    }


def with_holm(lines: Table, primary: str) -> Table:
    """The lines with `p_holm`, over all but the primary contrast, which was named in advance and keeps its p."""
    others = [line for line in lines if line["contrast"] != primary]
    adjusted = {id(line): p for line, p in zip(others, statistics.holm([line["p"] for line in others]), strict=True)}
    return [line | {"p_holm": adjusted.get(id(line), line["p"])} for line in lines]
