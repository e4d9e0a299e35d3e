"""What the documentation names is there: messages, tests, pitfalls, links, files and commands."""

import ast
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from backtrack_jax.config import Experiment

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
SOURCES = sorted([*(ROOT / "backtrack_jax").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")])
TESTS = sorted((ROOT / "tests").rglob("*.py"))
VARIES = "…"
PITFALL = re.compile(r"\bT([1-9]\d?)\b(?! GPU)")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def literals(source: str) -> set[str]:
    """Texts of a program's strings but docstrings, adjacent ones joined, `VARIES` for what an f-string puts in."""
    tree = ast.parse(source)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = set()
    for node in (node for node in ast.walk(tree) if id(node) not in docstrings):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
        elif isinstance(node, ast.JoinedStr):
            found.add("".join(str(v.value) if isinstance(v, ast.Constant) else VARIES for v in node.values))
    return found


def messages() -> list[str]:
    """The first cells of the tables of errors.md, without their backticks."""
    rows = re.findall(r"^\| `(.+?)` \| .+ \|$", (ROOT / "docs" / "errors.md").read_text(), re.MULTILINE)
    assert len(rows) > 80
    return rows


@pytest.fixture(scope="module")
def texts() -> set[str]:
    return set().union(*(literals(path.read_text()) for path in SOURCES))


@pytest.mark.parametrize("message", messages())
def test_messages_of_the_index_are_messages_of_the_program(message: str, texts: set[str]) -> None:
    fixed = [part.strip() for part in message.split(VARIES) if part.strip(" .,:;()[]=")]
    assert len("".join(fixed)) >= 12, "too little of this message is fixed"
    in_order = re.compile(".*?".join(map(re.escape, fixed)), re.DOTALL)
    assert any(in_order.search(text) for text in texts), f"no text of the program reads {message}"


def test_adjacent_strings_and_values_are_seen() -> None:
    found = literals('"""Docstring."""\nraise ValueError(f"no {kind} vector " "was read; there " f"are {known}")')
    assert f"no {VARIES} vector was read; there are {VARIES}" in found
    assert "Docstring." not in found


def test_every_pitfall_that_is_cited_is_explained() -> None:
    explained = re.findall(r"^### T(\d+): ", (ROOT / "docs" / "pitfalls.md").read_text(), re.MULTILINE)
    assert explained == [str(number) for number in range(1, len(explained) + 1)]
    cited = {name(path): set(PITFALL.findall(path.read_text())) for path in (*TESTS, *SOURCES, *PAGES)}
    assert len(set().union(*(cited[name(path)] for path in TESTS))) >= 10
    assert not {path: unknown for path, codes in cited.items() if (unknown := codes - set(explained))}


def test_tests_that_pitfalls_name_exist() -> None:
    named = re.findall(r"`(test_\w+)`", (ROOT / "docs" / "pitfalls.md").read_text())
    there = set(re.findall(r"^ *(?:async )?def (test_\w+)", "\n".join(map(Path.read_text, TESTS)), re.MULTILINE))
    assert len(named) > 30
    assert not set(named) - there


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", page.read_text())):
        if not target.startswith(("https://", "#")):
            assert (page.parent / target.partition("#")[0]).exists(), f"{name(page)} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_and_files_exist(page: Path) -> None:
    text = page.read_text()
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make (\w+)|^make (\w+)", text, re.MULTILINE):
        assert re.search(rf"^{''.join(target)}:", makefile, re.MULTILINE), f"{name(page)}: make {target}"
    for path in re.findall(r"(?<![\w/])(?:configs|scripts|docs|notebooks|tests|backtrack_jax)/[\w./]*\w", text):
        assert (ROOT / path).exists(), f"{name(page)} names {path}"
    for module in re.findall(r"python -m (backtrack_jax[\w.]*)", text):
        assert importlib.util.find_spec(module), f"{name(page)}: python -m {module}"
    for field, value in re.findall(r"--config\.([a-z][\w.]+)=(\S*)", text):
        at: Any = Experiment()
        for part in field.split("."):
            assert hasattr(at, part), f"{name(page)} names --config.{field}={value}"
            at = getattr(at, part)
    for script, options in re.findall(r"python (scripts/\w+\.py)((?: (?:[^#`\n\\]|\\\n)*)?)", text):
        source = (ROOT / script).read_text()
        for option in re.findall(r"--(\w+)", options):
            assert re.search(rf"\W{option}\b", source), f"{name(page)} names {script} --{option}"


def test_what_users_need_is_explained_somewhere() -> None:
    text = "\n".join(page.read_text() for page in PAGES)
    for command in (
        "make demo", "make test", "make bench", "--dry_run", "python -m backtrack_jax.show TRACE --config=FILE",
        "--config.traces.path=CHAINS", "steering.kinds=backtracking,noise,mine.safetensors", "'.[cuda13]'", "'.[tpu]'",
        "'.[smollm2]'", "--config.model_parallel=8", "--config.data_parallel=2", "scripts/compile_ahead.py",
        "JAX_COMPILATION_CACHE_DIR", "--config.traces.problems=FILE", "openai.max_cost=5", "scripts/write_problems.py",
        "scripts/organism_claims.py --pairs", "scripts/train_organism.py --out=", "scripts/finetune.py",
        "make test PYTEST_ARGS=", "python -m backtrack_jax.selfcheck --config=FILE", "scripts/model_table.py",
    ):  # fmt: skip
        assert command in text, command
