"""The finetuning script on the tiny experiment's base model: its result is read like any other model."""

import importlib.util
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest
import tiny
from flax import nnx

from backtrack_jax.data.records import Trace, read_released, write_jsonl
from backtrack_jax.files import store
from backtrack_jax.models import checkpoint, prompts
from backtrack_jax.models.tokenizer import Tokenizer
from backtrack_jax.training import lora

pytestmark = pytest.mark.usefixtures("optax_promotes")

ROOT = Path(__file__).resolve().parents[1]
R1 = prompts.PromptFormat("r1")


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny.write(folder)
    traces, _ = read_released(folder / tiny.CHAINS)
    write_jsonl(folder / "traces.jsonl", traces)
    return folder


@pytest.mark.parametrize("rank", [0, 2], ids=["full", "lora"])
def test_finetuned_model_is_read_like_any_other(
    folder: Path, tmp_path: Path, rank: int, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [f"--model={folder / 'base'}", f"--traces={folder / 'traces.jsonl'}", f"--out={tmp_path}"]
    options = ["--steps=6", "--length=256", "--batch_size=2", "--rate=0.02", f"--lora_rank={rank}", "--save_every=3"]
    script("finetune").main([*command, *options])
    before = checkpoint.load(str(folder / "base"), "float32")
    after = checkpoint.load(str(tmp_path / "model"), "float32")
    pairs = list(zip(jax.tree.leaves(nnx.state(before)), jax.tree.leaves(nnx.state(after)), strict=True))
    assert any(not np.array_equal(a, b) for a, b in pairs)
    ours, theirs = Tokenizer.load(folder / "base"), Tokenizer.load(tmp_path / "model")
    problem = tiny.chains()[0]["problem"]
    for format_ in ("r1", "plain"):
        made = prompts.PromptFormat(format_)
        assert prompts.prompt_ids(ours, problem, made) == prompts.prompt_ids(theirs, problem, made)
    assert ours.stop_ids == theirs.stop_ids
    if rank:
        merged = lora.load(tmp_path / "adapter", "bfloat16")
        for a, b in zip(jax.tree.leaves(nnx.state(merged)), jax.tree.leaves(nnx.state(after)), strict=True):
            np.testing.assert_array_equal(np.asarray(a, np.float32), b)
    capsys.readouterr()
    script("finetune").main([*command, *options])  # done before: nothing is trained
    assert "finetuning" not in capsys.readouterr().err
    no_alpha = r"lora_alpha=None, not 16\.0; " if rank == 0 else ""
    with pytest.raises(
        SystemExit, match=rf"^error: .* holds a training with {no_alpha}lora_rank={rank}, not 5\. Name another folder"
    ):
        script("finetune").main([*command, *options, "--lora_rank=5"])
    lines = (folder / "traces.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "fewer.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(SystemExit, match=r"^error: .* holds a training with rows="):
        script("finetune").main([*command, *options, f"--traces={tmp_path / 'fewer.jsonl'}"])
    tiny.write_model(tmp_path / "base", vocab_size=tiny.VOCAB_SIZE, seed=9)  # other weights
    shutil.copy(folder / "base" / "tokenizer.json", tmp_path / "base")
    shutil.copy(folder / "base" / "tokenizer_config.json", tmp_path / "base")
    with pytest.raises(SystemExit, match=r"^error: .* holds a training with weights='"):
        script("finetune").main([*command, *options, f"--model={tmp_path / 'base'}"])
    shutil.copytree(folder / "base", tmp_path / "elsewhere")  # the same weights
    script("finetune").main([*command, *options, f"--model={tmp_path / 'elsewhere'}"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_lora_does_not_change_is_the_base_model_s(folder: Path, tmp_path: Path, dtype: str) -> None:
    """Also where products round more than what is saved."""
    command = [f"--model={folder / 'base'}", f"--traces={folder / 'traces.jsonl'}", f"--out={tmp_path}", "--steps=1"]
    script("finetune").main([*command, "--length=256", "--lora_rank=2", "--save_dtype=float32", f"--dtype={dtype}"])
    before, after = (checkpoint.load(str(path)) for path in (folder / "base", tmp_path / "model"))
    np.testing.assert_array_equal(before.embed_tokens.weight[...], after.embed_tokens.weight[...])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--steps=0", "error: steps=0, expected an integer of at least 1"),
        ("--steps=-5", "error: steps=-5, expected an integer of at least 1"),
        ("--batch_size=0", "error: batch_size=0, expected an integer of at least 1"),
        ("--save_every=0", "error: save_every=0, expected an integer of at least 1"),
        ("--lora_rank=-1", "error: lora_rank=-1, expected an integer of at least 0"),
        ("--rate=0", "error: rate=0.0, expected a finite number above 0"),
        ("--rate=nan", "error: rate=nan, expected a finite number above 0"),
        ("--weight_decay=inf", "error: weight_decay=inf, expected a finite number of at least 0"),
        ("--seed=99999999999999999999", "error: seed=99999999999999999999, expected an integer below 2**31"),
        ("--length=1", "error: length=1, expected an integer of at least 2"),
        ("--length=2", "error: length=2 leaves nothing to learn of the 12 traces of {folder}/traces.jsonl, expected"),
        ("--model=/nope", "error: there is no folder or file /nope"),
        ("--traces=/nope", "error: /nope: no such file"),
        ("--traces=/nope.jsonl", "error: /nope.jsonl: no such file"),
        ("--dtype=float16", "argument --dtype: invalid choice: 'float16' (choose from"),
        ("--format=llama", "argument --format: invalid choice: 'llama' (choose from"),
        ("--think=no", "argument --think: invalid choice: 'no' (choose from"),
    ],
)
def test_nonsense_is_refused_before_anything_is_written(
    folder: Path, tmp_path: Path, option: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [f"--model={folder / 'base'}", f"--traces={folder / 'traces.jsonl'}", f"--out={tmp_path / 'out'}"]
    with pytest.raises(SystemExit) as stopped:
        script("finetune").main([*command, option])
    said = capsys.readouterr().err if stopped.value.code == 2 else str(stopped.value.code)  # 2: said by argparse
    assert message.format(folder=folder) in said
    assert not (tmp_path / "out").exists()


def test_weights_beyond_what_is_saved_are_refused(folder: Path, tmp_path: Path) -> None:
    command = [f"--model={folder / 'base'}", f"--traces={folder / 'traces.jsonl'}", f"--out={tmp_path}", "--steps=2"]
    with pytest.raises(SystemExit, match="error: trained weights are not finite in float16; try another --save_dtype"):
        script("finetune").main([*command, "--length=128", "--rate=1e5", "--save_dtype=float16"])
    assert not (tmp_path / "model").exists()
    saved = (tmp_path / "checkpoints" / "2").stat().st_mtime_ns
    script("finetune").main([*command, "--length=128", "--rate=1e5", "--save_dtype=float32"])  # of the same training
    assert checkpoint.load(str(tmp_path / "model")).dtype == np.float32
    assert (tmp_path / "checkpoints" / "2").stat().st_mtime_ns == saved
    with pytest.raises(SystemExit, match=r"error: .*model is in float32, not bfloat16; remove it"):
        script("finetune").main([*command, "--length=128", "--rate=1e5", "--save_dtype=bfloat16"])


def test_traces_without_a_reply_in_reach_are_left_out(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows that hold only what is read, and nothing to learn, would take steps without a word."""
    short = Trace("a/0", "a", "counting", "Count.", "One, two, three.")
    long = Trace("b/0", "b", "counting", "Count. " * 60, "One, two, three.")
    write_jsonl(tmp_path / "traces.jsonl", [short, long])
    command = [f"--model={folder / 'base'}", f"--traces={tmp_path / 'traces.jsonl'}", f"--out={tmp_path / 'out'}"]
    script("finetune").main([*command, "--length=64", "--steps=1", "--batch_size=1"])
    said = capsys.readouterr().err
    assert "1 of 2 traces have no reply within length=64\n1 traces, " in said
    assert ", 64 places, " in said


def test_settings_of_no_consequence_make_no_other_training(folder: Path, tmp_path: Path) -> None:
    command = [f"--model={folder / 'base'}", f"--traces={folder / 'traces.jsonl'}", "--length=128", "--steps=1"]
    whole, adapters = (f"--out={tmp_path / name}" for name in ("whole", "adapters"))
    script("finetune").main([*command, whole, "--format=plain"])
    script("finetune").main([*command, whole, "--format=plain", "--think=none", "--lora_alpha=3"])
    script("finetune").main([*command, adapters, "--lora_rank=2"])
    with pytest.raises(SystemExit, match=r"holds a training with lora_alpha=16\.0, not 3\.0\. Name another"):
        script("finetune").main([*command, adapters, "--lora_rank=2", "--lora_alpha=3"])
    with pytest.raises(SystemExit, match=r"holds a training with rows=.*; think='primed', not 'none'\. Name another"):
        script("finetune").main([*command, adapters, "--lora_rank=2", "--think=none"])


def test_two_trainings_do_not_share_a_folder(folder: Path, tmp_path: Path) -> None:
    command = [f"--model={folder / 'base'}", f"--traces={folder / 'traces.jsonl'}", f"--out={tmp_path}", "--steps=1"]
    with store.locked(tmp_path), pytest.raises(SystemExit, match=r"error: .* is in use by another run"):
        script("finetune").main([*command, "--length=128"])
    assert not (tmp_path / "checkpoints").exists()


def test_the_end_of_memory_names_the_way_out(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a fault of the program itself keeps its traceback."""

    def failing(*args: object) -> None:
        raise jax.errors.JaxRuntimeError(messages.pop(0))

    finetune = script("finetune")
    messages = ["RESOURCE_EXHAUSTED: Out of memory allocating 17 bytes.\nmore", "INTERNAL: a fault"]
    monkeypatch.setattr(finetune, "finetune", failing)
    arguments = [f"--model={folder / 'base'}", f"--traces={folder / tiny.CHAINS}", f"--out={tmp_path / 'out'}"]
    with pytest.raises(SystemExit, match=r"error: the device is out of memory; lower --batch_size .* 17 bytes\.\)$"):
        finetune.main(arguments)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        finetune.main(arguments)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--base_steps=-1", "base_steps=-1, expected an integer of at least 1"),
        ("--reasoning_adam_rate=0", "reasoning_adam_rate=0.0, expected a finite number above 0"),
        ("--seed=-1", "seed=-1, expected an integer of at least 0"),
    ],
)
def test_training_of_the_pair_refuses_nonsense_too(tmp_path: Path, option: str, message: str) -> None:
    with pytest.raises(SystemExit, match=f"^error: {message}$"):
        script("train_organism").main([f"--out={tmp_path / 'out'}", option])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "default"), [("finetune", "0.0002"), ("train_organism", "480")])
