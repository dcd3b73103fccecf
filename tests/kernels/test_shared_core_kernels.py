"""The shared-basis op's kernels, interpreted, against sums in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from popax.kernels.shared_core import ops, pallas_gpu, pallas_tpu, reference
from popax.kernels.shared_core.arg_specs import IndexedSpec
from tests.kernels.cuda import exported, triton_kernels

DTYPES = ("float32", "bfloat16")
CORES = ("matrix", "diagonal")
POPULARITY = ("distinct", "uniform", "zipf", "identical", "skewed")


def _column(size):
    return 128 if size % 128 == 0 else size


def _tpu_blocks(rows, d_in, d_out, resident):
    """Several tiles and several column blocks wherever the shape allows."""
    return pallas_tpu.Blocks(min(rows, 128), _column(d_in), _column(d_out), resident)


KERNELS = {
    "tpu": (pallas_tpu, lambda *shape: _tpu_blocks(*shape, 1)),
    "tpu_streamed": (pallas_tpu, lambda *shape: _tpu_blocks(*shape, 0)),
    "gpu": (pallas_gpu, lambda rows, d_in, d_out: pallas_gpu.Blocks(1 if rows == 1 else 16, 32, 64)),
}


def _wide(*arrays):
    return [np.asarray(each, np.float64) for each in arrays]


def _matrix(core):
    core = np.asarray(core, np.float64)
    return core if core.ndim == 2 else np.diag(core)


def _delta(x, a, b, core, scale):
    """delta_tf = s sum_qr (sum_d x_td a_rd) C_qr b_qf."""
    return scale * np.einsum("td,rd,qr,qf->tf", *_wide(x, a), _matrix(core), *_wide(b), optimize=True)


def _gradients(g, x, a, b, core, scale):
    """(dx, dcore, ds), each as its own sum."""
    g, x, a, b = _wide(g, x, a, b)
    matrix = _matrix(core)
    dx = scale * np.einsum("tf,qf,qr,rd->td", g, b, matrix, a, optimize=True)
    gram = np.einsum("tf,qf,td,rd->qr", g, b, x, a, optimize=True)
    dcore = scale * (gram if np.ndim(core) == 2 else np.diagonal(gram))
    return dx, dcore, np.sum(gram * matrix)


def _core_shape(core, rank):
    return (rank, rank) if core == "matrix" else (rank,)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
@given(
    shape=st.tuples(
        st.integers(1, 3),
        st.integers(1, 140),
        st.sampled_from((40, 256)),
        st.sampled_from((24, 384)),
        st.integers(1, 128),
    ),
    core=st.sampled_from(CORES),
    dtype=st.sampled_from(DTYPES),
    with_y=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=6, deadline=None)
def test_stacked_against_the_sums(lora_math, kernel, shape, core, dtype, with_y, seed):
    users, tokens, d_in, d_out, rank = shape
    module, blocks_of = KERNELS[kernel]
    x, g, y = (
        lora_math.normal(seed + at, (users, tokens, size), dtype) for at, size in ((0, d_in), (1, d_out), (2, d_out))
    )
    a, b = lora_math.normal(seed + 3, (rank, d_in), dtype), lora_math.normal(seed + 4, (rank, d_out), dtype)
    cores = lora_math.normal(seed + 5, (users, *_core_shape(core, rank)), dtype)
    scale = jnp.linspace(0.5, 2.0, users, dtype=jnp.float32)
    options = {"blocks": blocks_of(tokens, d_in, d_out), "interpret": True}
    forward, backward = (jax.jit(functools.partial(call, **options)) for call in (module.forward, module.backward))
    out, h = forward(x, a, b, cores, scale, y if with_y else None)
    gradients = backward(g, h, a, b, cores, scale)
    assert (out.shape, h.shape, out.dtype) == (y.shape, (users, rank, tokens), x.dtype)
    assert [each.dtype for each in gradients] == [x.dtype, cores.dtype, scale.dtype]
    terms = d_in + d_out + 2 * rank + tokens
    for user in range(users):
        one, size = (x[user], a, b, cores[user]), float(scale[user])
        sizes = [np.abs(each) for each in _wide(*one)]
        base = np.asarray(y[user], np.float64) if with_y else np.zeros(y.shape[1:])
        lora_math.assert_close(out[user], _delta(*one, size) + base, _delta(*sizes, size) + np.abs(base), dtype, terms)
        wants, magnitudes = _gradients(g[user], *one, size), _gradients(*(np.abs(*_wide(g[user])), *sizes), size)
        for got, want, magnitude in zip(gradients, wants, magnitudes, strict=True):
            lora_math.assert_close(got[user], want, magnitude, dtype, terms)


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_users_nan_stays_with_them(lora_math, kernel, core):
    """Bitwise, in results and gradients, with ragged row tiles."""
    module, blocks_of = KERNELS[kernel]
    x, g, y = (lora_math.normal(at, (3, 133, 128)) for at in range(3))
    a, b = lora_math.normal(3, (8, 128)), lora_math.normal(4, (8, 128))
    cores, scale = lora_math.normal(5, (3, *_core_shape(core, 8))), jnp.ones((3,))

    def run(x, g):
        options = {"blocks": blocks_of(133, 128, 128), "interpret": True}
        out, h = module.forward(x, a, b, cores, scale, y, **options)
        return out, h, *module.backward(g, h, a, b, cores, scale, **options)

    run = jax.jit(run)
    clean, poisoned = run(x, g), run(x.at[1].set(jnp.nan), g.at[1, -1].set(jnp.nan))
    for before, after in zip(clean, poisoned, strict=True):
        np.testing.assert_array_equal(np.asarray(before)[[0, 2]], np.asarray(after)[[0, 2]])
    assert all(np.isnan(np.asarray(leaf)[1]).any() for leaf in poisoned)


def _slots(popularity, rows, slots, seed):
    """One in eight has no adapter, one in sixteen names a slot that is not there."""
    rng = np.random.default_rng(seed)
    draw = {
        "distinct": lambda: np.resize(rng.permutation(slots), rows),
        "uniform": lambda: rng.integers(0, slots, rows),
        "zipf": lambda: np.minimum(rng.zipf(1.5, rows) - 1, slots - 1),
        "identical": lambda: np.full(rows, rng.integers(0, slots)),
        "skewed": lambda: np.where(rng.random(rows) < 0.9, 0, rng.integers(0, slots, rows)),
    }[popularity]()
    chance = rng.random(rows)
    return np.where(chance < 1 / 8, -1, np.where(chance < 3 / 16, slots + 2, draw)).astype(np.int32)


def _indexed_operands(lora_math, seed, rows, slots, rank, core, dtype, slot):
    """What is beyond a slot's rank holds NaN, and so do slots that nobody names and rows that are nobody's."""
    d_in, d_out = 256, 96
    ranks = np.random.default_rng(seed).integers(0, rank + 1, slots).astype(np.int32)
    unused, nobodys = ~np.isin(np.arange(slots), slot), (slot < 0) | (slot >= slots)
    dead_SxR = (np.arange(rank)[None] >= ranks[:, None]) | unused[:, None]
    dead = dead_SxR[:, :, None] | dead_SxR[:, None] if core == "matrix" else dead_SxR
    x, y, g = (lora_math.normal(seed + at, (rows, size)) for at, size in ((0, d_in), (1, d_out), (2, d_out)))
    x, g = (jnp.where(nobodys[:, None], jnp.nan, each).astype(dtype) for each in (x, g))
    a, b = lora_math.normal(seed + 3, (rank, d_in), dtype), lora_math.normal(seed + 4, (rank, d_out), dtype)
    cores = jnp.where(dead, jnp.nan, lora_math.normal(seed + 5, dead.shape)).astype(dtype)
    scale = jnp.where(unused, jnp.nan, jnp.linspace(0.5, 2.0, slots, dtype=jnp.float32))
    # Minus zero: y's very bytes are not y + 0.
    y = jnp.where(nobodys[:, None], -0.0, y).astype(dtype)
    return g, (x, a, b, cores, scale, jnp.asarray(slot), jnp.asarray(ranks), y)


def _check_indexed(lora_math, g, operands, out, gradients, dtype):
    x, a, b, cores, scale, slot, ranks, y = operands
    slots, rank = cores.shape[:2]
    terms = x.shape[1] + b.shape[1] + 2 * rank + x.shape[0]
    dx, dcore, ds = np.zeros(x.shape), np.zeros(cores.shape), np.zeros(slots)
    totals, magnitudes = (dx, dcore, ds), tuple(np.zeros_like(each) for each in (dx, dcore, ds))
    nobodys = (np.asarray(slot) < 0) | (np.asarray(slot) >= slots)
    assert np.asarray(out)[nobodys].tobytes() == np.asarray(y)[nobodys].tobytes()
    for owner in np.unique(np.asarray(slot)[~nobodys]):
        rows = np.asarray(slot) == owner
        live, size = int(ranks[owner]), float(scale[owner])
        within = (slice(live),) * (cores.ndim - 1)
        one = (np.asarray(x)[rows], a[:live], b[:live], cores[owner][within])
        sizes, (g_own, base) = [np.abs(each) for each in _wide(*one)], _wide(np.asarray(g)[rows], np.asarray(y)[rows])
        magnitude = _delta(*sizes, size) + np.abs(base)
        lora_math.assert_close(np.asarray(out)[rows], _delta(*one, size) + base, magnitude, dtype, terms)
        for sums, parts in (
            (totals, _gradients(g_own, *one, size)),
            (magnitudes, _gradients(np.abs(g_own), *sizes, size)),
        ):
            sums[0][rows] = parts[0]
            sums[1][owner][within] = parts[1]
            sums[2][owner] = parts[2]
    for got, want, magnitude in zip(gradients, totals, magnitudes, strict=True):
        lora_math.assert_close(got, want, magnitude, dtype, terms)


INDEXED = {"xla": None, "tpu_runs": True, "tpu_rows": False, "gpu": True, "gpu_rows": False}


@pytest.mark.parametrize("kernel", INDEXED)
@given(
    rows=st.integers(1, 150),
    slots=st.integers(1, 9),
    rank=st.sampled_from((1, 2, 8, 20, 64)),
    core=st.sampled_from(CORES),
    dtype=st.sampled_from(DTYPES),
    popularity=st.sampled_from(POPULARITY),
    seed=st.integers(0, 99),
)
@settings(max_examples=4, deadline=None)
def test_indexed_against_the_sums(lora_math, kernel, rows, slots, rank, core, dtype, popularity, seed):
    """Ragged and empty groups, groups smaller than a tile; with `runs`, rows come in stretches of their slots."""
    slot, runs = _slots(popularity, rows, slots, seed), INDEXED[kernel]
    slot = np.sort(slot) if runs else slot
    g, operands = _indexed_operands(lora_math, seed, rows, slots, rank, core, dtype, slot)
    _, *factors, _ = operands
    forward, backward = reference.indexed_forward, reference.indexed_backward
    if kernel != "xla":
        module = pallas_gpu if kernel.startswith("gpu") else pallas_tpu
        blocks = pallas_gpu.Blocks(16 if runs else 1, 32, 64) if module is pallas_gpu else _tpu_blocks(rows, 256, 96, 1)
        most = len(np.unique(slot)) if runs else rows
        options = {"most_runs": most, "blocks": blocks, "interpret": True}
        forward = functools.partial(module.indexed_forward, **options)
        backward = functools.partial(module.indexed_backward, **options)
    out, h = jax.jit(forward)(*operands)
    gradients = jax.jit(backward)(g, h, *factors)
    assert [each.dtype for each in gradients] == [operands[0].dtype, operands[3].dtype, jnp.float32]
    _check_indexed(lora_math, g, operands, out, gradients, dtype)


def test_long_runs_and_single_rows_take_roads_of_their_own(lora_math):
    """A core for each run of a tile, or one for each row on the lanes."""

    def core_operands(most_runs):
        operands = jax.eval_shape(
            lambda: _indexed_operands(lora_math, 0, 256, 4, 8, "matrix", "float32", np.arange(256) // 64)[1]
        )
        options = {"most_runs": most_runs, "blocks": _tpu_blocks(256, 256, 96, 1), "interpret": True}
        jaxpr = jax.make_jaxpr(lambda *each: pallas_tpu.indexed_forward(*each, **options))(*operands)
        (call,) = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "pallas_call"]
        return call.invars[0].aval.shape

    assert core_operands(4) == (6, 8, 8)
    assert core_operands(256) == (8, 8, 256)


@pytest.mark.parametrize("module", [pallas_gpu, pallas_tpu])
def test_float64_is_refused_by_name(module):
    with jax.enable_x64(True):
        x, basis = jnp.zeros((1, 2, 4), jnp.float64), jnp.zeros((2, 4), jnp.float64)
        with pytest.raises(NotImplementedError, match="float64"):
            module.forward(x, basis, basis, jnp.zeros((1, 2, 2)), jnp.ones((1,)))


def test_what_does_not_fit_vector_memory_says_how_much():
    """A whole spectrum of an 8B model's map, as a diagonal of 4,096 entries."""
    abstract = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    operands = (abstract(1, 512, 4096), abstract(4096, 4096), abstract(4096, 12288), abstract(1, 4096), abstract(1))
    with pytest.raises(NotImplementedError, match=r"4096 -> 12288 at rank 4096 need \d+ of \d+ bytes of VMEM"):
        jax.eval_shape(pallas_tpu.forward, *operands)


