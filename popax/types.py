"""The types that every floor speaks: a batch, a site, and what a model calls at a site.

Shape letters: N population, B batch, T tokens, L layers, D embed, R rank, V vocab, S slots.
"""

import dataclasses
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
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


class HParams(NamedTuple):
    """One member's own settings, a scalar float32 array each; a population's have a leading N.

    learning_rate, b1, b2, eps, weight_decay: of the optimizer, which looks at those that it knows; None, before the
    member is made, is what the optimizer was made with. clip_norm: inf never
    clips. max_steps: int32, the member stops being active after so many. norm_budget: of the change of all weights
    together, which no step exceeds (popax.population.bounds), inf is none. kl_weight: of the divergence from the base,
    in an objective that measures one.
    """

    learning_rate: jax.Array
    b1: jax.Array | None
    b2: jax.Array | None
    eps: jax.Array | None
    weight_decay: jax.Array | None
    clip_norm: jax.Array
    max_steps: jax.Array
    norm_budget: jax.Array
    kl_weight: jax.Array


# "linear": y = x W. "hidden": what a block hands on, in and out alike; it has no weight. "embedding": the table of
# embeddings, where virtual tokens may have rows of their own (popax.modeling.virtual).
SiteKind = Literal["linear", "hidden", "embedding"]
EMBED = "embed"  # the site of kind "embedding"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiteInfo:
    """One place of the model where an adapter may act, most often a linear map y = x W, W [layers, d_in, d_out].

    layers = 0: outside of the stacks of layers. axes: the logical axes of W's (d_in, d_out), from which the shardings
    of adapters are derived. first_layer: the number in the model of the first of these layers; above 0 where another
    stack comes before. experts: above 0 where each of so many experts has a matrix of its own, W [layers, experts,
    d_in, d_out]; hidden_side is then the side of the features that all experts share, the model's hidden ones.
    """

    name: str
    d_in: int
    d_out: int
    layers: int
    axes: tuple[str, str]
    first_layer: int = 0
    experts: int = 0
    hidden_side: Literal["in", "out"] | None = None
    kind: SiteKind = "linear"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertFactors:
    """What the adapters of S slots have for each expert of a mixture: [S, E, R, F], None where no adapter acts.

    F is the experts' own width. The other factor of each, on the hidden side, is one for all experts: a token goes
    through it once, before it goes to experts (gate, up) or after it has come back from them (down).
    in_order: the tokens are S stretches of equal length, the first of slot 0, the next of slot 1, and so on.
    """

    gate: jax.Array | None
    up: jax.Array | None
    down: jax.Array | None
    in_order: bool = dataclasses.field(metadata={"static": True})


class ExpertTerms(NamedTuple):
    """What adapters give a mixture before its tokens go to experts.

    slot_BxT: int32, each token's slot of the factors, -1 for the base only. gate_BxTxR, up_BxTxR: the scaled product of
    x with the hidden-side factor of the token's slot, None where no adapter acts.
    """

    slot_BxT: jax.Array
    gate_BxTxR: jax.Array | None
    up_BxTxR: jax.Array | None
    factors: ExpertFactors


class SiteFn(Protocol):
    """{site: y'} = fn(x, {site: y}): x [..., D_in] enters these sites, y [..., D_out] leaves each.

    Sites that share their input are named together, as q, k and v are, so that their adapters can be one launch.
    adapts(site): whether y' can differ from y there. Where it cannot, a model may do without making y.
    hidden(site, x, positions, cache): (what a site of kind "hidden" makes of x [B, T, D], whose tokens are at these
    positions, the layer's cache with what is remembered of them); cache: a `popax.modeling.cache.CacheView`, or None.
    embedded(x, tokens): the embeddings x [B, T, D] of tokens [B, T], with those of virtual tokens in their places.
    has_virtual(batch): bool [batch], the rows that have virtual tokens.

    The experts of a mixture are sites of another kind, since their rows are sorted by expert. expert_terms(x, (gate,
    up, down)): what adapters give before, None where they act on none of the three. after_experts(down, low, y): y
    [B, T, D] with what they make of low [B, T, R], the sum over a token's experts of its weighted hidden features times
    factors.down.
    """

    def __call__(self, x: jax.Array, ys: dict[str, jax.Array]) -> dict[str, jax.Array]: ...

    def adapts(self, site: str) -> bool: ...

    def hidden(self, site: str, x_BxTxD: jax.Array, positions_BxT: jax.Array, cache: Any) -> tuple[jax.Array, Any]: ...

    def embedded(self, x_BxTxD: jax.Array, tokens_BxT: jax.Array) -> jax.Array: ...

    def has_virtual(self, batch: int) -> jax.Array: ...

    def expert_terms(self, x_BxTxD: jax.Array, sites: tuple[str, str, str]) -> ExpertTerms | None: ...

    def after_experts(self, site: str, low_BxTxR: jax.Array, y_BxTxD: jax.Array) -> jax.Array: ...


class Adapt(Protocol):
    """What a model is given beside its weights.

    `layers` is a pytree-callable whose leaves are [L, ...]; the model's layer scan slices it, and the slice is a
    SiteFn for the sites named `layers.*`. `dense_layers` is the same for the layers before the first mixture of
    experts, where a model has such a stack. `outer` is a SiteFn for every other site. `virtual_tokens`: how many a row
    may have in front of it. `memory`: how many numbers a layer remembers of a text, which a cache has to keep.
    """

    @property
    def virtual_tokens(self) -> int: ...

    @property
    def memory(self) -> int: ...

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
    def virtual_tokens(self) -> int:
        return 0

    @property
    def memory(self) -> int:
        return 0

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

    def hidden(self, site: str, x_BxTxD: jax.Array, positions_BxT: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        del site, positions_BxT
        return x_BxTxD, cache

    def embedded(self, x_BxTxD: jax.Array, tokens_BxT: jax.Array) -> jax.Array:
        del tokens_BxT
        return x_BxTxD

    def has_virtual(self, batch: int) -> jax.Array:
        return jnp.zeros(batch, bool)

    def expert_terms(self, x_BxTxD: jax.Array, sites: tuple[str, str, str]) -> None:
        del x_BxTxD, sites

    def after_experts(self, site: str, low_BxTxR: jax.Array, y_BxTxD: jax.Array) -> jax.Array:
        del site, low_BxTxR
        return y_BxTxD


NO_ADAPT = NoAdapt()
