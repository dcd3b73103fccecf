"""Supervised fine-tuning: mean cross-entropy over one user's supervised targets."""

import jax
import jax.numpy as jnp

from popax.modeling.model import Model
from popax.objectives.base import Objective, Sums
from popax.types import Adapt, Batch, Params


def sft(model: Model, *, remat: bool = False) -> Objective:
    """loss = sum_t w_t (-log p(target_t)) / sum_t w_t; 0 for a batch without supervised targets (an empty slot)."""

    def objective(params: Params, adapt: Adapt, batch: Batch) -> tuple[jax.Array, Sums]:
        x_BxTxD, _ = model.hidden(
            params,
            batch.tokens_BxT,
            positions_BxT=batch.positions_BxT,
            segments_BxT=batch.segments_BxT,
            adapt=adapt,
            remat=remat,
        )
        logits_BxTxV = model.logits(params, x_BxTxD, adapt=adapt)
        nats_BxT = cross_entropy(logits_BxTxV, batch.targets_BxT) * batch.weights_BxT
        sums = Sums(
            nats=jnp.sum(nats_BxT),
            targets=jnp.sum(batch.weights_BxT),
            target_bytes=jnp.sum(jnp.where(batch.weights_BxT > 0, batch.target_bytes_BxT, 0)).astype(jnp.float32),
        )
        return sums.nats / jnp.maximum(sums.targets, 1.0), sums

    return objective


def cross_entropy(logits_BxTxV: jax.Array, targets_BxT: jax.Array) -> jax.Array:
    """-log softmax(logits)[target] in nats, [B, T] float32."""
    logits_BxTxV = logits_BxTxV.astype(jnp.float32)
    picked_BxT = jnp.take_along_axis(logits_BxTxV, targets_BxT[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BxTxV, axis=-1) - picked_BxT
