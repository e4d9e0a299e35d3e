"""Claims of the paper that rates carry: the vectors work, comparably, unlike controls, and backwards."""

import dataclasses
from collections.abc import Mapping, Sequence

from backtrack_jax.analysis import dose, replies
from backtrack_jax.analysis.claims import Claim, all_of, measured, number
from backtrack_jax.analysis.dose import LEVEL, Dose
from backtrack_jax.analysis.replies import Line
from backtrack_jax.analysis.results import PAPER_LABEL, Cell, Results
from backtrack_jax.analysis.statistics import Region, paired_interval, ratio_interval, verdict
from backtrack_jax.data.records import Condition
from backtrack_jax.kinds import is_vector_file, parse

_COHERENT = Region(low=dose.COHERENT)

Cells = Mapping[Condition, Sequence[Line]]


def claims(r: Results) -> list[Claim]:
    """All of them that the run has the conditions for, on the model that writes the traces."""
    plain, chosen = r.unsteered(r.author), dose.of_run(r)
    if r.label != PAPER_LABEL or plain is None or chosen is None:
        return []
    of_cell = replies.by_cell(r.tables["replies"])
    at = chosen.cell["magnitude"]
    own = {source: cell for source in r.roles if (cell := _at(r, r.label, source, at))}
    found = [_works(r, of_cell, source, cell, plain) for source, cell in own.items()]
    if {"base", "reasoning"} <= set(own):
        found.append(_comparable(of_cell, own["base"], own["reasoning"], plain))
    if (v := own.get(r.author)) and (controls := _controls(r, at)):
        found.append(_unlike_controls(of_cell, v, controls, plain))
    if backwards := _backwards(r, chosen):
        found.append(_lowered(of_cell, backwards, plain))
    if not chosen.coherent:
        return [dataclasses.replace(claim, note=f"{claim.note}; {dose.NONE}") for claim in found]
    return found


def _at(r: Results, kind: str, source: str, magnitude: float) -> Cell | None:
    """The cell of a kind at a magnitude, where figures are about; None if it was not sampled."""
    found = r.cells(r.author, kind, source)
    return next((cell for cell in found if cell["kind"] == kind and cell["magnitude"] == magnitude), None)


def _counts(of_cell: Cells, *cells: Cell) -> replies.Counts:
    return replies.shared(of_cell, [Condition.of(cell) for cell in cells])


def _works(r: Results, of_cell: Cells, source: str, cell: Cell, plain: Cell) -> Claim:
    counts = _counts(of_cell, cell, plain)
    v, before = counts.rates
    interval = ratio_interval(counts.hits, counts.words, [1, 0], [0, 1], level=LEVEL)
    coherence, region, n = dose.coherence(of_cell, cell, plain), Region(low=2), len(counts.problems)
    parts = [verdict(*interval, region, n), verdict(coherence.low, coherence.high, _COHERENT, n)]
    return measured(
        f"works_{source}",
        f"The {source}-derived vector makes the {r.author} model backtrack, and leaves its text whole.",
        figure="fig3_pairs",
        where="Fig. 3",
        rule=f"rate over the unsteered rate above 2, and coherence above {dose.COHERENT:g}, {dose.RULE}",
        estimate=_over(v, before),
        interval=interval,
        unit="times the unsteered rate",
        region=region,
        n=n,
        note=f"{_magnitude(cell)}: {100 * v:.2f} % of words, unsteered {100 * before:.2f} %; coherence {coherence}",
        given=all_of(parts),
    )


def _comparable(of_cell: Cells, base: Cell, reasoning: Cell, plain: Cell) -> Claim:
    counts = _counts(of_cell, base, reasoning, plain)
    of_base, of_reasoning, before = counts.rates
    return measured(
        "comparable",
        "The base-derived vector does about as much as the reasoning-derived one.",
        figure="fig3_pairs",
        where="Fig. 3",
        rule=f"effect (rate less the unsteered one) of one over that of the other within 0.67 and 1.5, {dose.RULE}",
        estimate=_over(of_base - before, of_reasoning - before),
        interval=ratio_interval(counts.hits, counts.words, [1, 0, -1], [0, 1, -1], level=LEVEL),
        unit="base- over reasoning-derived effect",
        region=Region(0.67, 1.5),
        n=len(counts.problems),
        note=f"{_magnitude(base)}: effects {100 * (of_base - before):.2f} and {100 * (of_reasoning - before):.2f} % of "
        "words",
    )


