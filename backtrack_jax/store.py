"""Stage folders on disk: fingerprints, `DONE`, files that are whole or absent, and nothing computed ever lost.

results/smollm2/3-vectors/inputs.json    what the stage's results depend on
                          DONE           the fingerprint of inputs.json, once the stage is complete
                superseded/3-vectors-1f0c.../   results under other inputs; they come back if the inputs do
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_ENDS = 1 << 16


class StageFolder:
    """Folder of one stage's results under given inputs.

    Attributes:
      path: the folder.
      fingerprint: hash of the inputs.
      changed: names of the inputs that differ from those of the results that were here before; empty if none were.
    """

    def __init__(self, workdir: Path, name: str, inputs: Mapping[str, Any]):
        """Opens the folder; results under other inputs are moved aside, results under these are brought back."""
        self.path = workdir / name
        self.fingerprint = fingerprint(inputs)
        self.changed: list[str] = []
        marker = self.path / "inputs.json"
        if marker.exists():
            before = json.loads(marker.read_text())
            if fingerprint(before) == self.fingerprint:
                return
            self.changed = sorted(k for k in before.keys() | inputs.keys() if before.get(k) != inputs.get(k))
            aside = _aside(workdir, name, fingerprint(before))
            aside.parent.mkdir(exist_ok=True)
            self.path.replace(aside)
        earlier = _aside(workdir, name, self.fingerprint)
        if earlier.exists():
            earlier.replace(self.path)
            return
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(marker, json.dumps(inputs, indent=1, sort_keys=True) + "\n")

    @property
    def done(self) -> bool:
        """Whether the stage is complete under these inputs."""
        marker = self.path / "DONE"
        return marker.exists() and marker.read_text().strip() == self.fingerprint

    def finish(self) -> None:
        """Marks the stage as complete."""
        write_text(self.path / "DONE", self.fingerprint + "\n")


def peek(workdir: Path, name: str, inputs: Mapping[str, Any]) -> bool:
    """Whether a stage is complete under these inputs, without touching the disk."""
    wanted = fingerprint(inputs)
    markers = [workdir / name / "DONE", _aside(workdir, name, wanted) / "DONE"]
    return any(marker.exists() and marker.read_text().strip() == wanted for marker in markers)


def fingerprint(inputs: Mapping[str, Any]) -> str:
    """Hash of JSON values."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]


def file_hash(path: Path) -> str:
    """Hash of a file's content, or of the contents of the files in a folder."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]


def weights_hash(path: Path) -> str:
    """Hash of a checkpoint's file names, sizes, first and last 64 KiB: reading 16 GB to compare them takes too long."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(_ENDS))
            stream.seek(max(0, size - _ENDS))
            digest.update(stream.read(_ENDS))
    return digest.hexdigest()[:16]


def write_text(path: Path, text: str) -> None:
    """Writes a file that is whole or absent, whatever happens on the way."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def append_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Appends one JSON object a line and waits until the disk has them."""
    with path.open("a", encoding="utf-8", newline="\n") as file:
        file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Reads JSON lines back; none if there is no file.

    A last line that a killed run left unfinished is cut off the file, so that the next append starts on a new line.
    """
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(path, len(whole))
    return [json.loads(line) for line in whole.decode().split("\n") if line]


def _aside(workdir: Path, name: str, fingerprint_: str) -> Path:
    return workdir / "superseded" / f"{name}-{fingerprint_}"
