"""What cannot run stops before the long work, by name."""

import json
import re
import shutil
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from runs import ROLES, csv_rows, edit_chains, few_conditions, lines_of, run, set_at
from safetensors.numpy import load_file, save_file

from backtrack_jax import compatibility, pipeline, vectors
from backtrack_jax.config import Experiment
from backtrack_jax.data import records
from backtrack_jax.files import store


def test_a_broken_checkpoint_of_either_model_stops_before_the_first_is_read(fresh: Path, loaded: list[str]) -> None:
    weights = Path("reasoning/model.safetensors")
    whole = weights.read_bytes()
    for broken in (b"", whole[:100], whole[:-1]):
        weights.write_bytes(broken)
        with pytest.raises(ValueError, match=r"reasoning/model\.safetensors"):
            run(tiny.get_config())
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="reasoning"):
        run(tiny.get_config())
    assert not loaded


def edit_json(path: str, **changes: Any) -> None:
    Path(path).write_text(json.dumps(json.loads(Path(path).read_text()) | changes))


def test_an_unknown_field_of_a_models_config(fresh: Path) -> None:
    edit_json("base/config.json", sliding_window=512)
    with pytest.raises(ValueError, match=r"base/config\.json.*\n.*unknown field sliding_window=512"):
        pipeline.Run(tiny.get_config())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: set_at(e.steering, "layer", 3), r"steering\.layer=3 is not a block of the base model.*0\.\.2"),
        (lambda e: set_at(e.steering, "layers", (1, 5)), r"steering\.layers=5 is not a block"),
        (lambda e: set_at(e.vectors, "layers", (0, 7)), r"vectors\.layers=7 is not a block"),
        (lambda e: set_at(e.traces, "path", "nowhere.json"), r"nowhere\.json: no such file"),
        (lambda e: set_at(e.base, "path", "nowhere/at/all"), "nowhere/at/all"),
        (lambda e: set_at(e.base, "path", "package:llm_nothing/x.gguf"), "llm_nothing is not installed"),
    ],
)
def test_what_does_not_fit_stops_before_anything_is_written(
    fresh: Path, change: Callable[[Experiment], None], message: str
) -> None:
    e = tiny.get_config()
    change(e)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(e)
    assert not fresh.exists()


def test_models_that_do_not_fit_each_other(fresh: Path) -> None:
    shutil.rmtree("base")
    tiny.write_model(Path("base"), vocab_size=tiny.VOCAB_SIZE, seed=3, d_model=24)
    with pytest.raises(ValueError, match=r"base \(3, 24\), reasoning \(3, 16\)"):
        pipeline.Run(tiny.get_config())


def test_a_replacement_that_is_no_token(fresh: Path, loaded: list[str]) -> None:
    e = tiny.get_config()
    e.base.markers, e.base.marker_replacement = "replace", " so wait"
    message = r"base\.marker_replacement=' so wait' is 2 tokens of reasoning: ' so', ' wait' \(ids"
    with pytest.raises(ValueError, match=message):
        run(e)
    shutil.rmtree("base")
    tiny.write_model(Path("base"), vocab_size=tiny.VOCAB_SIZE - 4, seed=1)
    e.base.marker_replacement = "</think>"
    message = rf"base\.marker_replacement='</think>' is the token {tiny.VOCAB_SIZE - 1}, which is not one of base: it "
    with pytest.raises(ValueError, match=message):
        run(e)
    assert not loaded and not fresh.exists()


def test_keywords_that_no_token_contains_stop_before_a_model_is_loaded(fresh: Path, loaded: list[str]) -> None:
    e = tiny.get_config()
    e.analysis.keywords = ("zzzz",)
    with pytest.raises(ValueError, match=r"analysis\.keywords=\('zzzz',\): .* no token contains any of zzzz"):
        run(e)
    assert not loaded and not fresh.exists()
    run(e, "1", "2", "3")  # which read no keywords


def test_token_ids_beyond_the_embedding(fresh: Path, loaded: list[str]) -> None:
    """A gather out of range reads another row without a word. Markers that the base model drops may be beyond it."""
    shutil.rmtree("base")
    tiny.write_model(Path("base"), vocab_size=tiny.VOCAB_SIZE - 4, seed=1)
    run(tiny.get_config(), "1", "2")
    e = tiny.get_config()
    e.base.markers = "keep"
    with pytest.raises(ValueError, match=f"token ids up to {tiny.VOCAB_SIZE - 1}, the base model embeds"):
        run(e)
    run(tiny.get_config(), "3")
    assert loaded == ["base", "reasoning"]
    run(few_conditions(), "4", "5")  # the lens, which takes its items from the tokenizer
    items = {int(row["token"]) for row in csv_rows("base.lens_tokens.csv")}
    assert items and max(items) < tiny.VOCAB_SIZE - 4


