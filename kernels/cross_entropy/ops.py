"""The op's rows of the table: nats alone, and with the gradient, for each layout of the head."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from popax.kernels.cross_entropy import pallas_tpu, reference
from popax.kernels.cross_entropy.arg_specs import VOCAB_FIRST, VOCAB_LAST, ArgSpec
from popax.kernels.op import Cost, Op, nbytes


def _operands(spec: ArgSpec, dtype, *, vocab_first: bool) -> tuple[jax.ShapeDtypeStruct, ...]:
    head = (spec.vocab, spec.embed) if vocab_first else (spec.embed, spec.vocab)
    x, w = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((spec.rows, spec.embed), head))
    return x, w, jax.ShapeDtypeStruct((spec.rows,), jnp.int32)


def _example(spec: ArgSpec, dtype, seed: int, *, vocab_first: bool) -> tuple[np.ndarray, ...]:
    """Logits of unit variance."""
    rng = np.random.default_rng(seed)
    x, w, target = _operands(spec, dtype, vocab_first=vocab_first)
    x, w = (rng.standard_normal(each.shape, np.float32) for each in (x, w))
    return x.astype(dtype), (w * spec.embed**-0.5).astype(dtype), rng.integers(0, spec.vocab, target.shape, np.int32)


def _cost(spec: ArgSpec, dtype, *, vocab_first: bool, gradient: bool) -> Cost:
    operands = _operands(spec, dtype, vocab_first=vocab_first)
    moved = nbytes(operands) + 4 * spec.rows + (nbytes(operands[0]) if gradient else 0)
    return Cost((4 if gradient else 2) * spec.rows * spec.vocab * spec.embed, moved)


def _whole_logits(x_MxD, w, target_M, *, vocab_first: bool, gradient: bool):
    """[M, V] logits, as a model makes them, and autodiff of their cross-entropy."""

    def nats(x_MxD):
        subscripts = "md,vd->mv" if vocab_first else "md,dv->mv"
        logits_MxV = jnp.einsum(subscripts, x_MxD, w, preferred_element_type=jnp.float32)
        picked_M = jnp.take_along_axis(logits_MxV, target_M[:, None], axis=1)[:, 0]
        return jax.nn.logsumexp(logits_MxV, axis=1) - picked_M

    if not gradient:
        return (nats(x_MxD),)
    nats_M, pullback = jax.vjp(nats, x_MxD)
    return nats_M, *pullback(jnp.ones_like(nats_M))


def _candidates(spec: ArgSpec, implementation: str) -> tuple[pallas_tpu.Blocks, ...]:
    return tuple(pallas_tpu.Blocks(tile, vocab) for tile in (128, 256, 512, 1024) for vocab in (128, 256, 512, 1024))


def _op(vocab_first: bool, gradient: bool) -> Op:
    name = "nats_and_gradient" if gradient else "nats"
    xla, kernel = (
        functools.partial(getattr(module, name), vocab_first=vocab_first) for module in (reference, pallas_tpu)
    )
    return Op(
        name=f"cross_entropy.{name}_{'vd' if vocab_first else 'dv'}",
        specs=VOCAB_FIRST if vocab_first else VOCAB_LAST,
        operands=functools.partial(_operands, vocab_first=vocab_first),
        example=functools.partial(_example, vocab_first=vocab_first),
        implementations={"xla": xla, "pallas_tpu": kernel},
        rivals={
            # What the compiler counts for the first form in all, and not for one turn of its loop.
            "xla_unrolled": functools.partial(xla, unroll=True),
            "whole_logits": functools.partial(_whole_logits, vocab_first=vocab_first, gradient=gradient),
        },
        cost=functools.partial(_cost, vocab_first=vocab_first, gradient=gradient),
        block_types={"pallas_tpu": pallas_tpu.Blocks},
        blocks=_candidates,
    )


# (nats alone, nats and gradient), each by whether the vocabulary is w's first axis.
BY_LAYOUT = tuple(
    {vocab_first: _op(vocab_first, gradient) for vocab_first in (True, False)} for gradient in (False, True)
)
OPS = tuple(op for ops in BY_LAYOUT for op in ops.values())
