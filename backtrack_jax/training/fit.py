"""Training a Llama on token sequences: packing, loss, a compiled step whose state is donated, a loop that resumes.

The pieces know nothing of where the sequences come from: `scripts/train_organism.py` trains the small pair with them
from random weights, `scripts/finetune.py` any loaded checkpoint on traces.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax import lax

from backtrack_jax.files import store
from backtrack_jax.files.console import Progress
from backtrack_jax.models.attention import PAD
from backtrack_jax.models.decoder import Decoder, Recompute, unembed
from backtrack_jax.models.products import cpu_barrier, einsum, take

_RESULTS = ("adapter", "base", "checkpoints", "model", "reasoning")  # what trainings write into their folders
_LEAST_PART = 1024  # ids of a part of the vocabulary; fewer make products too small to be fast


class Batch(NamedTuple):
    """Rows of packed sequences.

        ids        B h i . B y o u .
        positions  0 1 2 3 0 1 2 3 4      each sequence counts its own
        segments   0 0 0 0 1 1 1 1 1      and sees only itself
        weights    0 0 1 1 0 0 1 1 1      tokens that are predicted: here all but BOS and a prompt of one token

    Attributes:
      ids: [B, T] int32.
      positions: [B, T] int32, PAD at padding.
      segments: [B, T] int32.
      weights: [B, T] float32, what a token counts in the loss when it is predicted from those before it.
    """

    ids: Any
    positions: Any
    segments: Any
    weights: Any


@dataclasses.dataclass(frozen=True)
class Tokens:
    """One training text as tokens.

    Attributes:
      ids: token ids, BOS first.
      start: index of the first token that is learned; those before it (a prompt) are only read. At least 1.
    """

    ids: Sequence[int]
    start: int = 1


def pack(sequences: Sequence[Tokens], length: int) -> Batch:
    """Places whole sequences in rows, first fit, in the order given; no sequence is cut or sees another.

    Args:
      sequences: none longer than `length`.
      length: T.

    Returns:
      As many rows as it takes, padded at the end.

    Raises:
      ValueError: a sequence is longer than a row.
    """
    rows: list[list[Tokens]] = []
    free: list[int] = []
    open_rows: list[int] = []  # those that may still have room; closed ones are not tried again
    for i, sequence in enumerate(sequences):
        size = len(sequence.ids)
        if size > length:
            raise ValueError(f"sequence {i} has {size} tokens, a row holds {length}")
        row = next((r for r in open_rows if free[r] >= size), None)
        if row is None:
            row = len(rows)
            rows.append([])
            free.append(length)
            open_rows = [*open_rows[-63:], row]
        rows[row].append(sequence)
        free[row] -= size
    shape = (len(rows), length)
    batch = Batch(
        np.zeros(shape, np.int32), np.full(shape, PAD, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    )
    for r, members in enumerate(rows):
        at = 0
        for number, sequence in enumerate(members):
            stop = at + len(sequence.ids)
            batch.ids[r, at:stop] = sequence.ids
            batch.positions[r, at:stop] = np.arange(len(sequence.ids))
            batch.segments[r, at:stop] = number
            batch.weights[r, at + max(sequence.start, 1) : stop] = 1
            at = stop
    return batch


def cross_entropy(
    model: Decoder, batch: Batch, dtype: jnp.dtype | None = None, recompute: Recompute = Recompute.CHEAP
) -> tuple[jax.Array, jax.Array]:
    """Summed loss of the predicted tokens and their summed weights, both float32, in nats.

    A gradient is to be had in reverse mode only (`jax.grad`, `jax.vjp`); a second one, on a CPU, in float32 only.

    Args:
      model: the model.
      batch: rows of packed sequences.
      dtype: of matrix-product inputs; None for that of the weights.
      recompute: what a gradient computes again.

    Returns:
      The two sums; their quotient is the mean loss.
    """
    resid = model(batch.ids, batch.positions, segments=batch.segments, dtype=dtype, recompute=recompute).resid
    # The last token predicts nothing, but rows of an odd length would be multiplied more slowly.
    ids, weights = (jnp.pad(a[:, 1:], ((0, 0), (0, 1))) for a in (batch.ids, batch.weights))
    total: Any = _summed_loss(model.norm(resid), model.unembedding.astype(dtype or model.dtype), ids, weights)
    return total, jnp.sum(weights)


@jax.custom_vjp
def _summed_loss(x: jax.Array, unembedding: jax.Array, ids: jax.Array, weights: jax.Array) -> jax.Array:
    """Sum over tokens of weight * (logsumexp(logits) - logit of the id); logits exist of a part of the ids at a time.

    The gradient of x is summed up beside the exponentials, before their sum is known, and divided by it at the end. For
    that of W_U they are computed again: all at once take longer to move through memory than to multiply twice.

    Args:
      x: [B, T, D] float32, residual stream behind the final norm.
      unembedding: W_U, [V, D].
      ids: [B, T], tokens that follow.
      weights: [B, T], what these count.
    """
    return _summed_loss_forward(x, unembedding, ids, weights)[0]


def _summed_loss_forward(
    x: jax.Array, unembedding: jax.Array, ids: jax.Array, weights: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    parts = _vocabulary_in_parts(unembedding, ids.size)

    def add(sums: tuple[jax.Array, ...], number: jax.Array) -> tuple[tuple[jax.Array, ...], None]:
        highest, total, picked, d_x = sums
        part, of = _part(parts, number)
        logits = _without_padding(unembed(x, part), of, len(unembedding))
        place = ids - of[0]
        here = jnp.take_along_axis(logits, jnp.clip(place, 0, len(of) - 1)[..., None], axis=-1)[..., 0]
        picked = jnp.where((place >= 0) & (place < len(of)), here, picked)
        before, highest = highest, jnp.maximum(highest, jnp.max(logits, axis=-1))
        exponentials, shrunk = jnp.exp(logits - highest[..., None]), jnp.exp(before - highest)
        total = total * shrunk + jnp.sum(exponentials, axis=-1)
        # Without the id's own, whose chance less 1 is small where the model is sure, and would be lost in rounding.
        others = cpu_barrier(jnp.where(of == ids[..., None], 0, exponentials).astype(unembedding.dtype))
        d_x = d_x * shrunk[..., None] + einsum("btv,vd->btd", others, part)
        return (highest, total, picked, d_x), None

    nothing = jnp.zeros(ids.shape, jnp.float32)
    start = nothing - jnp.inf, nothing, nothing + jnp.nan, jnp.zeros_like(x)  # NaN for an id that is in no part
    (highest, total, picked, d_x), _ = lax.scan(add, start, jnp.arange(len(parts)))
    logs = highest + jnp.log(total)
    d_x = d_x / total[..., None] + jnp.expm1(picked - logs)[..., None] * take(unembedding, ids).astype(jnp.float32)
    return jnp.sum((logs - picked) * weights), (x, unembedding, ids, weights, logs, picked, d_x)


def _summed_loss_backward(
    saved: tuple[jax.Array, ...], outer: jax.Array
) -> tuple[jax.Array, jax.Array, None, jax.Array]:
    x, unembedding, ids, weights, logs, picked, d_x = saved
    parts = _vocabulary_in_parts(unembedding, ids.size)
    counts = (outer * weights)[..., None]

    def of_part(_: None, number: jax.Array) -> tuple[None, jax.Array]:
        part, of = _part(parts, number)
        logits, gradient = jax.vjp(functools.partial(unembed, x), part)
        chances = jnp.exp(_without_padding(logits, of, len(unembedding)) - logs[..., None])
        (d_part,) = gradient((chances - (of == ids[..., None])) * counts)
        return None, d_part.astype(jnp.float32)  # XLA's CPU backend would rewrite a whole 16-bit stack each time

    _, d_parts = lax.scan(of_part, None, jnp.arange(len(parts)))
    d_unembedding = d_parts.reshape(-1, d_parts.shape[-1])[: len(unembedding)].astype(unembedding.dtype)
    return counts * d_x, d_unembedding, None, outer * (logs - picked)


_summed_loss.defvjp(_summed_loss_forward, _summed_loss_backward)


def _vocabulary_in_parts(unembedding: jax.Array, tokens: int) -> jax.Array:
    """W_U [V, D] as [parts, v, D], for so many tokens; zeros behind the last id.

    v divides V, so that W_U need not be copied, and is a multiple of 128, as far as such numbers are to be had.
    """
    V = len(unembedding)
    most = max(_LEAST_PART, _logits_at_a_time() // tokens)
    exact = [size for size in range(most // 2, most + 1) if V % size == 0]
    size = V if most >= V else max(exact, key=lambda size: (size % 128 == 0, size), default=most)
    return jnp.pad(unembedding, ((0, -V % size), (0, 0))).reshape(-1, size, unembedding.shape[-1])


def _logits_at_a_time() -> int:
    """12 MB of them on a CPU, which stay in its cache; elsewhere 256 MB, since small products are slow there."""
    return 3 << 20 if jax.default_backend() == "cpu" else 64 << 20


def _part(parts: jax.Array, number: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One part of W_U, [v, D], and the ids that its rows are of, [v]."""
    # Behind the barrier, or XLA's CPU backend would widen all 16-bit weights before the loop.
    parts, number = cpu_barrier((parts, number))
    return take(parts, number), number * parts.shape[1] + jnp.arange(parts.shape[1])


