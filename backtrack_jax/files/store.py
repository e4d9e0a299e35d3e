"""Stage folders on disk: fingerprints, `DONE`, files that are whole or absent, and nothing finished ever lost.

results/smollm2/3-vectors/inputs.json    what the stage's results depend on
                          STALE          why they are out of date, where an earlier stage has other results by now
                          DONE           the fingerprint of inputs.json, once the stage is complete; sizes, hashes
                                         and names of its files
                superseded/3-vectors-1f0c.../   results under other inputs; they come back if the inputs do

Equal results are equal files, byte for byte: no time, no address and no arbitrary order is written.
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors.numpy

from backtrack_jax.files.paths import local_path

STALE = "STALE"
"""File in a stage's folder that says why its results are out of date."""
RUN = "run.json"
"""File in a stage's folder that says what its results were computed with. Of equal runs it may differ."""

_CHUNK = 1 << 16
_CHUNKS_READ = 1 << 12
_DAMAGED = ".damaged"
_HASHED = 64 << 20  # bytes
_DIGITS = 16
_DIGEST = re.compile(rf"[0-9a-f-]{{{_DIGITS}}} ")
_READ_WHOLE = 1 << 30  # bytes of a checkpoint that are read in about a second


class StageFolder:
    """Folder of one stage's results under given inputs.

    Attributes:
      path: the folder.
      fingerprint: hash of the inputs.
      changed: dotted names of the inputs that differ from those of the results that were here before; empty if none
        were.
      misfits: names of files that are missing or not as the finished stage wrote them; the stage is not done then.
        Those that exist have been renamed to `*.damaged`, so that nothing resumes from them.
    """

    def __init__(self, workdir: Path, name: str, inputs: Mapping[str, Any]):
        """Opens the folder; results under other inputs are moved aside, results under these are brought back.

        Raises:
          ValueError: the folder is there, but no stage made it, or its inputs.json is damaged.
        """
        self.path = workdir / name
        self.fingerprint = fingerprint(inputs)
        self.changed: list[str] = []
        self.misfits: list[str] = []
        self._open(workdir, name, inputs)
        if _finished_under(self.path, self.fingerprint):
            self._set_misfits_aside()

    def _open(self, workdir: Path, name: str, inputs: Mapping[str, Any]) -> None:
        """Puts the folder of these inputs in its place."""
        marker = self.path / "inputs.json"
        if marker.exists():
            before = read_json(marker)
            if fingerprint(before) == self.fingerprint:
                return
            self.changed = changes(before, inputs)
            aside = _aside(workdir, name, fingerprint(before))
            aside.parent.mkdir(exist_ok=True)
            self.path.replace(aside)
        elif self.path.exists():
            raise ValueError(f"{self.path} has no inputs.json, so this program did not make it; move it away")
        earlier = _aside(workdir, name, self.fingerprint)
        if earlier.exists():
            earlier.replace(self.path)
            return
        made = workdir / f".{name}.tmp"  # renamed when it has its inputs.json, so that no stage folder is without
        made.mkdir(parents=True, exist_ok=True)
        write_text(made / "inputs.json", json.dumps(inputs, indent=1, sort_keys=True) + "\n")
        made.replace(self.path)

    @property
    def done(self) -> bool:
        """Whether the stage is complete under these inputs."""
        return _is_done(self.path, self.fingerprint)

    def finish(self) -> None:
        """Marks the stage as complete, with the files that it consists of."""
        lines = [f"{size} {_digest(self.path / name, size)} {name}\n" for name, size in _artifacts(self.path).items()]
        write_text(self.path / "DONE", "".join([f"{self.fingerprint}\n", *lines]))

    def set_aside(self) -> None:
        """Moves results of unknown inputs aside, so that nothing resumes from them; they are kept to look at."""
        aside = _aside(self.path.parent, self.path.name, self.fingerprint)
        aside.parent.mkdir(exist_ok=True)
        names = (aside.with_name(f"{aside.name}-mixed-{number}") for number in itertools.count(1))
        self.path.replace(next(path for path in names if not path.exists()))

    def _set_misfits_aside(self) -> None:
        self.misfits = _misfits(self.path)
        for path in (self.path / name for name in _artifacts(self.path).keys() & set(self.misfits)):
            path.replace(path.with_name(path.name + _DAMAGED))
        if self.misfits:
            (self.path / "DONE").unlink(missing_ok=True)


