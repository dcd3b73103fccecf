"""Arithmetic of a plan on written results: chips of two devices, rooflines, the largest population, advice."""

import dataclasses

import pytest

from popax.modeling.block_config import MoEConfig
from popax.modeling.config import ModelConfig
from popax.plan import compiler, fit, report, search
from popax.plan.collectives import Collective
from popax.plan.compiler import Compiled, too_much
from popax.plan.config import MeshShape, PlanConfig

GIB = 1 << 30
MODEL = ModelConfig(
    vocab_size=512, embed_dim=64, ffw_dim=128, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=16,
    dtype="bfloat16", param_dtype="bfloat16",
)  # fmt: skip
CONFIG = PlanConfig(topology="v5e:2x2", mesh=MeshShape(fsdp=4), users=16, steps=("train",))


def result(**fields):
    values = {
        "step": "train",
        "fits": True,
        "needed_bytes": 10 * GIB,
        "argument_bytes": {"base": 4 * GIB, "adapters": GIB, "optimizer": 2 * GIB, "batch": 0},
        "temporary_bytes": 3 * GIB,
        "matmul_flops": 197 * 10**9,
        "recomputed_flops": 0,
        "hbm_bytes": 0,
        "accessed_bytes": 0,
        "collectives": [],
        "compile_s": 1.0,
        "cpu_s": 1.0,
        "peak_bytes": GIB,
        "refusal": "",
    }
    return Compiled(**(values | fields))


def test_a_chip_of_two_devices_holds_both():
    config = PlanConfig(topology="v4:2x2x1", mesh=MeshShape(fsdp=8), users=16, steps=("train",))
    assert report.needed_per_chip(config, result()) == 20 * GIB
    assert report.chip_bytes(config, result())["base"] == 8 * GIB
    # Twice the work on a chip, which has the whole peak: the time is what half a chip needs for its half.
    assert report.roofline(config, result()).compute_s == pytest.approx(197e9 / (275e12 / 2))


def test_users_who_take_turns_are_on_the_host():
    """Two turns of 16: the population is 32, and the host has both turns' adapters and optimizers."""
    turns, compiled = dataclasses.replace(CONFIG, turns=2, steps=("train",)), result()
    assert report.row(turns, compiled)["host_bytes"] == 2 * 3 * GIB
    assert "host_bytes" not in report.row(CONFIG, compiled)
    assert report.row(turns, compiled)["hbm_optimizer_bytes"] == report.row(CONFIG, compiled)["hbm_optimizer_bytes"]
    assert "6.442 GB of 32 users in 2 turns" in "\n".join(report.lines(turns, compiled))
    assert report.figures(turns, MODEL, [compiled])["population"] == 32


