"""What was read under noise, as the tables that tell the explanations apart."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from backtrack_jax.analysis import logit_lens, statistics
from backtrack_jax.analysis.backtracking import count_keywords
from backtrack_jax.analysis.base import Material
from backtrack_jax.analysis.log_odds import interval
from backtrack_jax.analysis.noise_rows import (
    ABLATED,
    ABLATED_CLEAN,
    CLEAN_REPLIES,
    COVARIANCE,
    INSERTED,
    NOISE,
    NOISED_REPLIES,
    PROMPT,
    RANDOM,
    REMOVED,
    TRACES,
    VECTOR,
    Read,
    Rows,
    burst,
    magnitude,
    primary,
)
from backtrack_jax.analysis.noise_tables import (
    LAGS,
    contrast,
    crossed_interval,
    first_after,
    interval_p,
    mediated,
    slope,
    with_holm,
    within,
)
from backtrack_jax.analysis.statistics import NAN
from backtrack_jax.data.records import UNSTEERED
from backtrack_jax.data.text import KEYWORDS
from backtrack_jax.files.tables import Table


def downstream(rows: Rows, reads: Sequence[Read], found: Sequence[Mapping[str, Any]]) -> tuple[Table, Table]:
    """Lines of the tables of shifts and of slopes, on the traces.

    Shifts: of each text and layer from the steered one on, the mean over draws and sentence starts of the component
    less that without noise, and its variance between draws. Slopes: of the log-odds at a sentence start on the noise's
    component along the vector, at the token before it and summed over the window before it.
    """
    clean = {
        read.problem: one
        for read, one in zip(reads, found, strict=True)
        if (read.kind, read.text) == (UNSTEERED, TRACES)
    }
    drawn: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for read, one in zip(reads, found, strict=True):
        if read.text == TRACES and read.kind in (NOISE, rows.label):
            drawn[read.kind, read.problem].append(one)
    shift: Table = []
    slopes: Table = []
    for (kind, problem), draws in drawn.items():
        changes = np.array([one["components"] for one in draws]) - np.array(clean[problem]["components"])
        key = {"role": rows.role, "problem_id": problem}
        for layer in range(rows.layer, rows.n_layers):
            of = changes[:, :, layer]  # [draws, starts]
            variance = float(of.var(axis=0, ddof=1).mean()) if len(of) > 1 else NAN
            shift.append(key | {"added": kind, "layer": layer, "shift": float(of.mean()), "variance": variance})
        if kind == NOISE and len(draws) > 1:
            y = np.array([one["log_odds"] for one in draws])
            sums = np.array([one["sums"] for one in draws])  # those without noise are the same in all draws
            for at, x in (("token", changes[:, :, rows.layer]), ("window", sums)):
                xx, xy, yy = within(x, y)
                slopes.append(key | {"at": at, "xx": xx, "xy": xy, "yy": yy})
    return shift, slopes


Effects = dict[str, dict[str, float]]
"""Kind -> problem -> change of the log-odds, the mean over draws."""


def of_kinds(lines: Table, role: str, column: str = "log_odds") -> Effects:
    """Of the traces; changes of a column against the unsteered model on the same text, averaged over draws."""
    own = [line for line in lines if (line["role"], line["text"]) == (role, TRACES)]
    clean = {line["problem_id"]: line[column] for line in own if line["kind"] == UNSTEERED}
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in own:
        if line["kind"] != UNSTEERED:
            found[line["kind"]][line["problem_id"]].append(line[column] - clean[line["problem_id"]])
    return {kind: {problem: float(np.mean(of)) for problem, of in by.items()} for kind, by in found.items()}


def less(found: Effects, one: str, other: str) -> dict[str, float]:
    """Problem -> the effect of one kind less that of another."""
    left, right = found.get(one, {}), found.get(other, {})
    return {problem: left[problem] - right[problem] for problem in left if problem in right}


def effects(lines: Table) -> Table:
    """Each role and kind: mean change of the log-odds and of the entropy, with 95 % intervals.

    Of directions that are frozen for the run, the intervals are over problems and seeds.
    """
    found: Table = []
    for role in dict.fromkeys(line["role"] for line in lines):
        of = {column: of_kinds(lines, role, column) for column in ("log_odds", "entropy")}
        for kind, by_problem in of["log_odds"].items():
            line: dict[str, Any] = {"role": role, "kind": kind, "problems": len(by_problem)}
            for column, name in (("log_odds", "effect"), ("entropy", "entropy")):
                values = np.array(list(of[column][kind].values()))
                low, high = interval(values) if len(values) > 1 else (NAN, NAN)
                if kind == "fixed":
                    low, high, _ = crossed_interval(_fixed(lines, role, column))
                line |= {name: float(values.mean()), f"{name}_low": low, f"{name}_high": high}
            found.append(line)
    return found


def _fixed(lines: Table, role: str, column: str = "log_odds") -> np.ndarray:
    """[P, S] changes under each direction that is frozen for the run."""
    own = [line for line in lines if (line["role"], line["text"]) == (role, TRACES)]
    clean = {line["problem_id"]: line[column] for line in own if line["kind"] == UNSTEERED}
    found: dict[str, list[float]] = {problem: [] for problem in clean}
    for line in own:
        if line["kind"] == "fixed":
            found[line["problem_id"]].append(line[column] - clean[line["problem_id"]])
    return np.array(list(found.values()))


def shares(lines: Table, added: str, along: str) -> tuple[list[str], np.ndarray]:
    """Problems, and what is mediated beside the whole effect, [P, 2]; from `noise_mediation` and `noise_log_odds`."""
    own = [line for line in lines if (line["added"], line["along"]) == (added, along)]
    runs: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in own:
        runs[line["problem_id"]][line["run"]].append(line["log_odds"])
    problems = list(runs)
    means = np.array([[np.mean(runs[problem][run]) for run in (INSERTED, REMOVED)] for problem in problems])
    return problems, means.reshape(-1, 2)


def mediated_by_problem(found: Mapping[str, Table], added: str, along: str) -> dict[str, np.ndarray]:
    """Problem -> what passes through the components, and the whole effect, in nats."""
    lines = found["noise_mediation"]
    if not lines:
        return {}
    role = lines[0]["role"]
    problems, means = shares(lines, added, along)
    own = [line for line in found["noise_log_odds"] if (line["role"], line["text"]) == (role, TRACES)]
    outcome: dict[tuple[str, str], list[float]] = defaultdict(list)
    for line in own:
        outcome[line["kind"], line["problem_id"]].append(line["log_odds"])
    clean, with_it = (
        np.array([np.mean(outcome[kind, problem]) for problem in problems]) for kind in (UNSTEERED, added)
    )
    parts = mediated(clean, with_it, means[:, 0], means[:, 1])
    return dict(zip(problems, parts, strict=True))


def share_of(
    found: Mapping[str, Table], added: str, along: str, level: float = 0.95
) -> tuple[float, tuple[float, float], int] | None:
    """The mediated share, its interval over problems (Fieller), and their number; None if it was not measured."""
    parts = np.array(list(mediated_by_problem(found, added, along).values()))
    if len(parts) < 2:
        return None
    ends = statistics.mean_ratio_interval(parts[:, 0], parts[:, 1], level=level)
    return float(parts[:, 0].mean() / parts[:, 1].mean()), ends, len(parts)


def contrasts(material: Material, found: Mapping[str, Table], hazards: Table) -> Table:
    """What tells the explanations apart; see the page on noise."""
    e, lines = material.experiment, found["noise_log_odds"]
    author, label, q = e.author, e.vectors.label, e.questions.noise
    own = of_kinds(lines, author)
    made: Table = []

    def compare(explanation: str, one: str, other: str, margin: float = NAN) -> None:
        made.append(contrast(explanation, f"{one} less {other}", less(own, one, other), margin=margin))

    compare("projection", f"noise-outside:{label}", "noise-outside:random", q.margin)
    for role in e.roles:
        effect = of_kinds(lines, role).get(NOISE, {})
        made.append(contrast("projection", f"noise less none, {role} model", effect))
    compare("projection", "noise-outside:labels", "noise-outside:subspace", q.margin)
    compare("projection", "noise-within:labels", "noise-within:subspace")
    for k in q.ranks:
        for name in ("pcs", "last-pcs"):
            compare("projection", f"noise-within:{name}({k})", f"noise-within:subspace({k})")
    name = f"noise-part-within:{label}"
    made.append(contrast("projection", f"{name} less none", own.get(name, {})))
    for kind in ("noise keeping norm", "frozen-noise", COVARIANCE):
        compare("norm", kind, NOISE)
    fixed = _fixed(lines, author)
    low, high, p = crossed_interval(fixed) if fixed.size else (NAN, NAN, NAN)
    line = contrast("norm", "fixed less none", own.get("fixed", {}))
    made.append(line | {"low": low, "high": high, "p": p})
    made += _downstream_contrasts(found, author, material)
    made += _mediation_contrasts(found, label)
    made += _error_contrasts(found, author, hazards)
    made += _rate_contrasts(material)
    clean = {
        line["problem_id"]: line["log_odds"]
        for line in lines
        if (line["role"], line["text"], line["kind"]) == (author, TRACES, UNSTEERED)
    }
    tempered_ = {line["problem_id"]: line["log_odds"] for line in found["noise_temperature"] if line["role"] == author}
    heated = {"temperature": {problem: value - clean[problem] for problem, value in tempered_.items()}}
    made.append(contrast("entropy", "temperature of equal entropy less none", heated["temperature"]))
    both = less(own | heated, NOISE, "temperature")
    made.append(contrast("entropy", "noise less temperature of equal entropy", both))
    return with_holm([line for line in made if line["problems"] > 1], primary(label))


def _downstream_contrasts(found: Mapping[str, Table], role: str, material: Material) -> Table:
    """The mean shift at the last layer, and the slopes over draws."""
    last = material.sums[role].sums.shape[1] - 1
    shift = {
        line["problem_id"]: line["shift"]
        for line in found["noise_shift"]
        if (line["role"], line["added"], line["layer"]) == (role, NOISE, last)
    }
    made = [contrast("downstream", "component along the vector at the last layer", shift, unit="residual units")]
    for at, name in (("token", "at the token before"), ("window", "summed over the window before")):
        own = [line for line in found["noise_slopes"] if (line["role"], line["at"]) == (role, at)]
        one = slope(own)
        line = {"explanation": "downstream", "contrast": f"slope on the noise's component along the vector, {name}"}
        line |= {"estimate": one["slope"], "low": one["low"], "high": one["high"], "unit": "nats per residual unit"}
        made.append(line | {"test": "difference", "p": one["p"], "problems": len(own)})
    return made


def _mediation_contrasts(found: Mapping[str, Table], label: str) -> Table:
    """What passes through later components, along the vector and a random direction; and their removal."""
    made = []
    for added in (NOISE, label):
        for along in (VECTOR, RANDOM):
            parts = {problem: float(of[0]) for problem, of in mediated_by_problem(found, added, along).items()}
            made.append(contrast("mediation", f"effect of {added} through components along {along}", parts))
    whole = mediated_by_problem(found, NOISE, VECTOR)
    of_run: dict[str, dict[str, list[float]]] = {run: defaultdict(list) for run in (ABLATED, ABLATED_CLEAN)}
    for line in found["noise_mediation"]:
        if line["added"] == NOISE and line["run"] in of_run:
            of_run[line["run"]][line["problem_id"]].append(line["log_odds"])
    left = {
        problem: float(np.mean(of) - np.mean(of_run[ABLATED_CLEAN][problem]) - whole[problem][1])
        for problem, of in of_run[ABLATED].items()
    }
    made.append(contrast("mediation", "effect of noise with later components ablated less without", left))
    return made


def _error_contrasts(found: Mapping[str, Table], role: str, hazards: Table) -> Table:
    """Two by two of text and state, and hazards behind a burst and after a prompt under noise."""
    of = {
        (line["text"], line["kind"], line["problem_id"]): line["log_odds"]
        for line in found["noise_log_odds"]
        if line["role"] == role and line["text"] != TRACES
    }
    problems = [
        problem
        for text, kind, problem in of
        if (text, kind) == (CLEAN_REPLIES, UNSTEERED) and (NOISED_REPLIES, NOISE, problem) in of
    ]
    both = {
        problem: np.array(
            [[of[text, kind, problem] for kind in (UNSTEERED, NOISE)] for text in (CLEAN_REPLIES, NOISED_REPLIES)]
        )
        for problem in problems
    }
    made = [
        contrast("errors", name, {problem: float(np.sum(np.array(factors) * x)) for problem, x in both.items()})
        for name, factors in (
            ("text under noise less text without, read without noise", ((-1, 0), (1, 0))),
            ("noise less none, on text without noise", ((-1, 1), (0, 0))),
            ("noise less none, on text under noise", ((0, 0), (-1, 1))),
        )
    ]
    for line in hazards:
        if (line["first_lag"], line["last_lag"]) == (LAGS[0][0], LAGS[-1][1] - 1) and line["kind"] != UNSTEERED:
            at = {"explanation": "errors", "contrast": f"first keyword, {line['kind']} less none, lags 0 to 64"}
            at |= {"estimate": line["difference"], "low": line["difference_low"], "high": line["difference_high"]}
            at |= {"unit": "% per token", "test": "difference", "p": line["p"], "problems": line["problems"]}
            made.append(at)
    return made


def _replies(material: Material) -> dict[str, dict[str, list[Any]]]:
    """Kind -> problem -> replies of the model that writes the traces, of the conditions of this question."""
    e = material.experiment
    label = e.vectors.label
    wanted = (NOISE, f"noise-outside:{label}", "noise-outside:random", burst(e), PROMPT)
    found: dict[str, dict[str, list[Any]]] = {kind: defaultdict(list) for kind in (UNSTEERED, *wanted)}
    for reply in material.replies if e.questions.noise.replies else ():
        c = reply.condition
        own = c.target == e.author and c.layer == e.steering.main_layer and c.magnitude in (0, magnitude(e))
        if own and c.kind in found and (not c.source or c.source == e.author):
            found[c.kind][reply.problem_id].append(reply)
    return {kind: by for kind, by in found.items() if by}


def _rate_contrasts(material: Material) -> Table:
    """Keywords of sampled replies, in % of words."""
    label, found = material.experiment.vectors.label, _replies(material)
    pairs = (
        (NOISE, UNSTEERED),
        (f"noise-outside:{label}", "noise-outside:random"),
        (PROMPT, UNSTEERED),
    )
    made = []
    for one, other in pairs:
        if one not in found or other not in found:
            continue
        problems = [problem for problem in found[one] if problem in found[other]]
        counted = [
            [[count_keywords(reply.text) for reply in found[kind][problem]] for problem in problems]
            for kind in (one, other)
        ]
        hits, words = (
            np.array([[sum(getattr(c, name) for c in of) for of in kind] for kind in counted], np.float64)
            for name in ("hits", "words")
        )
        if len(problems) < 2 or not words.sum(1).all():
            continue

        def ends(level: float, hits: np.ndarray = hits, words: np.ndarray = words) -> tuple[float, float]:
            return statistics.paired_interval(hits, words, [1, -1], level=level)

        low, high = ends(0.95)
        value = float(hits[0].sum() / words[0].sum() - hits[1].sum() / words[1].sum())
        line = {"explanation": "rates", "contrast": f"{one} less {'none' if other == UNSTEERED else other}, replies"}
        line |= {"estimate": 100 * value, "low": 100 * low, "high": 100 * high, "unit": "% of words"}
        made.append(line | {"test": "difference", "p": interval_p(ends), "problems": len(problems)})
    return made


def hazard(material: Material) -> Table:
    """Chance per token of the first keyword behind the burst, by lag, under the burst, noise in the prompt, and none.

    Lag 0 is the first token that is drawn from a pass without noise. A reply is at risk until its first keyword behind
    the burst.
    """
    e, found = material.experiment, _replies(material)
    words = set(logit_lens.word_ids(material.tokenizer, KEYWORDS))
    begin = e.questions.noise.burst + 1
    counted: dict[str, dict[str, np.ndarray]] = {}
    for kind in (UNSTEERED, burst(e), PROMPT, NOISE):
        counted[kind] = {}
        for problem, replies in found.get(kind, {}).items():
            of = [
                first_after([at for at, token in enumerate(reply.ids) if token in words], begin, len(reply.ids))
                for reply in replies
            ]
            counted[kind][problem] = np.array(of, np.float64).sum(0)
    lines: Table = []
    for kind, by_problem in counted.items():
        problems = [problem for problem in by_problem if problem in counted[UNSTEERED]]
        if len(problems) < 2:
            continue
        both = np.array([[by_problem[p], counted[UNSTEERED][p]] for p in problems])  # [P, 2, lags, 2]
        for i, (first, stop) in enumerate([*LAGS, (LAGS[0][0], LAGS[-1][1])]):
            of = both[:, :, i] if i < len(LAGS) else both.sum(2)
            hits, tokens = of[..., 0].T, of[..., 1].T
            if not tokens.sum(1).all():
                continue
            line: dict[str, Any] = {"kind": kind, "first_lag": first, "last_lag": stop - 1, "problems": len(problems)}
            low, high = statistics.rate_interval(hits[0], tokens[0])
            rate = hits.sum(1) / tokens.sum(1)
            line |= {"hits": int(hits[0].sum()), "tokens": int(tokens[0].sum()), "hazard": 100 * float(rate[0])}
            line |= {"hazard_low": 100 * low, "hazard_high": 100 * high}
            line |= dict.fromkeys(("difference", "difference_low", "difference_high", "p"), NAN)
            if kind != UNSTEERED:

                def ends(level: float, hits: np.ndarray = hits, tokens: np.ndarray = tokens) -> tuple[float, float]:
                    return statistics.paired_interval(hits, tokens, [1, -1], level=level)

                low, high = ends(0.95)
                line |= {"difference": 100 * float(rate[0] - rate[1]), "difference_low": 100 * low}
                line |= {"difference_high": 100 * high, "p": interval_p(ends)}
            lines.append(line)
    return lines
