"""The timed benchmark on CPU: rows and ratios, wrong and failing forms, tuned defaults, figures, the budget."""

import argparse
import json
import math
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popax.bench.kernels import clock, composite, run, timed, tuned
from popax.bench.kernels.__main__ import _without_topology, configure, main
from popax.cli.bench_kernels import words
from popax.errors import ConfigError
from popax.kernels import target, tuning
from popax.kernels.indexed_lora.arg_specs import DecodeSpec
from popax.kernels.indexed_lora.ops import DECODE
from popax.kernels.op import Cost, Op
from popax.kernels.stacked_lora.arg_specs import ArgSpec
from popax.kernels.stacked_lora.ops import BACKWARD, FORWARD
from popax.kernels.table import OPS

KERNEL = "pallas_triton"
LIMITS = clock.Limits(memory=1 << 28, repeats=3, round_s=0.001, cold_bytes=1 << 16)
CEILINGS = clock.Ceilings(bytes_per_s=1e9, flops_per_s=1e9)


class Spec(NamedTuple):
    name: str
    rows: int


class Blocks(NamedTuple):
    rounds: int


def _slow(x, y):
    """y + x, after many products that change nothing."""
    return y + jax.lax.fori_loop(0, 200, lambda _, x: jnp.abs(x) * jnp.sign(x), x)


def _kernel(x, y, blocks=None):
    """Right with 1 round, wrong with 2, failing with 3."""
    rounds = 1 if blocks is None else blocks.rounds
    if rounds == 3:
        raise ValueError("3 rounds do not fit\nand a long story")
    return y + x if rounds == 1 else y + 2 * x


def _op(kernel=_kernel, name="toy.add"):
    shape = lambda spec, dtype: (jax.ShapeDtypeStruct((spec.rows, 64), dtype),) * 2  # noqa: E731
    return Op(
        name=name,
        specs=(Spec("rows_64", 64),),
        operands=shape,
        example=lambda spec, dtype, seed: tuple(np.ones(each.shape, dtype) for each in shape(spec, dtype)),
        implementations={"xla": _slow, KERNEL: kernel},
        rivals={"twice": lambda x, y: _slow(x, y)},
        cost=lambda spec, dtype: Cost(1000 * spec.rows, 6 * 64 * spec.rows),
        block_types={KERNEL: Blocks},
        blocks=lambda spec, implementation: tuple(Blocks(rounds) for rounds in (3, 2, 1)),
        donated=(1,),
    )


@pytest.fixture
def kernels_on_cpu(monkeypatch):
    monkeypatch.setattr(timed, "BACKENDS", {"cpu": (KERNEL,)})


def _measure(op, deadline=math.inf, **wish):
    ((_, spec, rows),) = timed.measure(
        timed.Wish("toy", **wish), LIMITS, deadline, ceilings=CEILINGS, ops=(op,), say=lambda line: None
    )
    return spec, {row["implementation"]: row for row in rows}


def test_rows_have_what_scripts_rely_on(kernels_on_cpu):
    _, rows = _measure(_op())
    assert set(rows) == {"xla", KERNEL, "twice"}
    for row in rows.values():
        assert {"op", "spec", "seconds", "floor_seconds", "ratio", "bytes", "flops", "over_best_xla"} <= set(row)
        assert row["floor_seconds"] == max(6 * 64 * 64 / 1e9, 64000 / 1e9)
        assert row["ratio"] == pytest.approx(row["seconds"] / row["floor_seconds"])
    assert rows[KERNEL]["default"]
    assert rows[KERNEL]["over_best_xla"] < 1
    assert not rows["xla"]["default"]
    assert min(rows[name]["over_best_xla"] for name in ("xla", "twice")) == 1.0
    assert all(timed.line(row) for row in rows.values())


@pytest.mark.parametrize(
    ("kernel", "key", "message"),
    [
        (lambda x, y: y + 2 * x, "failed", "not XLA's: relative difference"),
        (lambda x, y: y + x * jnp.nan, "failed", "relative difference nan"),
        (lambda x, y: _kernel(x, y, Blocks(3)), "failed", "ValueError: 3 rounds do not fit"),
    ],
)
def test_a_form_that_fails_leaves_the_others_their_rows(kernels_on_cpu, kernel, key, message):
    spec, rows = _measure(_op(kernel))
    assert message in rows[KERNEL][key]
    assert "\n" not in rows[KERNEL][key]
    assert rows["xla"]["seconds"] > 0
    assert rows["xla"]["default"]
    default = timed.tuned_row(_op(), spec, list(rows.values()))
    assert default is not None
    assert default["implementation"] == "xla"


