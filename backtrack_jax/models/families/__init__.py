"""The families of models that are implemented: one file each, and one line in `FAMILIES`."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from backtrack_jax.models.config import ModelConfig
from backtrack_jax.models.families.base import Family
from backtrack_jax.models.families.llama import LLAMA
from backtrack_jax.models.families.mistral import MISTRAL
from backtrack_jax.models.families.olmo3 import OLMO3
from backtrack_jax.models.families.qwen2 import QWEN2
from backtrack_jax.models.families.qwen3 import QWEN3
from backtrack_jax.models.families.smollm3 import SMOLLM3

FAMILIES: dict[str, Family] = {family.name: family for family in (LLAMA, QWEN2, QWEN3, MISTRAL, SMOLLM3, OLMO3)}
"""Families by name, which is Hugging Face's `model_type`."""


def from_hf(fields: Mapping[str, Any]) -> ModelConfig:
    """Reads the contents of a Hugging Face `config.json`.

    Args:
      fields: the parsed JSON object.

    Returns:
      The architecture.

    Raises:
      ValueError: the family is not implemented, or a field is missing, unknown, or has a value that is not implemented;
        names all of them at once.
    """
    model_type = fields.get("model_type")
    if model_type is None:
        raise ValueError(f"config.json has no field model_type, expected {_listed(FAMILIES)}")
    if model_type not in FAMILIES:
        raise ValueError(f"config.json has model_type={model_type!r}, only {_listed(FAMILIES)} is implemented")
    return FAMILIES[model_type].from_hf(fields)


def from_hf_file(path: str | os.PathLike[str]) -> ModelConfig:
    """Reads a `config.json`; raises ValueError naming the file when it is not JSON or not a model of these families."""
    try:
        fields = json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    try:
        return from_hf(fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Contents of a `config.json` that `from_hf` and Hugging Face transformers read back."""
    return FAMILIES[config.family].to_hf(config)


def of_gguf(architecture: object) -> Family:
    """The family of a GGUF file, by its `general.architecture`; ValueError names those that are implemented."""
    by_architecture = {family.gguf.architecture: family for family in FAMILIES.values() if family.gguf}
    if not isinstance(architecture, str) or architecture not in by_architecture:
        raise ValueError(f"general.architecture is {architecture!r}, only {_listed(by_architecture)} is implemented")
    return by_architecture[architecture]


def released(hub_id: str) -> ModelConfig | None:
    """Architecture of a released model by its hub id, known before anything is fetched; None for others."""
    return next((family.released[hub_id] for family in FAMILIES.values() if hub_id in family.released), None)


def _listed(names: Mapping[str, Any]) -> str:
    return " or ".join(map(repr, names))
