"""Architectures read from `config.json`: the released ones in both forms, and everything else refused by name."""

import json

import pytest
import transformers
from helpers import LLAMA3_ROPE

from backtrack_jax.models import families
from backtrack_jax.models.config import Llama3RopeScaling, ModelConfig

# meta-llama/Llama-3.1-8B, as released.
LLAMA_31_8B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
EXPECTED = ModelConfig(
    vocab_size=128256,
    d_model=4096,
    d_mlp=14336,
    n_layers=32,
    n_heads=32,
    n_kv_heads=8,
    head_dim=128,
    norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=Llama3RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192),
    tied=False,
    context=131072,
)


def changed(**changes):
    fields = LLAMA_31_8B | changes
    return {name: value for name, value in fields.items() if value is not ...}


NEW_FORM = changed(rope_theta=..., rope_scaling=..., rope_parameters=LLAMA3_ROPE, torch_dtype=..., dtype="bfloat16")


@pytest.mark.parametrize("fields", [LLAMA_31_8B, NEW_FORM], ids=["old form", "new form"])
def test_released_llama(fields):
    assert families.from_hf(fields) == EXPECTED


def test_plain_rope_in_every_spelling():
    plain = {"rope_type": "default", "rope_theta": 10000.0}
    spellings = [
        changed(rope_scaling=None, rope_theta=10000.0),
        changed(rope_scaling=..., rope_theta=10000.0),
        changed(rope_scaling={"type": "default"}, rope_theta=10000),
        changed(rope_scaling=..., rope_theta=..., rope_parameters=plain),
        changed(rope_scaling=..., rope_theta=10000.0, rope_parameters=plain),
    ]
    configs = {families.from_hf(fields) for fields in spellings}
    assert len(configs) == 1
    assert configs.pop().rope_scaling is None


def test_fields_that_may_be_left_out():
    fields = changed(num_key_value_heads=..., tie_word_embeddings=..., head_dim=..., rope_scaling=...)
    config = families.from_hf(fields)
    assert (config.n_kv_heads, config.head_dim, config.tied) == (32, 128, False)
    assert families.from_hf(changed(head_dim=64)).head_dim == 64


def test_fields_that_change_nothing():
    without_effect = [
        {"unsloth_fixed": True, "unsloth_version": "2024.9"},
        {"max_sequence_length": 2048},
        {"sliding_window": None, "a_field_of_later_versions": None},
        {"layer_types": ["full_attention"] * 32},
        {"layer_types": None},
        {"pretraining_tp": 2},
    ]
    assert {families.from_hf(changed(**changes)) for changes in without_effect} == {EXPECTED}


@pytest.mark.hf
@pytest.mark.parametrize("scaling", [None, LLAMA_31_8B["rope_scaling"]], ids=["plain", "llama3"])
def test_no_rope_theta_is_transformers_default(scaling, tmp_path):
    """As in the files of Llama 2."""
    fields = changed(rope_theta=..., rope_scaling=scaling)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    ours = families.from_hf_file(str(tmp_path / "config.json"))
    transformers.LlamaConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "theirs")
    theirs = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert ours.rope_theta == theirs["rope_parameters"]["rope_theta"] == 10000.0
    assert ours == families.from_hf(theirs)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sliding_window": 4096}, "unknown field sliding_window=4096"),
        ({"quantization_config": {"bits": 4}}, "unknown field quantization_config={'bits': 4}"),
        ({"hidden_size": ...}, "missing field hidden_size"),
        ({"rms_norm_eps": ...}, "missing field rms_norm_eps"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "only 'full_attention' is implemented"),
        ({"model_type": "mixtral"}, "model_type='mixtral', only 'llama' or 'qwen2' or"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu', only 'silu' is implemented"),
        ({"attention_bias": True}, "attention_bias=True, only False is implemented"),
        ({"mlp_bias": True}, "mlp_bias=True, only False is implemented"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "only ['LlamaForCausalLM'] is implemented"),
        ({"num_key_value_heads": 5}, "num_attention_heads=32 is not a multiple of num_key_value_heads=5"),
        ({"head_dim": 63}, "head_dim=63 is odd"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type=['dynamic']"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "are needed"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "RoPE of type 'llama3' has fields ['factor']"),
        ({"rope_scaling": LLAMA_31_8B["rope_scaling"] | {"beta": 1}}, "'beta'"),
        ({"rope_scaling": {"rope_type": "default", "factor": 8.0}}, "RoPE of type 'default' has fields ['factor']"),
        ({"rope_scaling": ..., "rope_parameters": LLAMA3_ROPE | {"rope_theta": 1e4}}, "contradicts"),
        ({"rope_parameters": {"rope_type": "default"}}, "contradicts rope_scaling="),
    ],
)
def test_everything_else_is_refused_by_name(changes, words):
    with pytest.raises(ValueError) as caught:
        families.from_hf(changed(**changes))
    assert words in str(caught.value)


def test_all_faults_come_in_one_message():
    with pytest.raises(ValueError) as caught:
        families.from_hf(changed(sliding_window=1, hidden_act="gelu", vocab_size=..., rope_scaling={"type": "su"}))
    for words in ("sliding_window=1", "hidden_act='gelu'", "missing field vocab_size", "rope_type=['su']"):
        assert words in str(caught.value)


def test_files_are_named(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("{nonsense")
    with pytest.raises(ValueError, match=f"{path} is not JSON"):
        families.from_hf_file(path)
    path.write_text(json.dumps(changed(sliding_window=1)))
    with pytest.raises(ValueError, match=rf"(?s){path}: .*sliding_window=1"):
        families.from_hf_file(path)
    path.write_text(json.dumps(LLAMA_31_8B))
    assert families.from_hf_file(path) == EXPECTED


@pytest.mark.parametrize("fields", [LLAMA_31_8B, changed(rope_scaling=None, tie_word_embeddings=True, head_dim=64)])
def test_round_trip(fields):
    config = families.from_hf(fields)
    assert families.from_hf(json.loads(json.dumps(families.to_hf(config)))) == config


@pytest.mark.hf
def test_transformers_read_what_is_written_and_the_other_way_round(tmp_path):
    theirs = transformers.LlamaConfig(**families.to_hf(EXPECTED))
    assert theirs.rope_parameters == LLAMA3_ROPE
    assert (theirs.head_dim, theirs.num_key_value_heads, theirs.rms_norm_eps) == (128, 8, 1e-5)
    theirs.save_pretrained(tmp_path)
    assert families.from_hf_file(tmp_path / "config.json") == EXPECTED


def test_number_of_weights_and_operations():
    assert EXPECTED.n_parameters == 8_030_261_248
    assert families.from_hf(changed(tie_word_embeddings=True)).n_parameters == 8_030_261_248 - 128256 * 4096
    # 2 operations per weight of every matrix, and 4 per head, dimension and position in attention.
    matrices = 8_030_261_248 - 128256 * 4096 - 65 * 4096
    by_hand = 2 * matrices + 4 * 32 * 32 * 128 * 100
    assert EXPECTED.flops_per_token(100) == pytest.approx(by_hand, rel=1e-4)
    assert EXPECTED.flops_per_token(100, unembed=False) == EXPECTED.flops_per_token(100) - 2 * 128256 * 4096