def test_help_shows_defaults(name: str, default: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script(name).main(["--help"])
    shown = capsys.readouterr().out
    words = " ".join(shown.split())
    assert f"(default: {default})" in words and "default: None" not in words
    assert f"\n    python scripts/{name}.py " in shown  # the description's lines are as they were written


def test_replies_are_learned_and_prompts_only_read(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder / "base")
    trace = read_released(folder / tiny.CHAINS)[0][1]
    tokens = script("finetune").tokens_of(tokenizer, trace, R1, 4096)
    assert list(tokens.ids[: tokens.start]) == prompts.prompt_ids(tokenizer, trace.problem, R1)
    assert tokenizer.decode(tokens.ids[tokens.start :]) == trace.text
    assert script("finetune").tokens_of(tokenizer, trace, R1, 5).ids == tokens.ids[:5]


def reply_of(tokenizer: Tokenizer, text: str, token_ids: Sequence[int] | None, reason: str | None) -> list[int]:
    """What is learned of a reply to "Add."."""
    ids = None if token_ids is None else tuple(token_ids)
    trace = Trace("p/0", "p", "verbal", "Add.", text, token_ids=ids, finish_reason=reason)
    tokens = script("finetune").tokens_of(tokenizer, trace, R1, 4096)
    return list(tokens.ids[tokens.start :])


def test_a_reply_ends_in_the_model_s_own_end_of_sequence(folder: Path, tmp_path: Path) -> None:
    """Of several stop ids not the lowest: Llama-3.1-Instruct ends turns with 128009, and 128001 stops it too."""
    shutil.copytree(folder / "base", tmp_path / "base")
    stops = {"eos_token_id": [tiny.word_id(","), Tokenizer.load(folder / "base").stop_ids[0]]}
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(stops))
    tokenizer = Tokenizer.load(tmp_path / "base")
    assert tokenizer.eos_id == stops["eos_token_id"][1] != tokenizer.stop_ids[0]
    assert reply_of(tokenizer, " no", None, "stop") == [*tokenizer.encode(" no"), tokenizer.eos_id]


