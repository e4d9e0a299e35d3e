"""What is done to the residual stream, against torch hooks of a few lines and against its own definition."""

import dataclasses
import functools
import operator
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from helpers import hf_llama, relative_error, save

from backtrack_jax import generate
from backtrack_jax.intervention import (
    END,
    PROMPT_END,
    Intervention,
    ablate,
    add_vector,
    clamp,
    frozen_noise,
    gaussian_noise,
    keeping_norm,
    matched_noise,
    no_intervention,
    noise_outside,
    noise_part_within,
    noise_within,
    self_amplify,
    stack_rows,
    when_component,
    when_token,
    with_same_terms,
)
from backtrack_jax.models import checkpoint
from backtrack_jax.models.batching import left_pad
from backtrack_jax.models.decoder import Decoder
from backtrack_jax.terms import Ablate, Add, Amplify, Noise, Term

pytest.importorskip("torch", reason="needs torch and transformers to compare with")

import torch
import transformers

pytestmark = pytest.mark.hf

ROOT = Path(__file__).parents[1]

L, D, T, B = 3, 40, 10, 6
TOLERANCE = 1e-5
SIZES: Any = {"n_layers": L, "d_model": D}
IDS = np.random.default_rng(0).integers(0, 131, (B, T)).astype(np.int32)
POSITIONS = np.tile(np.arange(T, dtype=np.int32), (B, 1))
VECTOR = jax.random.normal(jax.random.key(1), (D,))
OTHERS = jax.random.normal(jax.random.key(2), (2, D))
OTHER = OTHERS[0]
NOTHING = no_intervention(**SIZES)
PLUS = add_vector(VECTOR, 1, 2.0, n_layers=L)
NEW: dict[str, Callable[[Any], Intervention]] = {
    "noise inside": lambda s: noise_within(OTHERS, 1, s, n_layers=L),
    "part of noise": lambda s: noise_part_within(OTHERS, 1, s, n_layers=L),
    "noise outside": lambda s: noise_outside(OTHERS, 1, s, n_layers=L),
    "matched noise": lambda s: matched_noise(OTHERS, 1, s, n_layers=L),
    "frozen noise": lambda s: frozen_noise(1, s, **SIZES),
    "norm kept": lambda s: keeping_norm(add_vector(VECTOR, 1, s, n_layers=L)),
    "token gate": lambda s: when_token(add_vector(VECTOR, 1, s, n_layers=L), range(0, 131, 2), 131),
    "component gate": lambda s: when_component(add_vector(VECTOR, 1, s, n_layers=L), OTHER, 0.0),
    "burst": lambda s: add_vector(VECTOR, 1, s, n_layers=L, span=(2, 5)) + self_amplify(1, s, span=(4, 8), **SIZES),
}


def has(intervention: Intervention, kind: type[Any]) -> Any:
    """The term of a kind, which is there."""
    (term,) = (term for term in intervention.terms if isinstance(term, kind))
    return term


def anything(value: Any) -> Any:
    """For types that no checker lets through, but a notebook does."""
    return value


@functools.cache
def models() -> tuple[transformers.LlamaForCausalLM, Decoder]:
    reference = hf_llama()
    with tempfile.TemporaryDirectory() as folder:
        return reference, checkpoint.load(str(save(reference, Path(folder))))


@jax.jit
def _states(model: Decoder, ids: jax.Array, positions: jax.Array, intervention: Intervention | None) -> jax.Array:
    return model(ids, positions, intervention=intervention, capture=lambda block: block.resid_post).captured


def states(rows: list[Intervention] | None, ids: np.ndarray = IDS, positions: np.ndarray = POSITIONS) -> np.ndarray:
    """Outputs of all blocks, [L, B, T, D], with one intervention per row, filled up with rows of none."""
    if rows is None:
        return np.asarray(_states(models()[1], ids, positions, None))
    filled = stack_rows(rows + [NOTHING] * (len(ids) - len(rows)))
    return np.asarray(_states(models()[1], ids, positions, filled))


def test_no_strength_is_the_plain_program_to_the_bit():
    zeros = [
        NOTHING,
        add_vector(VECTOR, 1, 0.0, n_layers=L),
        add_vector(0 * VECTOR, 1, 7.0, n_layers=L),
        self_amplify(1, 0.0, **SIZES),
        gaussian_noise(1, 0.0, jax.random.key(0), **SIZES),
        ablate(VECTOR, share=0.0, n_layers=L),
    ]
    for some in (zeros, [make(0.0) for make in list(NEW.values())[:5]], [make(0.0) for make in list(NEW.values())[5:]]):
        np.testing.assert_array_equal(states(some), states(None))


def test_other_rows_of_a_batch_stay_as_they_are_to_the_bit():
    """Whatever kinds of terms their batch mates have, and though these may be infinite."""
    infinite = add_vector(VECTOR, 1, 2.0, n_layers=L)
    infinite = dataclasses.replace(infinite, terms=(Add(has(infinite, Add).strength, jnp.full((L, D), jnp.inf)),))
    mates = [infinite, self_amplify(1, 3.0, **SIZES), gaussian_noise(1, 2.0, jax.random.key(0), **SIZES)]
    steered = states([*mates, ablate(OTHERS, n_layers=L), NOTHING])
    np.testing.assert_array_equal(steered[:, 4:], states(None)[:, 4:])
    assert not np.isfinite(steered[1, 0]).any()


