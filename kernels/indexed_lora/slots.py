"""Which user's arrays a group of tokens gets."""

import jax
import jax.numpy as jnp


def take_slots(leaf_Sx: jax.Array, slot_G: jax.Array) -> jax.Array:
    """leaf[slot] for each group, [G, ...]; zeros where the slot is -1 or beyond the slots.

    Zeros, and not slot 0 masked afterwards: 0 * NaN is NaN, so a masked product would carry one user's non-finite
    values into the gradient of rows without an adapter, and such rows' activations into slot 0's gradient. Nor is an
    index beyond the slots clamped to the last one, which is somebody else's.
    """
    slots = leaf_Sx.shape[0]
    index_G = jnp.where(slot_G < 0, slots, slot_G)
    return leaf_Sx.at[index_G].get(mode="fill", fill_value=0)
