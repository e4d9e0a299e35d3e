"""Activations of single tokens, at a few positions of each trace and a few layers."""

from collections.abc import Iterator, Sequence
from functools import partial

import jax
import numpy as np

from backtrack_jax.extract import TokenTrace
from backtrack_jax.models.batching import batches, bucket, check_ids, right_pad
from backtrack_jax.models.decoder import Decoder
from backtrack_jax.models.sharding import place_rows


def read(
    model: Decoder,
    traces: Sequence[TokenTrace],
    positions: Sequence[np.ndarray],
    layers: Sequence[int],
    *,
    batch_size: int,
) -> Iterator[list[tuple[int, np.ndarray]]]:
    """Residual stream at the given positions of each trace.

    Args:
      model: the model, unsteered.
      traces: what it reads.
      positions: for each trace, indices into its ids.
      layers: blocks, 0-based.
      batch_size: traces per forward pass.

    Yields:
      After every batch, (index of a trace, [positions, layers, D] float32).

    Raises:
      ValueError: a layer that the model does not have, a token that it does not know, or a position beyond a trace.
    """
    if beyond := [layer for layer in layers if not 0 <= layer < model.config.n_layers]:
        raise ValueError(f"layer={beyond[0]} is outside 0..{model.config.n_layers - 1}")
    for trace, at in zip(traces, positions, strict=True):
        check_ids(trace.ids, model.config.vocab_size, f"trace {trace.id!r}")
        if len(at) and not 0 <= at.min() <= at.max() < len(trace.ids):
            raise ValueError(f"trace {trace.id!r} has {len(trace.ids)} tokens, asked for position {at.max()}")
    most = bucket(max((len(at) for at in positions), default=1) or 1)
    for padded, members in batches([len(trace.ids) for trace in traces], batch_size):
        ids, places = right_pad([traces[i].ids for i in members] + [[0]] * (batch_size - len(members)), padded)
        at = np.zeros((batch_size, most), np.int32)
        for row, i in enumerate(members):
            at[row, : len(positions[i])] = positions[i]
        batch = place_rows(model, (ids, places, at))
        out = np.asarray(_gather(model, *batch, np.array(layers, np.int32), stop_at_layer=max(layers) + 1))
        # Copies: a view would keep the whole padded batch.
        yield [(i, np.moveaxis(out[:, row, : len(positions[i])], 0, 1).copy()) for row, i in enumerate(members)]


@partial(jax.jit, static_argnames="stop_at_layer")
def _gather(
    model: Decoder, ids: jax.Array, places: jax.Array, at: jax.Array, layers: jax.Array, stop_at_layer: int
) -> jax.Array:
    """[layers, B, positions, D]; only the chosen positions of every layer are kept inside the scan."""

    def capture(out):
        return jax.vmap(lambda x, index: x[index])(out.resid_post, at)

    return model(ids, places, capture=capture, stop_at_layer=stop_at_layer).captured[layers]
