"""The operations of a model: the plain or the tuned form, whichever the target is fast with.

`plain` defines them, `tuned` has faster forms of some, and this is the one door to both. Which form an operation takes
depends on what is compiled for, `target`, and on nothing else; BACKTRACK_PLAIN_OPS in the environment (`all`, or names
separated by commas) asks for the plain one, to measure what the other gains or to look for an error.
"""

import functools
import os
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from backtrack_jax.models.ops import plain, tuned
from backtrack_jax.models.ops.targets import Target, compiling_for, half, target

__all__ = [
    "Target",
    "attend",
    "attend_causally",
    "compiler_options",
    "compiling_for",
    "half",
    "lookup",
    "matmul",
    "scan_blocks",
    "target",
    "unembed",
    "unstacks",
]

_P = ParamSpec("_P")
_R = TypeVar("_R")
_ASKED = os.environ.get("BACKTRACK_PLAIN_OPS", "")
_PLAIN = frozenset(tuned.PLATFORMS if _ASKED == "all" else filter(None, _ASKED.split(",")))
if _UNKNOWN := sorted(_PLAIN - tuned.PLATFORMS.keys()):
    raise ValueError(f"BACKTRACK_PLAIN_OPS names {_UNKNOWN}, expected `all` or some of {', '.join(tuned.PLATFORMS)}")


def _behind_the_door(op: Callable[_P, _R]) -> Callable[_P, _R]:
    name = op.__name__
    if name not in tuned.PLATFORMS or name in _PLAIN:
        return op

    @functools.wraps(op)
    def chosen(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        form = getattr(tuned, name) if target().platform in tuned.PLATFORMS[name] else op
        return form(*args, **kwargs)

    return chosen


attend = _behind_the_door(plain.attend)
attend_causally = _behind_the_door(plain.attend_causally)
compiler_options = _behind_the_door(plain.compiler_options)
lookup = _behind_the_door(plain.lookup)
matmul = _behind_the_door(plain.matmul)
scan_blocks = _behind_the_door(plain.scan_blocks)
unembed = _behind_the_door(plain.unembed)
unstacks = _behind_the_door(plain.unstacks)
