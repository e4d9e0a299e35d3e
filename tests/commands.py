"""The programs of the package, run in the process of the tests."""

import sys
from typing import Any

import pytest
from absl import flags

from backtrack_jax import run


class Command:
    """Runs a program; returns what it printed and the message it ended with, empty for success."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *arguments: str, program: Any = run) -> tuple[str, str]:
        for name in [name for name in flags.FLAGS if name.startswith("config.")]:
            delattr(flags.FLAGS, name)  # overrides of the call before
        flags.FLAGS.unparse_flags()
        self._monkeypatch.setattr(sys, "argv", [program.__name__, *arguments])
        message = ""
        try:
            program.main(run.parse_flags(sys.argv))
        except SystemExit as exit:
            assert exit.code not in (None, 0)
            message = str(exit.code)
        printed = self._capsys.readouterr()
        # absl prints wrong values itself and exits with 1.
        return printed.out, message if message != "1" else printed.err
