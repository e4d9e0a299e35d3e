"""The tables of the question of composition, from what was read on each text."""

from collections.abc import Mapping

import numpy as np

from backtrack_jax.analysis import interaction, statistics
from backtrack_jax.analysis.composition_rows import ALONE, GRID, NOTHING, RANDOM, SPAN
from backtrack_jax.analysis.log_odds import interval
from backtrack_jax.analysis.statistics import NAN
from backtrack_jax.data.records import UNSTEERED
from backtrack_jax.files.tables import Table

_LEAST = 0.1  # cosine with v, below which an effect per unit of projection says nothing

CLIPPED = 0.3
"""Share of keywords above which a saturating rate makes effects look less than additive."""

SCALES = {"log-odds": "log_odds", "probability": "share"}


def of_cell(lines: Table, direction: str, form: str, column: str = "log_odds") -> dict[str, float]:
    """Problem -> change from no direction."""
    plain = {line["problem_id"]: line[column] for line in lines if line["direction"] == UNSTEERED}
    own = {line["problem_id"]: line[column] for line in lines if (line["direction"], line["form"]) == (direction, form)}
    return {problem: value - plain[problem] for problem, value in own.items()}


def shares(above: Mapping[str, float], below: Mapping[str, float], level: float = 0.95) -> tuple[float, float, float]:
    """Ratio of mean changes with its interval (Fieller's)."""
    x, y = (np.array([of[problem] for problem in above if problem in below]) for of in (above, below))
    if len(x) < 1:
        return NAN, NAN, NAN
    return (float(x.mean() / y.mean()), *statistics.mean_ratio_interval(x, y, level=level))


def directions(lines: Table, label: str) -> Table:
    """Every direction: cosine with v, length, effect in nats and on the probability, share of v's effect.

    `per_projection` is the effect over the cosine: what it would be if only its part along v acted, that is v's.
    """
    own, found = of_cell(lines, label, ALONE), []
    for line in {(line["direction"], line["form"]): line for line in lines}.values():
        if line["direction"] == UNSTEERED:
            continue
        changes = of_cell(lines, line["direction"], line["form"])
        values = np.array(list(changes.values()))
        low, high = interval(values) if len(values) > 1 else (NAN, NAN)
        share, share_low, share_high = shares(changes, own)
        raw = np.mean(list(of_cell(lines, line["direction"], line["form"], "share").values()))
        along = line["cosine"] * line["length"]
        found.append(
            {name: line[name] for name in ("direction", "form", "cosine", "length")}
            | {"problems": len(values), "effect": float(values.mean()), "effect_low": low, "effect_high": high}
            | {"effect_probability": float(raw), "share": share, "share_low": share_low, "share_high": share_high}
            | {"per_projection": float(values.mean() / along) if abs(along) > _LEAST else NAN}
        )
    return found


def interactions(lines: Table, seed: int) -> Table:
    """The index of interaction at the corner of the grid, on both scales: of the pair, v with itself, random ones.

    `p_random` is the share of random directions whose mean index is as far from 0; `p_index` that of surfaces of a
    single index which are fitted as badly as the grid.
    """
    found: Table = []
    pairs = list(dict.fromkeys(line["pair"] for line in lines if line["pair"] != "equal length"))
    for scale, column in SCALES.items():
        at = {(line["pair"], line["a"], line["b"], line["problem_id"]): line[column] for line in lines}
        problems = list(dict.fromkeys(line["problem_id"] for line in lines))

        def f(pair: str, a: float, b: float, at: Mapping = at, problems: list[str] = problems) -> np.ndarray:
            of = "direction" if b == 0 else pair
            return np.array([at[of, a, b, problem] for problem in problems])

        for pair in pairs:
            corners = [f(pair, a, b) for a, b in ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0))]
            values = interaction.index(*corners)
            low, high = interval(values) if len(values) > 1 else (NAN, NAN)
            line = {"pair": pair, "scale": scale, "problems": len(values), "estimate": float(values.mean())}
            line |= {"low": low, "high": high, "p_random": NAN, "p_index": NAN, "alpha": NAN, "beta": NAN}
            line["clipped"] = int(max(_share_at(lines, pair, a, b) for a, b in ((1.0, 1.0), (1.0, 0.0))) > CLIPPED)
            if pair == "direction":
                points = [(a, b) for a in GRID for b in GRID]
                surface = np.stack([f(pair, a, b) for a, b in points], axis=1)
                fit = interaction.single_index(points, surface, seed=seed)
                line |= {"p_index": fit.p, "alpha": fit.alpha, "beta": fit.beta}
            found.append(line)
        drawn = np.array([abs(x["estimate"]) for x in found if x["scale"] == scale and x["pair"].startswith(RANDOM)])
        for line in found:
            if line["scale"] == scale and line["pair"] == "direction" and len(drawn):
                line["p_random"] = float((1 + np.sum(drawn >= abs(line["estimate"]))) / (1 + len(drawn)))
    return found


def _share_at(lines: Table, pair: str, a: float, b: float) -> float:
    of = "direction" if b == 0 else pair
    return float(np.mean([line["share"] for line in lines if (line["pair"], line["a"], line["b"]) == (of, a, b)]))


def necessity(lines: Table) -> Table:
    """What share of v's effect is left where each subspace is removed, with v and without, beside random ones.

    `p` is the share of random subspaces that leave as little (one-sided), of the spans of labels; `p_holm` after Holm's
    correction over them.
    """
    of: dict[tuple[str, int, int], dict[str, float]] = {}
    for line in lines:
        sign = 1.0 if line["added"] else -1.0
        changes = of.setdefault((line["removed"], line["rank"], line["draw"]), {})
        changes[line["problem_id"]] = changes.get(line["problem_id"], 0.0) + sign * line["log_odds"]
    if not of:
        return []
    own = of[NOTHING, 0, -1]
    found: Table = []
    for (name, rank, _), one in of.items():
        if name in (RANDOM, NOTHING):
            continue
        share, low, high = shares(one, own)
        random = [np.mean(list(other.values())) for key, other in of.items() if key[:2] == (RANDOM, rank)]
        ratios = np.array(random) / np.mean(list(own.values()))
        p = (1 + np.sum(ratios <= share)) / (1 + len(ratios)) if len(ratios) and name.startswith(SPAN) else NAN
        middle, ends = (
            (float(np.median(ratios)), np.quantile(ratios, [0.025, 0.975])) if len(ratios) else (NAN, (NAN, NAN))
        )
        found.append(
            {"removed": name, "rank": rank, "problems": len(own), "left": share, "left_low": low, "left_high": high}
            | {"draws": len(ratios), "random": middle, "random_low": float(ends[0]), "random_high": float(ends[1])}
            | {"p": float(p)}
        )
    adjusted = statistics.holm([line["p"] for line in found])
    return [line | {"p_holm": p} for line, p in zip(found, adjusted, strict=True)]
