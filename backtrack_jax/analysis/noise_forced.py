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
from jax import lax
from scipy import optimize

from backtrack_jax.analysis.coherence import logits_at_once
from backtrack_jax.analysis.log_odds import Forced
from backtrack_jax.analysis.statistics import NAN
from backtrack_jax.intervention import Intervention, stack_rows, with_same_terms
from backtrack_jax.models.batching import batches, bucket, right_pad
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
    for members, arrays, edits in _batches(rows, [[row.intervention] for row in rows], batch_size, done):
        ids, positions, at, n_starts, prompts = arrays
        bounds = np.clip(at[..., None] + 1 + np.array([window[0], window[1] + 1]), 0, ids.shape[1]).astype(np.int32)
        placed = place_rows(model, (ids, positions, at, bounds, edits[0].resolve(jnp.asarray(prompts))))
        found = [np.asarray(part, np.float64) for part in _measured(model, keyword, everywhere, layer, *placed)]
        batch: Found = []
        for i, row in enumerate(members):
            n = n_starts[i]
            odds, entropy, sums, components = found[0][i, :n], found[1][i, :n], found[2][i, :n], found[3][:, i, :n]
            if not np.isfinite(odds).all():
                raise FloatingPointError(f"logits of row {row} are not finite")
            values = {"log_odds": odds, "entropy": entropy, "components": components.T, "sums": sums}
            batch.append((row, {name: np.round(value, 6).tolist() for name, value in values.items()}))
        yield batch


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
    for members, arrays, edits in _batches(texts, pairs, batch_size, done):
        ids, positions, at, n_starts, prompts = arrays
        own, other = (edit.resolve(jnp.asarray(prompts)) for edit in edits)
        filled = [*members, *[members[-1]] * (len(ids) - len(members))]
        units = np.stack([rows[row].units for row in filled]).astype(np.float32)
        taken = np.array([rows[row].other is not None for row in filled], np.float32)
        placed = place_rows(model, (ids, positions, at, units, taken, own, other))
        found = np.asarray(_exchanged(model, keyword, *placed), np.float64)
        if not np.isfinite(found[: len(members)]).all():
            raise FloatingPointError(f"logits of a row among {members} are not finite")
        yield [(row, float(found[i, : n_starts[i]].mean())) for i, row in enumerate(members)]


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
    for members, arrays, edits in _batches(rows, [[row.intervention] for row in rows], batch_size, ()):
        ids, positions, at, n_starts, prompts = arrays
        placed = place_rows(model, (ids, positions, at, edits[0].resolve(jnp.asarray(prompts))))
        x = np.asarray(_last(model, *placed))
        found |= {row: x[i, : n_starts[i]] for i, row in enumerate(members)}
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

    B, P, _ = x.shape
    most = max(1, logits_at_once(B, model.config.vocab_size) // (B * model.config.vocab_size))
    at_once = math.gcd(P, 1 << (most.bit_length() - 1))  # nothing is left over, which would be a second loop
    # Some positions of all rows at a time, and not some rows: those may be spread over devices.
    found = lax.map(of_position, jnp.swapaxes(x, 0, 1), batch_size=at_once)
    return jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), found)


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
) -> Iterator[tuple[list[int], tuple[np.ndarray, ...], list[Intervention]]]:
    """Row numbers, (ids, positions, places, numbers of starts, prompt lengths) and interventions of each batch.

    Rows whose noise is of one kind share a batch: what one row draws is drawn for all rows of its batch.
    """
    kinds: dict[tuple[str, ...], list[int]] = {}
    for row, own in enumerate(edits):
        drawn = {type(term).__name__ for edit in own for term in edit.terms if term.draws}
        kinds.setdefault(tuple(sorted(drawn)), []).append(row)
    width = bucket(max((len(text.starts) for text in texts), default=1), 4)
    for members in kinds.values():
        alike = with_same_terms([edit for row in members for edit in edits[row]])
        n = len(edits[members[0]])
        of_row = {row: alike[n * i : n * i + n] for i, row in enumerate(members)}
        for padded, numbers in batches([len(texts[row].ids) for row in members], batch_size):
            own = [members[number] for number in numbers]
            if all(row in done for row in own):
                continue
            filled = [*own, *[own[-1]] * (batch_size - len(own))]
            ids, positions = right_pad([texts[row].ids for row in filled], padded)
            at = np.zeros((len(filled), width), np.int32)
            for i, row in enumerate(filled):
                at[i, : len(texts[row].starts)] = np.asarray(texts[row].starts) - 1
            n_starts = np.array([len(texts[row].starts) for row in filled])
            prompts = np.array([texts[row].prompt_length for row in filled], np.int32)
            stacked = [stack_rows([of_row[row][i] for row in filled]) for i in range(n)]
            yield own, (ids, positions, at, n_starts, prompts), stacked
