"""Stage folders: whole or absent, moved aside and brought back, and the same bytes for the same contents."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors

from backtrack_jax.files import store


def test_a_stage_is_done_under_its_inputs_only(tmp_path: Path) -> None:
    inputs = {"layer": 9}
    folder = store.StageFolder(tmp_path, "3-vectors", inputs)
    assert (folder.done, folder.changed) == (False, [])
    assert not store.peek(tmp_path, "3-vectors", inputs)
    folder.finish()
    assert store.StageFolder(tmp_path, "3-vectors", {"layer": 9}).done
    assert store.peek(tmp_path, "3-vectors", inputs)
    assert not store.peek(tmp_path, "3-vectors", {"layer": 8})
    assert not store.peek(tmp_path, "4-steering", inputs)
    done = (folder.path / "DONE").read_text()
    (folder.path / "DONE").write_text("of something else\n")
    assert not store.StageFolder(tmp_path, "3-vectors", inputs).done
    (folder.path / "DONE").write_text(done.split()[0] + "\n")  # as before it listed files: it vouches for nothing
    assert not store.peek(tmp_path, "3-vectors", inputs)
    assert store.StageFolder(tmp_path, "3-vectors", inputs).misfits == ["DONE"]


@pytest.mark.parametrize("aside", [False, True])
def test_a_stage_is_not_done_if_its_files_are_not_as_written(tmp_path: Path, aside: bool) -> None:
    inputs = {"layer": 9}
    folder = store.StageFolder(tmp_path, "stage", inputs)
    for name in ("kept.csv", "cut.csv", "gone.csv", "run.json"):
        (folder.path / name).write_text("whole")
    folder.finish()
    assert folder.done
    (folder.path / "cut.csv").write_text("half")
    (folder.path / "gone.csv").unlink()
    (folder.path / "run.json").unlink()
    if aside:
        store.StageFolder(tmp_path, "stage", {"layer": 8})
    assert not store.peek(tmp_path, "stage", inputs)
    folder = store.StageFolder(tmp_path, "stage", inputs)
    assert not folder.done and folder.misfits == ["cut.csv", "gone.csv"]
    there = {path.name for path in folder.path.iterdir()}
    assert there == {"inputs.json", "kept.csv", "cut.csv.damaged"}
    (folder.path / "cut.csv").write_text("again")
    folder.finish()
    assert store.StageFolder(tmp_path, "stage", inputs).done


def test_other_inputs_move_results_aside_and_the_old_ones_bring_them_back(tmp_path: Path) -> None:
    old, new = {"models": {"base": 1}, "seed": 0}, {"models": {"base": 1, "reasoning": 2}, "seed": 1}
    first = store.StageFolder(tmp_path, "stage", old)
    (first.path / "result").write_text("old")
    first.finish()
    second = store.StageFolder(tmp_path, "stage", new)
    assert (second.done, second.changed) == (False, ["models.reasoning", "seed"])
    assert not (second.path / "result").exists()
    assert store.peek(tmp_path, "stage", old)  # done, though it is not in its place
    (second.path / "half").write_text("begun")
    third = store.StageFolder(tmp_path, "stage", old)
    assert third.done and (third.path / "result").read_text() == "old"
    fourth = store.StageFolder(tmp_path, "stage", new)  # what was begun goes on
    assert not fourth.done and (fourth.path / "half").read_text() == "begun"


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        ({"magnitudes": [0]}, {"magnitudes": [0.0]}, ["magnitudes"]),
        ({"file": {}}, {}, ["file"]),
        ({"a": {"limit": None}}, {"a": {}}, ["a", "a.limit"]),
        ({"on": True}, {"on": 1}, ["on"]),
    ],
)
def test_inputs_of_another_fingerprint_are_named(tmp_path: Path, before: dict, after: dict, named: list[str]) -> None:
    assert store.fingerprint(before) != store.fingerprint(after)
    store.StageFolder(tmp_path, "stage", before)
    assert store.StageFolder(tmp_path, "stage", after).changed == named


def test_a_stage_folder_survives_death_at_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening it makes up to four changes on disk; whichever is the last one, opening it again works."""

    class Killed(BaseException):
        pass

    replace = Path.replace
    for steps in range(4):
        workdir = tmp_path / str(steps)
        first = store.StageFolder(workdir, "stage", {"layer": 0})
        (first.path / "result").write_text("0")
        left = [steps]

        def dying(path: Path, target: Path, left: list[int] = left) -> None:
            if not left[0]:
                raise Killed
            left[0] -= 1
            replace(path, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", dying)
            try:
                store.StageFolder(workdir, "stage", {"layer": 1})
            except Killed:
                assert steps < 3
        for layer in (1, 0, 1):
            folder = store.StageFolder(workdir, "stage", {"layer": layer})
            assert json.loads((folder.path / "inputs.json").read_text()) == {"layer": layer}
            assert (folder.path / "result").exists() == (layer == 0)


def test_a_folder_of_someone_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "1-traces").mkdir()
    (tmp_path / "1-traces" / "mine.txt").touch()
    with pytest.raises(ValueError, match=r"1-traces has no inputs\.json"):
        store.StageFolder(tmp_path, "1-traces", {})
    assert (tmp_path / "1-traces" / "mine.txt").exists()


