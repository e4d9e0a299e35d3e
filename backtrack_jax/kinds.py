"""What an entry of `steering.kinds` says: an operation, and the direction that it acts along, if it has one.

    entry     = direction | operation | operation ":" direction
    direction = part {(" + " | " - ") part}
    part      = [number "*"] name

A name is a label, one of `DIRECTIONS`, the path of a vector file, or that of a sparse autoencoder with the number of
a row of its decoder, `path/to/sae#123`; a direction alone is added. Labels have hyphens in
them, so the signs of a sum stand between spaces: `adding-knowledge - 0.5 * deduction`. Nothing here imports JAX.
"""

import dataclasses
import functools
import math
import re

STRENGTHS = ("length", "value", "share")
VECTOR_SUFFIXES = (".safetensors", ".npz", ".gguf", ".pt")


@dataclasses.dataclass(frozen=True)
class Operation:
    """One way to change the residual stream.

    Attributes:
      make: "module:function" of what makes a row, found by `conditions`. It is called with the direction ([D] float32
        of norm 1; only if `directed`), the layer, the strength, and the keywords `n_layers`, `span` and, without a
        direction, `d_model`.
      directed: whether it acts along a direction, which then stands behind a colon.
      strength: what its strength is: "length", the norm of what is added, a magnitude in `steering.unit`; "value", a
        magnitude in that unit that is something else, such as a component; or "share", the magnitude itself, from -1
        to 1.
    """

    make: str
    directed: bool = True
    strength: str = "length"

    def __post_init__(self) -> None:
        """Refuses a strength that nobody knows."""
        if self.strength not in STRENGTHS:
            raise ValueError(f"strength={self.strength!r}, expected one of {', '.join(STRENGTHS)}")


ADD = Operation("backtrack_jax.intervention:add_vector")
"""What is done with a direction alone."""

OPERATIONS = {
    "ablate": Operation("backtrack_jax.intervention:ablate_from", strength="share"),
    "noise": Operation("backtrack_jax.intervention:gaussian_noise", directed=False),
    "self-amplification": Operation("backtrack_jax.intervention:self_amplify", directed=False),
}
"""Name -> operation. A line here makes one reachable from a config."""


@dataclasses.dataclass(frozen=True)
class Direction:
    """A direction that is neither a label's nor in a file.

    Attributes:
      draw: "module:function" of what draws it for a reply, called with the row's key, the name and the width; empty if
        it is read off a model's activations, as the vectors of labels are.
    """

    draw: str = ""


DIRECTIONS = {
    "overall-mean": Direction(),
    "random": Direction(draw="backtrack_jax.conditions:random_direction"),
    "shuffled": Direction(),
}
"""Name -> direction; `stages.vectors` makes those that are read."""

RESERVED = (*DIRECTIONS, *OPERATIONS)
"""Names that mean something of their own, and so cannot be labels."""

ACCEPTED = (
    "a label, control or vector file, a sum of them such as 'backtracking + 0.5 * deduction', or an operation such as "
    "'ablate:' and either"
)

_SIGN = re.compile(r"\s+([+-])\s+")
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"


@dataclasses.dataclass(frozen=True)
class Kind:
    """An entry of `steering.kinds`, parsed.

    Attributes:
      parts: (weight, name) of each summand of the direction; the weight of a lone name is 1. Empty for an operation
        without a direction.
      operation: key of `OPERATIONS`; empty if the direction is added.
    """

    parts: tuple[tuple[float, str], ...]
    operation: str = ""

    @property
    def what(self) -> Operation:
        """The operation."""
        return OPERATIONS[self.operation] if self.operation else ADD

    @property
    def names(self) -> tuple[str, ...]:
        """Labels, directions and vector files that its direction is made of."""
        return tuple(name for _, name in self.parts)

    @property
    def drawn(self) -> bool:
        """Whether its direction is another one in every reply."""
        return any(name in DIRECTIONS and DIRECTIONS[name].draw for name in self.names)

    @property
    def read(self) -> bool:
        """Whether it comes from a model's activations; what does not is run once per steered model."""
        return any(not ((name in DIRECTIONS and DIRECTIONS[name].draw) or is_vector_file(name)) for name in self.names)


@functools.cache
def parse(entry: str) -> Kind:
    """Takes an entry of `steering.kinds` apart.

    Raises:
      ValueError: says what is wrong with the entry; whether its names exist is not known here.
    """
    operation, colon, direction = entry.partition(":")
    if operation not in OPERATIONS:
        operation, direction = "", entry
    elif not OPERATIONS[operation].directed:
        if colon:
            raise ValueError(f"{entry!r}: {operation!r} acts along no direction, expected {operation!r} alone")
        return Kind((), operation)
    first, *others = _SIGN.split(direction.lstrip() if operation else direction)
    signs, terms = ["+", *others[::2]], [first, *others[1::2]]
    kind = Kind(tuple(_part(*signed) for signed in zip(signs, terms, strict=True)), operation)
    if len(set(kind.names)) < len(kind.names):
        raise ValueError(f"{entry!r} has a name twice, expected every name once")
    if len(terms) == 1 and terms[0] != kind.names[0]:
        raise ValueError(f"{entry!r} weights a single name, which steering.magnitudes do; expected the name alone")
    return kind


def by_share(entry: str) -> bool:
    """Whether the magnitudes of an entry, which may be malformed, are shares."""
    operation = _operation(entry)
    return bool(operation) and OPERATIONS[operation].strength == "share"


def forms() -> tuple[str, ...]:
    """How operations are written: their names, with a colon where a direction follows."""
    return tuple(f"{name}:..." if operation.directed else name for name, operation in OPERATIONS.items())


def is_vector_file(name: str) -> bool:
    """Whether a name, or an entry that is a name alone, is a file, by its suffix, or a row of one, by its number."""
    by_name = name.endswith(VECTOR_SUFFIXES) or sae_row(name) is not None
    return by_name and not _operation(name) and len(_SIGN.split(name)) == 1


def sae_row(name: str) -> tuple[str, int] | None:
    """Folder of a sparse autoencoder and row of its decoder, where a name is `folder#row`; else None."""
    found = re.fullmatch(r"(.+)#(\d+)", name)
    return (found[1], int(found[2])) if found else None


def _operation(text: str) -> str:
    """The operation that a text begins with, colon or not; empty if it begins with none."""
    name = text.partition(":")[0].strip()
    return name if name in OPERATIONS else ""


def _part(sign: str, text: str) -> tuple[float, str]:
    weighted = re.fullmatch(rf"({_NUMBER})\s*\*\s*(.*)", text, re.DOTALL)
    weight, name = (float(weighted[1]), weighted[2]) if weighted else (1.0, text)
    if operation := _operation(name):
        raise ValueError(f"{operation!r} is an operation, not a direction that could be summed, weighted or ablated")
    if not name or re.search(r"(^|\s)[-+*](\s|$)", name):
        raise ValueError(f"{text!r} is not a name with an optional weight, expected {ACCEPTED}")
    if not weight or not math.isfinite(weight):
        raise ValueError(f"{text!r} has the weight {weight:g}, expected a finite number other than 0")
    return (-weight if sign == "-" else weight), name
