"""What an entry of `steering.kinds` says: what is done, along which direction, where, and when.

    entry     = edit {" & " edit} [" when " gate] [" keeping norm"]
    edit      = [number "*"] what [" during " span]
    what      = direction | operation | operation ":" direction
    direction = part {(" + " | " - ") part}
    part      = [number "*"] name
    span      = "prompt" | "generated" | "generated[2:18]"
    gate      = "sentence-ends" | "paragraph-breaks" | "tokens " text {"|" text} | name " > " number

A name is a label, one of `DIRECTIONS` (some take arguments: `own(deduction)`, `pcs(16)`), the path of a vector file, or
that of a sparse autoencoder with the number of a row of its decoder, `path/to/sae#123`. A direction alone is added.
Labels have hyphens in them, so the signs of a sum stand between spaces: `adding-knowledge - 0.5 * deduction`. The
number before one of several edits multiplies the magnitude, or, of an edit whose strength is a share, is the share.
Nothing here imports JAX.
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
      subspace: whether it takes several directions at once, [R, D].
      strength: what its strength is: "length", the norm of what is added, a magnitude in `steering.unit`; "value", a
        magnitude in that unit that is something else, such as a component; or "share", the magnitude itself, from -1
        to 1.
    """

    make: str
    directed: bool = True
    strength: str = "length"
    subspace: bool = False

    def __post_init__(self) -> None:
        """Refuses a strength that nobody knows."""
        if self.strength not in STRENGTHS:
            raise ValueError(f"strength={self.strength!r}, expected one of {', '.join(STRENGTHS)}")


ADD = Operation("backtrack_jax.intervention:add_vector")
"""What is done with a direction alone."""

OPERATIONS = {
    "ablate": Operation("backtrack_jax.intervention:ablate_from", strength="share", subspace=True),
    "clamp": Operation("backtrack_jax.intervention:clamp", strength="value"),
    "frozen-noise": Operation("backtrack_jax.intervention:frozen_noise", directed=False),
    "matched-noise": Operation("backtrack_jax.intervention:matched_noise", subspace=True),
    "noise": Operation("backtrack_jax.intervention:gaussian_noise", directed=False),
    "noise-outside": Operation("backtrack_jax.intervention:noise_outside", subspace=True),
    "noise-part-within": Operation("backtrack_jax.intervention:noise_part_within", subspace=True),
    "noise-within": Operation("backtrack_jax.intervention:noise_within", subspace=True),
    "self-amplification": Operation("backtrack_jax.intervention:self_amplify", directed=False),
}
"""Name -> operation. A line here makes one reachable from a config."""


@dataclasses.dataclass(frozen=True)
class Direction:
    """A direction, or several at once, that is neither a label's nor in a file.

    Attributes:
      draw: "module:function" of what draws it for a reply, called with the row's key, the name, the width and the
        arguments; empty if it is another one in no reply.
      make: "module:function" of what makes it of the vectors that were read, called with `directions.Place` and the
        arguments; empty if stage 3 writes it.
      takes: type of each argument in parentheses: "label" or "number".
      read: whether it comes from a model's activations.
      subspace: whether it is several directions at once, which are not added but ablated, or drawn in.
    """

    draw: str = ""
    make: str = ""
    takes: tuple[str, ...] = ()
    read: bool = True
    subspace: bool = False


_MADE = "backtrack_jax.directions"

DIRECTIONS = {
    "overall-mean": Direction(),
    "random": Direction(draw="backtrack_jax.conditions:random_direction", read=False),
    "shuffled": Direction(),
    "fixed": Direction(make=f"{_MADE}:fixed", takes=("number",), read=False),
    "own": Direction(make=f"{_MADE}:own", takes=("label",)),
    "ordered": Direction(make=f"{_MADE}:ordered", takes=("label",)),
    "symmetric": Direction(make=f"{_MADE}:symmetric", takes=("label",)),
    "pc": Direction(make=f"{_MADE}:principal", takes=("number",)),
    "difference": Direction(make=f"{_MADE}:difference", takes=("number",)),
    "labels": Direction(make=f"{_MADE}:labels", takes=("number",), subspace=True),
    "pcs": Direction(make=f"{_MADE}:principal_components", takes=("number",), subspace=True),
    "last-pcs": Direction(make=f"{_MADE}:last_components", takes=("number",), subspace=True),
    "covariance": Direction(make=f"{_MADE}:covariance", subspace=True),
    "subspace": Direction(make=f"{_MADE}:fixed_subspace", takes=("number", "number"), read=False, subspace=True),
}
"""Name -> direction. `stages.vectors` makes those that are read and have no `make`; `directions` says what each is."""

