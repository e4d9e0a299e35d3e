"""Rows that continue one prompt, which is prefilled once: token for token what each gives with a prompt of its own."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sizes import TINY, random_model

from backtrack_jax import generate as generate_module
from backtrack_jax.generate import Completion, Row, Sampling, compiled_generate, generate, generate_rows, row_key
from backtrack_jax.intervention import (
    Intervention,
    Span,
    add_vector,
    gaussian_noise,
    no_intervention,
    self_amplify,
    stack_rows,
)
from backtrack_jax.models.batching import left_pad
from backtrack_jax.models.decoder import Decoder

L, D, V = TINY.n_layers, TINY.d_model, TINY.vocab_size
G = 6
MODEL = random_model(TINY, 0)
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, V, n).tolist() for n in (5, 40, 1, 9, 12)]
VECTOR = jnp.asarray(RNG.standard_normal(D), jnp.float32)
NOTHING = no_intervention(L, D)


def steered(length: float, span: Span = "generated") -> Intervention:
    return add_vector(VECTOR, 1, length, n_layers=L, span=span)


def noisy(span: Span, number: int = 0) -> Intervention:
    return gaussian_noise(1, 3.0, jax.random.key(number), n_layers=L, d_model=D, span=span)


def edits(prompt: Sequence[int]) -> list[Intervention]:
    """No edit, whose span is `all`; a vector; noise and a vector; a vector on positions from the prompt's end on."""
    end = len(prompt)
    return [NOTHING, steered(2.0), noisy("generated") + steered(-3.0), steered(2.0, (end + 1, end + 3))]


ROWS = [
    Row(prompt, row_key(0, str(number), sample), edit)
    for number, prompt in enumerate(PROMPTS)
    for sample, edit in enumerate(edits(prompt))
]
REPEATS = 4


def sampled(rows: Sequence[Row], sampling: Sampling, **given: Any) -> dict[int, Completion]:
    options: dict[str, Any] = {"stop_ids": [1, 2], "max_new_tokens": G, "batch_size": 8} | given
    return {row: reply for batch in generate_rows(MODEL, rows, sampling=sampling, **options) for row, reply in batch}


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0), Sampling(0.8, 0.9)], ids=["greedy", "all", "top_p"])
def test_rows_are_token_for_token_those_of_a_prompt_of_their_own(sampling: Sampling) -> None:
    """Ragged prompts, with and without a vector on the span `generated`, stops included."""
    alone = sampled(ROWS, sampling)
    shared = sampled(ROWS, sampling, repeats=REPEATS)
    assert shared == alone and sorted(shared) == list(range(len(ROWS)))
    own = [alone[row].ids for row in range(REPEATS)]
    assert own[1] != own[0] != own[2] and len({reply.ids for reply in alone.values()}) > 10  # edits matter


@pytest.mark.parametrize(
    ("batch_size", "together", "prefilled"),
    [(8, 4, 2), (11, 4, 2), (4, 4, 1), (3, 2, 1), (1, 1, 1)],
)
def test_a_prompt_is_prefilled_once_for_as_many_rows_as_a_batch_has_room_for(
    monkeypatch: pytest.MonkeyPatch, batch_size: int, together: int, prefilled: int
) -> None:
    """Passes of the decoder and their shapes, of two padded lengths; nothing is compiled."""
    shapes: set[tuple[int, ...]] = set()
    call = Decoder.__call__

    def noting(self: Decoder, ids: jax.Array, *rest: Any, **given: Any) -> Any:
        shapes.add(ids.shape)
        return call(self, ids, *rest, **given)

    def shaped(*arrays: Any, **static: Any) -> Any:
        made = jax.eval_shape(lambda *given: generate(*given, **static), *arrays)
        return jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), made)

    monkeypatch.setattr(Decoder, "__call__", noting)
    monkeypatch.setattr(generate_module, "compiled_generate", shaped)
    longer = [Row([*row.prompt, *range(60)], row.key, NOTHING) for row in ROWS[:REPEATS]]
    found = sampled([*ROWS, *longer], Sampling(1.0), batch_size=batch_size, repeats=REPEATS)
    assert sorted(found) == list(range(len(ROWS) + REPEATS))
    assert shapes == {(prefilled, 64), (prefilled, 128), (prefilled * together, 1)}


def test_an_interrupted_run_repeats_nothing_and_gives_the_same() -> None:
    options: dict[str, Any] = {"sampling": Sampling(1.0), "stop_ids": [], "max_new_tokens": G, "batch_size": 8}
    whole = list(generate_rows(MODEL, ROWS, repeats=REPEATS, **options))
    done = {row for row, _ in whole[0]}
    assert list(generate_rows(MODEL, ROWS, repeats=REPEATS, done=done, **options)) == whole[1:]


@pytest.mark.parametrize(
    "edit", [steered(2.0, "all"), steered(2.0, (4, 9)), noisy("prompt"), self_amplify(0, 1.0, n_layers=L, d_model=D)]
)
def test_what_changes_the_prompt_is_refused(edit: Intervention) -> None:
    rows = [Row(PROMPTS[0], row_key(0, "x", n), edit if n == 2 else steered(2.0), f"draw {n}") for n in range(REPEATS)]
    with pytest.raises(ValueError, match=r"draw 2 changes something inside the prompt .* the span `generated`"):
        sampled(rows, Sampling(), repeats=REPEATS)
    ids, positions = map(jnp.asarray, left_pad([PROMPTS[0]], 64))
    keys, stacked = jnp.stack([row.key for row in rows]), stack_rows([row.intervention for row in rows])
    with pytest.raises(ValueError, match="row 2 changes something inside the prompt"):
        generate(MODEL, ids, positions, keys, stacked, max_new_tokens=G, repeats=REPEATS)


def test_what_changes_the_prompt_and_cannot_be_refused_means_nothing() -> None:
    """Where values are traced; the other rows are as they were."""
    rows = [Row(PROMPTS[0], row_key(0, "x", n), steered(2.0, ("generated", "all")[n == 2])) for n in range(REPEATS)]
    ids, positions = left_pad([PROMPTS[0]], 64)
    keys, stacked = jnp.stack([row.key for row in rows]), stack_rows([row.intervention for row in rows])
    found = compiled_generate(MODEL, ids, positions, keys, stacked, max_new_tokens=G, repeats=REPEATS)
    assert found.finite.tolist() == [True, True, False, True]


def test_other_numbers_and_other_prompts_are_refused() -> None:
    for rows, repeats, message in (
        (ROWS, 0, "repeats=0, expected a number that divides 20 rows"),
        (ROWS, 3, "repeats=3, expected a number that divides 20 rows"),
        (ROWS, 5, "row 4 has another prompt than row 0, expected the same in 5 rows"),
    ):
        with pytest.raises(ValueError, match=message):
            sampled(rows, Sampling(), repeats=repeats)
    ids, positions = map(jnp.asarray, left_pad(PROMPTS[:1], 64))
    with pytest.raises(ValueError, match="repeats=0, expected at least 1"):
        generate(MODEL, ids, positions, jnp.stack([ROWS[0].key]), max_new_tokens=G, repeats=0)
    with pytest.raises(ValueError, match="expected one for each of 2 rows"):
        generate(MODEL, ids, positions, jnp.stack([ROWS[0].key]), max_new_tokens=G, repeats=2)
