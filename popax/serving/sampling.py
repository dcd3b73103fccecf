"""From logits to the next token."""

import dataclasses

import jax
import jax.numpy as jnp

from popax.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """temperature 0 is greedy; top_k 0 and top_p 1 keep the whole vocabulary."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ConfigError(
                f"temperature={self.temperature}, top_k={self.top_k}, top_p={self.top_p}: "
                "needs temperature >= 0, top_k >= 0 and 0 < top_p <= 1"
            )


def sample(rule: Sampling, key_B: jax.Array, logits_BxV: jax.Array) -> jax.Array:
    """The next token of each row, int32 [B]; a row draws from its own key and never depends on its neighbours."""
    if rule.temperature == 0.0:
        return jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
    logits_BxV = logits_BxV / rule.temperature
    if rule.top_k:
        kth_Bx1 = jax.lax.top_k(logits_BxV, min(rule.top_k, logits_BxV.shape[-1]))[0][:, -1:]
        logits_BxV = jnp.where(logits_BxV < kth_Bx1, -jnp.inf, logits_BxV)
    if rule.top_p < 1.0:
        logits_BxV = _nucleus(logits_BxV, rule.top_p)
    return jax.vmap(jax.random.categorical)(key_B, logits_BxV).astype(jnp.int32)


def _nucleus(logits_BxV: jax.Array, top_p: float) -> jax.Array:
    """Keep the fewest most likely tokens whose probability reaches top_p (arXiv 1904.09751)."""
    descending_BxV = -jnp.sort(-logits_BxV, axis=-1)
    probs_BxV = jax.nn.softmax(descending_BxV, axis=-1)
    before_BxV = jnp.cumsum(probs_BxV, axis=-1) - probs_BxV
    floor_Bx1 = jnp.min(jnp.where(before_BxV < top_p, descending_BxV, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits_BxV < floor_Bx1, -jnp.inf, logits_BxV)
