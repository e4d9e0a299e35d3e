"""Entries of `steering.kinds`: what they say, and what is wrong with them."""

import re

import pytest

from backtrack_jax import kinds
from backtrack_jax.data.records import LABELS


@pytest.mark.parametrize(
    ("entry", "parts"),
    [
        *((name, ((1.0, name),)) for name in (*LABELS, *kinds.CONTROLS)),
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
    assert kinds.parse(entry) == kinds.Kind(parts)
    assert kinds.parse(entry).names == tuple(name for _, name in parts)
    if kinds.parse(entry).directed:
        assert kinds.parse(f"ablate:{entry}") == kinds.parse(f"ablate: {entry}") == kinds.Kind(parts, ablates=True)


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
        ("backtracking + ablate:deduction", "'ablate:deduction' is not a name"),
        ("ablate:ablate:deduction", "'ablate:deduction' is not a name"),
        ("backtracking + 0 * deduction", "'0 * deduction' has the weight 0, expected a finite number other than 0"),
        ("backtracking + 1e999 * deduction", "'1e999 * deduction' has the weight inf"),
        ("backtracking - backtracking", "'backtracking - backtracking' has a name twice, expected every name once"),
        ("2 * backtracking", "'2 * backtracking' weights a single name, which steering.magnitudes do"),
        ("1 * backtracking", "weights a single name"),
        ("backtracking + noise", "'noise' has no direction that could be summed or ablated"),
        ("self-amplification - backtracking", "'self-amplification' has no direction"),
        ("ablate:noise", "'noise' has no direction"),
    ],
)
def test_an_entry_that_says_nothing(entry: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        kinds.parse(entry)


def test_a_file_is_known_by_its_suffix() -> None:
    assert all(kinds.is_vector_file(f"v{suffix}") for suffix in (".safetensors", ".npz", ".gguf", ".pt"))
    assert not any(map(kinds.is_vector_file, ("npz", "v.npy", "random + v.npz", "ablate:v.npz")))
