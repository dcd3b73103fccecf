"""FLOPs, bytes and loops of real and of written programs, against closed forms."""

import jax
import jax.numpy as jnp
import pytest

from popax.plan import costs
from popax.plan.hlo import parse, trip_count


def module_of(function, *shapes):
    operands = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return parse(jax.jit(function).lower(*operands).compile().as_text())


def loops(module):
    return [
        trip_count(module, computation, instruction)
        for computation in module.computations.values()
        for instruction in computation.instructions.values()
        if instruction.opcode == "while"
    ]


def test_a_product():
    counted = costs.count(module_of(jnp.matmul, (32, 64), (64, 128)))
    assert counted.matmul_flops == 2 * 32 * 64 * 128
    assert counted.hbm_bytes == 4 * (32 * 64 + 64 * 128 + 32 * 128)


def test_a_scan_counts_every_layer():
    """The compiler's own count of this program is one layer's."""

    def stack(x, w_LxDxD):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w_LxDxD)[0]

    module = module_of(stack, (16, 32), (9, 32, 32))
    assert loops(module) == [9]
    assert costs.count(module).matmul_flops == 9 * 2 * 16 * 32 * 32


def test_what_is_recomputed_is_known():
    """x -> tanh(tanh(x W) W) three layers deep: 2 products forward, 2 x-gradients; the remat repeats both forward."""

    def loss(x, w_LxDxD):
        @jax.checkpoint
        def layer(x, w):
            return jnp.tanh(jnp.tanh(x @ w) @ w), None

        return jnp.sum(jax.lax.scan(layer, x, w_LxDxD)[0])

    counted = costs.count(module_of(jax.grad(loss), (16, 32), (3, 32, 32)))
    product = 3 * 2 * 16 * 32 * 32
    assert counted.matmul_flops - counted.recomputed_flops == 4 * product
    assert counted.recomputed_flops == 2 * product


PROGRAM = """HloModule m, is_scheduled=true

ENTRY %main (a: {left}, b: {right}) -> {out} {{
  %a = {left} parameter(0)
  %b = {right} parameter(1)
  ROOT %convolution.1 = {out} convolution(%a, %b), {attributes}
}}
"""


@pytest.mark.parametrize(
    ("left", "right", "out", "attributes", "flops"),
    [
        ("bf16[2,256,512]", "bf16[512,384,1]", "bf16[2,256,384]",
         "window={size=1}, dim_labels=0bf_io0->0bf", 2 * 2 * 256 * 512 * 384),
        # A product batched over 2, as a TPU writes it: a window over dilated rows that meets one row at a time.
        ("bf16[2,256,64]", "bf16[2,8,64]", "f32[2,8,256]",
         "window={size=2 lhs_dilate=2}, dim_labels=0bf_0oi->0bf", 2 * 2 * 256 * 64 * 8),
        ("bf16[2,8,128,128]", "bf16[2,8,64,128]", "f32[2,8,128,64]",
         "window={size=2x8 stride=1x7 lhs_dilate=2x8}, dim_labels=01bf_01oi->01bf", 2 * 2 * 8 * 128 * 64 * 128),
        # A true convolution: 5 outputs, 3 taps, a row of padding on each side: 13 of 15 taps meet a number.
        ("f32[5,1,4]", "f32[3,4,6]", "f32[5,1,6]",
         "window={size=3 pad=1_1}, dim_labels=0bf_0io->0bf", 2 * 13 * 4 * 6),
    ],
)  # fmt: skip
def test_products_that_a_tpu_writes_as_convolutions(left, right, out, attributes, flops):
    module = parse(PROGRAM.format(left=left, right=right, out=out, attributes=attributes))
    assert costs.count(module).matmul_flops == flops


def test_arrays_in_a_tpus_own_memory_are_not_hbm_traffic():
    text = """HloModule m, is_scheduled=true

%fused (p: f32[9,64,64], i: s32[]) -> f32[1,64,64] {
  %p = f32[9,64,64]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = f32[1,64,64]{2,1,0:T(8,128)S(1)} dynamic-slice(%p, %i, %zero, %zero), dynamic_slice_sizes={1,64,64}
}

ENTRY %main (w: f32[9,64,64], j: s32[]) -> f32[1,64,64] {
  %w = f32[9,64,64]{2,1,0} parameter(0)
  %j = s32[] parameter(1)
  %one = f32[1,64,64]{2,1,0:T(8,128)S(1)} fusion(%w, %j), kind=kLoop, calls=%fused
  %both = f32[1,64,64]{2,1,0:T(8,128)S(1)} add(%one, %one)
  ROOT %out = f32[1,64,64]{2,1,0} copy(%both)
}
"""
    # One layer is read from HBM, the sum stays inside, the result is written; a counter of 4 bytes.
    counted, layer = costs.count(parse(text)), 4 * 64 * 64
    assert counted.hbm_bytes == 2 * layer + 4
    # The layer is read and written, the sum reads it twice and is written, and is copied: wherever they lie.
    assert counted.accessed_bytes == 7 * layer + 4