def test_tuning_passes_over_wrong_and_failing_blocks_and_writes_what_dispatch_reads(
    kernels_on_cpu, tmp_path, monkeypatch
):
    def only_with_blocks(x, y, blocks=None):
        if blocks is None:
            raise NotImplementedError("name the blocks")
        return _kernel(x, y, blocks)

    op, path = _op(only_with_blocks), tmp_path / "report.json"
    monkeypatch.setattr(tuning, "ROOT", tmp_path)
    monkeypatch.setattr(clock, "ceilings", lambda memory, dtype: CEILINGS)
    figures = run.timed_report(
        timed.Wish("toy", tune=True),
        time.monotonic() + 60,
        repeats=3,
        round_s=0.001,
        json_path=path,
        tuned_root=tmp_path,
        ops=(op,),
    )
    assert (figures["measured"], figures["failed"], figures["left_out"]) == (3, 0, 0)
    assert figures["defaults_slower_than_best_xla"] == 0
    report = json.loads(path.read_text())
    assert report["name"] == "bench kernels"
    assert next(row for row in report["rows"] if row["implementation"] == KERNEL)["blocks"] == {"rounds": 1}
    choice = tuning.choose("toy.add", target.device_kind(), op.specs[0], "bfloat16")
    assert choice == tuning.Choice(KERNEL, {"rounds": 1})
    written = json.loads((tmp_path / "toy" / "tuned" / "cpu.json").read_text())
    assert written["basis"] == "measured"
    assert written["rows"][0]["why"]["xla"]["seconds"] > 0
    _, rows = _measure(op)
    assert rows[KERNEL]["blocks"] == {"rounds": 1}
    tuning.rows.cache_clear()


def test_a_count_does_not_replace_a_measurement(tmp_path):
    row = lambda name, blocks: tuned.row(_op(), Spec("", 64), jnp.bfloat16, name, blocks, {})  # noqa: E731
    (path,) = tuned.write("Kind 9", "counted", [row("xla", None)], tmp_path)
    tuned.write("Kind 9", "measured", [row(KERNEL, Blocks(1))], tmp_path)
    tuned.write("Kind 9", "counted", [row("xla", None)], tmp_path)
    (kept,) = json.loads(path.read_text())["rows"]
    assert (path.name, kept["implementation"], kept["blocks"]) == ("kind_9.json", KERNEL, {"rounds": 1})


def test_a_spent_budget_says_what_was_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(clock, "ceilings", lambda memory, dtype: CEILINGS)
    path = tmp_path / "report.json"
    figures = run.timed_report(
        timed.Wish("toy|base"), time.monotonic(), repeats=1, round_s=0.001, json_path=path, ops=(_op(),)
    )
    rows = json.loads(path.read_text())["rows"]
    assert figures["left_out"] == len(rows) == 1 + len(composite.DECODES) + len(composite.TRAINING)
    assert all(row["left_out"] == "the budget was spent" for row in rows)


def test_the_plan_has_every_shape_once_and_the_acceptance_first():
    found = [(op.name, spec.name) for op, spec in timed.plan(timed.Wish())]
    assert len(set(found)) == len(found)
    assert set(found) >= {(op.name, spec.name) for op in OPS for spec in op.specs}
    first = {("indexed_lora.decode", name) for name in composite.DECODES.values()}
    first |= {("base.decode", name) for name in composite.DECODES.values()}
    assert set(found[:4]) == first
    passes = ("base.training", "stacked_lora.forward", "stacked_lora.backward")
    assert set(found[4:16]) == {(op, spec) for op in passes for spec in composite.TRAINING}


def test_figures_are_the_acceptance_ratios():
    def row(op, spec, seconds, **more):
        return {"op": op, "spec": spec, "seconds": seconds, "default": True, "over_best_xla": 1.0} | more

    names = list(composite.TRAINING)
    rows = [row("base.training", name, 10.0 * (at + 1)) for at, name in enumerate(names)]
    rows += [row("stacked_lora.forward", name, 1.0) for name in names]
    rows += [row("stacked_lora.backward", name, 2.0) for name in names]
    rows += [row("stacked_lora.backward", name, 99.0, default=False) for name in names]
    rows += [row("base.decode", composite.DECODES["256_in_16"], 1.0, ratio=1.1, over_best_xla=1.5)]
    found = composite.figures(rows)
    # Sites in their number: q and o, k and v, gate and up, down.
    assert found["training_adapters_over_base"] == 7 * 3.0 / (2 * 10 + 2 * 20 + 2 * 30 + 40)
    assert found["base_and_decode_256_in_16_over_floor"] == 1.1
    assert found["defaults_slower_than_best_xla"] == 1
    assert "decode_256_distinct_over_floor" not in found
    assert "training_adapters_over_base" not in composite.figures(rows[1:])
    assert composite.figures([]) == {}


