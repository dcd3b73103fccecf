"""What an adapter remembers of a text while it reads it: a state that every token may change for those after it.

A text begins at position 0, with the state its user's adapter gives it; packed rows and caches hold nothing that goes
from one text to another. The state after a token is what the next one finds: inside a step from the scan, and across
steps from the cache (`popax.modeling.cache`), which keeps it beside the token's keys and values.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from popax.adapters.method import Drop, Leaves, MemoryForm, rows_of


class Remembered(NamedTuple):
    """y: [T, F]. after: float32 [T, W], the state after each token, W as that of what was before."""

    y_TxF: jax.Array
    after_TxW: jax.Array


def read(
    form: MemoryForm,
    state: Leaves,
    shared: Leaves,
    scale: jax.Array,
    before_W: jax.Array,
    x_TxD: jax.Array,
    y_TxF: jax.Array,
    positions_T: jax.Array,
) -> Remembered:
    """Consecutive tokens of a row: each reads the state that those before it left, then changes it.

    before_W: the state after the token before the first of these, and whatever another's wider state has behind it. A
    token at position 0 begins a text; one at -1 is none, reads what it finds and leaves it as it is.
    """
    start_W = form.start(state)
    own = start_W.shape[0]

    def body(memory_W: jax.Array, each: tuple[jax.Array, Any]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        position, token = each
        memory_W = jnp.where(position == 0, start_W, memory_W)
        changed_W, found = form.step(memory_W, position, token)
        memory_W = jnp.where(position < 0, memory_W, changed_W)
        return memory_W, (found, memory_W)

    tokens = form.tokens(state, shared, x_TxD)
    _, (found, after_TxW) = jax.lax.scan(body, before_W[:own], (positions_T, tokens))
    after_TxW = jnp.pad(after_TxW, ((0, 0), (0, before_W.shape[0] - own)))
    return Remembered(form.output(state, shared, scale, found, y_TxF), after_TxW)


def one_text(form: MemoryForm) -> Callable[..., jax.Array]:
    """`AdapterMethod.delta` of a method that remembers: x [..., T, D] are texts from their beginnings."""

    def delta(state: Leaves, shared: Leaves, scale: jax.Array, x: jax.Array, y: jax.Array, drop: Drop) -> jax.Array:
        def text(x_TxD: jax.Array, y_TxF: jax.Array) -> jax.Array:
            positions_T = jnp.arange(x_TxD.shape[0], dtype=jnp.int32)
            return read(form, state, shared, scale, form.start(state), x_TxD, y_TxF, positions_T).y_TxF

        lead = x.shape[:-2]
        texts = jax.vmap(text)(drop(x).reshape(-1, *x.shape[-2:]), y.reshape(-1, *y.shape[-2:]))
        return texts.reshape(*lead, *y.shape[-2:])

    return delta


class Reader(NamedTuple):
    """A user's own state at one layer of a site, or those of S slots [S, ...]."""

    form: MemoryForm
    state: Leaves
    shared: Leaves
    scale: jax.Array


def recall_rows(
    reader: Reader,
    slot_B: jax.Array | None,
    before_BxW: jax.Array,
    features_BxTxD: jax.Array,
    y_BxTxD: jax.Array,
    positions_BxT: jax.Array,
    *,
    skips: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`popax.modeling.cache.Recall` of rows: of one user, or of each row's slot, -1 for none.

    features: y, after dropout. skips: do nothing where no row has a slot.
    """
    form, state, shared, scale = reader
    one = lambda state, *row: read(form, state, shared, scale, *row)  # noqa: E731
    rows = (before_BxW, features_BxTxD, y_BxTxD, positions_BxT)
    if slot_B is None:
        y_BxTxD, after_BxTxW = jax.vmap(one, in_axes=(None, 0, 0, 0, 0))(state, *rows)
        return y_BxTxD, after_BxTxW, jnp.ones(y_BxTxD.shape[0], bool)
    own_B = slot_B >= 0

    def with_memory() -> tuple[jax.Array, jax.Array]:
        own_BxTxD, after_BxTxW = jax.vmap(one)(rows_of(state, slot_B), *rows)
        return jnp.where(own_B[:, None, None], own_BxTxD, y_BxTxD), after_BxTxW

    def without_memory() -> tuple[jax.Array, jax.Array]:
        return y_BxTxD, jnp.zeros((*positions_BxT.shape, before_BxW.shape[1]), jnp.float32)

    y_BxTxD, after_BxTxW = jax.lax.cond(jnp.any(own_B), with_memory, without_memory) if skips else with_memory()
    return y_BxTxD, after_BxTxW, own_B