def _without_padding(logits: jax.Array, of: jax.Array, V: int) -> jax.Array:
    """Logits of a part; minus infinity where rows behind the last id are multiplied."""
    return logits if V % len(of) == 0 else jnp.where(of < V, logits, -jnp.inf)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a step changes.

    Attributes:
      params: trained weights, a pytree of float32 arrays.
      optimizer: state of the optax transformation.
      step: int32, steps done.
      frozen: weights that are needed but not trained; not part of checkpoints.
    """

    params: Any
    optimizer: Any
    step: jax.Array
    frozen: Any = ()


def new_state(params: Any, optimizer: optax.GradientTransformation, frozen: Any = ()) -> TrainState:
    """The state before the first step, on the device of the weights if they were put on one.

    What a step returns is there as well. Were counters left to JAX's choice, the second step would be compiled anew.
    """
    state = TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))
    placed = {device for a in jax.tree.leaves((params, frozen)) if _is_placed(a) for device in a.devices()}
    if len(placed) == 1:
        state = jax.device_put(state, *placed)
    return dataclasses.replace(state, frozen=frozen)


def _is_placed(array: Any) -> bool:
    """Whether it was put on its device, and is not merely there by default."""
    return isinstance(array, jax.Array) and array.committed


def make_step(
    build: Callable[[Any, Any], Decoder],
    optimizer: optax.GradientTransformation,
    dtype: jnp.dtype | None = None,
    recompute: Recompute = Recompute.CHEAP,
) -> Callable[[TrainState, Batch], tuple[TrainState, jax.Array]]:
    """A compiled training step.

    Args:
      build: the model out of trained and frozen weights.
      optimizer: optax transformation.
      dtype: of matrix-product inputs; None for that of the weights.
      recompute: what a gradient computes again.

    Returns:
      (state, batch) -> (new state, mean loss of the batch before the step). The old state's memory is given to the new,
      but for the frozen weights: they belong to a model that may be used elsewhere.
    """

    def loss_of(params: Any, frozen: Any, batch: Batch) -> jax.Array:
        total, weight = cross_entropy(build(params, frozen), batch, dtype, recompute)
        return total / jnp.maximum(weight, 1.0)

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, jax.Array]:
        loss, gradients = jax.value_and_grad(loss_of)(state.params, frozen, batch)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(params, optimizer_state, state.step + 1), loss

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, jax.Array]:
        updated, loss = update(dataclasses.replace(state, frozen=()), state.frozen, batch)
        return dataclasses.replace(updated, frozen=state.frozen), loss

    return step


def muon(learning_rate: optax.Schedule, adam_learning_rate: optax.Schedule) -> optax.GradientTransformation:
    """Muon for the matrices of the blocks, each layer's by itself, AdamW for embeddings and norms.

    Args:
      learning_rate: of Muon, where one step changes a matrix by that much in spectral norm.
      adam_learning_rate: of AdamW.
    """

    def dimensions(params: Any) -> Any:
        stacked = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
        return jax.tree.map(lambda weight: stacked if weight.ndim == 3 else None, params)

    return optax.contrib.muon(
        learning_rate, adam_learning_rate=adam_learning_rate, muon_weight_dimension_numbers=dimensions
    )


def warmup_cosine(peak: float, steps: int, warmup: int = 20) -> optax.Schedule:
    """Learning rate that rises from 0 to `peak`, in a fifth of the steps at most, and falls to a tenth of it."""
    return optax.warmup_cosine_decay_schedule(0.0, peak, min(warmup, steps // 5), steps, peak / 10)


def trainable(model: Decoder) -> tuple[Any, Callable[..., Decoder]]:
    """A float32 copy of all weights of a model, and how to put a model together again from such weights."""
    graphdef, state = nnx.split(model)
    params = jax.tree.map(lambda weight: jnp.array(weight, jnp.float32), state)
    return params, lambda params, frozen=(): nnx.merge(graphdef, params)


def check_numbers(settings: Mapping[str, float], least: Mapping[str, int]) -> None:
    """Refuses numbers that no training can have; takes no time.

    Args:
      settings: by name.
      least: the smallest values of those that may be 0 or must be above 1. Of the others, an integer is at least 1 and
        any other number above 0.

    Raises:
      ValueError: names every setting that is refused, and what is accepted.
    """
    faults = []
    for name, value in settings.items():
        whole = isinstance(value, int)
        lowest = least.get(name, 1 if whole else None)
        if not math.isfinite(value) or (value <= 0 if lowest is None else value < lowest):
            accepted = "above 0" if lowest is None else f"of at least {lowest}"
            faults.append(f"{name}={value}, expected {'an integer' if whole else 'a finite number'} {accepted}")
        elif whole and value >= 1 << 31:
            faults.append(f"{name}={value}, expected an integer below 2**31")
    if faults:
        raise ValueError("; ".join(faults))


def keep_to(folder: Path, settings: Mapping[str, Any]) -> None:
    """Makes a folder for one training; what it then holds is never taken for the result of another.

    Args:
      folder: made here; the settings are written into it.
      settings: all that the result depends on, as JSON values.

    Raises:
      ValueError: the folder holds files of a training with other settings, names those that differ; or a model that no
        training made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "settings.json"
    if not path.exists() and (there := sorted(child.name for child in folder.iterdir() if child.name in _RESULTS)):
        raise ValueError(
            f"{folder} holds {', '.join(there)}, but no {path.name}: no training made them. Name another folder"
        )
    begun = any(file.is_file() and file != path for file in folder.rglob("*"))  # a mistyped setting stops before that
    if not (begun and path.exists()):
        store.write_text(path, json.dumps(settings, indent=1) + "\n")
    before = json.loads(path.read_text())
    differing = [
        f"{name}={before.get(name)!r}, not {settings.get(name)!r}"
        for name in sorted(before.keys() | settings.keys())
        if before.get(name) != settings.get(name)
    ]
    if differing:
        raise ValueError(f"{folder} holds a training with {'; '.join(differing)}. Name another folder, or remove it")


