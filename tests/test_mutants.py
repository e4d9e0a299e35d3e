"""The list of mistakes that the tests should see; `make mutants` runs it."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_list_of_mutants(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every mistake has a name of its own, and tests and a file that exist; a text must occur exactly once."""
    spec = importlib.util.spec_from_file_location("mutants", ROOT / "scripts" / "mutants.py")
    assert spec and spec.loader
    mutants = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "mutants", mutants)
    spec.loader.exec_module(mutants)
    found = mutants.read()
    assert len(found) >= 100 and len({(mutant.file, mutant.meaning) for mutant in found}) == len(found)
    for mutant in found:
        assert mutant.old != mutant.new
        mutant.mutated((ROOT / "backtrack_jax" / mutant.file).read_text())  # ValueError where the source has moved on
        assert mutant.tests and all((ROOT / "tests" / test.partition("::")[0]).is_file() for test in mutant.tests)
    one = mutants.Mutant("data", "a.py", ("test_a.py",), 0, "a name is another", "a", "b")
    assert one.mutated("1 a 2") == "1 b 2"
    for text, times in (("b", 0), ("a a", 2)):
        with pytest.raises(ValueError, match=f"a.py, 'a name is another': 'a' occurs {times} times, expected once"):
            one.mutated(text)
