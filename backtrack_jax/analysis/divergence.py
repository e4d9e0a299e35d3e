"""How far an edit moves a model's predictions: Kullback-Leibler divergence per token on given text.

    KL = mean over the tokens of a reply of sum_w p(w) (log p(w) - log q(w)),  p unsteered, q steered           [nats]

On text that the unsteered model wrote this estimates the divergence of whole replies, divided by their length, without
the noise of steered replies: both read the same tokens.
"""

import math
from collections.abc import Container, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from backtrack_jax.analysis.coherence import logits_at_once
from backtrack_jax.intervention import Intervention, stack_rows, with_same_terms
from backtrack_jax.models.batching import batches, check_ids, right_pad
from backtrack_jax.models.decoder import Decoder
from backtrack_jax.models.sharding import place_rows


def kl_per_token(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    replies: Sequence[Sequence[int]],
    interventions: Sequence[Intervention],
    *,
    batch_size: int,
    done: Container[int] = (),
) -> Iterator[list[tuple[int, float]]]:
    """Mean over reply tokens of the divergence of the steered from the unsteered prediction, in nats.

    Args:
      model: the model, without any intervention of its own.
      prompts: token ids of each row, BOS included.
      replies: ids of what the unsteered model answered, a stop token included.
      interventions: one row each; spans are resolved with the length of the prompt.
      batch_size: rows of a batch; rows of similar length share one.
      done: row numbers; batches of which all rows are in it are left out.

    Yields:
      After every batch, (row number, nats per token); nan for an empty reply.

    Raises:
      ValueError: names the row with a token that the model does not know.
      FloatingPointError: names the row whose logits are not finite.
    """
    sequences = [[*prompt, *reply] for prompt, reply in zip(prompts, replies, strict=True)]
    for row, sequence in enumerate(sequences):
        check_ids(sequence, model.config.vocab_size, f"row {row}")
    noisy = np.array([any(term.draws for term in row.terms) for row in interventions], bool)
    # Apart, since in a batch with noise it is drawn for every row, which takes longer than a small model.
    for own in (np.flatnonzero(~noisy).tolist(), np.flatnonzero(noisy).tolist()):
        edits = dict(zip(own, with_same_terms([interventions[row] for row in own]) if own else [], strict=True))
        for padded, places in batches([len(sequences[row]) for row in own], batch_size):
            members = [own[place] for place in places]
            if all(row in done for row in members):
                continue
            filled = members + [members[-1]] * (batch_size - len(members))
            ids, positions = right_pad([sequences[row] for row in filled], padded)
            starts = np.array([len(prompts[row]) for row in filled], np.int32)
            intervention = stack_rows([edits[row] for row in filled]).resolve(jnp.asarray(starts))
            placed = place_rows(model, (ids, positions, starts, intervention))
            sums = np.asarray(_divergence_sums(model, *placed), np.float64)[: len(members)]
            if bad := [row for row, value in zip(members, sums, strict=True) if not math.isfinite(value)]:
                raise FloatingPointError(f"logits of row {bad[0]} are not finite")
            lengths = np.array([len(replies[row]) for row in members])
            means = np.divide(sums, lengths, out=np.full(len(members), np.nan), where=lengths > 0)
            yield list(zip(members, means.tolist(), strict=True))


@jax.jit
def _divergence_sums(
    model: Decoder,
    ids: jax.Array,  # [B, T]
    positions: jax.Array,  # [B, T]
    starts: jax.Array,  # [B]
    intervention: Intervention,
) -> jax.Array:
    """Sum of the divergence of the predictions of the tokens at `starts` and after, [B] float32."""
    plain = model(ids, positions).resid
    steered = model(ids, positions, intervention=intervention).resid
    counted = jnp.pad((positions >= starts[:, None])[:, 1:], ((0, 0), (0, 1)))

    def of_position(at: tuple[jax.Array, ...]) -> jax.Array:
        x, y, count = at
        p, q = (jax.nn.log_softmax(model.logits(resid), axis=-1) for resid in (x, y))
        return jnp.where(count, jnp.sum(jnp.exp(p) * (p - q), axis=-1), 0.0)

    # Some positions of all rows at a time, and not some rows: those may be spread over devices. Two models' logits.
    most = max(1, logits_at_once(len(ids), model.config.vocab_size) // (2 * len(ids) * model.config.vocab_size))
    at_once = math.gcd(ids.shape[1], 1 << (most.bit_length() - 1))  # nothing is left over, which would be a second loop
    by_position = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), (plain, steered, counted))
    return jnp.sum(lax.map(of_position, by_position, batch_size=at_once), axis=0)
