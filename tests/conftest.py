"""Fixtures that several tests share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def ward2025() -> Path:
    """Folder of the artifacts that the authors of the paper released; tests that need them skip where it is absent."""
    path = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "ward2025"
    if not path.is_dir():
        pytest.skip("the released artifacts are not here: ../shared/data/ward2025 is absent")
    return path
