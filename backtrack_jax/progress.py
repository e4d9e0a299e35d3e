"""Progress of a long loop: rows done, tokens per second, time left."""

import datetime
import sys
import time
from types import TracebackType


class Progress:
    """A line that renews itself on a terminal; in a log, a line every ten seconds.

    Used as a context manager. Rows done by an earlier, interrupted run count as done but not into the speed.
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
          earlier: whether an earlier run had finished them: they count as done but not into the speed.
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
