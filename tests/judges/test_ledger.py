"""The ledger: what is paid for is written, found again, and paid for once."""

import asyncio
import errno
import fcntl
import json
import os
import random
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from backtrack_jax.judges.openai.ledger import Entry, Ledger, content_key, read_entries


class Shop:
    """Counts what was paid per key."""

    def __init__(self) -> None:
        self.paid: Counter[str] = Counter()

    def seller(self, key: str, seconds: float = 0.0):
        async def pay() -> Entry:
            self.paid[key] += 1
            await asyncio.sleep(seconds)
            return {"answer": f"answer to {key}\n\u2028\udcff"}

        return pay


def fetch_all(path: Path, keys: list[str], shop: Shop, seconds: float = 0.0) -> list[tuple[Entry, bool]]:
    async def main() -> list[tuple[Entry, bool]]:
        with Ledger(path) as ledger:
            return await asyncio.gather(*(ledger.fetch(key, shop.seller(key, seconds)) for key in keys))

    return asyncio.run(main())


def test_the_key_depends_on_all_that_is_sent_and_on_nothing_else():
    request = {"model": "m", "messages": [{"role": "user", "content": "a"}], "temperature": 0.0, "seed": 0}
    same = {"seed": 0, "temperature": 0.0, "messages": [{"content": "a", "role": "user"}], "model": "m"}
    assert content_key(request) == content_key(same)
    changes = [
        {"model": "n"},
        {"messages": [{"role": "user", "content": "b"}]},
        {"temperature": 0.5},
        {"seed": 1},
        {"max_tokens": 5},
    ]
    keys = {content_key(request | change) for change in changes} | {content_key(request), content_key(request, 1)}
    assert len(keys) == len(changes) + 2
    # Pinned: another hash would pay for everything again.
    assert content_key({"a": 1}, 2) == "ad577c9cb820d895677c155138108df0b3ab7cbf4e601e7175b3ba5e04d3972b"


def test_what_is_paid_for_is_found_again(tmp_path):
    path, shop = tmp_path / "folder" / "ledger.jsonl", Shop()
    first = fetch_all(path, ["a", "b"], shop)
    second = fetch_all(path, ["b", "c", "a"], shop)
    assert [reused for _, reused in first + second] == [False, False, True, False, True]
    assert second[2][0] == first[0][0] == {"key": "a", "answer": "answer to a\n\u2028\udcff"}
    assert shop.paid == {"a": 1, "b": 1, "c": 1}
    assert list(read_entries(path)) == ["a", "b", "c"]
    assert len(path.read_bytes().splitlines()) == 3


def test_the_same_content_in_flight_is_paid_once(tmp_path):
    shop = Shop()
    entries = fetch_all(tmp_path / "ledger.jsonl", ["a"] * 20 + ["b"] * 20, shop, seconds=0.02)
    assert shop.paid == {"a": 1, "b": 1}
    assert sum(reused for _, reused in entries) == 38
    assert all(entry["answer"].startswith(f"answer to {entry['key']}") for entry, _ in entries)


def test_a_call_that_fails_leaves_nothing_and_can_be_made_again(tmp_path):
    async def broken() -> Entry:
        raise OSError("no answer")

    async def main() -> None:
        with Ledger(tmp_path / "ledger.jsonl") as ledger:
            with pytest.raises(OSError, match="no answer"):
                await ledger.fetch("a", broken)
            assert ledger.get("a") is None
            assert (await ledger.fetch("a", Shop().seller("a")))[1] is False
            assert ledger.get("a") is not None and len(ledger) == 1

    asyncio.run(main())


def test_a_torn_last_line_is_cut_off_wherever_it_is_torn(tmp_path):
    path = tmp_path / "ledger.jsonl"
    fetch_all(path, ["a", "b"], Shop())
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for length in range(first, len(whole)):
        path.write_bytes(whole[:length])
        assert list(read_entries(path)) == ["a"]
        assert path.stat().st_size == length  # reading repairs nothing
        shop = Shop()
        fetch_all(path, ["a", "b"], shop)
        assert shop.paid == {"b": 1}
        assert [json.loads(line)["key"] for line in path.read_bytes().splitlines()] == ["a", "b"]


@pytest.mark.parametrize("line", [b"{", b"7", b"[]", b"{}", b'"key"', b"\xff", b""])
def test_a_line_that_is_no_entry_is_named(tmp_path, line):
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(b'{"key": "a"}\n' + line + b'\n{"key": "b"}\n')
    with pytest.raises(ValueError, match=r"ledger.jsonl, line 2: not an entry"):
        read_entries(path)
    with pytest.raises(ValueError, match=r"line 2"):
        Ledger(path)
    path.write_bytes(b'{"key": "a"}\n')
    with Ledger(path) as ledger:  # the lock was given back
        assert len(ledger) == 1


def test_a_second_process_is_refused(tmp_path):
    path = tmp_path / "ledger.jsonl"
    with Ledger(path), pytest.raises(BlockingIOError, match=r"ledger.jsonl: in use by another process"):
        Ledger(path)
    with Ledger(path):
        pass


def test_a_drive_without_locks_holds_a_ledger(tmp_path, monkeypatch):
    def without(file: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", without)
    shop = Shop()
    fetch_all(tmp_path / "ledger.jsonl", ["a"], shop)
    fetch_all(tmp_path / "ledger.jsonl", ["a"], shop)
    assert shop.paid == {"a": 1}


def test_a_full_disk_leaves_no_half_line(tmp_path):
    path = tmp_path / "ledger.jsonl"
    fetch_all(path, ["a"], Shop())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    async def main() -> None:
        with Ledger(path) as ledger:
            resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, hard))
            try:
                with pytest.raises(OSError, match="too large"):
                    await ledger.fetch("b", Shop().seller("b"))
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            await ledger.fetch("c", Shop().seller("c"))

    asyncio.run(main())
    assert list(read_entries(path)) == ["a", "c"]


WRITER = """
import asyncio, sys
from backtrack_jax.judges.openai.ledger import Ledger

async def main():
    with Ledger(sys.argv[1]) as ledger:
        for number in range(10**9):
            async def pay():
                return {"answer": str(number) * 2000}
            await ledger.fetch(str(number), pay)
            print(number, flush=True)

asyncio.run(main())
"""


def test_a_killed_writer_loses_nothing_that_it_reported(tmp_path):
    path, rng, reported = tmp_path / "ledger.jsonl", random.Random(0), -1
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            reported = int(line)
            if rng.random() < 0.01:
                break
        process.kill()
        reported = max([reported, *(int(line) for line in process.communicate()[0].split())])
        with Ledger(path) as ledger:
            assert len(ledger) >= reported + 1
            for number in range(len(ledger)):
                entry = ledger.get(str(number))
                assert entry is not None and entry["answer"] == str(number) * 2000
    assert os.path.getsize(path) > 0
