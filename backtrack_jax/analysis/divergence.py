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

from backtrack_jax.analysis.forced import by_position, edited_batches
from backtrack_jax.intervention import Intervention
from backtrack_jax.models.batching import check_ids
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
    lengths = [len(prompt) for prompt in prompts]
    for batch in edited_batches(sequences, lengths, [[row] for row in interventions], batch_size, done):
        starts = np.array([lengths[row] for row in batch.filled], np.int32)
        placed = place_rows(model, (batch.ids, batch.positions, starts, *batch.edits))
        n = len(batch.members)
        sums = np.asarray(_divergence_sums(model, *placed), np.float64)[:n]
        if bad := [row for row, value in zip(batch.members, sums, strict=True) if not math.isfinite(value)]:
            raise FloatingPointError(f"logits of row {bad[0]} are not finite")
        counts = np.array([len(replies[row]) for row in batch.members])
        means = np.divide(sums, counts, out=np.full(n, np.nan), where=counts > 0)
        yield list(zip(batch.members, means.tolist(), strict=True))


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

    found = by_position(of_position, (plain, steered, counted), model.config.vocab_size, copies=2)
    return jnp.sum(found, axis=1)
