"""Adapters that PEFT keeps in a form of its own: DoRA, (IA)^3, prompts. A directory's tensors and its record."""

from typing import Any

import jax
import numpy as np

from popax.adapters.cohort import Cohort
from popax.adapters.peft_config import record_of
from popax.adapters.peft_layout import module_names
from popax.types import AdapterState

PREFIX = "base_model.model."


def native(
    cohort: Cohort, adapter: AdapterState, shared: AdapterState, base_name: str
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(tensors, adapter_config.json) of a method that has `AdapterMethod.peft`; tensors in the adapter's dtype.

    Raises PeftError where PEFT has no module for a site.
    """
    form = cohort.method.peft
    assert form is not None
    tensors, specs, changes = {}, cohort.specs, form.record(cohort.config)
    record = {"task_type": "CAUSAL_LM", "base_model_name_or_path": base_name, "inference_mode": True}
    if not form.whole:
        record = record_of(cohort.config, specs, base_name)  # which refuses sites without a module
    for name, spec in specs.items():
        own, common = (jax.tree.map(np.asarray, tree.get(name, {})) for tree in (adapter, shared))
        axes = cohort.axes()[name]
        for layer, rank in enumerate(spec.ranks):
            if not rank:
                continue
            at = lambda leaf, layer=layer, spec=spec: leaf[layer] if spec.info.layers else leaf  # noqa: E731
            state = {leaf: _cut(at(value), axes[leaf][-at(value).ndim :], rank) for leaf, value in own.items()}
            made = form.at_site(state, {leaf: at(value) for leaf, value in common.items()})
            before = "" if form.whole else f"{PREFIX}{module_names(spec.info)[layer]}."
            dtype = next(iter(own.values())).dtype
            tensors |= {before + key: np.ascontiguousarray(value.astype(dtype)) for key, value in made.items()}
    kept = {key: value for key, value in record.items() if key not in changes}
    return tensors, kept | {key: value for key, value in changes.items() if value is not None}


def _cut(leaf: np.ndarray, axes: tuple[str, ...], rank: int) -> np.ndarray:
    """Without what is beyond the layer's rank."""
    return leaf[tuple(slice(rank) if axis == "rank" else slice(None) for axis in axes)]
