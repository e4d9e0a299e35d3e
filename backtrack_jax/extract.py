"""Window sums: one pass of the traces through a model gives every layer, every window and every label.

A window is an inclusive pair of offsets from a section's first token s: (-13, -8) reads positions s-13 .. s-8 (section
2.2 of the paper), (-12, -12) the single offset of Fig. 2. Inside the scan over layers the residual stream is contracted
with 0/1 counts of which positions each window reads, so nothing of size L x B x T x D is ever kept.

    position     0 1 2 3 4 5 6 7 8 9 10      reply_start = 3, a section starts at s = 8
    token        B q q a b c d e S f g
    (-4, -3)             x x                 read: positions 4 and 5
    (-6, -5)       . .                       crosses the start of the reply: dropped and counted
"""

import dataclasses
import functools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from safetensors import SafetensorError, safe_open

from backtrack_jax.config import ESTIMATORS
from backtrack_jax.files import store
from backtrack_jax.models import ops
from backtrack_jax.models.batching import batches, bucket, check_ids, right_pad
from backtrack_jax.models.decoder import BlockOutput, Decoder
from backtrack_jax.models.sharding import place_rows

_ARRAYS = (
    *("sums", "counts", "read", "dropped", "norm_sum"),
    *("section_means", "section_traces", "section_labels", "section_starts", "section_positions"),
)

Window = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class TokenTrace:
    """A trace as a model reads it.

    Attributes:
      id: the trace's id.
      ids: token ids of prompt and reply; BOS first if the model has one.
      reply_start: index of the reply's first token.
      starts: (label, index of the section's first token) of every section.
    """

    id: str
    ids: Sequence[int]
    reply_start: int
    starts: Sequence[tuple[str, int]]