def test_added_vector_changes_its_layer_by_exactly_that_and_none_before():
    plain = states(None)
    steered = states([add_vector(VECTOR, 1, magnitude, n_layers=L) for magnitude in (-3.0, 0.5, 12.0)])
    np.testing.assert_array_equal(steered[0], plain[0])
    for row, magnitude in enumerate((-3.0, 0.5, 12.0)):
        np.testing.assert_allclose(steered[1, row] - plain[1, row], np.tile(magnitude * VECTOR, (T, 1)), atol=1e-5)
        assert np.all(np.any(steered[2, row] != plain[2, row], axis=-1))
    np.testing.assert_array_equal(steered[:, 3:], plain[:, 3:])


@pytest.mark.parametrize(
    ("span", "selected"),
    [
        ("all", range(T)),
        ("prompt", range(6)),
        ("generated", range(6, T)),
        ((2, 5), range(2, 5)),
        ((8, 99), range(8, T)),
    ],
)
def test_only_positions_of_the_span_change(span, selected):
    key = jax.random.key(0)
    rows = [
        add_vector(VECTOR, 1, 2.0, n_layers=L, span=span),
        self_amplify(1, 2.0, span=span, **SIZES),
        gaussian_noise(1, 2.0, key, span=span, **SIZES),
        ablate(VECTOR, [1], n_layers=L, span=span),
    ]
    resolved = [row.resolve(jnp.array(6)) for row in rows]
    plain, steered = states(None), states(resolved)
    changed = np.any(steered[1] != plain[1], axis=-1)
    expected = np.zeros((B, T), bool)
    expected[: len(rows), list(selected)] = True
    np.testing.assert_array_equal(changed, expected)
    np.testing.assert_array_equal(steered[0], plain[0])
    np.testing.assert_array_equal(steered[:, :, : min(selected)], plain[:, :, : min(selected)])


def test_padding_is_never_changed():
    ids, positions = left_pad([row[:n].tolist() for row, n in zip(IDS, (3, 10, 7, 1, 9, 5), strict=True)], T)
    steered = states([add_vector(VECTOR, 1, 5.0, n_layers=L)] * B, ids, positions)
    plain = states(None, ids, positions)
    np.testing.assert_array_equal(np.any(steered[1] != plain[1], axis=-1), positions >= 0)


Edit = Callable[[torch.Tensor], torch.Tensor]


@contextmanager
def edited(reference: transformers.LlamaForCausalLM, layers: range, edit: Edit, span: range) -> Iterator[None]:
    """Runs torch with the outputs of `layers` edited at the columns of `span`."""

    def hook(module: torch.nn.Module, args: tuple, output: torch.Tensor | tuple) -> torch.Tensor | tuple:
        hidden = output if isinstance(output, torch.Tensor) else output[0]  # depends on the version of transformers
        assert hidden.shape[1:] == (T, D)
        hidden = hidden.clone()
        hidden[:, span.start : span.stop] = edit(hidden[:, span.start : span.stop])
        return hidden if isinstance(output, torch.Tensor) else (hidden, *output[1:])

    handles = [reference.model.layers[layer].register_forward_hook(hook) for layer in layers]
    yield
    for handle in handles:
        handle.remove()


def projected(x: torch.Tensor, *directions: torch.Tensor) -> torch.Tensor:
    """The component of x in the span of some directions, by the pseudoinverse."""
    basis = torch.stack(directions).double()
    return (x.double() @ torch.linalg.pinv(basis) @ basis).float()


V, W1, W2 = (torch.tensor(np.asarray(vector)) for vector in (VECTOR, *OTHERS))
AT: Any = {"n_layers": L, "span": (3, 9)}


def own(x: torch.Tensor) -> torch.Tensor:
    return x / x.norm(dim=-1, keepdim=True)