def peek_beside(workdir: Path, name: str, inputs: Mapping[str, Any]) -> Path | None:
    """Folder of a stage that a run of another name beside this one has completed under these inputs."""
    beside = sorted(path for path in workdir.parent.glob("*") if path != workdir and (path / name).is_dir())
    return next((found for path in beside if (found := peek(path, name, inputs)) is not None), None)


def adopt(workdir: Path, name: str, inputs: Mapping[str, Any]) -> Path | None:
    """Takes over what a run of another name has completed under these inputs, where this one has not; its folder."""
    if peek(workdir, name, inputs) is not None or (found := peek_beside(workdir, name, inputs)) is None:
        return None
    aside = _aside(workdir, name, fingerprint(inputs))
    if aside.exists():
        return None
    made = aside.with_name(f".{aside.name}.tmp")
    shutil.rmtree(made, ignore_errors=True)
    made.parent.mkdir(parents=True, exist_ok=True)
    # Linked where that can be: finished files are replaced, never written to.
    shutil.copytree(found, made, copy_function=_linked, ignore=shutil.ignore_patterns(STALE, f"*{_DAMAGED}", ".*"))
    made.replace(aside)
    return found


def _linked(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copy2(source, target)


def set_aside_for_good(workdir: Path, name: str, inputs: Mapping[str, Any]) -> Path | None:
    """Moves results of a stage under these inputs to where no run takes them from; that folder, None if there are none.

    They are kept, to look at.
    """
    moved = None
    for path in (workdir / name, _aside(workdir, name, fingerprint(inputs))):
        if (own := read_inputs(path)) is None or fingerprint(own) != fingerprint(inputs):
            continue
        aside = _aside(workdir, name, fingerprint(inputs))
        aside.parent.mkdir(exist_ok=True)
        names = (aside.with_name(f"{aside.name}-redone-{number}") for number in itertools.count(1))
        moved = path.replace(next(path for path in names if not path.exists()))
    return moved


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes out of a folder's stages, until it is left or the process dies.

    Raises:
      BlockingIOError: another process has locked it.
    """
    with (folder / ".lock").open("a") as file:
        lock(file.fileno(), f"{folder} is in use by another run; wait for it, stop it, or take another")
        yield


def lock(file: int, message: str) -> None:
    """Locks an open file for this process until it is closed; BlockingIOError with the message if another one has."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BlockingIOError(message) from None
    except OSError:  # a network drive without locks, where keeping two processes apart is up to the user
        pass


def peek(workdir: Path, name: str, inputs: Mapping[str, Any]) -> Path | None:
    """Folder of a stage that is complete under these inputs, in place or aside; None if it is not. Writes nothing."""
    wanted = fingerprint(inputs)
    return next((path for path in (workdir / name, _aside(workdir, name, wanted)) if _is_done(path, wanted)), None)


def folders(workdir: Path, name: str) -> list[Path]:
    """Folders with results of a stage under any inputs, complete or not: the one in place, and those aside."""
    aside = sorted((workdir / "superseded").glob(f"{name}-{'[0-9a-f]' * 16}"))  # and none of mixed inputs
    return [path for path in (workdir / name, *aside) if path.is_dir()]


def is_finished(folder: Path) -> bool:
    """Whether a stage's folder is complete, under whatever inputs."""
    return (folder / "DONE").exists()


def is_whole(folder: Path, name: str) -> bool:
    """Whether a file is in a stage's folder, and as it was written if the stage was finished."""
    if not (folder / "DONE").exists():  # until then files are whole or absent
        return (folder / name).exists()
    return (folder / name).exists() and name not in _misfits(folder)


def read_inputs(folder: Path) -> dict[str, Any] | None:
    """The inputs of the results in a stage's folder; None where there are none."""
    marker = folder / "inputs.json"
    return read_json(marker) if marker.exists() else None


def mark_stale(folder: Path, reason: str) -> bool:
    """Writes why a stage's results are out of date, or with an empty reason that they are not; whether that is new."""
    marker = folder / STALE
    if reason == (marker.read_text("utf-8").rstrip("\n") if marker.exists() else ""):
        return False
    if reason:
        write_text(marker, reason + "\n")
    else:
        marker.unlink()
    return True


def fingerprint(inputs: Mapping[str, Any]) -> str:
    """Hash of JSON values."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Dotted names of the values that differ as JSON, sorted: 0 and 0.0 do, as they do in `fingerprint`."""
    old, new = ({name: json.dumps(value) for name, value in _flat(values).items()} for values in (before, after))
    return sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))


