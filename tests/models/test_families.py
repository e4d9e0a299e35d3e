"""Every family against Hugging Face's torch code, on tiny random models: states, logits, steered texts, files, fields.

What a field of `config.json` changes there it changes here, or the file is refused.
"""

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import relative_error
from jax.sharding import PartitionSpec

from backtrack_jax.generate import Sampling, compiled_generate, row_key
from backtrack_jax.intervention import add_vector, stack_rows
from backtrack_jax.models import checkpoint, families
from backtrack_jax.models.batching import left_pad
from backtrack_jax.models.config import LayerKind, YarnRopeScaling
from backtrack_jax.models.decoder import Decoder
from backtrack_jax.models.sharding import make_mesh, shardings
from backtrack_jax.training import lora

pytest.importorskip("torch", reason="needs torch and transformers to compare with")

import transformers
from torch_families import OLMO_ROPE, PLAIN, SIZES, YARN, hf_class, hf_model, in_torch
from torch_reference import added, torch_logits, torch_residuals

pytestmark = pytest.mark.hf

TOLERANCE = 1e-5
T = 12
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
YARN_OTHERWISE = YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.3}
# Every family with every kind of what it can have.
CASES: dict[str, dict[str, Any]] = {
    "llama linear": {"rope_parameters": LINEAR},
    "llama yarn": {"rope_parameters": YARN},
    "qwen2": {"rope_parameters": PLAIN | {"rope_theta": 1e6}},
    "qwen2 tied yarn": {"rope_parameters": YARN, "tie_word_embeddings": True, "num_key_value_heads": 1},
    "qwen2 unused window": {"sliding_window": 4, "max_window_layers": 1, "use_sliding_window": False},
    "qwen3": {"rope_parameters": PLAIN | {"rope_theta": 1e6}},
    "qwen3 tied": {"tie_word_embeddings": True, "num_key_value_heads": 4, "head_dim": 8},
    "qwen3 yarn": {"rope_parameters": YARN_OTHERWISE, "rms_norm_eps": 1e-3},
    "mistral": {"sliding_window": None, "rope_parameters": PLAIN | {"rope_theta": 1e6}},
    "mistral window": {"sliding_window": 5, "head_dim": 24},
    "smollm3": {"tie_word_embeddings": True, "rope_parameters": PLAIN | {"rope_theta": 5e6}},
    "smollm3 otherwise": {"no_rope_layers": [0, 1, 1, 0], "rope_parameters": YARN},
    "olmo3": {"rope_parameters": OLMO_ROPE, "sliding_window": 5},
    "olmo3 otherwise": {
        "layer_types": ["full_attention", "sliding_attention"] * 2,
        "sliding_window": 3,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-3,
    },
}
ONE_EACH = ("llama yarn", "qwen2", "qwen3", "mistral window", "smollm3", "olmo3")
IDS = np.random.default_rng(0).integers(0, 131, (2, T))


@functools.cache
def pair(case: str) -> tuple[Any, Decoder]:
    """The same model in torch and, loaded from the folder that torch's wrote, here."""
    reference = hf_model(case.split()[0], **CASES[case])
    with tempfile.TemporaryDirectory() as folder:
        reference.save_pretrained(folder)
        return reference, checkpoint.load(folder)


@functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
def run(model: Decoder, ids: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Every state and the logits."""
    out = model(ids, positions, capture=lambda block: block.resid_post)
    return out.captured, model.logits(out.resid)


@pytest.mark.parametrize("offset", [0, 8185])
@pytest.mark.parametrize("case", CASES)
def test_every_state_and_logit_equals_hugging_face(case: str, offset: int) -> None:
    reference, model = pair(case)
    positions = np.broadcast_to(np.arange(T) + offset, IDS.shape)
    states, logits = in_torch(reference, IDS, positions)
    our_states, our_logits = run(model, IDS, positions)
    errors = [relative_error(*both) for both in zip(our_states, states, strict=True)]
    assert max(errors) < TOLERANCE
    assert relative_error(our_logits, logits) < TOLERANCE
    np.testing.assert_array_equal(our_logits.argmax(-1), logits.argmax(-1))
    assert len(np.unique(logits.argmax(-1))) > 5  # not a degenerate model
    assert model.config.n_parameters == sum(p.numel() for p in reference.parameters())
    assert model.config.context == 16384


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_is_read_by_hugging_face(case: str, tmp_path: Path) -> None:
    reference, model = pair(case)
    checkpoint.save_hf(model, tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", attn_implementation="eager")
    assert type(again) is type(reference)
    positions = np.broadcast_to(np.arange(T), IDS.shape)
    assert relative_error(in_torch(again, IDS, positions)[1], in_torch(reference, IDS, positions)[1]) < 1e-6
    assert checkpoint.read_config(tmp_path / "again") == model.config


@pytest.mark.parametrize("case", ONE_EACH)
def test_greedy_steered_texts_equal_torch_with_a_hook(case: str) -> None:
    """Ragged prompts, left-padded, at three magnitudes; longer than any window."""
    reference, model = pair(case)
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 131, n).tolist() for n in (3, 9, 6)] * 3
    vector = rng.normal(size=40).astype(np.float32) * 0.7
    magnitudes = (0.0, 3.0, -8.0)
    rows = [add_vector(jnp.asarray(vector), 1, m, n_layers=4) for m in magnitudes for _ in range(3)]
    ids, positions = left_pad(prompts, 10)
    keys = jnp.stack([row_key(0, "", i) for i in range(9)])
    out = compiled_generate(
        model,
        ids,
        positions,
        keys,
        stack_rows(rows),
        Sampling(temperature=0.0),
        np.zeros(0, np.int32),
        max_new_tokens=8,
    )
    texts = set()
    for row, (prompt, magnitude) in enumerate(zip(prompts, np.repeat(magnitudes, 3), strict=True)):
        text = list(prompt)
        with added(reference, 1, float(magnitude) * vector):
            for _ in range(8):
                text.append(int(torch_logits(reference, text)[-1].argmax()))
        assert out.ids[row].tolist() == text[len(prompt) :], f"row {row}"
        texts.add(tuple(text[len(prompt) :]))
    assert len(texts) > 6, "texts vary between prompts and magnitudes"


def test_blocks_that_differ_run_one_by_one_as_under_a_scan() -> None:
    """A loop over tokens takes the blocks out of their stack; kinds of blocks go with them."""
    reference, model = pair("olmo3")
    text = IDS[0].tolist()
    ids, positions = jnp.asarray([text]), jnp.arange(T)[None]
    expected = torch_residuals(reference, text)[-1]
    for unstacked in (False, True):
        cache = jax.jit(lambda m: m(ids[:, :4], positions[:, :4]).cache.extended(8))(model)
        decoder, states = model, []
        if unstacked:
            decoder, cache = model.unstacked(), cache.unstacked()
        step = jax.jit(lambda m, i, p, c: m(i, p, cache=c))
        for at in range(4, T):
            out = step(decoder, ids[:, at : at + 1], positions[:, at : at + 1], cache)
            cache = out.cache
            states.append(out.resid[0, 0])
        assert relative_error(np.stack(states), expected[4:]) < TOLERANCE


def outcome(name: str, fields: dict[str, Any], folder: Path, reference: Any) -> str:
    """What becomes of a `config.json`: refused, honoured, or not understood.

    Both read the file, with the same weights, whose shapes are those of `reference`.
    """
    (folder / "config.json").write_text(json.dumps(fields))
    try:
        model = checkpoint.load(folder)
    except ValueError:
        return "refused"
    other = hf_class(name).from_pretrained(folder, attn_implementation="eager")
    # Far positions, since some fields act there only.
    positions = np.broadcast_to(np.arange(T) + 300, IDS.shape)
    theirs, ours = in_torch(other, IDS, positions)[1], run(model, IDS, positions)[1]
    if relative_error(ours, theirs) > TOLERANCE:
        return "read otherwise than by transformers"
    return "honoured" if relative_error(theirs, in_torch(reference, IDS, positions)[1]) > 1e-4 else "without effect"


# Another value for every field that any of the families has, and whether it is one that matters.
OTHERS: dict[str, Any] = {
    "architectures": ["SomeOtherModel"],
    "attention_bias": True,
    "attention_dropout": 0.3,
    "head_dim": 8,
    "hidden_act": "gelu",
    "intermediate_size": 48,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "max_window_layers": 2,
    "mlp_bias": True,
    "no_rope_layer_interval": 2,
    "no_rope_layers": [1, 0, 1, 0],
    "num_attention_heads": 8,
    "num_hidden_layers": 3,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-2,
    "sliding_window": 3,
    "tie_word_embeddings": True,
    "use_sliding_window": True,
    "vocab_size": 99,
    "query_pre_attn_scalar": 3,
    "partial_rotary_factor": 0.5,
    "attn_logit_softcapping": 30.0,
    "logits_scaling": 3.0,
}


@pytest.mark.parametrize("case", ONE_EACH)
def test_every_field_that_matters_is_honoured_or_refused(case: str, tmp_path: Path) -> None:
    reference, _ = pair(case)
    name = case.split()[0]
    reference.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    changes = [{field: other} for field, other in OTHERS.items()]
    for key in (
        "rope_theta",
        "factor",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "attn_factor",
        "mscale",
        "truncate",
    ):
        rope = fields["rope_parameters"]
        value = {"rope_theta": 333.0, "truncate": False, "beta_fast": 8.0, "beta_slow": 3.0}.get(key, 1.7)
        nested = {k: v | {key: value} for k, v in rope.items()} if "full_attention" in rope else rope | {key: value}
        changes.append({"rope_parameters": nested})
        if "full_attention" in rope:
            changes.append({"rope_parameters": rope | {"full_attention": nested["full_attention"]}})
    changes += [{"rope_parameters": rope} for rope in (LINEAR, YARN, {"rope_type": "dynamic", "factor": 2.0})]
    found = {}
    for change in changes:
        (tmp_path / "config.json").unlink()
        found[json.dumps(change)] = outcome(name, fields | change, tmp_path, reference)
    assert {change: what for change, what in found.items() if "otherwise" in what} == {}
    assert found['{"rms_norm_eps": 0.01}'] == "honoured"
    assert list(found.values()).count("honoured") >= 2
    assert found['{"attention_bias": true}'] == found['{"hidden_act": "gelu"}'] == "refused"


@pytest.mark.parametrize("field", ["head_dim", "num_key_value_heads", "tie_word_embeddings", "layer_types", "rope"])
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "mistral", "smollm3", "olmo3"])
def test_a_field_that_is_left_out_has_hugging_faces_default(name: str, field: str, tmp_path: Path) -> None:
    """Read by both from the same file; defaults of one size fit no other, and are refused or the same."""
    config = hf_class(name).config_class(**SIZES)
    config.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    for left_out in (field, "no_rope_layers") if field != "rope" else ("rope_parameters", "rope_scaling", "rope_theta"):
        fields.pop(left_out, None)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    theirs = hf_class(name).config_class.from_pretrained(tmp_path)
    try:
        ours = families.from_hf(fields)
    except ValueError:
        assert theirs.num_attention_heads % theirs.num_key_value_heads, "refused although it fits"
        return
    assert ours.n_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == getattr(theirs, "head_dim", None) or ours.head_dim == 40 // 4
    assert ours.tied == theirs.tie_word_embeddings
    rope = theirs.rope_parameters
    assert ours.rope_theta == rope.get("full_attention", rope)["rope_theta"]


def test_yarns_factor_that_engines_read_differently_is_refused_unless_it_is_said() -> None:
    """DeepSeek-R1-0528-Qwen3-8B."""
    fields = families.to_hf(pair("qwen3")[1].config)
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "attn_factor": 0.87825}
    with pytest.raises(ValueError, match=r"attn_factor=0\.87825, which engines read differently.*attention_factor"):
        families.from_hf(fields | {"rope_scaling": scaling})
    config = families.from_hf(fields | {"rope_scaling": scaling | {"attention_factor": 1.0}})
    assert config.rope_scaling == YarnRopeScaling(factor=4.0, original_context=32768, attention_factor=1.0)


def test_olmos_blocks() -> None:
    config = pair("olmo3")[1].config
    assert config.kinds == (LayerKind(scaled=False, window=5), LayerKind())
    assert config.kind_of_layer == (0, 0, 0, 1)


@pytest.mark.parametrize("name", [name for name, family in families.FAMILIES.items() if family.released])
def test_released_sizes_can_be_written_and_read(name: str) -> None:
    for config in families.FAMILIES[name].released.values():
        assert families.from_hf(families.to_hf(config)) == config
        hf_class(name).config_class(**families.to_hf(config))


def test_sizes_of_released_models() -> None:
    """By the numbers of parameters that their cards give, in billions."""
    sizes = {
        "Qwen/Qwen2.5-Math-1.5B": 1.54,
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": 1.78,
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": 7.62,
        "Qwen/Qwen3-8B": 8.19,
        "Qwen/Qwen3-4B-Thinking-2507": 4.02,
        "HuggingFaceTB/SmolLM3-3B": 3.08,
        "allenai/Olmo-3-7B-Think": 7.30,
        "deepseek-ai/DeepSeek-R1-Distill-Llama-70B": 70.55,
        "mistralai/Mistral-7B-v0.3": 7.25,
    }
    configs = {name: families.released(name) for name in sizes}
    assert {name: round(config.n_parameters / 1e9, 2) for name, config in configs.items() if config} == sizes


def write_gguf(path: Path, reference: Any, name: str, extra: dict[str, Any] | None = None) -> Path:
    """As llama.cpp's converter writes it: q and k in Hugging Face's order."""
    c = reference.config
    names = families.FAMILIES[name].gguf
    assert names is not None
    of_hf = {theirs: ours for ours, theirs in {**names.in_block, **names.outside}.items()}
    writer = gguf.GGUFWriter(path, name)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(16384)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(16)
    writer.add_value_length(16)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    for key, value in (extra or {}).items():
        add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}[type(value)]
        add(f"{name}.{key}", value)
    for tensor_name, tensor in reference.state_dict().items():
        module, _, leaf = tensor_name.rpartition(".")
        prefix = ""
        if module.startswith("model.layers."):
            _, _, layer, module = module.split(".", 3)
            prefix = f"blk.{layer}."
        writer.add_tensor(f"{prefix}{of_hf[module]}.{leaf}", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


YARN_KEYS = {"rope.scaling.type": "yarn", "rope.scaling.factor": 8.0, "rope.scaling.original_context_length": 64}


@pytest.mark.parametrize(
    ("name", "rope", "extra"),
    [
        ("qwen2", PLAIN, {}),
        ("qwen2", YARN, YARN_KEYS),
        ("qwen3", PLAIN, {}),
        ("qwen3", LINEAR, {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}),
    ],
)
def test_gguf_files_are_read(name: str, rope: dict[str, Any], extra: dict[str, Any], tmp_path: Path) -> None:
    reference = hf_model(name, rope_parameters=rope)
    model = checkpoint.load(str(write_gguf(tmp_path / "model.gguf", reference, name, extra)))
    positions = np.broadcast_to(np.arange(T), IDS.shape)
    assert relative_error(run(model, IDS, positions)[1], in_torch(reference, IDS, positions)[1]) < TOLERANCE
    assert (model.config.family, model.config.context) == (name, 16384)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"rope.scaling.type": "longrope"}, "rope.scaling.type='longrope', only 'none' or 'linear' or 'yarn'"),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0},
            "without qwen3.rope.scaling.original_context_length",
        ),
        (YARN_KEYS | {"rope.scaling.attn_factor": 0.87}, "unknown key qwen3.rope.scaling.attn_factor"),
    ],
)
def test_a_gguf_file_whose_rope_is_not_known_is_refused(extra: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", hf_model("qwen3"), "qwen3", extra)
    with pytest.raises(ValueError, match=words):
        checkpoint.load(str(path))


def test_biases_are_sharded_with_their_heads_and_norms_are_whole() -> None:
    for case, leaf, spec in (("qwen2", "q_proj", "model"), ("olmo3", "q_norm", None)):
        places = shardings(pair(case)[1].config, make_mesh(1, jax.devices()[:1]))
        place = places["layers"]["self_attn"][leaf]
        assert place["bias" if "proj" in leaf else "weight"].spec == PartitionSpec(None, spec)


def test_adapters_stand_beside_biased_projections() -> None:
    _, model = pair("qwen2")
    chosen = lora.Lora(rank=2, targets=("q_proj",))
    adapters = lora.init(model, chosen, jax.random.key(0))
    adapters["self_attn.q_proj"]["B"] += 0.3
    attached = lora.attach(model, adapters, chosen)
    folded = lora.fold(attached)
    positions = np.broadcast_to(np.arange(T), IDS.shape)
    of_attached, of_folded, of_model = (run(m, IDS, positions)[1] for m in (attached, folded, model))
    assert relative_error(of_attached, of_folded) < 1e-5 < relative_error(of_model, of_folded)
    np.testing.assert_array_equal(folded.layers.self_attn.q_proj.bias[...], model.layers.self_attn.q_proj.bias[...])
