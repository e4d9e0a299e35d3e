"""What a result was computed with: versions, device, source revision."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

_PACKAGES = ("backtrack-jax", "jax", "jaxlib", "flax", "numpy", "tokenizers", "safetensors", "gguf")


def describe() -> dict[str, Any]:
    """Versions, device and git revision as JSON values; nothing in it identifies the machine or its user."""
    device = jax.devices()[0]
    return {
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES}
        | {"python": platform.python_version()},
        "device": {"kind": device.device_kind, "platform": device.platform, "count": jax.device_count()},
        "git_revision": _git_revision(),
    }


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
