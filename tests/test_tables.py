"""Tables come back from their files as they were."""

from pathlib import Path

from backtrack_jax.files import tables


def test_round_trip(tmp_path: Path) -> None:
    """Model output holds any character; a token may be a lone carriage return."""
    texts = ["\r", "\n", "a\rb", 'say "so"', "a, b", "\u2028", "12", "", " "]
    rows = [{"text": text, "rank": n, "logit": n / 3} for n, text in enumerate(texts)]
    tables.write(tmp_path / "t.csv", rows)
    assert tables.read(tmp_path / "t.csv") == rows
