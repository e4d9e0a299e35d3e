"""JSON and JSONL files of records: read strictly, written whole; a fault names the file, the line and the field."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from backtrack_jax.files import store

_LONGEST_NAME = 200
_SURROGATE = re.compile("[\ud800-\udfff]")


class Fields:
    """Typed access to one JSON object whose faults name the place and the field."""

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, dict):
            raise ValueError(f"{where}: expected a JSON object, got {type(value).__name__}")
        self.value: dict[str, Any] = value
        self.where = where

    def refuse_others(self, accepted: Iterable[str]) -> None:
        """Refuses keys that are not fields of the record: a misspelt optional field must not be silently dropped."""
        accepted = tuple(accepted)
        unknown = sorted(set(self.value) - set(accepted))
        if unknown:
            raise ValueError(f"{self.where}: unknown field {unknown[0]!r}; accepted: {', '.join(accepted)}")

    def get(self, key: str) -> Any:
        """The value of a key; ValueError if it is missing."""
        if key not in self.value:
            raise ValueError(f"{self.where}: field {key!r} is missing; found: {', '.join(self.value) or 'none'}")
        return self.value[key]

    def require(self, *keys: str) -> "Fields":
        """Itself; ValueError names all of the keys that are missing."""
        if missing := [repr(key) for key in keys if key not in self.value]:
            named = f"field {missing[0]} is" if len(missing) == 1 else f"fields {', '.join(missing)} are"
            raise ValueError(f"{self.where}: {named} missing; found: {', '.join(self.value) or 'none'}")
        return self

    def text(self, key: str, *, empty: bool = False, cut: bool = False) -> str:
        """A string; `cut` lets lone surrogates through: a judge's answer may be cut inside an emoji."""
        value = self.get(key)
        if not isinstance(value, str):
            raise ValueError(f"{self.where}: field {key!r} must be a string, got {type(value).__name__} {value!r}")
        if not empty and not value.strip():
            raise ValueError(f"{self.where}: field {key!r} is empty; it needs text")
        if not cut and (surrogate := _SURROGATE.search(value)):
            raise ValueError(
                f"{self.where}: field {key!r} holds half of a character (\\u{ord(surrogate[0]):04x}, at character "
                f"{surrogate.start()}), which no tokenizer or endpoint takes; write the whole character or leave it out"
            )
        return value

    def name(self, key: str, *, file: bool = False) -> str:
        """A string that names something, on one line of a table or a screen; `file`: in the name of a file too."""
        value = self.text(key)
        if not value.isprintable() or len(value) > _LONGEST_NAME:
            raise ValueError(
                f"{self.where}: field {key!r} is {value[:80]!r}, expected a name of at most {_LONGEST_NAME} printable "
                "characters on one line"
            )
        if file and (set(value) & set("/\\:") or value.startswith(".")):
            raise ValueError(
                f"{self.where}: field {key!r} is {value!r}, which becomes part of a file's name; expected one without "
                "/, \\ and :, that does not begin with a dot"
            )
        return value

    def natural(self, key: str) -> int:
        """An integer >= 0; ValueError otherwise."""
        value = self.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{self.where}: field {key!r} must be an integer >= 0, got {value!r}")
        return value

    def items(self, key: str) -> list["Fields"]:
        """The objects of a list; ValueError if it is something else."""
        value = self.get(key)
        if not isinstance(value, list):
            raise ValueError(f"{self.where}: field {key!r} must be a list, got {type(value).__name__}")
        return [Fields(item, f"{self.where}, {key}[{index}]") for index, item in enumerate(value)]


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from error


def read_objects(path: Path) -> Iterator[Fields]:
    """Entries of a JSON list (`.json`) or the lines of a JSONL file (`.jsonl`).

    Args:
        path: the file, in UTF-8.

    Yields:
        One object after the other.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not UTF-8, not JSON, holds something other than objects, or no entry at all.
    """
    text = _read_text(path)
    if path.suffix == ".jsonl":
        # Not splitlines(): U+2028 and its like are legal inside a JSON string.
        numbered = ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
        entries = ((f"{path}, line {number}", _parse(line, f"{path}, line {number}")) for number, line in numbered)
    elif path.suffix == ".json":
        values = _parse(text, str(path))
        if not isinstance(values, list):
            raise ValueError(f"{path}: expected a JSON list of objects, got {type(values).__name__}")
        entries = ((f"{path}, entry {number}", value) for number, value in enumerate(values))
    else:
        raise ValueError(
            f"{path}: unknown suffix {path.suffix!r}; accepted: .json (a list), .jsonl (one object a line)"
        )
    found = False
    for where, value in entries:
        found = True
        yield Fields(value, where)
    if not found:
        raise ValueError(f"{path}: holds no entries")


def _parse(text: str, where: str) -> object:
    try:
        return json.loads(text, object_pairs_hook=_with_keys_once)
    except (
        ValueError,
        RecursionError,
    ) as error:  # also of a key given twice, of an integer of 5,000 digits, of endless brackets
        raise ValueError(f"{where}: not valid JSON ({error})") from error


def _with_keys_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is given twice")
    return found


def write_objects(path: Path, objects: Iterable[Mapping[str, Any]]) -> None:
    """Writes one object a line; the file is whole or it is not there, and its folder is created if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    store.write_text(path, "".join(_line(value) + "\n" for value in objects))


def _line(value: Mapping[str, Any]) -> str:
    line = json.dumps(value, ensure_ascii=False)
    # A lone surrogate (a judge's answer cut inside an emoji) has no UTF-8 form; escaped, it still makes the round trip.
    return line if line.isascii() or not any("\ud800" <= c <= "\udfff" for c in line) else json.dumps(value)