def test_file_hash_follows_content_not_place(tmp_path: Path) -> None:
    a, b, folder = tmp_path / "a", tmp_path / "elsewhere.json", tmp_path / "folder"
    for path in (a, b):
        path.write_text("same")
    assert store.file_hash(a) == store.file_hash(b)
    b.write_text("other")
    assert store.file_hash(a) != store.file_hash(b)
    folder.mkdir()
    (folder / "x").write_text("1")
    first = store.file_hash(folder)
    (folder / "x").rename(folder / "y")
    assert store.file_hash(folder) != first


@pytest.mark.parametrize("size", [1, 1 << 16, 300_000])
def test_weights_hash_reads_all_of_a_small_file(tmp_path: Path, size: int) -> None:
    path = tmp_path / "weights"
    data = bytearray(random.Random(size).randbytes(size))
    path.write_bytes(data)
    before = store.weights_hash(path)
    for at in {0, size // 3, size - 1}:
        changed = bytearray(data)
        changed[at] ^= 1
        path.write_bytes(changed)
        assert store.weights_hash(path) != before
    path.write_bytes(data)
    assert store.weights_hash(path) == before
    path.write_bytes(data + b"\0")
    assert store.weights_hash(path) != before


@pytest.mark.parametrize(
    ("size", "at", "changed"),
    [
        pytest.param(3 << 30, 700_000_001, 1 << 20, id="a finetuned projection in the middle of a large checkpoint"),
        pytest.param(1 << 28, 100_000_001, 1, id="a byte of a quantised model"),
    ],
)
def test_weights_hash_sees_a_change_in_a_file_of_holes(tmp_path: Path, size: int, at: int, changed: int) -> None:
    path = tmp_path / "weights"
    with path.open("wb") as file:
        file.truncate(size)
    before = store.weights_hash(path)
    with path.open("r+b") as file:
        file.seek(at)
        file.write(b"\1" * changed)
    assert store.weights_hash(path) != before


def test_weights_hash_of_large_shards_sees_every_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of many small matrices after a large one, which evenly spaced pieces would pass over."""
    monkeypatch.setattr(store, "_READ_WHOLE", 0)
    monkeypatch.setattr(store, "_CHUNKS_READ", 1)
    arrays = {"large": np.zeros(1 << 20, np.float32)}
    arrays |= {f"small.{i}": np.zeros((40, 50), np.float32) for i in range(9)}
    (tmp_path / "config.json").write_text("{}")
    path = tmp_path / "model-00001-of-00001.safetensors"
    hashes = set()
    for name in [*arrays, "none"]:
        changed = {key: value + (key == name) for key, value in arrays.items()}
        store.write_safetensors(path, changed, {"format": "pt"})
        hashes.add(store.weights_hash(tmp_path))
    assert len(hashes) == len(arrays) + 1


def test_weights_hash_of_a_file_with_a_broken_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_READ_WHOLE", 0)
    path = tmp_path / "model.safetensors"
    hashes = set()
    for data in (b"", b"\x02" + bytes(7) + b"[]", b"\xff" * 99, b"\x02" + bytes(7) + b"{]"):
        path.write_bytes(data)
        hashes.add(store.weights_hash(path))
    assert len(hashes) == 4


def test_a_file_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rates.csv"

    def full_disk(*_: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(OSError, match="no space"):
            store.write_text(path, "new")
    assert not path.exists()
    store.write_text(path, "é\n")  # over the temporary file that was left
    assert path.read_bytes() == "é\n".encode()
    assert [file.name for file in tmp_path.iterdir()] == ["rates.csv"]


def test_saving_takes_a_twentieth_of_the_time_and_ends_with_everything_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    now, done, saved = 0.0, 0, []

    def save() -> None:
        nonlocal now
        now += 2.0
        saved.append(done)

    monkeypatch.setattr(store.time, "monotonic", lambda: now)
    saver = store.Saver(save)
    for _ in range(100):
        now += 1.0
        done += 1
        saver.turn()
    assert saved == [1, 39, 77]  # 38 turns of a second between two saves of two seconds
    saver.end()
    saver.end()
    assert saved == [1, 39, 77, 100]


def test_lines_come_back_and_an_unfinished_one_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "replies.jsonl"
    assert store.recover_lines(path) == []
    lines = [{"row": 0, "text": "a\u2028b\r\n\x85 é"}, {"row": 1, "text": ""}]
    store.append_lines(path, lines)
    whole = path.read_bytes()
    with path.open("ab") as file:
        file.write('{"row": 2, "text": "é'.encode()[:-1])  # in the middle of a character
    assert store.recover_lines(path) == lines
    assert path.read_bytes() == whole
    store.append_lines(path, [{"row": 2}])
    assert store.read_lines(path) == store.recover_lines(path) == [*lines, {"row": 2}]


def test_reading_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "edited.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}')  # no line break at the end, as some editors leave it
    assert store.read_lines(path) == [{"a": 1}, {"a": 2}]
    assert path.read_text() == '{"a": 1}\n{"a": 2}'


@pytest.mark.parametrize("line", [b"{", b"\0" * 40, b'{"text": "\xff"}', b"[1]"])
def test_a_damaged_line_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "replies.jsonl"
    path.write_bytes(b'{"row": 0}\n' + line + b"\n")
    for read in (store.read_lines, store.recover_lines):
        with pytest.raises(ValueError, match=r"replies\.jsonl, line 2: damaged"):
            read(path)
    path.write_bytes(line)
    with pytest.raises(ValueError, match=r"replies\.jsonl: damaged"):
        store.read_json(path)


def test_damaged_inputs_are_named(tmp_path: Path) -> None:
    folder = store.StageFolder(tmp_path, "stage", {"layer": 1})
    (folder.path / "inputs.json").write_text('{"layer"')
    with pytest.raises(ValueError, match=r"inputs\.json: damaged"):
        store.StageFolder(tmp_path, "stage", {"layer": 1})


SAVE = """
import sys
import numpy as np
from pathlib import Path
from backtrack_jax.files import store
metadata = {name: name * 2 for name in ("schema", "layer_convention", "n_layers", "raw_norms", "provenance")}
store.write_safetensors(Path(sys.argv[1]), {"b": np.arange(6.0).reshape(2, 3), "a": np.ones(3, np.float32)}, metadata)
"""


def test_equal_tensors_are_equal_files_in_every_process(tmp_path: Path) -> None:
    """The library writes metadata in an order that each process draws anew."""
    files = [tmp_path / name for name in ("first", "second", "third")]
    for file in files:
        subprocess.run([sys.executable, "-c", SAVE, file], check=True)
    assert len({file.read_bytes() for file in files}) == 1
    with safetensors.safe_open(files[0], "np") as file:
        assert file.metadata() == {
            name: name * 2 for name in ("schema", "layer_convention", "n_layers", "raw_norms", "provenance")
        }
        np.testing.assert_array_equal(file.get_tensor("b"), np.arange(6.0).reshape(2, 3))
        assert file.get_tensor("a").dtype == np.float32


def test_a_models_card_is_no_part_of_its_weights(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    before = store.weights_hash(tmp_path)
    (tmp_path / "README.md").write_text("# A model")
    assert store.weights_hash(tmp_path) == before
    (tmp_path / "config.json").write_text("{}")


def test_the_order_of_keys_and_hidden_files_change_no_hash(tmp_path: Path) -> None:
    assert store.fingerprint({"a": 1, "b": {"c": 2, "d": 3}}) == store.fingerprint({"b": {"d": 3, "c": 2}, "a": 1})
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    before = store.weights_hash(tmp_path)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "index").write_bytes(b"changes by itself")
    (tmp_path / ".lock").write_bytes(b"")
    assert store.weights_hash(tmp_path) == before
    (tmp_path / "more.safetensors").write_bytes(b"")
    assert store.weights_hash(tmp_path) != before


def test_a_file_that_was_edited_without_a_change_of_its_size_is_not_believed(tmp_path: Path) -> None:
    folder = store.StageFolder(tmp_path, "1-traces", {"a": 1})
    (folder.path / "traces.jsonl").write_text("abc\n")
    (folder.path / "name with spaces").write_text("x")
    folder.finish()
    assert store.StageFolder(tmp_path, "1-traces", {"a": 1}).done
    (folder.path / "traces.jsonl").write_text("abd\n")
    again = store.StageFolder(tmp_path, "1-traces", {"a": 1})
    assert again.misfits == ["traces.jsonl"] and not again.done
    done = f"{folder.fingerprint}\n4 traces.jsonl\n1 name with spaces\n"  # as version 0.2 wrote it: sizes alone
    (folder.path / "traces.jsonl").write_text("abd\n")
    (folder.path / "DONE").write_text(done)
    assert store.StageFolder(tmp_path, "1-traces", {"a": 1}).done


def test_files_behind_links_to_folders_are_part_of_a_hash(tmp_path: Path) -> None:
    """Weights on another disk: what is read through a link is told apart through it."""
    for name in ("a", "b"):
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "deep" / "weights").write_text(name)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    found = []
    for name in ("a", "b", "a"):
        (model / "params").unlink(missing_ok=True)
        (model / "params").symlink_to(tmp_path / name)
        (model / "params" / "deep" / "back").unlink(missing_ok=True)
        (model / "params" / "deep" / "back").symlink_to(model)  # a circle ends
        found.append((store.weights_hash(model), store.file_hash(model)))
    assert found[0] == found[2] and all(x != y for x, y in zip(found[0], found[1], strict=True))
