"""Activations of the same tokens in both models: the decoder's own, aligned, resumed to the byte."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file

from backtrack_jax import export_activations, pipeline
from backtrack_jax.files import store
from backtrack_jax.models import checkpoint
from backtrack_jax.models.batching import right_pad
from backtrack_jax.stages.annotations import read_pairs

LAYERS = [0, 2]


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the models and chains of the tiny experiment, nothing of it run."""
    tiny.write(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run() -> pipeline.Run:
    return pipeline.Run(tiny.get_config().for_vectors(), ("1-traces", "2-annotations"))


def export(out: str = "out", **given: Any) -> None:
    export_activations.export(run(), Path(out), **({"layers": LAYERS, "dtype": "float32", "shard_tokens": 200} | given))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def test_tokens_are_the_same_and_activations_the_decoders(written: Path) -> None:
    """The base model reads no markers, so that positions of the two differ; row j is one token all the same."""
    export()
    index = json.loads(Path("out/index.json").read_text())
    assert index["complete"] and index["layers"] == LAYERS and index["d_model"] == {"base": 16, "reasoning": 16}
    made = run()
    pairs, tokens = read_pairs(made.context), 0
    models = {role: checkpoint.load(role, dtype="float32") for role in ("base", "reasoning")}
    assert len(index["tokens_of_shards"]) > 2
    differ = 0
    for number, n in enumerate(index["tokens_of_shards"], 1):
        rows = load_file(f"out/index-{number:05}.safetensors")
        differ += int(np.sum(rows["position_base"] != rows["position_reasoning"]))
        for role, model in models.items():
            values = load_file(f"out/{role}/activations-{number:05}.safetensors")["activations"]
            assert values.shape == (n, 2, 16) and values.dtype == np.float32
            for t in np.unique(rows["trace"]):
                trace, annotation = pairs[t]
                read = made.context.token_trace(role, trace, annotation)
                here = rows["trace"] == t
                at = rows[f"position_{role}"][here]
                assert at.min() > 0 and [read.ids[i] for i in at] == rows["token"][here].tolist()
                ids, places = map(jnp.asarray, right_pad([read.ids], 512))
                captured = model(ids, places, capture=lambda out: out.resid_post).captured
                expected = np.moveaxis(np.asarray(captured)[LAYERS, 0][:, at], 0, 1)
                np.testing.assert_allclose(values[here], expected, atol=1e-5)
                assert np.array_equal(rows["reply"][here], at >= read.reply_start)
                if role == "reasoning":
                    left_out = set(range(1, len(read.ids))) - set(at.tolist())
                    texts = {made.context.tokenizer.decode([read.ids[i]]) for i in left_out}
                    assert texts <= set(tiny.MARKERS)  # what the base model is not shown
                starts = dict(enumerate(read.starts))
                labels = dict(zip(at.tolist(), rows["label"][here].tolist(), strict=True))
                for label, start in starts.values():
                    if start in labels:
                        assert index["labels"][labels[start]] == label
                assert all(labels[i] == -1 for i in labels if i < read.reply_start)
        tokens += n
    assert differ > 0
    assert index["traces"] == [[t.id, t.problem_id, t.category] for t, _ in pairs]


def test_a_killed_export_goes_on_to_the_same_bytes(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export("whole")
    write, n = store.write_safetensors, 0

    def dying(path: Path, *arguments: Any) -> None:
        nonlocal n
        n += "activations-" in path.name
        if n == 3:
            raise KeyboardInterrupt
        write(path, *arguments)

    monkeypatch.setattr(store, "write_safetensors", dying)
    with pytest.raises(KeyboardInterrupt):
        export("killed")
    assert not json.loads(Path("killed/index.json").read_text())["complete"]
    kept = {name: data for name, data in contents(written / "killed").items() if "activations-" in name}
    assert len(kept) == 2
    n, files = 10, []
    monkeypatch.setattr(store, "write_safetensors", lambda path, *a: (files.append(path.name), write(path, *a)))
    export("killed")
    assert contents(written / "killed") == contents(written / "whole")
    assert sum("activations-" in name for name in files) == len(contents(written / "whole")) // 3 * 2 - 2


def test_what_does_not_fit_is_refused(written: Path) -> None:
    export()
    with pytest.raises(ValueError, match=r"out holds activations under other settings \(layers\); give another --out"):
        export(layers=[1])
    with pytest.raises(ValueError, match=r"layers=\[3\]: 3 is not a block of the base model, 0\.\.2"):
        export("other", layers=[3])
    with pytest.raises(ValueError, match="dtype='int8', expected one of float32"):
        export("other", dtype="int8")
    assert not Path("other").exists()


def test_narrow_numbers_are_rounded_or_refused() -> None:
    values = np.array([[[1.001, -3.0]], [[7e4, 2.0]]], np.float32)
    found = export_activations._narrowed(values, export_activations.DTYPES["bfloat16"], "base model", [4])
    np.testing.assert_allclose(found.astype(np.float32), values, rtol=2**-8)
    with pytest.raises(FloatingPointError, match="base model: an activation at layer 4 is not finite in float16"):
        export_activations._narrowed(values, export_activations.DTYPES["float16"], "base model", [4])


def test_shards_end_with_a_trace() -> None:
    assert export_activations._shards([5, 6, 0, 20, 1], 10) == [[0, 1], [3], [4]]
    assert export_activations._shards([0], 10) == []
