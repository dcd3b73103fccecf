"""Supervised fine-tuning: mean cross-entropy over one user's supervised targets."""

import jax

from popax.memo import built_once
from popax.modeling.model import Model
from popax.modeling.remat import Remat
from popax.objectives.base import Objective, Sums, mean_of
from popax.types import Adapt, Batch, Params


@built_once
def sft(model: Model, *, remat: Remat = "none", frozen_base: bool = True) -> Objective[Batch, Sums]:
    """loss = sum_t w_t (-log p(target_t)) / sum_t w_t; 0 for a batch without supervised targets (an empty slot).

    frozen_base: no gradient with respect to params, which lets the loss do without logits; False to train a base.
    """

    def objective(params: Params, adapt: Adapt, batch: Batch) -> tuple[jax.Array, Sums]:
        x_BxTxD = model.batch_hidden(params, batch, adapt=adapt, remat=remat)
        nats_BxT = model.target_nats(params, x_BxTxD, batch.targets_BxT, adapt, frozen=frozen_base)
        return mean_of(nats_BxT, batch)

    return objective
