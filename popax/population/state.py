"""The state of a population: one user's, with the population axis first on every leaf."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from popax.adapters.cohort import Cohort
from popax.adapters.masters import masters, stored
from popax.population.bounds import check_bounds
from popax.population.optimizer import Optimizer, settings_of
from popax.sharding import ShardingRules
from popax.types import AdapterState, HParams


class Best(NamedTuple):
    """The adapter at the user's best validation so far, and how many validations since have been no better.

    opt_state: the optimizer's at that moment; None where it is not kept.
    """

    adapter: AdapterState
    loss: jax.Array  # float32 nats per target
    step: jax.Array  # int32, at which it was taken
    checked: jax.Array  # int32, the step of the latest validation; -1 before the first
    stale: jax.Array  # int32
    opt_state: Any = None


class PopulationState(NamedTuple):
    """One member's state, or N members' with N first on every leaf: one `in_axes=0` fits any optimizer's state.

    An inactive member is an unused slot, a finished user or one that stopped early: its bytes do not change. skipped
    counts steps whose loss, gradient or update was not finite. best is None where early stopping is off.

    Adapters, the best one's too, are float32 masters (popax.adapters.masters), and the optimizer's state is float32,
    whatever dtype they are stored in.
    """

    step: jax.Array  # int32
    active: jax.Array  # bool
    adapters: AdapterState
    opt_state: Any
    hparams: HParams
    rng: jax.Array  # uint32 key data of the member's own stream
    skipped: jax.Array  # int32
    best: Best | None


def hparams(
    *,
    learning_rate: float,
    max_steps: int,
    clip_norm: float = float("inf"),
    norm_budget: float = float("inf"),
    kl_weight: float = 0.0,
    b1: float | None = None,
    b2: float | None = None,
    eps: float | None = None,
    weight_decay: float | None = None,
) -> HParams:
    """One user's settings as arrays; None is what the optimizer is made with, from `init_member` on.

    Raises ConfigError on a budget that is not above 0, and on a negative weight.
    """
    check_bounds(norm_budget, kl_weight)

    def array(number: float) -> jax.Array:
        return jnp.asarray(number, jnp.float32)

    def unless_none(number: float | None) -> jax.Array | None:
        return None if number is None else array(number)

    return HParams(
        learning_rate=array(learning_rate),
        b1=unless_none(b1),
        b2=unless_none(b2),
        eps=unless_none(eps),
        weight_decay=unless_none(weight_decay),
        clip_norm=array(clip_norm),
        max_steps=jnp.asarray(max_steps, jnp.int32),
        norm_budget=array(norm_budget),
        kl_weight=array(kl_weight),
    )


def init_member(
    cohort: Cohort,
    optimizer: Optimizer,
    key: jax.Array,
    settings: HParams,
    *,
    adapter: AdapterState | None = None,
    track_best: bool = False,
    save_optimizer_state: bool = False,
) -> PopulationState:
    """One user's state at step 0, fresh or from a given adapter (an earlier revision, or masters).

    save_optimizer_state: where the best adapter is tracked, so is the optimizer's state of that moment.
    """
    init_key, own_key = jax.random.split(key)
    settings = settings_of(optimizer, settings)
    adapter = masters(cohort.init(init_key) if adapter is None else adapter)
    with jax.numpy_dtype_promotion("standard"):  # optax's own arithmetic
        opt_state = optimizer(settings).init(adapter)
    return PopulationState(
        step=jnp.zeros((), jnp.int32),
        active=settings.max_steps > 0,
        adapters=adapter,
        opt_state=opt_state,
        hparams=settings,
        rng=jax.random.key_data(own_key),
        skipped=jnp.zeros((), jnp.int32),
        best=start_best(adapter, opt_state if save_optimizer_state else None) if track_best else None,
    )


def start_best(adapter: AdapterState, opt_state: Any = None) -> Best:
    """No validation yet: any finite loss is an improvement."""
    return Best(
        # A buffer of its own: the step donates the state, and no buffer can be donated twice.
        adapter=jax.tree.map(jnp.copy, adapter),
        loss=jnp.asarray(jnp.inf, jnp.float32),
        step=jnp.zeros((), jnp.int32),
        checked=jnp.full((), -1, jnp.int32),
        stale=jnp.zeros((), jnp.int32),
        opt_state=jax.tree.map(jnp.copy, opt_state),
    )


def init_population(
    cohort: Cohort,
    optimizer: Optimizer,
    keys_N: jax.Array,
    settings: HParams,
    *,
    track_best: bool = False,
    save_optimizer_state: bool = False,
) -> PopulationState:
    """N fresh members; settings' leaves are [N] or scalars shared by all."""
    population = keys_N.shape[0]
    settings = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (population,)), settings)

    def make(key: jax.Array, own: HParams) -> PopulationState:
        return init_member(
            cohort, optimizer, key, own, track_best=track_best, save_optimizer_state=save_optimizer_state
        )

    return jax.vmap(make)(keys_N, settings)


def empty_population(
    cohort: Cohort,
    optimizer: Optimizer,
    population: int,
    *,
    track_best: bool = False,
    save_optimizer_state: bool = False,
) -> PopulationState:
    """N unused slots: inactive, adapters zero."""
    unused = hparams(learning_rate=0.0, max_steps=0)
    fill = jax.eval_shape(
        lambda keys: init_population(
            cohort, optimizer, keys, unused, track_best=track_best, save_optimizer_state=save_optimizer_state
        ),
        jax.random.split(jax.random.key(0), population),
    )
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), fill)


def selected_adapters(state: PopulationState) -> AdapterState:
    """The adapter at the best validation where that is tracked, else the last one."""
    return state.adapters if state.best is None else state.best.adapter


def stored_adapters(cohort: Cohort, state: PopulationState) -> AdapterState:
    """What a user keeps: `selected_adapters` as they are stored."""
    return stored(cohort, selected_adapters(state))


def population_shardings(cohort: Cohort, state: PopulationState, mesh: Mesh, rules: ShardingRules) -> PopulationState:
    """A NamedSharding for every leaf: the population axis first, then what the base weight's own axes say.

    Optimizer leaves that stand at an adapter leaf's place with its shape follow it; all others shard over users only.
    """
    by_suffix = {}
    for site, leaves in cohort.axes().items():
        for name, axes in leaves.items():
            by_suffix[(site, name)] = (state.adapters[site][name].shape, ("population", *axes))

    def leaf_sharding(path: tuple[Any, ...], leaf: jax.Array):
        suffix = tuple(entry.key for entry in path[-2:] if isinstance(entry, jax.tree_util.DictKey))
        shape, axes = by_suffix.get(suffix, (None, ()))
        if shape != leaf.shape:
            axes = ("population",) + (None,) * (leaf.ndim - 1)
        return rules.sharding(axes, mesh)

    return jax.tree_util.tree_map_with_path(leaf_sharding, state)