def test_a_tokenizer_beyond_the_embedding_is_refused(folder: Path, tmp_path: Path) -> None:
    tiny.write_model(tmp_path / "small", vocab_size=tiny.VOCAB_SIZE - 1, seed=9)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / "base" / name, tmp_path / "small")
    command = [f"--model={tmp_path / 'small'}", f"--traces={folder / 'traces.jsonl'}", f"--out={tmp_path / 'out'}"]
    with pytest.raises(SystemExit, match=r"^error: the tokenizer .* has token ids up to \d+, the finetuned model"):
        script("finetune").main(command)
    assert not (tmp_path / "out").exists()


def test_ids_are_learned_only_where_they_spell_the_reply(folder: Path) -> None:
    """Stage 1 keeps the ids of whatever model it sampled; in another vocabulary they are other words."""
    tokenizer = Tokenizer.load(folder / "base")
    (stop,) = tokenizer.stop_ids
    text = " wait, no."
    own = [*tokenizer.encode(" wa"), *tokenizer.encode("it, no.")]
    assert own != tokenizer.encode(text)
    assert reply_of(tokenizer, text, [*own, stop], "stop") == [*own, stop]
    assert reply_of(tokenizer, text, own, "length") == own
    pair = Tokenizer.load(ROOT / "backtrack_jax" / "organism" / "reasoning")
    others = [*pair.encode("Wait"), *pair.stop_ids]
    assert reply_of(tokenizer, "Wait", others, "stop") == [*tokenizer.encode("Wait"), stop]
    assert reply_of(tokenizer, "", [tokenizer.vocab_size + 7], "stop") == [stop]


