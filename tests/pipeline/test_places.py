"""Where a run lay on a machine, and whose it was, stands in nothing that one would share."""

import getpass
import os
import socket
from pathlib import Path

import tiny
from runs import run


def test_no_artifact_holds_an_absolute_path_or_a_name(fresh: Path, tmp_path: Path) -> None:
    """Models, chains, vectors and results are all given by absolute paths; the run is in a folder of its own name."""
    here = Path.cwd()
    e = tiny.get_config()
    e.base.path, e.reasoning.path = str(here / "base"), str(here / "reasoning")
    e.traces.path, e.workdir = str(here / tiny.CHAINS), str(tmp_path / "some place")
    e.steering.kinds = ("backtracking",)
    e.steering.baselines = e.steering.offsets = e.steering.layers = ()
    run(e)
    texts = {str(here), str(tmp_path), os.path.expanduser("~") + os.sep, f"/{getpass.getuser()}/"}
    texts |= {socket.gethostname()} if len(socket.gethostname()) > 5 else set()  # "vm" stands in many a file
    found = {
        f"{path.relative_to(tmp_path)}: {text}"
        for path in (tmp_path / "some place").rglob("*")
        if path.is_file()
        for text in texts
        if text.encode() in path.read_bytes()
    }
    assert not found
