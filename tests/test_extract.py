"""Window sums against hidden states of torch, read naively: one trace, one section, one window at a time."""

import copy
import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from torch_reference import CONFIG, tiny_llama, torch_copy, torch_residuals

from backtrack_jax import extract
from backtrack_jax.extract import (
    ESTIMATORS,
    TokenTrace,
    WindowPlan,
    WindowSums,
    add_traces,
    contraction,
    count_windows,
    load_sums,
    save_sums,
    window_sums,
)
from backtrack_jax.models.decoder import Decoder
from backtrack_jax.vectors import cosine, difference_of_means

pytestmark = pytest.mark.hf

L, D, V = CONFIG.n_layers, CONFIG.d_model, CONFIG.vocab_size
UNUSED = V - 1  # token that no trace holds
LABELS = ("deduction", "backtracking", "initializing")
GROUPS = {label: (label,) for label in LABELS} | {"all": LABELS, "rest": ("deduction", "initializing")}
WINDOWS = ((-5, -3), (-2, -2), (-1, 3))
PLAN = WindowPlan(LABELS, GROUPS, WINDOWS, layers=(2, 0))
MODEL = tiny_llama()
BATCH_SIZE = 3
SUMMED = ("sums", "counts", "read", "dropped", "norm_sum", "n_tokens")
SECTIONS = tuple(f"section_{name}" for name in ("means", "traces", "labels", "starts", "positions"))
WITHIN = dataclasses.replace(PLAN, groups=GROUPS | {"trace": LABELS}, beside={"trace": "backtracking"})


def made_traces() -> list[TokenTrace]:
    """Ragged traces in two buckets; sections overlap, touch either end, or are absent."""
    rng = np.random.default_rng(0)
    traces = []
    for number, length in enumerate((40, 100, 64, 23, 70, 12, 55)):
        reply_start = 2 + number
        starts = [(LABELS[rng.integers(len(LABELS))], int(rng.integers(reply_start, length))) for _ in range(8)]
        starts += [("initializing", reply_start), ("deduction", length - 1), ("deduction", length - 2)]
        if number == 2:
            starts = [(label, start) for label, start in starts if label != "backtracking"]
        if number == 3:
            starts = []
        ids = [0, *rng.integers(0, UNUSED, length - 1).tolist()]
        traces.append(TokenTrace(f"problem {number}/0", ids, reply_start, starts))
    return traces


TRACES = made_traces()