def test_the_base_beside_the_adapters_is_the_product_and_then_the_op():
    spec = DecodeSpec("", 6, 4, 3, 16, (8,), 2)
    _, x, pools, *rest = jax.tree.map(jnp.asarray, DECODE.example(spec, jnp.float32, 1))
    w = jnp.linspace(-1.0, 1.0, 128).reshape(16, 8)
    (got,) = composite.BASE_DECODE.implementations["xla"](w, x, pools, *rest)
    (want,) = DECODE.implementations["xla"]((x @ w,), x, pools, *rest)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    # W in, y written once and not read: against the op alone, whose y is read.
    alone, both = DECODE.cost(spec, jnp.float32), composite.BASE_DECODE.cost(spec, jnp.float32)
    assert both.bytes == alone.bytes + 4 * 16 * 8 - 4 * 6 * 8
    assert both.flops == alone.flops + 2 * 6 * 16 * 8
    y, dx = composite.BASE_TRAINING.implementations["xla"](w, x[None], got[None])
    np.testing.assert_allclose(y[0], x @ w, rtol=1e-5)
    np.testing.assert_allclose(dx[0], got @ w.T, rtol=1e-5)


@pytest.mark.parametrize("op", [FORWARD, BACKWARD, DECODE], ids=lambda op: op.name)
def test_real_ops_are_timed_with_their_rivals(op):
    spec = DecodeSpec("toy", 8, 4, 3, 16, (8, 24), 2) if op is DECODE else ArgSpec("toy", 2, 4, 16, 8, 2)
    op = op._replace(specs=(spec,))
    ((_, _, rows),) = timed.measure(timed.Wish(op.name), LIMITS, math.inf, ceilings=CEILINGS, ops=(op,))
    assert [row["implementation"] for row in rows] == ["xla", *op.rivals]
    assert [row for row in rows if "seconds" not in row] == []
    assert rows[0]["copies"] > 1


def test_operands_are_drawn_apart_and_their_slots_are_the_examples():
    spec = DecodeSpec("toy", 8, 6, 3, 16, (8,), 2)
    first, second = clock.copies_of(DECODE, spec, jnp.bfloat16, LIMITS._replace(cold_bytes=4000))[:2]
    for operands, seed in ((first, 0), (second, 1)):
        np.testing.assert_array_equal(operands[4], DECODE.example(spec, jnp.bfloat16, seed)[4])
        shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype.name), operands)
        assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype.name), DECODE.operands(spec, jnp.bfloat16))
    assert not np.array_equal(np.asarray(first[1], np.float32), np.asarray(second[1], np.float32))
    with pytest.raises(NotImplementedError, match="the limit is 100"):
        clock.copies_of(DECODE, spec, jnp.bfloat16, LIMITS._replace(memory=100))


def test_the_picture_is_drawn_from_the_report(tmp_path, kernels_on_cpu):
    _, rows = _measure(_op())
    path, png = tmp_path / "report.json", tmp_path / "bars.png"
    report = {"name": "", "commit": "", "versions": {}, "device": {}, "config": {}, "figures": {}}
    path.write_text(json.dumps(report | {"rows": list(rows.values())}))
    assert main(["--picture", str(path), str(png)]) == 0
    assert png.read_bytes().startswith(b"\x89PNG")
    path.write_text(json.dumps(report | {"rows": [{"op": "", "bytes": 3}]}))
    with pytest.raises(ConfigError, match="no timed row"):
        main(["--picture", str(path), str(png)])


def test_the_command_hands_every_option_on():
    parser = argparse.ArgumentParser()
    configure(parser)
    line = ["--topology", "v4:2x2x1", "v5e:2x2", "--ops", "a", "--specs", "b", "--tune", "--timed", "--json", "x"]
    line += ["--repeats", "2", "--budget-s", "3.0"]
    args = parser.parse_args(line)
    assert vars(parser.parse_args(words(args))) == vars(args)
    assert _without_topology(line) == line[3:]
