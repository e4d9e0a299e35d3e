"""Entries of `steering.kinds`: what they say, what is wrong with them, and a run of some."""

import json
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest
import tiny

from backtrack_jax import kinds, pipeline
from backtrack_jax.data.records import LABELS
from backtrack_jax.generate import compiled_generate
from backtrack_jax.report.stage import read_results


@pytest.mark.parametrize(
    ("entry", "parts"),
    [
        *(
            (name, ((1.0, name),))
            for name in (*LABELS, "overall-mean", "random", "shuffled", "own(deduction)", "pc(3)")
        ),
        ("vectors/my file.npz", ((1.0, "vectors/my file.npz"),)),
        ("a+b", ((1.0, "a+b"),)),  # a label of somebody's, as long as no spaces are around the sign
        ("backtracking + deduction", ((1.0, "backtracking"), (1.0, "deduction"))),
        ("backtracking\t-  adding-knowledge", ((1.0, "backtracking"), (-1.0, "adding-knowledge"))),
        ("backtracking + 0.5 * deduction", ((1.0, "backtracking"), (0.5, "deduction"))),
        ("backtracking - .5*deduction", ((1.0, "backtracking"), (-0.5, "deduction"))),
        ("-2 * random + 1e-3 * v/w.gguf - -1 * shuffled", ((-2.0, "random"), (1e-3, "v/w.gguf"), (1.0, "shuffled"))),
        ("2 * overall-mean - random", ((2.0, "overall-mean"), (-1.0, "random"))),
    ],
)
def test_what_an_entry_says(entry: str, parts: tuple[tuple[float, str], ...]) -> None:
    assert kinds.parse(entry) == kinds.Kind((kinds.Edit(parts),))
    assert kinds.parse(entry).names == tuple(name for _, name in parts)
    expected = kinds.Kind((kinds.Edit(parts, "ablate"),))
    assert kinds.parse(f"ablate:{entry}") == kinds.parse(f"ablate: {entry}") == expected


