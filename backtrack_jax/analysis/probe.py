"""The direction as a probe (section 4.2, Fig. 6): does its projection tell that backtracking is about to begin?

A token is *positive* if a backtracking section starts within the next k tokens. Problems are split into folds; what is
scored on a problem was fitted on others only, the direction included: it is read again from the other problems' window
means. A probe that had seen the problem would score too well.

{role}.probe.csv: AUC and average precision of each method. `low` and `high` are a 95 % interval over problems, in which
directions are fitted again without each problem, with `error`, the standard error; of a logistic regression, a
bootstrap over problems of scores as they are; of random directions and shuffled labels, the middle 95 % of draws.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from backtrack_jax.analysis import activations, by_problem, projections, shuffles
from backtrack_jax.analysis.base import Analysis, Material, Planned
from backtrack_jax.analysis.claims import Claim, measured
from backtrack_jax.analysis.dose import LEVEL
from backtrack_jax.analysis.plots import COLOURS, MARKERS, Panel, Plot, Series
from backtrack_jax.analysis.results import PAPER_LABEL, Results, extent
from backtrack_jax.analysis.statistics import NAN, Region, percentiles, resampled
from backtrack_jax.data.problems import spread
from backtrack_jax.data.records import Trace
from backtrack_jax.extract import TokenTrace
from backtrack_jax.files.console import Progress, say
from backtrack_jax.files.tables import Table
from backtrack_jax.models.batching import bucket
from backtrack_jax.models.config import ModelConfig


class Probe(Analysis):
    """Scores of directions on tokens drawn from all traces, and projections of all tokens of a few traces."""

    name = "probe"
    version = 2
    of_replies = False
    settings = (
        *("seed", "steering.main_layer"),
        *("analysis.horizons", "analysis.positions", "analysis.folds", "analysis.shown"),
    )
    role_tables = ("probe",)

    def role_files(self, role: str) -> list[str]:
        """The table, and the projections."""
        return [*super().role_files(role), projections.file_name(role)]

    def of_role(self, material: Material, role: str, folder: Path) -> dict[str, Table]:
        """Reads the activations of a model."""
        e, spec = material.experiment, material.experiment.analysis
        pairs = [pair for pair in material.pairs if pair[1].sections]  # no labels does not mean "no backtracking"
        if without := len(material.pairs) - len(pairs):
            say(f"  the probe leaves out {without} traces without labels")
        layers = _layers(material)
        read = [material.token_trace(role, trace, annotation) for trace, annotation in pairs]
        rng = np.random.default_rng(e.seed)
        replies_at = [np.arange(trace.reply_start, len(trace.ids)) for trace in read]
        chosen = [np.sort(rng.choice(at, min(spec.positions, len(at)), replace=False)) for at in replies_at]
        states = _read_activations(material, role, "activations", read, chosen, spec.batch_size)
        of_layer = [np.concatenate([of_trace[:, n] for of_trace in states]) for n in range(len(layers))]
        del states
        mean = np.stack([tokens.mean(0, dtype=np.float64) for tokens in of_layer])
        shown = _shown(e.vectors.label, read, spec.shown)
        of_shown = [read[i] for i in shown], [replies_at[i] for i in shown]
        whole = _read_activations(material, role, "projections", *of_shown, batch_size=1)
        projected = projections.project(
            material, role, [pairs[i][0] for i in shown], of_shown[0], [states - mean for states in whole], layers
        )
        projections.write(folder, projected)
        traces = np.repeat(np.arange(len(read)), [len(at) for at in chosen])
        starts = [[at for label, at in trace.starts if label == e.vectors.label] for trace in read]
        lines: Table = []
        for layer in e.vectors.layers:
            for horizon in spec.horizons:
                soon = [starts_soon(s, at, horizon) for s, at in zip(starts, chosen, strict=True)]
                tokens = SampledTokens(of_layer[layers.index(layer)], traces, np.concatenate(soon))
                lines += score_directions(material, role, layer, horizon, tokens, [trace for trace, _ in pairs])
        return {"probe": lines}

    def plots(self, r: Results) -> Sequence[Plot | None]:
        """At the steered layer."""
        return [probe(r)]

    def sentences(self, r: Results) -> Sequence[str]:
        """How well the direction does as a probe, beside a logistic regression."""
        own, lines = _of_direction(r)
        if not own or math.isnan(own["auc"]):
            return []
        other, chance = lines.get("logistic regression"), lines[_shuffled(own["method"])]
        beside = (
            ""
            if math.isnan(chance["auc"])
            else f"; of shuffled labels, {chance['auc']:.2f} (middle 95 %: {chance['low']:.2f} to {chance['high']:.2f})"
        )
        if other and not math.isnan(other["auc"]):
            on = "the same" if other["n_tokens"] == own["n_tokens"] else f"{other['n_tokens']} of the {own['n_tokens']}"
            beside += f"; a logistic regression on {on} tokens has {other['auc']:.2f}"
        return [
            f"As a probe for what begins within {own['horizon']} tokens, the {own['method']} has a ROC-AUC of "
            f"{own['auc']:.2f} ({own['low']:.2f} to {own['high']:.2f}) at layer {r.layer}{beside}."
        ]

    def claims(self, r: Results) -> Sequence[Claim]:
        """That the direction tells something of what is about to begin, but does not tell it cleanly."""
        own, lines = _of_direction(r)
        if own is None:
            why = f"vectors.layers={r.experiment.vectors.layers} keeps no means of sections at layer {r.layer}"
            return [_claim(r, "base-derived direction", NAN, (NAN, NAN), 0, why)]
        n, chance = int(own["n_problems"]), lines[_shuffled(own["method"])]
        interval = by_problem.interval(own["auc"], own["error"], n, LEVEL)
        spread = f"{chance['low']:.3f} to {chance['high']:.3f}"
        note = f"directions of shuffled labels {chance['auc']:.3f}, middle 95 % {spread}"
        return [_claim(r, own["method"], own["auc"], interval, n, note)]

    def reference(self, r: Results) -> dict[str, str]:
        """The base-derived direction at the steered layer."""
        key, found = (r.author, r.layer, "base-derived direction"), {}
        for line in r.tables["probe"] if r.label == PAPER_LABEL else ():
            if (line["role"], line["layer"], line["method"]) == key and not math.isnan(line["auc"]):
                bounds = f"{line['low']:.3f} to {line['high']:.3f}"
                found["probe"] = f"{line['auc']:.3f} ({bounds}), next {line['horizon']} tokens"
        return found

    def plan(self, planned: Planned) -> str:
        """Activations of sampled tokens of all traces."""
        n, kept = len(planned.trace_tokens), planned.experiment.analysis.positions
        return f"activations of {n} traces, about {sum(planned.trace_tokens):,} tokens, {n * kept:,} of them kept"

    def memory(self, planned: Planned, config: ModelConfig) -> dict[str, int]:
        """Activations of a batch at all layers, and those that are kept of all traces."""
        e, spec = planned.experiment, planned.experiment.analysis
        rows_at_once = -(-spec.batch_size // e.data_parallel)
        layers = len({*e.vectors.layers, e.steering.main_layer})
        return {
            "activations": 4 * config.n_layers * rows_at_once * bucket(spec.positions) * config.d_model,
            "activations on the host": 4 * len(planned.trace_tokens) * spec.positions * layers * config.d_model,
        }


PROBE = Probe()

_UNCLEAN = Region(0.5, 0.8)
_SCORES_AT_ONCE = 4_000_000


@dataclasses.dataclass(frozen=True)
class SampledTokens:
    """Single tokens of traces with their activations at one layer.

    Attributes:
      activations: [N, D] float32.
      traces: [N] int, index of each token's trace.
      positive: [N] bool.
    """

    activations: np.ndarray
    traces: np.ndarray
    positive: np.ndarray


@dataclasses.dataclass(frozen=True)
class Score:
    """How well a score ranks positive tokens above the others.

    Attributes:
      auc: area under the ROC curve.
      low: lower bound of its 95 % interval over problems, or 2.5 % quantile of draws.
      high: upper bound, or 97.5 % quantile.
      average_precision: of the ranking; a ranking by chance has the share of positive tokens.
      error: standard error of the area over problems; NaN where there is none.
    """

    auc: float
    low: float
    high: float
    average_precision: float
    error: float = NAN


def starts_soon(starts: Iterable[int], positions: np.ndarray, horizon: int) -> np.ndarray:
    """[N] bool: for each position t, whether a start lies in t+1 .. t+horizon."""
    starts = np.asarray(sorted(starts), np.int64)
    ahead = starts[None, :] - np.asarray(positions)[:, None]
    return np.any((ahead >= 1) & (ahead <= horizon), axis=-1)


def roc_auc(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Probability that a positive token scores above another one, ties counting half.

    Args:
      scores: [N].
      positive: [N] bool.
      weights: [..., N], how often each token counts; default once.

    Returns:
      [...] float64; nan where there is no positive or no other token.
    """
    w = np.ones(len(scores)) if weights is None else np.asarray(weights, np.float64)
    order = np.argsort(scores)
    last = np.flatnonzero(np.append(np.diff(np.asarray(scores)[order]) != 0, True))  # of each group of equal scores
    yes = np.cumsum(w[..., order] * positive[order], axis=-1)[..., last]
    no = np.cumsum(w[..., order] * ~positive[order], axis=-1)[..., last]
    group_yes = np.diff(yes, axis=-1, prepend=0)
    below = no - np.diff(no, axis=-1, prepend=0) / 2
    pairs = yes[..., -1] * no[..., -1]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(pairs > 0, np.sum(group_yes * below, axis=-1) / pairs, np.nan)