RESERVED = (*DIRECTIONS, *OPERATIONS)
"""Names that mean something of their own, and so cannot be labels."""

ACCEPTED = (
    "a label, control or vector file, a sum of them such as 'backtracking + 0.5 * deduction', or an operation such as "
    "'ablate:' and either"
)

GATES = ("sentence-ends", "paragraph-breaks")
"""Sets of input tokens that have a name."""

_CALL = re.compile(r"([a-z][a-z-]*)\((.*)\)", re.DOTALL)
_SPAN = re.compile(r"prompt|generated(\[\d+:\d+\])?")
_KEEPING_NORM = " keeping norm"
_SIGN = re.compile(r"\s+([+-])\s+")
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"


@dataclasses.dataclass(frozen=True)
class Edit:
    """One change to the residual stream.

    Attributes:
      parts: (weight, name) of each summand of the direction; the weight of a lone name is 1. Empty for an operation
        without a direction.
      operation: key of `OPERATIONS`; empty if the direction is added.
      weight: of the magnitude; the share, for an operation of shares beside others.
      during: positions, where they are not the experiment's.
    """

    parts: tuple[tuple[float, str], ...]
    operation: str = ""
    weight: float = 1.0
    during: str = ""

    @property
    def what(self) -> Operation:
        """The operation."""
        return OPERATIONS[self.operation] if self.operation else ADD


@dataclasses.dataclass(frozen=True)
class Gate:
    """Where the edits of an entry act.

    Attributes:
      tokens: one of `GATES`, or texts of input tokens; empty for any.
      name: direction along which the activation has to have a component; empty for none.
      above: what that has to exceed, in units of the mean residual norm.
    """

    tokens: tuple[str, ...] = ()
    name: str = ""
    above: float = 0.0


@dataclasses.dataclass(frozen=True)
class Kind:
    """An entry of `steering.kinds`, parsed.

    Attributes:
      edits: what is done, at least one.
      gate: where, by token or activation; None for everywhere.
      keeps_norm: whether the stream keeps its norm.
    """

    edits: tuple[Edit, ...]
    gate: Gate | None = None
    keeps_norm: bool = False

    @property
    def what(self) -> Operation:
        """The operation that says what a magnitude of the entry is."""
        return next((edit.what for edit in self.edits if edit.what.strength != "share"), self.edits[0].what)

    @property
    def names(self) -> tuple[str, ...]:
        """Labels, directions and vector files that it is made of, once."""
        found = [name for edit in self.edits for _, name in edit.parts]
        return tuple(dict.fromkeys([*found, *([self.gate.name] if self.gate and self.gate.name else [])]))

    @property
    def directed(self) -> bool:
        """Whether anything is done along a direction."""
        return any(edit.parts for edit in self.edits)

    @property
    def drawn(self) -> bool:
        """Whether one of its directions is another one in every reply."""
        return any((d := direction_of(name)) is not None and d.draw for name in self.names)

    @property
    def read(self) -> bool:
        """Whether it comes from a model's activations; what does not is run once per steered model."""
        return any(not is_vector_file(name) and ((d := direction_of(name)) is None or d.read) for name in self.names)


@functools.cache
def parse(entry: str) -> Kind:
    """Takes an entry of `steering.kinds` apart.

    Raises:
      ValueError: says what is wrong with the entry; whether its names exist is not known here.
    """
    body, norm, rest = entry.partition(_KEEPING_NORM)
    if rest.strip():
        raise ValueError(f"{entry!r} goes on after 'keeping norm', expected that at the end")
    body, when, condition = body.partition(" when ")
    gate = _gate(condition.strip()) if when else None
    texts = body.split(" & ")
    edits = tuple(_edit(text, alone=len(texts) == 1) for text in texts)
    return Kind(edits, gate, bool(norm))