HOOKED: dict[str, tuple[Intervention, range, Edit]] = {
    "add": (add_vector(VECTOR, 0, 4.0, **AT), range(0, 1), lambda x: x + 4 * V),
    "subtract": (add_vector(VECTOR, 2, -4.0, **AT), range(2, 3), lambda x: x - 4 * V),
    "add twice": (
        add_vector(VECTOR, 1, 4.0, **AT) + add_vector(OTHERS[0], 1, -2.0, **AT) + add_vector(OTHERS[1], 1, 1.0, **AT),
        range(1, 2),
        lambda x: x + 4 * V - 2 * W1 + W2,
    ),
    "amplify": (self_amplify(1, 3.0, d_model=D, **AT), range(1, 2), lambda x: x + 3 * own(x)),
    "shrink": (self_amplify(1, -3.0, d_model=D, **AT), range(1, 2), lambda x: x - 3 * own(x)),
    "ablate everywhere": (ablate(3 * VECTOR, **AT), range(L), lambda x: x - projected(x, V)),
    "ablate one layer": (ablate(VECTOR, [1, 1], **AT), range(1, 2), lambda x: x - projected(x, V)),
    "ablate half": (ablate(VECTOR, [1], 0.5, **AT), range(1, 2), lambda x: x - 0.5 * projected(x, V)),
    "add to the component": (ablate(VECTOR, [1], -1.0, **AT), range(1, 2), lambda x: x + projected(x, V)),
    "ablate three": (
        ablate(jnp.stack([VECTOR, *OTHERS]), [1, 2], **AT),
        range(1, 3),
        lambda x: x - projected(x, V, W1, W2),
    ),
    "ablations in one layer": (
        ablate(VECTOR, [1], **AT) + ablate(OTHERS, [1], **AT),
        range(1, 2),
        lambda x: x - projected(x, V, W1, W2),
    ),
    "an ablation beside an addition": (
        add_vector(VECTOR, 1, 4.0, **AT) + ablate(VECTOR, [1], **AT),
        range(1, 2),
        lambda x: x + 4 * V - projected(x, V),
    ),
    "clamp": (
        clamp(3 * VECTOR, 1, 2.5, **AT),
        range(1, 2),
        lambda x: x - projected(x, V) + 2.5 * own(V),
    ),
    "the norm stays": (
        keeping_norm(add_vector(VECTOR, 1, 4.0, **AT) + ablate(OTHERS[0], [1], **AT)),
        range(1, 2),
        lambda x: own(x + 4 * V - projected(x, W1)) * x.norm(dim=-1, keepdim=True),
    ),
    "where a component is large": (
        when_component(add_vector(VECTOR, 1, 4.0, **AT), 2 * OTHERS[0], 0.02),
        range(1, 2),
        lambda x: torch.where(x @ own(W1)[:, None] > 0.02, x + 4 * V, x),
    ),
    "where a component is small": (
        when_component(ablate(VECTOR, [1], **AT), -OTHERS[0], -0.02),
        range(1, 2),
        lambda x: torch.where(x @ own(W1)[:, None] < 0.02, x - projected(x, V), x),
    ),
    "a burst inside the span": (
        add_vector(VECTOR, 1, 4.0, **AT) + self_amplify(1, 3.0, n_layers=L, d_model=D, span=(4, 6)),
        range(1, 2),
        lambda x: x + 4 * V + 3 * own(x) * ((torch.arange(3, 9) >= 4) & (torch.arange(3, 9) < 6))[:, None],
    ),
    "all but noise": (
        ablate(OTHERS[0], [1], **AT) + self_amplify(1, 3.0, d_model=D, **AT) + add_vector(VECTOR, 1, 4.0, **AT),
        range(1, 2),
        lambda x: x + 4 * V + 3 * own(x) - projected(x, W1),
    ),
}


@pytest.mark.parametrize("together", [False, True], ids=["kinds of the row alone", "all kinds"])
def test_torch_with_a_hook_gives_the_same_logits(together: bool):
    """Each sum of terms, in a batch that has its kinds alone and in one that has all of them."""
    reference, model = models()
    noisy = gaussian_noise(1, 2.0, jax.random.key(0), **SIZES)
    for first in range(0, len(HOOKED), B - 1) if together else range(len(HOOKED)):
        some = list(HOOKED.items())[first : first + B - 1] if together else list(HOOKED.items())[first : first + 1]
        out = states([*(row for _, (row, _, _) in some), *[noisy] * together])
        logits = np.asarray(jax.jit(model.logits)(out[-1]))
        for row, (name, (_, layers, edit)) in enumerate(some):
            ids = torch.tensor(IDS[row : row + 1])
            with edited(reference, layers, edit, range(3, 9)), torch.no_grad():
                expected = reference(ids, use_cache=False).logits[0]
            with torch.no_grad():
                plain = reference(ids, use_cache=False).logits[0]
            assert relative_error(logits[row], expected) < TOLERANCE, name
            assert relative_error(logits[row], plain) > 0.01, name


@pytest.mark.parametrize("ids", [{int(IDS[0, 3])}, {int(IDS[0, 5]), int(IDS[1, 2]), 130}])
def test_a_token_gate_is_open_at_its_tokens_alone(ids: set[int]):
    """In a row alone, in any batch, and of ids beyond the gate's vocabulary nowhere."""
    steered = states([when_token(PLUS, ids, 131), PLUS, when_token(NOTHING, ids, 131)])
    plain, everywhere = states(None), states([PLUS] * 3)
    held = np.isin(IDS[0], list(ids))
    assert 0 < held.sum() < T
    np.testing.assert_array_equal(steered[1, 0][~held], plain[1, 0][~held])
    np.testing.assert_allclose(steered[1, 0][held], plain[1, 0][held] + 2 * VECTOR, atol=1e-5)
    np.testing.assert_array_equal(steered[:, 1], everywhere[:, 1])
    np.testing.assert_array_equal(steered[:, 2:], plain[:, 2:])
    short = stack_rows([when_token(PLUS, [2], 3)])
    at = short.for_tokens(jnp.asarray([[2, 0, 3, 130]])).open
    np.testing.assert_array_equal(at, [[True, False, False, False]])


