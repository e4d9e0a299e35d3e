"""Whether the tests see a wrong program: small mistakes of meaning, one at a time, with the tests that should fail.

    make mutants                      all of them, an hour on two cores; or MUTANTS_ARGS="--only=report"

`tests/mutants.toml` lists them: a meaning, a text that occurs once in a file of the package, and what stands in its
place. The files that git tracks are copied to a temporary folder, and the mistakes are made there. The last lines count
what was killed by area; the exit status is 1 if that is below 95 %, or a text is no longer found exactly once.

Tools such as mutmut and cosmic-ray make mutants of syntax (`<` for `<=`) by the thousand and run every test on each.
The mistakes that tests overlook here are others: the vector of the other model, a column under another's name.
"""

import argparse
import collections
import dataclasses
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIST = ROOT / "tests" / "mutants.toml"
LEAST = 0.95
_SECONDS = 500  # of the tests of one mutant; a hang is seen, too
_OTHERS = ("flax.nnx", "gguf", "jax", "matplotlib.figure", "openai", "plotly.graph_objects", "scipy.stats")
_OTHERS += ("sklearn.linear_model", "tokenizers", "torch", "transformers")


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One mistake.

    Attributes:
      area: part of the program.
      file: below `backtrack_jax`.
      tests: files below `tests` of which one should fail.
      stage: number of the first stage whose results may change, or 7 where the tests run stages themselves; 0 runs all.
      meaning: what goes wrong.
      old: text that occurs once in the file.
      new: what stands in its place.
    """

    area: str
    file: str
    tests: tuple[str, ...]
    stage: int
    meaning: str
    old: str
    new: str

    def mutated(self, source: str) -> str:
        """The file's text with the mistake; ValueError if the text does not occur exactly once."""
        if (found := source.count(self.old)) != 1:
            raise ValueError(f"{self.file}, {self.meaning!r}: {self.old!r} occurs {found} times, expected once")
        return source.replace(self.old, self.new)


def read(path: Path = LIST) -> list[Mutant]:
    """The mutants of a list."""
    groups = tomllib.loads(path.read_text("utf-8"))["group"]
    return [
        Mutant(g["area"], g["file"], tuple(g["tests"]), g.get("stage", 0), *entry)
        for g in groups
        for entry in g["mutants"]
    ]


def copy_tracked(target: Path) -> None:
    """Copies what git tracks, as it is now, with what is new and not ignored."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def in_child(folder: Path, tests: Sequence[str], kept: str) -> str:
    """Empty if the tests pass on the program in a folder, else what failed. In a process that is forked off this one.

    What the tests import from other packages is there then, which takes longer than most of them.

    Args:
      folder: of the program and its tests.
      tests: files below `tests`, or tests in them.
      kept: folder of experiments that the tests' own start from; empty for none.
    """
    said = folder / "said"
    child = os.fork()
    if not child:
        _run_tests(folder, tests, kept)
    started = time.monotonic()
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() - started > _SECONDS:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return f"no end within {_SECONDS} s"
        time.sleep(0.05)
    if not ended[1]:
        return ""
    lines = said.read_text("utf-8", errors="replace").splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return failed[0] if failed else f"exit status {ended[1]}: {' '.join(lines[-5:])}"


def _run_tests(folder: Path, tests: Sequence[str], kept: str) -> NoReturn:
    """`in_child`, in the child, which ends here whatever happens: what the parent would clean up is not its own."""
    code = 1
    try:
        with (folder / "said").open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.environ.update(PYTHONPATH=str(folder), JAX_COMPILATION_CACHE_DIR=str(folder / "compiled"))
        if kept:
            os.environ["KEPT_RUNS"] = kept
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        options = ["-x", "-q", "-n0", "--no-header", "-p", "no:cacheprovider", f"--basetemp={folder / 'pytest'}"]
        options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of plugins that others have imported
        code = pytest.main([*options, *(f"tests/{test}" for test in tests)])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def outcome(folder: Path, mutant: Mutant) -> str:
    """`in_child` of the mutant's tests with the mistake in the folder, which is then taken back."""
    path = folder / "backtrack_jax" / mutant.file
    source = path.read_text("utf-8")
    path.write_text(mutant.mutated(source), "utf-8")
    try:
        return in_child(folder, mutant.tests, str(folder / f"kept-{mutant.stage}") if mutant.stage else "")
    finally:
        path.write_text(source, "utf-8")


