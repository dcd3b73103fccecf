"""Which modules a Hugging Face PEFT config adapts, by peft's own rules of matching."""

import math
import re
from collections.abc import Mapping
from typing import Any

from popax.errors import PeftError
from popax.modeling.hf import hf_name
from popax.modeling.stacks import DENSE, MAIN
from popax.types import SiteInfo

# site -> (rank, alpha) at each layer (one entry outside the layer stack); rank 0 where there is no adapter
Layout = dict[str, tuple[tuple[int, float], ...]]

NO_ADAPTER = (0, 0.0)


def module_names(info: SiteInfo) -> list[str]:
    """transformers' module name of a site at each layer; empty where a site has none that peft could adapt."""
    if info.kind != "linear" or info.name.endswith(".router") or info.experts:  # no linear modules
        return []
    if not info.layers:
        return ["lm_head"] if info.name == "lm_head" else []
    kernel = info.name.replace(".", "/") + "/kernel"
    layers = range(info.first_layer, info.first_layer + info.layers)
    return [hf_name(kernel, layer).removesuffix(".weight") for layer in layers]


def short_name(info: SiteInfo, values: Mapping[str, set[Any]]) -> str | None:
    """The end of a site's module names that no site with another value shares; None where there is none.

    values: of every site that has one, over its layers. Layers of two stacks have the same names inside, and so have an
    MLP that is shared and one that is not, but for the word before the last.
    """
    *_, before, last = ("", *module_names(info)[0].split("."))
    stack, _, rest = info.name.partition(".")
    if before == "shared_experts" or (stack == DENSE and rest.startswith("mlp.")):
        return f"{before}.{last}"
    if stack == DENSE or info.first_layer:
        other = f"{MAIN if stack == DENSE else DENSE}.{rest}"
        return last if values.get(other) == values[info.name] else None
    return last


def layout_of(record: Mapping[str, Any], sites: Mapping[str, SiteInfo]) -> Layout:
    """Which modules a PEFT config adapts, with which rank and alpha, by peft's own rules of matching.

    target_modules: a regex for the whole name, or a list of names or their last parts, or "all-linear" (all but the
    head). rank_pattern, alpha_pattern: the first regex that matches the end of the name, from a dot on.
    """
    rank, alpha = _rank("r", record.get("r", 8)), _alpha("lora_alpha", record.get("lora_alpha", 8))
    ranks = {key: _rank(f"rank_pattern[{key!r}]", value) for key, value in _mapping(record, "rank_pattern").items()}
    alphas = {key: _alpha(f"alpha_pattern[{key!r}]", value) for key, value in _mapping(record, "alpha_pattern").items()}
    layout: Layout = {}
    try:
        for name, info in sites.items():
            layers = tuple(
                (_first_value(ranks, module, rank), _first_value(alphas, module, alpha))
                if _is_target(record, module)
                else NO_ADAPTER
                for module in module_names(info)
            )
            if any(rank for rank, _ in layers):
                layout[name] = layers
    except re.error as error:
        raise PeftError(f"a pattern of the PEFT config is not a regular expression: {error}") from error
    if not layout:
        raise PeftError(
            f"target_modules={record.get('target_modules')!r} names no module of this model; its sites are: "
            + ", ".join(sites)
        )
    return layout


def _is_target(record: Mapping[str, Any], module: str) -> bool:
    targets, excluded = record.get("target_modules"), record.get("exclude_modules")
    if not targets or not isinstance(targets, (str, list)):
        raise PeftError(f"target_modules={targets!r}: a list of module names, a regular expression or 'all-linear'")
    if excluded and is_named(excluded, module):
        return False
    if isinstance(targets, str):
        if record.get("layers_to_transform") is not None:
            raise PeftError("layers_to_transform needs target_modules to be a list, as in peft")
        return module != "lm_head" if targets.lower() == "all-linear" else is_named(targets, module)
    return is_named(targets, module) and _is_layer(record, module)


def is_named(patterns: str | list[str], module: str) -> bool:
    """Whether a regular expression for the whole name, or one of a list of names or their last parts, fits a module."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in patterns)


def _is_layer(record: Mapping[str, Any], module: str) -> bool:
    layers, stacks = record.get("layers_to_transform"), record.get("layers_pattern") or [r"[^.]*"]
    if layers is None or layers == []:
        return True
    for stack in [stacks] if isinstance(stacks, str) else stacks:
        # Without a pattern peft wants something before the stack's name, with one it does not; ours have `model.`.
        if match := re.match(rf"(?:^|.*?\.){stack}\.(?P<layer>\d+)\.", module):
            return int(match["layer"]) in (layers if isinstance(layers, list) else [layers])
    return False


def _first_value(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _mapping(record: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = record.get(key) or {}
    if not isinstance(value, dict):
        raise PeftError(f"{key}={value!r}: an object of name patterns")
    return value


def _rank(key: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise PeftError(f"{key}={value!r}: a rank is an integer of at least 1")
    return value


def _alpha(key: str, value: Any) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise PeftError(f"{key}={value!r}: an alpha is a finite number")
    return float(value)
