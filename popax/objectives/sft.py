"""Supervised fine-tuning: the cross-entropy of one user's supervised targets."""

import jax

from popax.memo import built_once
from popax.modeling.model import Model
from popax.modeling.remat import Remat
from popax.objectives.base import LossSums, Objective, loss_sums
from popax.types import Adapt, Batch, HParams, Params


@built_once
def sft(model: Model, *, remat: Remat = "none", frozen_base: bool = True) -> Objective[Batch]:
    """loss = sum_t w_t (-log p(target_t)) / sum_t w_t.

    frozen_base: no gradient with respect to params, which lets the loss do without logits; False to train a base.
    per_token: -log p(target_t), [B, T].
    """

    def objective(
        params: Params, adapt: Adapt, batch: Batch, hparams: HParams | None = None
    ) -> tuple[jax.Array, jax.Array, LossSums, jax.Array]:
        del hparams
        x_BxTxD = model.batch_hidden(params, batch, adapt=adapt, remat=remat)
        nll_BxT = model.token_nll(params, x_BxTxD, batch.targets_BxT, adapt, frozen=frozen_base)
        sums = loss_sums(nll_BxT, batch)
        return sums.nll, sums.targets, sums, nll_BxT

    return objective