def file_hash(path: Path) -> str:
    """Hash of a file's content, or of the names and contents of the files in a folder; the path does not enter."""
    digest = hashlib.sha256()
    for file, name in _files(path):
        digest.update(name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]


def weights_hash(path: Path) -> str:
    """Hash of a checkpoint's file names, sizes and contents; above 1 GiB, of a part that includes some of every tensor.

    Reading 16 GB to compare them would take too long: of a safetensors file the header and both ends of every tensor
    are read then, of another file 256 MiB spread over it. Hidden files and folders do not count: what git and the hub's
    cache keep there changes by itself. Nor do cards (`.md`), of which no model is made.
    """
    files = [
        (file, name)
        for file, name in _files(path)
        if not any(p.startswith(".") for p in Path(name).parts) and not name.endswith(".md")
    ]
    sizes = [file.stat().st_size for file, _ in files]
    digest = hashlib.sha256()
    for (file, name), size in zip(files, sizes, strict=True):
        digest.update(f"{name} {size}".encode())
        with file.open("rb") as stream:
            for offset, length in [(0, size)] if sum(sizes) <= _READ_WHOLE else _spread_pieces(stream, size):
                stream.seek(offset)
                for start in range(0, length, 1 << 20):
                    digest.update(stream.read(min(1 << 20, length - start)))
    return digest.hexdigest()[:16]


def weights_id(path: str) -> str:
    """What tells one checkpoint from another: content of a local one, else the hub id (the config has its revision)."""
    local = local_path(path)
    return weights_hash(local) if local.exists() else path


