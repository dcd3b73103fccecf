"""The entropy of predictions: an objective without targets, to choose a mix of adapters for unlabelled text."""

import jax
import jax.numpy as jnp

from popax.modeling.model import Model
from popax.modeling.remat import Remat
from popax.objectives.base import LossSums, Objective, loss_sums
from popax.objectives.chunks import in_chunks
from popax.types import Adapt, Batch, HParams, Params


def entropy(model: Model, *, remat: Remat = "none", chunk: int = 128) -> Objective[Batch]:
    """loss = sum_t w_t H(p_t) / sum_t w_t, H in nats over the whole vocabulary; w_t says where, and no target is read.

    AdaMerging, arXiv 2310.02575, eq. 5. LossSums.nll is of the entropies. chunk: tokens whose logits exist at a time.
    """

    def objective(
        params: Params, adapt: Adapt, batch: Batch, hparams: HParams | None = None
    ) -> tuple[jax.Array, jax.Array, LossSums]:
        del hparams
        x_BxTxD = model.batch_hidden(params, batch, adapt=adapt, remat=remat)

        def of_tokens(x_BxCxD: jax.Array) -> jax.Array:
            logp_BxCxV = jax.nn.log_softmax(model.logits(params, x_BxCxD, adapt))
            return -jnp.sum(jnp.exp(logp_BxCxV) * logp_BxCxV, axis=-1)

        sums = loss_sums(in_chunks(of_tokens, chunk, x_BxTxD), batch)
        return sums.nll, sums.targets, sums

    return objective
