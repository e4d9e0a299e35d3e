"""What a user at a terminal sees: progress, log lines, help with defaults, ends that say what to do next."""

import argparse
import contextlib
import datetime
import os
import signal
import sys
import time
from collections.abc import Iterator
from types import TracebackType
from typing import NoReturn


class Stopped(RuntimeError):
    """A run that cannot continue until the user has done something; the message says what."""


class Progress:
    """A line that renews itself on a terminal; in a log, a line every ten seconds.

    Used as a context manager. Rows done by an earlier, interrupted run count as done but not towards the speed.
    """

    def __init__(self, title: str, total: int, done: int = 0, unit: str = "rows"):
        """Starts with `done` of `total` rows, or whatever `unit` is counted."""
        self._title, self._total, self._earlier, self._unit, self._note = title, total, done, unit, ""
        self._done, self._tokens = done, 0
        self._terminal = sys.stderr.isatty()
        self._started = self._shown = time.monotonic()
        self._shown_done = -1

    def __enter__(self) -> "Progress":
        """Returns itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Shows what was reached."""
        if self._terminal or self._done != self._shown_done:
            self._show("\n")

    def update(self, rows: int, tokens: int, note: str = "", *, earlier: bool = False) -> None:
        """Counts finished rows and the tokens that the model read or wrote for them.

        Args:
          rows: finished rows.
          tokens: of these rows.
          note: shown beside the speed from now on, e.g. money spent.
          earlier: whether an earlier run had finished them: they count as done but not towards the speed.
        """
        self._done += rows
        self._earlier += rows if earlier else 0
        self._tokens += tokens
        self._note = note
        if time.monotonic() - self._shown >= (0.5 if self._terminal else 10):
            self._show("" if self._terminal else "\n")

    @property
    def _left(self) -> int:
        return self._total - self._done

    def _show(self, end: str) -> None:
        self._shown, self._shown_done = time.monotonic(), self._done
        elapsed = max(self._shown - self._started, 1e-9)
        text = f"{self._title}: {self._done} of {self._total} {self._unit}, {self._tokens / elapsed:.0f} tokens/s"
        text += f", {self._note}" if self._note else ""
        if rows := self._done - self._earlier:
            gone, left = (datetime.timedelta(seconds=round(s)) for s in (elapsed, elapsed / rows * self._left))
            text += f", {gone} gone, {left} left"
        print(("\r\x1b[K" if self._terminal else "") + text, end=end, file=sys.stderr, flush=True)


def say(text: str) -> None:
    """Prints a line of the run's log."""
    print(text, file=sys.stderr, flush=True)


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and leaves the lines of the description alone."""


@contextlib.contextmanager
def ends_in_one_line(*, remedy: str, resumed: str) -> Iterator[None]:
    """Ends the process with one line where the block raises what a user can fix; other errors keep their traceback.

    Args:
      remedy: what to do when the device runs out of memory.
      resumed: how to resume a command that was stopped by Ctrl-C.
    """
    import jax  # here, so that reading a config stays instant

    message = f"stopped; {resumed}"
    before = signal.getsignal(signal.SIGINT)
    try:
        # A KeyboardInterrupt that comes while JAX's callback of the garbage collector runs would be lost. A process
        # that ignores SIGINT, as a shell's background jobs do, keeps ignoring it.
        if before is signal.default_int_handler:
            signal.signal(signal.SIGINT, lambda number, frame: _leave(message))
        yield
    except (ValueError, OSError, FloatingPointError, Stopped) as error:
        sys.exit(f"error: {error}")
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        sys.exit(f"error: the device is out of memory; {remedy} ({str(error).splitlines()[0]})")
    except KeyboardInterrupt:
        _leave(message)
    finally:
        if before is signal.default_int_handler:
            signal.signal(signal.SIGINT, before)


def _leave(message: str) -> NoReturn:
    """Ends the process at once, as Ctrl-C does: Python's shutdown crashes where XLA still compiles in its threads.

    What is on disk is always whole, so nothing needs the shutdown.
    """
    try:
        print(message, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:  # even if nobody reads them any more
        os._exit(130)
