"""The direction as a probe (section 4.2, Fig. 6): does its projection tell that backtracking is about to begin?

A token is *positive* if a backtracking section starts within the next k tokens. Problems are split into folds; what is
scored on a problem was fitted on others only, the direction included: it is read again from the other problems' window
means. A probe that had seen the problem would score too well.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Tokens:
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
        return float("nan")
    gained = np.diff(hits, prepend=0)
    return float(np.sum(gained * hits / (last + 1)) / hits[-1])


def score(
    scores: np.ndarray, positive: np.ndarray, problems: Sequence[str], *, n_resamples: int = 500, seed: int = 0
) -> Score:
    """AUC with its bootstrap interval over problems ([N] each), and average precision; nan where nothing is scored."""
    if not len(scores):
        return Score(*[float("nan")] * 4)
    names, group = np.unique(np.asarray(problems, str), return_inverse=True)
    draws = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), n_resamples)
    resampled = np.concatenate([roc_auc(scores, positive, part[:, group]) for part in np.array_split(draws, 10)])
    resampled = resampled[np.isfinite(resampled)]
    low, high = np.quantile(resampled, [0.025, 0.975]) if len(resampled) and len(names) > 1 else (np.nan, np.nan)
    return Score(float(roc_auc(scores, positive)), float(low), float(high), average_precision(scores, positive))


def random_score(tokens: Tokens, *, n_directions: int = 50, seed: int = 0) -> Score:
    """What directions that know nothing reach: means over Gaussian ones, and the middle 95 % of their AUCs.

    One such direction may well have an AUC of .4 or .6, since activations lie along few directions.
    """
    drawn = np.random.default_rng(seed).standard_normal((n_directions, tokens.activations.shape[1]), np.float32)
    scores = drawn @ tokens.activations.T
    aucs = np.array([roc_auc(values, tokens.positive) for values in scores])
    if not np.isfinite(aucs).all():
        return Score(*[float("nan")] * 4)
    low, high = np.quantile(aucs, [0.025, 0.975])
    precision = np.mean([average_precision(values, tokens.positive) for values in scores])
    return Score(float(aucs.mean()), float(low), float(high), float(precision))


def folds(problems: Sequence[str], n_folds: int, seed: int = 0) -> np.ndarray:
    """[n] int: the fold of each entry, all entries of a problem in one; folds differ by at most one problem."""
    names, group = np.unique(np.asarray(problems, str), return_inverse=True)
    shuffled = np.random.default_rng(seed).permutation(len(names))
    return (shuffled % n_folds)[group]


def direction_scores(
    tokens: Tokens,
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


def logistic_scores(tokens: Tokens, fold: np.ndarray, *, strength: float = 1e-2) -> np.ndarray:
    """Log-odds by a logistic regression on standardised activations, fitted on the other folds' problems.

    Args:
      tokens: N tokens.
      fold: [n] int, fold of each trace.
      strength: inverse of the L2 penalty (scikit-learn's C).

    Returns:
      [N] float64; nan where the other folds hold tokens of one kind only.
    """
    # Here, since it takes a second that a plan or a later stage should not wait for.
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
