"""Given text, read under interventions: which texts, as the models read them, and batches of them.

What is measured on given text needs no sampling: one forward pass for every text under every condition.
"""

import dataclasses
import math
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from backtrack_jax.analysis.base import Material
from backtrack_jax.data.problems import spread
from backtrack_jax.data.records import UNSTEERED, Annotation, Section, Trace
from backtrack_jax.intervention import Intervention, stack_rows, with_same_terms
from backtrack_jax.models.batching import batches, right_pad

REASONING_TRACES, BASE_REPLIES = "reasoning traces", "base replies"
"""Where the texts come from."""

_LOGITS_AT_ONCE = 1 << 27  # numbers; all of an 8B model's batch would be 16 GB


@dataclasses.dataclass(frozen=True)
class Forced:
    """A text that a model reads under one condition.

    Attributes:
      ids: token ids of prompt and text, BOS included.
      prompt_length: tokens of the prompt, from which spans are resolved.
      starts: index of the first token of each sentence that counts, > 0; that token itself need not be among the ids.
      intervention: one row.
    """

    ids: Sequence[int]
    prompt_length: int
    starts: Sequence[int]
    intervention: Intervention


def texts_of(material: Material) -> dict[str, list[Trace]]:
    """The texts, one a problem, at most `analysis.forced_texts` of each source.

    A reply in which BOS was sampled is none: a model reads one BOS, at the start.
    """
    limit = material.experiment.analysis.forced_texts
    traces = {trace.problem_id: trace for trace in reversed(material.traces)}
    written = {
        reply.problem_id: reply.trace(end_marks=material.experiment.traces.end_marks)
        for reply in reversed(material.replies)
        if (reply.condition.target, reply.condition.kind) == ("base", UNSTEERED)
        if material.tokenizer.bos_id not in reply.ids
    }
    found = {REASONING_TRACES: list(reversed(traces.values())), BASE_REPLIES: list(reversed(written.values()))}
    return {source: spread(texts, limit) if limit else [] for source, texts in found.items()}


def given_text(
    material: Material, role: str, trace: Trace, spans: Sequence[tuple[int, int]]
) -> tuple[Sequence[int], int, list[int]]:
    """The first fields of `Forced` for a text as the model of a role reads it, with sentences at some characters."""
    annotation = Annotation(trace.id, "", tuple(Section("", *span) for span in spans))
    read = material.token_trace(role, trace, annotation)
    starts = sorted({at for _, at in read.starts})[: material.experiment.analysis.forced_sentences or None]
    ids = read.ids[: max(starts, default=read.reply_start)]  # what comes later changes nothing
    return ids, read.reply_start, starts


class Batch(NamedTuple):
    """Rows of one compiled shape; the last row is repeated where there are fewer.

    Attributes:
      members: row numbers.
      filled: the same with those that are repeated, B numbers.
      ids: [B, T] int32, padded on the right.
      positions: [B, T] int32.
      edits: B rows each, resolved.
    """

    members: list[int]
    filled: list[int]
    ids: np.ndarray
    positions: np.ndarray
    edits: list[Intervention]


def edited_batches(
    sequences: Sequence[Sequence[int]],
    prompt_lengths: Sequence[int],
    edits: Sequence[Sequence[Intervention]],
    batch_size: int,
    done: Container[int] = (),
) -> Iterator[Batch]:
    """Batches of rows of similar length, each with one or several interventions of its own.

    Rows whose noise is of one kind share a batch: what one row draws is drawn for all rows of its batch, and drawing
    takes longer than a small model.

    Args:
      sequences: token ids of each row.
      prompt_lengths: tokens of each row's prompt, from which spans are resolved.
      edits: of each row equally many single rows.
      batch_size: B.
      done: row numbers; batches of which all rows are in it are left out.
    """
    kinds: dict[tuple[str, ...], list[int]] = {}
    for row, own in enumerate(edits):
        drawn = {type(term).__name__ for edit in own for term in edit.terms if term.draws}
        kinds.setdefault(tuple(sorted(drawn)), []).append(row)
    for alike in kinds.values():
        same = with_same_terms([edit for row in alike for edit in edits[row]])
        n = len(edits[alike[0]])
        of_row = {row: same[n * i : n * i + n] for i, row in enumerate(alike)}
        for padded, places in batches([len(sequences[row]) for row in alike], batch_size):
            members = [alike[place] for place in places]
            if all(row in done for row in members):
                continue
            filled = members + [members[-1]] * (batch_size - len(members))
            ids, positions = right_pad([sequences[row] for row in filled], padded)
            lengths = jnp.asarray([prompt_lengths[row] for row in filled], jnp.int32)
            stacked = [stack_rows([of_row[row][i] for row in filled]).resolve(lengths) for i in range(n)]
            yield Batch(members, filled, ids, positions, stacked)


def places_before(starts: Sequence[Sequence[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the tokens before starts, [B, width] int32, and which of them there are, bool."""
    at = np.zeros((len(starts), width), np.int32)
    counted = np.zeros((len(starts), width), bool)
    for i, of_row in enumerate(starts):
        at[i, : len(of_row)], counted[i, : len(of_row)] = np.asarray(of_row, np.int32) - 1, True
    return at, counted


def logits_at_once(batch_size: int, vocab_size: int) -> int:
    """How many logits are held at once, at most, for texts of usual lengths."""
    of_position = batch_size * vocab_size
    return max(min(_LOGITS_AT_ONCE, 256 * of_position), of_position)


def by_position(f: Callable[..., Any], arrays: Any, vocab_size: int, copies: int = 1) -> Any:
    """Applies a function that makes logits to some positions of all rows at a time, so that they fit into memory.

    Some positions of all rows, and not some rows: those may be spread over devices.

    Args:
      f: from arrays [B, ...] at one position to arrays [B, ...].
      arrays: pytree of [B, P, ...].
      vocab_size: logits that `f` makes for each row.
      copies: how often it makes them.

    Returns:
      Pytree of [B, P, ...].
    """
    B, P = jax.tree.leaves(arrays)[0].shape[:2]
    most = max(1, logits_at_once(B, vocab_size) // (copies * B * vocab_size))
    at_once = math.gcd(P, 1 << (most.bit_length() - 1))  # nothing is left over, which would be a second loop
    swapped = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), arrays)
    return jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), lax.map(f, swapped, batch_size=at_once))