def direction_of(name: str) -> Direction | None:
    """The direction of a name, which may have arguments; None for labels and files.

    Raises:
      ValueError: it has arguments that it does not take, or lacks some.
    """
    call = _CALL.fullmatch(name)
    word = call[1] if call else name
    if word not in DIRECTIONS:
        return None
    found = DIRECTIONS[word]
    given = arguments_of(name)
    right = len(given) == len(found.takes) and all(
        bool(text) and (kind == "label" or re.fullmatch(r"[0-9]{1,9}", text) is not None)
        for kind, text in zip(found.takes, given, strict=True)
    )
    if not right or bool(call) != bool(found.takes):
        accepted = f"{word}({', '.join(f'a {kind}' for kind in found.takes)})" if found.takes else f"{word!r} alone"
        raise ValueError(f"{name!r}: expected {accepted}")
    return found


def arguments_of(name: str) -> tuple[str, ...]:
    """What stands in the parentheses behind a name."""
    call = _CALL.fullmatch(name)
    return tuple(text.strip() for text in call[2].split(",")) if call else ()


def labels_of(name: str) -> tuple[str, ...]:
    """The labels that a name is, or takes; none for other directions and files."""
    found = direction_of(name)
    if found is None:
        return () if is_vector_file(name) else (name,)
    return tuple(text for kind, text in zip(found.takes, arguments_of(name), strict=True) if kind == "label")


def is_span(text: str) -> bool:
    """Whether a text names positions other than all of them."""
    return _SPAN.fullmatch(text) is not None


def strength(entry: object) -> str:
    """What the strength of an entry is, one of `STRENGTHS`; empty for a malformed one."""
    try:
        return parse(entry).what.strength if isinstance(entry, str) else ""
    except ValueError:
        return ""


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


def _edit(text: str, *, alone: bool) -> Edit:
    """One of the edits of an entry, or the only one."""
    what, during, span = text.partition(" during ")
    what, span = what.strip(), span.strip()
    if during and not is_span(span):
        raise ValueError(f"{text!r}: {span!r} is no span, expected prompt, generated or generated[2:18]")
    weight = 1.0
    weighted = re.fullmatch(rf"({_NUMBER})\s*\*\s*(.*)", what, re.DOTALL)
    if weighted and not alone and len(_SIGN.split(what)) == 1:
        weight, what = float(weighted[1]), weighted[2]
        if not weight or not math.isfinite(weight):
            raise ValueError(f"{text!r} has the weight {weight:g}, expected a finite number other than 0")
    operation, colon, direction = what.partition(":")
    if operation not in OPERATIONS:
        operation, direction = "", what
    elif not OPERATIONS[operation].directed:
        if colon:
            raise ValueError(f"{what!r}: {operation!r} acts along no direction, expected {operation!r} alone")
        return Edit((), operation, weight, span)
    first, *others = _SIGN.split(direction.lstrip())
    signs, terms = ["+", *others[::2]], [first, *others[1::2]]
    edit = Edit(tuple(_part(*signed) for signed in zip(signs, terms, strict=True)), operation, weight, span)
    names = [name for _, name in edit.parts]
    if len(set(names)) < len(names):
        raise ValueError(f"{what!r} has a name twice, expected every name once")
    if len(terms) == 1 and terms[0] != names[0]:
        raise ValueError(f"{what!r} weights a single name, which steering.magnitudes do; expected the name alone")
    several = [name for name in names if (d := direction_of(name)) is not None and d.subspace]
    if several and (len(names) > 1 or not edit.what.subspace):
        accepted = ", ".join(name for name, each in OPERATIONS.items() if each.subspace)
        raise ValueError(f"{what!r}: {several[0]!r} is several directions at once, expected it alone behind {accepted}")
    return edit


def _gate(text: str) -> Gate:
    """What stands behind `when`."""
    if text in GATES:
        return Gate((text,))
    if text.startswith("tokens "):
        texts = tuple(text.removeprefix("tokens ").split("|"))
        if all(word.strip() for word in texts):
            return Gate(tuple(word.strip() for word in texts))
    name, above, number = text.partition(" > ")
    if above and re.fullmatch(_NUMBER, number.strip()) and name.strip() and len(_SIGN.split(name)) == 1:
        found = direction_of(name.strip())
        if found is None or not found.subspace:
            return Gate((), name.strip(), float(number))
    raise ValueError(
        f"{text!r} is no gate, expected {', '.join(GATES)}, 'tokens wait|hmm', or a direction's component in units of "
        "the mean residual norm, such as 'backtracking > 0.1'"
    )


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
