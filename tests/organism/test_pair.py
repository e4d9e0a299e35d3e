"""The pairs that ship with the program: other programs read them, and they behave as their cards say."""

import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import relative_error

from backtrack_jax.data.records import Trace
from backtrack_jax.intervention import no_intervention
from backtrack_jax.models import checkpoint, prompts
from backtrack_jax.models.batching import right_pad
from backtrack_jax.organism import corpus, grammar, measure, vocabulary
from backtrack_jax.organism.belief import log_odds
from backtrack_jax.organism.measure import Pair

ROLES = ("base", "reasoning")


PAIRS = {"llama": "package:backtrack_jax/organism", "qwen3": "package:backtrack_jax/organism/qwen3"}


@pytest.fixture(scope="module", params=["llama", pytest.param("qwen3", marks=pytest.mark.slow)])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(family: str) -> Path:
    return checkpoint.resolve(PAIRS[family])


@pytest.fixture(scope="module")
def pair(folder: Path) -> Pair:
    return Pair(folder)


def test_pair_is_small_and_complete(folder: Path, family: str) -> None:
    files = [file for role in ROLES for file in (folder / role).iterdir()]
    assert sum(file.stat().st_size for file in files) <= 8_000_000
    for role in ROLES:
        assert checkpoint.read_config(folder / role).family == family
        names = {file.name for file in files if file.parent.name == role}
        configs = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
        assert names == {*configs, "model.safetensors", "README.md"}


@pytest.mark.parametrize("role", ROLES)
def test_tokenizer_is_that_of_the_grammar(folder: Path, family: str, tmp_path: Path, role: str) -> None:
    vocabulary.write(tmp_path, vocabulary.DIALECTS[family])
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (folder / role / name).read_bytes() == (tmp_path / name).read_bytes()


@pytest.mark.hf
@pytest.mark.parametrize("role", ROLES)
def test_torch_computes_the_same(folder: Path, pair: Pair, role: str) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers to compare with")
    import torch

    document = next(d for d in corpus.documents(grammar.REASONING, 5) if d.problem)
    assert document.problem
    trace = Trace("a/0", "a", "", document.problem.problem, document.reply)
    ids = prompts.encode_trace(pair.tokenizer, trace.problem, trace.text, pair.prompt).ids
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / role, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor([ids]), output_hidden_states=True)
    model = pair.models[role]
    run = jax.jit(lambda ids, at: model(ids, at, capture=lambda out: out.resid_post))
    out = run(jnp.asarray([ids]), jnp.arange(len(ids))[None])
    for layer in range(model.config.n_layers - 1):  # theirs of the last is behind the final norm
        assert relative_error(out.captured[layer], expected.hidden_states[layer + 1]) < 1e-4
    assert relative_error(model.logits(out.resid), expected.logits) < 1e-4


@pytest.mark.hf
def test_transformers_stop_where_a_reply_ends(folder: Path, pair: Pair) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers to compare with")
    import torch

    ids = prompts.prompt_ids(pair.tokenizer, corpus.problems(1, 7)[0].problem, pair.prompt)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "reasoning", dtype=torch.float32)
    reply = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=300)[0, len(ids) :].tolist()
    assert len(reply) < 300 and [i for i in reply if i in pair.tokenizer.stop_ids] == [reply[-1]]


def test_only_the_reasoning_model_backtracks_and_both_write_sentences(pair: Pair) -> None:
    problems = corpus.problems(96, seed=31)
    nothing = {"unsteered": no_intervention(*pair.shape)}
    base = pair.cells("base", problems, nothing, seed=0)["unsteered"]
    reasoning = pair.cells("reasoning", problems, nothing, seed=0)["unsteered"]
    assert base.rate < 0.0005
    assert 0.002 < reasoning.rate < 0.01
    assert base.fitting > 0.97 and reasoning.fitting > 0.97


@pytest.mark.parametrize(("role", "process"), [("base", grammar.BASE), ("reasoning", grammar.REASONING)])
def test_belief_can_be_read_off_the_residual_stream(pair: Pair, role: str, process: grammar.Process) -> None:
    """A linear probe of the exact log-odds, fitted on some problems and tried on others."""
    documents = [d for d in itertools.islice(corpus.documents(grammar.BASE, 8), 96) if d.problem]
    states, odds = [], []
    model = pair.models[role]
    run = jax.jit(lambda ids, at: model(ids, at, capture=lambda out: out.resid_post).captured[5])
    for document in documents:
        assert document.problem
        prompt = prompts.prompt_ids(pair.tokenizer, document.problem.problem, pair.prompt)
        text = document.reply.partition("\n")[0]
        ids, at = right_pad([[*prompt, *pair.tokenizer.encode(text)]], 256)
        odds.append(log_odds(grammar.split_tokens(text), process))
        states.append(np.asarray(run(jnp.asarray(ids), jnp.asarray(at)))[0, len(prompt) : len(prompt) + len(odds[-1])])
    half = len(documents) // 2
    x, y = (np.concatenate(part[:half]) for part in (states, odds))
    x_test, y_test = (np.concatenate(part[half:]) for part in (states, odds))
    assert measure.r_squared(x, y, x_test, y_test) > 0.4
    assert measure.r_squared(x, np.random.default_rng(0).permutation(y), x_test, y_test) < 0.05