@pytest.mark.slow
def test_rows_of_an_embedding_beyond_the_tokenizer_are_no_tokens(fresh: Path) -> None:
    """Padding: neither sampled nor an item of the lens, though each of these rows speaks for every token."""
    for role, seed in (("base", 1), ("reasoning", 2)):
        files = {file.name: file.read_bytes() for file in Path(role).glob("tokenizer*")}
        shutil.rmtree(role)
        tiny.write_model(Path(role), vocab_size=tiny.VOCAB_SIZE + 40, seed=seed)
        weights = load_file(Path(role, "model.safetensors"))
        weights["lm_head.weight"][tiny.VOCAB_SIZE :] = 100 * np.eye(16, dtype=np.float32)[np.arange(40) % 16]
        save_file(weights, Path(role, "model.safetensors"), {"format": "pt"})
        for name, content in files.items():
            Path(role, name).write_bytes(content)
    e = few_conditions()
    e.traces.path, e.annotations.judge = "", "keyword"
    e.traces.limit, e.traces.max_new_tokens = 2, 12
    run(e, "1")
    sampled = [trace.token_ids or () for trace in records.read_traces(fresh / "1-traces" / "traces.jsonl")]
    assert sampled and max(map(max, sampled)) < tiny.VOCAB_SIZE
    run(few_conditions(), "1", "2", "3", "4", "5")
    replies = lines_of(fresh / "4-steering" / "generations.jsonl")
    assert replies and all(max(reply["ids"]) < tiny.VOCAB_SIZE for reply in replies)
    items = {int(row["token"]) for role in ROLES for row in csv_rows(f"{role}.lens_tokens.csv")}
    assert items and max(items) < tiny.VOCAB_SIZE


def test_sections_of_one_label_make_no_difference(fresh: Path, loaded: list[str]) -> None:
    text = "First, wait. I add two and two, so it is four."
    labelled = f'["backtracking"]{text}["end-section"]'
    edit_chains(lambda chain: chain.update(reasoning_chain=text, annotated_chain=labelled))
    with pytest.raises(ValueError, match="every section is labelled 'backtracking'"):
        run(few_conditions())
    assert not loaded


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            [("backtracking", "First, wait. I add two."), ("backtracking", "Wait, no. Two and two is four.")],
            "every section of the traces with",
        ),
        (
            [("deduction", "First, I add two."), ("backtracking", "Wait, no. Two and two is four.")],
            r"windows \(-5, -2\) of 'backtracking' are the only ones that are read of their traces",
        ),
    ],
)
def test_a_contrast_within_traces_of_one_label_makes_no_difference(
    fresh: Path, loaded: list[str], sections: list[tuple[str, str]], message: str
) -> None:
    """Even if other traces have other sections; what a window does not read counts as absent."""

    def change(chain: dict[str, str]) -> None:
        plain = [("deduction", "First, I add two."), ("deduction", "Then two and two is four.")]
        own = sections if chain["task_id"] in tiny.TASKS[::2] else plain
        chain["reasoning_chain"] = " ".join(text for _, text in own)
        chain["annotated_chain"] = " ".join(f'["{label}"]{text}["end-section"]' for label, text in own)

    edit_chains(change)
    e = tiny.get_config()
    e.vectors.contrast = "trace"
    with pytest.raises(ValueError, match=message):
        run(e, "1", "2", "3")
    assert not loaded
    e.vectors.contrast = "all"
    run(e, "1", "2", "3")


def overflow(model: str) -> None:
    """Makes the logits of a model infinite, and nothing else of it."""
    file = Path(model) / "model.safetensors"
    weights = load_file(file)
    weights["lm_head.weight"][:] = np.finfo(np.float32).max
    store.write_safetensors(file, weights, {"format": "pt"})


def test_a_sampled_row_without_finite_logits_is_named(fresh: Path) -> None:
    Path("problems.json").write_text(json.dumps([{"id": "p0", "category": "verbal", "problem": "Add two."}]))
    overflow("reasoning")
    e = tiny.get_config()
    e.annotations.judge, e.traces.path, e.traces.problems = "keyword", "", "problems.json"
    with pytest.raises(FloatingPointError, match="problem 'p0', sample 0: logits are not finite"):
        run(e, "1")


def test_a_steered_row_without_finite_logits_is_named(finished: Path) -> None:
    overflow("base")
    e = tiny.get_config()
    e.roles, e.steering.kinds, e.steering.magnitudes, e.steering.limit = ("base",), ("backtracking",), (-4.0,), 1
    e.steering.baselines = e.steering.offsets = e.steering.layers = ()
    condition = re.escape("backtracking of the base model (window -5..-2) at layer 1 of the base model, magnitude -4")
    with pytest.raises(FloatingPointError, match=f"problem 'verbal_0', sample 0, {condition}: logits"):
        run(e)


