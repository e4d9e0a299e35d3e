"""Tables on disk: CSV whose numbers come back as numbers, and whose text, which is quoted, as text."""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from backtrack_jax.files import store

Table = list[dict[str, Any]]
"""Lines of one set of columns."""

_FIELD = re.compile(r'(?:"((?:[^"]|"")*)"|([^",\n]*))(,|\n)')


def to_csv(table: Sequence[Mapping[str, Any]]) -> str:
    """A table as CSV text; text is quoted, so that `12` may be the name of a problem, and a lone `\\r` a token."""
    text = io.StringIO(newline="")
    names = list(table[0]) if table else []
    writer = csv.DictWriter(text, names, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()


def write(path: Path, table: Sequence[Mapping[str, Any]]) -> None:
    """Writes a table; the file is whole or absent."""
    store.write_text(path, to_csv(table))


def read(path: Path) -> Table:
    """What `write` wrote.

    Raises:
      ValueError: names the file and the row that does not belong in a table, such as text without quotes.
    """
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: damaged, not UTF-8 text ({error})") from error
    if text == "\n":  # a table without lines has no columns either
        return []
    head, *lines = _parse(text, path)
    for number, values in enumerate(lines, 2):
        if len(values) != len(head):
            raise ValueError(f"{path}, row {number}: {len(values)} fields, expected {len(head)}")
    return [dict(zip(head, values, strict=True)) for values in lines]


def _parse(text: str, path: Path) -> list[list[Any]]:
    """Fields of every row. The module `csv` does not tell quoted from bare ones, and its own numbers are all floats."""
    rows: list[list[Any]] = [[]]
    at = 0
    while at < len(text):
        field = _FIELD.match(text, at)
        if field is None:
            raise ValueError(f"{path}, row {len(rows)}: not CSV as this program writes it, with text in quotes")
        at = field.end()
        quoted, bare, end = field.groups()
        rows[-1].append(_number(bare, path, len(rows)) if quoted is None else quoted.replace('""', '"'))
        if end == "\n":
            rows.append([])
    if rows.pop():
        raise ValueError(f"{path}: the last row is cut off")
    return rows


def _number(text: str, path: Path, row: int) -> int | float:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    raise ValueError(f"{path}, row {row}: {text!r} is neither a number nor text in quotes")
