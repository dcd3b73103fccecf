"""Weights in fewer bits with factors beside them, and their products with activations that keep theirs.

A quantised weight is q s: a value of few bits times a factor, which an output channel shares, or a group of input
features in it. It is never trained. Products convert the values where they are used, which the compiler does inside the
product, and multiply by the factors behind it where they belong to whole channels.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from popax.modeling.quantise_rules import LARGEST, QuantiseRule

DTYPES: dict[str, Any] = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn, "int4": jnp.int4}
# Names in flat parameters: of a kernel, and what is behind it where it is quantised.
KERNEL, VALUES, SCALES = "/kernel", "/values", "/scales"


class Quantised(NamedTuple):
    """values int8, float8_e4m3fn or int4 [..., A, B]; scales float32 [..., G, B], each of A / G input features."""

    values: Any
    scales: Any


Weight = jax.Array | Quantised


def round_weight(weight: Any, rule: QuantiseRule, numpy: Any = jnp) -> Quantised:
    """The weight [..., A, B] rounded to the nearest values: |w - q s| <= s / 2 for integers.

    numpy: the module of the arrays, numpy on the host and jax.numpy elsewhere; both round alike.
    """
    assert rule.dtype is not None
    scales = weight_scales(weight, rule, numpy)
    values = (_grouped(weight, rule) / scales[..., None, :]).reshape(weight.shape)
    if rule.dtype != "fp8":
        largest = np.float32(LARGEST[rule.dtype])
        values = numpy.clip(numpy.round(values), -largest, largest)
    return Quantised(values.astype(DTYPES[rule.dtype]), scales)


def weight_scales(weight: Any, rule: QuantiseRule, numpy: Any = jnp) -> Any:
    """The factors of `round_weight`: the largest magnitude of a group becomes the largest value, nothing is cut off."""
    assert rule.dtype is not None
    # Times the inverse: the compiler makes that of a division by a constant, and NumPy would not.
    scales = numpy.max(numpy.abs(_grouped(weight, rule)), axis=-2) * np.float32(1 / LARGEST[rule.dtype])
    return numpy.where(scales == 0, np.float32(1), scales)


def _grouped(weight: Any, rule: QuantiseRule) -> Any:
    """float32 [..., G, A / G, B]."""
    *lead, rows, columns = weight.shape
    groups = rule.groups(rows)
    return weight.astype(np.float32).reshape(*lead, groups, rows // groups, columns)


def dense(weight: Weight, dtype: Any) -> jax.Array:
    """The weight as one array of this dtype."""
    if not isinstance(weight, Quantised):
        return weight.astype(dtype)
    *lead, rows, columns = weight.values.shape
    groups = weight.scales.shape[-2]
    wide = weight.values.astype(jnp.float32).reshape(*lead, groups, rows // groups, columns)
    return (wide * weight.scales[..., None, :]).reshape(weight.values.shape).astype(dtype)


def contract(x: jax.Array, weight: Weight) -> jax.Array:
    """x w: [..., A] and [A, B] to [..., B] in x's dtype. A gradient goes to x, and none to a quantised weight."""
    if isinstance(weight, Quantised):
        return _contract(x, weight)
    return jnp.einsum("...d,df->...f", x, weight.astype(x.dtype))


# With a rule of its own the backward pass converts the values again; left to itself it would keep the converted ones of
# every layer, which is the whole base in full precision.
@jax.custom_vjp
def _contract(x: jax.Array, weight: Quantised) -> jax.Array:
    if per_channel(weight):
        return scaled(jnp.einsum("...d,df->...f", x, weight.values.astype(x.dtype)), weight.scales[0])
    return jnp.einsum("...d,df->...f", x, dense(weight, x.dtype))


def _forward(x: jax.Array, weight: Quantised) -> tuple[jax.Array, Quantised]:
    return _contract(x, weight), weight


def _backward(weight: Quantised, dy: jax.Array) -> tuple[jax.Array, None]:
    if per_channel(weight):
        return jnp.einsum("...f,df->...d", scaled(dy, weight.scales[0]), weight.values.astype(dy.dtype)), None
    return jnp.einsum("...f,df->...d", dy, dense(weight, dy.dtype)), None


_contract.defvjp(_forward, _backward)


def per_channel(weight: Quantised) -> bool:
    """Whether a factor belongs to a whole output channel: it may then wait until the sum over the inputs is made."""
    return weight.scales.shape[-2] == 1


def scaled(y: jax.Array, scales: jax.Array) -> jax.Array:
    """y times scales, which has y's last axes, multiplied in float32 and rounded once, to y's dtype."""
    scales = scales.reshape((1,) * (y.ndim - scales.ndim) + scales.shape)
    return (y.astype(jnp.float32) * scales).astype(y.dtype)


class QuantisedKernel(nnx.Module):
    """The parameters of a quantised weight: `kernel/values` and `kernel/scales` where there is else one `kernel`."""

    def __init__(self, weight: jax.Array, axes: tuple[str, ...], rule: QuantiseRule):
        rounded = round_weight(weight, rule)
        self.values = nnx.Param(rounded.values, axes=axes)
        # Factors lie beside their channels; groups are few, and lie where any of them is needed.
        self.scales = nnx.Param(rounded.scales, axes=(*axes[:-2], "groups", axes[-1]))


def make_kernel(weight: jax.Array, axes: tuple[str, ...], rule: QuantiseRule | None) -> nnx.Param | QuantisedKernel:
    """The parameter, or parameters, of a weight [..., d_in, d_out] with these logical axes."""
    return nnx.Param(weight, axes=axes) if rule is None else QuantisedKernel(weight, axes, rule)


def read_kernel(kernel: nnx.Param | QuantisedKernel) -> Weight:
    """What `make_kernel` made, inside a module."""
    if isinstance(kernel, QuantisedKernel):
        return Quantised(kernel.values[...], kernel.scales[...])
    return kernel[...]


def kernel_name(weight: str) -> str:
    """The parameter of a site or another linear map: layers.attn.q_proj -> layers/attn/q_proj/kernel."""
    return weight.replace(".", "/") + KERNEL


def dotted(kernel: str) -> str:
    """The inverse of `kernel_name`."""
    return kernel.removesuffix(KERNEL).replace("/", ".")


def quantisable(names: Iterable[str]) -> list[str]:
    """The weights, by the names that rules match, among these names of parameters."""
    kernels = (name.removesuffix(VALUES) for name in names)
    return [dotted(name) for name in kernels if name.endswith(KERNEL) and not name.endswith("/router" + KERNEL)]


def stored_weight(flat: Mapping[str, Any], kernel: str) -> Weight:
    """The weight of this kernel among flat parameters, as it is stored."""
    return flat[kernel] if kernel in flat else Quantised(flat[kernel + VALUES], flat[kernel + SCALES])
