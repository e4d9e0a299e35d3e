"""The logit lens (Eq. 2, Fig. 5): which words does a direction of the residual stream spell?

    s(v) = (W_U v) . a / |a|_1                                                                                 (Eq. 2)

a selects the vocabulary items whose text contains a keyword, so s is their mean logit under the unembedding W_U, with v
as it was found. With the final norm in between, as a residual stream passes it, the length of v does not matter.

{role}.lens.csv        score, and others, the mean logit of all other items; z, their difference in units of the spread
                       of single other items, which does not depend on the length of v either; without the final norm
                       and at the layers of `vectors.layers` its standard error over problems, a jackknife
{role}.lens_rise.csv   mean z of the last third of the layers less that of the first, of those layers that were kept
{role}.lens_tokens.csv items with the highest and lowest logits
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from backtrack_jax.analysis import by_problem
from backtrack_jax.analysis.base import Analysis, Material
from backtrack_jax.analysis.claims import Claim, measured
from backtrack_jax.analysis.dose import LEVEL
from backtrack_jax.analysis.plots import COLOURS, MARKERS, Panel, Plot, Series
from backtrack_jax.analysis.results import PAPER_LABEL, Results
from backtrack_jax.analysis.statistics import NAN, Region
from backtrack_jax.data.text import LENS_KEYWORDS
from backtrack_jax.files.tables import Table
from backtrack_jax.models.decoder import Decoder
from backtrack_jax.models.tokenizer import Tokenizer


class LogitLens(Analysis):
    """Vectors of every model through every model's unembedding, as in Eq. 2 and with the final norm."""

    name = "lens"
    version = 2
    of_replies = False
    settings = ("analysis.keywords",)
    role_tables = ("lens", "lens_rise", "lens_tokens")

    def of_role(self, material: Material, role: str, folder: Path) -> dict[str, Table]:
        """Through the unembedding of the model of a role."""
        e, tokenizer, model = material.experiment, material.tokenizer, material.model(role)
        n_items = min(tokenizer.vocab_size, model.config.vocab_size)  # markers may be beyond an embedding
        ids = [i for i in keyword_ids(tokenizer, e.analysis.keywords) if i < n_items]
        scores, rises, items = [], [], []
        for source in e.roles:
            kept = {layer: by_problem.of_label(material, source, e.vectors.label, layer) for layer in e.vectors.layers}
            z = {layer: z_scores(model, sums.vectors(), ids, n_items=n_items) for layer, sums in kept.items()}
            errors = {layer: by_problem.standard_error(values) for layer, values in z.items()}
            n = {layer: sums.n_problems for layer, sums in kept.items()}
            rises += _rise(source, role, z, n, model.config.n_layers)
            directions = material.vectors[source, e.vectors.label].directions
            for final_norm in (False, True):
                lens = logit_lens(model, directions, ids, n_items=n_items, final_norm=final_norm)
                key = {"source": source, "unembedding": role, "final_norm": int(final_norm)}
                known = {} if final_norm else errors
                for layer, (score, others, spread) in enumerate(zip(lens.score, lens.others, lens.spread, strict=True)):
                    line = {"layer": layer, "score": float(score), "others": float(others)}
                    line |= {"z": float((score - others) / spread) if spread else NAN, "z_error": known.get(layer, NAN)}
                    scores.append(key | line | {"n_problems": n[layer] if layer in known else 0})
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
        return {"lens": scores, "lens_rise": rises, "lens_tokens": items}

    def plots(self, r: Results) -> Sequence[Plot | None]:
        """Fig. 5."""
        return [by_layer(r)]

    def claims(self, r: Results) -> Sequence[Claim]:
        """That a base-derived vector does not spell the keywords, and a reasoning-derived one does in late layers."""
        made = {"base": _base_claim, "reasoning": _reasoning_claim}
        return [made[role](r) for role in r.roles]

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

_ROWS = 32
_SILENT = Region(high=1.0)
_RISES = Region(low=0.0)


def _rise(
    source: str, unembedding: str, z: Mapping[int, np.ndarray], n: Mapping[int, int], n_layers: int
) -> list[dict[str, Any]]:
    """Mean z of the last third of the layers less that of the first, [1 + P] each; no line where one was not kept."""
    first = [layer for layer in z if 3 * layer < n_layers]
    last = [layer for layer in z if 3 * layer >= 2 * n_layers]
    if not first or not last:
        return []
    rise = np.mean([z[layer] for layer in last], axis=0) - np.mean([z[layer] for layer in first], axis=0)
    layers = {"first": " ".join(map(str, first)), "last": " ".join(map(str, last))}
    measured = {"rise": float(rise[0]), "error": by_problem.standard_error(rise), "n_problems": min(n.values())}
    return [{"source": source, "unembedding": unembedding} | layers | measured]


