"""The parts of a decoder block as Flax NNX modules. Logical axes stand beside each parameter: its `axes` metadata."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from popax.compat import look_up
from popax.modeling.quantise_rules import QuantiseRules
from popax.modeling.quantised import contract, dense, make_kernel, read_kernel
from popax.modeling.remat import named_projection
from popax.sharding import ShardingRules, free_axes
from popax.types import SiteFn


class Linear(nnx.Module):
    """y = x W + b at a site, W [d_in, d_out]; what the site's adapter makes of (x, y) is the output.

    quantise: W is kept as the rule of the site says.
    """

    def __init__(
        self,
        site: str,
        shape: tuple[int, int],
        axes: tuple[str, str],
        *,
        bias: bool,
        param_dtype: str,
        rngs: nnx.Rngs,
        std: float | None = None,
        quantise: QuantiseRules | None = None,
    ):
        self.site = site
        # Without std, the output of a unit-variance input has unit variance.
        std = 1 / math.sqrt(shape[0]) if std is None else std
        rule = None if quantise is None else quantise.rule(site)
        self.kernel = make_kernel(normal(rngs, shape, std, param_dtype), axes, rule)
        self.bias = nnx.Param(jnp.zeros(shape[1], param_dtype), axes=axes[1:]) if bias else None

    def product(self, x: jax.Array) -> jax.Array:
        y = contract(x, read_kernel(self.kernel))
        if self.bias is not None:
            y = y + jnp.broadcast_to(self.bias[...].astype(x.dtype), y.shape)
        return y

    def matrix(self, dtype: DTypeLike) -> jax.Array:
        """W, as an array of this dtype."""
        return dense(read_kernel(self.kernel), dtype)

    def __call__(self, x: jax.Array, site_fn: SiteFn) -> jax.Array:
        return project(x, site_fn, self)[0]


def project(x: jax.Array, site_fn: SiteFn, *linears: Linear) -> tuple[jax.Array, ...]:
    """What each linear and its site's adapter make of the x that they share."""
    ys = site_fn(x, {linear.site: linear.product(x) for linear in linears})
    return tuple(named_projection(ys[linear.site], linear.site) for linear in linears)


class RMSNorm(nnx.Module):
    """y = scale * x / sqrt(mean(x^2) + eps) over the last axis, in float32."""

    def __init__(self, dim: int, eps: float, param_dtype: str):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(dim, param_dtype), axes=("norm",))

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        scale = self.scale[...].astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
        return normed.astype(x.dtype) * scale


TABLE_AXES = ("vocab", "embed")


class Embed(nnx.Module):
    """Token ids to rows of the table, and, where embeddings are tied, hidden states to logits."""

    def __init__(self, vocab_size: int, dim: int, *, param_dtype: str, rngs: nnx.Rngs, std: float = 0.02):
        table = normal(rngs, (vocab_size, dim), std, param_dtype)
        self.embedding = nnx.Param(table, axes=TABLE_AXES)

    def __call__(self, tokens_BxT: jax.Array, dtype: str, rules: ShardingRules) -> jax.Array:
        return look_up(self.embedding[...], tokens_BxT, free_axes(TABLE_AXES, rules)).astype(dtype)

    def attend(self, x: jax.Array) -> jax.Array:
        table_VxD = self.embedding[...].astype(x.dtype)
        return jnp.einsum("...d,vd->...v", x, table_VxD, preferred_element_type=jnp.float32)


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(
        self,
        name: str,
        embed_dim: int,
        ffw_dim: int,
        *,
        bias: bool,
        param_dtype: str,
        rngs: nnx.Rngs,
        out_std: float,
        quantise: QuantiseRules | None = None,
    ):
        wide, narrow = (embed_dim, ffw_dim), (ffw_dim, embed_dim)
        options = {"bias": bias, "param_dtype": param_dtype, "rngs": rngs, "quantise": quantise}
        self.gate_proj = Linear(f"{name}.gate_proj", wide, ("embed", "ffw"), **options)
        self.up_proj = Linear(f"{name}.up_proj", wide, ("embed", "ffw"), **options)
        self.down_proj = Linear(f"{name}.down_proj", narrow, ("ffw", "embed"), std=out_std, **options)

    def __call__(self, x_BxTxD: jax.Array, site_fn: SiteFn) -> jax.Array:
        gate_BxTxF, up_BxTxF = project(x_BxTxD, site_fn, *self.inner)
        return self.outer(gate_BxTxF, up_BxTxF, site_fn)

    @property
    def inner(self) -> tuple[Linear, Linear]:
        """The linears that the input enters."""
        return self.gate_proj, self.up_proj

    def outer(self, gate_BxTxF: jax.Array, up_BxTxF: jax.Array, site_fn: SiteFn) -> jax.Array:
        """The output, from what `inner` made of the input."""
        return self.down_proj(jax.nn.silu(gate_BxTxF) * up_BxTxF, site_fn)


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float, dtype: str) -> jax.Array:
    """Random numbers of this standard deviation, drawn in float32."""
    return (jax.random.normal(rngs.params(), shape, jnp.float32) * std).astype(dtype)
