"""The programs of a plan as abstract calls: what runs in training and generation, shapes and shardings for data."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from popax.adapters.apply import bind_slots
from popax.adapters.cohort import Cohort
from popax.modeling.cache import init_cache
from popax.modeling.config import ModelConfig
from popax.modeling.model import Model
from popax.objectives.sft import sft
from popax.plan.config import PlanConfig, StepName
from popax.population.optimizer import constant
from popax.population.state import PopulationState, hparams, init_population, population_shardings
from popax.population.step import population_step
from popax.serving.generate import decode, prefill
from popax.serving.sampling import Sampling
from popax.sharding import ShardingRules
from popax.types import AdapterState, Batch

NO_END = -1


class AbstractStep(NamedTuple):
    """call(*operands.values()) under jax.jit: operands by kind, trees of jax.ShapeDtypeStruct with shardings.

    results: shardings of what call returns, None where it may lie anywhere; what the next call takes lies as it did.
    """

    call: Callable[..., Any]
    operands: dict[str, Any]
    donated: tuple[int, ...]
    results: Any


@dataclasses.dataclass(frozen=True)
class StepBuilder:
    """Makes the steps of one plan on one mesh."""

    config: PlanConfig
    model: Model
    mesh: Mesh

    @classmethod
    def of(cls, config: PlanConfig, model: ModelConfig, mesh: Mesh) -> "StepBuilder":
        return cls(config, Model(model), mesh)

    @functools.cached_property
    def cohort(self) -> Cohort:
        return Cohort.of(self.config.adapter, self.model.sites())

    def build(self, step: StepName) -> AbstractStep:
        own = dataclasses.replace(self, model=Model(self.model.config, self.config.sharding_rules(step)))
        return own._train() if step == "train" else own._serve(step)

    def _train(self) -> AbstractStep:
        config, rules = self.config, self.model.rules
        settings = hparams(learning_rate=1e-3, max_steps=1, clip_norm=1.0)
        keys = jax.ShapeDtypeStruct((config.users,), jax.random.key(0).dtype)
        state = jax.eval_shape(lambda keys: init_population(self.cohort, config.optimizer, keys, settings), keys)
        state = _placed(state, population_shardings(self.cohort, state, self.mesh, rules))
        shape = (config.users, config.rows, config.tokens)
        spec = rules.spec(("population", None, "sequence"), self.mesh)
        dtypes = dict.fromkeys(Batch._fields, jnp.int32) | {"weights_BxT": jnp.float32}
        batch = Batch(**{field: self._at(shape, dtype, spec) for field, dtype in dtypes.items()})
        objective = sft(self.model, remat=config.remat)
        spread = tuple(axis for axis in config.users_over if axis in self.mesh.shape)
        step = population_step(
            self.cohort,
            objective,
            config.optimizer,
            constant(),
            weight=self.model.site_weight,
            spmd_axis_name=spread,
        )

        def call(base, shared, adapters, optimizer, batch):
            return step(base, shared, PopulationState(**optimizer, adapters=adapters), batch)

        rest = {name: leaf for name, leaf in state._asdict().items() if name != "adapters"}
        operands = {
            "base": self._base(rules),
            "shared": self._shared(rules),
            "adapters": state.adapters,
            "optimizer": rest,
            "batch": batch,
        }
        return AbstractStep(call, operands, donated=(2, 3), results=(_shardings(state), None))

    def _serve(self, step: StepName) -> AbstractStep:
        """Each replica serves its rows from its own slots: the population axis is cut by hand, the others by XLA."""
        rules, replicated = self.model.rules, PartitionSpec()
        rows = self.config.decode_rows if step == "decode" else self.config.prefill_rows
        width = 1 if step == "decode" else self.config.prefill_tokens
        spread = rules.spec(("batch",), self.mesh)
        cache, cache_specs = self._cache(rows, rules)
        pool, pool_specs = self._pool(rules)
        requests = {
            "slot_B": self._at((rows,), jnp.int32, spread),
            "tokens": self._at((rows,) if step == "decode" else (rows, width), jnp.int32, spread),
            "positions": self._at((rows,) if step == "decode" else (rows, width), jnp.int32, spread),
            "keys_B": self._at((rows,), jax.random.key(0).dtype, spread),
        }

        def one_replica(base, shared, pool, cache, requests):
            adapt = bind_slots(self.cohort, pool, shared, requests["slot_B"])
            rest = (base, adapt, requests["tokens"], requests["positions"], cache, requests["keys_B"])
            if step == "decode":
                return decode(self.model, Sampling(), NO_END, *rest, jnp.int32(1))
            return prefill(self.model, Sampling(), *rest)

        operands = {
            "base": self._base(rules),
            "shared": self._shared(rules),
            "adapters": pool,
            "cache": cache,
            "batch": requests,
        }
        if self.mesh.shape["population"] == 1:
            return AbstractStep(one_replica, operands, donated=(3,), results=(None, _shardings(cache)))
        by_hand = functools.partial(jax.tree.map, lambda spec: _only(spec, "population"))
        own = PartitionSpec("population")
        call = jax.shard_map(
            one_replica,
            mesh=self.mesh,
            in_specs=(replicated, replicated, by_hand(pool_specs), by_hand(cache_specs), own),
            out_specs=(own, by_hand(cache_specs)),
            axis_names={"population"},
            check_vma=False,
        )
        return AbstractStep(call, operands, donated=(3,), results=(None, _shardings(cache)))

    def _base(self, rules: ShardingRules) -> Any:
        return _placed(self.model.abstract(), self.model.shardings(self.mesh, rules))

    def _shared(self, rules: ShardingRules) -> Any:
        """What all users of a method share, on every replica; its leaves lie as the base weight that they are from."""
        abstract = self.model.abstract()
        shared: AdapterState = jax.eval_shape(
            lambda params: self.cohort.shared(*self.model.site_arrays(params)), abstract
        )
        axes = self.cohort.axes(shared=True)
        return {
            site: {
                name: _at_sharding(leaf, rules.sharding(axes[site][name], self.mesh)) for name, leaf in leaves.items()
            }
            for site, leaves in shared.items()
        }

    def _pool(self, rules: ShardingRules) -> tuple[Any, Any]:
        """Adapters in slots, [L, S, ...] ([S, ...] outside the stack): each replica holds slots / replicas of them."""
        axes = self.cohort.axes()
        pool: dict[str, dict[str, Any]] = {}
        specs: dict[str, dict[str, Any]] = {}
        for site, leaves in self.cohort.abstract().items():
            pool[site], specs[site] = {}, {}
            for name, leaf in leaves.items():
                lead = int(self.cohort.layered[site])
                own = axes[site][name]
                shape = (*leaf.shape[:lead], self.config.slots, *leaf.shape[lead:])
                specs[site][name] = rules.spec((*own[:lead], "population", *own[lead:]), self.mesh)
                pool[site][name] = self._at(shape, leaf.dtype, specs[site][name])
        return pool, specs

    def _cache(self, rows: int, rules: ShardingRules) -> tuple[Any, Any]:
        """Rows as the batch is spread; heads as the base's kv heads where the cache keeps heads: [L, B, S, K, d]."""
        cache = jax.eval_shape(
            lambda: init_cache(self.model.config, rows, self.config.cache_length, memory=self.cohort.memory)
        )

        def spec_of(leaf: jax.ShapeDtypeStruct) -> PartitionSpec:
            heads = ("kv_heads", None) if leaf.ndim == 5 else (None,) * (leaf.ndim - 3)
            return rules.spec(("layers", "batch", "sequence", *heads), self.mesh)

        specs = jax.tree.map(spec_of, cache)
        return jax.tree.map(lambda leaf, spec: self._at(leaf.shape, leaf.dtype, spec), cache, specs), specs

    def _at(self, shape: tuple[int, ...], dtype: Any, spec: PartitionSpec) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self.mesh, spec))


def _shardings(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def _placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(_at_sharding, tree, shardings)


def _at_sharding(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _only(spec: PartitionSpec, axis: str) -> PartitionSpec:
    """The spec without its other axes."""
    return PartitionSpec(
        *(axis if axis in (entry if isinstance(entry, tuple) else (entry,)) else None for entry in spec)
    )
