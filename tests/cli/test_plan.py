"""`popax plan`: what it prints and writes, on a compiler that answers at once."""

import json
from pathlib import Path

import pytest

from popax.cli.main import main
from popax.plan import child
from popax.plan.collectives import Collective
from popax.plan.compiler import Compiled

TINY_MODEL = Path(__file__).parents[1] / "tiny_model.gin"
PLAN = """
ModelConfig.dtype = 'bfloat16'
ModelConfig.param_dtype = 'bfloat16'
PlanConfig.topology = 'v5e:2x2'
MeshShape.fsdp = 4
serving/MeshShape.fsdp = 1
serving/MeshShape.tensor = 4
PlanConfig.serving_mesh = @serving/MeshShape()
PlanConfig.users = 8
AdapterConfig.rank = 2
"""
GIB = 1 << 30


@pytest.fixture
def gin_file(tmp_path):
    path = tmp_path / "plan.gin"
    path.write_text(TINY_MODEL.read_text() + PLAN)
    return str(path)


@pytest.fixture
def asked(monkeypatch):
    """The plans that were compiled; a device's users need 1 GiB for four of them, the rest 4."""
    calls = []

    def compile_apart(config, model, step, say):
        calls.append((config, step))
        load = config.users if step == "train" else config.decode_rows
        needed = 4 * GIB + load * GIB // (4 * config.mesh_of(step).population)
        say(f"{step}: compiling, 15 s")
        return Compiled(
            step=step, fits=needed < config.slice.chip.usable_bytes, needed_bytes=needed,
            argument_bytes={"base": GIB, "adapters": GIB // 2}, temporary_bytes=needed - 3 * GIB // 2,
            matmul_flops=10**12, recomputed_flops=10**11, hbm_bytes=10**9, accessed_bytes=10**9,
            collectives=[Collective("all-gather", ("fsdp",), 10**6, 2, 10**7 * config.mesh.fsdp, "")],
            compile_s=20.0, cpu_s=30.0, peak_bytes=GIB, refusal="too large",
        )  # fmt: skip

    monkeypatch.setattr(child, "compile_apart", compile_apart)
    return calls


def test_table_report_and_picture(gin_file, asked, tmp_path, capsys):
    report, picture = tmp_path / "out" / "plan.json", tmp_path / "out" / "plan.png"
    assert main(["plan", "--gin_file", gin_file, "--json", str(report), "--picture", str(picture)]) == 0
    shown, progress = capsys.readouterr()
    assert "train step on v5e:2x2, fsdp 4: fits" in shown
    assert "decode step on v5e:2x2, tensor 4: fits" in shown
    assert "MFU estimate" in shown
    assert "adapter bytes across the population axis: 0" in shown
    assert "prefill: compiling, 15 s" in progress
    assert [step for _, step in asked] == ["train", "prefill", "decode"]
    assert picture.read_bytes()[:4] == b"\x89PNG"
    written = json.loads(report.read_text())
    assert written["name"] == "plan"
    names = "parameters chips hbm_per_chip_bytes hbm_limit_bytes compile_s cross_population_adapter_bytes population"
    assert set(names.split()) <= set(written["figures"])
    assert written["figures"]["population"] == 8
    assert (written["figures"]["run"], written["figures"]["topology"]) == ("plan", "v5e:2x2")
    assert written["figures"]["cross_population_adapter_bytes"] == 0
    assert [row["step"] for row in written["rows"]] == ["train", "prefill", "decode"]
    assert written["rows"][0]["collective_bytes"] == {"fsdp": 4 * 10**7}
    assert written["config"]["plan"]["adapter"]["rank"] == 2


def test_a_plan_that_does_not_fit_says_what_to_change_and_fails(gin_file, asked, capsys):
    """8 + 1 GiB at 48 users of 15.75: 4 + 12 > 15.75."""
    code = main(["plan", "--gin_file", gin_file, "--gin_param", "PlanConfig.users=48"])
    shown = capsys.readouterr().out
    assert code == 2
    assert "DOES NOT FIT" in shown
    assert "GB too much a chip" in shown
    assert "ModelConfig.quantise" in shown


def test_the_largest_population_is_compiled(gin_file, asked, tmp_path, capsys):
    report = tmp_path / "plan.json"
    params = ["--gin_param", "PlanConfig.steps=('train',)", "--largest", "--json", str(report)]
    assert main(["plan", "--gin_file", gin_file, *params]) == 0
    # 4 + users / 4 < 15.75 GiB, in fours.
    assert json.loads(report.read_text())["figures"]["largest_users"] == 44
    assert 44 in [config.users for config, _ in asked]
    assert "largest that fits: users=44, compiled" in capsys.readouterr().out


def test_search_ranks_meshes(gin_file, asked, tmp_path, capsys):
    report = tmp_path / "search.json"
    assert main(["plan", "--gin_file", gin_file, "--search", "--json", str(report)]) == 0
    rows = json.loads(report.read_text())["rows"]
    assert {row["mesh"] for row in rows} >= {"population 4", "population 2 x fsdp 2", "tensor 4", "fsdp 4"}
    assert len(rows) == len(asked) <= 8
    seconds = [row["estimate_seconds"] for row in rows]
    assert seconds == sorted(seconds)
    assert "fastest first by the roofline's estimate" in capsys.readouterr().out
    assert main(["plan", "--gin_file", gin_file, "--search", "2"]) == 0
    assert len(asked) == len(rows) + 2


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (["PlanConfig.topology='v5e:2x4'"], "mesh (fsdp 4) has 4 devices, v5e:2x4 has 8"),
        (["PlanConfig.users=6"], "users=6 does not divide over population x fsdp x expert = 4 devices: take 4"),
        (["PlanConfig.topology='h100:8'"], "GPUs need a GPU"),
        (["MeshShape.fsd=4"], "its keys are population, fsdp, tensor, expert, context"),
    ],
)
def test_bad_plans_are_one_line(gin_file, asked, params, message, capsys):
    flags = [part for param in params for part in ("--gin_param", param)]
    assert main(["plan", "--gin_file", gin_file, *flags]) == 2
    assert message in capsys.readouterr().err
    assert asked == []


