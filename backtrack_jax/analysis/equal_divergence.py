"""Lengths at which edits move a model's predictions equally far: `steering.unit="kl"`.

A magnitude of that unit is what steering costs in nats per token, as `divergence` measures it, on given text of
problems that are not steered. The sign of a magnitude is that of the direction. Two directions at one magnitude then
disturb the model equally, however much of the residual stream's norm either takes.
"""

from collections.abc import Callable, Sequence

import numpy as np
from scipy.optimize import elementwise

from backtrack_jax.analysis import divergence
from backtrack_jax.intervention import Intervention
from backtrack_jax.models.decoder import Decoder

TOLERANCE = 0.02
"""How far from the wanted divergence a length may end, as a share of it."""

TEXTS = 16
"""Texts that a divergence is a mean over, at most."""

_SHORTEST, _LONGEST = 1e-4, 1e3  # of what is added, in mean residual norms


def lengths(
    model: Decoder,
    texts: Sequence[tuple[Sequence[int], int]],
    row: Callable[[int, float, int], Intervention],
    wanted: Sequence[float],
    scales: Sequence[float],
    names: Sequence[str],
    *,
    batch_size: int,
) -> tuple[np.ndarray, np.ndarray]:
    """The length of each of n edits at which its divergence, a mean over texts, is the wanted one.

    Args:
      model: the model that is steered.
      texts: token ids of prompt and text, BOS included, and how many of them are the prompt's.
      row: number of an edit, length, number of a text -> the edit at that length, for that text.
      wanted: |magnitude| of each edit in nats per token, > 0; a text counts as much as any other.
      scales: of each edit a length, with its sign, such as the mean residual norm; what is looked for lies within
        1e-4 and 1e3 of it.
      names: of the edits, for messages.
      batch_size: rows of a batch.

    Returns:
      Lengths [n] with the sign of `scales`, and the divergences [n] there, within `TOLERANCE` of `wanted`.

    Raises:
      ValueError: names an edit that no length makes cost so much, or so little.
    """
    targets, units = np.asarray(wanted, float), np.asarray(scales, float)
    prompts = [ids[:start] for ids, start in texts]
    replies = [ids[start:] for ids, start in texts]

    def measured(edits: np.ndarray, at: np.ndarray) -> np.ndarray:
        """Divergence [m] of some of the edits, at lengths `exp(at)` times their scales."""
        pairs = [
            (i, float(length), j) for i, length in zip(edits, units[edits] * np.exp(at), strict=True) for j in each
        ]
        found: dict[int, float] = {}
        for batch in divergence.kl_per_token(
            model,
            [prompts[j] for _, _, j in pairs],
            [replies[j] for _, _, j in pairs],
            [row(int(i), length, j) for i, length, j in pairs],
            batch_size=batch_size,
        ):
            found.update(batch)
        return np.array([found[k] for k in range(len(pairs))]).reshape(len(at), len(texts)).mean(axis=1)

    def error(at: np.ndarray, edits: np.ndarray) -> np.ndarray:
        """Logarithm of the share of the wanted divergence, whatever the shape."""
        at, edits = np.broadcast_arrays(at, edits)
        kl = measured(edits.ravel(), at.ravel())
        return (np.log(np.maximum(kl, 1e-30)) - np.log(targets[edits.ravel()])).reshape(at.shape)

    each, n = range(len(texts)), np.arange(len(targets))
    ends = np.log(_SHORTEST), np.log(_LONGEST)
    first = np.full(len(n), np.log(0.1))
    near = np.clip(first - error(first, n) / 2, ends[0] + 0.2, ends[1] - 0.2)  # small steps cost their square
    # The brackets grow from there; where nothing is found before the longest, no length does it.
    bracket = elementwise.bracket_root(error, near - 0.1, near + 0.1, xmin=ends[0], xmax=ends[1], args=(n,))
    for i in np.flatnonzero(~bracket.success).tolist():
        low, high = (float(np.exp(end)[i] * targets[i]) for end in bracket.f_bracket)
        raise ValueError(
            f"steering.unit='kl': {names[i]} costs between {min(low, high):.3g} and {max(low, high):.3g} nats per "
            f"token at the lengths that were tried, never {targets[i]:g}; choose another magnitude"
        )
    root = elementwise.find_root(error, bracket.bracket, args=(n,), tolerances={"fatol": TOLERANCE / 2, "frtol": 0.0})
    for i in np.flatnonzero(np.abs(root.f_x) > TOLERANCE).tolist():
        raise ValueError(
            f"steering.unit='kl': {names[i]} costs {np.exp(root.f_x[i]) * targets[i]:.3g} nats per token where "
            f"{targets[i]:g} are wanted, and does not change steadily with its length"
        )
    return units * np.exp(root.x), targets * np.exp(root.f_x)
