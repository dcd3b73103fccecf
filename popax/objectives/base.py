"""What an objective is: the whole loss of one user, as sums over targets that micro-batches, rows and devices add."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from popax.types import Adapt, Batch, HParams, Params

ExamplesT = TypeVar("ExamplesT")
MetricsT = TypeVar("MetricsT")


class LossSums(NamedTuple):
    """Over supervised targets: nll, the sum of w_t (-log p(target_t)) in nats; targets, the sum of w_t; and the UTF-8
    bytes that they stand for."""

    nll: jax.Array
    targets: jax.Array
    target_bytes: jax.Array


# objective(params, adapt, batch, hparams) -> (loss_sum, weight_sum, metrics) or (loss_sum, weight_sum, metrics,
# per_token): what is minimised is loss_sum / weight_sum, both sums over ONE user's batch. params: the base. hparams:
# the user's own settings, None where nothing is trained. metrics: a pytree of sums, which `merged` puts together.
# per_token: what a caller of the objective wants of each token; training does not look at it.
Objective = Callable[[Params, Adapt, ExamplesT, HParams | None], tuple[Any, ...]]


def loss_sums(nll_BxT: jax.Array, batch: Batch) -> LossSums:
    """The sums over a batch's supervised targets of what each costs."""
    return LossSums(
        nll=jnp.sum(nll_BxT * batch.weights_BxT),
        targets=jnp.sum(batch.weights_BxT),
        target_bytes=jnp.sum(jnp.where(batch.weights_BxT > 0, batch.target_bytes_BxT, 0)).astype(jnp.float32),
    )


def mean_loss(loss_sum: jax.Array, weight_sum: jax.Array) -> jax.Array:
    """loss_sum / weight_sum, and 0 for a batch without targets."""
    return jnp.where(weight_sum > 0, loss_sum / jnp.where(weight_sum > 0, weight_sum, 1.0), 0.0)


def mean_of(objective: Objective) -> Callable[..., tuple[jax.Array, Any]]:
    """(params, adapt, batch, hparams=None) -> (loss_sum / weight_sum, metrics), for `value_and_grad(has_aux=True)`."""

    def mean(params: Params, adapt: Adapt, batch: Any, hparams: HParams | None = None) -> tuple[jax.Array, Any]:
        loss_sum, weight_sum, metrics, *_ = objective(params, adapt, batch, hparams)
        return mean_loss(loss_sum, weight_sum), metrics

    return mean


def merged(left: MetricsT, right: MetricsT) -> MetricsT:
    """The metrics of two parts of a batch: `left.merged(right)` where they have such a method, else leaf by leaf the
    sum."""
    own = getattr(left, "merged", None)
    return jax.tree.map(jnp.add, left, right) if own is None else own(right)


def targets_of(examples: Any) -> jax.Array:
    """The sum of the weights of every batch of tokens in what an objective is given; 1 where there is none."""
    batches = jax.tree.leaves(examples, is_leaf=lambda node: isinstance(node, Batch))
    weights = [jnp.sum(one.weights_BxT) for one in batches if isinstance(one, Batch)]
    return jnp.maximum(sum(weights, jnp.zeros(())), 1.0) if weights else jnp.ones(())
