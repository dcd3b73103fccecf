"""What the store refuses, whoever writes it: adapters with an entry that is not a finite number."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from popax.errors import NonFiniteError
from popax.store.codec import is_float
from popax.store.layout import LeafLayout, RowLayout, named_dtype
from popax.store.records import shown
from popax.trees import flatten_named

_NAMED = 3  # in a message; the error has all of them


def refuse_non_finite(layout: RowLayout, users: Sequence[str], rows: Sequence[np.ndarray], form: str = "") -> None:
    """Raises NonFiniteError naming each user of these packed rows whose row holds a NaN or an infinity, and where.

    form: what the rows have been through, for the message.
    """
    found = {user: leaf for user, row in zip(users, rows, strict=True) if (leaf := _broken_leaf(layout, row))}
    if not found:
        return
    some = list(found.items())[:_NAMED]
    named = ", ".join(f"user {shown(user)}: leaf {leaf!r}" for user, leaf in some)
    more = f" and {len(found) - len(some)} more users" if len(found) > len(some) else ""
    raise NonFiniteError(
        f"{named}{more}: entries that are not finite numbers{form}; nothing of this commit was written. Leave them out "
        "and commit the others; what made them (a training step, a file, a sum) has to be mended, and these users keep "
        "the revision they have",
        list(found),
    )


def refuse_nan(tree: Mapping[str, Any], user: str) -> None:
    """Raises NonFiniteError where an optimizer's state holds a NaN; some keep an infinity for what is not known yet."""
    for name, leaf in flatten_named(tree).items():
        array = np.asarray(leaf)
        if not np.issubdtype(array.dtype, np.integer) and array.dtype != bool and np.isnan(array).any():
            raise NonFiniteError(
                f"user {shown(user)}: the optimizer's state {name!r} holds NaN; nothing of this commit was written. "
                "Commit the adapter without it, and the next run begins with a fresh one",
                [user],
            )


def _broken_leaf(layout: RowLayout, row: np.ndarray) -> str | None:
    dtypes = {leaf.dtype for leaf in layout.leaves}
    first = layout.leaves[0]
    if len(dtypes) == 1 and is_float(first):  # the padding is zero: the row is one array
        whole = row.view(named_dtype(first.dtype).newbyteorder("<"))
        if np.isfinite(whole).all():
            return None
    return next((leaf.name for leaf in layout.leaves if is_float(leaf) and not _finite(leaf, row)), None)


def _finite(leaf: LeafLayout, row: np.ndarray) -> bool:
    raw = row[leaf.offset : leaf.offset + leaf.nbytes]
    return bool(np.isfinite(raw.view(named_dtype(leaf.dtype).newbyteorder("<"))).all())
