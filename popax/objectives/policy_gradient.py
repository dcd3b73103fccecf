"""Policy gradient on what a model wrote itself: REINFORCE, weighted by how much the trained policy differs."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from popax.errors import ConfigError
from popax.modeling.model import Model
from popax.modeling.remat import Remat
from popax.objectives.base import Objective
from popax.types import NOT_RECORDED, Adapt, HParams, Params, Rollouts


class PolicySums(NamedTuple):
    """Over sampled targets that have a record: nll, targets, target_bytes as in LossSums.

    unmapped: sampled targets that have none and left the loss. difference: sum of |log p in training - in serving|;
    largest_difference: the greatest of them, which does not add up.
    """

    nll: jax.Array
    targets: jax.Array
    target_bytes: jax.Array
    unmapped: jax.Array
    difference: jax.Array
    largest_difference: jax.Array

    def merged(self, other: "PolicySums") -> "PolicySums":
        """Of two parts of a batch."""
        added = jax.tree.map(jnp.add, self, other)
        return added._replace(largest_difference=jnp.maximum(self.largest_difference, other.largest_difference))


def policy_gradient(
    model: Model, *, replay: bool = True, importance: bool = True, max_ratio: float = math.inf, remat: Remat = "none"
) -> Objective[Rollouts]:
    """loss = -sum_t w_t A_t min(r_t, max_ratio) log p(target_t) / sum_t w_t, r_t = p / p_serve(target_t) held constant.

    REINFORCE (Williams, 1992) with the importance weight of each token, truncated above (Ionides, 2008). importance:
    False for r = 1. replay: tokens go to the recorded experts, whatever the routers would choose; False to let them
    choose. w_t is 0 where the token's route or the target's log-probability has no record, with replay=False as well,
    so that both are means over the same targets. r_t holds for tokens sampled from the model's own distribution
    (temperature 1, nothing truncated), and leaves out the ratio of the tokens before it: exact for one sampled token,
    and for any number of them where serving and training agree. Raises ConfigError unless max_ratio > 0.
    """
    if not max_ratio > 0:
        raise ConfigError(f"max_ratio={max_ratio}: above 0, math.inf for none")

    def objective(
        params: Params, adapt: Adapt, rollouts: Rollouts, hparams: HParams | None = None
    ) -> tuple[jax.Array, jax.Array, PolicySums]:
        del hparams
        batch = rollouts.batch
        routed_BxT = jnp.all(rollouts.routes_BxTxLxK != NOT_RECORDED, axis=(2, 3))
        mapped_BxT = routed_BxT & ~jnp.isnan(rollouts.serve_logps_BxT)
        weights_BxT = jnp.where(mapped_BxT, batch.weights_BxT, 0.0)
        routes_BxTxLxK = rollouts.routes_BxTxLxK if replay else None
        x_BxTxD = model.batch_hidden(params, batch, adapt=adapt, remat=remat, routes_BxTxLxK=routes_BxTxLxK)
        nll_BxT = model.token_nll(params, x_BxTxD, batch.targets_BxT, adapt)
        held_BxT = jax.lax.stop_gradient(nll_BxT)
        difference_BxT = jnp.where(weights_BxT > 0, -held_BxT - rollouts.serve_logps_BxT, 0.0)
        ratio_BxT = jnp.minimum(jnp.exp(difference_BxT), max_ratio) if importance else jnp.ones_like(held_BxT)
        targets = jnp.sum(weights_BxT)
        loss_sum = jnp.sum(weights_BxT * rollouts.advantages_BxT * ratio_BxT * nll_BxT)
        return (
            loss_sum,
            targets,
            PolicySums(
                nll=jnp.sum(weights_BxT * held_BxT),
                targets=targets,
                target_bytes=jnp.sum(jnp.where(weights_BxT > 0, batch.target_bytes_BxT, 0)).astype(jnp.float32),
                unmapped=jnp.sum((batch.weights_BxT > 0) & ~mapped_BxT).astype(jnp.float32),
                difference=jnp.sum(jnp.abs(difference_BxT)),
                largest_difference=jnp.max(jnp.abs(difference_BxT)),
            ),
        )

    return objective
