"""Fixtures that several tests share."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import jax
import lopsided
import pytest
import tiny
from commands import Command
from jax.experimental.compilation_cache import compilation_cache

from backtrack_jax import pipeline

# float32 beside bfloat16, or an integer beside either, is an error in the tests and in the processes that they start.
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
jax.config.update("jax_numpy_dtype_promotion", "strict")

# A file is one process's; those that take longest come first, so that no process is left alone with one at the end.
LONGEST = (
    "test_death.py",
    "test_resume.py",
    "test_stages.py",
    "test_artifacts.py",
    "test_notebooks.py",
    "test_label_stage.py",
    "test_train.py",
    "test_generate.py",
    "test_sharding.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts the files, not the tests in them."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture
def optax_promotes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """JAX's own promotion, for tests of training: optax raises a number to the power of an integer count."""
    monkeypatch.setenv("JAX_NUMPY_DTYPE_PROMOTION", "standard")
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="session")
def ward2025() -> Path:
    """Folder of the artifacts that the authors of the paper released; tests that need them skip where it is absent."""
    path = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "ward2025"
    if not path.is_dir():
        pytest.skip("the released artifacts are not here: ../shared/data/ward2025 is absent")
    return path


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of this session, the same one for all of its processes."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session", autouse=True)
def compiled(shared: Path) -> Iterator[None]:
    """Folder of compiled programs: what one test, or another process, has compiled, others find there.

    One that is named in the environment outlives the session.
    """
    options = {
        "jax_compilation_cache_dir": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(shared / "compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in options.items():
            patch.setenv(name.upper(), str(value))
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # whether there is a cache is looked up once
        yield


@pytest.fixture(scope="session")
def tiny_run(shared: Path) -> Path:
    """Folder of the tiny experiment with `results/tiny`, of a run without interruption. Not to be changed."""
    return _run_of(shared, "tiny", tiny)


@pytest.fixture(scope="session")
def lopsided_run(shared: Path) -> Path:
    """The same of the lopsided experiment, without its report."""
    return _run_of(shared, "lopsided", lopsided, pipeline.stage_names("12345"))


def _run_of(shared: Path, name: str, experiment: ModuleType, stages: Sequence[str] = ()) -> Path:
    folder = shared / name
    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process of the session may be making it
        if not folder.exists():
            made = shared / f"{name}.made"
            if "KEPT_RUNS" in os.environ:  # earlier runs, of which finished stages are kept: see scripts/mutants.py
                shutil.copytree(Path(os.environ["KEPT_RUNS"]) / name, made)
            else:
                experiment.write(made)
            with contextlib.chdir(made):
                pipeline.Run(experiment.get_config(), stages).run()
            made.rename(folder)
    return folder


@pytest.fixture
def finished(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Results of the tiny experiment in a copy of its folder, which is the working directory."""
    shutil.copytree(tiny_run, tmp_path / "tiny")
    monkeypatch.chdir(tmp_path / "tiny")
    return tmp_path / "tiny" / "results" / "tiny"


@pytest.fixture
def fresh(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the results of the tiny experiment will be; nothing is done yet."""
    shutil.copytree(tiny_run, tmp_path / "tiny", ignore=shutil.ignore_patterns("results"))
    monkeypatch.chdir(tmp_path / "tiny")
    return tmp_path / "tiny" / "results" / "tiny"


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs `backtrack_jax.run`, or another program, in this process."""
    return Command(monkeypatch, capsys)
