"""README's example shows the paper's claim, and the commands about judges plan what they say."""

import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_example_shows_the_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base model's vector makes the reasoning model say Wait more often, and not the base model."""
    monkeypatch.chdir(tmp_path)
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    notebook: dict = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(snippet, "README's example", "exec"), notebook)
    assert len(printed.getvalue().splitlines()) == 2  # one line a model
    assert notebook["vector"].directions.shape == (notebook["L"], notebook["D"])
    hits = {}
    for role in ("base", "reasoning"):
        replies = notebook["generate_text"](
            notebook[role],
            notebook["tokenizer"],
            notebook["prompts"][:12],
            [notebook["unsteered"], notebook["steered"]],
            max_new_tokens=110,
            sampling=notebook["sampling"],
        )
        hits[role] = [sum(len(re.findall(r"\b(?:Wait|Hmm)\b", pair[i])) for pair in replies) for i in (0, 1)]
    assert hits["base"] == [0, 0]
    assert hits["reasoning"][1] >= 3 * max(1, hits["reasoning"][0])


@pytest.mark.slow
def test_commands_on_judges_plan_what_they_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / "howto" / "judges.md").read_text(), re.DOTALL)
    commands = [block.replace("\\\n", "").split("python -m ")[1].split() for block in blocks if "smollm2.py" in block]
    assert [command[:2] for command in commands] == [["backtrack_jax.run", "--config=configs/smollm2.py"]] * 2
    plans = []
    for command in commands:
        started = [sys.executable, "-m", *command, f"--config.workdir={tmp_path}", "--dry_run"]
        done = subprocess.run(started, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        plans.append(done.stdout)
    assert re.search(r"10 rows.*by keyword; no calls", plans[0], re.DOTALL)
    assert re.search(
        r"judge: gpt-4o-2024-08-06 at https://api.openai.com/v1.*300 calls to pay.*about \$\d", plans[1], re.DOTALL
    )
