"""The interface of a method: a NamedTuple of pure functions of ONE user at ONE layer of ONE site.

Layers and users are vmapped. Whatever a row leaves out is derived from what it has.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from popax.adapters.base import AdapterConfig
from popax.types import SiteKind

Leaves = dict[str, jax.Array]
Drop = Callable[[jax.Array], jax.Array]
TIED = "tied"  # the one entry of an adapter whose leaves belong to groups of sites


class SiteDims(NamedTuple):
    """The static sizes a method sees: one layer of one site. experts, hidden_side: as in `SiteInfo`.

    widest_in, widest_out: the largest of the cohort's sites, for arrays that sites of any shape cut from one.
    """

    d_in: int
    d_out: int
    rank: int
    experts: int = 0
    hidden_side: Literal["in", "out"] | None = None
    widest_in: int = 0
    widest_out: int = 0


class SiteBase(NamedTuple):
    """What a site's shared arrays are made of, at one layer: the base's own, the adapters' scale there (0 where none
    acts), and a key of that place, the same in every run. A hidden site has no weight: w is [0, 0]."""

    key: jax.Array
    w_DxF: jax.Array
    bias_F: jax.Array
    scale: jax.Array


class IndexedSite(NamedTuple):
    """What a method needs at one site for rows of different users: state leaves have a leading slot axis."""

    state: Leaves
    shared: Leaves
    scale: jax.Array
    y_BxTxF: jax.Array


class ExpertMethod(NamedTuple):
    """A method at the experts of a mixture, for one user (slot None) or for rows of different users.

    With slots, state leaves have a leading slot axis and slot_B is each row's; -1 is the base only.

    own(state): the factors on the experts' own side, [E, R, F] or [S, E, R, F].
    before(state, scale, x_BxTxD, slot_B): the scaled product of x with the factor on the hidden side, [B, T, R].
    after(state, scale, low_BxTxR, y_BxTxD, slot_B): y plus the scaled product of low with the factor on the hidden
        side; slot -1 returns y's own bits.
    """

    own: Callable[[Leaves], jax.Array]
    before: Callable[..., jax.Array]
    after: Callable[..., jax.Array]


class MemoryForm(NamedTuple):
    """A method that remembers, for ONE user at ONE layer of ONE site.

    width(rank): how many float32 numbers the state of a text is.
    start(state): the float32 state [W] of a text of which nothing has been read.
    begin(state, memory_W): the state whose texts begin with this memory, in float32; of zeros: with none.
    tokens(state, shared, x_TxD): what is made of each token by itself, a pytree of [T, ...].
    step(memory_W, position, token): (the state after this token, what is read of the state before it [...]).
    output(state, shared, scale, read_Tx, y_TxD): y with what was read.
    """

    width: Callable[[int], int]
    start: Callable[[Leaves], jax.Array]
    begin: Callable[[Leaves, jax.Array], Leaves]
    tokens: Callable[[Leaves, Leaves, jax.Array], Any]
    step: Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, jax.Array]]
    output: Callable[[Leaves, Leaves, jax.Array, jax.Array, jax.Array], jax.Array]


class PeftForm(NamedTuple):
    """How PEFT keeps an adapter of a method that is no LoRA to it.

    record(config): what its adapter_config.json says otherwise than a LoRA's; None takes an entry out.
    at_site(state, shared): its tensors at one layer of a site, in numpy, by their names behind the module's; leaves
        have no columns beyond the layer's rank. whole: they are the whole model's, and no module's name is before them.
    leaves(tensors, shared): the inverse of at_site, but for `derived` leaves, which are zeros.
    claims(record): is a directory with this adapter_config.json of this kind? understood: its keys beside LoRA's.
    moved(record, module, tensors): the module and tensors that mean here what these do in PEFT.
    """

    record: Callable[[AdapterConfig], dict[str, Any]]
    at_site: Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]]
    leaves: Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]]
    claims: Callable[[Mapping[str, Any]], bool]
    understood: frozenset[str] = frozenset()
    moved: Callable[..., tuple[str, dict[str, Any]]] = lambda record, module, tensors: (module, tensors)
    whole: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoOptions:
    """A method that has none of its own."""


def nothing_shared(dims: SiteDims, mask_R: jax.Array, base: SiteBase, options: Any) -> Leaves:
    del dims, mask_R, base, options
    return {}


class AdapterMethod(NamedTuple):
    """A family of adapters. mask_R is 1 up to the layer's own rank and 0 beyond, scale is a scalar.

    Where a site has experts, the leaf with their own side's axis has the experts' axis before the others.

    name: the row's key in the table.
    state_axes, shared_axes: leaf -> logical axes; "in" and "out" stand for the base weight's own axes.
    init(key, dims, mask_R, config, options): one user's start. A tied method's: init(key, config, options), leaves
        [G, ...].
    delta(state, shared, scale, x, y, drop): the site's output for this user, in y's dtype; x [..., D], y [..., F];
        drop(x) is the dropout on what enters the adapter.
    inits: names AdapterConfig.init may take, mapped to "is the output equal to the base's at the start?".
    linear: is the delta linear in the state (mixing states mixes deltas)?
    learning_rate: where to begin, with Adam.
    shared(dims, mask_R, base, options): frozen arrays that all users share, made once from the base.
    indexed(sites, x_BxTxD, slot_B): delta for rows of different users, at sites that share x: an output for each
        IndexedSite; slot -1 returns y's own bits. None: every row takes its own state along.
    factors(state, shared): (a_RxD, b_RxF) with delta = scale * x a^T b. None: the delta is no such product of x alone;
        merge and norm then say what it is.
    merge(state, shared, scale, w_DxF, bias_F): (W', bias') whose output is the adapter's.
    norm(state, shared, scale): Frobenius norm of W' - W with the bias's change beside it.
    shrink(state, factor): the state whose norm is factor times this one's, 0 <= factor <= 1. None: there is none.
    refresh(state, shared, scale, w_DxF): the state with its `derived` leaves computed anew, after a step; they are
        functions of the others and of the base, and no gradient reaches them.
    width(rank, d_in, d_out): the rank of the arrays for a config's rank.
    scaled: does alpha apply? The scale is 1 where not.
    drops: does dropout apply? Some methods have nothing that features enter.
    makes_bias: can merge give a bias to a site without one?
    tied: leaves belong to groups of sites (`Options.groups`), and an adapter has the one entry TIED.
    options: the dataclass of `AdapterConfig.options`.
    variant(config): the row for this config, where starts or options have arrays of their own.
    kind: of the sites it acts on. acts(options, positions): bool, at which positions of a hidden site it does.
    rates(options): leaf -> factor on its learning rate, for those that have one.
    memory: of a hidden site, where what a token gets depends on the tokens before it; `delta` is then of whole texts.
    experts: the method at routed experts, None where it has no form there.
    peft: its form in a PEFT directory. None: as LoRA, where its delta is a product of factors.
    """

    name: str
    state_axes: dict[str, tuple[str, ...]]
    init: Callable[..., Leaves]
    delta: Callable[..., jax.Array]
    inits: dict[str, bool]
    linear: bool
    learning_rate: float
    shared_axes: dict[str, tuple[str, ...]] = {}  # noqa: RUF012 - never written
    shared: Callable[[SiteDims, jax.Array, SiteBase, Any], Leaves] = nothing_shared
    indexed: Callable[[tuple[IndexedSite, ...], jax.Array, jax.Array], tuple[jax.Array, ...]] | None = None
    factors: Callable[[Leaves, Leaves], tuple[jax.Array, jax.Array]] | None = None
    merge: Callable[..., tuple[jax.Array, jax.Array]] | None = None
    norm: Callable[..., jax.Array] | None = None
    shrink: Callable[[Leaves, jax.Array], Leaves] | None = None
    refresh: Callable[..., Leaves] | None = None
    derived: tuple[str, ...] = ()
    width: Callable[[int, int, int], int] = lambda rank, d_in, d_out: rank
    scaled: bool = True
    drops: bool = True
    makes_bias: bool = False
    tied: bool = False
    options: type = NoOptions
    variant: Callable[[AdapterConfig], "AdapterMethod"] | None = None
    kind: SiteKind = "linear"
    acts: Callable[[Any, jax.Array], jax.Array] = lambda options, positions: positions >= 0
    rates: Callable[[Any], Mapping[str, float]] = lambda options: {}
    memory: MemoryForm | None = None
    experts: ExpertMethod | None = None
    peft: PeftForm | None = None


def along_last(vector_F: jax.Array, like: jax.Array) -> jax.Array:
    """The vector in `like`'s dtype, with as many axes before it as `like` has."""
    return vector_F.astype(like.dtype).reshape((1,) * (like.ndim - 1) + (-1,))


