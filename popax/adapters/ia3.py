"""(IA)^3: y' = y (1 + l), a gain of the user's on each feature that a site puts out (arXiv 2205.05638).

The paper's gain on the features that enter an MLP's down projection is the one on what its up projection puts out:
down(l * (act(gate) * up)) = down(act(gate) * (l * up)). l is kept as its difference from 1.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from popax.adapters.base import AdapterConfig
from popax.adapters.method import AdapterMethod, Leaves, NoOptions, PeftForm, SiteBase, SiteDims, along_last
from popax.adapters.peft_layout import is_named
from popax.errors import PeftError


def _shared(dims: SiteDims, mask_R: jax.Array, base: SiteBase, options: Any) -> Leaves:
    """The size of each column of (W, bias), which a norm of the change needs."""
    del dims, mask_R, options
    squares_F = jnp.sum(jnp.square(base.w_DxF.astype(jnp.float32)), axis=0)
    return {"norm": jnp.sqrt(squares_F + jnp.square(base.bias_F.astype(jnp.float32)))}


def _init(key: jax.Array, dims: SiteDims, mask_R: jax.Array, config: AdapterConfig, options: NoOptions) -> Leaves:
    del key, mask_R, config, options
    return {"l": jnp.zeros(dims.d_out)}


def _delta(state: Leaves, shared: Leaves, scale: jax.Array, x: jax.Array, y: jax.Array, drop) -> jax.Array:
    del shared, x, drop
    return y * along_last(1.0 + scale * state["l"].astype(jnp.float32), y)


def _merge(
    state: Leaves, shared: Leaves, scale: jax.Array, w_DxF: jax.Array, bias_F: jax.Array
) -> tuple[jax.Array, jax.Array]:
    del shared
    gain_F = 1.0 + scale * state["l"]
    return w_DxF * gain_F[None], bias_F * gain_F


NOT_OF_IA3 = dict.fromkeys(
    (
        "r",
        "lora_alpha",
        "use_rslora",
        "lora_dropout",
        "init_lora_weights",
        "rank_pattern",
        "alpha_pattern",
        "bias",
        "layers_to_transform",
        "layers_pattern",
    )
)


def _moved(record: Mapping[str, Any], module: str, tensors: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """PEFT's gain on what enters a down projection is ours on what its up projection puts out."""
    inner = record.get("feedforward_modules") or []
    if not is_named(inner, module):
        return module, tensors
    before, _, last = module.rpartition(".")
    if last != "down_proj" or ".experts" in before:
        raise PeftError(f"feedforward_modules={inner!r}: {module} has a gain on what enters it, which popax has not")
    return f"{before}.up_proj", {name: tensor.T for name, tensor in tensors.items()}


METHOD = AdapterMethod(
    name="ia3",
    state_axes={"l": ("out",)},
    shared_axes={"norm": ("out",)},
    shared=_shared,
    init=_init,
    delta=_delta,
    merge=_merge,
    norm=lambda state, shared, scale: jnp.abs(scale) * jnp.linalg.norm(shared["norm"] * state["l"]),
    shrink=lambda state, factor: {"l": state["l"] * factor},
    inits={"default": True},
    linear=True,
    learning_rate=3e-3,
    width=lambda rank, d_in, d_out: 1,
    scaled=False,
    drops=False,
    # PEFT's own gain of a feed-forward module is on what enters it; these are all on what comes out.
    peft=PeftForm(
        record=lambda config: {"peft_type": "IA3", "feedforward_modules": [], "init_ia3_weights": True} | NOT_OF_IA3,
        at_site=lambda state, shared: {"ia3_l": 1.0 + state["l"][:, None]},
        leaves=lambda tensors, shared: {"l": tensors["ia3_l"][:, 0].astype(np.float32) - 1.0},
        claims=lambda record: record.get("peft_type") == "IA3",
        understood=frozenset({"feedforward_modules", "init_ia3_weights"}),
        moved=_moved,
    ),
)
