"""The logit lens (Eq. 2, Fig. 5): which words does a direction of the residual stream spell?

    s(v) = (W_U v) . a / |a|_1                                                                                 (Eq. 2)

a selects the vocabulary items whose text contains a keyword, so s is their mean logit under the unembedding W_U, with v
as it was found. With the final norm in between, as a residual stream passes it, the length of v does not matter.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from backtrack_jax.models.decoder import Decoder
from backtrack_jax.models.tokenizer import Tokenizer

KEYWORDS = ("wait", "but")
"""The keywords of Eq. 2; a token counts if its text contains one of them, whatever its case."""


@dataclasses.dataclass(frozen=True)
class Lens:
    """What a vector spells at every layer.

    Attributes:
      score: [L] float64, s(v) of Eq. 2.
      others: [L] float64, mean logit of all other items that have a text, to read `score` against.
      top: [L, n] int, ids of the highest logits, highest first.
      bottom: [L, n] int, ids of the lowest logits, lowest first.
      top_logits: [L, n] float32.
      bottom_logits: [L, n] float32.
    """

    score: np.ndarray
    others: np.ndarray
    top: np.ndarray
    bottom: np.ndarray
    top_logits: np.ndarray
    bottom_logits: np.ndarray


def keyword_ids(tokenizer: Tokenizer, keywords: Sequence[str] = KEYWORDS) -> list[int]:
    """Ids whose decoded text contains a keyword, case-insensitively: ` Wait`, `waiting`, `button`, ...

    Raises:
      ValueError: no token does, or the keywords are no sequence of words.
    """
    folded = _folded("keywords", keywords)
    texts = (tokenizer.decode([i]).casefold() for i in range(tokenizer.vocab_size))
    found = [i for i, text in enumerate(texts) if any(keyword in text for keyword in folded)]
    if not found:
        raise ValueError(f"{tokenizer.name}: no token contains any of {', '.join(keywords)}")
    return found


def word_ids(tokenizer: Tokenizer, words: Sequence[str]) -> frozenset[int]:
    """Ids whose text is one of the words, whatever its case and the white space around it.

    Raises:
      ValueError: the words are no sequence of words.
    """
    folded = _folded("words", words)
    return frozenset(i for i in range(tokenizer.vocab_size) if tokenizer.decode([i]).strip().casefold() in folded)


def _folded(what: str, words: Sequence[str]) -> list[str]:
    """The words without their case; ValueError for a bare string, which would be read as letters, and for no text."""
    if isinstance(words, str) or not words or not all(isinstance(word, str) and word for word in words):
        raise ValueError(f"{what}={words!r}: expected a list of words, none of them empty, such as {list(KEYWORDS)}")
    return [word.casefold() for word in words]


def logit_lens(
    model: Decoder,
    directions: np.ndarray,
    ids: Sequence[int],
    *,
    n_items: int,
    final_norm: bool = False,
    n_top: int = 10,
) -> Lens:
    """Reads directions through a model's unembedding.

    Args:
      model: whose unembedding (and final norm) is used; not necessarily the model that the directions come from.
      directions: [L, D] float32, one per layer, as found: `directions` of a `SteeringVector`.
      ids: the items that `a` selects, see `keyword_ids`.
      n_items: vocabulary items that have a text; an embedding may have more rows, which are left out.
      final_norm: whether the final norm stands in between; Eq. 2 has none.
      n_top: how many top and bottom items are kept, at least 1.

    Returns:
      Scores and items.

    Raises:
      ValueError: directions that are no array, of another width than the model's, or not finite; no ids, or ids that
        are no items; n_top < 1.
    """
    if not isinstance(directions, np.ndarray | jax.Array):
        raise ValueError(f"directions: expected an array [n_layers, d_model], got a {type(directions).__name__}")
    if directions.ndim != 2 or directions.shape[1] != model.config.d_model:
        raise ValueError(f"directions have shape {directions.shape}, expected [n_layers, {model.config.d_model}]")
    if not np.isfinite(directions).all():
        raise ValueError("a direction is not finite")
    if not len(ids):
        raise ValueError(f"ids={ids!r}: expected at least one vocabulary item")
    if beyond := [i for i in ids if not 0 <= i < n_items]:
        raise ValueError(f"ids: {beyond[0]} is outside 0..{n_items - 1}")
    if n_top < 1:
        raise ValueError(f"n_top={n_top}: expected at least 1")
    selected = np.zeros(n_items, bool)
    selected[list(ids)] = True
    logits = np.asarray(_logits(model, jnp.asarray(directions), final_norm))[:, :n_items]
    order = np.argsort(logits, axis=-1, kind="stable")
    bottom, top = order[:, :n_top], order[:, ::-1][:, :n_top]
    return Lens(
        logits[:, selected].mean(-1, dtype=np.float64),
        logits[:, ~selected].mean(-1, dtype=np.float64),
        top,
        bottom,
        np.take_along_axis(logits, top, -1),
        np.take_along_axis(logits, bottom, -1),
    )


@jax.jit(static_argnums=2)
def _logits(model: Decoder, directions: jax.Array, final_norm: bool) -> jax.Array:
    return model.logits(directions) if final_norm else model.unembed(directions)