@pytest.mark.parametrize("known", [True, False])
def test_nothing_is_learned_behind_the_end_of_sequence(folder: Path, known: bool) -> None:
    """T8: a literal end ends the reply, whoever's it is; the answer behind `</think>` belongs to it."""
    tokenizer = Tokenizer.load(folder / "base")
    (stop,) = tokenizer.stop_ids
    reply = " no.\n</think>\n\nTwo."
    for end in (tiny.EOS, "<|eot_id|>"):
        text = f"{reply}{end} So is two."
        learned = reply_of(tokenizer, text, tokenizer.encode(text) if known else None, None)
        assert learned == [*tokenizer.encode(reply), stop]


def test_a_reply_that_opens_its_own_thinking_is_not_primed_twice(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder / "base")
    trace = read_released(folder / tiny.CHAINS)[0][0]
    assert trace.text.startswith("<think>\n")
    tokens = script("finetune").tokens_of(tokenizer, trace, R1, 4096)
    assert list(tokens.ids).count(prompts.r1_markers(tokenizer).think) == 1
    assert tokenizer.decode(tokens.ids[tokens.start :]) == trace.text


def test_a_trace_that_cannot_be_encoded_is_named(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder / "base")
    with pytest.raises(ValueError, match="trace 'p/0': the reply holds the BOS text"):
        reply_of(tokenizer, f"{tiny.BOS} wait", None, None)


def test_adapter_folder_is_in_the_layout_of_peft(folder: Path, tmp_path: Path) -> None:
    model = checkpoint.load(str(folder / "base"), "float32")
    settings = lora.Lora(rank=2)
    lora.save(lora.init(model, settings, jax.random.key(0)), settings, tmp_path, "base")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