def keep_stages(folder: Path) -> None:
    """Copies of the experiments that the last tests have run, without the results from a stage on."""
    for stage in range(2, 8):
        later = shutil.ignore_patterns(*(f"{number}-*" for number in range(stage, 7)))
        for name in ("tiny", "lopsided"):
            if (folder / "pytest" / name).exists():
                shutil.copytree(folder / "pytest" / name, folder / f"kept-{stage}" / name, ignore=later)


def main() -> None:
    """Runs the mutants that are asked for."""
    parser = argparse.ArgumentParser(description="Runs the tests on a copy of the program with one mistake at a time.")
    parser.add_argument("--only", default="", help="areas or files, with commas between them; default all")
    parser.add_argument("--log", type=Path, help="file of outcomes; mutants that were killed in it are not run again")
    flags = parser.parse_args()
    asked = flags.only.split(",")
    for name in _OTHERS:  # here, so that the processes that are forked off this one need not import them
        importlib.import_module(name)
    mutants = [m for m in read() if not flags.only or m.area in asked or m.file in asked]
    if not mutants:
        sys.exit(f"--only={flags.only}: no mutant; accepted: {', '.join(sorted({m.area for m in read()}))}, or files")
    faults = []
    for mutant in mutants:
        try:
            compile(mutant.mutated((ROOT / "backtrack_jax" / mutant.file).read_text("utf-8")), mutant.file, "exec")
        except ValueError as error:
            faults.append(str(error))
        except SyntaxError as error:  # which any test would see
            faults.append(f"{mutant.file}, {mutant.meaning!r}: no Python ({error})")
    if faults:
        sys.exit("\n".join(faults))
    before = json.loads(flags.log.read_text()) if flags.log and flags.log.exists() else {}
    found: dict[Mutant, str] = {}
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        folder = Path(name)
        copy_tracked(folder)
        keys = {mutant: f"{mutant.file}: {mutant.meaning}" for mutant in mutants}
        to_do = [mutant for mutant in mutants if not before.get(keys[mutant])]
        whole = sorted({test for mutant in to_do for test in mutant.tests})
        print(f"{len(to_do)} of {len(mutants)} mutants; without a mistake, the tests", end=" ", flush=True)
        if whole and (failed := in_child(folder, whole, "")):
            sys.exit(f"fail: {failed}")
        keep_stages(folder)
        print("pass", flush=True)
        for number, mutant in enumerate(mutants, 1):
            found[mutant] = before.get(keys[mutant]) or outcome(folder, mutant)
            before[keys[mutant]] = found[mutant]
            if flags.log:
                flags.log.write_text(json.dumps(before, indent=1))
            print(f"{number:4} {'killed  ' if found[mutant] else 'SURVIVED'} {keys[mutant]}", flush=True)
    killed = collections.Counter(mutant.area for mutant, failed in found.items() if failed)
    print(f"\n{'area':<16}{'mutants':>8}{'killed':>8}")
    for area, count in collections.Counter(mutant.area for mutant in mutants).items():
        print(f"{area:<16}{count:>8}{killed[area]:>8}")
    share = killed.total() / len(mutants)
    print(f"{'all':<16}{len(mutants):>8}{killed.total():>8}  {100 * share:.1f} %, at least {100 * LEAST:g} % expected")
    sys.exit(share < LEAST)


if __name__ == "__main__":
    main()
