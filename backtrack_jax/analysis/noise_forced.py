"""Given texts under noise: log-odds, entropy and components along the vector, and components changed between two runs.

Every function reads rows of texts, each under the row of an intervention of its own, in batches of one program. The
component of the residual stream along a layer's own vector is taken inside the pass, so that no state is kept.
"""

import dataclasses
import math
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize

from backtrack_jax.analysis.forced import Batch, Forced, by_position, edited_batches, places_before
from backtrack_jax.analysis.statistics import NAN
from backtrack_jax.intervention import Intervention
from backtrack_jax.models.batching import bucket
from backtrack_jax.models.decoder import BlockOutput, Decoder
from backtrack_jax.models.sharding import place_rows

Found = list[tuple[int, dict[str, Any]]]
"""(row number, values by name) of the rows of a batch."""


@dataclasses.dataclass(frozen=True)
class Exchanged:
    """A text in whose run the components along some directions are set to those of another run.

    Attributes:
      text: what is read, under the row of the run itself.
      other: row of the run from which the components are taken, position by position; None to set them to 0.
      units: [L, D] float32, a direction of norm 1 for every layer; zero where nothing is set.
    """

    text: Forced
    other: Intervention | None
    units: np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SetComponents:
    """The `Edit` that sets components after every block, behind an intervention.

    Attributes:
      row: the intervention, of B rows.
      units: [B, L, D] float32, of norm 1; zero in layers where nothing is set.
      components: [L, B, T] float32, what the components are set to.
    """

    row: Intervention
    units: jax.Array
    components: jax.Array

    def check(self, n_rows: int, n_layers: int, d_model: int) -> None:
        """ValueError if it does not fit such a batch and model."""
        self.row.check(n_rows, n_layers, d_model)
        if self.units.shape != (n_rows, n_layers, d_model) or self.components.shape[:2] != (n_layers, n_rows):
            raise ValueError(
                f"units have shape {self.units.shape} and components {self.components.shape}, expected "
                f"{(n_rows, n_layers, d_model)} and {(n_layers, n_rows)} with positions behind"
            )

    def unresolved(self) -> jax.Array:
        """[B] bool, see `Intervention`."""
        return self.row.unresolved()

    def for_tokens(self, ids: jax.Array) -> "SetComponents":
        """See `Intervention`."""
        return dataclasses.replace(self, row=self.row.for_tokens(ids))

    def at_layers(self) -> Any:
        """What differs between layers, the layer axis first."""
        return self.row.at_layers(), jnp.moveaxis(self.units, 1, 0), self.components

    def apply(self, x: jax.Array, at_layer: Any, layer: jax.Array, positions: jax.Array) -> jax.Array:
        """[B, T, D]: after the intervention, each position's component is what it is set to."""
        inner, unit, component = at_layer
        x = self.row.apply(x, inner, layer, positions)
        missing = component - _along(x, unit)
        return x + missing[..., None] * unit[:, None]


def _along(x: jax.Array, unit: jax.Array) -> jax.Array:
    """Components [B, T] of x [B, T, D] along one direction a row, [B, D]."""
    return jnp.einsum("btd,bd->bt", x, unit, precision="highest")


def measure(
    model: Decoder,
    rows: Sequence[Forced],
    keyword_ids: Container[int],
    units: np.ndarray,
    *,
    layer: int,
    window: tuple[int, int],
    batch_size: int,
    done: Container[int] = (),
) -> Iterator[Found]:
    """Reads texts.

    Args:
      model: the model.
      rows: texts, each with at least one start.
      keyword_ids: ids of the tokens that are a keyword.
      units: [L, D] float32, directions of norm 1, of every layer.
      layer: block whose components are summed over a window.
      window: first and last offset from a sentence's first token.
      batch_size: rows of a batch.
      done: row numbers; batches of which all rows are in it are left out.

    Yields:
      Of every row `log_odds` in nats and `entropy` of the next token in nats, `components` (a list of L) at the token
      before the sentence and `sums` over the window before it, each a list with an entry for every start.

    Raises:
      FloatingPointError: names the row whose logits are not finite.
    """
    keyword = _mask(model, keyword_ids)
    everywhere = jnp.asarray(units, jnp.float32)
    for batch, at, n_starts in _batches(rows, [[row.intervention] for row in rows], batch_size, done):
        ends = np.array([window[0], window[1] + 1])
        bounds = np.clip(at[..., None] + 1 + ends, 0, batch.ids.shape[1]).astype(np.int32)
        placed = place_rows(model, (batch.ids, batch.positions, at, bounds, *batch.edits))
        found = [np.asarray(part, np.float64) for part in _measured(model, keyword, everywhere, layer, *placed)]
        values_of: Found = []
        for i, row in enumerate(batch.members):
            n = n_starts[i]
            odds, entropy, sums, components = found[0][i, :n], found[1][i, :n], found[2][i, :n], found[3][:, i, :n]
            if not np.isfinite(odds).all():
                raise FloatingPointError(f"logits of row {row} are not finite")
            values = {"log_odds": odds, "entropy": entropy, "components": components.T, "sums": sums}
            values_of.append((row, {name: np.round(value, 6).tolist() for name, value in values.items()}))
        yield values_of