def _controls(r: Results, magnitude: float) -> list[Cell]:
    """What is added at the same magnitude and holds nothing of the vector: other directions, noise, activations."""
    kinds = [
        kind
        for kind in r.experiment.steering.all_kinds
        if parse(kind).what.strength == "length" and r.label not in parse(kind).names
        if not any(is_vector_file(name) for name in parse(kind).names)
    ]
    found = (_at(r, kind, source, magnitude) for kind in kinds for source in (r.author, ""))
    return [cell for cell in found if cell]


def _unlike_controls(of_cell: Cells, v: Cell, controls: Sequence[Cell], plain: Cell) -> Claim:
    region = Region(high=0.5)
    tried, verdicts, texts = [], [], []
    for control in controls:
        counts = _counts(of_cell, control, v, plain)
        factors = [1, 0, -1], [0, 1, -1]
        of_control, of_v, before = counts.rates
        interval = ratio_interval(counts.hits, counts.words, *factors, level=LEVEL)
        value, n = _over(of_control - before, of_v - before), len(counts.problems)
        found = verdict(*interval, region, n)
        if found == "fails":  # that one of them does; each may err in its share of the cases
            wider = ratio_interval(counts.hits, counts.words, *factors, level=1 - (1 - LEVEL) / len(controls))
            found = verdict(*wider, region, n)
        verdicts.append(found)
        tried.append((interval[1], value, interval, n, control["kind"]))
        texts.append(f"{control['kind']} {number(value)} ({number(interval[0])} to {number(interval[1])})")
    _, value, interval, _, kind = max(tried)
    return measured(
        "controls",
        "No other direction of equal norm, no noise and no amplification does as much as the vector.",
        figure="fig4_baselines",
        where="Fig. 4",
        rule="effect of every control over the vector's, both from the steered model's own activations, below 0.5, "
        f"{dose.RULE}",
        estimate=value,
        interval=interval,
        unit="effect of the control over that of the vector",
        region=region,
        n=min(n for *_, n, _ in tried),
        note=f"{_magnitude(v)}; highest end: {kind}; all: {', '.join(texts)}",
        given=all_of(verdicts),
    )


def _backwards(r: Results, chosen: Dose) -> Cell | None:
    """The run's own vector subtracted, at the dose or else the largest magnitude below it; None if it never was."""
    found = [c for c in r.cells(r.author, r.label, chosen.cell["source"]) if c["magnitude"] < 0]
    within = [c for c in found if -c["magnitude"] <= chosen.cell["magnitude"]]
    return (
        min(within, key=lambda c: c["magnitude"]) if within else max(found, key=lambda c: c["magnitude"], default=None)
    )


def _lowered(of_cell: Cells, cell: Cell, plain: Cell) -> Claim:
    counts = _counts(of_cell, cell, plain)
    v, before = counts.rates
    low, high = paired_interval(counts.hits, counts.words, [1, -1], level=LEVEL)
    return measured(
        "negative",
        "The vector subtracted makes the model backtrack less.",
        figure="effects",
        where="Fig. 3",
        rule="rate less the unsteered one below 0, at the largest negative magnitude not beyond the dose of the others",
        estimate=100 * (v - before),
        interval=(100 * low, 100 * high),
        unit="% of words",
        region=Region(high=0),
        n=len(counts.problems),
        note=f"{_magnitude(cell)}: {100 * v:.2f} % of words, unsteered {100 * before:.2f} %",
    )


def _over(above: float, below: float) -> float:
    if below:
        return above / below
    return float("inf") if above > 0 else float("nan")


def _magnitude(cell: Cell) -> str:
    return f"magnitude {cell['magnitude']:g}, layer {cell['layer']}"
