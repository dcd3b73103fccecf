"""Experts spread over a mesh: tokens are gathered where experts are, and the sums scattered back.

Tokens are cut over every axis of the ambient mesh (`jax.set_mesh`). The devices that share a cut of the other axes, and
differ in those that hold experts or parts of them, exchange tokens: an all-gather of the tokens, the local experts, a
reduce-scatter of the sums. An all-to-all would carry a token to its K experts' devices only, but a device has to make
room for all tokens choosing its experts either way (nothing is dropped), the host's compiler has no ragged all-to-all
to test it with, and the gather is the same for one as for many tokens. No axis but those of the experts is crossed, so
users who are spread over the mesh never meet.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from popax.errors import ConfigError
from popax.modeling.experts import ExpertWeights, experts_backward, experts_forward
from popax.modeling.quantised import Quantised, Weight, per_channel
from popax.sharding import ShardingRules

WEIGHT_AXES = ("expert", "embed", "expert_ffw")
EMBED_AXES = (1, 1, 2)  # where gate, up and down have their embed features


class Spread(NamedTuple):
    """Mesh axes: all that are wide, those that cut tokens and are not crossed, and those that cut the weights."""

    names: frozenset[str]
    outer: tuple[str, ...]
    expert: tuple[str, ...]
    embed: tuple[str, ...]
    ffw: tuple[str, ...]
    devices: int

    @property
    def gathered(self) -> tuple[str, ...]:
        """Axes over which tokens meet: experts, and parts of one expert's features, lie on different devices."""
        return (*self.expert, *self.ffw)

    @property
    def tokens(self) -> PartitionSpec:
        return PartitionSpec((*self.outer, *self.gathered))

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
    outer = tuple(name for name in wide if name not in (*expert, *ffw))
    devices = 1
    for name in wide:
        devices *= mesh.shape[name]
    return Spread(frozenset(free), outer, expert, embed, ffw, devices)


def forward(
    x_MxD: jax.Array, expert_MxK: jax.Array, weight_MxK: jax.Array, weights: ExpertWeights, rules: ShardingRules
) -> jax.Array:
    """`experts_forward` on the ambient mesh, whose devices have the weights as the rules say."""
    mesh = spread(rules)
    if mesh is None:
        return experts_forward(x_MxD, expert_MxK, weight_MxK, weights)

    def on_device(x, expert, weight, weights):
        own = _whole(weights, mesh)
        expert = _local_ids(_gather(expert, mesh), own, mesh)
        return _scatter(experts_forward(_gather(x, mesh), expert, _gather(weight, mesh), own), mesh)

    tokens = mesh.tokens
    operands, cut = _fill(mesh, weights, x_MxD, expert_MxK, weight_MxK)
    run = _per_device(on_device, mesh, (tokens, tokens, tokens, mesh.weights(weights)), tokens)
    return run(*operands, weights)[:cut]


def backward(
    x_MxD: jax.Array,
    expert_MxK: jax.Array,
    weight_MxK: jax.Array,
    weights: ExpertWeights,
    dy_MxD: jax.Array,
    rules: ShardingRules,
    *,
    trained: bool,
) -> tuple[jax.Array, jax.Array, ExpertWeights | None]:
    """`experts_backward` on the ambient mesh."""
    mesh = spread(rules)
    if mesh is None:
        return experts_backward(x_MxD, expert_MxK, weight_MxK, weights, dy_MxD, trained=trained)

    def on_device(x, expert, weight, dy, weights):
        own = _whole(weights, mesh)
        expert = _local_ids(_gather(expert, mesh), own, mesh)
        x, weight, dy = (_gather(each, mesh) for each in (x, weight, dy))
        dx, dweight, dweights = experts_backward(x, expert, weight, own, dy, trained=trained)
        return _scatter(dx, mesh), _scatter(dweight, mesh), None if dweights is None else _reduced(dweights, mesh)

    tokens = mesh.tokens
    operands, cut = _fill(mesh, weights, x_MxD, expert_MxK, weight_MxK, dy_MxD)
    specs = mesh.weights(weights)
    out_specs = (tokens, tokens, specs if trained else None)
    run = _per_device(on_device, mesh, (*(tokens,) * len(operands), specs), out_specs)
    dx_MxD, dweight_MxK, dweights = run(*operands, weights)
    return dx_MxD[:cut], dweight_MxK[:cut], dweights


def _per_device(function, mesh: Spread, in_specs, out_specs):
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, axis_names=set(mesh.names), check_vma=False)


def _fill(mesh: Spread, weights: ExpertWeights, *operands: jax.Array) -> tuple[list[jax.Array], int]:
    """Tokens up to a multiple of the devices, those added being of no expert; and how many are real."""
    tokens = operands[0].shape[0]
    none = weights.count

    def pad(operand: jax.Array) -> jax.Array:
        value = none if jnp.issubdtype(operand.dtype, jnp.integer) else 0
        return jnp.pad(operand, ((0, -tokens % mesh.devices), (0, 0)), constant_values=value)

    return [pad(operand) for operand in operands], tokens


def _gather(operand: jax.Array, mesh: Spread) -> jax.Array:
    return jax.lax.all_gather(operand, mesh.gathered, tiled=True) if mesh.gathered else operand


def _scatter(partial: jax.Array, mesh: Spread) -> jax.Array:
    return jax.lax.psum_scatter(partial, mesh.gathered, tiled=True) if mesh.gathered else partial


def _local_ids(expert_MxK: jax.Array, own: ExpertWeights, mesh: Spread) -> jax.Array:
    """This device's numbers of the experts; theirs, and no expert, become `count`: none of these."""
    count = own.count
    first = jax.lax.axis_index(mesh.expert) * count if mesh.expert else 0
    local_MxK = expert_MxK - first
    return jnp.where((local_MxK >= 0) & (local_MxK < count), local_MxK, count).astype(expert_MxK.dtype)


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