def indexed_rows(
    method: AdapterMethod, sites: tuple[IndexedSite, ...], x_BxTxD: jax.Array, slot_B: jax.Array
) -> tuple[jax.Array, ...]:
    """`AdapterMethod.indexed`: each row with its user's own state, gathered; slot -1 returns y's own bits."""
    if method.indexed is not None:
        return method.indexed(sites, x_BxTxD, slot_B)
    return tuple(_gathered(method.delta, site, x_BxTxD, slot_B) for site in sites)


def _gathered(delta: Callable[..., jax.Array], site: IndexedSite, x_BxTxD: jax.Array, slot_B: jax.Array) -> jax.Array:
    one = lambda state, x, y: delta(state, site.shared, site.scale, x, y, lambda features: features)  # noqa: E731
    out_BxTxF = jax.vmap(one)(rows_of(site.state, slot_B), x_BxTxD, site.y_BxTxF)
    return jnp.where((slot_B >= 0)[:, None, None], out_BxTxF, site.y_BxTxF)


def rows_of(state: Leaves, slot_B: jax.Array) -> Leaves:
    """Each row's state [B, ...], of leaves [S, ...]; zeros where its slot is -1."""
    # Nobody's row takes no part in anybody's sums, forward or backward, whatever it and slot 0 hold.
    gathered_B = jax.tree.map(lambda leaf: leaf[jnp.maximum(slot_B, 0)], state)
    return jax.tree.map(lambda leaf: jnp.where(_wide(slot_B >= 0, leaf), leaf, jnp.zeros((), leaf.dtype)), gathered_B)


def _wide(own_B: jax.Array, leaf: jax.Array) -> jax.Array:
    return own_B.reshape(-1, *(1,) * (leaf.ndim - 1))