def test_help_says_what_gpus_need(capsys):
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    assert "GPU topologies cannot be compiled without a GPU" in " ".join(capsys.readouterr().out.split())


def test_replicas_are_compared_and_growth_fails(gin_file, asked, tmp_path, capsys, monkeypatch):
    report = tmp_path / "plan.json"
    params = ["plan", "--gin_file", gin_file, "--gin_param", "PlanConfig.steps=('train',)", "--replicas"]
    assert main([*params, "2", "4", "--json", str(report)]) == 0
    written = json.loads(report.read_text())
    assert [config.topology for config, _ in asked] == ["v5e:2x2", "v5e:2x4", "v5e:4x4"]
    assert (written["figures"]["replicas"], written["figures"]["replicas_growth"]) == ([2, 4], 0.0)
    assert [row.get("replicas") for row in written["rows"]] == [None, 2, 4]
    assert "replicas of the population: independent" in capsys.readouterr().out

    alone = child.compile_apart

    def growing(config, *rest):
        compiled = alone(config, *rest)
        return compiled._replace(accessed_bytes=compiled.accessed_bytes * config.mesh.population)

    monkeypatch.setattr(child, "compile_apart", growing)
    assert main([*params, "2"]) == 2
    assert "NOT INDEPENDENT; a chip's memory, FLOPs and accessed bytes differ by 100.00%" in capsys.readouterr().out
    asked.clear()
    assert main([*params, "3"]) == 2
    assert "3 times as large: sides double, so take a power of two" in capsys.readouterr().err
    assert not asked