def test_the_roofline_is_the_longest_of_three():
    gather = Collective("all-gather", ("fsdp",), 0, 1, 400 * 10**9, "")
    alone = Collective("all-reduce", (), 0, 1, 10**15, "")
    computing = report.roofline(CONFIG, result())
    assert (computing.bound, computing.seconds) == ("compute", pytest.approx(1e-3))
    assert computing.mfu == pytest.approx(1.0)
    moving = report.roofline(CONFIG, result(hbm_bytes=819 * 10**9 * 2, collectives=[gather, alone]))
    assert (moving.bound, moving.seconds) == ("memory", pytest.approx(2.0))
    assert moving.link_s == pytest.approx(2.0)
    assert moving.mfu == pytest.approx(1e-3 / 2.0)
    assert report.roofline(CONFIG, result(recomputed_flops=197 * 10**9 // 4)).mfu == pytest.approx(0.75)


def test_the_figures_that_scripts_rely_on():
    adapters = Collective("all-reduce", ("population", "fsdp"), 10**6, 2, 3 * 10**6, "")
    metrics = Collective("all-reduce", ("population",), 7 * 4 * 16, 1, 10**3, "")
    steps = [result(), result(collectives=[adapters, metrics], needed_bytes=12 * GIB, compile_s=3.0)]
    figures = report.figures(CONFIG, MODEL, steps)
    assert figures["cross_population_adapter_bytes"] == 3 * 10**6
    assert figures["hbm_per_chip_bytes"] == 12 * GIB
    assert figures["hbm_limit_bytes"] == int(15.75 * GIB)
    assert (figures["chips"], figures["population"], figures["compile_s"]) == (4, 16, 3.0)
    assert "3000000" in "\n".join(report.lines(CONFIG, steps[1]))
    assert report.row(CONFIG, steps[1])["collective_bytes"] == {"population+fsdp": 3 * 10**6, "population": 1000}


def line_of(fixed, slope):
    """A compiler whose programs need fixed + slope x users bytes; it counts its calls."""
    asked = []

    def compile_step(config, step):
        asked.append(config.users)
        needed = fixed + slope * config.users
        limit = config.slice.chip.usable_bytes
        return result(needed_bytes=needed, fits=needed <= limit, argument_bytes={"base": fixed // 2})

    return compile_step, asked


@pytest.mark.parametrize("slope", [GIB // 16, GIB // 3, GIB])
def test_the_largest_population_is_the_lines_and_is_compiled(slope):
    compile_step, asked = line_of(6 * GIB, slope)
    found = fit.largest(CONFIG, compile_step(CONFIG, "train"), compile_step)
    most = (int(15.75 * GIB) - 6 * GIB) // slope // 4 * 4
    assert found.count == most
    assert found.verified
    assert most in asked
    assert found.compiles == len(asked) - 1 <= 4


def test_where_the_line_is_wrong_fewer_are_tried():
    def compile_step(config, step):
        # Above 100 users something else grows.
        needed = 6 * GIB + config.users * GIB // 16 + (config.users > 100) * 4 * GIB
        return result(needed_bytes=needed, fits=needed <= config.slice.chip.usable_bytes, argument_bytes={"base": GIB})

    found = fit.largest(CONFIG, compile_step(CONFIG, "train"), compile_step)
    assert found.verified
    assert 80 <= found.count <= 100


def test_advice_names_numbers():
    large = result(fits=False, needed_bytes=20 * GIB, refusal="too much")
    said = "\n".join(fit.advice(dataclasses.replace(CONFIG, remat="none"), MODEL, large))
    assert "4.56 GB too much" in said  # (20 - 15.75) GiB
    assert "twice the fsdp (8, on twice the chips or at half the population): -2.15 GB" in said
    assert "ModelConfig.quantise" in said
    assert "users=8 instead of 16" in said  # 16 x (15.75 - 4) / (20 - 4) = 11.75, of 4 each
    assert "remat" in said
    assert "bfloat16" in said


def test_a_base_that_is_too_large_says_how_many_chips_hold_it():
    """4 chips with 32 GiB of base each: 128 / 15.75 = 8.1."""
    large = result(fits=False, needed_bytes=33 * GIB, argument_bytes={"base": 32 * GIB})
    assert "at least 9 chips" in "\n".join(fit.advice(CONFIG, MODEL, large))


def test_meshes_keep_the_base_in_memory_and_the_users_whole():
    # 33 GB of parameters in bfloat16: more than two chips of 16.9 GB hold, less than four do.
    model = dataclasses.replace(MODEL, vocab_size=1 << 20, embed_dim=8192, num_heads=64, head_dim=128)
    config = PlanConfig(topology="v5e:4x4", mesh=MeshShape(fsdp=16), users=16, steps=("train",))
    tried = list(search.meshes(config, model, "train"))
    assert tried
    assert all(mesh.devices == 16 and mesh.population <= 4 for mesh in tried)
    assert all(16 % (mesh.population * mesh.fsdp) == 0 for mesh in tried)
    assert len(set(tried)) == len(tried)
    assert tried[0].population == 4


def test_what_the_compiler_lets_pass_may_still_be_too_much():
    """Seen with a step of 107 GB on a chip of 102.8."""
    assert too_much(100, 100) == ""
    assert "101 bytes on a device, of 100" in too_much(101, 100)


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (304.00G) "
         "exceeds available HBM (15.75G).", 304 * GIB),
        ("Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm.", int(20.5 * GIB)),
        ("INTERNAL: something else", None),
        ("Ran out of memory in memory space vmem. Used 20.50M of 16.00M vmem.", None),
    ],
)  # fmt: skip
def test_what_a_refusal_says(message, needed):
    assert compiler.needed_bytes(message) == needed


def test_rows_that_an_even_routing_fills():
    """8 of 384 experts: a device with 24 keeps 8 rows a token and fills half a one; one with 3 keeps 3 for 1/16."""
    moe = MoEConfig(num_experts=384, experts_per_token=8, expert_ffw_dim=16)
    model = dataclasses.replace(MODEL, moe=moe)
    assert compiler.expected_rows(model, 1) == 1.0
    assert compiler.expected_rows(model, 16) == pytest.approx(0.5 / 8)
    assert compiler.expected_rows(model, 128) == pytest.approx(8 * 3 / 384 / 3)
    assert compiler.expected_rows(MODEL, 16) == 1.0
