"""The compiler's spellings of groups, and collectives of real programs, against closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from popax.plan.collectives import (
    DCN,
    axes_of_groups,
    axes_of_pairs,
    by_axes,
    collectives,
    crossing,
    received_bytes,
    replica_groups,
    source_target_pairs,
)
from popax.plan.hlo import parse

MESH = {"population": 2, "fsdp": 4}


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}, dimensions={0}", [[0, 1], [2, 3]]),
        ("replica_groups={{0,2,4,6}}", [[0, 2, 4, 6]]),
        ("replica_groups={}, to_apply=%add", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("to_apply=%add", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("replica_groups=[2,4]<=[8], dimensions={0}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[4,2]<=[8]", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=[2,4]<=[2,2,2]T(1,0,2)", [[0, 1, 4, 5], [2, 3, 6, 7]]),
        ("replica_groups=mesh['x'=2,'y'=4] {'y'}, dimensions={0}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=mesh['x'=2,'y'=4] {'x'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['x'=2,'y'=4] {'x','y'}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("replica_groups=mesh['x'=2,'y'=1,'z'=2], device_ids=([2,2]T(1,0)) {'x'}, d", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['x'=2,'y'=4] {'y':(1)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("replica_groups=mesh['x'=2,'y'=4] {'y':(2)2}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
    ],
)
def test_groups(text, groups):
    assert sorted(sorted(group) for group in replica_groups(text, 8)) == groups


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ([[0, 1, 2, 3], [4, 5, 6, 7]], ("fsdp",)),
        ([[0, 4], [1, 5], [2, 6], [3, 7]], ("population",)),
        ([[0, 2], [1, 3], [4, 6], [5, 7]], ("fsdp",)),
        ([[0, 1, 2, 3, 4, 5, 6, 7]], ("population", "fsdp")),
        ([[device] for device in range(8)], ()),
    ],
)
def test_axes_of_groups(groups, axes):
    assert axes_of_groups(groups, MESH) == axes


def test_a_ring_is_on_its_axis():
    ring = source_target_pairs("source_target_pairs={{0,1},{1,2},{2,3},{3,0},{4,5},{5,6},{6,7},{7,4}}, metadata={}")
    assert axes_of_pairs(ring, MESH) == ("fsdp",)
    assert axes_of_pairs(source_target_pairs("source_target_pairs={{0,4},{4,0}}"), MESH) == ("population",)
    assert axes_of_pairs(source_target_pairs("source_target_pairs={{0,5}}"), MESH) == ("population", "fsdp")


@pytest.mark.parametrize(
    ("opcode", "received"),
    [("all-gather", 300), ("all-reduce", 150), ("reduce-scatter", 75), ("all-to-all", 75), ("collective-permute", 100)],
)
def test_bytes_of_a_ring_of_four(opcode, received):
    assert received_bytes(opcode, 100, 4) == received
    assert received_bytes(opcode, 100, 1) == 0


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.array(jax.devices()[:8]).reshape(tuple(MESH.values())), tuple(MESH))


def compiled(function, mesh, *shapes):
    spec = PartitionSpec("population", "fsdp")
    mapped = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    operands = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return parse(jax.jit(mapped).lower(*operands).compile().as_text())


@pytest.mark.parametrize("axis", MESH)
def test_all_reduce_of_a_real_program(mesh, axis):
    """[256, 512] over 8 devices: a shard has 128 x 128 floats, 65,536 bytes."""
    (one,) = collectives(compiled(functools.partial(jax.lax.psum, axis_name=axis), mesh, (256, 512)), MESH)
    assert (one.opcode, one.axes, one.payload_bytes, one.times) == ("all-reduce", (axis,), 65536, 1)
    assert one.crossed_bytes == 2 * 65536 * (MESH[axis] - 1) // MESH[axis]


def test_a_collective_in_a_loop_counts_as_often_as_it_runs(mesh):
    def program(x):
        return jax.lax.fori_loop(0, 7, lambda _, y: jax.lax.ppermute(y, "fsdp", [(0, 1), (1, 2), (2, 3), (3, 0)]), x)

    (one,) = collectives(compiled(program, mesh, (256, 512)), MESH)
    assert (one.opcode, one.axes, one.times, one.crossed_bytes) == ("collective-permute", ("fsdp",), 7, 7 * 65536)


def test_adapters_across_users_are_seen_and_metrics_are_not(mesh):
    """The check that a plan makes of its train step, on a step that breaks the rule and on one that keeps it."""

    def shares_gradients(x):
        return jax.lax.psum(x, "population")

    def shares_a_metric(x):
        return x * jax.lax.psum(jnp.sum(x, keepdims=True), "population")

    bad = collectives(compiled(shares_gradients, mesh, (256, 512)), MESH)
    good = collectives(compiled(shares_a_metric, mesh, (256, 512)), MESH)
    assert [one.crossed_bytes for one in crossing(bad, "population", users=8)] == [65536]
    assert good
    assert crossing(good, "population", users=8) == []
    assert by_axes(bad) == {"population": 65536}


def test_what_travels_between_slices_is_a_collective_of_its_own():
    """As a TPU's compiler writes a sum over two slices: the hosts receive, add and send."""
    marks = '_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="all-reduce_0"'
    marks += ',_xla_megascale_transfer_type="ALL_REDUCE"'
    text = f"""HloModule m, is_scheduled=true

ENTRY %main (p: f32[1,128]) -> f32[1,128] {{
  %p = f32[1,128]{{1,0}} parameter(0)
  %token = token[] after-all()
  %recv = (f32[1,128]{{1,0}}, u32[], token[]) recv(%token), channel_id=1, frontend_attributes={{{marks}}}
  %recv-done = (f32[1,128]{{1,0}}, token[]) recv-done(%recv), channel_id=1, frontend_attributes={{{marks}}}
  ROOT %sum = f32[1,128]{{1,0}} get-tuple-element(%recv-done), index=0
}}
"""
    (one,) = found = collectives(parse(text), MESH)
    assert (one.opcode, one.axes, one.crossed_bytes, one.op_name) == ("all-reduce", (DCN,), 512, "all-reduce_0")
    assert crossing(found, DCN, users=4) == [one]


