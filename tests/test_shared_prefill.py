"""Rows that continue one prompt, which is prefilled once: token for token what each gives with a prompt of its own."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sizes import TINY, random_model

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
G, REPEATS = 6, 4
MODEL = random_model(TINY, 0)
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, V, n).tolist() for n in (5, 70, 1, 9, 12)]
VECTOR = jnp.asarray(RNG.standard_normal(D), jnp.float32)
NOTHING = no_intervention(L, D)


def steered(length: float, span: Span = "generated") -> Intervention:
    return add_vector(VECTOR, 1, length, n_layers=L, span=span)


def noisy(span: Span, number: int = 0) -> Intervention:
    return gaussian_noise(1, 3.0, jax.random.key(number), n_layers=L, d_model=D, span=span)


# Two without any edit, whose span is `all`; a vector; noise and a vector.
EDITS = [NOTHING, steered(2.0), noisy("generated") + steered(-3.0), NOTHING]
ROWS = [
    Row(prompt, row_key(0, str(number), sample), EDITS[sample])
    for number, prompt in enumerate(PROMPTS)
    for sample in range(REPEATS)
]


def sampled(rows: Sequence[Row], sampling: Sampling, **given: Any) -> dict[int, Completion]:
    options: dict[str, Any] = {"stop_ids": [1, 2], "max_new_tokens": G, "batch_size": 8} | given
    return {row: reply for batch in generate_rows(MODEL, rows, sampling=sampling, **options) for row, reply in batch}


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0), Sampling(0.8, 0.9)], ids=["greedy", "all", "top_p"])
def test_rows_are_token_for_token_those_of_a_prompt_of_their_own(sampling: Sampling) -> None:
    """Ragged prompts of two padded lengths, with and without a vector on the span `generated`, stops included."""
    alone = sampled(ROWS, sampling)
    shared = sampled(ROWS, sampling, repeats=REPEATS)
    assert shared == alone and sorted(shared) == list(range(len(ROWS)))
    own = [alone[row].ids for row in range(REPEATS)]
    assert own[1] != own[0] != own[2] and len({reply.ids for reply in alone.values()}) > 10  # edits matter
    if sampling.temperature == 0:
        assert own[3] == own[0]


@pytest.mark.parametrize(
    ("batch_size", "together", "prefilled"),
    [(8, 4, 2), (11, 4, 2), (4, 4, 1), (3, 2, 1), (1, 1, 1)],
)
def test_a_prompt_is_prefilled_once_for_as_many_rows_as_a_batch_has_room_for(
    monkeypatch: pytest.MonkeyPatch, batch_size: int, together: int, prefilled: int
) -> None:
    shapes: set[tuple[int, ...]] = set()
    call = Decoder.__call__

    def noting(self: Decoder, ids: jax.Array, *rest: Any, **given: Any) -> Any:
        shapes.add(ids.shape)
        return call(self, ids, *rest, **given)

    monkeypatch.setattr(Decoder, "__call__", noting)
    jax.clear_caches()
    rows = [row for number, row in enumerate(ROWS) if number // REPEATS != 1]  # of one padded length
    found = sampled(rows, Sampling(1.0), batch_size=batch_size, repeats=REPEATS)
    jax.clear_caches()
    assert len(found) == len(rows) and shapes == {(prefilled, 64), (prefilled * together, 1)}


def test_an_interrupted_run_repeats_nothing_and_gives_the_same() -> None:
    options: dict[str, Any] = {"sampling": Sampling(1.0), "stop_ids": [], "max_new_tokens": G, "batch_size": 8}
    whole = list(generate_rows(MODEL, ROWS, repeats=REPEATS, **options))
    done = {row for row, _ in whole[0]}
    assert list(generate_rows(MODEL, ROWS, repeats=REPEATS, done=done, **options)) == whole[1:]


@pytest.mark.parametrize(
    "edit", [steered(2.0, "all"), steered(2.0, (4, 9)), noisy("prompt"), self_amplify(0, 1.0, n_layers=L, d_model=D)]
)
def test_what_changes_the_prompt_is_refused(edit: Intervention) -> None:
    """Where values are traced, and cannot be refused, the row says that it means nothing."""
    rows = [Row(PROMPTS[0], row_key(0, "x", n), edit if n == 2 else steered(2.0), f"draw {n}") for n in range(REPEATS)]
    with pytest.raises(ValueError, match=r"draw 2 changes something inside the prompt .* the span `generated`"):
        sampled(rows, Sampling(), repeats=REPEATS)
    ids, positions = left_pad([PROMPTS[0]], 64)
    keys, edits = jnp.stack([row.key for row in rows]), stack_rows([row.intervention for row in rows])
    given: dict[str, Any] = {"max_new_tokens": G, "repeats": REPEATS}
    with pytest.raises(ValueError, match="row 2 changes something inside the prompt"):
        generate(MODEL, jnp.asarray(ids), jnp.asarray(positions), keys, edits, **given)
    assert compiled_generate(MODEL, ids, positions, keys, edits, **given).finite.tolist() == [True, True, False, True]


def test_a_span_that_begins_where_the_prompt_ends_is_accepted() -> None:
    length = len(PROMPTS[3])
    rows = [Row(PROMPTS[3], row_key(0, "x", n), steered(2.0, (length, length + 3))) for n in range(2)]
    assert sampled(rows, Sampling(1.0), repeats=2) == sampled(rows, Sampling(1.0))


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