def changed(model: Decoder, **changes) -> Decoder:
    """A copy of the model with some leaves replaced, by the end of their path."""

    def replace(path, leaf):
        hits = [value for name, value in changes.items() if name in jax.tree_util.keystr(path)]
        return hits[0](leaf) if hits else leaf

    return jax.tree_util.tree_map_with_path(replace, model)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.sum(a * b, axis=-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


@dataclasses.dataclass
class Naive:
    """What `window_sums` promises for TRACES: its sums, and the means over the first window of each trace and group.

    Attributes:
      sums: those that are not of single sections.
      trace_means: [n, layers, C, D], of all positions that the windows of a trace read; NaN where there is none.
      trace_counts: [n, C], number of these positions.
      sections: [label, start, positions, mean [layers, D]] of every section of each trace.
    """

    sums: WindowSums
    trace_means: np.ndarray
    trace_counts: np.ndarray
    sections: list[list[tuple[str, int, int, np.ndarray]]]


def naive_sums(residuals: Sequence[np.ndarray], plan: WindowPlan) -> Naive:
    """By loops in float64."""
    total = WindowSums.zeros(plan, L, D)
    earliest = {trace.id: 1 if plan.into_prompt else trace.reply_start for trace in TRACES}
    trace_means = np.full((len(TRACES), len(plan.layers), len(plan.groups), D), np.nan)
    trace_counts = np.zeros((len(TRACES), len(plan.groups)), np.int64)
    sections = []

    def inside(trace: TokenTrace, start: int, window: tuple[int, int]) -> bool:
        return start + window[0] >= earliest[trace.id] and start + window[1] < len(trace.ids)

    for t, (trace, x) in enumerate(zip(TRACES, residuals, strict=True)):
        x = x.astype(np.float64)
        first, last = plan.windows[0]
        of_trace = []
        for label, start in trace.starts:
            window = [p for p in range(start + first, start + last + 1) if inside(trace, start, (first, last))]
            mean = x[list(plan.layers)][:, window].mean(1) if window else np.full((len(plan.layers), D), np.nan)
            of_trace.append((label, start, len(window), mean))
        sections.append(of_trace)
        for g, (group, members) in enumerate(plan.groups.items()):
            for w, (first, last) in enumerate(plan.windows):
                rows = []
                needed = plan.groups[plan.beside[group]] if group in plan.beside else ()
                if needed and not any(label in needed and inside(trace, s, (first, last)) for label, s in trace.starts):
                    continue
                for label, start in trace.starts:
                    positions = [start + offset for offset in range(first, last + 1)]
                    if label not in members:
                        continue
                    if positions[0] < earliest[trace.id] or positions[-1] >= len(trace.ids):
                        total.dropped[g, w] += 1
                        continue
                    total.read[g, w] += 1
                    rows += [x[:, position] for position in positions]
                if rows:
                    mean = np.mean(rows, axis=0)
                    total.sums[0, :, g, w] += mean
                    total.sums[1, :, g, w] += np.sum(rows, axis=0)
                    total.counts[:, g, w] += 1, len(rows)
                    if w == 0:
                        trace_means[t, :, g] = mean[list(plan.layers)]
                        trace_counts[t, g] = len(rows)
        reply = x[:, trace.reply_start :]
        total.norm_sum += np.linalg.norm(reply, axis=-1).sum(1)
        total.n_tokens += reply.shape[1]
        total.trace_ids.append(trace.id)
    return Naive(total, trace_means, trace_counts, sections)


def trace_means(ids: Sequence[str], sums: WindowSums) -> np.ndarray:
    """The means of single traces, [n, layers, C, D] in the order of `ids`."""
    by_layer = [[sums.means_by_trace(ids, group, layer) for group in sums.plan.groups] for layer in sums.plan.layers]
    return np.moveaxis(np.array(by_layer), 2, 0)


def assert_same_sums(a: WindowSums, b: WindowSums) -> None:
    """To the bit."""
    assert a.trace_ids == b.trace_ids
    for name in (*SUMMED, *SECTIONS):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


@pytest.fixture(scope="module")
def residuals() -> list[np.ndarray]:
    reference = torch_copy(MODEL)
    return [torch_residuals(reference, trace.ids) for trace in TRACES]


@pytest.fixture(scope="module")
def sums() -> WindowSums:
    return window_sums(MODEL, TRACES, PLAN, batch_size=BATCH_SIZE)


def test_layers_are_block_outputs_and_the_last_one_is_not_normed(residuals):
    """T14: this package's layer l is `hidden_states[l + 1]` but for the last, which Hugging Face norms."""
    import torch

    reference = torch_copy(MODEL)
    with torch.no_grad():
        states = reference(torch.tensor([TRACES[0].ids]), output_hidden_states=True).hidden_states
    for layer in range(L - 1):
        np.testing.assert_allclose(residuals[0][layer], states[layer + 1][0].numpy(), atol=1e-5)
    normed = reference.model.norm(torch.tensor(residuals[0][-1])).detach().numpy()
    np.testing.assert_allclose(states[-1][0].numpy(), normed, atol=1e-5)
    assert np.abs(residuals[0][-1] - normed).max() > 1


@pytest.mark.parametrize("into_prompt", [False, True])
def test_sums_equal_naive_loops_over_torch_activations(residuals, into_prompt):
    """Both estimators, every group, window and layer, in one pass (T1-T3, T14)."""
    plan = dataclasses.replace(WITHIN, into_prompt=into_prompt)
    mine, expected = window_sums(MODEL, TRACES, plan, batch_size=BATCH_SIZE), naive_sums(residuals, plan)
    naive = expected.sums
    assert sorted(mine.trace_ids) == sorted(naive.trace_ids)
    for name in ("counts", "read", "dropped", "n_tokens"):
        np.testing.assert_array_equal(getattr(mine, name), getattr(naive, name), err_msg=name)
    assert mine.sums.dtype == np.float64
    np.testing.assert_allclose(mine.sums, naive.sums, rtol=1e-4, atol=1e-4)
    assert cosines(mine.sums, naive.sums).min() >= 0.999999
    np.testing.assert_allclose(mine.norm_sum, naive.norm_sum, rtol=1e-5)
    np.testing.assert_allclose(trace_means(naive.trace_ids, mine), expected.trace_means, rtol=1e-4, atol=1e-4)
    for group in plan.groups:
        for estimator, counts in (("token_mean", expected.trace_counts), ("trace_mean", expected.trace_counts > 0)):
            weights = mine.weights_by_trace(naive.trace_ids, group, estimator)
            np.testing.assert_array_equal(weights, counts[:, list(plan.groups).index(group)])
    assert (naive.dropped > 0).any()
    assert (naive.read > 0).all()


def test_sections_equal_naive_loops_over_torch_activations(sums, residuals):
    """In the order of the traces as they were summed, with label, start and positions; NaN where dropped."""
    expected = naive_sums(residuals, PLAN).sections
    found = [section for trace_id in sums.trace_ids for section in expected[int(trace_id[8])]]
    labels, starts, positions, means = zip(*found, strict=True)
    assert [PLAN.labels[i] for i in sums.section_labels] == list(labels)
    np.testing.assert_array_equal(sums.section_starts, starts)
    np.testing.assert_array_equal(sums.section_positions, positions)
    assert set(positions) == {0, 3}
    assert sums.section_means.dtype == np.float32
    np.testing.assert_allclose(sums.section_means, np.array(means), rtol=1e-4, atol=1e-4)
    assert sums.section_traces.tolist() == [n for n, t in enumerate(sums.trace_ids) for _ in expected[int(t[8])]]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_within_trace_contrasts_equal_naive_loops_over_torch_activations(residuals, estimator):
    """D of contrast `trace` are all sections of those traces of which that window of D+ is read, at every layer."""
    sums = window_sums(MODEL, TRACES, WITHIN, batch_size=BATCH_SIZE)
    for window in WINDOWS:
        own, every = [], []
        for trace, x in zip(TRACES, residuals, strict=True):
            read: dict[str, list[np.ndarray]] = {"own": [], "all": []}
            for label, start in trace.starts:
                first, last = start + window[0], start + window[1]
                if first >= trace.reply_start and last < len(trace.ids):
                    read["all"].append(x[:, first : last + 1])
                    read["own"] += [x[:, first : last + 1]] if label == "backtracking" else []
            if read["own"]:
                own.append(np.concatenate(read["own"], axis=1).astype(np.float64))
                every.append(np.concatenate(read["all"], axis=1).astype(np.float64))
        assert 0 < len(own) < len(TRACES)
        if estimator == "trace_mean":
            own, every = ([x.mean(1, keepdims=True) for x in found] for found in (own, every))
        expected = np.concatenate(own, axis=1).mean(1) - np.concatenate(every, axis=1).mean(1)
        found = difference_of_means(sums, "backtracking", window, contrast="trace", estimator=estimator)
        np.testing.assert_allclose(found.directions, expected, rtol=1e-3, atol=1e-4)
        assert cosines(found.directions, expected).min() > 0.99999
        assert found.provenance["contrast"] == "trace"
    ids = [trace.id for trace in TRACES]
    weights = [sums.weights_by_trace(ids, group, estimator) for group in ("backtracking", "trace")]
    np.testing.assert_array_equal(weights[0] > 0, weights[1] > 0)


def test_means_are_sums_over_counts(sums, residuals):
    naive = naive_sums(residuals, PLAN).sums
    for e, g, w in np.ndindex(naive.counts.shape):
        mean = sums.mean(list(GROUPS)[g], WINDOWS[w], ESTIMATORS[e])
        assert mean.dtype == np.float64
        np.testing.assert_allclose(mean, naive.sums[e, :, g, w] / naive.counts[e, g, w], rtol=1e-4, atol=1e-5)
    assert np.abs(sums.mean("all", WINDOWS[0], "trace_mean") - sums.mean("all", WINDOWS[0], "token_mean")).max() > 1e-3
    assert np.array_equal(sums.mean("all", WINDOWS[0]), sums.mean("all", WINDOWS[0], "trace_mean")), "Eq. 3 by default"


def test_contrasts_with_all_and_with_rest_are_parallel(sums):
    """T26: of tokens, mean(bt) - mean(all) = (1 - p) (mean(bt) - mean(rest)), p the share of backtracking positions."""
    for w, window in enumerate(WINDOWS):
        to_all, to_rest = (
            difference_of_means(sums, "backtracking", window, contrast=contrast, estimator="token_mean")
            for contrast in ("all", "rest")
        )
        share = sums.counts[1, list(GROUPS).index("backtracking"), w] / sums.counts[1, list(GROUPS).index("all"), w]
        assert 0 < share < 1
        np.testing.assert_allclose(cosine(to_all, to_rest), 1, rtol=1e-10)
        np.testing.assert_allclose(to_all.directions, (1 - share) * to_rest.directions, rtol=1e-4, atol=1e-6)
    to_all, to_rest = (difference_of_means(sums, "backtracking", WINDOWS[0], contrast=c) for c in ("all", "rest"))
    assert cosine(to_all, to_rest).max() < 0.9999, "means of trace means are not parallel"


def test_mean_norm_is_over_reply_tokens(sums, residuals):
    reply = np.concatenate([x[:, trace.reply_start :] for trace, x in zip(TRACES, residuals, strict=True)], axis=1)
    np.testing.assert_allclose(sums.mean_norm, np.linalg.norm(reply, axis=-1).mean(1), rtol=1e-5)


def test_trace_means_are_nan_exactly_where_a_trace_has_no_window(sums):
    absent = np.isnan(trace_means([trace.id for trace in TRACES], sums))
    assert sums.means_by_trace(sums.trace_ids, "all", 2).dtype == np.float32
    missing = np.any(absent, axis=(1, 3))  # [n, G]
    np.testing.assert_array_equal(missing, np.all(absent, axis=(1, 3)))
    assert missing[3].all(), "no sections at all"
    assert missing[2].tolist() == [group == "backtracking" for group in GROUPS]


def test_means_differ_between_layers_and_windows(sums):
    """Otherwise an index that is off by one could pass."""
    directions = sums.sums[0].reshape(-1, D)
    similar = cosines(directions[:, None], directions[None])
    assert np.sort(similar[~np.eye(len(directions), dtype=bool)])[-1] < 0.9999


# Which positions are read

TABLE = WindowPlan(("S", "R"), {"S": ("S",)}, ((-4, -3), (-6, -5), (-8, -7), (1, 2), (2, 3)), layers=())


def test_positions_by_hand():
    """The drawing of the module's docstring: 11 tokens, the reply starts at 3, a section at 8 (T2: inclusive ends)."""
    trace = TokenTrace("t", list(range(11)), 3, [("S", 8)])
    reads, dropped = count_windows(trace, TABLE, 13)
    assert [np.flatnonzero(row).tolist() for row in reads[0]] == [[4, 5], [], [], [9, 10], []]
    assert dropped[0].tolist() == [0, 1, 1, 0, 1]
    assert not reads[1].any() and not dropped[1].any()


def test_positions_into_the_prompt_by_hand():
    """T3, T18: windows may reach into the prompt, never to BOS, and never wrap to the end of the trace."""
    plan = dataclasses.replace(TABLE, into_prompt=True)
    reads, dropped = count_windows(TokenTrace("t", list(range(11)), 3, [("S", 8)]), plan, 13)
    assert [np.flatnonzero(row).tolist() for row in reads[0]] == [[4, 5], [2, 3], [], [9, 10], []]
    assert dropped[0].tolist() == [0, 0, 1, 0, 1]
    reads, dropped = count_windows(TokenTrace("t", list(range(11)), 3, [("S", 3)]), plan, 13)
    assert [np.flatnonzero(row).tolist() for row in reads[0]] == [[], [], [], [4, 5], [5, 6]]
    assert dropped[0].tolist() == [1, 1, 1, 0, 0]


def test_overlapping_windows_count_a_position_twice():
    reads, _ = count_windows(TokenTrace("t", list(range(11)), 3, [("S", 8), ("S", 9), ("R", 9)]), TABLE, 11)
    np.testing.assert_array_equal(reads[0, 0], [0, 0, 0, 0, 1, 2, 1, 0, 0, 0, 0])
    np.testing.assert_array_equal(reads[1, 0], [0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0])


@pytest.mark.parametrize("into_prompt", [False, True])
def test_bos_never_enters_a_sum(into_prompt):
    """T18: BOS of huge norm, sections at every position, windows that reach beyond it."""
    model = changed(MODEL, embed_tokens=lambda x: x.at[UNUSED].multiply(1e6))
    everywhere = [("deduction", start) for start in range(1, 40)]
    trace = TokenTrace("t", [UNUSED, *TRACES[0].ids[1:]], 1, everywhere)
    mine = window_sums(model, [trace], dataclasses.replace(PLAN, into_prompt=into_prompt), batch_size=BATCH_SIZE)
    g, w = list(GROUPS).index("deduction"), WINDOWS.index((-2, -2))
    assert (mine.counts[1, g, w], mine.dropped[g, w]) == (37, 2)
    assert np.abs(mine.sums).max() < 1e4
    assert mine.mean_norm.max() < 100


@pytest.mark.parametrize("into_prompt", [False, True])
def test_position_0_never_enters_a_mean_whatever_stands_there(into_prompt):
    """T18: a model without BOS has another token there, here the first one of a reply without a prompt."""
    model = changed(MODEL, embed_tokens=lambda x: x.at[UNUSED].multiply(1e6))
    trace = TokenTrace("t", [UNUSED, *TRACES[0].ids[1:]], 0, [("deduction", start) for start in range(40)])
    mine = window_sums(model, [trace], dataclasses.replace(PLAN, into_prompt=into_prompt), batch_size=BATCH_SIZE)
    g, w = list(GROUPS).index("deduction"), WINDOWS.index((-2, -2))
    assert (mine.counts[1, g, w], mine.dropped[g, w]) == (37, 3)
    assert np.abs(mine.sums).max() < 1e4
    assert mine.n_tokens == len(trace.ids) - 1
    assert mine.mean_norm.max() < 100


# Batches


def test_batch_size_does_not_matter():
    """Within the rounding of float32: other shapes are other programs."""
    short = [trace for trace in TRACES if len(trace.ids) <= 64]
    by_three, by_four = (window_sums(MODEL, short, PLAN, batch_size=n) for n in (BATCH_SIZE, 4))
    assert by_three.trace_ids == by_four.trace_ids == [trace.id for trace in short]
    for name in (*SUMMED, *SECTIONS):
        np.testing.assert_allclose(getattr(by_three, name), getattr(by_four, name), rtol=1e-5, atol=1e-4, err_msg=name)


def test_order_of_traces_does_not_matter(sums):
    again = window_sums(MODEL, TRACES[::-1], PLAN, batch_size=BATCH_SIZE)
    assert again.trace_ids != sums.trace_ids
    for name in SUMMED:
        np.testing.assert_allclose(getattr(again, name), getattr(sums, name), rtol=1e-5, atol=1e-4, err_msg=name)
    ids = sums.trace_ids
    np.testing.assert_allclose(trace_means(ids, again), trace_means(ids, sums), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n_done", [1, 2, 3])
def test_resumed_equals_uninterrupted_to_the_bit(sums, tmp_path, n_done):
    interrupted = WindowSums.zeros(PLAN, L, D)
    batches = add_traces(interrupted, MODEL, TRACES, batch_size=BATCH_SIZE)
    done = [trace_id for _ in range(n_done) for trace_id in next(batches)]
    save_sums(interrupted, tmp_path / "sums.safetensors")
    resumed = load_sums(tmp_path / "sums.safetensors", PLAN)
    assert_same_sums(resumed, interrupted)
    rest = [trace_id for ids in add_traces(resumed, MODEL, TRACES, batch_size=BATCH_SIZE) for trace_id in ids]
    assert done + rest == sums.trace_ids
    assert_same_sums(resumed, sums)


def test_yields_every_trace_once(sums):
    total = WindowSums.zeros(PLAN, L, D)
    yielded = list(add_traces(total, MODEL, TRACES, batch_size=BATCH_SIZE))
    assert [len(ids) for ids in yielded] == [3, 1, 3]
    assert sorted(trace_id for ids in yielded for trace_id in ids) == sorted(trace.id for trace in TRACES)
    assert_same_sums(total, sums)


def test_resuming_with_other_batches_is_refused():
    """Else the traces that share a batch with a finished one would be left out silently."""
    total = WindowSums.zeros(PLAN, L, D)
    next(add_traces(total, MODEL, TRACES, batch_size=BATCH_SIZE))
    before = copy.deepcopy(total)
    with pytest.raises(ValueError, match="trace 'problem 1/0' was summed in another batch"):
        list(add_traces(total, MODEL, TRACES, batch_size=5))
    assert_same_sums(total, before)


def test_sums_of_another_plan_are_refused(sums, tmp_path):
    """Windows of equal number give arrays of equal shape."""
    save_sums(sums, tmp_path / "sums.safetensors")
    other = dataclasses.replace(PLAN, windows=((-6, -4), *WINDOWS[1:]))
    with pytest.raises(ValueError, match=r"sums\.safetensors holds sums of another plan: .*\[-5, -3\]"):
        load_sums(tmp_path / "sums.safetensors", other)


def test_two_traces_of_one_name_are_refused():
    with pytest.raises(ValueError, match=r"traces of one id: \['problem 0/0'\]"):
        window_sums(MODEL, [*TRACES, TRACES[0]], PLAN, batch_size=BATCH_SIZE)


def test_one_program_per_bucket_whatever_is_read(sums):
    compiled = contraction(MODEL)._cache_size()
    plan = WindowPlan(LABELS, GROUPS, ((-9, -9), (-4, -1), (0, 0)), layers=(1, 2), into_prompt=True)
    window_sums(MODEL, TRACES, plan, batch_size=BATCH_SIZE)
    window_sums(MODEL, TRACES[:2], PLAN, batch_size=BATCH_SIZE)
    assert contraction(MODEL)._cache_size() == compiled


def test_nothing_of_all_layers_and_positions_is_kept():
    """T24: no buffer of the compiled program has a value for every layer, position and unit."""
    B, T = 5, 64
    shapes = [(B, T), (B, T), (B, 5, 3, T), (B, 5, 3), (B, 16, T), (B, T), (2,)]
    dtypes = [jnp.int32] * 2 + [jnp.float32] * 4 + [jnp.int32]
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    program = contraction(MODEL).lower(MODEL, *arrays).compile().as_text() or ""
    assert f"f32[{B},{T},{D}]" in program
    assert f"f32[{L},{B},{T}," not in program


# Errors


def test_an_activation_that_is_not_finite_is_named():
    total = WindowSums.zeros(PLAN, L, D)
    broken = dataclasses.replace(TRACES[3], ids=[*TRACES[3].ids[:-1], UNUSED])
    traces = [*TRACES[:3], broken, *TRACES[4:]]
    model = changed(MODEL, embed_tokens=lambda x: x.at[UNUSED].set(jnp.inf))
    with pytest.raises(FloatingPointError, match=r"trace 'problem 3/0' .* layer 0"):
        list(add_traces(total, model, traces, batch_size=BATCH_SIZE))
    before = WindowSums.zeros(PLAN, L, D)
    whole = add_traces(before, model, TRACES, batch_size=BATCH_SIZE)  # no trace holds the token
    while total.trace_ids != before.trace_ids:
        next(whole)
    assert_same_sums(total, before)  # nothing of its batch was added
    assert len(list(whole)) == 1
    last = changed(MODEL, down_proj=lambda x: x.at[L - 1, 0, 0].set(jnp.nan))
    with pytest.raises(FloatingPointError, match=rf"trace 'problem 5/0' .* layer {L - 1}"):
        window_sums(last, TRACES, PLAN, batch_size=BATCH_SIZE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"starts": [("deduction", None)]}, "the start of a deduction section is None, expected the index of a token"),
        ({"starts": [("deduction", 5000)]}, "the start of a deduction section is 5000, expected"),
        ({"starts": [("deduction", -1)]}, "the start of a deduction section is -1, expected"),
        ({"reply_start": 999}, "reply_start is 999, expected"),
        ({"ids": [0, 1, CONFIG.vocab_size]}, f"has the token id {CONFIG.vocab_size}, expected 0 to"),
    ],
)
def test_a_trace_that_cannot_be_read_is_named(changes, message):
    trace = dataclasses.replace(TRACES[0], **({"starts": [], "reply_start": 1} | changes))
    with pytest.raises(ValueError, match=f"trace 'problem 0/0'.*{message}"):
        window_sums(MODEL, [TRACES[1], trace], PLAN, batch_size=BATCH_SIZE)