def test_where_the_compiler_keeps_an_operand_does_not_change_what_is_accessed():
    """The same product of an operand in HBM, and of one that is fetched into VMEM ahead of it."""
    plain = """HloModule m, is_scheduled=true

ENTRY %main (x: f32[64,64], w: f32[64,64]) -> f32[64,64] {
  %x = f32[64,64]{1,0} parameter(0)
  %w = f32[64,64]{1,0} parameter(1)
  ROOT %y = f32[64,64]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""
    fetched = """  %w = f32[64,64]{1,0} parameter(1)
  %start = (f32[64,64]{1,0:S(1)}, f32[64,64]{1,0}, u32[]) copy-start(%w)
  %done = f32[64,64]{1,0:S(1)} copy-done(%start)
"""
    staged = plain.replace("  %w = f32[64,64]{1,0} parameter(1)\n", fetched).replace("dot(%x, %w)", "dot(%x, %done)")
    one, other = costs.count(parse(plain)), costs.count(parse(staged))
    assert one.accessed_bytes == other.accessed_bytes == one.hbm_bytes == 3 * 4 * 64 * 64
    # A copy within HBM is the program's own.
    copied = costs.count(parse(staged.replace(":S(1)", "")))
    assert copied.accessed_bytes == copied.hbm_bytes == 5 * 4 * 64 * 64


def test_a_stack_that_is_laid_out_anew_in_place_is_read_a_layer_at_a_time():
    text = """HloModule m

%copied (q: s8[9,64,64]) -> s8[9,64,64] {
  %q = s8[9,64,64]{2,1,0:T(32,128)(4,1)} parameter(0)
  ROOT %copy = s8[9,64,64]{2,1,0:T(8,128)(4,1)} copy(%q)
}

%fused (p: s8[9,64,64], i: s32[]) -> s8[1,64,64] {
  %p = s8[9,64,64]{2,1,0:T(32,128)(4,1)} parameter(0)
  %again = s8[9,64,64]{2,1,0:T(8,128)(4,1)} fusion(%p), kind=kLoop, output_to_operand_aliasing={{}: (0, {})}, calls=%copied
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = s8[1,64,64]{2,1,0} dynamic-slice(%again, %i, %zero, %zero), dynamic_slice_sizes={1,64,64}
}

ENTRY %main (w: s8[9,64,64], j: s32[]) -> s8[1,64,64] {
  %w = s8[9,64,64]{2,1,0:T(32,128)(4,1)} parameter(0)
  %j = s32[] parameter(1)
  ROOT %one = s8[1,64,64]{2,1,0} fusion(%w, %j), kind=kLoop, calls=%fused
}
"""  # noqa: E501
    assert costs.count(parse(text)).hbm_bytes == 2 * 64 * 64 + 4


def test_a_kernel_is_what_it_declares():
    text = """HloModule m

ENTRY %main (w: f32[64,64]) -> f32[64,64] {
  %w = f32[64,64]{1,0} parameter(0)
  ROOT %k = f32[64,64]{1,0} custom-call(%w), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"cost_estimate":{"flops":"1234","transcendentals":"0","bytes_accessed":"99"}}}
}
"""  # noqa: E501
    assert costs.count(parse(text)) == costs.Costs(1234, 0, 99, 99)
    grouped = text.replace("%k =", "%ragged-dot-none.1 =")
    assert costs.count(parse(grouped), filled=0.5) == costs.Costs(617, 0, 99, 99)


def test_what_is_written_in_place_is_the_update():
    """A cache of 9 layers that a step writes one token of: the scatter moves the token, not the cache."""

    def write(cache_LxSxD, new_D):
        return cache_LxSxD.at[4, 7].set(new_D)

    operands = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((9, 512, 64), (64,))]
    text = jax.jit(write, donate_argnums=0).lower(*operands).compile().as_text()
    assert costs.count(parse(text)).hbm_bytes < 4 * 9 * 512 * 64 / 100
