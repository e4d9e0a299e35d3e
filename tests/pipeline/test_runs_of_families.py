"""All stages on a pair of every family, reduced in size: base tied, distill not, embeddings with rows for no token."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import tiny
from runs import lines_of, run

from backtrack_jax.models import checkpoint, families
from backtrack_jax.models.config import ModelConfig

pytestmark = pytest.mark.slow


def reduced(released: ModelConfig, *, tied: bool, padding: int) -> ModelConfig:
    """Three blocks of the released model's kinds (four of which the last differs: the last three), 16 wide."""
    kinds = tuple(dataclasses.replace(kind, window=kind.window and 7) for kind in released.layer_kinds[1:4])
    return dataclasses.replace(
        released,
        vocab_size=tiny.VOCAB_SIZE + padding,
        d_model=16,
        d_mlp=24,
        n_layers=3,
        n_heads=2,
        n_kv_heads=1,
        head_dim=8,
        tied=tied,
        layer_kinds=kinds,
    )


@pytest.mark.parametrize("name", families.FAMILIES)
def test_all_stages_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.write(tmp_path)
    released = next(iter(families.FAMILIES[name].released.values()))
    for role, tied, padding in (("base", True, 3), ("reasoning", False, 29)):
        folder = tmp_path / role
        tokenizer = {file: (folder / file).read_bytes() for file in ("tokenizer.json", "tokenizer_config.json")}
        shutil.rmtree(folder)
        tiny.write_weights(folder, reduced(released, tied=tied, padding=padding), seed=len(role))
        for file, content in tokenizer.items():
            (folder / file).write_bytes(content)
        fields = json.loads((folder / "config.json").read_text())
        assert (fields["model_type"], fields["tie_word_embeddings"]) == (name, tied)
        assert len(checkpoint.read_config(folder).kinds) == (2 if released.layer_kinds else 1)
    made = run(tiny.get_config())
    report = made.workdir / "6-report"
    assert (report / "report.html").exists() and json.loads((report / "claims.json").read_text())["claims"]
    replies = lines_of(made.workdir / "4-steering" / "generations.jsonl")
    assert len(replies) > 100
    assert max(token for reply in replies for token in reply["ids"]) < tiny.VOCAB_SIZE  # of rows for no token, none
    assert {reply["dtype"] for reply in replies} == {"float32"}
