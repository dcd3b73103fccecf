"""How far a user's next-token distributions have gone from the base's: a penalty with each user's own weight."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from popax.memo import built_once
from popax.modeling.model import Model
from popax.modeling.remat import Remat
from popax.objectives.base import Objective, loss_sums
from popax.objectives.chunks import in_chunks
from popax.types import Adapt, Batch, HParams, Params


class BoundedSums(NamedTuple):
    """As LossSums; kl: the sum of w_t KL_t, of the distributions at the targets from the base's, in nats."""

    nll: jax.Array
    targets: jax.Array
    target_bytes: jax.Array
    kl: jax.Array


@built_once
def sft_with_kl(model: Model, *, remat: Remat = "none", chunk: int = 128) -> Objective[Batch]:
    """loss = sum_t w_t (-log p(target_t) + k KL(p_adapted || p_base at t)) / sum_t w_t, k the user's own `kl_weight`.

    No gradient reaches the base. chunk: tokens of a row whose logits exist at a time. It costs a forward pass of the
    base beside what `sft` does.
    """

    def objective(
        params: Params, adapt: Adapt, batch: Batch, hparams: HParams | None
    ) -> tuple[jax.Array, jax.Array, BoundedSums]:
        x_BxTxD = model.batch_hidden(params, batch, adapt=adapt, remat=remat)
        sums = loss_sums(model.token_nll(params, x_BxTxD, batch.targets_BxT, adapt), batch)
        base_BxTxD = jax.lax.stop_gradient(model.batch_hidden(params, batch))

        def divergence(x_BxCxD: jax.Array, base_BxCxD: jax.Array) -> jax.Array:
            logp_BxCxV = jax.nn.log_softmax(model.logits(params, x_BxCxD, adapt))
            base_BxCxV = jax.lax.stop_gradient(jax.nn.log_softmax(model.logits(params, base_BxCxD)))
            return jnp.sum(jnp.exp(logp_BxCxV) * (logp_BxCxV - base_BxCxV), axis=-1)

        kl = jnp.sum(in_chunks(divergence, chunk, x_BxTxD, base_BxTxD) * batch.weights_BxT)
        penalty = 0.0 if hparams is None else hparams.kl_weight * kl
        return sums.nll + penalty, sums.targets, BoundedSums(*sums, kl=kl)

    return objective
