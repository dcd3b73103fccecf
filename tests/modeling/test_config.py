"""ModelConfig and the reading of Hugging Face's config.json."""

import dataclasses
import json

import pytest

from popax.errors import ConfigError
from popax.modeling.config import LinearRope, Llama3Rope, ModelConfig, YarnRope
from popax.modeling.hf_config import ARCHITECTURES, model_config
from tests.shared_data import HF_CONFIGS

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 128,
    "hidden_act": "silu",
}


def read(**changes) -> ModelConfig:
    record = {key: value for key, value in (LLAMA | changes).items() if value != "absent"}
    return model_config(record, source="config.json")


def test_a_config_survives_json(family):
    assert ModelConfig.from_dict(json.loads(json.dumps(family.config.to_dict()))) == family.config
    assert hash(family.config) == hash(dataclasses.replace(family.config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 0}, "num_layers=0"),
        ({"vocab_size": 64.0}, r"vocab_size=64\.0"),
        ({"num_kv_heads": 3}, "num_heads=4 is not a multiple of num_kv_heads=3"),
        ({"head_dim": 7}, "head_dim=7"),
        ({"rope_theta": 1.0}, "rope_theta"),
        ({"norm_eps": 0.0}, "norm_eps"),
        ({"dtype": "float16"}, "float16.*float32, bfloat16"),
        ({"rope_layout": "pairs"}, "pairs"),
        ({"rope_scaling": 8.0}, "rope_scaling=8.0"),
        ({"rope_scaling": {"rope_type": "dynamic"}}, "dynamic.*linear, llama3, yarn"),
        ({"rope_scaling": {"rope_type": "linear", "stretch": 2.0}}, r"unknown keys \['stretch'\].*\['factor'\]"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, r"LinearRope.factor=0\.5"),
    ],
)
def test_a_value_out_of_range_is_named(tiny, changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(tiny.config, **changes)


def test_unknown_and_missing_keys_of_a_record_are_named(tiny):
    record = tiny.config.to_dict() | {"num_experts": 8}
    del record["head_dim"]
    with pytest.raises(ConfigError, match=r"\['num_experts'\], missing keys \['head_dim'\]"):
        ModelConfig.from_dict(record)


def test_semantics_leave_out_what_does_not_change_the_function(tiny):
    same = dataclasses.replace(tiny.config, dtype="bfloat16", param_dtype="bfloat16", max_seq_len=7)
    assert same.semantics() == tiny.config.semantics()
    assert dataclasses.replace(tiny.config, norm_eps=1e-3).semantics() != tiny.config.semantics()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "absent", "rms_norm_eps": "absent"}, "hidden_size is missing; rms_norm_eps is missing"),
        ({"architectures": ["MistralForCausalLM"]}, "'MistralForCausalLM' is not supported.*Qwen3ForCausalLM"),
        ({"architectures": ["Qwen3ForCausalLM"]}, "head_dim is missing"),
        ({"architectures": "absent"}, "architecture 'None' is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1}, "sliding_window=32"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"rope_scaling": {"factor": 8.0}}, "takes no factor"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "each kind of layer"),
        ({"torch_dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(changes, message):
    with pytest.raises(ConfigError, match=rf"config\.json: .*{message}"):
        read(**changes)


def test_both_generations_of_rope_keys_mean_the_same():
    rope = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    old = read(rope_theta=5e5, torch_dtype="bfloat16", rope_scaling={"rope_type": "llama3", **rope})
    new = read(dtype="bfloat16", rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **rope})
    assert old == new
    scaling = Llama3Rope(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=64)
    assert (old.rope_theta, old.rope_scaling, old.param_dtype, old.dtype) == (5e5, scaling, "bfloat16", "bfloat16")
    assert read(rope_scaling={"type": "linear", "factor": 2.0}).rope_scaling == LinearRope(factor=2.0)
    yarn = read(rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "truncate": False})
    assert yarn.rope_scaling == YarnRope(factor=4.0, original_max_seq_len=32, truncate=False)


def test_families_put_their_biases_where_they_belong():
    def biases(config: ModelConfig) -> tuple[bool, bool, bool, bool]:
        return config.attention_bias, config.output_bias, config.mlp_bias, config.qk_norm

    assert biases(read(attention_bias=True, mlp_bias=True)) == (True, True, True, False)
    assert biases(read(architectures=["Qwen2ForCausalLM"])) == (True, False, False, False)
    qwen3 = read(architectures=["Qwen3ForCausalLM"], head_dim=16, tie_word_embeddings=True)
    assert biases(qwen3) == (False, False, False, True)
    assert (qwen3.head_dim, qwen3.tied_embeddings, read().head_dim) == (16, True, 8)


def test_the_dtype_is_as_stored_unless_asked_otherwise():
    record = LLAMA | {"torch_dtype": "float16"}
    assert model_config(record, source="").param_dtype == "float32"
    chosen = model_config(record, source="", dtype="bfloat16")
    assert (chosen.dtype, chosen.param_dtype) == ("bfloat16", "float32")
    assert model_config(record, source="", param_dtype="bfloat16").dtype == "bfloat16"


@pytest.mark.parametrize("path", sorted(HF_CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_every_published_config_is_read_or_refused_by_name(path):
    record = json.loads(path.read_text())
    if record["architectures"][0] in ARCHITECTURES.values():
        assert model_config(record, source=path.name).vocab_size == record["vocab_size"]
    else:
        with pytest.raises(ConfigError, match=f"{path.name}: architecture '{record['architectures'][0]}'"):
            model_config(record, source=path.name)
