"""The fused op's kernels, interpreted, against sums in float64; their blocks; their lowering for CUDA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from popax.kernels.fused_lora import ops, pallas_gpu, pallas_tpu, quantize, reference, tiling
from popax.kernels.fused_lora.tiling import Blocks, Shape
from tests.kernels.cuda import exported, triton_kernels

WEIGHTS = ("float32", "bfloat16", "int8", "float8_e4m3fn")
KERNELS = {"tpu": pallas_tpu, "gpu": pallas_gpu}


def _operands(lora_math, seed, shape, weight, dtype):
    n, t, d, f, r = shape
    w = lora_math.normal(seed, (d, f))
    w, w_scale = quantize.quantize(w, weight) if weight in quantize.LARGEST else (w.astype(weight), None)
    shapes = ((n, t, d), (n, r, d), (n, r, f), (n, t, f))
    x, a, b, g = (lora_math.normal(seed + 1 + at, each, dtype) for at, each in enumerate(shapes))
    return g, x, w, a, b, jnp.linspace(0.5, 2.0, n, dtype=jnp.float32), w_scale


def _part(size, most=128):
    return most if size % most == 0 else size


def _run(kernel, blocks, g, x, w, a, b, scale, w_scale):
    """blocks: of the forward and of the backward, or None for the kernel's own."""
    module = KERNELS[kernel]
    forward, backward = blocks
    out, h = module.forward(x, w, a, b, scale, w_scale, blocks=forward, interpret=True)
    return out, h, module.backward(g, x, h, w, a, b, scale, w_scale, blocks=backward, interpret=True)


def _assert_right(lora_math, operands, results, dtype):
    g, x, w, a, b, scale, w_scale = operands
    out, h, gradients = results
    (users, tokens, d_in), (_, rank, d_out) = x.shape, b.shape
    assert (out.shape, h.shape, out.dtype, h.dtype) == ((users, tokens, d_out), (users, rank, tokens), x.dtype, x.dtype)
    assert [each.dtype for each in gradients] == [x.dtype, a.dtype, b.dtype, scale.dtype]
    w64 = np.asarray(w.astype(x.dtype), np.float64) * (1.0 if w_scale is None else np.asarray(w_scale, np.float64))
    terms = d_in + d_out + rank + tokens
    for user in range(users):
        one, size = (x[user], a[user], b[user]), float(scale[user])
        x64, a64, b64 = (np.asarray(each, np.float64) for each in one)
        g64, sizes = np.asarray(g[user], np.float64), [np.abs(each) for each in (x64, a64, b64)]
        want, magnitude = (
            x64 @ w64 + lora_math.delta(*one, size),
            sizes[0] @ np.abs(w64) + lora_math.delta(*sizes, size),
        )
        lora_math.assert_close(out[user], want, magnitude, dtype, terms)
        lora_math.assert_close(h[user], a64 @ x64.T, np.abs(a64) @ np.abs(x64).T, dtype, terms)
        wants, magnitudes = list(lora_math.vjp(g64, *one, size)), list(lora_math.vjp(np.abs(g64), *sizes, size))
        wants[0], magnitudes[0] = wants[0] + g64 @ w64.T, magnitudes[0] + np.abs(g64) @ np.abs(w64).T
        for got, true, bound in zip(gradients, wants, magnitudes, strict=True):
            lora_math.assert_close(got[user], true, bound, dtype, terms + tokens * d_out)


@given(
    shape=st.tuples(
        st.integers(1, 4),
        st.integers(1, 140),
        st.sampled_from((40, 128, 256)),
        st.sampled_from((24, 128, 384)),
        st.integers(1, 128),
    ),
    weight=st.sampled_from(WEIGHTS),
    dtype=st.sampled_from(("float32", "bfloat16")),
    whole_rows=st.booleans(),
    grouped=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=4, deadline=None)
