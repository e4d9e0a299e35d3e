"""The ledger of paid calls: an append-only JSONL file, so that nothing is paid for twice, in this run or a later one.

Every answered call is one line, keyed by a hash of what was sent. The line is written (and synced to disk) before the
answer is used, by a single write, so a killed process loses at most the calls that were in flight. What it can leave
behind is a torn last line; it is cut off when the file is opened next. One process at a time holds a ledger.
"""

import asyncio
import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from backtrack_jax.files import store

_RESERVED = 1 << 20
"""Bytes that are kept for answers in flight when the disk fills up: 32 of 32 kB."""

Entry = dict[str, Any]
"""One line of the ledger; `key` is its key, the rest is the caller's."""


def content_key(request: Mapping[str, Any], vote: int = 0) -> str:
    """Key of one call: SHA-256 of the whole request (model, messages, parameters) and the number of the vote."""
    content = json.dumps([request, vote], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(content.encode()).hexdigest()


def read_entries(path: Path | str) -> dict[str, Entry]:
    """Reads a ledger without opening it for writing; a torn last line is left out.

    Args:
        path: the file; one that does not exist is an empty ledger.

    Returns:
        Entries by key, in the order of the file.

    Raises:
        ValueError: a line that is not an entry, named by its number.
    """
    path = Path(path)
    return _parse(path.read_bytes(), path)[0] if path.exists() else {}


def _parse(data: bytes, path: Path) -> tuple[dict[str, Entry], int]:
    """Entries, and the number of bytes that they take; what follows is a torn line."""
    whole = data.rfind(b"\n") + 1
    entries: dict[str, Entry] = {}
    for number, line in enumerate(data[:whole].split(b"\n")[:-1], 1):
        try:
            entry = json.loads(line)
            entries[entry["key"]] = entry
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{path}, line {number}: not an entry of a ledger, which is a JSON object with a 'key'; delete the "
                "line to continue (its call will be paid for again)"
            ) from None
    return entries, whole


class Ledger:
    """An open ledger. Use it as a context manager; it is locked against other processes until it is closed.

    Args:
        path: the file; it and its folder are created if missing.

    Attributes:
        full: whether the disk is, so that no further call may be made.

    Raises:
        BlockingIOError: another process has the ledger open.
        ValueError: a line that is not an entry.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            store.lock(self._file, f"{self.path}: in use by another process; wait for it or stop it")
            self._entries, whole = _parse(self.path.read_bytes(), self.path)
            os.ftruncate(self._file, whole)
        except BaseException:
            os.close(self._file)
            raise
        self._locks: dict[str, asyncio.Lock] = {}
        self.full = False
        self._reserve = self.path.with_name(f".{self.path.name}.reserve")
        try:
            self._reserve.write_bytes(bytes(_RESERVED))
        except OSError:
            self._give_up_reserve()
            os.close(self._file)
            raise

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._give_up_reserve()
        os.close(self._file)

    def _give_up_reserve(self) -> None:
        with contextlib.suppress(OSError):
            self._reserve.unlink(missing_ok=True)

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: str) -> Entry | None:
        """The entry of a call that was paid for, None for one that was not."""
        return self._entries.get(key)

    async def fetch(
        self,
        key: str,
        pay: Callable[[], Awaitable[Entry]],
        usable: Callable[[Entry], bool] = lambda entry: True,
    ) -> tuple[Entry, bool]:
        """The entry of a call; made and recorded now where there is none.

        Args:
            key: see `content_key`.
            pay: makes the call and returns its entry (without `key`). Of several calls with one key at the same time
                one pays; the others wait for its entry.
            usable: whether an entry that is there may be taken; if not, the call is made again, and its entry replaces
                that one.

        Returns:
            The entry, and whether it was in the ledger already.
        """

        def found() -> Entry | None:
            entry = self._entries.get(key)
            return entry if entry is not None and usable(entry) else None

        if (entry := found()) is not None:
            return entry, True
        async with self._locks.setdefault(key, asyncio.Lock()):
            if (entry := found()) is not None:
                return entry, True
            entry = {"key": key} | await pay()
            self._append(entry)
            return entry, False

    def _append(self, entry: Entry) -> None:
        # json.dumps escapes all but ASCII: a lone surrogate in an answer is kept, and no line break gets in.
        line = json.dumps(entry).encode() + b"\n"
        try:
            self._write(line)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or self.full:
                raise
            self.full = True  # this answer and those in flight go where room was kept for them
            self._give_up_reserve()
            self._write(line)
        self._entries[entry["key"]] = entry

    def _write(self, line: bytes) -> None:
        size = os.fstat(self._file).st_size
        try:
            while line:
                line = line[os.write(self._file, line) :]
            os.fsync(self._file)
        except OSError:  # e.g. the disk is full: no half line may stay in front of the next entry
            os.ftruncate(self._file, size)
            raise