def fit(
    step: Callable[[TrainState, Batch], tuple[TrainState, jax.Array]],
    state: TrainState,
    rows: Batch,
    *,
    steps: int,
    batch_size: int,
    seed: int,
    folder: Path,
    save_every: int,
    title: str,
) -> tuple[TrainState, float]:
    """Trains up to a number of steps, from the newest checkpoint in `folder` if there is one.

    Which rows a step sees depends on its number and the seed alone, so an interrupted run ends with the weights of an
    uninterrupted one, bit for bit.

    Args:
      step: from `make_step`.
      state: where training starts; given away.
      rows: packed training rows; they are gone through in a new random order every time.
      steps: to be done in all.
      batch_size: rows a step.
      seed: of the order.
      folder: for checkpoints; the last two are kept.
      save_every: steps between checkpoints.
      title: of the progress line.

    Returns:
      The last state, and the mean loss over the last tenth of the steps that this call did (NaN if it did none).

    Raises:
      FloatingPointError: names the step whose loss is not finite, or after which weights are not.
      ValueError: names the newest checkpoint where it cannot be read.
    """
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    with ocp.CheckpointManager(folder.absolute(), options=options) as manager:
        state, done = _restored(manager, state)
        losses = []
        with Progress(title, steps, done, unit="steps") as progress:
            for number in range(done, steps):
                batch = _rows_of_step(rows, number, batch_size, seed)
                state, loss = step(state, batch)
                losses.append(float(loss))
                if not math.isfinite(losses[-1]):
                    raise FloatingPointError(f"{title}: the loss of step {number} is {losses[-1]}")
                progress.update(1, int((batch.positions >= 0).sum()), f"loss {np.mean(losses[-20:]):.4f}")
                if (number + 1) % save_every == 0 or number + 1 == steps:
                    if not finite(state.params):
                        raise FloatingPointError(f"{title}: weights are not finite after step {number}")
                    manager.save(number + 1, args=ocp.args.StandardSave(_numbered(state)))
                    manager.wait_until_finished()
    return state, float(np.mean(losses[-max(1, steps // 10) :])) if losses else math.nan


@jax.jit
def finite(params: Any) -> jax.Array:
    """Whether all values of a pytree are."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(params)]))


def _restored(manager: ocp.CheckpointManager, state: TrainState) -> tuple[TrainState, int]:
    """The state of the newest checkpoint, or the given one, and the steps that it has done."""
    newest = manager.latest_step()
    if newest is None:
        return state, 0
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, _numbered(state))
    try:
        leaves = manager.restore(newest, args=ocp.args.StandardRestore(target))
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:  # whatever a damaged file makes of Orbax and the libraries below it
        before = max((step for step in manager.all_steps() if step < newest), default=None)
        raise ValueError(
            f"{manager.directory / str(newest)} cannot be read ({error or type(error).__name__}). Remove it, and the "
            f"same command goes on {'from the start' if before is None else f'after step {before}'}"
        ) from error
    in_order = [leaves[name] for name in sorted(leaves)]
    restored = jax.tree.unflatten(jax.tree.structure(dataclasses.replace(state, frozen=())), in_order)
    return dataclasses.replace(restored, frozen=state.frozen), newest


def _numbered(state: TrainState) -> dict[str, jax.Array]:
    """What a checkpoint holds, by number: it then does not depend on how optax nests its state."""
    return {f"{i:05}": leaf for i, leaf in enumerate(jax.tree.leaves(dataclasses.replace(state, frozen=())))}


def _rows_of_step(rows: Batch, number: int, batch_size: int, seed: int) -> Batch:
    """The rows of a step: places number * batch_size and on in an endless sequence of random orders of all rows."""
    n = len(rows.ids)
    places = np.arange(number * batch_size, (number + 1) * batch_size)
    orders = {epoch: np.random.default_rng([seed, epoch]).permutation(n) for epoch in set((places // n).tolist())}
    chosen = [orders[place // n][place % n] for place in places.tolist()]
    return Batch(*(array[chosen] for array in rows))