def test_gates_are_applied_in_every_step_of_sampling():
    """What a full pass over the reply gives, since a step knows its input token and its activation."""
    model = models()[1]
    rows = [
        when_token(add_vector(9 * VECTOR, 1, 1.0, n_layers=L), range(0, 131, 2), 131),
        when_component(add_vector(9 * VECTOR, 1, 1.0, n_layers=L), OTHERS[0], 0.0),
        keeping_norm(add_vector(9 * VECTOR, 1, 1.0, n_layers=L)),
        add_vector(9 * VECTOR, 1, 1.0, n_layers=L, span="generated[2:4]"),
        NOTHING,
    ]
    batch, prompts = stack_rows(rows), jnp.asarray(IDS[: len(rows)])
    keys = jax.random.split(jax.random.key(0), len(rows))
    reply = generate.compiled_generate(model, prompts, POSITIONS[: len(rows)], keys, batch, max_new_tokens=6).ids
    full = jnp.concatenate([prompts, reply], axis=1)[:, :-1]
    at = jnp.tile(jnp.arange(full.shape[1]), (len(rows), 1))
    out = model(full, at, intervention=batch.resolve(jnp.full(len(rows), T)))
    np.testing.assert_array_equal(reply, jnp.argmax(model.logits(out.resid), axis=-1)[:, T - 1 :])
    assert len({tuple(row.tolist()) for row in reply}) == len(rows)


def test_generated_positions_are_counted_from_the_prompts_end():
    row = add_vector(VECTOR, 1, 1.0, n_layers=L, span="generated[2:18]") + self_amplify(1, 1.0, span=(0, 3), **SIZES)
    resolved = stack_rows([row, row]).resolve(jnp.array([5, 9]))
    np.testing.assert_array_equal(has(resolved, Add).during[:, 0], [[7, 23], [11, 27]])
    np.testing.assert_array_equal(has(resolved, Amplify).during[:, 0], [[0, 3], [0, 3]])
    assert not resolved.unresolved().any() and stack_rows([row]).unresolved().all()
    with pytest.raises(ValueError, match=r"the spans of rows .0, 1. are"):
        stack_rows([row, row]).check(2, L, D)


def drawn(row: Intervention, key: int) -> np.ndarray:
    """What is added at each position of layer 1, [T, D]."""
    one = dataclasses.replace(row, key=generate.key_of(key))
    return states([one])[1, 0] - states(None)[1, 0]


def test_noise_in_a_subspace_and_outside_of_it():
    basis = np.linalg.qr(np.asarray(OTHERS, np.float64).T)[0].T
    within = drawn(noise_within(3 * OTHERS, 1, 2.0, n_layers=L), 1)
    outside = drawn(noise_outside(OTHERS, 1, 2.0, n_layers=L), 1)
    np.testing.assert_allclose(np.linalg.norm(within, axis=1), 2.0, rtol=1e-4)
    np.testing.assert_allclose(within @ basis.T @ basis, within, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(outside, axis=1), 2.0, rtol=1e-4)
    np.testing.assert_allclose(outside @ basis.T, 0, atol=1e-5)
    for noise in (within, outside):
        assert np.abs(noise[1:] - noise[:-1]).max(axis=1).min() > 0.01  # fresh at every position


def test_a_part_of_noise_has_the_variance_that_isotropic_noise_has_there():
    row = noise_part_within(VECTOR, 1, 3.0, n_layers=L)
    unit = np.asarray(VECTOR / jnp.linalg.norm(VECTOR))
    many = np.concatenate([drawn(row, key) for key in range(60)])
    np.testing.assert_allclose(np.outer(many @ unit, unit), many, atol=1e-5)
    scaled = many @ unit * np.sqrt(D) / 3.0
    assert abs(scaled.std() - 1) < 4 / np.sqrt(2 * len(scaled)) and abs(scaled.mean()) < 4 / np.sqrt(len(scaled))
    assert scipy.stats.kstest(scaled, "norm").pvalue > 1e-3


def test_matched_noise_has_the_directions_of_its_covariance():
    factor = np.stack([3 * np.eye(D)[0], np.eye(D)[1]]).astype(np.float32)
    many = np.concatenate([drawn(matched_noise(jnp.asarray(factor), 1, 2.0, n_layers=L), key) for key in range(60)])
    np.testing.assert_allclose(np.linalg.norm(many, axis=1), 2.0, rtol=1e-4)
    assert np.abs(many[:, 2:]).max() < 1e-5
    angle = np.arctan2(many[:, 1] / 1.0, many[:, 0] / 3.0)  # uniform if the covariance is the one asked for
    assert scipy.stats.kstest((angle + np.pi) / (2 * np.pi), "uniform").pvalue > 1e-3


def test_frozen_noise_is_one_direction_of_a_row():
    frozen = drawn(frozen_noise(1, 2.0, **SIZES), 1)
    np.testing.assert_allclose(frozen, np.tile(frozen[0], (T, 1)), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(frozen, axis=1), 2.0, rtol=1e-4)
    assert np.abs(frozen[0] - drawn(frozen_noise(1, 2.0, **SIZES), 2)[0]).max() > 0.1
    both = stack_rows([frozen_noise(1, 2.0, **SIZES), gaussian_noise(1, 2.0, **SIZES)])
    np.testing.assert_array_equal(has(both, Noise).frozen[:, 0], [True, False])