def test_pieces_of_an_asynchronous_collective_are_one():
    """A TPU's compiler continues a collective inside later fusions, also inside loops: the start alone counts."""
    text = """HloModule m, is_scheduled=true

%start (p: bf16[4]) -> (bf16[4], bf16[8]) {
  %p = bf16[4]{0} parameter(0)
  %all-gather.1 = bf16[8]{0} all-gather(%p), channel_id=3, replica_groups=[4,2]<=[8], dimensions={0}
  ROOT %custom-call.1 = (bf16[4]{0}, bf16[8]{0}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%piece (p.1: bf16[4]) -> bf16[8] {
  %p.1 = bf16[4]{0} parameter(0)
  ROOT %all-gather.2 = bf16[8]{0} all-gather(%p.1), channel_id=3, replica_groups=[4,2]<=[8], dimensions={0}
}

%condition (s: (s32[], bf16[4])) -> pred[] {
  %s = (s32[], bf16[4]{0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %n = s32[] constant(9)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%body (s.1: (s32[], bf16[4])) -> (s32[], bf16[4]) {
  %s.1 = (s32[], bf16[4]{0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%s.1), index=0
  %x = bf16[4]{0} get-tuple-element(%s.1), index=1
  %one = s32[] constant(3)
  %next = s32[] add(%i.1, %one)
  %fusion.2 = bf16[8]{0} fusion(%x), kind=kCustom, calls=%piece
  ROOT %tuple.1 = (s32[], bf16[4]{0}) tuple(%next, %x)
}

ENTRY %main (a: bf16[4]) -> bf16[4] {
  %a = bf16[4]{0} parameter(0)
  %zero = s32[] constant(0)
  %async = (bf16[4]{0}, bf16[8]{0}) fusion(%a), kind=kCustom, calls=%start
  %tuple.2 = (s32[], bf16[4]{0}) tuple(%zero, %a)
  %while.1 = (s32[], bf16[4]{0}) while(%tuple.2), condition=%condition, body=%body
  ROOT %out = bf16[4]{0} get-tuple-element(%while.1), index=1
}
"""
    module = parse(text)
    (one,) = collectives(module, MESH)
    assert (one.times, one.payload_bytes, one.crossed_bytes) == (1, 16, 8)
