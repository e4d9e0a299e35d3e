"""Tables come back from their files as they were."""

import math
from pathlib import Path

import pytest

from backtrack_jax.files import tables


def test_round_trip(tmp_path: Path) -> None:
    """Model output holds any character; a token may be a lone carriage return."""
    texts = ["\r", "\n", "a\rb", 'say "so"', "a, b", "\u2028", "12", "", " "]
    rows = [{"text": text, "rank": n, "logit": n / 3} for n, text in enumerate(texts)]
    tables.write(tmp_path / "t.csv", rows)
    assert tables.read(tmp_path / "t.csv") == rows


def test_what_is_quoted_is_text_whatever_the_column_is_called(tmp_path: Path) -> None:
    rows = [{"any, name": "7", 'an "other"': 7, "n": 7.0, "nothing": math.inf}, {}]
    rows[1] = {name: value for name, value in rows[0].items()} | {"any, name": "1e3\n"}
    tables.write(tmp_path / "t.csv", rows)
    found = tables.read(tmp_path / "t.csv")
    assert found == rows and [type(value) for value in found[1].values()] == [str, int, float, float]
    tables.write(tmp_path / "t.csv", [])
    assert tables.read(tmp_path / "t.csv") == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('"a","b"\n"x",y\n', r"t\.csv, row 2: 'y' is neither a number nor text in quotes"),
        ('"a","b"\n"x",1,2\n', r"t\.csv, row 2: 3 fields, expected 2"),
        ('"a","b"\n"x", "y"\n', r"t\.csv, row 2: not CSV as this program writes it"),
        ('"a"\n"x\n', r"t\.csv, row 2: not CSV as this program writes it"),
        ('"a","b"\n1,', r"t\.csv: the last row is cut off"),
    ],
)
def test_what_another_program_wrote_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        tables.read(tmp_path / "t.csv")
