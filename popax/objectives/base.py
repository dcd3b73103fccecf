"""What an objective is: a loss of one user, and the sums that reports are made of."""

from collections.abc import Callable
from typing import NamedTuple

import jax

from popax.types import Adapt, Batch, Params


class Sums(NamedTuple):
    """Sums over supervised targets, so that batches, rows and devices add up: nats, targets, and their UTF-8 bytes."""

    nats: jax.Array
    targets: jax.Array
    target_bytes: jax.Array


Objective = Callable[[Params, Adapt, Batch], tuple[jax.Array, Sums]]
