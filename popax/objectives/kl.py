"""How far a user's next-token distributions have gone from the base's: a penalty with each user's own weight."""

import jax
import jax.numpy as jnp

from popax.modeling.model import Model
from popax.objectives.base import BoundedSums, Objective, Sums
from popax.objectives.chunks import in_chunks
from popax.types import Adapt, Batch, Params


def with_kl(model: Model, objective: Objective[Batch, Sums], *, chunk: int = 128) -> Objective[Batch, BoundedSums]:
    """The objective, with sum_t w_t KL(p_adapted || p_base at t) beside its sums. The loss is the objective's alone.

    What the penalty weighs is each user's own (`HParams.kl_weight`), and the step adds it. No gradient reaches the
    base. chunk: tokens of a row whose logits exist at a time. It costs a forward pass of the base, and one more of the
    adapter.
    """

    def bounded(params: Params, adapt: Adapt, batch: Batch) -> tuple[jax.Array, BoundedSums]:
        loss, sums = objective(params, adapt, batch)
        x_BxTxD = model.batch_hidden(params, batch, adapt=adapt)
        base_BxTxD = jax.lax.stop_gradient(model.batch_hidden(params, batch))

        def divergence(x_BxCxD: jax.Array, base_BxCxD: jax.Array) -> jax.Array:
            logp_BxCxV = jax.nn.log_softmax(model.logits(params, x_BxCxD, adapt))
            base_BxCxV = jax.lax.stop_gradient(jax.nn.log_softmax(model.logits(params, base_BxCxD)))
            return jnp.sum(jnp.exp(logp_BxCxV) * (logp_BxCxV - base_BxCxV), axis=-1)

        kl_BxT = in_chunks(divergence, chunk, x_BxTxD, base_BxTxD) * batch.weights_BxT
        return loss, BoundedSums(*sums, kl=jnp.sum(kl_BxT))

    return bounded
