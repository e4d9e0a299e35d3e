"""The direction as a probe (section 4.2, Fig. 6): does its projection tell that backtracking is about to begin?

A token is *positive* if a backtracking section starts within the next k tokens. Problems are split into folds; what is
scored on a problem was fitted on others only, the direction included: it is read again from the other problems' window
means. A probe that had seen the problem would score too well.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from backtrack_jax.analysis import activations, projections
from backtrack_jax.analysis.base import Analysis, Material, Planned
from backtrack_jax.analysis.cells import INTERVAL
from backtrack_jax.analysis.plots import COLOURS, MARKERS, Panel, Plot, Series
from backtrack_jax.analysis.results import PAPER_LABEL, Results, extent
from backtrack_jax.analysis.statistics import NAN, percentiles, resampled
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
        lines = {x["method"]: x for x in r.tables["probe"] if (x["role"], x["layer"]) == (r.author, r.layer)}
        own = lines.get("base-derived direction") or lines.get(f"{r.author}-derived direction")
        if not own or math.isnan(own["auc"]):
            return []
        other = lines.get("logistic regression")
        beside = ""
        if other and not math.isnan(other["auc"]):
            on = "the same" if other["n_tokens"] == own["n_tokens"] else f"{other['n_tokens']} of the {own['n_tokens']}"
            beside = f"; a logistic regression on {on} tokens has {other['auc']:.2f}"
        return [
            f"As a probe for what begins within {own['horizon']} tokens, the {own['method']} has a ROC-AUC of "
            f"{own['auc']:.2f} ({own['low']:.2f} to {own['high']:.2f}) at layer {r.layer}{beside}."
        ]

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
      low: lower bound of its 95 % bootstrap interval over problems.
      high: upper bound.
      average_precision: of the ranking; a ranking by chance has the share of positive tokens.
    """

    auc: float
    low: float
    high: float
    average_precision: float


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
    order = np.argsort(scores, kind="stable")
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
    order = np.argsort(-np.asarray(scores), kind="stable")
    last = np.flatnonzero(np.append(np.diff(np.asarray(scores)[order]) != 0, True))
    hits = np.cumsum(positive[order])[last]
    if not len(hits) or not hits[-1]:
        return NAN
    gained = np.diff(hits, prepend=0)
    return float(np.sum(gained * hits / (last + 1)) / hits[-1])


def score(
    scores: np.ndarray, positive: np.ndarray, problems: Sequence[str], *, n_resamples: int = 500, seed: int = 0
) -> Score:
    """AUC with its bootstrap interval over problems ([N] each), and average precision; nan where nothing is scored."""
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
) -> np.ndarray:
    """Projection on the difference of means of the other folds' problems.

    Args:
      tokens: N tokens.
      positive: [n, D], each trace's mean over its windows of D+; NaN where it has none.
      contrast: [n, D], likewise of D.
      fold: [n] int, fold of each trace.
      weights: [n] each, how much a trace counts in the mean of D+ and in that of D; default once.

    Returns:
      [N] float64, projections of activations on the unit direction, centred on the other folds' mean token; nan where
      the other folds have no window.
    """
    scores = np.full(len(tokens.traces), np.nan)
    of_positive, of_contrast = weights or (np.ones(len(fold)), np.ones(len(fold)))
    for held_out in np.unique(fold):
        test, others = fold[tokens.traces] == held_out, fold != held_out
        v = _mean(positive[others], of_positive[others]) - _mean(contrast[others], of_contrast[others])
        u = v / np.linalg.norm(v)
        centre = tokens.activations[~test].mean(0, dtype=np.float64) if (~test).any() else np.nan
        scores[test] = (tokens.activations[test] - centre) @ u
    return scores


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


def _mean(rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted mean of the rows that are not NaN, [D] float64; NaN if there is none."""
    has = np.isfinite(rows).all(-1)
    if not has.any():
        return np.full(rows.shape[-1], np.nan)
    return np.average(rows[has].astype(np.float64), axis=0, weights=weights[has])


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
    scored = {}
    for source in material.sums:
        positive, contrast, weights = material.means_by_trace(source, ids, e.vectors.label, layer)
        scored[f"{source}-derived direction"] = direction_scores(tokens, positive, contrast, fold, weights)
    if layer == e.steering.main_layer:
        scored["logistic regression"] = logistic_scores(tokens, fold)
    everywhere = np.ones(len(of_token), bool)
    found = [("random directions", everywhere, random_score(tokens, seed=e.seed))]
    for method, values in scored.items():
        kept = np.isfinite(values)
        found.append((method, kept, score(values[kept], tokens.positive[kept], of_token[kept].tolist())))
    return [
        {"role": role, "layer": layer, "horizon": horizon, "method": method}
        | dataclasses.asdict(of_method)
        | {"n_tokens": int(kept.sum()), "n_positive": int(tokens.positive[kept].sum())}
        | {"n_problems": len(set(of_token[kept]))}
        for method, kept, of_method in found
    ]


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
        f"others. {INTERVAL}. Random directions: mean and middle 95 % of 50. Dashed: chance."
    )
    return Plot("probe", "Section 4.2: the direction as a probe", caption, [panels], table, place=5.5)
