"""Experts spread over a mesh: tokens are gathered where experts are, and the sums scattered back.

Tokens are cut over every axis of the ambient mesh (`jax.set_mesh`). The devices that share a cut of the other axes, and
differ in those that hold experts or parts of them, exchange tokens: an all-gather of the tokens, the local experts, a
reduce-scatter of the sums. An all-to-all would carry a token to its K experts' devices only, but a device has to make
room for all tokens choosing its experts either way (nothing is dropped), the host's compiler has no ragged all-to-all
to test it with, and the gather is the same for one as for many tokens. No axis but those of the experts is crossed, so
users who are spread over the mesh never meet.

Adapters' factors at the experts lie as the experts do. Those of users in training lie along the tokens' other axes as
well, where the users' tokens are; in a batch of mixed rows, a row may have any slot, and every device has all slots.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from popax.errors import ConfigError
from popax.modeling.experts import (
    Choice,
    ExpertWeights,
    Outputs,
    Values,
    experts_backward,
    experts_forward,
    padded,
)
from popax.modeling.quantised import Quantised, Weight, per_channel
from popax.sharding import ShardingRules
from popax.types import ExpertFactors

WEIGHT_AXES = ("expert", "embed", "expert_ffw")
USERS = "population"
EMBED_AXES = (1, 1, 2)  # where gate, up and down have their embed features


class Spread(NamedTuple):
    """Mesh axes: all that are wide, those that cut tokens and are not crossed, and those that cut the weights."""

    names: frozenset[str]
    outer: tuple[str, ...]
    expert: tuple[str, ...]
    embed: tuple[str, ...]
    ffw: tuple[str, ...]
    devices: int
    outer_sizes: tuple[int, ...]

    @property
    def gathered(self) -> tuple[str, ...]:
        """Axes over which tokens meet: experts, and parts of one expert's features, lie on different devices."""
        return (*self.expert, *self.ffw)

    @property
    def tokens(self) -> PartitionSpec:
        return PartitionSpec((*self.outer, *self.gathered))

    def slots(self, tokens: int, factors: ExpertFactors | None) -> tuple[str, ...]:
        """The axes along which slots are cut as their tokens are: a device then has its tokens' slots and no others.

        None where tokens are in any order of slots, or where a cut of the tokens may lie inside a slot's: then every
        device has the factors of all slots, for the experts it has.
        """
        if factors is None or not factors.in_order or tokens % self.devices:
            return ()
        slots, cut = jax.tree.leaves(factors)[0].shape[0], len(self.outer)
        while slots % math.prod(self.outer_sizes[:cut]):
            cut -= 1
        return self.outer[:cut]

    def factors(self, slots: tuple[str, ...]) -> PartitionSpec:
        """Experts lie where their weights do; the rank is whole everywhere."""
        return PartitionSpec(slots or None, self.expert or None, None, self.ffw or None)

    def weights(self, like: ExpertWeights) -> ExpertWeights:
        """A PartitionSpec for each array of `like`; the factor of a whole channel is cut along with channels only."""
        expert, embed, ffw = (names or None for names in (self.expert, self.embed, self.ffw))

        def specs(weight: Weight, rows: Any, columns: Any) -> Any:
            whole = PartitionSpec(expert, rows, columns)
            if not isinstance(weight, Quantised):
                return whole
            if per_channel(weight):
                return Quantised(whole, PartitionSpec(expert, None, columns))
            _check_groups(weight, rows or ())
            return Quantised(whole, whole)

        gate, up = (specs(weight, embed, ffw) for weight in (like.gate_ExDxF, like.up_ExDxF))
        return ExpertWeights(gate, up, specs(like.down_ExFxD, ffw, embed))