def test_tpu_against_the_sums(lora_math, shape, weight, dtype, whole_rows, grouped, seed):
    """Every order of the walk: sums in one step or several, W kept for all row tiles or read for each."""
    users, tokens, d_in, d_out, _ = shape
    tile = 128 if tokens > 128 else tokens
    tiles = users * -(-tokens // tile)
    group = tiles if grouped else 1
    columns = lambda size: size if whole_rows else _part(size)  # noqa: E731
    blocks = Blocks(1, tile, columns(d_in), _part(d_out), group), Blocks(1, tile, columns(d_out), _part(d_in), group)
    operands = _operands(lora_math, seed, shape, weight, dtype)
    _assert_right(lora_math, operands, _run("tpu", blocks, *operands), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("d_in", [128, 256])
def test_buffers_hold_what_later_passes_need(lora_math, d_in):
    """As a TPU buffers blocks, memory that nobody wrote is NaN: h's block stands still after the first pass."""
    operands = _operands(lora_math, 5, (2, 133, 256, 256, 5), "int8", "float32")
    _, x, w, a, b, scale, w_scale = operands
    simulated = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    blocks = Blocks(1, 128, d_in, 128, 4)
    out, h = pallas_tpu.forward(x, w, a, b, scale, w_scale, blocks=blocks, interpret=simulated)
    want, want_h = reference.forward(x, w, a, b, scale, w_scale)
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5 * float(jnp.max(jnp.abs(want))))
    np.testing.assert_allclose(h, want_h, rtol=1e-5, atol=1e-5 * float(jnp.max(jnp.abs(want_h))))


@pytest.mark.parametrize("weight", ["bfloat16", "int8"])
@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("d_in", [128, 256])
def test_several_users_in_a_row_tile(lora_math, weight, group, d_in):
    """Rows of several users meet W as one matrix, and each its own factors."""
    operands = _operands(lora_math, 3, (8, 16, 256, 256, 5), weight, "bfloat16")
    blocks = Blocks(2, 16, d_in, 128, group)
    _assert_right(lora_math, operands, _run("tpu", (blocks, blocks), *operands), "bfloat16")


def test_columns_in_chunks_and_sums_in_pieces(lora_math):
    """Blocks larger than what a step holds at once: two chunks of 512 columns, two pieces of 1,024 converted rows."""
    operands = _operands(lora_math, 4, (1, 16, 2048, 1024, 3), "int8", "float32")
    blocks = Blocks(1, 16, 2048, 1024, 1), Blocks(1, 16, 1024, 2048, 1)
    _assert_right(lora_math, operands, _run("tpu", blocks, *operands), "float32")


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 40), st.integers(1, 40), st.integers(1, 20)),
    weight=st.sampled_from(WEIGHTS),
    dtype=st.sampled_from(("float32", "bfloat16")),
    group=st.integers(1, 4),
    seed=st.integers(0, 99),
)
@settings(max_examples=4, deadline=None)
def test_gpu_against_the_sums(lora_math, shape, weight, dtype, group, seed):
    operands = _operands(lora_math, seed, shape, weight, dtype)
    blocks = pallas_gpu.Blocks(tile=16, d_out=32, d_in=16, group=group)
    _assert_right(lora_math, operands, _run("gpu", (blocks, blocks), *operands), dtype)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("rank", [1, 8])
def test_a_users_nan_stays_with_them(lora_math, kernel, rank):
    """Invariant 2: bitwise, in results and gradients, with the kernels' own blocks."""
    g, x, *rest = _operands(lora_math, rank, (3, 16, 64, 64, rank), "bfloat16", "float32")
    clean = jax.tree.leaves(_run(kernel, (None, None), g, x, *rest))
    poisoned = jax.tree.leaves(_run(kernel, (None, None), g.at[1, -1].set(jnp.nan), x.at[1].set(jnp.nan), *rest))
    for before, after in zip(clean, poisoned, strict=True):
        np.testing.assert_array_equal(np.asarray(before)[[0, 2]], np.asarray(after)[[0, 2]])
    assert all(np.isnan(np.asarray(leaf)[1]).any() for leaf in poisoned)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_weight_is_never_dequantised_in_memory(kernel):
    """Outside the kernel no array of W's shape exists but W itself."""
    spec = next(spec for spec in ops.ARG_SPECS if spec.name == "qwen3_8b_gate_proj_r16_int8")
    for op in ops.OPS:
        call = op.implementations["pallas_tpu" if kernel == "tpu" else "pallas_triton"]
        jaxpr = jax.make_jaxpr(call)(*op.operands(spec, jnp.bfloat16))
        made = [each.aval for eqn in jaxpr.jaxpr.eqns for each in eqn.outvars]
        shapes = ((spec.d_in, spec.d_out), (spec.d_out, spec.d_in))
        assert not [each for each in made if each.shape in shapes]
        assert [eqn.primitive.name for eqn in jaxpr.jaxpr.eqns].count("pallas_call") == 1


