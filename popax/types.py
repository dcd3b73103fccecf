"""The types that every floor speaks: a batch, a site, and what a model calls at a site.

Shape letters: N population, B batch, T tokens, L layers, D embed, R rank, V vocab, S slots.
"""

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

Params = dict[str, Any]  # nested dict of arrays: the base, or any model state
AdapterState = dict[str, dict[str, jax.Array]]  # site -> leaf -> [L, ...] (one user) or [N, L, ...] (population)

ROUTE_DTYPE = np.int16  # of recorded experts; MoEConfig sees to it that every expert's number fits
NOT_RECORDED = -1  # in the place of an expert: the token has no record, its experts are chosen anew


class Batch(NamedTuple):
    """One user's packed tokens. A population's batch has the same leaves with a leading N.

    tokens, targets: int32. weights: float32, 0 where the target carries no loss. positions: int32, restart at 0
    in every segment. segments: int32, 0 is padding; a token attends only to its own segment. target_bytes: int32,
    UTF-8 bytes that the target token stands for, so that nats become bits per byte.
    """

    tokens_BxT: jax.Array
    targets_BxT: jax.Array
    weights_BxT: jax.Array
    positions_BxT: jax.Array
    segments_BxT: jax.Array
    target_bytes_BxT: jax.Array


class Rollouts(NamedTuple):
    """What a model wrote, to be learnt from; a population's rollouts have the same leaves with a leading N.

    batch: weights are 1 on targets that were sampled. routes: int16, the experts that serving sent the *input* token to
    in each of L mixtures, K a token, NOT_RECORDED where unknown. serve_logps: float32, log p(target)
    as serving computed it, NaN where unknown. advantages: float32, of the target.
    """

    batch: Batch
    routes_BxTxLxK: jax.Array
    serve_logps_BxT: jax.Array
    advantages_BxT: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiteInfo:
    """One linear map of the model where an adapter may act: y = x W, W [layers, d_in, d_out] (layers = 0: unscanned).

    axes: the logical axes of W's (d_in, d_out), from which adapter shardings are derived. first_layer: the number in
    the model of the first of these layers; above 0 where another stack comes before.
    """

    name: str
    d_in: int
    d_out: int
    layers: int
    axes: tuple[str, str]
    first_layer: int = 0


class SiteFn(Protocol):
    """{site: y'} = fn(x, {site: y}): x [..., D_in] enters these sites, y [..., D_out] leaves each.

    Sites that share their input are named together, as q, k and v are, so that their adapters can be one launch.
    adapts(site): whether y' can differ from y there. Where it cannot, a model may do without making y.
    """

    def __call__(self, x: jax.Array, ys: dict[str, jax.Array]) -> dict[str, jax.Array]: ...

    def adapts(self, site: str) -> bool: ...


class Adapt(Protocol):
    """What a model is given beside its weights.

    `layers` is a pytree-callable whose leaves are [L, ...]; the model's layer scan slices it, and the slice is a
    SiteFn for the sites named `layers.*`. `dense_layers` is the same for the layers before the first mixture of
    experts, where a model has such a stack. `outer` is a SiteFn for every other site.
    """

    @property
    def dense_layers(self) -> Any: ...

    @property
    def layers(self) -> Any: ...

    @property
    def outer(self) -> Any: ...


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class NoAdapt:
    """The base alone: every site returns y unchanged. Both an Adapt and a SiteFn; a pytree without leaves."""

    @property
    def dense_layers(self) -> "NoAdapt":
        return self

    @property
    def layers(self) -> "NoAdapt":
        return self

    @property
    def outer(self) -> "NoAdapt":
        return self

    def __call__(self, x: jax.Array, ys: dict[str, jax.Array]) -> dict[str, jax.Array]:
        del x
        return ys

    def adapts(self, site: str) -> bool:
        del site
        return False


NO_ADAPT = NoAdapt()