def average_precision(scores: np.ndarray, positive: np.ndarray) -> float:
    """Mean over positive tokens of the precision at their score, sum (R_n - R_n-1) P_n; nan without a positive one."""
    order = np.argsort(-np.asarray(scores))
    last = np.flatnonzero(np.append(np.diff(np.asarray(scores)[order]) != 0, True))
    hits = np.cumsum(positive[order])[last]
    if not len(hits) or not hits[-1]:
        return NAN
    gained = np.diff(hits, prepend=0)
    return float(np.sum(gained * hits / (last + 1)) / hits[-1])


def score(
    scores: np.ndarray, positive: np.ndarray, problems: Sequence[str], *, n_resamples: int = 500, seed: int = 0
) -> Score:
    """AUC with its bootstrap interval over problems ([N] each), and average precision; nan where nothing is scored.

    What the scores were fitted on stays as it is, so that the interval leaves out that other problems would have given
    another probe; see `refitted_score`.
    """
    if not len(scores):
        return Score(*[NAN] * 4)
    names, group = np.unique(np.asarray(problems, str), return_inverse=True)
    low = high = NAN
    if len(names) > 1:
        low, high = percentiles(
            resampled(
                lambda draws: roc_auc(scores, positive, draws[:, group]),
                len(names),
                n_resamples=n_resamples,
                seed=seed,
                parts=10,  # weights of all tokens in all resamples would not fit into memory
            )
        )
    return Score(float(roc_auc(scores, positive)), low, high, average_precision(scores, positive))


