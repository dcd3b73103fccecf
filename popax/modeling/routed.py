"""Routed experts as an operation of one user: its vmap folds users into tokens, its gradient skips frozen experts.

The experts' weights are everybody's. A vmap rule written out keeps them so: sorted copies of all users' tokens meet one
set of weights, where XLA's own rules would gather weights for each user. Users' factors become slots of one call, and
their tokens say which is theirs.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import SymbolicZero

from popax.modeling import expert_parallel
from popax.modeling.experts import Choice, ExpertWeights, Outputs, Values
from popax.sharding import ShardingRules
from popax.types import ExpertFactors


def routed_experts(
    values: Values,
    choice: Choice,
    weights: ExpertWeights,
    factors: ExpertFactors | None = None,
    rules: ShardingRules = ShardingRules(),  # noqa: B008 - frozen
) -> Outputs:
    """What the experts make of tokens, as `Outputs` says; on the ambient mesh, whose devices have the weights as the
    rules say. Differentiable in all but choice.

    factors: of adapters on the experts, with choice.slot_Mx1; a vmap over them folds users into slots.
    """
    return _routed_experts(values, choice, weights, factors, rules)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _routed_experts(values, choice, weights, factors, rules: ShardingRules) -> Outputs:
    return _forward(rules)(weights, factors, choice, values)


def _folded(function: Callable[..., Any], *, own_factors: bool) -> Callable[..., Any]:
    """function(weights, factors, choice, *tokens), whose vmapped users become further tokens, and slots, of one call.

    own_factors: each user has factors of their own even where a vmap gives all the same, since a result is theirs.
    """

    @custom_vmap
    def folded(weights, factors, choice, *tokens):
        return function(weights, factors, choice, *tokens)

    @folded.def_vmap
    def rule(axis_size, in_batched, *operands):
        if any(jax.tree.leaves(in_batched[0])):
            outputs = _one_by_one(folded, axis_size, tuple(in_batched), operands)
            return outputs, jax.tree.map(lambda _: True, outputs)
        weights, *rest = operands

        def full(leaf: jax.Array, batched: bool) -> jax.Array:
            return leaf if batched else jnp.broadcast_to(leaf, (axis_size, *leaf.shape))

        _, factors_batched, *rest_batched = in_batched
        factors, *rest = rest
        choice, *tokens = jax.tree.map(full, rest, rest_batched)
        if factors is not None and (own_factors or any(jax.tree.leaves(factors_batched))):
            factors = jax.tree.map(full, factors, factors_batched)
            choice = _own_slots(choice, jax.tree.leaves(factors)[0].shape[1])
            factors = _flat(factors)
        elif factors is not None:
            factors = dataclasses.replace(factors, in_order=False)
        outputs = folded(weights, factors, *map(_flat, (choice, *tokens)))
        outputs = jax.tree.map(lambda leaf: leaf.reshape(axis_size, -1, *leaf.shape[1:]), outputs)
        return outputs, jax.tree.map(lambda _: True, outputs)

    return folded


def _flat(tree: Any) -> Any:
    """[N, M, ...] -> [N M, ...]"""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), tree)


def _own_slots(choice: Choice, slots: int) -> Choice:
    """Slot s of user n becomes n slots + s; -1 stays."""
    slot_NxMx1 = choice.slot_Mx1
    assert slot_NxMx1 is not None
    first_N = jnp.arange(slot_NxMx1.shape[0], dtype=jnp.int32) * slots
    return choice._replace(slot_Mx1=jnp.where(slot_NxMx1 < 0, slot_NxMx1, slot_NxMx1 + first_N[:, None, None]))


def _each_alone(function: Callable[..., Any]) -> Callable[..., Any]:
    """function(*operands) whose outputs are sums over tokens: users go one after the other, each with theirs."""

    @custom_vmap
    def alone(*operands):
        return function(*operands)

    @alone.def_vmap
    def rule(axis_size, in_batched, *operands):
        outputs = _one_by_one(alone, axis_size, tuple(in_batched), operands)
        return outputs, jax.tree.map(lambda _: True, outputs)

    return alone


def _one_by_one(function: Callable[..., Any], axis_size: int, in_batched: Any, operands: Any) -> Any:
    def one(index: jax.Array) -> Any:
        return function(*jax.tree.map(lambda leaf, batched: leaf[index] if batched else leaf, operands, in_batched))

    return jax.lax.map(one, jnp.arange(axis_size, dtype=jnp.int32))


@functools.cache
def _forward(rules: ShardingRules) -> Callable[..., Outputs]:
    def forward(weights: ExpertWeights, factors: ExpertFactors | None, choice: Choice, values: Values) -> Outputs:
        return expert_parallel.forward(values, choice, weights, factors, rules)

    return _folded(forward, own_factors=False)


@functools.cache
def _backward(rules: ShardingRules, *, trained: bool) -> Callable[..., Any]:
    def gradients(weights, factors, choice, values, cotangent):
        return expert_parallel.backward(values, choice, weights, factors, cotangent, rules, trained=trained)

    return _each_alone(gradients) if trained else _folded(gradients, own_factors=True)


def _keep(values, choice, weights, factors, rules):
    trained = any(leaf.perturbed for leaf in jax.tree.leaves(weights, is_leaf=_is_primal))
    operands = (values, choice, weights, factors)
    values, choice, weights, factors = jax.tree.map(lambda primal: primal.value, operands, is_leaf=_is_primal)
    # What is static has to be in the structure of the residuals: an empty tuple or None.
    outputs = _forward(rules)(weights, factors, choice, values)
    return outputs, (values, choice, weights, factors, () if trained else None)


def _is_primal(leaf: Any) -> bool:
    return hasattr(leaf, "perturbed")


def _dense(leaf: Any) -> jax.Array:
    if not isinstance(leaf, SymbolicZero):
        return leaf
    aval: Any = leaf.aval
    return jnp.zeros(aval.shape, aval.dtype)


def _pull(rules, residuals, cotangent):
    values, choice, weights, factors, trained = residuals
    cotangent = jax.tree.map(_dense, cotangent, is_leaf=lambda leaf: isinstance(leaf, SymbolicZero))
    backward = _backward(rules, trained=trained is not None)
    dvalues, dweights, dfactors = backward(weights, factors, choice, values, cotangent)
    return dvalues, None, dweights, dfactors


_routed_experts.defvjp(_keep, _pull, symbolic_zeros=True)
