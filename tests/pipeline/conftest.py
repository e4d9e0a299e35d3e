"""Fixtures of the tests of the pipeline."""

from typing import Any

import pytest

from backtrack_jax.models import checkpoint


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the models that were loaded since: no model, no model work."""
    names: list[str] = []
    load = checkpoint.load

    def counting(path: str, **kwargs: Any) -> Any:
        names.append(path)
        return load(path, **kwargs)

    monkeypatch.setattr(checkpoint, "load", counting)
    return names
