"""Tables on disk: CSV whose numbers come back as numbers."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from backtrack_jax.files import store

Row = Mapping[str, Any]

# Columns that hold text, whatever it looks like: a problem may be called `12`.
_TEXT = frozenset(
    [
        "target",
        "kind",
        "source",
        "window",
        "unit",
        "span",
        "vector_hash",
        "problem_id",
        "category",
        "finish_reason",
        "role",
        "label",
        "other",
        "method",
        "unembedding",
        "side",
        "text",
        "reason",
        "group",
        "what",
        "setting",
        "trace",
        "figure",
        "panel",
        "series",
        "name",
        "x_name",
        "y_name",
    ]
)


def to_csv(rows: Sequence[Row]) -> str:
    """Rows of one set of columns as CSV text; text is quoted, since Python 3.11 would leave a lone `\\r` bare."""
    text = io.StringIO(newline="")
    names = list(rows[0]) if rows else []
    writer = csv.DictWriter(text, names, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write(path: Path, rows: Sequence[Row]) -> None:
    """Writes rows; the file is whole or absent."""
    store.write_text(path, to_csv(rows))


def read(path: Path) -> list[dict[str, Any]]:
    """What `write` wrote, numbers as numbers."""
    with path.open(newline="", encoding="utf-8") as file:
        return [{k: v if k in _TEXT else _number(v) for k, v in row.items()} for row in csv.DictReader(file)]


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
