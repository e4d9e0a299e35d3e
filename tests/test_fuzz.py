"""Every reader, given files that are nearly right: it works, or says in one line what is wrong.

The property: no other error than those a command ends with in one line, none of 5 seconds or more, and nothing written.
"""

import base64
import contextlib
import copy
import functools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from backtrack_jax import checks, vector_files
from backtrack_jax.config import Experiment
from backtrack_jax.data import records
from backtrack_jax.files import store, tables
from backtrack_jax.judges.openai.ledger import read_entries
from backtrack_jax.judges.openai.prompts import JudgePrompt
from backtrack_jax.models import checkpoint
from backtrack_jax.models.tokenizer import Tokenizer

FEW, MANY = 60, 3000
SECONDS = 5.0

ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 1, 3, 2**31, 2**63, 10**30, 1.5, -0.0, 1e308, 0.1]),
    st.sampled_from([float("nan"), float("inf"), "", "x", "llama", "0", "\0", "a/../b", "é" * 50, "x" * 5000]),
    st.sampled_from([[], {}, [[]], [None], {"a": 1}, {"content": None}, [1, 2], ["x"], [{}], [{"id": 0}]]),
)


def paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where every value of a JSON document stands; of long lists the first and the last."""
    yield at
    if isinstance(value, dict):
        names = list(value) if len(value) < 40 else [*list(value)[:3], list(value)[-1]]
        for name in names:
            yield from paths(value[name], (*at, name))
    elif isinstance(value, list):
        for i in sorted({*range(min(3, len(value))), len(value) - 1} - {-1}):
            yield from paths(value[i], (*at, i))


def changed(document: Any, at: tuple[Any, ...], value: Any, drop: bool) -> Any:
    """The document with another value in one place, or without it."""
    if not at:
        return value
    document = copy.deepcopy(document)
    holder = functools.reduce(lambda inner, name: inner[name], at[:-1], document)
    if drop:
        del holder[at[-1]]
    else:
        holder[at[-1]] = value
    return document


def documents(valid: Any) -> st.SearchStrategy[str]:
    """Texts of JSON that differ from a valid one in one or two places, in a key given twice, or in their end."""
    places = list(paths(valid))

    def change(edits: list[tuple[tuple[Any, ...], Any, bool]]) -> str:
        found = valid
        for at, value, drop in edits:
            with contextlib.suppress(KeyError, IndexError, TypeError):  # the first edit took the place away
                found = changed(found, at, value, drop)
        return json.dumps(found)

    edited = st.lists(st.tuples(st.sampled_from(places), ODD, st.booleans()), min_size=1, max_size=2).map(change)
    text = json.dumps(valid)
    cut = st.integers(0, len(text)).map(lambda n: text[:n])
    twice = st.sampled_from(list(valid) if isinstance(valid, dict) and valid else ["x"]).map(
        lambda name: text[:1] + json.dumps(name) + ": 0, " + text[1:]
    )
    return st.one_of(edited, edited, edited, cut, twice)


def damaged(data: bytes, front: int) -> st.SearchStrategy[bytes]:
    """Bytes that differ from valid ones in a few places, most of them in front, or that end early."""

    def change(edits: list[tuple[int, int]]) -> bytes:
        found = bytearray(data)
        for at, byte in edits:
            found[at % len(found)] = byte
        return bytes(found)

    place = st.one_of(st.integers(0, front - 1), st.integers(0, front - 1), st.integers(0, len(data) - 1))
    edited = st.lists(st.tuples(place, st.sampled_from([0, 1, 7, 0x22, 0x7B, 0x80, 0xFF])), min_size=1, max_size=4)
    return st.one_of(edited.map(change), st.integers(0, len(data)).map(lambda n: data[:n]))


def holds(read: Callable[[], object], folder: Path) -> None:
    """The property."""
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    began = time.monotonic()
    try:
        read()
    except (ValueError, OSError, FloatingPointError) as error:
        assert str(error).strip() and not isinstance(error, UnicodeError), repr(error)
    assert time.monotonic() - began < SECONDS
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def fuzz(strategy: st.SearchStrategy[Any], check: Callable[[Any], None], examples: int) -> None:
    """Runs a check on examples of a strategy; the same ones every time."""
    quiet = {"deadline": None, "database": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}
    phases = (Phase.generate, Phase.shrink)
    settings(max_examples=examples, phases=phases, **quiet)(given(strategy)(check))()


@pytest.fixture(params=[pytest.param(FEW, id="few"), pytest.param(MANY, id="many", marks=pytest.mark.slow)])
def examples(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(scope="module")
def model(tiny_run: Path) -> Path:
    return tiny_run / "reasoning"


def copied(model: Path, folder: Path) -> Path:
    target = folder / "model"
    target.mkdir()
    for path in model.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_files_of_a_model(name: str, model: Path, tmp_path: Path, examples: int) -> None:
    folder = copied(model, tmp_path)
    extra = {"generation_config.json": {"eos_token_id": [1, 2], "do_sample": True}}
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 8192
    valid = extra.get(name) or json.loads((folder / name).read_text())
    if name == "config.json":
        valid |= {"rope_scaling": rope, "eos_token_id": [1, 2]}
    if name == "tokenizer_config.json":
        valid |= {
            "added_tokens_decoder": {"300": {"content": "<x>", "special": True}},
            "chat_template": "{{ bos_token }}",
        }

    def check(text: str) -> None:
        (folder / name).write_text(text)
        read = checkpoint.read_config if name == "config.json" else Tokenizer.from_folder
        holds(lambda: read(folder), folder)

    fuzz(documents(valid), check, examples)


def test_weights(model: Path, tmp_path: Path, examples: int) -> None:
    folder = copied(model, tmp_path)
    data = (folder / "model.safetensors").read_bytes()

    def check(changed_data: bytes) -> None:
        (folder / "model.safetensors").write_bytes(changed_data)
        holds(lambda: checkpoint.check(folder), folder)

    fuzz(damaged(data, 400), check, examples)


def test_an_index_of_weights(model: Path, tmp_path: Path, examples: int) -> None:
    folder = copied(model, tmp_path)
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    header = json.loads((folder / "a.safetensors").read_bytes()[8:].split(b"}}")[0].decode() + "}}")
    valid = {"metadata": {}, "weight_map": {name: "a.safetensors" for name in header if name != "__metadata__"}}

    def check(text: str) -> None:
        (folder / "model.safetensors.index.json").write_text(text)
        holds(lambda: checkpoint.check(folder), folder)

    fuzz(documents(valid), check, examples)


def test_gguf(tmp_path: Path, examples: int) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in (
        ("context_length", 64),
        ("embedding_length", 16),
        ("block_count", 1),
        ("feed_forward_length", 24),
    ):
        writer.add_uint32(f"llama.{name}", value)
    writer.add_uint32("llama.attention.head_count", 2)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["a", "b", "ab", "<e>"])
    writer.add_token_types([1, 1, 1, 3])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(3)
    writer.add_tensor("token_embd.weight", np.zeros((4, 16), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    data = path.read_bytes()

    def check(changed_data: bytes) -> None:
        path.write_bytes(changed_data)
        holds(lambda: checkpoint.read_config(path), tmp_path)
        holds(lambda: Tokenizer.from_gguf(path), tmp_path)

    fuzz(damaged(data, len(data) - 100), check, examples)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".gguf", ".pt"])
def test_vector_files(suffix: str, tmp_path: Path, examples: int) -> None:
    path = tmp_path / f"v{suffix}"
    if suffix == ".pt":
        torch = pytest.importorskip("torch")
        torch.save({"backtracking": torch.ones(3, 8)}, path)
    else:
        vector_files.write(path, np.ones((3, 8), np.float32), {"label": "backtracking"})
    data = path.read_bytes()

    def check(changed_data: bytes) -> None:
        path.write_bytes(changed_data)
        holds(lambda: vector_files.read(path, "backtracking", 1, 3), tmp_path)

    fuzz(damaged(data, min(len(data), 600)), check, examples)


TRACE = {"id": "p/0", "problem_id": "p", "category": "c", "problem": "Why?", "text": "So. Wait.", "sample": 0}
TRACE |= {"token_ids": [1, 2], "finish_reason": "stop", "end_marks": ["</r>"]}
SECTION = {"label": "deduction", "start": 0, "stop": 3}
ANNOTATION: dict[str, Any] = {
    "trace_id": "p/0",
    "judge": "me",
    "sections": [SECTION, {**SECTION, "start": 4, "stop": 9}],
}
ANNOTATION |= {"rejected": [{"reason": "empty", "label": "x", "text": ""}], "notes": [{"code": "fuzzy", "section": 1}]}
CHAIN = {
    "task_id": "m_1",
    "problem": "Why?",
    "reasoning_chain": "So.",
    "annotated_chain": '["deduction"]So.["end-section"]',
}
PROBLEM = {"id": "p", "category": "c", "problem": "Why?", "answer": "3", "difficulty": 1}


@pytest.mark.parametrize(
    ("name", "valid", "read"),
    [
        ("traces.json", [TRACE], records.read_traces),
        ("annotations.json", [ANNOTATION], records.read_annotations),
        ("x_annotated_chains.json", [CHAIN], records.read_released),
        ("problems.json", [PROBLEM], records.read_problems),
        ("ledger.jsonl", {"key": "a", "answer": "b"}, read_entries),
    ],
)
def test_records(name: str, valid: Any, read: Callable[[Path], object], tmp_path: Path, examples: int) -> None:
    path = tmp_path / name

    def check(text: str) -> None:
        path.write_text(text + "\n" * name.endswith("jsonl"))
        holds(lambda: read(path), tmp_path)

    fuzz(documents(valid), check, examples)


@pytest.mark.parametrize("format_", ["sentences", "inline"])
def test_answers_of_a_judge(format_: str, examples: int) -> None:
    """Never an error at all, and never a section that is not in the trace."""
    trace = records.Trace("p/0", "p", "c", "Why?", "Okay, so.\n\nIt is 3. Wait, no. Then 4.")
    runs = json.dumps({"runs": [{"from": 1, "label": "initializing"}, {"from": 3, "label": "backtracking"}]})
    inline = '["initializing"]Okay, so.["end-section"]["deduction"]It is 3.["end-section"]["backtracking"]Wait, no.'
    valid = runs if format_ == "sentences" else inline

    def check(data: bytes) -> None:
        found = JudgePrompt(format_).read(trace, data.decode("utf-8", "replace"), "judge")
        records.pair_annotations([trace], [found])

    def check_text(text: str) -> None:
        check(text.encode())

    fuzz(damaged(valid.encode(), len(valid)), check, examples)
    fuzz(documents(json.loads(runs)), check_text, examples)


def test_a_folder_of_a_stage(tmp_path: Path, examples: int) -> None:
    """Whatever `DONE` and `inputs.json` hold: finished, or not, or one line."""
    made = store.StageFolder(tmp_path, "1-traces", {"a": {"b": 1}})
    tables.write(made.path / "t.csv", [{"a": 1, "b": "x"}])
    made.finish()
    originals = {name: (made.path / name).read_bytes() for name in ("DONE", "inputs.json", "t.csv")}

    def check(edit: tuple[str, bytes]) -> None:
        for name, data in originals.items():
            (made.path / name).write_bytes(data)
        (made.path / edit[0]).write_bytes(edit[1])

        def read() -> None:
            store.peek(tmp_path, "1-traces", {"a": {"b": 1}})
            store.read_inputs(made.path)
            tables.read(made.path / "t.csv")

        holds(read, tmp_path)

    whole = [st.tuples(st.just(name), damaged(data, len(data))) for name, data in originals.items()]
    fuzz(st.one_of(*whole), check, examples)


def test_configs(tmp_path: Path, examples: int) -> None:
    """A field of any spec with an odd value: faults that name it, or a config that can run."""
    e: Experiment = tiny.get_config()
    fields = [at for at in paths_of(e) if at]

    def check(edit: tuple[tuple[str, ...], Any]) -> None:
        changed_e = copy.deepcopy(e)
        *outer, name = edit[0]
        setattr(functools.reduce(getattr, outer, changed_e), name, edit[1])
        holds(lambda: checks.check(changed_e), tmp_path)

    odd = st.one_of(ODD, st.sampled_from([(), (1,), (None,), ("x",), (1, 2, 3), ("noise &",), (float("nan"),)]))
    fuzz(st.tuples(st.sampled_from(fields), odd), check, 4 * examples)


def paths_of(spec: Any, at: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Fields of a config, dotted."""
    if hasattr(spec, "__dataclass_fields__"):
        for name in spec.__dataclass_fields__:
            yield from paths_of(getattr(spec, name), (*at, name))
    else:
        yield at


def test_the_property_can_fail(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        holds(lambda: {}["a"], tmp_path)
    with pytest.raises(AssertionError):
        holds(lambda: (tmp_path / "left").write_text(base64.b64encode(b"x").decode()), tmp_path)
