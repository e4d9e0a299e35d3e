"""Three stages of a few lines, for what the pipeline does with any list of them."""

from pathlib import Path
from typing import Any

from backtrack_jax.config import Experiment
from backtrack_jax.stages.base import Context, Stage


class Words(Stage):
    """Writes as many words as `traces.limit`."""

    name = "1-words"
    reads_vectors = False

    def inputs(self, e: Experiment) -> dict[str, Any]:
        return {"traces": {"limit": e.traces.limit}}

    def plan(self, context: Context) -> list[str]:
        return [f"{context.experiment.traces.limit} words"]

    def run(self, context: Context, folder: Path) -> None:
        (folder / "words.txt").write_text("wait " * context.experiment.traces.limit)


WORDS = Words()


class Count(Stage):
    """Counts the words, from `seed` on."""

    name = "2-count"
    reads_vectors = False

    def inputs(self, e: Experiment) -> dict[str, Any]:
        return {"seed": e.seed}

    def plan(self, context: Context) -> list[str]:
        return ["a sum"]

    def run(self, context: Context, folder: Path) -> None:
        words = (context.folder(WORDS) / "words.txt").read_text().split()
        (folder / "count.txt").write_text(str(len(words) + context.experiment.seed))


COUNT = Count()


class Page(Stage):
    """Shows the count, and whether it is out of date."""

    name = "3-page"
    reads_vectors = False
    page = "page.txt"

    def inputs(self, e: Experiment) -> dict[str, Any]:
        return {}

    def plan(self, context: Context) -> list[str]:
        return ["a line"]

    def run(self, context: Context, folder: Path) -> None:
        (folder / self.page).write_text((context.folder(COUNT) / "count.txt").read_text() + " words")

    def mark_stale(self, folder: Path, reason: str) -> None:
        (folder / ".notice").write_text(reason)


PAGE = Page()
TOYS = (WORDS, COUNT, PAGE)