def _spread_pieces(stream: BinaryIO, size: int) -> list[tuple[int, int]]:
    """Offsets and lengths of what is read of a large file: with a safetensors header, the ends of all its tensors."""
    start = 8 + int.from_bytes(stream.read(8), "little")
    try:
        header = json.loads(stream.read(start - 8)) if start <= size else {}
        spans = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError):  # not a safetensors file, or not one that could be loaded
        spans = []
    if not spans:
        offsets = [*range(0, size, max(_CHUNK, size // _CHUNKS_READ)), max(0, size - _CHUNK)]
        return [(offset, _CHUNK) for offset in offsets]
    ends = [(at, _CHUNK) for first, last in spans for at in (start + first, max(start + first, start + last - _CHUNK))]
    return [(0, start), *ends]


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text; the file is whole or absent, whatever happens on the way."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, *pieces: bytes | memoryview) -> None:
    """Writes pieces one after the other; the file is whole or absent, whatever happens on the way."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.writelines(pieces)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """A rename lasts only once its folder is on disk; file systems that do not know of it say so, and need none."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_safetensors(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes arrays to a safetensors file; equal contents give equal bytes.

    The library writes metadata in an order that changes from one process to the next, so the header is sorted here.
    """
    data = memoryview(safetensors.numpy.save(dict(arrays), dict(metadata)))
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(bytes(data[8:start])), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    write_bytes(path, len(header).to_bytes(8, "little"), header, data[start:])


class Saver:
    """Saves a loop's progress now and then: at most a twentieth of the time is spent on saving.

    What is small is saved in nearly every turn; half a gigabyte of window sums, which takes a second, every 20 seconds.
    """

    def __init__(self, save: Callable[[], None]):
        """Takes the function that saves everything."""
        self._save = save
        self._next = -math.inf
        self._behind = False

    def turn(self) -> None:
        """To be called after every turn of the loop."""
        self._behind = True
        if time.monotonic() >= self._next:
            self.end()

    def end(self) -> None:
        """To be called after the loop: saves what is not saved yet."""
        if self._behind:
            started = time.monotonic()
            self._save()
            stopped = time.monotonic()
            self._next = stopped + 19 * (stopped - started)
            self._behind = False


def append_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Appends one JSON object a line and waits until the disk has them."""
    with path.open("a", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        file.flush()
        os.fsync(file.fileno())


def recover_lines(path: Path) -> list[dict[str, Any]]:
    """Reads the lines that a run, perhaps a killed one, has appended; none if there is no file.

    An unfinished last line is cut off the file, so that the next append starts on a new line.
    """
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)
    return read_lines(path)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Reads one JSON object a line; ValueError names the file and the line that holds none."""
    lines = enumerate(path.read_bytes().split(b"\n"), 1)
    return [_parsed(line, f"{path}, line {number}") for number, line in lines if line]


def read_json(path: Path) -> dict[str, Any]:
    """Reads a file that is one JSON object; ValueError names the file if it holds none."""
    return _parsed(path.read_bytes(), str(path))


def _parsed(data: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(data.decode())
    except ValueError as error:
        raise ValueError(f"{where}: damaged, not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where}: damaged, expected a JSON object")
    return value


def _is_done(path: Path, fingerprint_: str) -> bool:
    return _finished_under(path, fingerprint_) and not _misfits(path)


def _finished_under(path: Path, fingerprint_: str) -> bool:
    marker = path / "DONE"
    return marker.exists() and marker.read_text("utf-8", "replace").partition("\n")[0] == fingerprint_


def _misfits(path: Path) -> list[str]:
    """What `DONE` lists and the folder has not, or not with this content; `DONE` itself where it lists nothing."""
    lines = [line for line in (path / "DONE").read_text("utf-8", "replace").split("\n")[1:] if line]
    existing = _artifacts(path)
    found = []
    for line in lines:
        size, _, rest = line.partition(" ")
        digest, name = rest[:_DIGITS], rest[_DIGITS + 1 :]
        if not _DIGEST.match(rest):  # as DONE was written before version 0.3
            digest, name = "", rest
        if str(existing.get(name)) != size or (digest and digest != _digest(path / name, existing[name])):
            found.append(name)
    return found if lines else ["DONE"]


def _digest(file: Path, size: int) -> str:
    """Of a file's content; of one above 64 MiB, which takes too long to read at every start, dashes."""
    if size > _HASHED:
        return "-" * _DIGITS
    return hashlib.sha256(file.read_bytes()).hexdigest()[:_DIGITS]


def _artifacts(path: Path) -> dict[str, int]:
    """Names and sizes of a stage's files."""
    left_out = ("DONE", STALE, RUN)
    files = [(name, file) for file, name in _files(path) if name not in left_out and not name.endswith(_DAMAGED)]
    return {name: file.stat().st_size for name, file in files if not file.name.startswith(".")}


def _aside(workdir: Path, name: str, fingerprint_: str) -> Path:
    return workdir / "superseded" / f"{name}-{fingerprint_}"


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested names, dotted."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {prefix + name: value}
    return flat


def _files(path: Path) -> list[tuple[Path, str]]:
    """The file itself, without a name, or the files below a folder with their names in it."""
    if not path.is_dir():
        return [(path, "")]
    found: list[Path] = []
    # Through links to folders too, as those that read the folder go; a link that leads back is not followed again.
    seen: set[Path] = set()
    for folder, inner, names in os.walk(path, followlinks=True):
        inner[:] = [name for name in inner if (Path(folder) / name).resolve() not in seen]
        seen.update((Path(folder) / name).resolve() for name in inner)
        found += [file for name in names if (file := Path(folder) / name).is_file()]
    return [(file, str(file.relative_to(path))) for file in sorted(found)]