@pytest.mark.parametrize("module", KERNELS.values())
def test_other_dtypes_are_refused_by_name(module):
    x, scale = jnp.zeros((1, 2, 4)), jnp.ones((1,))
    with pytest.raises(NotImplementedError, match="W is int16"):
        module.forward(x, jnp.zeros((4, 4), jnp.int16), x[:, :1], x[:, :1], scale)
    with jax.enable_x64(True):
        x64 = jnp.zeros((1, 2, 4), jnp.float64)
        with pytest.raises(NotImplementedError, match="x is float64"):
            module.forward(x64, jnp.zeros((4, 4)), x[:, :1], x[:, :1], scale)


SHAPE = Shape(64, 512, 4096, 4096, 16, 2, 2, False)
X, W = 64 * 512 * 4096 * 2, 4096 * 4096 * 2
OTHER = 64 * 512 * (4096 + 16) * 2 + 64 * 16 * 8192 * 2  # y, h and the factors, once


@pytest.mark.parametrize(
    ("blocks", "moved"),
    [
        (Blocks(1, 512, 4096, 4096, 1), X + W),
        (Blocks(1, 512, 4096, 1024, 1), X + 64 * W),
        (Blocks(1, 512, 4096, 1024, 64), 4 * X + W),
        (Blocks(1, 512, 4096, 1024, 32), 4 * X + 2 * W),
        (Blocks(2, 512, 1024, 1024, 1), 4 * X + 32 * W),
        (Blocks(1, 512, 1024, 4096, 1), X + 64 * W),
    ],
    ids=["W stays whole", "x stays", "W's columns stay", "for half the rows", "a tile of both", "x once"],
)
def test_moved_bytes_are_the_blocks_fetches(blocks, moved):
    assert tiling.moved_bytes(SHAPE, blocks) == moved + OTHER


@pytest.mark.parametrize("kind", ["TPU v4", "TPU v5 lite", "TPU v5", "TPU7x"])
def test_chosen_blocks_fit_and_divide(monkeypatch, kind):
    monkeypatch.setattr(tiling.target, "device_kind", lambda: kind)
    for spec in ops.ARG_SPECS:
        for op, backward in ((ops.FORWARD, False), (ops.BACKWARD, True)):
            candidates = op.blocks(spec, "pallas_tpu")
            assert len(candidates) > 1
            for blocks in candidates:
                d_in, d_out = (spec.d_out, spec.d_in) if backward else (spec.d_in, spec.d_out)
                assert d_in % blocks.d_in == d_out % blocks.d_out == spec.population % blocks.users == 0
                assert spec.population // blocks.users * -(-spec.tokens // blocks.tile) % blocks.group == 0


def test_what_does_not_fit_vector_memory_says_how_much(monkeypatch):
    monkeypatch.setattr(tiling, "vmem_budget", lambda: 1 << 16)
    with pytest.raises(NotImplementedError, match="65536 bytes of VMEM"):
        tiling.default_blocks(SHAPE)


@pytest.mark.parametrize("weight", ["bfloat16", "int8", "float8_e4m3fn"])
@pytest.mark.parametrize("op", ops.OPS, ids=lambda op: op.name)
def test_lowers_for_cuda(op, weight):
    spec = next(spec for spec in ops.ARG_SPECS if spec.name == f"qwen3_8b_q_proj_r16_{weight}")
    given = [each for each in op.operands(spec, jnp.bfloat16) if each is not None]
    text = exported(op.implementations["pallas_triton"], given)
    assert len(triton_kernels(text)) == 1
    assert (f"tensor<{spec.d_in}x{spec.d_out}xbf16>" in text) == (weight == "bfloat16")
