"""What a result was computed with: versions, device, source revision."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

_PACKAGES = ("backtrack-jax", "jax", "jaxlib", "flax", "numpy", "tokenizers", "safetensors", "gguf")


def describe() -> dict[str, Any]:
    """Versions, device, XLA's flags and git revision as JSON values; nothing identifies the machine or its user."""
    device = jax.devices()[0]
    return {
        "versions": {name: _version(name) for name in _PACKAGES} | {"python": platform.python_version()},
        "device": {"kind": device.device_kind, "platform": device.platform, "count": jax.device_count()},
        "xla_flags": [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "/" not in flag],  # no folder
        "git_revision": _git_revision(),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # this one, run from its folder
        return "not installed"


def _git_revision() -> str:
    """Commit of the source tree, with `+changes` where files differ from it; `unknown` outside a checkout."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # not the repository that an installed copy lies in
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
