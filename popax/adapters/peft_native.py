"""Adapters that PEFT keeps in a form of its own: DoRA, (IA)^3, prompts. A directory's tensors and its record."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from popax.adapters.base import AdapterConfig
from popax.adapters.cohort import Cohort
from popax.adapters.method import AdapterMethod, PeftForm
from popax.adapters.peft_config import config_of, record_of
from popax.adapters.peft_layout import NO_ADAPTER, Layout, layout_of, module_names
from popax.errors import ConfigError, PeftError
from popax.types import EMBED, AdapterState, SiteInfo

PREFIX = "base_model.model."
Tensors = dict[str, np.ndarray]
AtLayers = dict[int, Tensors]  # of one site: tensors by their names behind the module's


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


def read_native(
    row: AdapterMethod,
    record: Mapping[str, Any],
    tensors: Tensors,
    sites: Mapping[str, SiteInfo],
    base: tuple[Callable[[str], Any], Callable[[str], Any]],
    dtype: str,
) -> tuple[AdapterConfig, AdapterState]:
    """The inverse of `native`. base: (weight, bias) of a site, as `Cohort.shared` takes them.

    Raises PeftError where the tensors are not those that the record and the model's sites ask for.
    """
    form = row.peft
    assert form is not None
    if form.whole:
        try:
            config = AdapterConfig(method=row.name, rank=record["num_virtual_tokens"], dtype=dtype)
        except (ConfigError, KeyError, TypeError) as error:
            raise PeftError(f"num_virtual_tokens={record.get('num_virtual_tokens')!r}: how many, 1 at least") from error
        found: dict[str, AtLayers] = {EMBED: {0: tensors}}
    else:
        layout, found = _by_site(form, record, layout_of(record, sites), tensors, sites)
        config, _ = config_of(record, layout, sites, dtype=dtype, method=row.name)
    cohort = Cohort.of(config, sites)
    shared = cohort.shared(lambda site: jnp.asarray(base[0](site)), lambda site: _array(base[1](site)))
    adapter = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), cohort.abstract())
    for name, spec in cohort.specs.items():
        for layer, rank in enumerate(spec.ranks):
            if rank:
                at = lambda leaf, layer=layer, spec=spec: leaf[layer] if spec.info.layers else leaf  # noqa: E731
                common = {leaf: np.asarray(at(value)) for leaf, value in shared.get(name, {}).items()}
                own = {leaf: at(value) for leaf, value in adapter[name].items()}
                cut = {leaf: _cut(value, cohort.axes()[name][leaf][-value.ndim :], rank) for leaf, value in own.items()}
                _check(name, form.at_site(cut, common), found[name][layer])
                for leaf, value in form.leaves(found[name][layer], common).items():
                    cut[leaf][...] = value
    return config, cohort.refreshed(jax.tree.map(jnp.asarray, adapter), shared, lambda site: jnp.asarray(base[0](site)))


def _by_site(
    form: PeftForm, record: Mapping[str, Any], layout: Layout, tensors: Tensors, sites: Mapping[str, SiteInfo]
) -> tuple[Layout, dict[str, AtLayers]]:
    """The layout in popax's sites, and the tensors of each layer of them."""
    places = {module: (name, at) for name, info in sites.items() for at, module in enumerate(module_names(info))}
    pairs = {
        module: layout[name][at] for module, (name, at) in places.items() if name in layout and layout[name][at][0]
    }
    ends = {name: next((module for module in pairs if name.startswith(f"{PREFIX}{module}.")), None) for name in tensors}
    unknown, missing = [name for name, end in ends.items() if end is None], sorted(set(pairs) - set(ends.values()))
    if unknown or missing:
        raise PeftError(
            f"the directory holds tensors of no module of its config: {', '.join(unknown[:4]) or 'none'}; and it lacks "
            f"those of {', '.join(missing[:4]) or 'none'}"
        )
    moved: dict[str, AtLayers] = {}
    layers: dict[str, list[tuple[int, float]]] = {}
    for module, pair in pairs.items():
        start = f"{PREFIX}{module}."
        own = {name.removeprefix(start): value for name, value in tensors.items() if ends[name] == module}
        there, own = form.moved(record, module, own)
        name, at = places[there]
        if at in moved.setdefault(name, {}):
            raise PeftError(f"{module} and {there} both have gains on what {there} puts out; popax keeps one of a site")
        moved[name][at] = own
        layers.setdefault(name, [NO_ADAPTER] * len(module_names(sites[name])))[at] = pair
    return {name: tuple(layers[name]) for name in sites if name in layers}, moved


def _check(name: str, wanted: Mapping[str, Any], found: Tensors) -> None:
    shapes = [{key: tuple(value.shape) for key, value in tree.items()} for tree in (found, wanted)]
    if shapes[0] != shapes[1]:
        raise PeftError(f"{name}: the directory has {shapes[0]}, this model and the config need {shapes[1]}")


def _array(value: Any) -> jax.Array | None:
    return None if value is None else jnp.asarray(value)