@pytest.mark.parametrize("kind", NEW)
def test_a_row_of_any_kind_is_the_same_in_any_batch(kind: str):
    """Alone, and beside rows of every kind, of larger subspaces, with gates."""
    row = NEW[kind](1.5)
    alone = states([row])[:, 0]
    among = states([row, noise_within(jnp.eye(D)[:7], 1, 2.0, n_layers=L), when_component(PLUS, VECTOR, 0.0)])[:, 0]
    np.testing.assert_allclose(among, alone, atol=1e-6)
    assert np.abs(alone[1] - states(None)[1, 0]).max() > 0.01


def test_ablated_stream_has_no_component_left():
    steered = states([ablate(VECTOR, n_layers=L), ablate(jnp.stack([VECTOR, *OTHERS, VECTOR - OTHERS[0]]), n_layers=L)])
    sizes = np.linalg.norm(steered, axis=-1)
    for direction, row in ((VECTOR, 0), *((direction, 1) for direction in (VECTOR, *OTHERS))):
        unit = np.asarray(direction / jnp.linalg.norm(direction))
        assert np.max(np.abs(steered[:, row] @ unit) / sizes[:, row]) < 1e-6
        assert np.median(np.abs(steered[:, 2] @ unit) / sizes[:, 2]) > 1e-3


@pytest.mark.parametrize("norm", [1e-15, 1e-7, 1.0, 1e15])
def test_activations_of_any_norm_are_amplified_by_the_length(norm: float):
    """However short, and not at all where there is no direction."""
    x = norm * jnp.stack([VECTOR, jnp.zeros(D)])[None] / jnp.linalg.norm(VECTOR)
    row = stack_rows([self_amplify(1, 3.0, **SIZES)])
    at_layer = jax.tree.map(lambda leaf: leaf[1], row.at_layers())
    after = row.apply(x, at_layer, jnp.int32(1), jnp.array([[4, 5]]))
    np.testing.assert_allclose(after[0, 0], (norm + 3.0) * VECTOR / np.linalg.norm(VECTOR), rtol=1e-6)
    np.testing.assert_array_equal(after[0, 1], np.zeros(D))


def noise(rows: list[Intervention], layer: int = 1) -> np.ndarray:
    """What was added at the layer, [B, T, D]."""
    return states(rows)[layer] - states(None)[layer]


def test_noise_has_the_length_asked_for_and_a_new_direction_at_every_position():
    rows = [gaussian_noise(1, magnitude, jax.random.key(0), **SIZES) for magnitude in (1.0, 20.0)]
    added = noise(rows)[:2]
    np.testing.assert_allclose(np.linalg.norm(added, axis=-1), [[1.0] * T, [20.0] * T], rtol=1e-4)
    directions = added / np.linalg.norm(added, axis=-1, keepdims=True)
    np.testing.assert_allclose(directions[0], directions[1], atol=1e-4)  # the same draw at another length
    cosines = directions[1] @ directions[1].T
    assert np.max(np.abs(cosines - np.eye(T))) < 0.75  # of 45 pairs in 40 dimensions
    assert abs(np.mean(cosines[~np.eye(T, dtype=bool)])) < 0.1


def test_noise_depends_on_key_layer_and_position_and_on_nothing_else():
    key, other = jax.random.key(0), jax.random.key(1)
    row = gaussian_noise(1, 5.0, key, **SIZES)
    first = noise([row, gaussian_noise(1, 5.0, other, **SIZES)])
    moved = noise([NOTHING, NOTHING, add_vector(VECTOR, 0, 1.0, n_layers=L), NOTHING, row])
    np.testing.assert_allclose(moved[4], first[0], atol=1e-5)  # another row, other batch mates, other text
    assert relative_error(first[1], first[0]) > 1
    assert relative_error(noise([gaussian_noise(2, 5.0, key, **SIZES)], layer=2)[0], first[0]) > 1
    mirrored = noise([gaussian_noise(1, -5.0, key, **SIZES)])
    np.testing.assert_allclose(mirrored[0], -first[0], atol=1e-5)
    shifted = states([row], IDS, POSITIONS + 3)[1] - states([NOTHING], IDS, POSITIONS + 3)[1]
    np.testing.assert_allclose(shifted[0, : T - 3], first[0, 3:], atol=1e-5)


@pytest.mark.parametrize(
    ("left", "right", "message"),
    [
        (
            ablate(VECTOR, [0, 1], n_layers=L),
            ablate(OTHERS[0], share=0.5, n_layers=L),
            "the operands ablate the shares 1 and 0.5 in layer 0",
        ),
        (
            PLUS,
            add_vector(VECTOR, 1, 2.0, n_layers=L, span=(2, 5)),
            "both operands have a term Add, on different",
        ),
        (NOTHING, keeping_norm(PLUS), "an operand has a gate or keeps its norm; add rows first"),
        (when_component(PLUS, VECTOR, 1.0), PLUS, "an operand has a gate or keeps its norm; add rows first"),
        (PLUS, gaussian_noise(1, 2.0, jax.random.key(1), **SIZES), r"expected the noise on the left, or the same key"),
    ],
    ids=["ablations", "spans", "norm", "gate", "noise"],
)
def test_a_sum_that_is_not_both_changes_is_refused(left, right, message):
    """Of rows, of batches of them, and where they are constants of a program."""
    with pytest.raises(ValueError, match=message):
        operator.add(left, right)
    with pytest.raises(ValueError, match=message):
        operator.add(stack_rows([PLUS, left]), stack_rows([PLUS, right]))
    with pytest.raises(ValueError, match=message):
        jax.jit(lambda x: (left + right).span + x)(0)


