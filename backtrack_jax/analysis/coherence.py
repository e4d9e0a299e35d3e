"""How likely the unsteered model finds a steered reply: one of the measures that tell steering from breaking.

Text that falls apart is unlikely; text that repeats itself is likely, so repetition is reported beside it. Mean
log-likelihood per token, in nats, at temperature 1 and without top-p, whatever the reply was sampled with.
"""

from collections.abc import Container, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from backtrack_jax.analysis.forced import by_position
from backtrack_jax.models.batching import batches, check_ids, right_pad
from backtrack_jax.models.decoder import Decoder
from backtrack_jax.models.sharding import place_rows


def log_likelihoods(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    replies: Sequence[Sequence[int]],
    *,
    batch_size: int,
    done: Container[int] = (),
) -> Iterator[list[tuple[int, float]]]:
    """Mean log-likelihood per token of replies given their prompts, without any intervention.

    Args:
      model: the unsteered model.
      prompts: token ids, BOS included.
      replies: generated ids, a stop token included.
      batch_size: rows of a batch; rows of similar length share one.
      done: row numbers; batches of which all rows are in it are left out.

    Yields:
      After every batch, (row number, mean log-likelihood in nats per token); nan for an empty reply.

    Raises:
      ValueError: names the row with a token that the model does not know.
    """
    sequences = [[*prompt, *reply] for prompt, reply in zip(prompts, replies, strict=True)]
    for row, sequence in enumerate(sequences):
        check_ids(sequence, model.config.vocab_size, f"row {row}")
    for padded, members in batches([len(sequence) for sequence in sequences], batch_size):
        if all(row in done for row in members):
            continue
        filled = members + [members[-1]] * (batch_size - len(members))
        ids, positions = right_pad([sequences[row] for row in filled], padded)
        starts = np.array([len(prompts[row]) for row in filled])
        sums = np.asarray(_reply_sums(model, *place_rows(model, (ids, positions, starts))), np.float64)
        lengths = np.array([len(replies[row]) for row in members])
        means = np.divide(sums[: len(members)], lengths, out=np.full(len(members), np.nan), where=lengths > 0)
        yield list(zip(members, means.tolist(), strict=True))


@jax.jit
def _reply_sums(model: Decoder, ids: jax.Array, positions: jax.Array, starts: jax.Array) -> jax.Array:
    """Sum of the log-probabilities of the tokens at `starts` [B] and after, [B] float32."""
    resid = model(ids, positions).resid
    counted = jnp.pad((positions >= starts[:, None])[:, 1:], ((0, 0), (0, 1)))
    targets = jnp.roll(ids, -1, axis=1)

    def of_position(at: tuple[jax.Array, ...]) -> jax.Array:
        x, target, count = at
        logits = model.logits(x)
        chosen = jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
        return jnp.where(count, chosen - jax.nn.logsumexp(logits, axis=-1), 0.0)

    return jnp.sum(by_position(of_position, (resid, targets, counted), model.config.vocab_size), axis=1)