@jax.jit
def _measured(
    model: Decoder,
    keyword: jax.Array,  # [V] bool
    units: jax.Array,  # [L, D]
    layer: jax.Array,
    ids: jax.Array,  # [B, T]
    positions: jax.Array,  # [B, T]
    at: jax.Array,  # [B, P] positions of the tokens before the starts
    bounds: jax.Array,  # [B, P, 2] first token of the window, and the one behind it
    edit: Intervention,
) -> tuple[jax.Array, ...]:
    """Log-odds, entropy, sums [B, P] and components [L, B, P]."""

    def capture(out: BlockOutput) -> jax.Array:
        return jnp.einsum("btd,d->bt", out.resid_post, units[out.layer], precision="highest")

    out = model(ids, positions, intervention=edit, capture=capture)
    odds, entropy = _of_states(model, keyword, jnp.take_along_axis(out.resid, at[..., None], axis=1), 1.0)
    totals = jnp.pad(jnp.cumsum(jnp.where(positions >= 0, out.captured[layer], 0.0), axis=1), ((0, 0), (1, 0)))
    first, last = (jnp.take_along_axis(totals, bounds[..., i], axis=1) for i in (0, 1))
    return odds, entropy, last - first, jnp.take_along_axis(out.captured, at[None], axis=2)


def exchange(
    model: Decoder,
    rows: Sequence[Exchanged],
    keyword_ids: Container[int],
    *,
    batch_size: int,
    done: Container[int] = (),
) -> Iterator[list[tuple[int, float]]]:
    """Mean log-odds of keywords, in nats, of texts in whose runs components are exchanged.

    Each row takes two passes: one that gives the components, and one in which they are set. Arguments are as in
    `measure`; yields (row number, value) after every batch.
    """
    keyword = _mask(model, keyword_ids)
    texts = [row.text for row in rows]
    pairs = [[row.text.intervention, row.other or row.text.intervention] for row in rows]
    for batch, at, n_starts in _batches(texts, pairs, batch_size, done):
        units = np.stack([rows[row].units for row in batch.filled]).astype(np.float32)
        taken = np.array([rows[row].other is not None for row in batch.filled], np.float32)
        placed = place_rows(model, (batch.ids, batch.positions, at, units, taken, *batch.edits))
        found = np.asarray(_exchanged(model, keyword, *placed), np.float64)
        if not np.isfinite(found[: len(batch.members)]).all():
            raise FloatingPointError(f"logits of a row among {batch.members} are not finite")
        yield [(row, float(found[i, : n_starts[i]].mean())) for i, row in enumerate(batch.members)]


@jax.jit
def _exchanged(
    model: Decoder,
    keyword: jax.Array,
    ids: jax.Array,
    positions: jax.Array,
    at: jax.Array,
    units: jax.Array,  # [B, L, D]
    taken: jax.Array,  # [B], 1 for the other run's components, 0 for none
    own: Intervention,
    other: Intervention,
) -> jax.Array:
    """Log-odds [B, P] of the run whose components are set."""

    def capture(out: BlockOutput) -> jax.Array:
        return _along(out.resid_post, jnp.take(units, out.layer, axis=1))

    components = model(ids, positions, intervention=other, capture=capture).captured * taken[:, None]
    x = model(ids, positions, intervention=SetComponents(own, units, components)).resid
    return _of_states(model, keyword, jnp.take_along_axis(x, at[..., None], axis=1), 1.0)[0]