def test_ablations_that_are_traced_are_not_summed():
    """Whether their directions are orthogonal is not known; all of them in one ablation are made so."""
    message = r"both operands ablate, and their values are traced; `ablate` takes several directions"
    with pytest.raises(ValueError, match=message):
        jax.jit(lambda v: (ablate(v, n_layers=L) + ablate(OTHERS, n_layers=L)).span)(VECTOR)
    three = jnp.stack([1e30 * VECTOR, *OTHERS])
    traced, concrete = (
        has(f(three), Ablate) for f in (jax.jit(lambda v: ablate(v, n_layers=L)), lambda v: ablate(v, n_layers=L))
    )
    projections = [np.einsum("lrd,lre->lde", term.directions, term.directions) for term in (traced, concrete)]
    np.testing.assert_allclose(*projections, atol=1e-6)


def test_a_sum_is_both_changes():
    """Whatever span and key a right operand without a change has; noise of one key in two layers; traced values."""
    quiet = no_intervention(**SIZES, span="generated", key=jax.random.key(2, impl="rbg"))
    early, late = (ablate(VECTOR, [layer], n_layers=L) for layer in (0, 2))
    jax.tree.map(np.testing.assert_array_equal, (early + late + quiet).terms, ablate(VECTOR, [0, 2], n_layers=L).terms)
    assert (quiet + NOTHING).terms == ()
    noisy, noisier = (gaussian_noise(layer, 2.0, jax.random.key(1), **SIZES) for layer in (0, 2))
    batch = stack_rows([PLUS, noisy]) + stack_rows([early, noisier])
    np.testing.assert_array_equal(has(batch, Noise).strength, [[0, 0, 0], [2, 0, 2]])
    np.testing.assert_array_equal(has(batch, Ablate).strength, [[1, 0, 0], [0, 0, 0]])
    np.testing.assert_array_equal(has(batch, Add).strength, [[0, 1, 0], [0, 0, 0]])
    twice = has(self_amplify(1, 2.0, **SIZES) + self_amplify(1, 0.5, **SIZES) + self_amplify(2, 1.0, **SIZES), Amplify)
    np.testing.assert_array_equal(twice.strength, [0, 2.5, 1])
    swept = jax.jit(jax.vmap(lambda length: PLUS + add_vector(VECTOR, 2, length, n_layers=L)))(jnp.ones(2))
    np.testing.assert_array_equal(has(swept, Add).vector, jnp.stack([jnp.array([[0.0], [2.0], [1.0]]) * VECTOR] * 2))
    np.testing.assert_array_equal(has(swept, Add).strength, [[0, 1, 1]] * 2)


def test_the_same_direction_twice_is_ablated_once():
    """Dependent directions span no more than one of them; the rank is that of the largest layer."""
    both = ablate(VECTOR, n_layers=L) + ablate(-2 * VECTOR, [1], n_layers=L)
    np.testing.assert_array_equal(has(both, Ablate).directions, has(ablate(VECTOR, n_layers=L), Ablate).directions)
    term = has(ablate(VECTOR, n_layers=L) + ablate(jnp.stack([OTHERS[0], VECTOR]), [1], n_layers=L), Ablate)
    assert term.directions.shape == (L, 2, D)
    gram = np.einsum("lrd,lsd->lrs", term.directions, term.directions)
    np.testing.assert_allclose(gram, [np.diag([1, layer == 1]) for layer in range(L)], atol=1e-6)


def test_a_batch_has_the_kinds_that_its_rows_have_and_no_others():
    """What no row has costs nothing; ranks are filled up."""
    rows = [PLUS, self_amplify(1, 2.0, **SIZES), NOTHING]
    assert [type(term) for term in stack_rows(rows).terms] == [Add, Amplify]
    assert stack_rows([NOTHING, NOTHING]).terms == ()
    noisy = gaussian_noise(1, 2.0, jax.random.key(1), **SIZES)
    ablations = [ablate(OTHERS, n_layers=L), noisy + ablate(VECTOR, n_layers=L) + PLUS]
    batch = stack_rows([*ablations, *rows])
    assert [type(term) for term in batch.terms] == [Ablate, Add, Amplify, Noise]
    assert {leaf.shape[:2] for leaf in jax.tree.leaves(batch.terms)} == {(5, L)}
    assert has(batch, Ablate).directions.shape == (5, L, 2, D)
    same = with_same_terms(rows)
    assert stack_rows(same[:1]).terms[1].strength.shape == (1, L)
    assert with_same_terms(same)[0].terms[0] is same[0].terms[0] is PLUS.terms[0], "arrays are not copied"


