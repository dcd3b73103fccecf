"""Routed experts as an operation of one user: its vmap folds users into tokens, its gradient skips frozen experts.

The experts' weights are everybody's. A vmap rule written out keeps them so: sorted copies of all users' tokens meet one
set of weights, where XLA's own rules would gather weights for each user.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import SymbolicZero

from popax.modeling import expert_parallel
from popax.modeling.experts import ExpertWeights
from popax.sharding import ShardingRules


def routed_experts(
    x_MxD: jax.Array,
    expert_MxK: jax.Array,
    weight_MxK: jax.Array,
    weights: ExpertWeights,
    rules: ShardingRules = ShardingRules(),  # noqa: B008 - frozen
) -> jax.Array:
    """y[m] = sum_k weight[m, k] mlp_{expert[m, k]}(x[m]), [M, D] in x's dtype; on the ambient mesh, whose devices have
    the weights as the rules say."""
    return _routed_experts(x_MxD, expert_MxK, weight_MxK, weights, rules)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _routed_experts(x_MxD, expert_MxK, weight_MxK, weights: ExpertWeights, rules: ShardingRules) -> jax.Array:
    return _forward(rules)(weights, x_MxD, expert_MxK, weight_MxK)


def _over_tokens(function: Callable[..., Any]) -> Callable[..., Any]:
    """function(weights, *tokens) -> arrays with tokens first; vmapped users become further tokens of one call."""

    @custom_vmap
    def folded(weights, *tokens):
        return function(weights, *tokens)

    @folded.def_vmap
    def rule(axis_size, in_batched, weights, *tokens):
        weights_batched, *tokens_batched = in_batched
        if any(jax.tree.leaves(weights_batched)):
            outputs = _one_by_one(folded, axis_size, (weights_batched, *tokens_batched), (weights, *tokens))
        else:
            full = [
                array if batched else jnp.broadcast_to(array, (axis_size, *array.shape))
                for array, batched in zip(tokens, tokens_batched, strict=True)
            ]
            outputs = folded(weights, *(array.reshape(-1, array.shape[-1]) for array in full))
            outputs = jax.tree.map(lambda leaf: leaf.reshape(axis_size, -1, leaf.shape[-1]), outputs)
        return outputs, jax.tree.map(lambda _: True, outputs)

    return folded


def _each_alone(function: Callable[..., Any]) -> Callable[..., Any]:
    """function(weights, *tokens) whose outputs are sums over tokens: users go one after the other, each with theirs."""

    @custom_vmap
    def alone(weights, *tokens):
        return function(weights, *tokens)

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
def _forward(rules: ShardingRules) -> Callable[..., Any]:
    def forward(weights: ExpertWeights, x_MxD: jax.Array, expert_MxK: jax.Array, weight_MxK: jax.Array) -> jax.Array:
        return expert_parallel.forward(x_MxD, expert_MxK, weight_MxK, weights, rules)

    return _over_tokens(forward)


@functools.cache
def _backward(rules: ShardingRules, *, trained: bool) -> Callable[..., Any]:
    def gradients(weights, x, expert, weight, dy):
        dx, dweight, dweights = expert_parallel.backward(x, expert, weight, weights, dy, rules, trained=trained)
        return (dx, dweight, dweights) if trained else (dx, dweight)

    return _each_alone(gradients) if trained else _over_tokens(gradients)


def _keep(x_MxD, expert_MxK, weight_MxK, weights, rules):
    values = jax.tree.map(lambda primal: primal.value, (x_MxD, expert_MxK, weight_MxK, weights), is_leaf=_is_primal)
    x, expert, weight, kernels = values
    trained = any(leaf.perturbed for leaf in jax.tree.leaves(weights, is_leaf=_is_primal))
    # What is static has to be in the structure of the residuals: an empty tuple or None.
    return _forward(rules)(kernels, x, expert, weight), (values, () if trained else None)


def _is_primal(leaf: Any) -> bool:
    return hasattr(leaf, "perturbed")


def _pull(rules, residuals, dy_MxD):
    (x_MxD, expert_MxK, weight_MxK, weights), trained = residuals
    if isinstance(dy_MxD, SymbolicZero):
        dy_MxD = jnp.zeros_like(x_MxD)  # y has x's shape and dtype
    if trained is None:
        dx_MxD, dweight_MxK = _backward(rules, trained=False)(weights, x_MxD, expert_MxK, weight_MxK, dy_MxD)
        return dx_MxD, None, dweight_MxK, None
    operands = (x_MxD, expert_MxK, weight_MxK, dy_MxD)
    dx_MxD, dweight_MxK, dweights = _backward(rules, trained=True)(weights, *operands)
    return dx_MxD, None, dweight_MxK, dweights


_routed_experts.defvjp(_keep, _pull, symbolic_zeros=True)
