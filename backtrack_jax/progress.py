"""Progress of a long loop: rows done, tokens per second, time left."""

import sys
from types import TracebackType

from tqdm import tqdm


class Progress:
    """A bar on a terminal; in a log, a line every ten seconds.

    Used as a context manager. Rows done by an earlier, interrupted run count as done but not into the speed.
    """

    def __init__(self, title: str, total: int, done: int = 0):
        """Starts with `done` of `total` rows."""
        terminal = sys.stderr.isatty()
        self._bar = tqdm(
            desc=title,
            total=total,
            initial=done,
            unit=" rows",
            mininterval=0.5 if terminal else 10.0,
            ascii=not terminal,
            dynamic_ncols=terminal,
            file=sys.stderr,
        )
        self._tokens = 0

    def __enter__(self) -> "Progress":
        """Returns itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the line."""
        self._bar.close()

    def update(self, rows: int, tokens: int) -> None:
        """Counts finished rows and the tokens that the model read or wrote for them."""
        self._tokens += tokens
        elapsed = self._bar.format_dict["elapsed"]
        self._bar.set_postfix_str(f"{self._tokens / max(elapsed, 1e-9):.0f} tokens/s", refresh=False)
        self._bar.update(rows)
