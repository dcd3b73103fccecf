"""The plans in configs/runs: they build, their committed reports are of them, and Kimi-K2's decode compiles."""

import importlib.util
import json
from pathlib import Path

import pytest

from popax.cli.gin_door import GinDoor
from popax.modeling.config import ModelConfig
from popax.modeling.model import Model
from popax.plan.child import compile_apart
from popax.plan.config import PlanConfig
from popax.plan.report import needed_per_chip

ROOT = Path(__file__).parents[2]
PLANS = sorted(path.stem for path in (ROOT / "docs" / "plans").glob("*.json"))
GB = 10**9


def plan_of(name):
    door = GinDoor(["configs/runs/plan.gin", str(ROOT / "configs" / "runs" / f"{name}.gin")], [])
    return door.build(PlanConfig), door.build(ModelConfig)


@pytest.mark.parametrize("name", PLANS)
def test_a_committed_report_is_of_its_config(name):
    config, model = plan_of(name)
    report = json.loads((ROOT / "docs" / "plans" / f"{name}.json").read_text())
    figures = report["figures"]
    assert figures["topology"] == config.topology
    assert figures["parameters"] == Model(model).num_params
    assert figures["population"] == config.users
    assert figures["fits"]
    assert figures["hbm_per_chip_bytes"] <= figures["hbm_limit_bytes"] == config.slice.chip.usable_bytes
    assert figures["cross_population_adapter_bytes"] == 0
    meshes = [row["mesh"] for row in report["rows"] if "replicas" not in row]
    assert meshes == [str(config.mesh_of(step)) for step in config.steps]


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_opens_with_its_command(name):
    text = (ROOT / "configs" / "runs" / f"{name}.gin").read_text()
    assert f"popax plan --gin_file configs/runs/{name}.gin --json docs/plans/{name}.json" in text


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'popax[aot]'"
)
def test_a_trillion_parameters_decode_on_32_chips():
    config, model = plan_of("kimi_k2_v5p")
    compiled = compile_apart(config, model, "decode")
    assert compiled.fits
    # Base in bfloat16 over 32 chips, norms and biases on each.
    assert compiled.argument_bytes["base"] == pytest.approx(2 * Model(model).num_params / 32, rel=0.01)
    assert needed_per_chip(config, compiled) < 95 * GB
    assert compiled.peak_bytes < 8 * GB
