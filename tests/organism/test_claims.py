"""The command that measures the claims: what it refuses, and what it leaves as it is."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from backtrack_jax.files import store
from backtrack_jax.models import checkpoint

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = checkpoint.resolve("package:backtrack_jax/organism")


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("organism_claims", ROOT / "scripts" / "organism_claims.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_pair_without_enough_backtracking_is_named(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "TRACES", (12, 101))
    message = r"error: organism: \d+ backtracking sentences in 12 replies of the reasoning model, expected at least 100"
    with pytest.raises(SystemExit, match=message):
        script.main([f"--pairs={SHIPPED}", f"--out={tmp_path}"])
    assert not list(tmp_path.iterdir())


def test_the_table_of_another_pair_is_not_replaced(script: ModuleType, tmp_path: Path) -> None:
    table = tmp_path / "organism.json"
    table.write_text(json.dumps({"version": script.VERSION, "weights": {"base": "another", "reasoning": "another"}}))
    before = table.read_bytes()
    with pytest.raises(SystemExit, match=r"error: .*organism.json is of another pair of that name"):
        script.main([f"--pairs={SHIPPED}", f"--out={tmp_path}"])
    assert table.read_bytes() == before


def test_tables_of_another_version_are_named_and_left_out(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store.write_text(tmp_path / "old.json", "{}")
    store.write_text(tmp_path / "new.json", json.dumps({"version": script.VERSION}))
    assert set(script.read_tables(tmp_path)) == {"new"}
    assert f"another version of this program wrote them: old in {tmp_path}" in capsys.readouterr().err