@dataclasses.dataclass(frozen=True)
class WindowPlan:
    """What is summed.

    Attributes:
      labels: section labels that occur; a section of any other label is an error.
      groups: name -> labels whose windows are pooled. A label by itself is a group of one.
      windows: inclusive offset pairs; the first one is the experiment's window, at which each section's mean is kept.
      layers: layers (0-based block outputs) at which the means of single sections are kept.
      into_prompt: whether windows may reach back before the reply, as in the paper's code. They never read position
        0, BOS or whatever a model without BOS has there, whose activation is an outlier that would dominate a mean.
      beside: group -> another group; windows of the former count only in traces in which the latter's are read.
    """

    labels: tuple[str, ...]
    groups: Mapping[str, tuple[str, ...]]
    windows: tuple[Window, ...]
    layers: tuple[int, ...]
    into_prompt: bool = False
    beside: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuses empty windows, groups of unknown labels and unknown groups; windows are looked up as tuples."""
        object.__setattr__(self, "windows", tuple((first, last) for first, last in self.windows))
        for first, last in self.windows:
            if first > last:
                raise ValueError(f"window ({first}, {last}) is empty; expected first <= last, both included")
        for name, members in self.groups.items():
            if unknown := set(members) - set(self.labels):
                raise ValueError(f"group {name!r} has unknown labels {sorted(unknown)}; known: {self.labels}")
        for name in (*self.beside.keys(), *self.beside.values()):
            _index("beside", name, tuple(self.groups))


@dataclasses.dataclass
class WindowSums:
    """Running sums over traces, in float64 on the host.

    Attributes:
      plan: what is summed. E estimators, C groups of labels, W windows.
      sums: [E, L, C, W, D] float64; E in the order of `ESTIMATORS`: of per-trace means, of tokens.
      counts: [E, C, W] float64; number of traces that have such a window, number of positions read.
      read: [C, W] int64, windows read.
      dropped: [C, W] int64, windows dropped because they cross the start of the reply (or, into the prompt, BOS) or the
        end of the trace.
      norm_sum: [L] float64, sum over reply tokens of the residual stream's norm.
      n_tokens: reply tokens.
      trace_ids: the traces summed, in the order of their batches, which is not that in which they were given.
      section_means: [S, len(plan.layers), D] float32, each section's mean over the first window; NaN if it was dropped.
        Sections stand in the order of `trace_ids`, and in a trace in that of `TokenTrace.starts`.
      section_traces: [S] int64, of which of `trace_ids` each section is.
      section_labels: [S] int64, which of `plan.labels` it has.
      section_starts: [S] int64, its first token.
      section_positions: [S] int64, how many positions its mean is over; 0 if the window was dropped.
    """

    plan: WindowPlan
    sums: np.ndarray
    counts: np.ndarray
    read: np.ndarray
    dropped: np.ndarray
    norm_sum: np.ndarray
    n_tokens: int
    trace_ids: list[str]
    section_means: np.ndarray
    section_traces: np.ndarray
    section_labels: np.ndarray
    section_starts: np.ndarray
    section_positions: np.ndarray

    @classmethod
    def zeros(cls, plan: WindowPlan, n_layers: int, d_model: int) -> "WindowSums":
        """Sums over no traces; ValueError if the plan names a layer that the model does not have."""
        for layer in plan.layers:
            if not 0 <= layer < n_layers:
                raise ValueError(f"plan.layers: layer={layer} is outside 0..{n_layers - 1}")
        E, C, W = len(ESTIMATORS), len(plan.groups), len(plan.windows)
        return cls(
            plan,
            sums=np.zeros((E, n_layers, C, W, d_model)),
            counts=np.zeros((E, C, W)),
            read=np.zeros((C, W), np.int64),
            dropped=np.zeros((C, W), np.int64),
            norm_sum=np.zeros(n_layers),
            n_tokens=0,
            trace_ids=[],
            section_means=np.zeros((0, len(plan.layers), d_model), np.float32),
            section_traces=np.zeros(0, np.int64),
            section_labels=np.zeros(0, np.int64),
            section_starts=np.zeros(0, np.int64),
            section_positions=np.zeros(0, np.int64),
        )

    def mean(self, group: str, window: Window, estimator: str = "trace_mean") -> np.ndarray:
        """MeanAct of Eq. 3 for a group of labels, [L, D] float64.

        Raises:
          ValueError: if the group, window or estimator was not summed, or no window of the group was read.
        """
        e = _index("estimator", estimator, ESTIMATORS)
        g = _index("group", group, tuple(self.plan.groups))
        w = _index("window", window, self.plan.windows)
        if self.counts[e, g, w] == 0:
            raise ValueError(f"no window {window} of group {group!r} was read ({self.dropped[g, w]} were dropped)")
        return self.sums[e, :, g, w] / self.counts[e, g, w]

    def members(self, group: str) -> np.ndarray:
        """Which sections a group's mean over the first window is over, [S] bool; ValueError if it was not summed."""
        _index("group", group, tuple(self.plan.groups))
        labels = [self.plan.labels.index(label) for label in self.plan.groups[group]]
        found = np.isin(self.section_labels, labels) & (self.section_positions > 0)
        if other := self.plan.beside.get(group):
            found &= np.isin(self.section_traces, self.section_traces[self.members(other)])
        return found

    def means_by_trace(self, trace_ids: Sequence[str], group: str, layer: int) -> np.ndarray:
        """Each trace's mean over the first window, [n, D] float32 in the order of `trace_ids`; NaN where it has none.

        Raises:
          ValueError: if a trace, the group or the means of the layer were not summed.
        """
        at_layer, kept = _index("layer", layer, self.plan.layers), self.members(group)
        means = np.full((len(self.trace_ids), self.section_means.shape[-1]), np.nan, np.float32)
        traces, first, n = np.unique(self.section_traces[kept], return_index=True, return_counts=True)
        if len(traces):  # windows are equally long, so that the mean over positions is the mean over sections
            sums = np.add.reduceat(self.section_means[kept, at_layer], first, axis=0, dtype=np.float64)
            means[traces] = sums / n[:, None]
        return means[self._rows(trace_ids)]

    def weights_by_trace(self, trace_ids: Sequence[str], group: str, estimator: str) -> np.ndarray:
        """How much each of `means_by_trace` counts in a mean over traces, [n] int64.

        Every trace that has a window counts once (`trace_mean`) or by its positions (`token_mean`); others do not.

        Raises:
          ValueError: if a trace or the group was not summed, or the estimator is unknown.
        """
        _index("estimator", estimator, ESTIMATORS)
        counts, kept = np.zeros(len(self.trace_ids), np.int64), self.members(group)
        np.add.at(counts, self.section_traces[kept], self.section_positions[kept])
        counts = counts[self._rows(trace_ids)]
        return counts if estimator == "token_mean" else np.minimum(counts, 1)

    def _rows(self, trace_ids: Sequence[str]) -> list[int]:
        row = {trace_id: number for number, trace_id in enumerate(self.trace_ids)}
        if unknown := [trace_id for trace_id in trace_ids if trace_id not in row]:
            raise ValueError(f"trace {unknown[0]!r} was not summed")
        return [row[trace_id] for trace_id in trace_ids]

    @property
    def mean_norm(self) -> np.ndarray:
        """Mean norm of the residual stream over reply tokens, [L] float64: the unit in which magnitudes are read."""
        return self.norm_sum / self.n_tokens


