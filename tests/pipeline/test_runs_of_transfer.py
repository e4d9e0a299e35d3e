"""The question `transfer` on tiny models: of a model that is known to be the same, and between families."""

import dataclasses
import json
import math
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import sentence_pieces
import tiny
from runs import run

from backtrack_jax import extract, pipeline, plan
from backtrack_jax.analysis import forced, transfer
from backtrack_jax.analysis import transfer_vectors as tv
from backtrack_jax.config import Experiment, ModelSpec, QuestionsSpec, TransferSpec
from backtrack_jax.data.records import Trace
from backtrack_jax.data.text import sentence_spans
from backtrack_jax.extract import TokenTrace
from backtrack_jax.files import tables
from backtrack_jax.intervention import add_vector, no_intervention, stack_rows
from backtrack_jax.models import checkpoint, families
from backtrack_jax.readers import Reader
from backtrack_jax.stages import analysis

SAME = TransferSpec(
    ModelSpec("reasoning", dtype="float32"), prompt="r1", held_out=0.4, positions=150, rank=16, anchors=40, replies=3
)


def asking(spec: TransferSpec) -> Experiment:
    e = tiny.get_config()
    e.questions = QuestionsSpec(("transfer",), transfer=spec)
    return e


def read(finished: Path, name: str) -> dict[str, dict[str, Any]]:
    return {line["direction"]: line for line in tables.read(finished / "5-analysis" / name)}


