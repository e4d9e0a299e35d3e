"""What an entry of `steering.kinds` says: a name, a weighted sum of directions, or the ablation of either.

    entry = ["ablate:"] part {(" + " | " - ") part}
    part  = [number "*"] name

A name is a label, one of `CONTROLS` or the path of a vector file. Labels have hyphens in them, so the signs of a sum
stand between spaces: `adding-knowledge - 0.5 * deduction`. Nothing here imports JAX.
"""

import dataclasses
import functools
import math
import re

VECTOR_SUFFIXES = (".safetensors", ".npz", ".gguf", ".pt")


@dataclasses.dataclass(frozen=True)
class Control:
    """What a name stands for that is neither a label nor a file.

    Attributes:
      read: whether it is read off a model's activations, as the vectors of labels are.
      directed: whether it is a direction that is known beforehand, and so can be weighted, summed and ablated.
    """

    read: bool
    directed: bool


CONTROLS = {
    "overall-mean": Control(read=True, directed=True),
    "noise": Control(read=False, directed=False),
    "self-amplification": Control(read=False, directed=False),
    "random": Control(read=False, directed=True),
    "shuffled": Control(read=True, directed=True),
}
"""Name -> control; `conditions` builds what is not read."""

ACCEPTED = (
    "a label, control or vector file, a sum of them such as 'backtracking + 0.5 * deduction', or 'ablate:' and either"
)

ABLATE = "ablate:"
"""What an entry begins with whose direction is removed."""

_SIGN = re.compile(r"\s+([+-])\s+")
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"


@dataclasses.dataclass(frozen=True)
class Kind:
    """An entry of `steering.kinds`, parsed.

    Attributes:
      parts: (weight, name) of each summand; the weight of a lone name is 1.
      ablates: whether the component along the direction is removed instead of the direction added.
    """

    parts: tuple[tuple[float, str], ...]
    ablates: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Labels, controls and vector files that it is made of."""
        return tuple(name for _, name in self.parts)

    @property
    def directed(self) -> bool:
        """Whether it has a direction: not noise and self-amplification."""
        return all(name not in CONTROLS or CONTROLS[name].directed for name in self.names)

    @property
    def read(self) -> bool:
        """Whether it comes from a model's activations; what does not is run once per steered model."""
        return any(CONTROLS[name].read if name in CONTROLS else not is_vector_file(name) for name in self.names)


@functools.cache
def parse(entry: str) -> Kind:
    """Takes an entry of `steering.kinds` apart.

    Raises:
      ValueError: says what is wrong with the entry; whether its names exist is not known here.
    """
    ablates = entry.startswith(ABLATE)
    first, *others = _SIGN.split(entry.removeprefix(ABLATE).lstrip() if ablates else entry)
    signs, terms = ["+", *others[::2]], [first, *others[1::2]]
    kind = Kind(tuple(_part(*signed) for signed in zip(signs, terms, strict=True)), ablates)
    if len(set(kind.names)) < len(kind.names):
        raise ValueError(f"{entry!r} has a name twice, expected every name once")
    if len(terms) == 1 and terms[0] != kind.names[0]:
        raise ValueError(f"{entry!r} weights a single name, which steering.magnitudes do; expected the name alone")
    if (ablates or len(terms) > 1) and not kind.directed:
        undirected = next(name for name in kind.names if name in CONTROLS and not CONTROLS[name].directed)
        raise ValueError(f"{entry!r}: {undirected!r} has no direction that could be summed or ablated")
    return kind


def is_vector_file(name: str) -> bool:
    """Whether a name, or an entry that is a name alone, is a file, by its suffix."""
    return name.endswith(VECTOR_SUFFIXES) and not name.startswith(ABLATE) and len(_SIGN.split(name)) == 1


def _part(sign: str, text: str) -> tuple[float, str]:
    weighted = re.fullmatch(rf"({_NUMBER})\s*\*\s*(.*)", text, re.DOTALL)
    weight, name = (float(weighted[1]), weighted[2]) if weighted else (1.0, text)
    if not name or name.startswith(ABLATE) or re.search(r"(^|\s)[-+*](\s|$)", name):
        raise ValueError(f"{text!r} is not a name with an optional weight, expected {ACCEPTED}")
    if not weight or not math.isfinite(weight):
        raise ValueError(f"{text!r} has the weight {weight:g}, expected a finite number other than 0")
    return (-weight if sign == "-" else weight), name
