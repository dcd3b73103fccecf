"""How far a user's next-token distributions have gone from the base's: a penalty with each user's own weight."""

import jax
import jax.numpy as jnp

from popax.modeling.model import Model
from popax.modeling.remat import Remat
from popax.objectives.base import BoundedSums, Objective, mean_of
from popax.objectives.chunks import in_chunks
from popax.types import Adapt, Batch, Params


def sft_with_kl(model: Model, *, remat: Remat = "none", chunk: int = 128) -> Objective[Batch, BoundedSums]:
    """The loss of `sft`, with sum_t w_t KL(p_adapted || p_base at t) beside its sums; the penalty is not in the loss.

    What it weighs is each user's own (`HParams.kl_weight`), and the step adds it. No gradient reaches the base. chunk:
    tokens of a row whose logits exist at a time. It costs a forward pass of the base.
    """

    def objective(params: Params, adapt: Adapt, batch: Batch) -> tuple[jax.Array, BoundedSums]:
        x_BxTxD = model.batch_hidden(params, batch, adapt=adapt, remat=remat)
        loss, sums = mean_of(model.target_nats(params, x_BxTxD, batch.targets_BxT, adapt), batch)
        base_BxTxD = jax.lax.stop_gradient(model.batch_hidden(params, batch))

        def divergence(x_BxCxD: jax.Array, base_BxCxD: jax.Array) -> jax.Array:
            logp_BxCxV = jax.nn.log_softmax(model.logits(params, x_BxCxD, adapt))
            base_BxCxV = jax.lax.stop_gradient(jax.nn.log_softmax(model.logits(params, base_BxCxD)))
            return jnp.sum(jnp.exp(logp_BxCxV) * (logp_BxCxV - base_BxCxV), axis=-1)

        kl_BxT = in_chunks(divergence, chunk, x_BxTxD, base_BxTxD) * batch.weights_BxT
        return loss, BoundedSums(*sums, kl=jnp.sum(kl_BxT))

    return objective