def test_of_the_same_model_everything_is_carried_over(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known truth: the other model is the own one, so that the identity is exact and every fitted map comes to it."""
    given: list[str] = []
    ends, add = Reader.token_ends, extract.add_traces

    def seen_ends(self: Reader, trace: Trace, at: Any) -> Any:
        given.append(trace.problem_id)
        return ends(self, trace, at)

    def seen_traces(sums: Any, model: Any, traces: list[TokenTrace], **others: Any) -> Iterator[list[str]]:
        given.extend(trace.id.rpartition("/")[0] for trace in traces)
        return add(sums, model, traces, **others)

    monkeypatch.setattr(Reader, "token_ends", seen_ends)
    monkeypatch.setattr(extract, "add_traces", seen_traces)
    made = run(asking(SAME))
    found = read(finished, "transfer.csv")
    assert list(found) == [
        *("own", "own, base-derived", "own, half of the problems", "ridge", "ridge, problems alone", "orthogonal"),
        *("anchors", "identity", "shuffled pairs", "shuffled labels", "random", "ridge less shuffled pairs"),
        "unsteered",
    ]
    assert found["identity"]["cosine"] == pytest.approx(1) and found["identity"]["share"] == pytest.approx(1, abs=1e-4)
    for name in ("ridge", "orthogonal", "anchors"):
        assert found[name]["cosine"] > 0.98, name
        assert found[name]["share"] == pytest.approx(1, abs=0.15), name
    assert found["ridge"]["r2"] > 0.99 > 0.2 > found["shuffled pairs"]["r2"]
    assert found["shuffled pairs"]["cosine_low"] < 0 < found["shuffled pairs"]["cosine_high"]

    material = analysis.gather(made.context)
    fitted, held_out = tv.split(material)
    assert len(held_out) == 5 and len(fitted) == 7 and not set(fitted) & set(held_out)
    assert set(given) == set(fitted)  # of what is fitted and read, nothing is of a problem that is measured on
    effects = tables.read(finished / "5-analysis" / "reasoning.transfer_effects.csv")
    replies = tables.read(finished / "5-analysis" / "reasoning.transfer_replies.csv")
    texts = {trace.problem_id for trace, _ in material.pairs}
    assert {line["problem_id"] for line in effects} <= set(held_out) & texts
    assert {line["problem_id"] for line in replies} <= set(held_out)
    assert {line["direction"] for line in replies} == {"unsteered", "own", "identity", "shuffled pairs"}
    assert not list((finished / "5-analysis").glob("*transfer*.safetensors")) + list(finished.rglob("*forced.jsonl"))
    assert all(not tables.read(finished / "5-analysis" / f"base.{name}.csv") for name in transfer.TRANSFER.role_tables)

    _check_effect(material, effects, _own(material, set(fitted)))
    report = finished / "6-report"
    claims = {claim["name"]: claim for claim in json.loads((report / "claims.json").read_text())["claims"]}
    assert claims["transfer"]["verdict"] == "undecided" and claims["transfer"]["n"] == len(
        {line["problem_id"] for line in effects}
    )
    assert (report / "transfer.png").exists()
    line = found["ridge less shuffled pairs"]
    assert f"a difference of {line['share']:.2f}" in (report / "summary.md").read_text()


def _own(material: Any, fitted: set[str]) -> np.ndarray:
    """Mean over traces of their mean window of the label, less that of all sections, of the fitted problems."""
    sums, e = material.sums["reasoning"], material.experiment
    problem_of = {trace.id: trace.problem_id for trace in material.traces}
    layer = sums.plan.layers.index(e.steering.main_layer)
    means: dict[str, list[np.ndarray]] = {"all": [], "backtracking": []}
    for number, trace_id in enumerate(sums.trace_ids):
        if problem_of[trace_id] not in fitted:
            continue
        rows = [i for i in np.flatnonzero(sums.section_traces == number) if sums.section_positions[i]]
        for group, of_group in means.items():
            labels = [sums.plan.labels[sums.section_labels[i]] for i in rows]
            kept = [i for i, label in zip(rows, labels, strict=True) if label != "shuffled" and group in ("all", label)]
            if kept:
                of_group.append(sums.section_means[kept, layer].astype(np.float64).mean(0))
    return np.mean(means["backtracking"], 0) - np.mean(means["all"], 0)


def _check_effect(material: Any, effects: list[dict[str, Any]], own: np.ndarray) -> None:
    """The change of a text's log-odds, from the model's logits."""
    e, model = material.experiment, checkpoint.load("reasoning", dtype="float32")
    n_layers, width = model.config.n_layers, model.config.d_model
    line = next(line for line in effects if line["direction"] == "own")
    trace = next(trace for trace, _ in material.pairs if trace.problem_id == line["problem_id"])
    ids, prompt_length, starts = forced.given_text(material, "reasoning", trace, sentence_spans(trace)[1:])
    words = [i for i in range(tiny.VOCAB_SIZE) if material.tokenizer.decode([i]).strip().lower() in ("wait", "hmm")]
    found = []
    added = add_vector(
        jnp.asarray(own / np.linalg.norm(own), jnp.float32), e.steering.main_layer, 8.0, n_layers=n_layers
    )
    for row in (added, no_intervention(n_layers, width)):
        stacked = stack_rows([row]).resolve(jnp.asarray([prompt_length]))
        out = model(jnp.asarray([list(ids)]), jnp.arange(len(ids))[None], intervention=stacked)
        logits = np.asarray(model.logits(out.resid)[0], np.float64)[np.array(starts) - 1]
        others = np.delete(logits, words, axis=1)
        found.append(np.mean(np.logaddexp.reduce(logits[:, words], axis=1) - np.logaddexp.reduce(others, axis=1)))
    assert line["change"] == pytest.approx(found[0] - found[1], rel=1e-3, abs=1e-4)


def test_what_a_killed_run_has_read_is_not_read_again(
    finished: Path, loaded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = dataclasses.replace(SAME, model=ModelSpec("base", dtype="float32"), replies=0)

    def killed(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(transfer, "effects", killed)
        with pytest.raises(KeyboardInterrupt):
            run(asking(other))
    assert loaded == ["base", "reasoning"]
    loaded.clear()
    run(asking(other))
    assert loaded == ["reasoning"]  # states and window sums of the other model are there
    found = read(finished, "transfer.csv")
    assert "unsteered" not in found and not found["ridge"]["words"] and math.isfinite(found["ridge"]["share"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer": 3}, "questions.transfer.layer=3 is not a block of reasoning: it has blocks 0..2"),
        ({"prompt": "chat"}, "questions.transfer.model.path='reasoning', prompt='chat': .*template"),
        ({"tokenizer": "nowhere"}, "questions.transfer.tokenizer='nowhere'"),
        ({"model": ModelSpec("nowhere/at/all", dtype="float32")}, "questions.transfer.model.path='nowhere/at/all'"),
    ],
)
def test_what_cannot_be_read_is_refused_before_the_first_stage(
    fresh: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(asking(dataclasses.replace(SAME, **fields)))
    assert not (fresh / "1-traces" / "DONE").exists()


def test_too_few_problems_are_refused(finished: Path) -> None:
    with pytest.raises(
        ValueError, match=r"held_out=0.9 of 12 problems leaves 1 for vectors and maps and 11 for effects"
    ):
        run(asking(dataclasses.replace(SAME, held_out=0.9)))


def test_a_model_with_another_kind_of_tokenizer(finished: Path) -> None:
    """Mistral's kind of model with SentencePiece's tokenizer: `configs/transfer_mistral.py` at reduced size."""
    e = asking(SAME)
    config = runpy.run_path(str(Path(__file__).parents[2] / "configs" / "transfer_mistral.py"))["get_config"]()
    released = families.FAMILIES["mistral"].released[config.questions.transfer.model.path]
    sizes = {"d_model": 16, "d_mlp": 24, "n_layers": 4, "n_heads": 2, "n_kv_heads": 1, "head_dim": 8}
    tiny.write_weights(Path("mistral"), dataclasses.replace(released, vocab_size=500, **sizes), seed=5)
    sentence_pieces.write(Path("mistral"), sentence_pieces.trained())
    e.questions.transfer = dataclasses.replace(
        config.questions.transfer,
        model=ModelSpec("mistral", dtype="float32"),
        magnitude=8.0,
        rank=8,
        anchors=20,
        replies=2,
    )
    run(e)
    found = read(finished, "transfer.csv")
    assert {"identity", "ridge", "orthogonal", "anchors", "shuffled pairs"} <= found.keys()
    assert all(-1 <= found[name]["cosine"] <= 1 for name in ("identity", "ridge", "orthogonal", "anchors"))
    assert found["ridge"]["positions"] > 50


@pytest.mark.slow
@pytest.mark.parametrize("width", [16, 24])
def test_between_families_with_tokenizers_of_their_own(finished: Path, width: int) -> None:
    """Qwen3's kind of model that reads bytes: no weight, width, token or prompt is shared."""
    folder = Path("other")
    released = next(iter(families.FAMILIES["qwen3"].released.values()))
    config = dataclasses.replace(
        released, vocab_size=tiny.VOCAB_SIZE, d_model=width, d_mlp=24, n_layers=4, n_heads=2, n_kv_heads=1, head_dim=8
    )
    tiny.write_weights(folder, dataclasses.replace(config, tied=True), seed=5)
    spec = tiny.tokenizer_json()
    spec["model"]["merges"] = []
    (folder / "tokenizer.json").write_text(json.dumps(spec), "utf-8")
    special_tokens = {"add_bos_token": False, "eos_token": tiny.EOS}
    (folder / "tokenizer_config.json").write_text(json.dumps(special_tokens), "utf-8")
    run(asking(dataclasses.replace(SAME, model=ModelSpec("other", dtype="float32"), prompt="plain")))
    found = read(finished, "transfer.csv")
    assert ("identity" in found) == (width == 16)
    assert {line["other_layer"] for line in found.values() if line["other_layer"] >= 0} == {2}  # of four, as 1 of three
    assert all(-1 <= found[name]["cosine"] <= 1 for name in ("ridge", "orthogonal", "anchors"))
    assert "of package" not in (finished / "6-report" / "summary.md").read_text()


def test_the_plan_names_the_other_model(fresh: Path) -> None:
    made = pipeline.Run(asking(dataclasses.replace(SAME, model=ModelSpec("mistralai/Mistral-7B-v0.3"))))
    assert "mistralai/Mistral-7B-v0.3 is read in its place" in plan.describe(made)
