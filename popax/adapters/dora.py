"""DoRA: W' = m (W + s A^T B) / n, n the size of each column of W + s A^T B (arXiv 2402.09353, eq. 5).

A user owns the factors and a magnitude m of each output feature. n is a function of the factors and the base, no
gradient goes through it (the paper's section 4.3), and it is computed once after a step rather than in every forward
pass: whoever serves an adapter needs no weight of the base's. m and n are kept as differences from the size of W's
own columns, so that a fresh adapter is exactly the base. Unlike PEFT's, dropout leaves the base's own term alone.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from popax.adapters import lora
from popax.adapters.base import AdapterConfig
from popax.adapters.method import AdapterMethod, Leaves, PeftForm, SiteBase, SiteDims, along_last
from popax.kernels import stacked_lora


def _shared(dims: SiteDims, mask_R: jax.Array, base: SiteBase, options: Any) -> Leaves:
    del dims, mask_R, options
    wide_DxF = base.w_DxF.astype(jnp.float32)
    return {"norm": jnp.sqrt(jnp.sum(jnp.square(wide_DxF), axis=0)), "bias": base.bias_F.astype(jnp.float32)}


def _init(key: jax.Array, dims: SiteDims, mask_R: jax.Array, config: AdapterConfig, options: Any) -> Leaves:
    zeros_F = jnp.zeros(dims.d_out)
    return lora.random_a_zero_b(key, dims, mask_R, config, options) | {"m": zeros_F, "n": zeros_F}


def _gain(state: Leaves, shared: Leaves, scale: jax.Array) -> jax.Array:
    """m / n in float32, 1 where a column of W is zero and where no adapter acts."""
    m_F = shared["norm"] + state["m"].astype(jnp.float32)
    n_F = shared["norm"] + jax.lax.stop_gradient(state["n"]).astype(jnp.float32)
    acts_F = (n_F > 0) & (scale != 0)
    return jnp.where(acts_F, m_F / jnp.where(acts_F, n_F, 1.0), 1.0)


def _delta(state: Leaves, shared: Leaves, scale: jax.Array, x: jax.Array, y: jax.Array, drop) -> jax.Array:
    """y + (m/n - 1) (y - bias) + m/n s (x A^T) B: the bias is no part of what is scaled."""
    gain_F = _gain(state, shared, scale)
    update = stacked_lora.lora(drop(x), state["a"], state["b"], scale).astype(y.dtype)
    return y + along_last(gain_F - 1.0, y) * (y - along_last(shared["bias"], y)) + along_last(gain_F, y) * update


def _merge(
    state: Leaves, shared: Leaves, scale: jax.Array, w_DxF: jax.Array, bias_F: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return _gain(state, shared, scale)[None] * (w_DxF + scale * state["a"].T @ state["b"]), bias_F


def _squares(state: Leaves, scale: jax.Array) -> jax.Array:
    """||s (A^T B)_f||^2 of each column."""
    return scale**2 * jnp.sum(state["b"] * ((state["a"] @ state["a"].T) @ state["b"]), axis=0)


def _refresh(state: Leaves, shared: Leaves, scale: jax.Array, w_DxF: jax.Array) -> Leaves:
    """n = ||W_f + s (A^T B)_f||, as its difference from ||W_f||, without a matrix of the weight's size."""
    wide = {name: state[name].astype(jnp.float32) for name in ("a", "b")}
    cross_F = scale * jnp.sum(wide["b"] * (wide["a"] @ w_DxF.astype(jnp.float32)), axis=0)
    grown_F = 2.0 * cross_F + _squares(wide, scale)
    n_F = jnp.sqrt(jnp.maximum(jnp.square(shared["norm"]) + grown_F, 0.0))
    total_F = n_F + shared["norm"]
    difference_F = jnp.where(total_F > 0, grown_F / jnp.where(total_F > 0, total_F, 1.0), 0.0)
    return state | {"n": difference_F.astype(state["n"].dtype)}


def _norm(state: Leaves, shared: Leaves, scale: jax.Array) -> jax.Array:
    """||(g - 1) W + g s A^T B||_F with g = m/n; <W, s A^T B> is read off n."""
    gain_F, squares_F = _gain(state, shared, scale), _squares(state, scale)
    cross_F = (state["n"] * (2.0 * shared["norm"] + state["n"]) - squares_F) / 2.0
    own_F = jnp.square(gain_F - 1.0) * jnp.square(shared["norm"])
    total_F = own_F + 2.0 * (gain_F - 1.0) * gain_F * cross_F + jnp.square(gain_F) * squares_F
    return jnp.sqrt(jnp.maximum(jnp.sum(total_F), 0.0))


def _peft(state: Mapping[str, Any], shared: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "lora_A.weight": state["a"],
        "lora_B.weight": state["b"].T,
        "lora_magnitude_vector": shared["norm"] + state["m"],
    }


def _from_peft(tensors: Mapping[str, Any], shared: Mapping[str, Any]) -> dict[str, Any]:
    m_F = tensors["lora_magnitude_vector"].astype(np.float32) - shared["norm"]
    return {"a": tensors["lora_A.weight"], "b": tensors["lora_B.weight"].T, "m": m_F, "n": np.zeros_like(m_F)}


METHOD = AdapterMethod(
    name="dora",
    state_axes={"a": ("rank", "in"), "b": ("rank", "out"), "m": ("out",), "n": ("out",)},
    shared_axes={"norm": ("out",), "bias": ("out",)},
    shared=_shared,
    init=_init,
    delta=_delta,
    merge=_merge,
    norm=_norm,
    refresh=_refresh,
    derived=("n",),
    inits={"default": True, "gaussian": True},
    linear=False,
    learning_rate=1e-3,
    peft=PeftForm(
        record=lambda config: {"use_dora": True},
        at_site=_peft,
        leaves=_from_peft,
        claims=lambda record: record.get("peft_type") == "LORA" and record.get("use_dora") is True,
        understood=frozenset({"use_dora"}),
    ),
)