def test_a_new_term_is_a_class():
    """As docs/howto says: through sums, batches and decoding with a cache."""
    code = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "howto" / "term.md").read_text(), re.DOTALL)
    there: dict[str, Any] = {}
    exec(compile(code[0], "term.md", "exec"), there)
    unit = VECTOR / jnp.linalg.norm(VECTOR)
    row = there["cap"](unit, 1, -9.0, n_layers=L)
    steered = states([row, PLUS, row + PLUS])
    plain = states(None)[1] @ unit
    assert plain.min() > -9.0
    np.testing.assert_allclose(steered[1, 0] @ unit, np.minimum(plain[0], -9.0), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(steered[:, 1], states([NOTHING, PLUS])[:, 1])
    added = 2 * jnp.linalg.norm(VECTOR)
    np.testing.assert_allclose(steered[1, 2] @ unit, np.minimum(plain[2], -9.0) + added, rtol=1e-5)
    with pytest.raises(ValueError, match="both operands have a term Cap, but a row can have only one"):
        operator.add(row, row)
    model, ids, positions = models()[1], jnp.asarray(IDS[:2]), jnp.asarray(POSITIONS[:2])
    replies = [
        generate.compiled_generate(
            model, ids, positions, jax.random.split(jax.random.key(0)), rows, max_new_tokens=4
        ).ids
        for rows in (stack_rows([row, NOTHING]), stack_rows([NOTHING, NOTHING]))
    ]
    full = jnp.concatenate([ids, replies[0]], axis=1)[:, :-1]
    out = model(full, jnp.tile(jnp.arange(T + 3), (2, 1)), intervention=stack_rows([row, NOTHING]))
    np.testing.assert_array_equal(replies[0], jnp.argmax(model.logits(out.resid), axis=-1)[:, T - 1 :])
    assert (replies[0] != replies[1]).any(axis=1).tolist() == [True, False]


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ((Add(jnp.ones((B, L)), jnp.ones((B, L, 1))),), rf"Add.delta has shape \({B}, 1, 1\), expected"),
        (
            (Amplify(jnp.ones((1, L))),),
            rf"Amplify has an array of shape \(1, 3\), expected \(rows, layers\) = \({B}, 3\)",
        ),
        ((Ablate(jnp.ones((B, L)), jnp.ones((L, 1, D))),), r"Ablate has an array of shape \(3, 1, \d+\), expected"),
    ],
)
def test_terms_of_other_shapes_are_refused(terms: tuple[Term, ...], message: str):
    """They would spread over dimensions, rows or layers."""
    rows = dataclasses.replace(stack_rows([NOTHING] * B), terms=terms)
    with pytest.raises(ValueError, match=message):
        models()[1](jnp.asarray(IDS), jnp.asarray(POSITIONS), intervention=rows)


def test_layer_length_and_vector_are_traced():
    """A sweep over all of them traces once, under jit as under vmap."""
    traces = []

    @jax.jit
    def sweep(layer: jax.Array, lengths: jax.Array, vector: jax.Array) -> jax.Array:
        traces.append(1)
        row = jax.vmap(lambda length: add_vector(vector, layer, length=length, n_layers=L))(lengths)
        return has(row, Add).vector

    for layer in range(L):
        lengths = jnp.array([1.0, 2.0]) + layer
        added = sweep(jnp.array(layer), lengths, VECTOR * (layer + 1))
        expected = np.zeros((2, L, D))
        expected[:, layer] = np.outer(lengths, VECTOR * (layer + 1))
        np.testing.assert_allclose(added, expected, rtol=1e-6)
    assert len(traces) == 1


def test_spans_resolve_per_row():
    rows = [no_intervention(**SIZES, span=span) for span in ("all", "prompt", "generated", (3, 5))]
    resolved = stack_rows(rows).resolve(jnp.array([7, 8, 9, 10]))
    np.testing.assert_array_equal(resolved.span, [[0, END], [0, 8], [9, END], [3, 5]])
    assert PROMPT_END < 0  # no position, so an unresolved span cannot be mistaken for one


@pytest.mark.parametrize("span", ["prompt", "generated"])
def test_a_span_that_waits_for_the_prompts_length_is_refused_or_gives_nan(span):
    """The model knows no prompt: refused where the value is known, also in a program; traced, its row is no number."""
    model, rows = models()[1], stack_rows([NOTHING] * (B - 1) + [add_vector(VECTOR, 1, 2.0, n_layers=L, span=span)])
    for compiled in (lambda f: f, jax.jit):
        with pytest.raises(ValueError, match=r"spans of rows \[5\] are `prompt` or `generated`.* call `resolve`"):
            compiled(lambda ids: model(ids, jnp.asarray(POSITIONS), intervention=rows))(IDS)
    found, plain = _states(model, IDS, POSITIONS, rows), states(None)
    np.testing.assert_array_equal(found[:, : B - 1], plain[:, : B - 1])
    assert np.isnan(found[:, B - 1]).all()


def test_keys_of_rows_do_not_depend_on_the_default_generator():
    """Of another default, a row's draws would depend on the batch that it is in."""
    with jax.default_prng_impl("unsafe_rbg"):
        keys = [no_intervention(**SIZES).key, generate.row_key(3, "a", 0)]
    assert keys[0] == jax.random.key(0, impl="threefry2x32")
    assert keys[1] == generate.row_key(3, "a", 0)


