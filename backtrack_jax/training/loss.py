"""The loss of a model on packed rows."""

import jax
import jax.numpy as jnp
import optax

from backtrack_jax.models.decoder import Decoder
from backtrack_jax.training.packing import Batch


def cross_entropy(model: Decoder, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Summed loss of the predicted tokens and their summed weights, both float32, in nats.

    Args:
      model: the model.
      batch: rows of packed sequences.

    Returns:
      The two sums; their quotient is the mean loss.
    """
    resid = model(batch.ids, batch.positions).resid
    # The last token predicts nothing; it stays so that rows keep their length, which is a round number.
    targets, weights = (jnp.roll(jnp.asarray(a), -1, axis=1) for a in (batch.ids, batch.weights))
    weights = weights.at[:, -1].set(0)
    losses = optax.softmax_cross_entropy_with_integer_labels(model.logits(resid), targets)
    return jnp.sum(losses * weights), jnp.sum(weights)