def window_sums(model: Decoder, traces: Sequence[TokenTrace], plan: WindowPlan, *, batch_size: int) -> WindowSums:
    """Passes all traces through the model; see `add_traces`, which does the work batch by batch."""
    total = WindowSums.zeros(plan, model.config.n_layers, model.config.d_model)
    for _ in add_traces(total, model, traces, batch_size=batch_size):
        pass
    return total


def add_traces(
    total: WindowSums, model: Decoder, traces: Sequence[TokenTrace], *, batch_size: int
) -> Iterator[list[str]]:
    """Passes traces through the model and adds each batch's windows to `total`.

    Args:
      total: running sums, changed in place: of nothing, or what an earlier, interrupted call with the same traces and
        batch size had come to; its batches are not repeated.
      model: the model whose residual stream is read.
      traces: the traces, each with its sections' first tokens.
      batch_size: rows of a batch; traces of similar length share one.

    Yields:
      After every batch, the ids of the traces it added.

    Raises:
      ValueError: if two traces have one id, a trace has tokens that this model does not know or sections outside it, or
        `total` holds a part of a batch.
      FloatingPointError: names the layer and trace where an activation is not finite.
    """
    if repeated := [name for name, times in Counter(trace.id for trace in traces).items() if times > 1]:
        raise ValueError(f"traces of one id: {repeated}")
    for trace in traces:
        _check_trace(trace, model.config.vocab_size, total.plan.labels)
    done = set(total.trace_ids)
    todo = []
    grouped = batches([len(trace.ids) for trace in traces], batch_size)
    slots: dict[int, int] = {}  # one number of them for each padded length, so that each has one program
    for padded, members in grouped:
        slots[padded] = max(slots.get(padded, 0), section_slots(max(len(traces[i].starts) for i in members)))
    for padded, members in grouped:
        rows = [traces[i] for i in members]
        already = [row.id for row in rows if row.id in done]
        if already and len(already) < len(rows):
            raise ValueError(f"trace {already[0]!r} was summed in another batch; resume with the same batch size")
        if not already:
            todo.append((rows, padded))
    started = (_start_batch(total.plan, model, rows, padded, slots[padded], batch_size) for rows, padded in todo)
    for batch in _one_ahead(started):
        _add_batch(total, batch)
        yield [row.id for row in batch.rows]