@pytest.mark.parametrize("kind", [int, np.int64, np.int32, jnp.int32])
@pytest.mark.parametrize("layer", [-1, L])
def test_a_layer_that_is_not_there_is_refused(layer, kind):
    """Whatever kind of integer it is, also beside traced values."""
    concrete = kind(layer)
    for compiled in (lambda f: f, jax.jit):
        with pytest.raises(ValueError, match=rf"layer={layer} is outside 0..2"):
            compiled(lambda length: add_vector(VECTOR, concrete, length, n_layers=L))(1.0)
    with pytest.raises(ValueError, match=rf"layer={layer} is outside 0..2"):
        ablate(VECTOR, [0, concrete], n_layers=L)


@pytest.mark.parametrize("span", [(3, 3), (5, 2), (-2, 4), "reply"])
def test_a_span_of_no_position_is_refused(span):
    with pytest.raises(ValueError, match="span="):
        no_intervention(**SIZES, span=span)


@pytest.mark.parametrize("vector", [jnp.ones((2, D)), jnp.ones(())])
def test_a_vector_of_another_shape_is_refused(vector):
    with pytest.raises(ValueError, match=r"expected \[d_model\]"):
        add_vector(vector, 0, 1.0, n_layers=L)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: add_vector(VECTOR, 1, anything(np.ones(D)), n_layers=L),
            r"length has shape \(\d+,\), expected one number",
        ),
        (lambda: self_amplify(1, anything(np.ones(L)), **SIZES), r"length has shape \(3,\), expected one number"),
        (lambda: ablate(VECTOR, share=np.inf, n_layers=L), "share=inf, expected a finite number"),
        (lambda: gaussian_noise(1, np.nan, jax.random.key(0), **SIZES), "length=nan, expected a finite number"),
        (lambda: add_vector(VECTOR * np.inf, 1, 1.0, n_layers=L), "the vector is not finite"),
        (lambda: add_vector(VECTOR, anything("1"), 1.0, n_layers=L), "layer='1' is outside 0..2"),
        (lambda: add_vector(VECTOR, anything([0, 1]), 1.0, n_layers=L), r"layer=\[0, 1\] is outside 0..2"),
        (
            lambda: add_vector(VECTOR, 1, 1.0, n_layers=L) + add_vector(VECTOR, 0, 1.0, n_layers=1),
            r"shapes \(3, \d+\) and \(1, \d+\), expected the same",
        ),
        (lambda: stack_rows([]), r"have the shapes \[\], expected \(layers, width\)"),
        (lambda: stack_rows([no_intervention(**SIZES), no_intervention(L + 1, D)]), "the same in all rows"),
        (lambda: stack_rows([stack_rows([no_intervention(**SIZES)])]), r"expected \(layers, width\)"),
    ],
)
def test_what_would_broadcast_or_spread_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("length", [1e-30, 1.0, 1e30])
def test_the_direction_of_an_ablation_may_have_any_length(length):
    term = has(ablate(length * VECTOR, n_layers=L), Ablate)
    np.testing.assert_allclose(term.directions[1, 0], VECTOR / np.linalg.norm(VECTOR), rtol=1e-5)


STRENGTHS = {
    "add": lambda strength: add_vector(VECTOR, 1, strength, n_layers=L),
    "amplify": lambda strength: self_amplify(1, strength, **SIZES),
    "noise": lambda strength: gaussian_noise(1, strength, jax.random.key(3), **SIZES),
    "ablate": lambda strength: ablate(VECTOR, [1], strength, n_layers=L),
    "share of an addition": lambda strength: dataclasses.replace(
        NOTHING, terms=(Add(strength * jnp.eye(L)[1], jnp.tile(VECTOR, (L, 1))),)
    ),
    **{name: make for name, make in NEW.items() if name != "burst"},  # which has a span of its own
}


@pytest.mark.parametrize(
    ("kind", "span"),
    [(kind, span) for kind in STRENGTHS for span in ("all", (2, 5)) if span == "all" or kind not in NEW],
)
def test_a_strength_of_zero_has_a_derivative(kind, span):
    """Where gradients start: a vector that is optimised from zero, an effect that is attributed to first order."""
    model = models()[1]

    @jax.jit
    def loss(strength):
        row = dataclasses.replace(STRENGTHS[kind](strength), span=jnp.array((0, 99) if span == "all" else span))
        rows = stack_rows([row, no_intervention(**SIZES)])
        resid = model(jnp.asarray(IDS[:2]), jnp.asarray(POSITIONS[:2]), intervention=rows).resid
        return jnp.sum(jnp.sin(resid[0]))

    found = jax.grad(loss)(0.0)
    step = 1e-2
    expected = (loss(step) - loss(-step)) / (2 * step)
    assert abs(expected) > 0.01
    np.testing.assert_allclose(found, expected, rtol=0.02, atol=2e-3)


def test_an_ablation_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="the direction is zero"):
        ablate(jnp.zeros(4), [0], n_layers=2)
    with pytest.raises(ValueError, match=r"layers=\[\], expected at least one"):
        ablate(jnp.ones(4), [], n_layers=2)
    with pytest.raises(ValueError, match="the direction is zero"):
        ablate(jnp.eye(4)[:2] * jnp.array([[1.0], [0.0]]), [0], n_layers=2)
    with pytest.raises(ValueError, match=r"expected \[d_model\] or \[R, d_model\]"):
        ablate(jnp.ones((1, 2, 4)), n_layers=2)