def _toy(spec):
    sizes = {"tokens": 32, "d_in": 64, "d_out": 48}
    if isinstance(spec, IndexedSpec):
        sizes |= {"slots": 5, "runs": 32}
    else:
        sizes["population"] = 2
    return spec._replace(**sizes)


@pytest.mark.parametrize("op", ops.OPS, ids=lambda op: op.name)
def test_forms_of_a_row_of_the_table_agree(op):
    """On a small shape of each variant: the rivals too, and the results' shapes are the oracle's at every spec."""
    for spec in op.specs:
        jax.eval_shape(op.implementations["xla"], *op.operands(spec, jnp.bfloat16))
    for core in CORES:
        spec = _toy(next(spec for spec in op.specs if spec.core == core and spec.rank in (8, 16)))
        operands = op.example(spec, jnp.float32, 0)
        want = op.implementations["xla"](*map(jnp.asarray, operands))
        for call in op.rivals.values():
            for got, true in zip(jax.jit(call)(*map(jnp.asarray, operands)), want, strict=True):
                np.testing.assert_allclose(got, true, rtol=1e-3, atol=1e-3)
        assert op.cost(spec, jnp.float32).flops > 0


SMALL = [
    (op, spec)
    for op in ops.OPS
    for spec in op.specs
    if spec.name.startswith(("toy", "qwen3_8b_gate_proj_matrix", "qwen3_8b_gate_proj_diagonal", "qwen3_8b_q_proj_"))
]


@pytest.mark.parametrize(("op", "spec"), SMALL, ids=lambda each: each.name)
def test_the_gpu_form_lowers_for_cuda(op, spec):
    names = triton_kernels(exported(op.implementations["pallas_triton"], op.operands(spec, jnp.bfloat16)))
    gradient = {"popax_shared_core_gradient"} if op.name == "shared_core.indexed_backward" else set()
    assert set(names) == {"popax_shared_core_expand"} | gradient