def refitted_score(
    tokens: SampledTokens,
    positive: np.ndarray,
    contrast: np.ndarray,
    fold: np.ndarray,
    problems: Sequence[str],
    weights: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[np.ndarray, Score]:
    """Scores of `direction_scores`, [N], and how well they rank.

    The interval is Student's t about a jackknife over problems: each is left out in turn, of the tokens that are scored
    and of the traces that all folds' directions and centres are read from.

    Args:
      tokens: N tokens.
      positive: [n, D], as for `direction_scores`.
      contrast: [n, D], likewise.
      fold: [n] int, fold of each trace.
      problems: problem of each trace.
      weights: [n] each, as for `direction_scores`.
    """
    names, group = np.unique(np.asarray(problems, str), return_inverse=True)
    scores = direction_scores(tokens, positive, contrast, fold, weights)
    kept = np.isfinite(scores)
    if not kept.any():
        return scores, Score(*[NAN] * 4)
    soon = tokens.positive[kept]
    auc = float(roc_auc(scores[kept], soon))
    counts = (1 - np.eye(len(names)))[:, group]  # of each trace, without each problem
    aucs = []
    for some in np.array_split(counts, 1 + counts.shape[0] * len(scores) // _SCORES_AT_ONCE):
        refitted = direction_scores(tokens, positive, contrast, fold, weights, some)[:, kept]
        aucs += [roc_auc(x, soon, of_trace[tokens.traces[kept]]) for x, of_trace in zip(refitted, some, strict=True)]
    error = by_problem.standard_error(np.array([auc, *aucs], np.float64))
    scored = len(np.unique(group[tokens.traces[kept]]))
    low, high = by_problem.interval(auc, error, scored)
    return scores, Score(auc, max(low, 0.0), min(high, 1.0), average_precision(scores[kept], soon), error)


def shuffled_score(tokens: SampledTokens, directions: np.ndarray, fold: np.ndarray) -> tuple[np.ndarray, Score]:
    """What directions of shuffled labels reach through the same folds: means over draws, and the middle 95 % of AUCs.

    Args:
      tokens: N tokens.
      directions: [F, R, D], what each draw gives without each fold.
      fold: [n] int, fold of each trace.

    Returns:
      Which tokens were scored, [N] bool; how well they were ranked.
    """
    scores = _projected(tokens, directions, fold)
    kept = np.asarray(np.isfinite(scores).all(0))
    if not kept.any():
        return kept, Score(*[NAN] * 4)
    soon = tokens.positive[kept]
    aucs = np.array([roc_auc(values[kept], soon) for values in scores])
    precision = np.mean([average_precision(values[kept], soon) for values in scores])
    return kept, Score(float(aucs.mean()), *percentiles(aucs), float(precision))


def random_score(tokens: SampledTokens, *, n_directions: int = 50, seed: int = 0) -> Score:
    """What directions that know nothing reach: means over Gaussian ones, and the middle 95 % of their AUCs.

    One such direction may well have an AUC of .4 or .6, since activations lie along few directions.
    """
    drawn = np.random.default_rng(seed).standard_normal((n_directions, tokens.activations.shape[1]), np.float32)
    scores = drawn @ tokens.activations.T
    aucs = np.array([roc_auc(values, tokens.positive) for values in scores])
    if not np.isfinite(aucs).all():
        return Score(*[NAN] * 4)
    precision = np.mean([average_precision(values, tokens.positive) for values in scores])
    return Score(float(aucs.mean()), *percentiles(aucs), float(precision))


def folds(problems: Sequence[str], n_folds: int, seed: int = 0) -> np.ndarray:
    """[n] int: the fold of each entry, all entries of a problem in one; folds differ by at most one problem."""
    names, group = np.unique(np.asarray(problems, str), return_inverse=True)
    shuffled = np.random.default_rng(seed).permutation(len(names))
    return (shuffled % n_folds)[group]


def direction_scores(
    tokens: SampledTokens,
    positive: np.ndarray,
    contrast: np.ndarray,
    fold: np.ndarray,
    weights: tuple[np.ndarray, np.ndarray] | None = None,
    counts: np.ndarray | None = None,
) -> np.ndarray:
    """Projection on the difference of means of the other folds' problems.

    Args:
      tokens: N tokens.
      positive: [n, D], each trace's mean over its windows of D+; NaN where it has none.
      contrast: [n, D], likewise of D.
      fold: [n] int, fold of each trace.
      weights: [n] each, how much a trace counts in the mean of D+ and in that of D; default once.
      counts: [R, n], how often each trace is there, in each of R samples of them; default once in one sample.

    Returns:
      [N] float64, or [R, N] float32 with `counts`: projections of activations on the unit direction, centred on the
      other folds' mean token; nan where the other folds have no window.
    """
    of_positive, of_contrast = weights or (np.ones(len(fold)), np.ones(len(fold)))
    samples = np.ones((1, len(fold))) if counts is None else counts
    others = np.stack([samples * (fold != f) for f in range(int(fold.max()) + 1)])  # [F, R, n]
    directions = _means(positive, others * of_positive) - _means(contrast, others * of_contrast)
    scores = _projected(tokens, directions, fold, others)
    return scores if counts is not None else scores[0].astype(np.float64)


def _projected(
    tokens: SampledTokens, directions: np.ndarray, fold: np.ndarray, counts: np.ndarray | None = None
) -> np.ndarray:
    """Tokens of each fold on the unit directions that the others gave, less their mean token: [R, N] float32.

    Args:
      tokens: N tokens.
      directions: [F, R, D].
      fold: [n] int, fold of each trace.
      counts: [F, R, n], how often each trace counts in a fold's mean token; default the traces of the other folds once.
    """
    of_token = fold[tokens.traces]
    places = (tokens.traces, np.arange(len(of_token)))
    of_trace = sparse.csr_array((np.ones(len(of_token)), places), (len(fold), len(of_token)))
    sums, n = of_trace @ tokens.activations, of_trace.sum(1)  # of tokens of each trace
    scores = np.full((directions.shape[1], len(of_token)), np.nan, np.float32)
    with np.errstate(invalid="ignore", divide="ignore"):
        for f, of_fold in enumerate(directions):
            others = (fold != f)[None].astype(np.float64) if counts is None else counts[f]
            centres = (others @ sums) / (others @ n)[:, None]  # [R or 1, D]
            units = (of_fold / np.linalg.norm(of_fold, axis=-1, keepdims=True)).astype(np.float32)
            test = of_token == f
            scores[:, test] = units @ tokens.activations[test].T - np.sum(units * centres, axis=-1)[:, None]
    return scores


def _means(rows: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Weighted means of the rows that are not NaN: [n, D] and [..., n] to [..., D] float64; NaN if there are none."""
    has = np.asarray(np.isfinite(rows).all(-1))
    weights = np.where(has, counts, 0.0)
    sums, n = weights @ np.where(has[:, None], rows, 0.0).astype(np.float64), weights.sum(-1, keepdims=True)
    return np.divide(sums, n, out=np.full_like(sums, np.nan), where=n > 0)


def logistic_scores(tokens: SampledTokens, fold: np.ndarray, *, strength: float = 1e-2) -> np.ndarray:
    """Log-odds by a logistic regression on standardised activations, fitted on the other folds' problems.

    Args:
      tokens: N tokens.
      fold: [n] int, fold of each trace.
      strength: inverse of the L2 penalty (scikit-learn's C).

    Returns:
      [N] float64; nan where the other folds hold tokens of one kind only.
    """
    # Imported here: it takes a second, for which a plan or a later stage should not wait.
    from sklearn.linear_model import LogisticRegression

    scores = np.full(len(tokens.traces), np.nan)
    for held_out in np.unique(fold):
        test = fold[tokens.traces] == held_out
        y = tokens.positive[~test]
        if not y.any() or y.all():
            continue
        x = tokens.activations[~test]
        mean, scale = x.mean(0), x.std(0) + 1e-6
        fitted = LogisticRegression(C=strength, max_iter=300, class_weight="balanced").fit((x - mean) / scale, y)
        scores[test] = fitted.decision_function((tokens.activations[test] - mean) / scale)
    return scores


def _layers(material: Material) -> list[int]:
    """The layers that are read: those of the probe, and the one that traces are shaded at first."""
    return sorted({*material.experiment.vectors.layers, material.experiment.steering.main_layer})


def _shown(label: str, read: Sequence[TokenTrace], limit: int) -> list[int]:
    """Which traces the report shows: spread over those with a section of the experiment's label, if there are any."""
    marked = [i for i, trace in enumerate(read) if any(name == label for name, _ in trace.starts)]
    return spread(marked or list(range(len(read))), limit)


def _read_activations(
    material: Material,
    role: str,
    title: str,
    traces: Sequence[TokenTrace],
    at: Sequence[np.ndarray],
    batch_size: int,
) -> list[np.ndarray]:
    """[positions, layers, D] of every trace."""
    found: dict[int, np.ndarray] = {}
    with Progress(f"  {title} of the {role} model", len(traces)) as progress:
        for batch in activations.read(material.model(role), traces, at, _layers(material), batch_size=batch_size):
            found |= dict(batch)
            progress.update(len(batch), sum(len(traces[i].ids) for i, _ in batch))
    return [found[i] for i in range(len(traces))]


def score_directions(
    material: Material, role: str, layer: int, horizon: int, tokens: SampledTokens, traces: Sequence[Trace]
) -> Table:
    """Scores of the directions, random ones, and a logistic regression at the steered layer, on the same tokens.

    Args:
      material: with the window sums that directions are read from.
      role: of the model that read the tokens.
      layer: that they were read at.
      horizon: within how many tokens a section starts after a positive one.
      tokens: what is scored.
      traces: that the tokens are of.
    """
    e, ids = material.experiment, [trace.id for trace in traces]
    problems = [trace.problem_id for trace in traces]
    fold = folds(problems, e.analysis.folds, e.seed)
    of_token = np.array(problems)[tokens.traces]
    everywhere = np.ones(len(of_token), bool)
    found = [("random directions", everywhere, random_score(tokens, seed=e.seed))]
    for source, sums in material.sums.items():
        positive, contrast, weights = material.means_by_trace(source, ids, e.vectors.label, layer)
        scores, of_direction = refitted_score(tokens, positive, contrast, fold, problems, weights)
        drawn = shuffles.shuffle({source: sums}, ids, e.vectors.label, seed=e.seed)
        parts = shuffles.shuffled_sums(drawn, material, source, ids, e.vectors.label, layer, fold)
        n_folds = np.arange(len(parts.n_positive))
        directions = np.stack([parts.vectors(n_folds != f) for f in n_folds])
        method = f"{source}-derived direction"
        found.append((method, np.isfinite(scores), of_direction))
        found.append((_shuffled(method), *shuffled_score(tokens, directions, fold)))
    if layer == e.steering.main_layer:
        values = logistic_scores(tokens, fold)
        kept = np.isfinite(values)
        fitted = score(values[kept], tokens.positive[kept], of_token[kept].tolist())
        found.append(("logistic regression", kept, fitted))
    return [
        {"role": role, "layer": layer, "horizon": horizon, "method": method}
        | dataclasses.asdict(of_method)
        | {"n_tokens": int(kept.sum()), "n_positive": int(tokens.positive[kept].sum())}
        | {"n_problems": len(set(of_token[kept]))}
        for method, kept, of_method in found
    ]


def _shuffled(method: str) -> str:
    """Name of what stands beside a direction as its null."""
    return method.replace("direction", "shuffled labels")


def _of_direction(r: Results) -> tuple[dict[str, Any] | None, dict[str, dict[str, Any]]]:
    """The line of the direction that the paper is about, at the steered layer, and all lines there by method."""
    lines = {x["method"]: x for x in r.tables["probe"] if (x["role"], x["layer"]) == (r.author, r.layer)}
    return lines.get("base-derived direction") or lines.get(f"{r.author}-derived direction"), lines


def _claim(r: Results, method: str, auc: float, interval: tuple[float, float], n: int, note: str) -> Claim:
    return measured(
        "probe",
        f"The {method} tells a little of whether {r.label} is about to begin, but not cleanly.",
        figure="probe",
        where="section 4.2",
        rule=(
            f"the ROC-AUC for what begins within {r.experiment.analysis.horizons[-1]} tokens lies between "
            f"{_UNCLEAN.low:g} and {_UNCLEAN.high:g}"
        ),
        estimate=auc,
        interval=interval,
        unit=f"ROC-AUC at layer {r.layer}",
        region=_UNCLEAN,
        n=n,
        note=note,
    )


def probe(r: Results) -> Plot | None:
    """Text 4.2: how well projections tell that a section begins within the next tokens."""
    layer = r.probed_layer("probe")
    if layer is None:
        return None
    table = r.tables["probe"]
    lines = [line for line in table if line["layer"] == layer]
    methods = list(dict.fromkeys(line["method"] for line in lines))
    series: dict[str, list[Series]] = {"auc": [], "average_precision": []}
    keys = [(role, horizon) for role in r.roles for horizon in r.experiment.analysis.horizons]
    for i, (role, horizon) in enumerate(keys):
        own = [line for line in lines if (line["role"], line["horizon"]) == (role, horizon)]
        aside = 0.24 * (i - (len(keys) - 1) / 2) / max(1, len(keys) - 1)
        x = [methods.index(line["method"]) + aside for line in own]
        label = f"{role} model, next {horizon} tokens"
        style: dict[str, Any] = {"colour": COLOURS[i % len(COLOURS)], "style": "", "marker": MARKERS[i % 4]}
        ends = ([line["low"] for line in own], [line["high"] for line in own])
        series["auc"].append(Series(label, x, [line["auc"] for line in own], *ends, **style))
        series["average_precision"].append(Series(label, x, [line["average_precision"] for line in own], **style))
    counted_on = [x for x in lines if (x["role"], x["method"]) == (r.author, "random directions")]
    shares = {line["horizon"]: line["n_positive"] / max(1, line["n_tokens"]) for line in counted_on}
    chance = next(iter(shares.values())) if len(shares) == 1 else None
    precision = series["average_precision"]
    panels = [
        Panel("", "", "ROC-AUC", series["auc"], categories=methods, level=0.5),
        Panel("", "", "average precision", precision, categories=methods, level=chance, from_zero=True),
    ]
    positive = ", ".join(f"{100 * share:.1f} % within {horizon}" for horizon, share in shares.items())
    caption = (
        f"Does a {r.label} section start within the next tokens? Layer {layer}; {extent(lines, 'n_tokens')} tokens of "
        f"{extent(lines, 'n_problems')} problems, positive: {positive}; every problem is scored by what was fitted on "
        f"others. Intervals: 95 %, over problems; of directions with folds fitted again without each problem. Shuffled "
        f"labels: directions of sections drawn at random in the same traces, through the same folds, mean and middle "
        f"95 % of {shuffles.N_DRAWS}. Random directions: the same of 50 Gaussian ones. Dashed: chance."
    )
    return Plot("probe", "Section 4.2: the direction as a probe", caption, [panels], table, place=5.5)
