"""Whole steps of a small dense model through the real TPU compiler, for v5e slices that are not attached."""

import dataclasses
import importlib.util

import pytest

from popax.adapters.base import AdapterConfig
from popax.adapters.cohort import Cohort
from popax.errors import ConfigError
from popax.modeling.config import ModelConfig
from popax.modeling.model import Model
from popax.plan.child import compile_apart
from popax.plan.collectives import DCN, by_axes
from popax.plan.config import STEPS, MeshShape, PlanConfig
from popax.plan.replicas import TOLERANCE, growth, replicated
from popax.plan.report import cross_population_bytes

pytestmark = [
    pytest.mark.aot,
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'popax[aot]'"
    ),
]
MODEL = ModelConfig(
    vocab_size=8192, embed_dim=512, ffw_dim=1536, num_layers=3, num_heads=8, num_kv_heads=4, head_dim=64, qk_norm=True,
    dtype="bfloat16", param_dtype="bfloat16",
)  # fmt: skip
CONFIG = PlanConfig(
    topology="v5e:2x2",
    mesh=MeshShape(population=2, fsdp=2),
    users=8,
    tokens=128,
    adapter=AdapterConfig(rank=8, dtype="bfloat16"),
    slots=8,
    decode_rows=8,
    prefill_rows=4,
    prefill_tokens=128,
    cache_length=256,
)


@pytest.fixture(scope="module")
def compiled():
    return {step: compile_apart(CONFIG, MODEL, step) for step in STEPS}


def test_what_a_device_holds_is_its_shards(compiled):
    """Half the base (two replicas of two devices each), and a quarter of the users' own."""
    cohort = Cohort.of(CONFIG.adapter, Model(MODEL).sites())
    held = compiled["train"].argument_bytes
    # The float32 masters of what is stored as bfloat16.
    assert held["adapters"] == cohort.num_params * 4 * 8 // 4
    assert 2 <= held["optimizer"] / held["adapters"] < 2.01
    assert held["base"] == pytest.approx(Model(MODEL).num_params * 2 / 2, rel=0.01)
    # 256 positions of 4 heads of 64, k and v in bfloat16, for the 4 rows of a replica, on its 2 devices.
    assert compiled["decode"].argument_bytes["cache"] == 3 * 256 * 4 * 64 * 2 * 2 * 4
    for step in STEPS:
        assert compiled[step].fits
        assert sum(compiled[step].argument_bytes.values()) < compiled[step].needed_bytes < 1 << 30


def test_the_train_steps_products_are_the_models(compiled):
    """2 a parameter and token forward and as much for the input's gradient; 256 tokens a device, each once."""
    abstract = Model(MODEL).abstract()
    products = Model(MODEL).num_params - abstract["embed"]["embedding"].size
    train = compiled["train"]
    assert train.matmul_flops - train.recomputed_flops == pytest.approx(4 * products * 256, rel=0.15)
    assert 0 < train.recomputed_flops < 2 * products * 256


def test_no_adapter_crosses_users_and_weights_cross_fsdp(compiled):
    """Invariant 10, in the compiled program of every step."""
    for step in STEPS:
        assert cross_population_bytes(CONFIG, compiled[step]) == 0
        assert all("population" not in axes for axes in by_axes(compiled[step].collectives))
    gathered = by_axes(compiled["train"].collectives)["fsdp"]
    # At least once forward and once backward, the half that the other device has.
    assert gathered > compiled["train"].argument_bytes["base"]


def test_a_step_does_not_grow_with_the_replicas_of_the_population(compiled):
    """The same load a replica on 2, 4 and 8 devices of two each: bytes and FLOPs of a device within 2%."""
    plans = [replicated(CONFIG, "train", times) for times in (2, 4)]
    steps = [compile_apart(config, MODEL, "train") for config in plans]
    assert [cross_population_bytes(config, step) for config, step in zip(plans, steps, strict=True)] == [0, 0]
    assert growth(compiled["train"], steps) <= TOLERANCE


def test_nothing_but_the_population_lies_across_slices(compiled):
    """Two slices, each with the load of one: a device's work is the same, and nothing of a user's crosses."""
    config = dataclasses.replace(
        CONFIG, slices=2, mesh=MeshShape(population=4, fsdp=2), users=16, slots=16, steps=("train",)
    )
    step = compile_apart(config, MODEL, "train")
    assert cross_population_bytes(config, step) == 0
    assert set(by_axes(step.collectives)) <= {"fsdp", DCN}
    assert growth(compiled["train"], [step]) <= TOLERANCE


def test_a_step_that_is_too_large_is_a_result():
    config = dataclasses.replace(CONFIG, users=4, rows=64, tokens=8192, remat="none", steps=("train",))
    model = dataclasses.replace(MODEL, vocab_size=151936)
    result = compile_apart(config, model, "train")
    assert not result.fits
    assert result.needed_bytes > config.slice.chip.usable_bytes
    assert "memory" in result.refusal.lower()


def test_arguments_that_are_too_large_are_not_compiled():
    model = dataclasses.replace(MODEL, num_layers=10000)
    result = compile_apart(dataclasses.replace(CONFIG, steps=("train",)), model, "train")
    assert not result.fits
    assert result.refusal.startswith("not compiled: the arguments alone")


def test_shards_that_do_not_divide_are_a_named_error():
    config = dataclasses.replace(CONFIG, mesh=MeshShape(tensor=4), users=8, steps=("train",))
    with pytest.raises(ConfigError, match="does not divide over the mesh"):
        compile_apart(config, dataclasses.replace(MODEL, ffw_dim=1538), "train")
