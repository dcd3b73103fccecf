"""What an objective is: a loss of one user, and the sums that reports are made of."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from popax.types import Adapt, Batch, Params

ExamplesT = TypeVar("ExamplesT")
SumsT = TypeVar("SumsT")


class Sums(NamedTuple):
    """Sums over supervised targets, so that batches, rows and devices add up: nats, targets, and their UTF-8 bytes."""

    nats: jax.Array
    targets: jax.Array
    target_bytes: jax.Array


def mean_of(nats_BxT: jax.Array, batch: Batch) -> tuple[jax.Array, Sums]:
    """(sum_t w_t nats_t / sum_t w_t, the sums) over a batch's supervised targets; 0 without any."""
    sums = Sums(
        nats=jnp.sum(nats_BxT * batch.weights_BxT),
        targets=jnp.sum(batch.weights_BxT),
        target_bytes=jnp.sum(jnp.where(batch.weights_BxT > 0, batch.target_bytes_BxT, 0)).astype(jnp.float32),
    )
    return sums.nats / jnp.maximum(sums.targets, 1.0), sums


class BoundedSums(NamedTuple):
    """As Sums; kl: of the distributions at the targets from the base's, in nats."""

    nats: jax.Array
    targets: jax.Array
    target_bytes: jax.Array
    kl: jax.Array


class PolicySums(NamedTuple):
    """Sums over sampled targets: nats, targets, target_bytes as in Sums, of those that have a record.

    unmapped: sampled targets that have none and left the loss. difference: sum of |log p in training - in serving|;
    largest_difference: the greatest of them, which does not add up.
    """

    nats: jax.Array
    targets: jax.Array
    target_bytes: jax.Array
    unmapped: jax.Array
    difference: jax.Array
    largest_difference: jax.Array


Objective = Callable[[Params, Adapt, ExamplesT], tuple[jax.Array, SumsT]]
