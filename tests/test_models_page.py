"""The table of families in the documentation has every family, and says what a reader may rely on."""

import re
from pathlib import Path

import pytest

from backtrack_jax.models.families import FAMILIES

PAGE = (Path(__file__).parents[1] / "docs" / "models.md").read_text()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_a_row(name: str) -> None:
    """With errors of float32 rounding, everything equal that should be, and the ids that the program knows."""
    (row,) = re.findall(rf"^\| `{name}` \|.*$", PAGE, re.MULTILINE)
    _, compared, states, logits, tokens, replies, gguf, known = [cell.strip() for cell in row.strip("|").split("|")]
    assert compared == "2 random checkpoints"
    assert 0 < float(states) < 1e-5 and 0 < float(logits) < 1e-5
    for cell in (tokens, replies):
        equal, of = map(int, cell.split(" of "))
        assert equal == of > 10
    family = FAMILIES[name]
    assert family.gguf is None or gguf == f"`{family.gguf.architecture}`"
    assert re.findall("`(.+?)`", known) == list(family.released)