def count_windows(trace: TokenTrace, plan: WindowPlan, length: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each position is read, [labels, W, length] float32, and windows dropped, [labels, W] int64.

    Two windows of a label that overlap count a shared position twice, so a mean over positions is a mean over windows.
    """
    reads = np.zeros((len(plan.labels), len(plan.windows), length), np.float32)
    dropped = np.zeros(reads.shape[:2], np.int64)
    for label, start in trace.starts:
        row = _index(f"label in trace {trace.id}", label, plan.labels)
        for w, window in enumerate(plan.windows):
            if positions := read_positions(trace, start, window, plan.into_prompt):
                reads[row, w, positions.start : positions.stop] += 1
            else:
                dropped[row, w] += 1
    return reads, dropped


def section_slots(n_sections: int) -> int:
    """Number of sections of a trace that a batch has room for."""
    return bucket(max(1, n_sections), 16)


def read_positions(trace: TokenTrace, start: int, window: Window, into_prompt: bool) -> range | None:
    """Positions that the window of a section reads; None if it is dropped, since it leaves the reply (or the text)."""
    positions = range(start + window[0], start + window[1] + 1)
    earliest = 1 if into_prompt else max(1, trace.reply_start)
    return positions if positions.start >= earliest and positions.stop <= len(trace.ids) else None


def save_sums(sums: WindowSums, path: Path) -> None:
    """Writes sums to a safetensors file that is whole or absent; `load_sums` reads them back."""
    arrays = {name: np.ascontiguousarray(getattr(sums, name)) for name in _ARRAYS}
    plan = json.dumps(dataclasses.asdict(sums.plan))
    metadata = {"plan": plan, "trace_ids": json.dumps(sums.trace_ids), "n_tokens": str(sums.n_tokens)}
    store.write_safetensors(path, arrays, metadata)


def load_sums(path: Path, plan: WindowPlan | None = None) -> WindowSums:
    """Reads sums that `save_sums` wrote; ValueError if they are damaged or were summed under another plan."""
    try:
        with safe_open(path, "np") as file:
            arrays = {name: file.get_tensor(name) for name in _ARRAYS}
            metadata = file.metadata()
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged ({error}); delete it to read again") from error
    if plan is None:
        plan = _plan(json.loads(metadata["plan"]))
    elif metadata["plan"] != json.dumps(dataclasses.asdict(plan)):
        raise ValueError(f"{path} holds sums of another plan: {metadata['plan']}")
    return WindowSums(plan, trace_ids=json.loads(metadata["trace_ids"]), n_tokens=int(metadata["n_tokens"]), **arrays)


def _plan(fields: Mapping[str, Any]) -> WindowPlan:
    """A plan out of its JSON form, where tuples are lists."""
    return WindowPlan(
        labels=tuple(fields["labels"]),
        groups={name: tuple(members) for name, members in fields["groups"].items()},
        windows=tuple((first, last) for first, last in fields["windows"]),
        layers=tuple(fields["layers"]),
        into_prompt=fields["into_prompt"],
        beside=dict(fields["beside"]),
    )


class _Batch(NamedTuple):
    """A batch that the device works on.

    Attributes:
      rows: its traces.
      reads: [B, C, W] float32, positions that are read; rows that fill the batch up read none.
      dropped: [C, W], windows that are not read.
      labels: of the rows' sections in turn, numbers of `plan.labels`.
      positions: of the same sections, how many positions are read in the first window.
      n_reply: reply tokens.
      out: of `_contract_batch`, perhaps not computed yet.
    """

    rows: Sequence[TokenTrace]
    reads: np.ndarray
    dropped: np.ndarray
    labels: Sequence[int]
    positions: Sequence[int]
    n_reply: int
    out: dict[str, jax.Array]


def _start_batch(
    plan: WindowPlan, model: Decoder, rows: Sequence[TokenTrace], padded: int, slots: int, batch_size: int
) -> _Batch:
    """Sends a batch to the device, filled up with padding rows to a fixed shape, and does not wait for it."""
    members = np.array([[label in group for label in plan.labels] for group in plan.groups.values()], np.float32)
    counted = [count_windows(trace, plan, padded) for trace in rows]
    reads = np.zeros((batch_size, len(plan.groups), len(plan.windows), padded), np.float32)
    reads[: len(rows)] = [np.tensordot(members, of_labels, 1) for of_labels, _ in counted]
    dropped = np.stack([members @ of_labels for _, of_labels in counted])
    for group, other in plan.beside.items():
        g, o = (list(plan.groups).index(name) for name in (group, other))
        there = np.any(reads[:, o], axis=-1)  # [B, W]
        reads[:, g] *= there[..., None]
        dropped[:, g] *= there[: len(rows)]
    group_reads = reads.sum(-1)
    scale = np.divide(1.0, group_reads, out=np.zeros_like(group_reads), where=group_reads > 0)
    sections, read = np.zeros((batch_size, slots, padded), np.float32), []
    for i, row in enumerate(rows):
        for number, (_, start) in enumerate(row.starts):
            found = read_positions(row, start, plan.windows[0], plan.into_prompt) or range(0)
            sections[i, number, found.start : found.stop] = 1 / max(1, len(found))
            read.append(len(found))
    ids, positions = right_pad([row.ids for row in rows] + [[0]] * (batch_size - len(rows)), padded)
    reply = np.zeros(ids.shape, np.float32)
    for i, row in enumerate(rows):
        reply[i, max(1, row.reply_start) : len(row.ids)] = 1
    arrays = place_rows(model, (ids, positions, reads, scale, sections, reply))
    return _Batch(
        rows=rows,
        reads=group_reads,
        dropped=dropped.sum(0),
        labels=[plan.labels.index(label) for row in rows for label, _ in row.starts],
        positions=read,
        n_reply=int(reply.sum()),
        out=contraction(model)(model, *arrays, np.array(plan.layers, int)),
    )


def _one_ahead(items: Iterable[_Batch]) -> Iterator[_Batch]:
    """The same items, each one when the next is there: so the device works on that while the host adds up this."""
    held = None
    for item in items:
        if held is not None:
            yield held
        held = item
    if held is not None:
        yield held


def _add_batch(total: WindowSums, batch: _Batch) -> None:
    """Waits for a batch and adds it to the running sums."""
    out = jax.device_get(batch.out)
    _check_finite(out["finite"], batch.rows)
    total.sums += out["sums"]
    total.counts += np.stack([(batch.reads > 0).sum(0), batch.reads.sum(0)])
    span = np.array([last - first + 1 for first, last in total.plan.windows])
    total.read += (batch.reads.sum(0) / span).round().astype(np.int64)
    total.dropped += batch.dropped.astype(np.int64)
    total.norm_sum += out["norm_sum"]
    total.n_tokens += batch.n_reply
    _add_sections(total, batch, out["section_means"])
    total.trace_ids += [row.id for row in batch.rows]


def _add_sections(total: WindowSums, batch: _Batch, means: np.ndarray) -> None:
    """Adds the sections of a batch, whose means are [B, layers, slots, D], before its traces are named."""
    in_row = [len(row.starts) for row in batch.rows]
    found = [np.moveaxis(of_row[:, :n], 0, 1) for of_row, n in zip(means, in_row, strict=False)]
    positions = np.array(batch.positions, np.int64)
    new = {
        "means": np.where((positions > 0)[:, None, None], np.concatenate(found), np.float32(np.nan)),
        "traces": np.repeat(len(total.trace_ids) + np.arange(len(in_row)), in_row),
        "labels": np.array(batch.labels, np.int64),
        "starts": np.array([start for row in batch.rows for _, start in row.starts], np.int64),
        "positions": positions,
    }
    for name, values in new.items():
        setattr(total, f"section_{name}", np.concatenate([getattr(total, f"section_{name}"), values]))


def _contract_batch(
    model: Decoder,
    ids: jax.Array,  # [B, T]
    positions: jax.Array,  # [B, T]
    reads: jax.Array,  # [B, C, W, T] how often a position is read
    scale: jax.Array,  # [B, C, W] 1 / positions that the group reads in this trace
    sections: jax.Array,  # [B, S, T] 1 / positions that a section's first window reads, at these positions
    reply: jax.Array,  # [B, T] 1 at reply tokens
    layers: jax.Array,
) -> dict[str, jax.Array]:
    """Sums of one batch, in float32: sums [E, L, C, W, D], section_means [B, n, S, D], norm_sum [L], finite [L, B]."""

    def capture(out: BlockOutput) -> dict[str, jax.Array]:
        x = jnp.where(positions[..., None] >= 0, out.resid_post, 0.0)
        per_trace = jnp.einsum("BCWT,BTD->BCWD", reads, x, precision=lax.Precision.HIGHEST)
        return {
            # A product, since a reduction over the batch takes XLA's CPU backend as long as all the MLPs together.
            "sums": jnp.stack([_sum_rows(per_trace * scale[..., None]), _sum_rows(per_trace)]),
            "section_means": jnp.einsum("BST,BTD->BSD", sections, x, precision=lax.Precision.HIGHEST),
            "norm_sum": jnp.sum(jnp.linalg.norm(x, axis=-1) * reply),
            "finite": jnp.all(jnp.isfinite(x), axis=(1, 2)),
        }

    captured = model(ids, positions, capture=capture).captured
    captured["sums"] = jnp.moveaxis(captured["sums"], 1, 0)
    captured["section_means"] = jnp.moveaxis(captured["section_means"][layers], 0, 1)
    return captured


def contraction(model: Decoder) -> Any:
    """`_contract_batch` as it is compiled for a model."""
    return _compiled(tuple(ops.compiler_options(model.dtype).items()))


@functools.cache
def _compiled(options: tuple[tuple[str, str], ...]) -> Any:
    return jax.jit(_contract_batch, compiler_options=dict(options))


def _sum_rows(x: jax.Array) -> jax.Array:
    """Sum over the first axis."""
    ones = jnp.ones((1, len(x)), x.dtype)
    return jnp.matmul(ones, x.reshape(len(x), -1), precision=lax.Precision.HIGHEST).reshape(x.shape[1:])


def _check_trace(trace: TokenTrace, vocab_size: int, labels: Sequence[str]) -> None:
    check_ids(trace.ids, vocab_size, f"trace {trace.id!r}")
    for label, _ in trace.starts:
        _index(f"label in trace {trace.id}", label, labels)
    places = [
        ("reply_start", trace.reply_start),
        *((f"the start of a {label} section", at) for label, at in trace.starts),
    ]
    for what, at in places:
        if at is None or not 0 <= at <= len(trace.ids):
            raise ValueError(
                f"trace {trace.id!r}: {what} is {at}, expected the index of a token, 0 to {len(trace.ids)}; "
                "`position_of_char` gives None for what was cut off"
            )


def _check_finite(finite: np.ndarray, rows: Sequence[TokenTrace]) -> None:
    bad = np.argwhere(~finite[:, : len(rows)])
    if len(bad):
        layer, row = bad[0]
        raise FloatingPointError(f"activations of trace {rows[row].id!r} are not finite at layer {layer}")


def _index(what: str, value: object, known: Sequence[object]) -> int:
    if value not in known:
        raise ValueError(f"{what}: {value!r} is not among {list(known)}")
    return list(known).index(value)
