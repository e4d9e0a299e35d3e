"""The house: a module imports its own floor or a lower one, nothing in a circle, and each concern has one door.

What stands under `if TYPE_CHECKING` or inside a function is an import as well. That a config can be read without JAX
and without tokenizers is tested in test_api.py.
"""

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "backtrack_jax"
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))}
MODULES = {name.removesuffix(".__init__"): path for name, path in MODULES.items()}

FLOORS = (  # from the ground up; names of folders, and of files in none
    ("config", "files", "kinds", "protocol"),
    ("models",),
    ("data",),
    (
        *("extract", "generate", "intervention", "readers", "sae_files", "sampling", "subspaces", "terms"),
        *("vector_files", "vectors"),
    ),
    ("judges",),
    ("analysis",),
    ("organism",),
    ("checks", "compatibility", "conditions", "directions", "inputs", "labelling"),
    ("stages",),
    ("report",),
    ("finished", "pipeline", "plan"),
    # Of these, training is a wing: only scripts import it.
    ("compare", "export_activations", "run", "selfcheck", "show", "training"),
)


def imported(name: str) -> set[str]:
    """Modules of the package that a module imports; the package itself, whose names are loaded on use, is none."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}: imports are absolute"
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return (found & MODULES.keys()) - {name, "backtrack_jax"}


GRAPH = {name: imported(name) for name in MODULES if name != "backtrack_jax"}


def room(name: str) -> str:
    """The folder of a module, or the module itself where it is in none."""
    return name.split(".")[1]


def test_every_module_has_its_floor() -> None:
    assert {room(name) for name in GRAPH} == {name for floor in FLOORS for name in floor}
    assert sum(map(len, GRAPH.values())) > 100  # imports are seen


@pytest.mark.parametrize("name", GRAPH)
def test_a_module_imports_its_own_floor_or_a_lower_one(name: str) -> None:
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    assert not {other for other in GRAPH[name] if floor[room(other)] > floor[room(name)]}


def test_models_know_nothing_of_the_rest_and_nobody_knows_of_training() -> None:
    arrows = {(room(name), room(other)) for name, others in GRAPH.items() for other in others}
    assert {other for one, other in arrows if one == "models"} <= {"models", "files"}
    assert {one for one, other in arrows if other == "training"} <= {"training"}


def test_no_circles_between_files_or_folders() -> None:
    folders: dict[str, set[str]] = {}
    for name, others in GRAPH.items():
        folders.setdefault(room(name), set()).update({room(other) for other in others} - {room(name)})
    for graph in (GRAPH, folders):
        graphlib.TopologicalSorter(graph).prepare()  # CycleError names the circle


def test_backends_are_asked_in_one_module() -> None:
    asks = re.compile(r"default_backend\(|platform_dependent\(")
    assert len([name for name, path in MODULES.items() if asks.search(path.read_text())]) == 1


@pytest.mark.parametrize("name", [name for name in MODULES if room(f"{name}.") == "models"])
def test_models_mention_no_backend_outside_of_the_tuned_operations(name: str) -> None:
    if not name.startswith("backtrack_jax.models.ops"):
        assert not re.findall(r".*(?i:\b(?:cpu|xla|backend)s?\b).*", MODULES[name].read_text())


def patches(tree: ast.AST) -> Iterator[str]:
    """Where JAX is changed from outside: a name of it is set, or replaced by a fixture's `setattr`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign | ast.Delete):
            targets = node.targets if isinstance(node, ast.Assign | ast.Delete) else [node.target]
            yield from (text for text in map(ast.unparse, targets) if re.match(r"jax\.", text))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in ("setattr", "delattr"):
            yield from (text for text in map(ast.unparse, node.args[:1]) if re.match(r"['\"]?jax\b", text))


def test_nobody_patches_jax() -> None:
    paths = [*ROOT.glob("tests/**/*.py"), *ROOT.glob("scripts/*.py")]
    found = {str(path.relative_to(ROOT)): list(patches(ast.parse(path.read_text()))) for path in paths}
    assert len(paths) > 40
    assert not {name: changed for name, changed in found.items() if changed}


def test_patches_of_jax_are_seen() -> None:
    for code in ("jax.devices = f", "del jax.x", 'patch.setattr(jax, "f", g)', "patch.setattr('jax.f', g)"):
        assert list(patches(ast.parse(code))), code
    assert not list(patches(ast.parse("jax.config.update('x', 1)\nx = jax.devices()\nsetattr(jaxlike, 'x', 1)")))
