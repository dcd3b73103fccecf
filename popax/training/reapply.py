"""An adapter carried over to another base without training: the same weight update, or the nearest that it has."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from popax.adapters.cohort import Cohort
from popax.errors import PopulationError
from popax.types import AdapterState


def reapplied(
    cohort: Cohort, old_shared: AdapterState, new_shared: AdapterState, adapters_N: Mapping[str, Any]
) -> tuple[dict[str, Any], np.ndarray]:
    """(adapters [N, L, ...] for the new base, float64 [N]: ||W' - W|| / ||W|| of their whole weight update).

    A method that shares nothing with the base (lora) keeps its factors: the update is the same, the error 0. lora_xs
    owns a core C between factors A, B of the base's own weights: C' minimises ||A'^T C'^T B' - A^T C^T B||_F, which is
    C'^T = (A' A'^T)^+ A' A^T C^T B B'^T (B' B'^T)^+. Raises PopulationError on a method that has no such rule.
    """
    if not cohort.method.shared_axes:
        count = len(next(iter(next(iter(adapters_N.values())).values())))
        return {site: dict(leaves) for site, leaves in adapters_N.items()}, np.zeros(count)
    if set(cohort.method.state_axes) != {"core"}:
        raise PopulationError(
            f"method={cohort.config.method!r} shares arrays with its base, and no rule carries it to another: train "
            "the users on the new base"
        )
    moved: dict[str, Any] = {}
    change_N, norm_N = np.zeros(()), np.zeros(())
    for spec in cohort.sites:
        name = spec.info.name
        core_N = np.asarray(adapters_N[name]["core"])
        a, b = (np.asarray(old_shared[name][leaf], np.float64) for leaf in ("a", "b"))
        other_a, other_b = (np.asarray(new_shared[name][leaf], np.float64) for leaf in ("a", "b"))
        inner_N = np.swapaxes(core_N.astype(np.float64), -1, -2)  # C^T
        left = np.linalg.pinv(other_a @ _t(other_a), hermitian=True) @ other_a @ _t(a)
        right = b @ _t(other_b) @ np.linalg.pinv(other_b @ _t(other_b), hermitian=True)
        new_N = left @ inner_N @ right
        scale_L = np.asarray(spec.scales if spec.info.layers else spec.scales[0], np.float64) ** 2
        axes = tuple(range(1, inner_N.ndim - 2))

        def over_layers(product_N: np.ndarray, scale_L=scale_L, axes=axes) -> np.ndarray:
            return (np.trace(product_N, axis1=-2, axis2=-1) * scale_L).sum(axis=axes)

        # ||A^T M B||^2 = tr(A A^T M B B^T M^T), and the same for the new one and between the two.
        old_N = over_layers(a @ _t(a) @ inner_N @ b @ _t(b) @ _t(inner_N))
        both_N = over_layers(other_a @ _t(a) @ inner_N @ b @ _t(other_b) @ _t(new_N))
        there_N = over_layers(other_a @ _t(other_a) @ new_N @ other_b @ _t(other_b) @ _t(new_N))
        change_N, norm_N = change_N + old_N + there_N - 2 * both_N, norm_N + old_N
        moved[name] = {"core": _t(new_N).astype(core_N.dtype)}
    error_N = np.sqrt(np.maximum(change_N, 0) / np.where(norm_N > 0, norm_N, 1))
    return moved, error_N


def _t(x: np.ndarray) -> np.ndarray:
    return np.swapaxes(x, -1, -2)