def test_a_vector_of_the_wrong_width_or_depth(finished: Path, loaded: list[str]) -> None:
    e = tiny.get_config()
    e.steering.layer = (0,)
    file = finished / "3-vectors" / "base.backtracking.safetensors"
    stage = store.StageFolder(finished, "3-vectors", pipeline.Run(e).inputs["3-vectors"])
    for shape in ((3, 15), (4, 16)):
        rows = {f"direction.{layer}": np.ones(shape[1], np.float32) for layer in range(shape[0])}
        metadata = {"layer_convention": "block_output_0based", "n_layers": str(shape[0]), "provenance": "{}"}
        store.write_safetensors(file, rows, metadata)
        stage.finish()
        message = rf"backtracking vector of the base model has directions of shape \({shape[0]}, {shape[1]}\) "
        with pytest.raises(ValueError, match=message + r".*takes \(3, 16\)"):
            run(e, "4")
    assert not loaded


def test_a_vector_that_is_not_there(finished: Path, loaded: list[str]) -> None:
    e = tiny.get_config()
    e.steering.kinds, e.steering.layers = ("initializing",), ()  # its windows were all dropped
    with pytest.raises(ValueError, match=r"no 'initializing' vector of the base model was read; available: \['adding-"):
        run(e, "4")
    assert not loaded


def test_a_vector_file_that_changes_while_a_run_waits_is_refused(finished: Path, loaded: list[str]) -> None:
    e = tiny.get_config()
    vector = vectors.load(finished / "3-vectors" / "base.backtracking.safetensors")
    vectors.save(vector, Path("mine.npz"))
    e.steering.baselines = ("mine.npz",)
    begun = pipeline.Run(e)
    vectors.save(-vector, Path("mine.npz"))
    with pytest.raises(ValueError, match=r"mine\.npz has changed since this run began"):
        begun.run()
    assert not loaded


@pytest.mark.parametrize(
    ("directions", "message"),
    [
        (None, r"mine\.npz: no such file"),
        (np.ones((3, 15), np.float32), r"mine\.npz has directions of width 15; the base model takes 16"),
        (np.ones((4, 16), np.float32), r"mine\.npz: 4 layers, expected 3"),
        (
            np.eye(3, 16, dtype=np.float32) * [[1], [0], [1]],
            r"mine\.npz: the vector is zero at layer 1.*steering\.layer",
        ),
        (np.full((3, 16), np.nan, np.float32), r"mine\.npz: the vector has no finite direction at layer 1"),
    ],
)
def test_a_vector_file_that_does_not_fit_stops_the_plan(
    fresh: Path, directions: np.ndarray | None, message: str
) -> None:
    e = tiny.get_config()
    e.steering.baselines = ("mine.npz",)
    if directions is not None:
        vectors.save(vectors.SteeringVector(directions), Path("mine.npz"))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        pipeline.Run(e)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: set_at(e.steering, "kinds", ("example-testing",)), "no section is labelled 'example-testing'"),
        (lambda e: set_at(e.steering, "kinds", ("initializing",)), r"no window \(-5, -2\) of 'initializing'"),
        (lambda e: set_at(e.vectors, "window", (-300, -290)), r"no window \(-300, -290\) of"),
        (lambda e: set_at(e.vectors, "offset_window", (-300, -290)), r"no window \(-301, -291\) of"),
    ],
)
def test_windows_that_nobody_can_read_stop_before_a_model_is_loaded(
    fresh: Path, loaded: list[str], change: Callable[[Experiment], None], message: str
) -> None:
    e = tiny.get_config()
    change(e)
    with pytest.raises(ValueError, match=message):
        run(e)
    assert not loaded


@pytest.mark.parametrize(
    ("chain", "message"),
    [
        ({"reasoning_chain": ""}, "entry 1.*'reasoning_chain' is empty"),
        ({"reasoning_chain": None}, "entry 1.*'reasoning_chain' must be a string"),
        ({"problem": f"{tiny.BOS}Add."}, "trace 'verbal_1/0': the problem holds the BOS text"),
        ({"reasoning_chain": f"{tiny.BOS}Wait."}, "trace 'verbal_1/0': the reply holds the BOS text"),
    ],
)
def test_a_chain_that_cannot_be_read(fresh: Path, loaded: list[str], chain: dict[str, Any], message: str) -> None:
    chains = tiny.chains()
    chains[1] |= chain
    Path(tiny.CHAINS).write_text(json.dumps(chains))
    with pytest.raises(ValueError, match=message):
        run(tiny.get_config())
    assert not loaded


def test_the_first_token_beyond_an_embedding_is_refused_unless_it_is_not_read() -> None:
    def check(embedded: int, *not_read: int) -> None:
        config: Any = types.SimpleNamespace(vocab_size=embedded)
        tokenizer: Any = types.SimpleNamespace(vocab_size=11, name="t")
        compatibility.check_vocabulary("base", config, tokenizer, not_read)

    check(11)
    check(10, 10)
    with pytest.raises(ValueError, match="the tokenizer t has token ids up to 10, the base model embeds 10"):
        check(10)
