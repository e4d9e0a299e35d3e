"""The exact belief about the hidden register: the Bayesian filter of the grammar, token by token."""

from collections.abc import Sequence

import numpy as np

from backtrack_jax.organism.grammar import BACKTRACKS, CONTINUATIONS, OPENINGS, Process, Template


def log_odds(tokens: Sequence[str], process: Process) -> np.ndarray:
    """Log-odds that the sentence a token stands in is shaky, given the reply up to and including that token.

    The forward algorithm over hidden states, with one hypothesis per sentence template that the words so far allow.

    Args:
      tokens: words and marks of a reply's sentences from its first one on, as `grammar.split_tokens` gives them.
      process: what wrote the reply.

    Returns:
      [n] float64. NaN from the first token on that the process cannot have written there.
    """
    out = np.full(len(tokens), np.nan)
    states = np.zeros(process.n_states)
    states[:2] = 1 - process.start_shaky, process.start_shaky
    hypotheses = [(template, template.weight * states) for template in OPENINGS]
    place = 0  # in the sentence
    for t, token in enumerate(tokens):
        hypotheses = [(template, w * _emission(template, place, token, len(w))) for template, w in hypotheses]
        hypotheses = [(template, w) for template, w in hypotheses if w.any()]
        if not hypotheses:
            break
        states = np.sum([w for _, w in hypotheses], axis=0)
        scale = states.sum()
        states = states / scale
        out[t] = np.log(states[1:].sum()) - np.log(states[0]) if states[1:].any() else -np.inf
        place += 1
        ended = [w for template, w in hypotheses if len(template.elements) == place]
        if ended:  # all of them: no sentence is the beginning of another
            hypotheses, place = _next_sentence(np.sum(ended, axis=0) / scale, process), 0
        else:
            hypotheses = [(template, w / scale) for template, w in hypotheses]
    return out


def _emission(template: Template, place: int, token: str, n_states: int) -> np.ndarray:
    """Likelihood of a token per state: the first is sure, all others are shaky."""
    sure, shaky = template.likelihood(place, token)
    return np.array([sure] + [shaky] * (n_states - 1))


def _next_sentence(states: np.ndarray, process: Process) -> list[tuple[Template, np.ndarray]]:
    """Joint weights of template and state for the sentence after one that ended in `states`."""
    going_on, back = np.zeros_like(states), np.zeros_like(states)
    for state, weight in enumerate(states):
        chance = process.backtracks(state)
        back[0] += weight * chance
        for new, p in process.moves(state).items():
            going_on[new] += weight * (1 - chance) * p
    return [(t, t.weight * going_on) for t in CONTINUATIONS] + [(t, t.weight * back) for t in BACKTRACKS]
