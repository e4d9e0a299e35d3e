"""The logit lens (Eq. 2, Fig. 5): which words does a direction of the residual stream spell?

    s(v) = (W_U v) . a / |a|_1                                                                                 (Eq. 2)

a selects the vocabulary items whose text contains a keyword, so s is their mean logit under the unembedding W_U, with v
as it was found. With the final norm in between, as a residual stream passes it, the length of v does not matter.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from backtrack_jax.analysis.base import Analysis, Material
from backtrack_jax.analysis.plots import COLOURS, MARKERS, Panel, Plot, Series
from backtrack_jax.analysis.results import PAPER_LABEL, Results
from backtrack_jax.data.text import LENS_KEYWORDS
from backtrack_jax.files.tables import Table
from backtrack_jax.models.decoder import Decoder
from backtrack_jax.models.tokenizer import Tokenizer


class LogitLens(Analysis):
    """Vectors of every model through every model's unembedding, as in Eq. 2 and with the final norm."""

    name = "lens"
    of_replies = False
    settings = ("analysis.keywords",)
    role_tables = ("lens", "lens_tokens")

    def of_role(self, material: Material, role: str, folder: Path) -> dict[str, Table]:
        """Through the unembedding of the model of a role."""
        e, tokenizer, model = material.experiment, material.tokenizer, material.model(role)
        n_items = min(tokenizer.vocab_size, model.config.vocab_size)  # markers may be beyond an embedding
        ids = [i for i in keyword_ids(tokenizer, e.analysis.keywords) if i < n_items]
        scores, items = [], []
        for source in e.roles:
            directions = material.vectors[source, e.vectors.label].directions
            for final_norm in (False, True):
                lens = logit_lens(model, directions, ids, n_items=n_items, final_norm=final_norm)
                key = {"source": source, "unembedding": role, "final_norm": int(final_norm)}
                for layer, (score, others) in enumerate(zip(lens.score, lens.others, strict=True)):
                    scores.append(key | {"layer": layer, "score": float(score), "others": float(others)})
                for side, found, logits in (
                    ("top", lens.top, lens.top_logits),
                    ("bottom", lens.bottom, lens.bottom_logits),
                ):
                    items += [
                        key
                        | {"layer": layer, "side": side, "rank": rank, "token": int(token), "logit": float(logit)}
                        | {"text": tokenizer.decode([int(token)])}
                        for layer in range(len(found))
                        for rank, (token, logit) in enumerate(zip(found[layer], logits[layer], strict=True))
                    ]
        return {"lens": scores, "lens_tokens": items}

    def plots(self, r: Results) -> Sequence[Plot | None]:
        """Fig. 5."""
        return [by_layer(r)]

    def reference(self, r: Results) -> dict[str, str]:
        """The base-derived vector through its own unembedding, at the steered and at the last layer."""
        key = ("base", "base", 0)
        scores = {
            line["layer"]: line["score"]
            for line in r.tables["lens"]
            if (line["source"], line["unembedding"], line["final_norm"]) == key
        }
        if not scores or r.label != PAPER_LABEL:
            return {}
        last = max(scores)
        return {"lens": f"{scores[r.layer]:.3g} at layer {r.layer}, {scores[last]:.3g} at layer {last}"}


LOGIT_LENS = LogitLens()


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


def keyword_ids(tokenizer: Tokenizer, keywords: Sequence[str] = LENS_KEYWORDS) -> list[int]:
    """Ids whose decoded text contains a keyword, case-insensitively: ` Wait`, `waiting`, `button`, ...

    Raises:
      ValueError: no token does, or the keywords are not a sequence of words.
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
      ValueError: the words are not a sequence of words.
    """
    folded = _folded("words", words)
    return frozenset(i for i in range(tokenizer.vocab_size) if tokenizer.decode([i]).strip().casefold() in folded)


def _folded(what: str, words: Sequence[str]) -> list[str]:
    """The words without their case; ValueError for a bare string, which would be read as letters, and for no text."""
    if isinstance(words, str) or not words or not all(isinstance(word, str) and word for word in words):
        raise ValueError(
            f"{what}={words!r}: expected a list of words, none of them empty, such as {list(LENS_KEYWORDS)}"
        )
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
      ValueError: directions that are not an array, not of the model's width, or not finite; no ids, or ids that
        are not items; n_top < 1.
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


def by_layer(r: Results) -> Plot:
    """Fig. 5: mean logit of the keyword items of each layer's vector, Eq. 2, through either unembedding."""
    table = r.tables["lens"]
    panels = []
    for final_norm, title in ((0, "W_U v (Eq. 2)"), (1, "with the final norm")):
        series = []
        for source in r.roles:
            for head in r.roles:
                key = (source, head, final_norm)
                own = [x for x in table if (x["source"], x["unembedding"], x["final_norm"]) == key]
                series.append(
                    Series(
                        f"{source}-derived, {head} unembedding",
                        [line["layer"] for line in own],
                        [line["score"] for line in own],
                        colour=COLOURS[r.roles.index(source)],
                        style="-" if head == "base" else "--",
                        marker=MARKERS[r.roles.index(source)],
                    )
                )
        panels.append(Panel(title, "layer", "mean logit of the keywords", series, level=0.0, whole=True))
    words = ", ".join(f'"{word}"' for word in r.experiment.analysis.keywords)
    caption = (
        f"Mean logit of vocabulary items whose text contains {words} (any case) for the {r.label} vector of each "
        f"layer, as found (not normalised), window {r.window}. The final norm takes the vector's length away."
    )
    return Plot("fig5_logit_lens", "Fig. 5: logit lens", caption, [panels], table, place=5)