def _check_groups(weight: Quantised, axes: tuple[str, ...]) -> None:
    sizes = jax.sharding.get_abstract_mesh().shape
    groups, parts = weight.scales.shape[1], math.prod(sizes[name] for name in axes)
    if groups % parts:
        raise ConfigError(
            f"experts {weight.values.shape} quantised in {groups} groups of their input features are cut in {parts} "
            f"over {', '.join(axes)}: take smaller groups, or fewer devices there"
        )


def spread(rules: ShardingRules) -> Spread | None:
    """How the ambient mesh spreads experts; None where there is one device, or its axes are handled by a caller."""
    mesh = jax.sharding.get_abstract_mesh()
    free = [name for name, kind in zip(mesh.axis_names, mesh.axis_types) if kind != AxisType.Manual]
    wide = [name for name in free if mesh.shape[name] > 1]
    if not wide:
        return None
    by_axis = [(axes,) if isinstance(axes, str) else (axes or ()) for axes in rules.spec(WEIGHT_AXES, mesh)]
    expert, embed, ffw = (tuple(name for name in axes if name in wide) for axes in by_axis)
    # Users first: they are cut before the tokens of one are.
    outer = tuple(sorted((name for name in wide if name not in (*expert, *ffw)), key=lambda name: name != USERS))
    devices = math.prod(mesh.shape[name] for name in wide)
    return Spread(frozenset(free), outer, expert, embed, ffw, devices, tuple(mesh.shape[name] for name in outer))


def forward(
    values: Values, choice: Choice, weights: ExpertWeights, factors: ExpertFactors | None, rules: ShardingRules
) -> Outputs:
    """`experts_forward` on the ambient mesh, whose devices have the weights as the rules say."""
    mesh, tokens = spread(rules), values.x_MxD.shape[0]
    stretch = _stretch(tokens, factors)
    if mesh is None:
        return experts_forward(values, choice, weights, factors, stretch=stretch)
    values, choice = _fill(mesh, weights, values, choice)
    slots = mesh.slots(tokens, factors)

    def on_device(values, choice, weights, factors):
        own = _whole(weights, mesh)
        choice = _local_choice(_gather(choice, mesh), own, factors, mesh, slots)
        return _scatter(experts_forward(_gather(values, mesh), choice, own, factors, stretch=stretch), mesh)

    in_specs = (mesh.tokens, mesh.tokens, mesh.weights(weights), mesh.factors(slots))
    run = _per_device(on_device, mesh, in_specs, mesh.tokens)
    return jax.tree.map(lambda leaf: leaf[:tokens], run(values, choice, weights, factors))


def backward(
    values: Values,
    choice: Choice,
    weights: ExpertWeights,
    factors: ExpertFactors | None,
    cotangent: Outputs,
    rules: ShardingRules,
    *,
    trained: bool,
) -> tuple[Values, ExpertWeights | None, ExpertFactors | None]:
    """`experts_backward` on the ambient mesh."""
    mesh, tokens = spread(rules), values.x_MxD.shape[0]
    stretch = _stretch(tokens, factors)
    options = {"trained": trained, "stretch": stretch}
    if mesh is None:
        return experts_backward(values, choice, weights, factors, cotangent, **options)
    values, choice, cotangent = _fill(mesh, weights, values, choice, cotangent)
    slots = mesh.slots(tokens, factors)

    def on_device(values, choice, cotangent, weights, factors):
        own = _whole(weights, mesh)
        choice = _local_choice(_gather(choice, mesh), own, factors, mesh, slots)
        values, cotangent = _gather(values, mesh), _gather(cotangent, mesh)
        dvalues, dweights, dfactors = experts_backward(values, choice, own, factors, cotangent, **options)
        dweights = None if dweights is None else _reduced(dweights, mesh)
        # Devices that have other tokens of the same slots add up; those along the slots have slots of their own.
        others = tuple(name for name in mesh.outer if name not in slots)
        dfactors = jax.lax.psum(dfactors, others) if others else dfactors
        return _scatter(dvalues, mesh), dweights, dfactors

    specs = mesh.weights(weights)
    in_specs = (*(mesh.tokens,) * 3, specs, mesh.factors(slots))
    out_specs = (mesh.tokens, specs if trained else None, mesh.factors(slots))
    run = _per_device(on_device, mesh, in_specs, out_specs)
    dvalues, dweights, dfactors = run(values, choice, cotangent, weights, factors)
    return jax.tree.map(lambda leaf: leaf[:tokens], dvalues), dweights, dfactors


