"""Labels shuffled within traces: which sections are drawn, and the vectors that follow, by loops in plain numpy."""

import types
from typing import Any

import numpy as np
import pytest

from backtrack_jax.analysis import shuffles
from backtrack_jax.analysis.base import Material
from backtrack_jax.config import Experiment, VectorSpec
from backtrack_jax.extract import WindowPlan, WindowSums

LABELS = ("backtracking", "deduction", "shuffled")
GROUPS = {"backtracking": ("backtracking",), "all": LABELS[:2], "rest": ("deduction",), "trace": LABELS[:2]}
D, LAYERS = 5, (3, 1)


def sums_of(order: list[str], layout: dict[str, list[tuple[int, bool]]], seed: int) -> WindowSums:
    """Sums with sections as given, (label, whether read), and random means; traces as they were summed."""
    plan = WindowPlan(LABELS, GROUPS, ((-2, -1),), LAYERS, beside={"trace": "backtracking"})
    made = WindowSums.zeros(plan, 4, D)
    made.trace_ids = list(order)
    sections = [(number, *section) for number, trace in enumerate(order) for section in layout[trace]]
    rng = np.random.default_rng(seed)
    made.section_traces = np.array([trace for trace, _, _ in sections])
    made.section_labels = np.array([label for _, label, _ in sections])
    made.section_starts = np.arange(len(sections))
    made.section_positions = np.array([2 * read for _, _, read in sections])
    made.section_means = rng.standard_normal((len(sections), len(LAYERS), D)).astype(np.float32)
    made.section_means[made.section_positions == 0] = np.nan
    return made


@pytest.fixture
def sums() -> dict[str, WindowSums]:
    """Two models that read 12 traces in unlike orders; one reads the first section of trace 3 not at all."""
    rng = np.random.default_rng(0)
    layout: dict[str, list[tuple[int, bool]]] = {
        f"t{n}": [(int(rng.integers(2)), True) for _ in range(4 + n % 5)] for n in range(12)
    }
    for sections in layout.values():
        sections[0] = (1, False)  # dropped by both
        sections.append((2, True))  # counts as `shuffled` as well
    layout["t7"] = [(1, True)] * 4  # has no D+
    other = dict(layout)
    other["t3"] = layout["t3"][1:]
    other["t5"] = [*layout["t5"][:2], (layout["t5"][2][0], False), *layout["t5"][3:]]
    return {"base": sums_of(list(layout), layout, 1), "reasoning": sums_of(list(layout)[::-1], other, 2)}


IDS = [f"t{n}" for n in (4, 1, 0, 3, 2, 5, 6, 7, 8, 9, 10, 11)]


def test_as_many_sections_as_have_the_label_are_drawn_from_each_trace(sums: dict[str, WindowSums]) -> None:
    found = shuffles.shuffle(sums, IDS, "backtracking", n_draws=300, seed=3)
    for role, of_role in sums.items():
        rows = found.rows[role]
        assert (of_role.section_positions[rows] > 0).all() and (of_role.section_labels[rows] != 2).all()
        assert [of_role.trace_ids[t] for t in of_role.section_traces[rows]] == [IDS[t] for t in found.traces]
        for number in range(len(IDS)):
            of_trace = found.traces == number
            own = int(np.sum(of_role.section_labels[rows[of_trace]] == 0))
            assert (found.drawn[:, of_trace].sum(1) == own).all()
    labels = [sums[role].section_labels[found.rows[role]].tolist() for role in sums]
    assert labels[0] == labels[1], "the same sections of both models"
    assert IDS.index("t3") not in found.traces, "of which the models do not read the same sections"
    assert np.sum(found.traces == IDS.index("t5")) == 2, "one of four is dropped by both, and one by one model"
    for number in set(found.traces):  # each section about equally often
        shares = found.drawn[:, found.traces == number].mean(0)
        np.testing.assert_allclose(shares, shares.mean(), atol=4 * 0.5 / 300**0.5)
    again = shuffles.shuffle(sums, IDS, "backtracking", n_draws=300, seed=3)
    np.testing.assert_array_equal(found.drawn, again.drawn)


@pytest.mark.parametrize("estimator", ["trace_mean", "token_mean"])
@pytest.mark.parametrize("contrast", ["all", "rest", "trace"])
def test_a_vector_of_drawn_sections_is_the_run_s_with_other_labels(
    sums: dict[str, WindowSums], estimator: str, contrast: str
) -> None:
    """Of all groups of traces, and without one."""
    e = Experiment(vectors=VectorSpec(contrast=contrast, estimator=estimator, layers=LAYERS))
    material: Any = types.SimpleNamespace(experiment=e, sums=sums)
    material.contrast_of = lambda label: Material.contrast_of(material, label)
    material.means_by_trace = lambda *args: Material.means_by_trace(material, *args)
    found = shuffles.shuffle(sums, IDS, "backtracking", n_draws=4)
    group = np.arange(len(IDS)) % 3
    parts = shuffles.shuffled_sums(found, material, "reasoning", IDS, "backtracking", 1, group)
    of_role, rows = sums["reasoning"], found.rows["reasoning"]
    states = of_role.section_means[:, LAYERS.index(1)].astype(np.float64)
    every = of_role.members("all")
    for left_out in (None, 1):
        vectors = parts.vectors(np.arange(3) != left_out)
        for draw, vector in zip(found.drawn, vectors, strict=True):
            own: list[np.ndarray] = []
            others: list[np.ndarray] = []
            for number, trace_id in enumerate(IDS):
                if group[number] == left_out:
                    continue
                taken = rows[(found.traces == number) & draw]
                here = np.flatnonzero(every & (of_role.section_traces == of_role.trace_ids.index(trace_id)))
                if contrast == "rest":
                    here = rows[(found.traces == number) & ~draw]
                if contrast == "trace" and not (of_role.section_labels[here] == 0).any():
                    here = here[:0]
                for to, places in ((own, taken), (others, here)):
                    if len(places):
                        to.append(states[places])
            if estimator == "trace_mean":
                own, others = ([x.mean(0, keepdims=True) for x in found_] for found_ in (own, others))
            expected = np.concatenate(own).mean(0) - np.concatenate(others).mean(0)
            np.testing.assert_allclose(vector, expected, rtol=1e-4, atol=1e-5)