def test_an_operation_without_a_direction() -> None:
    assert kinds.parse("noise") == kinds.Kind((kinds.Edit((), "noise"),)) and not kinds.parse("noise").read
    assert kinds.parse("ablate:random").what.strength == "share" and not kinds.parse("ablate:random").read
    assert kinds.parse("backtracking").what is kinds.ADD and kinds.parse("backtracking").read


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("", "'' is not a name with an optional weight, expected a label, control or vector file, a sum of them such"),
        ("ablate:", "'' is not a name"),
        ("backtracking +", "'backtracking +' is not a name"),
        ("- backtracking", "'- backtracking' is not a name"),
        ("backtracking + + deduction", "'+ deduction' is not a name"),
        ("x * backtracking + deduction", "'x * backtracking' is not a name"),
        ("0.5 *", "'0.5 *' is not a name"),
        ("backtracking + 2 * 3 * deduction", "'2 * 3 * deduction' is not a name"),
        ("backtracking + ablate:deduction", "'ablate' is an operation, not a direction"),
        ("ablate:ablate:deduction", "'ablate' is an operation, not a direction"),
        ("backtracking + 0 * deduction", "'0 * deduction' has the weight 0, expected a finite number other than 0"),
        ("backtracking + 1e999 * deduction", "'1e999 * deduction' has the weight inf"),
        ("backtracking - backtracking", "'backtracking - backtracking' has a name twice, expected every name once"),
        ("2 * backtracking", "'2 * backtracking' weights a single name, which steering.magnitudes do"),
        ("1 * backtracking", "weights a single name"),
        ("backtracking + noise", "'noise' is an operation, not a direction that could be summed, weighted or ablated"),
        ("self-amplification - backtracking", "'self-amplification' is an operation"),
        ("2 * noise", "'noise' is an operation"),
        ("ablate:noise", "'noise' is an operation"),
        ("ablate", "'' is not a name with an optional weight"),
        ("noise:backtracking", "'noise:backtracking': 'noise' acts along no direction, expected 'noise' alone"),
    ],
)
def test_an_entry_that_says_nothing(entry: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        kinds.parse(entry)


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (
            "backtracking & ablate:labels(3)",
            kinds.Kind((kinds.Edit(((1.0, "backtracking"),)), kinds.Edit(((1.0, "labels(3)"),), "ablate"))),
        ),
        (
            "0.5 * backtracking during generated[0:16] & 2*noise during prompt",
            kinds.Kind(
                (
                    kinds.Edit(((1.0, "backtracking"),), "", 0.5, "generated[0:16]"),
                    kinds.Edit((), "noise", 2.0, "prompt"),
                )
            ),
        ),
        (
            "backtracking - 0.5 * deduction & -0.25 * ablate:random",
            kinds.Kind(
                (
                    kinds.Edit(((1.0, "backtracking"), (-0.5, "deduction"))),
                    kinds.Edit(((1.0, "random"),), "ablate", -0.25),
                )
            ),
        ),
        (
            "noise-outside:labels(2) during generated when sentence-ends keeping norm",
            kinds.Kind(
                (kinds.Edit(((1.0, "labels(2)"),), "noise-outside", 1.0, "generated"),),
                kinds.Gate(("sentence-ends",)),
                True,
            ),
        ),
        (
            "backtracking when tokens .|Wait",
            kinds.Kind((kinds.Edit(((1.0, "backtracking"),)),), kinds.Gate((".", "Wait"))),
        ),
        (
            "clamp:own(deduction) when pc(2) > -0.5",
            kinds.Kind((kinds.Edit(((1.0, "own(deduction)"),), "clamp"),), kinds.Gate((), "pc(2)", -0.5)),
        ),
    ],
)
def test_what_an_entry_of_several_edits_says(entry: str, expected: kinds.Kind) -> None:
    assert kinds.parse(entry) == expected


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("backtracking & ", "'' is not a name"),
        ("backtracking during reply", "'reply' is no span, expected prompt, generated or generated[2:18]"),
        ("0 * noise & backtracking", "has the weight 0, expected a finite number other than 0"),
        ("backtracking when never", "'never' is no gate, expected sentence-ends, paragraph-breaks"),
        ("backtracking when tokens a||b", "is no gate"),
        ("backtracking when labels(2) > 0.1", "is no gate"),
        ("backtracking keeping norm & noise", "goes on after 'keeping norm'"),
        ("labels(2)", "'labels(2)' is several directions at once, expected it alone behind ablate, matched-noise, "),
        ("clamp:labels(2)", "'labels(2)' is several directions at once"),
        ("ablate:labels(2) + deduction", "'labels(2)' is several directions at once"),
        ("own", "'own': expected own(a label)"),
        ("own()", "'own()': expected own(a label)"),
        ("pc(first)", "'pc(first)': expected pc(a number)"),
        ("ablate:subspace(3)", "'subspace(3)': expected subspace(a number, a number)"),
        ("random(3)", "'random(3)': expected 'random' alone"),
    ],
)
def test_an_entry_of_several_edits_that_says_nothing(entry: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        kinds.parse(entry)


def test_what_a_magnitude_of_several_edits_is() -> None:
    assert kinds.parse("ablate:deduction & backtracking").what.strength == "length"
    assert kinds.strength("ablate:deduction & ablate:backtracking") == "share"
    assert kinds.strength("ablate:deduction & noise") == "length"
    assert kinds.strength("clamp:deduction") == "value" and kinds.strength("ablate:") == kinds.strength(3) == ""
    assert kinds.parse("fixed(3) & noise").read is False and kinds.parse("fixed(3) & own(deduction)").read is True
    assert kinds.parse("noise when backtracking > 1").read and kinds.parse("noise when random > 1").drawn


def test_what_makes_and_draws_can_be_found() -> None:
    """They are named by their import paths, since configs are read without JAX."""
    paths = [operation.make for operation in (kinds.ADD, *kinds.OPERATIONS.values())]
    paths += [path for direction in kinds.DIRECTIONS.values() for path in (direction.draw, direction.make) if path]
    assert all(callable(pkgutil.resolve_name(path)) for path in paths) and len(paths) >= 5
    with pytest.raises(ValueError, match="strength='factor', expected one of length, value, share"):
        kinds.Operation("a:b", strength="factor")


def test_a_file_is_known_by_its_suffix() -> None:
    assert all(kinds.is_vector_file(f"v{suffix}") for suffix in (".safetensors", ".npz", ".gguf", ".pt"))
    assert not any(map(kinds.is_vector_file, ("npz", "v.npy", "random + v.npz", "ablate:v.npz")))


@pytest.mark.slow
def test_a_run_of_sums_and_ablations_at_two_layers(finished: Path) -> None:
    """Other texts for every kind and layer; tables hold all of them, curves those of the first layer."""
    e = tiny.get_config()
    e.steering.kinds = ("backtracking", "shuffled - 0.5 * deduction", "ablate:backtracking", "self-amplification")
    e.steering.layer, e.steering.magnitudes = (2, 1), (0.0, -1.0, 1.0)
    e.steering.limit, e.steering.samples, e.steering.unit = 2, 1, "relative"
    e.steering.baselines, e.steering.offsets, e.steering.layers = ("ablate:deduction + random",), (), ()
    pipeline.Run(e).run()
    lines = [json.loads(line) for line in (finished / "4-steering" / "generations.jsonl").read_text().splitlines()]
    texts: dict[tuple[str, ...], list[list[int]]] = {}
    for line in lines:
        cell = tuple(str(line[name]) for name in ("target", "kind", "source", "layer", "magnitude"))
        texts.setdefault(cell, []).append(line["ids"])
    # For each model 3 kinds of 2 sources and one of none, at 2 layers, each way; unsteered; on one model a baseline.
    assert len(texts) == 2 * (7 * 2 * 2 + 1) + 2
    assert {len(replies) for replies in texts.values()} == {2}
    steered = [replies for cell, replies in texts.items() if cell[1] != "unsteered"]
    assert len({json.dumps(replies) for replies in steered}) > 0.8 * len(steered)
    shares = {(line["magnitude"], line["length"]) for line in lines if line["kind"].startswith("ablate:")}
    assert shares == {(-1.0, -1.0), (1.0, 1.0)}
    read = read_results(e, finished)
    assert [(row["magnitude"], row["layer"]) for row in read.cells("base", e.steering.kinds[1], "reasoning")] == [
        *((-1.0, 2), (0.0, 2), (1.0, 2)),
    ]
    assert {row["layer"] for row in read.tables["rates"] if row["kind"] == e.steering.kinds[2]} == {1, 2}
    assert e.steering.kinds[1] in (finished / "6-report" / "fig4_baselines.csv").read_text()


COMPILED: Any = compiled_generate


@pytest.mark.slow
def test_a_run_of_everything_that_an_entry_can_say(finished: Path) -> None:
    """All in one sweep: other replies for each, and one program for all kinds of terms and gates together."""
    e = tiny.get_config()
    e.steering.kinds = (
        "backtracking & ablate:own(deduction)",
        "noise during generated[0:2]",
        "backtracking when tokens wait|so|the",
        "backtracking when deduction > 0.0",
        "self-amplification keeping norm",
        "clamp:symmetric(deduction)",
        "noise-outside:labels(2)",
        "noise-within:pcs(3)",
        "noise-part-within:backtracking",
        "matched-noise:covariance",
        "frozen-noise",
        "fixed(1) + pc(1)",
    )
    e.steering.layer, e.steering.magnitudes, e.steering.unit = (1,), (0.0, 1.0), "relative"
    e.steering.limit, e.steering.samples = 2, 1
    e.steering.baselines, e.steering.offsets, e.steering.layers = (), (), ()
    before = COMPILED._cache_size()
    pipeline.Run(e).run()
    lines = [json.loads(line) for line in (finished / "4-steering" / "generations.jsonl").read_text().splitlines()]
    found = {
        kind: [line["ids"] for line in lines if (line["kind"], line["target"]) == (kind, "reasoning")]
        for kind in ("unsteered", *e.steering.kinds)
    }
    assert all(found.values()) and len({json.dumps(replies) for replies in found.values()}) > 8
    shapes = {(len(line["problem"].split()), line["target"]) for line in lines}
    assert COMPILED._cache_size() - before <= len(shapes)  # not one for each kind
    assert len(read_results(e, finished).tables["log_odds"]) > len(e.steering.kinds)


def test_what_is_drawn_for_a_reply_and_what_is_read_off_a_model() -> None:
    found = {
        name: (kinds.parse(name).drawn, kinds.parse(name).read)
        for name in ("random", "shuffled", "noise", "backtracking", "a.npz")
    }
    assert found == {
        **{"random": (True, False), "shuffled": (False, True), "noise": (False, False)},
        **{"backtracking": (False, True), "a.npz": (False, False)},
    }
    assert kinds.parse("random + shuffled").drawn and kinds.parse("random + shuffled").read