def states(model: Decoder, rows: Sequence[Forced], *, batch_size: int) -> list[np.ndarray]:
    """The last residual stream before every start of each row, [starts, D] float32, in the order of the rows."""
    found: dict[int, np.ndarray] = {}
    for batch, at, n_starts in _batches(rows, [[row.intervention] for row in rows], batch_size, ()):
        x = np.asarray(_last(model, *place_rows(model, (batch.ids, batch.positions, at, *batch.edits))))
        found |= {row: x[i, : n_starts[i]] for i, row in enumerate(batch.members)}
    return [found[row] for row in range(len(rows))]


@jax.jit
def _last(model: Decoder, ids: jax.Array, positions: jax.Array, at: jax.Array, edit: Intervention) -> jax.Array:
    return jnp.take_along_axis(model(ids, positions, intervention=edit).resid, at[..., None], axis=1)


def at_temperature(
    model: Decoder, x: Sequence[np.ndarray], keyword_ids: Container[int], temperature: float
) -> np.ndarray:
    """Mean log-odds of keywords and mean entropy of the next token at a temperature, [2, rows], in nats.

    Args:
      model: the model.
      x: of each row [starts, D], see `states`.
      keyword_ids: ids of the tokens that are a keyword.
      temperature: by which logits are divided, > 0.
    """
    counts = [len(of_row) for of_row in x]
    stacked = jnp.asarray(np.concatenate(x))[None]
    odds, entropy = _tempered(model, _mask(model, keyword_ids), stacked, jnp.float32(temperature))
    splits = np.cumsum(counts)[:-1]
    return np.array(
        [[part.mean() for part in np.split(np.asarray(of, np.float64)[0], splits)] for of in (odds, entropy)]
    )


@jax.jit
def _tempered(model: Decoder, keyword: jax.Array, x: jax.Array, temperature: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _of_states(model, keyword, x, temperature)


def _of_states(
    model: Decoder, keyword: jax.Array, x: jax.Array, temperature: jax.Array | float
) -> tuple[jax.Array, jax.Array]:
    """Log-odds of a keyword and entropy of the next token, in nats, after states [B, P, D]: [B, P] each."""

    def of_position(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = model.logits(x) / temperature
        yes, no = (jax.nn.logsumexp(logits, axis=-1, where=where) for where in (keyword, ~keyword))
        p = jax.nn.log_softmax(logits, axis=-1)
        # A token that a model never says may have the logit -inf.
        return yes - no, -jnp.sum(jnp.where(p > -jnp.inf, jnp.exp(p) * p, 0.0), axis=-1)

    return by_position(of_position, x, model.config.vocab_size)


def matching_temperature(entropy_at: Callable[[float], float], target: float) -> float:
    """The temperature between 1/20 and 20 at which an entropy, which rises with it, is a given one; NaN if none is."""
    low, high = -math.log(20), math.log(20)

    def excess(log_temperature: float) -> float:
        return entropy_at(math.exp(log_temperature)) - target

    if not math.isfinite(target) or excess(low) > 0 or excess(high) < 0:
        return NAN
    return math.exp(optimize.root_scalar(excess, bracket=(low, high), method="bisect", xtol=1e-4).root)


def _mask(model: Decoder, keyword_ids: Container[int]) -> jax.Array:
    return jnp.asarray([i in keyword_ids for i in range(model.config.vocab_size)])


def _batches(
    texts: Sequence[Forced], edits: Sequence[Sequence[Intervention]], batch_size: int, done: Container[int]
) -> Iterator[tuple[Batch, np.ndarray, np.ndarray]]:
    """Batches, with the positions of the tokens before the starts [B, P], and how many starts each row has [B]."""
    width = bucket(max((len(text.starts) for text in texts), default=1), 4)
    lengths = [text.prompt_length for text in texts]
    for batch in edited_batches([text.ids for text in texts], lengths, edits, batch_size, done):
        at, counted = places_before([texts[row].starts for row in batch.filled], width)
        yield batch, at, counted.sum(1)
