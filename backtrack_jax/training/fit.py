"""Training a model on packed rows: a compiled step whose state is donated, and a loop that resumes.

The pieces know nothing of where the rows come from: `scripts/train_organism.py` trains the small pair with them from
random weights, `scripts/finetune.py` any loaded checkpoint on traces.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx

from backtrack_jax.files import store
from backtrack_jax.files.console import Progress
from backtrack_jax.models.decoder import Decoder
from backtrack_jax.training.loss import cross_entropy
from backtrack_jax.training.packing import Batch

_RESULTS = ("adapter", "base", "checkpoints", "model", "reasoning")  # what trainings write into their folders


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


class Recomputed(nnx.Module):
    """A block of which the backward pass keeps only the input, and recomputes the rest."""

    def __init__(self, block: Any):
        """Wraps a block or a stack of them."""
        self.block = block

    def __call__(self, x: jax.Array, rope: Any, mask: jax.Array, cache: Any, edit: Callable) -> Any:
        """As the block."""
        run = jax.checkpoint(lambda block, *arrays: block(*arrays, edit), prevent_cse=False)  # not needed inside a scan
        return run(self.block, x, rope, mask, cache)


def recomputing_blocks(model: Decoder) -> Decoder:
    """The same model, with a backward pass that holds the activations of one block at a time."""
    model = jax.tree.map(lambda leaf: leaf, model)
    model.layers = Recomputed(model.layers)
    return model


def with_matrices_in(model: Decoder, dtype: jnp.dtype) -> Decoder:
    """The same model with its matrices rounded to a dtype, in which they are then multiplied."""

    def rounded(path: Any, weight: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path)
        return weight if "norm" in name or "bias" in name else weight.astype(dtype)

    return jax.tree.map_with_path(rounded, model)


def make_step(
    build: Callable[[Any, Any], Decoder],
    optimizer: optax.GradientTransformation,
    dtype: jnp.dtype | None = None,
    recompute: bool = False,
) -> Callable[[TrainState, Batch], tuple[TrainState, jax.Array]]:
    """A compiled training step.

    Args:
      build: the model out of trained and frozen weights.
      optimizer: optax transformation.
      dtype: of matrix-product inputs; None for that of the weights.
      recompute: whether the backward pass recomputes each block, which takes a third more time and far less memory.

    Returns:
      (state, batch) -> (new state, mean loss of the batch before the step). The old state's memory is given to the new,
      but for the frozen weights: they belong to a model that may be used elsewhere.
    """

    def loss_of(params: Any, frozen: Any, batch: Batch) -> jax.Array:
        model = build(params, frozen)
        model = model if dtype is None else with_matrices_in(model, dtype)
        total, weight = cross_entropy(recomputing_blocks(model) if recompute else model, batch)
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
    """Refuses invalid settings of a training; takes no time.

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
    except Exception as error:  # a damaged file can raise anything in Orbax and the libraries below it
        before = max((step for step in manager.all_steps() if step < newest), default=None)
        raise ValueError(
            f"{manager.directory / str(newest)} cannot be read ({error or type(error).__name__}). Remove it, and the "
            f"same command resumes {'from the start' if before is None else f'after step {before}'}"
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