def test_windows_may_be_lists():
    plan = dataclasses.replace(PLAN, windows=[[-2, -1]])
    assert plan.windows == ((-2, -1),)


def test_an_unknown_label_is_named_before_anything_is_read(monkeypatch):
    trace = dataclasses.replace(TRACES[0], starts=[("dreaming", 9)])
    monkeypatch.setattr(extract, "_start_batch", None)
    with pytest.raises(ValueError, match=r"problem 0/0.*'dreaming' is not among \['deduction'"):
        window_sums(MODEL, [*TRACES[1:], trace], PLAN, batch_size=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sleeping", (-2, -2), "trace_mean"), "group: 'sleeping' is not among"),
        (("all", (-2, -1), "trace_mean"), r"window: \(-2, -1\) is not among"),
        (("all", (-2, -2), "median"), r"estimator: 'median' is not among \['trace_mean', 'token_mean'\]"),
    ],
)
def test_what_was_not_summed_is_named(sums, arguments, message):
    with pytest.raises(ValueError, match=message):
        sums.mean(*arguments)


def test_a_mean_of_nothing_is_refused():
    trace = dataclasses.replace(TRACES[0], starts=[("backtracking", TRACES[0].reply_start)])
    sums = window_sums(MODEL, [trace], PLAN, batch_size=BATCH_SIZE)
    with pytest.raises(ValueError, match=r"no window \(-5, -3\) of group 'backtracking' was read \(1 were dropped\)"):
        sums.mean("backtracking", (-5, -3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"windows": ((-1, -2),)}, r"window \(-1, -2\) is empty"),
        ({"groups": {"all": ("deduction", "humming")}}, r"group 'all' has unknown labels \['humming'\]"),
        ({"beside": {"trace": "all"}}, "beside: 'trace' is not among"),
        ({"beside": {"all": "humming"}}, "beside: 'humming' is not among"),
    ],
)
def test_a_plan_that_cannot_be_read_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PLAN, **changes)


@pytest.mark.parametrize("layer", [-1, L])
def test_a_layer_that_does_not_exist_is_refused(layer):
    """An index out of range would be clamped to the last layer, silently."""
    plan = dataclasses.replace(PLAN, layers=(0, layer))
    with pytest.raises(ValueError, match=rf"layer={layer} is outside 0..{L - 1}"):
        window_sums(MODEL, TRACES, plan, batch_size=BATCH_SIZE)
