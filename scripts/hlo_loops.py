"""What the loop over new tokens of a compiled program holds, from its text."""

import re
from collections import Counter

_FREE = frozenset(
    ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all")
)


def loop_counts(program: str) -> dict[str, int]:
    """Branches, inner loops and kernels of the loop over new tokens; nothing of a program without loops.

    The loop is the largest one that stands in the entry computation. A kernel is an instruction that is no bookkeeping;
    those of a branch or an inner loop count once.
    """
    bodies: dict[str, list[str]] = {}
    entry, current = "", ""
    for line in program.split("\n"):
        if line.endswith("{") and not line.startswith(" "):
            current = line.removeprefix("ENTRY ").split(" ")[0].lstrip("%")
            entry = current if line.startswith("ENTRY ") else entry
            bodies[current] = []
        elif line.startswith(" ") and " = " in line:
            bodies[current].append(line)

    def count(name: str) -> Counter[str]:
        found: Counter[str] = Counter()
        for line in bodies.get(name, ()):
            operation = re.search(r"[\])}] ([a-z][a-z0-9-]*)\(", line)
            kind = operation[1] if operation else ""
            found[{"conditional": "conditionals", "while": "whiles"}.get(kind, "")] += 1
            found["kernels"] += bool(kind) and kind not in _FREE
            if kind in ("conditional", "while", "call"):
                for inner in re.findall(
                    r"(?:body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.-]+)", line
                ):
                    found += count(inner)
                for several in re.findall(r"branch_computations=\{([^}]*)\}", line):
                    for inner in several.split(","):
                        found += count(inner.strip().lstrip("%"))
        return found

    loops = [
        match[1]
        for line in bodies.get(entry, ())
        if " while(" in line and (match := re.search(r"body=%?([\w.-]+)", line))
    ]
    largest = max((count(name) for name in loops), key=lambda of: of["kernels"], default=None)
    return {} if largest is None else {name: largest[name] for name in ("conditionals", "whiles", "kernels")}
