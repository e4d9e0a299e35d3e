"""The problems that ship with the package, written for this project.

300 in the ten categories of the paper, and 180 with known answers: 60 each of mathematics, deduction and planning, 20
at each of three difficulties (`scripts/graded_problems.py` computes every answer).
"""

from collections.abc import Sequence
from importlib import resources
from typing import TypeVar

import numpy as np

from backtrack_jax.data.records import Problem, read_problems
from backtrack_jax.files.paths import data_path

_T = TypeVar("_T")

CATEGORIES = (
    "math_logic",
    "spatial",
    "verbal",
    "pattern",
    "lateral",
    "causal",
    "probability",
    "systems",
    "creative",
    "scientific",
)
"""The categories of the paper, in its order."""


def problems_at(path: str) -> list[Problem]:
    """The problems of a file, those that ship with the package if none is named; errors of `read_problems`."""
    return read_problems(data_path(path)) if path else shipped_problems()


GRADED = ("mathematics", "deduction", "planning")
"""The categories of the graded problems."""


def graded_problems() -> list[Problem]:
    """Reads `graded.jsonl` beside this module, `package:backtrack_jax/data/graded.jsonl` in a config.

    Returns:
        The 180 problems with `answer` and `difficulty`, by category and difficulty; ids run from
        `<category>_<difficulty>_00` to `_19`.
    """
    with resources.as_file(resources.files("backtrack_jax.data") / "graded.jsonl") as path:
        return read_problems(path)


def shipped_problems() -> list[Problem]:
    """Reads `problems.jsonl` beside this module.

    The texts are not those of the paper: they are of the same kind and number, 30 in each of `CATEGORIES`.

    Returns:
        The 300 problems, by category and then by number; ids run from `<category>_00` to `<category>_29`.
    """
    with resources.as_file(resources.files("backtrack_jax.data") / "problems.jsonl") as path:
        return read_problems(path)


def spread(items: Sequence[_T], limit: int) -> list[_T]:
    """`limit` items evenly spread over a sequence, all of them if limit is 0 or more than there are."""
    if not limit or limit >= len(items):
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, limit).round().astype(int)]
