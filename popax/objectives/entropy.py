"""The entropy of predictions: an objective without targets, to choose a mix of adapters for unlabelled text."""

import jax
import jax.numpy as jnp

from popax.modeling.model import Model
from popax.objectives.base import Objective, Sums, mean_of
from popax.objectives.chunks import in_chunks
from popax.types import Adapt, Batch, Params


def entropy(model: Model, *, chunk: int = 128) -> Objective[Batch, Sums]:
    """loss = sum_t w_t H(p_t) / sum_t w_t, H in nats over the whole vocabulary; w_t says where, and no target is read.

    AdaMerging, arXiv 2310.02575, eq. 5. Sums.nats are of the entropies. chunk: tokens whose logits exist at a time.
    """

    def objective(params: Params, adapt: Adapt, batch: Batch) -> tuple[jax.Array, Sums]:
        x_BxTxD = model.batch_hidden(params, batch, adapt=adapt)

        def of_tokens(x_BxCxD: jax.Array) -> jax.Array:
            logp_BxCxV = jax.nn.log_softmax(model.logits(params, x_BxCxD, adapt))
            return -jnp.sum(jnp.exp(logp_BxCxV) * logp_BxCxV, axis=-1)

        return mean_of(in_chunks(of_tokens, chunk, x_BxTxD), batch)

    return objective
