"""Virtual tokens: an adapter's own, in front of each text (soft prompts). Virtual token j has the id -1 - j.

Where keys and values are cached, callers put the ids before a prompt's. A packed row without a cache has them once,
before all of its texts: each text sees them, and none sees another.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from popax.errors import ConfigError
from popax.modeling.config import ModelConfig
from popax.types import NOT_RECORDED

_THEIRS = -1  # the segment of virtual tokens, which every text sees (popax.kernels.attention.sees)


def virtual_ids(count: int) -> list[int]:
    """The ids of so many virtual tokens, in order."""
    return [-1 - at for at in range(count)]


def check_room(config: ModelConfig, length: int, count: int) -> None:
    """Raises ConfigError where rows of this length and their virtual tokens exceed the model's context."""
    if count and length + count > config.max_seq_len:
        raise ConfigError(
            f"rows of {length} tokens with {count} virtual ones before them exceed "
            f"ModelConfig.max_seq_len={config.max_seq_len}: the model would run beyond its own context; shorten the "
            f"rows to {max(0, config.max_seq_len - count)} (PipelineConfig.seq_len), or the prompt (its rank)"
        )


class Placed(NamedTuple):
    """A batch's arrays with virtual tokens in front of each row."""

    tokens_BxT: jax.Array
    positions_BxT: jax.Array
    segments_BxT: jax.Array
    routes_BxTxLxK: jax.Array | None


def placed(
    tokens_BxT: jax.Array,
    positions_BxT: jax.Array,
    segments_BxT: jax.Array,
    routes_BxTxLxK: jax.Array | None,
    count: int,
    own_B: jax.Array,
) -> Placed:
    """With `count` virtual tokens before each row; where own_B is False they are padding, and positions stay."""
    batch, own_Bx1 = tokens_BxT.shape[0], own_B[:, None]
    ids_Bxn, at_Bxn = (
        jnp.broadcast_to(jnp.asarray(row, jnp.int32)[None], (batch, count))
        for row in (virtual_ids(count), range(count))
    )
    moved_BxT = jnp.where(own_Bx1 & (positions_BxT >= 0), positions_BxT + count, positions_BxT)
    theirs_Bxn = jnp.where(own_Bx1, _THEIRS, jnp.zeros_like(at_Bxn))
    if routes_BxTxLxK is not None:
        nothing = jnp.full((batch, count, *routes_BxTxLxK.shape[2:]), NOT_RECORDED, routes_BxTxLxK.dtype)
        routes_BxTxLxK = jnp.concatenate((nothing, routes_BxTxLxK), axis=1)
    return Placed(
        jnp.concatenate((ids_Bxn, tokens_BxT), axis=1),
        jnp.concatenate((jnp.where(own_Bx1, at_Bxn, -1), moved_BxT), axis=1),
        jnp.concatenate((theirs_Bxn, segments_BxT), axis=1),
        routes_BxTxLxK,
    )
