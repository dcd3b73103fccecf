"""The presets in configs/models, through the gin door, against the published config.json of the same model."""

import json
import re
from pathlib import Path

import pytest

from popax.cli.gin_door import GinDoor
from popax.modeling.config import ModelConfig
from popax.modeling.hf_config import model_config
from popax.modeling.model import Model

PRESETS = Path(__file__).parents[2] / "configs" / "models"
HF_CONFIGS = Path(__file__).parents[2].parent / "shared" / "data" / "hf_configs"
PUBLISHED = {
    "llama3_1_8b": ("meta-llama--Meta-Llama-3.1-8B", 8_030_261_248),
    "qwen3_0_6b": ("Qwen--Qwen3-0.6B", 596_049_920),
    "qwen3_8b": ("Qwen--Qwen3-8B", 8_190_735_360),
}


def preset(name: str) -> ModelConfig:
    built = GinDoor([str(PRESETS / f"{name}.gin")], [], ("popax.modeling.config:ModelConfig",)).build(ModelConfig)
    return ModelConfig.from_dict(built.to_dict())


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_is_the_published_config(name):
    file, parameters = PUBLISHED[name]
    record = json.loads((HF_CONFIGS / f"{file}_config.json").read_text())
    assert preset(name) == model_config(record, source=file)
    assert Model(preset(name)).num_params == parameters


def test_the_benchmark_model_is_large_enough():
    assert Model(preset("bench_25m")).num_params == 29_368_832


@pytest.mark.parametrize("name", [*PUBLISHED, "bench_25m"])
def test_a_preset_opens_with_its_command_and_expectation(name):
    text = (PRESETS / f"{name}.gin").read_text(encoding="utf-8")
    expected = re.search(r"^# Expect ([\d,]+) parameters", text, re.MULTILINE)
    assert f"popax bench train --gin_file configs/models/{name}.gin" in text
    assert expected is not None
    assert int(expected.group(1).replace(",", "")) == Model(preset(name)).num_params
