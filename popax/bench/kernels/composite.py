"""The base beside the adapters, as ops of their own: what the acceptance ratios are measured against.

They stand in no table of kernels: nothing dispatches to them.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from popax.kernels.indexed_lora.ops import DECODE
from popax.kernels.op import Cost, Op, nbytes
from popax.kernels.stacked_lora.ops import BACKWARD, FORWARD

# Of a Qwen3-8B layer's seven sites, as popax.kernels.sites names their shapes: q and o, k and v, gate and up, down.
LAYER = MappingProxyType({"q_proj": 2, "k_proj": 2, "gate_proj": 2, "down_proj": 1})
TRAINING = MappingProxyType({f"qwen3_8b_{site}_r16": times for site, times in LAYER.items()})
DECODES = MappingProxyType(
    {"256_distinct": "qwen3_8b_q_256_in_256_of_256_r16", "256_in_16": "qwen3_8b_q_256_in_16_of_256_r16"}
)
# Two times this close are the same.
NOISE = 1.02
# Whose tuned rows an op of this file goes by.
TUNED_AS = MappingProxyType({"base.decode": "indexed_lora.decode"})


def _product(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.matmul(x, w, preferred_element_type=jnp.float32).astype(x.dtype)


def _after_base(decode: Callable[..., Any]):
    """The site's base product, and the adapters on its result."""

    def call(w_DxF, x_TxD, pools, scale, slot_T, rank_S, **options):
        return decode((_product(x_TxD, w_DxF),), x_TxD, pools, scale, slot_T, rank_S, **options)

    return call


def _decode_operands(spec, dtype):
    (d_out,) = spec.d_outs
    return jax.ShapeDtypeStruct((spec.d_in, d_out), dtype), *DECODE.operands(spec, dtype)[1:]


def _decode_example(spec, dtype, seed):
    (d_out,) = spec.d_outs
    return np.zeros((spec.d_in, d_out), dtype), *DECODE.example(spec, dtype, seed)[1:]


def _decode_cost(spec, dtype) -> Cost:
    """W and the adapters' rows read once, x read once, y written once."""
    outputs, *_ = DECODE.operands(spec, dtype)
    alone, w_bytes = DECODE.cost(spec, dtype), nbytes(_decode_operands(spec, dtype)[0])
    (d_out,) = spec.d_outs
    return Cost(alone.flops + 2 * spec.tokens * spec.d_in * d_out, alone.bytes - nbytes(outputs) + w_bytes)


def _named(op: Op, names) -> tuple[Any, ...]:
    return tuple(spec for spec in op.specs if spec.name in names)


BASE_DECODE = Op(
    name="base.decode",
    specs=_named(DECODE, DECODES.values()),
    operands=_decode_operands,
    example=_decode_example,
    implementations={name: _after_base(call) for name, call in DECODE.implementations.items()},
    rivals={},
    cost=_decode_cost,
    block_types=DECODE.block_types,
    blocks=DECODE.blocks,
)


def _base_training(w_DxF: jax.Array, x_NxTxD: jax.Array, g_NxTxF: jax.Array):
    """A linear map's forward pass and its gradient with respect to its input."""
    return _product(x_NxTxD, w_DxF), _product(g_NxTxF, w_DxF.T)


def _training_operands(spec, dtype):
    x, *_, y = FORWARD.operands(spec, dtype)
    return jax.ShapeDtypeStruct((spec.d_in, spec.d_out), dtype), x, y


def _training_cost(spec, dtype) -> Cost:
    w, x, g = _training_operands(spec, dtype)
    return Cost(4 * spec.population * spec.tokens * spec.d_in * spec.d_out, 2 * nbytes((w, x, g)))


BASE_TRAINING = Op(
    name="base.training",
    specs=_named(FORWARD, TRAINING),
    operands=_training_operands,
    example=lambda spec, dtype, seed: tuple(np.zeros(each.shape, dtype) for each in _training_operands(spec, dtype)),
    implementations={"xla": _base_training},
    rivals={},
    cost=_training_cost,
)


def figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The acceptance ratios of issue 3, as far as `rows` have what they are made of; a default's time counts.

    decode_*: the op's seconds over its floor's; base_and_decode_*: base product and adapters over the floor of both;
    training_adapters_over_base: forward and backward of all seven sites' adapters over base-only forward and input
    gradient; defaults_slower_than_best_xla: shapes, of all measured.
    """
    default = {(row["op"], row["spec"]): row for row in rows if row.get("default")}
    found: dict[str, float] = {}
    for label, name in DECODES.items():
        for figure, op in (("decode", DECODE), ("base_and_decode", BASE_DECODE)):
            if (op.name, name) in default:
                found[f"{figure}_{label}_over_floor"] = default[op.name, name]["ratio"]
    passes = functools.partial(_layer_seconds, default)
    adapters, base = passes(FORWARD.name, BACKWARD.name), passes(BASE_TRAINING.name)
    if adapters is not None and base is not None:
        found["training_adapters_over_base"] = adapters / base
    if default:
        found["defaults_slower_than_best_xla"] = sum(row["over_best_xla"] > NOISE for row in default.values())
    return found


def _layer_seconds(default: Mapping[tuple[str, str], Mapping[str, Any]], *ops: str) -> float | None:
    """One layer's seven sites at 64 users x 512 tokens; None where a site was not measured."""
    keys = [(op, spec) for op in ops for spec in TRAINING]
    if any(key not in default for key in keys):
        return None
    return sum(default[key]["seconds"] * TRAINING[key[1]] for key in keys)
