"""Prompt tuning: virtual tokens in front of every text, whose embeddings are the user's (arXiv 2104.08691).

A config's rank is the number of virtual tokens. A user owns the difference of their embeddings from rows of the base's
own table, drawn once for all users; the base without virtual tokens is what slot -1 has. No weight of the base changes.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from popax.adapters.base import AdapterConfig
from popax.adapters.method import AdapterMethod, Leaves, PeftForm, SiteBase, SiteDims


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """seed: of the rows that the prompt begins as."""

    seed: int = 0


def _shared(dims: SiteDims, mask_R: jax.Array, base: SiteBase, options: Options) -> Leaves:
    del mask_R
    drawn_N = jax.random.randint(jax.random.key(options.seed), (dims.rank,), 0, dims.d_in)
    return {"rows": base.w_DxF[drawn_N].astype(jnp.float32)}


def _init(key: jax.Array, dims: SiteDims, mask_R: jax.Array, config: AdapterConfig, options: Options) -> Leaves:
    del key, mask_R, config, options
    return {"prompt": jnp.zeros((dims.rank, dims.d_out))}


def embeddings(state: Leaves, shared: Leaves) -> jax.Array:
    """float32 [n, D], those of the virtual tokens."""
    return shared["rows"].astype(jnp.float32) + state["prompt"].astype(jnp.float32)


def _delta(state: Leaves, shared: Leaves, scale: jax.Array, x: jax.Array, y: jax.Array, drop) -> jax.Array:
    """x: which virtual token each is, one-hot over all n; a row of zeros for the text's own tokens, which keep y."""
    del scale, drop
    own = jnp.einsum("...n,nd->...d", x.astype(jnp.float32), embeddings(state, shared), precision="highest")
    return jnp.where(jnp.any(x != 0, axis=-1, keepdims=True), own.astype(y.dtype), y)


def _norm(state: Leaves, shared: Leaves, scale: jax.Array) -> jax.Array:
    """Of the embeddings themselves: what the base has in their place is nothing."""
    del scale
    return jnp.sqrt(jnp.sum(jnp.square(embeddings(state, shared))))


METHOD = AdapterMethod(
    name="prompt",
    state_axes={"prompt": ("vector", "out")},
    shared_axes={"rows": ("vector", "out")},
    shared=_shared,
    init=_init,
    delta=_delta,
    norm=_norm,
    inits={"default": False},
    linear=False,
    learning_rate=1e-2,
    scaled=False,
    drops=False,
    kind="embedding",
    peft=PeftForm(
        record=lambda config: {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": config.rank},
        at_site=lambda state, shared: {"prompt_embeddings": shared["rows"] + state["prompt"]},
        leaves=lambda tensors, shared: {"prompt": tensors["prompt_embeddings"].astype(np.float32) - shared["rows"]},
        claims=lambda record: record.get("peft_type") == "PROMPT_TUNING",
        understood=frozenset(
            {"num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers"}
            | {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"}
        ),
        whole=True,
    ),
    options=Options,
)