def _base_claim(r: Results) -> Claim:
    """The largest abs(z) of the base-derived vector, through the base model's unembedding, over the layers kept."""
    lines = [
        line
        for line in r.tables["lens"]
        if (line["source"], line["unembedding"], line["final_norm"]) == ("base", "base", 0)
        and not math.isnan(line["z_error"])
        and 3 * line["layer"] < 2 * r.n_layers
    ]
    n, estimate, low, high = min((line["n_problems"] for line in lines), default=0), NAN, NAN, NAN
    if lines:
        # Below the true largest one if every layer's lower end is, which takes Bonferroni's level; above it if that
        # layer's own upper end is, which does not.
        estimate = max(abs(line["z"]) for line in lines)
        high = max(max(map(abs, by_problem.interval(line["z"], line["z_error"], n, LEVEL))) for line in lines)
        ends = [by_problem.interval(line["z"], line["z_error"], n, 1 - (1 - LEVEL) / len(lines)) for line in lines]
        low = max(max(0.0, a, -b) for a, b in ends)
    layers = ", ".join(str(line["layer"]) for line in lines)
    return measured(
        "lens_base",
        "Base-derived vectors of early and middle layers do not spell the keywords.",
        figure="fig5_logit_lens",
        where="Fig. 5",
        rule=f"the largest abs(z) of the layers in the first two thirds is below {_SILENT.high:g}, the spread of "
        "single other items",
        estimate=estimate,
        interval=(low, high),
        unit="abs(z), in spreads of single items",
        region=_SILENT,
        n=n,
        note=f"layers {layers} of {r.n_layers}" if lines else _not_kept(r),
    )


def _reasoning_claim(r: Results) -> Claim:
    """Rise of z of the reasoning-derived vector through the reasoning model's unembedding."""
    key = ("reasoning", "reasoning")
    line = next((x for x in r.tables["lens_rise"] if (x["source"], x["unembedding"]) == key), None)
    estimate, interval, n = NAN, (NAN, NAN), 0
    note = f"{_not_kept(r)}: it takes some of the first third and some of the last"
    if line:
        estimate, n, note = line["rise"], int(line["n_problems"]), f"layers {line['last']} against {line['first']}"
        interval = by_problem.interval(estimate, line["error"], n, LEVEL)
    return measured(
        "lens_reasoning",
        "A reasoning-derived vector spells the keywords more in late layers than in early ones.",
        figure="fig5_logit_lens",
        where="Fig. 5",
        rule="mean z of the last third of the layers less that of the first third is above 0",
        estimate=estimate,
        interval=interval,
        unit="z, in spreads of single items",
        region=_RISES,
        n=n,
        note=note,
    )


def _not_kept(r: Results) -> str:
    return f"vectors.layers={r.experiment.vectors.layers} keeps no means of sections of enough layers"


@dataclasses.dataclass(frozen=True)
class Lens:
    """What a vector spells at every layer.

    Attributes:
      score: [L] float64, s(v) of Eq. 2.
      others: [L] float64, mean logit of all other items that have a text, to read `score` against.
      spread: [L] float64, standard deviation of the logits of these.
      top: [L, n] int, ids of the highest logits, highest first.
      bottom: [L, n] int, ids of the lowest logits, lowest first.
      top_logits: [L, n] float32.
      bottom_logits: [L, n] float32.
    """

    score: np.ndarray
    others: np.ndarray
    spread: np.ndarray
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
        logits[:, ~selected].std(-1, dtype=np.float64),
        top,
        bottom,
        np.take_along_axis(logits, top, -1),
        np.take_along_axis(logits, bottom, -1),
    )


def z_scores(model: Decoder, directions: np.ndarray, ids: Sequence[int], *, n_items: int) -> np.ndarray:
    """Mean logit W_U v of some items above that of all others, in units of the spread of single ones: [N] float64.

    Logits are linear in v, and differences from the first direction are read by themselves, at length 1: so the
    rounding of 16-bit weights does not hide how little a direction changes without one problem.

    Args:
      model: whose unembedding is used.
      directions: [N, D], alike but for small differences.
      ids: the items.
      n_items: vocabulary items that have a text.
    """
    selected = np.zeros(n_items, bool)
    selected[list(ids)] = True
    steps = directions - directions[0]
    lengths = np.linalg.norm(steps, axis=-1)
    lengths[0], steps[0] = 1.0, directions[0]
    units = np.divide(steps, lengths[:, None], out=np.zeros_like(steps), where=lengths[:, None] > 0)
    at_first, found = np.zeros(n_items), []
    for start in range(0, len(units), _ROWS):
        rows = np.zeros((_ROWS, directions.shape[1]), np.float32)  # of one shape, so that it compiles once
        own = units[start : start + _ROWS]
        rows[: len(own)] = own
        logits = np.asarray(_logits(model, jnp.asarray(rows), False), np.float64)[: len(own), :n_items]
        logits *= lengths[start : start + _ROWS, None]
        if start == 0:
            at_first = logits[0].copy()
            logits[0] = 0
        logits += at_first
        score, others = logits[:, selected].mean(-1), logits[:, ~selected]
        with np.errstate(invalid="ignore", divide="ignore"):
            found.append((score - others.mean(-1)) / others.std(-1))
    return np.concatenate(found)


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