def _per_device(function, mesh: Spread, in_specs, out_specs):
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, axis_names=set(mesh.names), check_vma=False)


def _stretch(tokens: int, factors: ExpertFactors | None) -> int | None:
    """How many consecutive tokens have one slot; None where they are in any order."""
    return tokens // jax.tree.leaves(factors)[0].shape[0] if factors is not None and factors.in_order else None


def _fill(mesh: Spread, weights: ExpertWeights, *operands: Any) -> Any:
    """Tokens up to a multiple of the devices, those added being of no expert."""
    tokens, none = jax.tree.leaves(operands)[0].shape[0], weights.count
    return jax.tree.map(lambda operand: padded(operand, -tokens % mesh.devices, none), operands)


def _gather(operands: Any, mesh: Spread) -> Any:
    return jax.lax.all_gather(operands, mesh.gathered, tiled=True) if mesh.gathered else operands


def _scatter(partial: Any, mesh: Spread) -> Any:
    scattered = lambda leaf: jax.lax.psum_scatter(leaf, mesh.gathered, tiled=True)  # noqa: E731
    return jax.tree.map(scattered, partial) if mesh.gathered else partial


def _local_choice(
    choice: Choice, own: ExpertWeights, factors: ExpertFactors | None, mesh: Spread, slots: tuple[str, ...]
) -> Choice:
    """This device's numbers of the experts, and of the slots; the experts of others, and no expert, become `count`."""
    count = own.count
    first = jax.lax.axis_index(mesh.expert) * count if mesh.expert else 0
    local_MxK = choice.expert_MxK - first
    local_MxK = jnp.where((local_MxK >= 0) & (local_MxK < count), local_MxK, count).astype(jnp.int32)
    slot_Mx1 = choice.slot_Mx1
    if slot_Mx1 is not None and slots:
        slot_Mx1 = slot_Mx1 - jax.lax.axis_index(slots) * jax.tree.leaves(factors)[0].shape[0]
    return Choice(local_MxK, slot_Mx1)


def _whole(weights: ExpertWeights, mesh: Spread) -> ExpertWeights:
    """The experts of this device with all of their embed features, which other devices may keep."""
    if not mesh.embed:
        return weights

    def gather(weight: Weight, axis: int) -> Weight:
        if not isinstance(weight, Quantised):
            return jax.lax.all_gather(weight, mesh.embed, axis=axis, tiled=True)
        # In fewer bits, on the way as well; a factor for all input features is here already.
        here = axis == 1 and per_channel(weight)
        return Quantised(gather(weight.values, axis), weight.scales if here else gather(weight.scales, axis))

    return ExpertWeights(*(gather(w, axis) for w, axis in zip(weights, EMBED_AXES, strict=True)))


def _reduced(dweights: ExpertWeights, mesh: Spread) -> ExpertWeights:
    """Gradients of the weights over all tokens, each device keeping the part it has of the weights."""

    def reduce(dw: Weight, axis: int) -> Weight:
        assert not isinstance(dw, Quantised), "quantised experts are not trained"
        if mesh.embed:
            dw = jax.lax.psum_scatter(dw, mesh.embed, scatter_dimension=axis, tiled=True)
        others = tuple(name for name in mesh.outer if name not in mesh.embed)
        return jax.lax.psum(dw, others) if others else dw

    return ExpertWeights(*(reduce(dw, axis) for dw, axis in zip(dweights, EMBED_AXES, strict=True)))
