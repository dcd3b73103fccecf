"""The presets in configs/models, through the gin door, against the published config.json of the same model."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from popax.cli.gin_door import GinDoor
from popax.errors import ConfigError
from popax.modeling.config import ModelConfig
from popax.modeling.hf_config import model_config
from popax.modeling.model import Model
from tests.shared_data import HF_CONFIGS

PRESETS = Path(__file__).parents[2] / "configs" / "models"
PUBLISHED = {
    "llama3_1_8b": ("meta-llama--Meta-Llama-3.1-8B", 8_030_261_248),
    "qwen3_0_6b": ("Qwen--Qwen3-0.6B", 596_049_920),
    "qwen3_8b": ("Qwen--Qwen3-8B", 8_190_735_360),
    "llama3_1_405b": ("meta-llama--Meta-Llama-3.1-405B", 405_853_388_800),
    "qwen3_30b_a3b": ("Qwen--Qwen3-30B-A3B", 30_532_122_624),
    "qwen3_235b_a22b": ("Qwen--Qwen3-235B-A22B", 235_093_634_560),
    "deepseek_v3": ("deepseek-ai--DeepSeek-V3", 671_026_419_200),
    "kimi_k2": ("moonshotai--Kimi-K2-Instruct", 1_026_408_232_448),
}
# Billions, as the models' cards and papers give them (DeepSeek-V3: the main model, arXiv 2412.19437).
BILLIONS = {
    "llama3_1_8b": 8.03,
    "qwen3_0_6b": 0.596,
    "qwen3_8b": 8.19,
    "llama3_1_405b": 405.9,
    "qwen3_30b_a3b": 30.5,
    "qwen3_235b_a22b": 235.1,
    "deepseek_v3": 671.0,
    "kimi_k2": 1_026.4,
}
BENCHMARKS = {"bench_25m": 29_368_832, "bench_moe_100m": 106_496_512}


def preset(name: str, *params: str) -> ModelConfig:
    built = GinDoor([str(PRESETS / f"{name}.gin")], params).build(ModelConfig)
    return ModelConfig.from_dict(built.to_dict())


def test_one_field_of_a_preset_can_be_set_alone():
    params = ("MoEConfig.experts_per_token=4", "MLAConfig.kv_latent_dim=256", "YarnRope.factor=16.0")
    plain, changed = preset("kimi_k2"), preset("kimi_k2", *params)
    assert changed.moe == dataclasses.replace(plain.moe, experts_per_token=4)
    assert changed.mla == dataclasses.replace(plain.mla, kv_latent_dim=256)
    assert changed.rope_scaling == dataclasses.replace(plain.rope_scaling, factor=16.0)
    with pytest.raises(ConfigError, match=r"its keys are num_experts, experts_per_token"):
        preset("kimi_k2", "MoEConfig.top_k=4")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_is_the_published_config(name):
    file, parameters = PUBLISHED[name]
    record = json.loads((HF_CONFIGS / f"{file}_config.json").read_text())
    assert preset(name) == model_config(record, source=file)
    assert Model(preset(name)).num_params == parameters
    assert parameters == pytest.approx(BILLIONS[name] * 1e9, rel=5e-3)


@pytest.mark.parametrize(("name", "parameters"), BENCHMARKS.items())
def test_the_benchmark_models_are_large_enough(name, parameters):
    assert Model(preset(name)).num_params == parameters


@pytest.mark.parametrize("name", [*PUBLISHED, *BENCHMARKS])
def test_a_preset_opens_with_its_command_and_expectation(name):
    text = (PRESETS / f"{name}.gin").read_text(encoding="utf-8")
    expected = re.search(r"^# Expect ([\d,]+) parameters", text, re.MULTILINE)
    assert re.search(rf"^#   popax (bench train|plan) --gin_file configs/models/{name}\.gin", text, re.MULTILINE)
    assert expected is not None
    assert int(expected.group(1).replace(",", "")) == Model(preset(name)).num_params
