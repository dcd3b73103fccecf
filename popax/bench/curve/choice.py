"""Which learning rate a method is judged at: for each user, the one that suits the other users."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class Choice(NamedTuple):
    """One method. rate_U: the factor on its learning rate that each user is scored at.

    gain_S, lost_S: bits per byte that a user's own adapter saves and another user's costs, the mean over users, of each
    seed. own_S: what is saved at the method's own rate, None where that was not tried.
    """

    bytes: int
    rate_U: np.ndarray
    gain_S: np.ndarray
    lost_S: np.ndarray
    own_S: np.ndarray | None

    @property
    def rate(self) -> float:
        """The rate of most users, the lower of two."""
        rates, counts = np.unique(self.rate_U, return_counts=True)
        return float(rates[np.argmax(counts)])


def choices(rows: Sequence[dict[str, Any]]) -> dict[str, Choice]:
    """By method. A user's rate is the one at which the others gain most on their later text, over all seeds.

    So no user's own later text has a say in the rate at which it is scored. (The best step on a validation slice would
    not do: of noisier runs, which larger rates make, the best step looks better than it is.)
    """
    return {method: _choice([row for row in rows if row["method"] == method]) for method in _methods(rows)}


def _methods(rows: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["method"] for row in rows))


def _choice(rows: Sequence[dict[str, Any]]) -> Choice:
    rates, seeds = sorted({row["rate"] for row in rows}), sorted({row["seed"] for row in rows})
    table = {(row["rate"], row["seed"]): row for row in rows}
    gain_RxSxU, lost_RxSxU = (
        np.asarray([[table[rate, seed][name] for seed in seeds] for rate in rates]) for name in ("gains", "losses")
    )
    sums_RxU = gain_RxSxU.mean(axis=1)
    others_RxU = sums_RxU.sum(axis=1, keepdims=True) - sums_RxU
    at_U = np.argmax(others_RxU, axis=0)
    users = np.arange(len(at_U))
    own = rates.index(1.0) if 1.0 in rates else None
    return Choice(
        bytes=rows[0]["bytes"],
        rate_U=np.asarray(rates)[at_U],
        gain_S=gain_RxSxU[at_U, :, users].mean(axis=0),
        lost_S=lost_RxSxU[at_U, :, users].mean(axis=0),
        own_S=None if own is None else gain_RxSxU[own].mean(axis=1),
    )


def figures_of(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How many methods; of each the gain, its mean over seeds and their spread, and the gain at its own rate."""
    figures: dict[str, Any] = {"methods": len(_methods(rows))}
    for method, choice in choices(rows).items():
        figures[f"gain of {method}"] = float(np.mean(choice.gain_S))
        figures[f"spread of {method}"] = float(np.ptp(choice.gain_S))
        if choice.own_S is not None:
            figures[f"gain of {method} at its own rate"] = float(np.mean(choice.own_S))
    return figures
