"""Hugging Face PEFT's adapter_config.json in popax's words, and the other way round; a Layout is what both mean."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from popax.adapters.base import ALL_LINEAR, AdapterConfig, SiteSpec, TargetRule, resolve
from popax.adapters.method import AdapterMethod
from popax.adapters.peft_layout import NO_ADAPTER, Layout, layout_of, module_names, short_name
from popax.adapters.table import METHODS, method_of
from popax.errors import ConfigError, PeftError, SiteError
from popax.types import SiteInfo

UNDERSTOOD = {
    *("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "exclude_modules"),
    *("layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "init_lora_weights", "bias"),
}
# Bookkeeping, settings of a run, and settings of a start that `init_lora_weights` does not select.
WITHOUT_EFFECT = {
    *("peft_version", "base_model_name_or_path", "revision", "task_type", "inference_mode", "auto_mapping"),
    *("megatron_core", "qalora_group_size", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    "runtime_config",
}
# Starts that leave the base as it is. The others (pissa, olora, corda, loftq, ...) subtract from its weights.
KEEPS_BASE = (True, False, None, "gaussian", "orthogonal", "eva")


def read_record(path: Path) -> tuple[dict[str, Any], AdapterMethod | None]:
    """(adapter_config.json, the method whose own kind it is, None of a LoRA), once popax can represent all it asks for.

    Raises PeftError.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PeftError(f"{path} does not exist: {path.parent} is not a PEFT directory") from None
    except (OSError, ValueError) as error:
        raise PeftError(f"{path} cannot be read: {error}") from error
    if not isinstance(record, dict):
        raise PeftError(f"{path} holds {type(record).__name__}, not an object")
    forms = {name: row.peft for name, row in METHODS.items() if row.peft is not None}
    own = next((name for name, form in forms.items() if form.claims(record)), None)
    if own is None and record.get("peft_type") != "LORA":
        kinds = [form.record(AdapterConfig(method=name)).get("peft_type", "LORA") for name, form in forms.items()]
        reads = ", ".join(sorted({"LORA", *kinds}))
        raise PeftError(f"{path}: peft_type={record.get('peft_type')!r}; popax reads {reads}")
    understood = UNDERSTOOD | (forms[own].understood if own is not None else frozenset())
    if record.get("bias", "none") != "none":
        raise PeftError(f"{path}: bias={record['bias']!r}; popax adapters have no biases")
    start = record.get("init_lora_weights", True)
    if not any(start is known or (isinstance(start, str) and start == known) for known in KEEPS_BASE):
        raise PeftError(
            f"{path}: init_lora_weights={start!r} may have changed the base's weights; save it from peft as a plain "
            "LoRA of the original base (save_pretrained(path_initial_model_for_weight_conversion=...))"
        )
    # peft's defaults for everything else are false or empty; only a key that asks for something is refused.
    asked = {key: record[key] for key in sorted(set(record) - understood - WITHOUT_EFFECT) if record[key]}
    if asked:
        raise PeftError(f"{path}: popax cannot represent " + ", ".join(f"{key}={asked[key]!r}" for key in asked))
    return record, None if own is None else METHODS[own]


def config_of(
    record: Mapping[str, Any], layout: Layout, sites: Mapping[str, SiteInfo], *, dtype: str, method: str = "lora"
) -> tuple[AdapterConfig, dict[str, SiteSpec]]:
    """The AdapterConfig that resolves to exactly this layout, and what it resolves to."""
    rank, alpha = record.get("r", 8), float(record.get("lora_alpha", 8))
    row = METHODS[method]
    try:
        config = AdapterConfig(
            method=method,
            rank=rank,
            alpha=alpha,
            alpha_rule="sqrt_rank" if record.get("use_rslora") else "rank",
            init="gaussian" if record.get("init_lora_weights") == "gaussian" else "default",
            dropout=float(record.get("lora_dropout", 0.0)),
            targets=_targets(layout, sites, (rank, alpha)),
            dtype=dtype,
        )
        specs = resolve(config, sites, width=row.width, scaled=row.scaled)
    except (ConfigError, SiteError, TypeError, ValueError) as error:
        raise PeftError(f"the PEFT config does not fit this model: {error}") from error

    def at(info: SiteInfo, rank: int, alpha: float) -> tuple[int, float]:
        if not rank:
            return 0, 0.0
        rank = row.width(rank, info.d_in, info.d_out)
        return rank, config.scale(rank, alpha) if row.scaled else 1.0

    wanted = {name: tuple(at(sites[name], *pair) for pair in layers) for name, layers in layout.items()}
    if {name: tuple(zip(spec.ranks, spec.scales, strict=True)) for name, spec in specs.items()} != wanted:
        raise PeftError(f"the PEFT config's layout {layout} cannot be written as target rules (popax bug)")
    return config, specs


def record_of(config: AdapterConfig, specs: Mapping[str, SiteSpec], base_name: str, times: int = 1) -> dict[str, Any]:
    """The adapter_config.json of a cohort's adapter, as LoRA. Raises PeftError where a site has no module name.

    times: how many times its own rank a method's factors have.
    """
    own_rule = times == 1 and method_of(config).scaled
    layout: Layout = {}
    for name, spec in specs.items():
        if not module_names(spec.info):
            raise PeftError(_no_place(spec.info))
        layout[name] = tuple(
            (rank * times, _lora_alpha(config if own_rule else None, rank * times, scale)) if rank else NO_ADAPTER
            for rank, scale in zip(spec.ranks, spec.scales, strict=True)
        )
    adapted = [pair for layers in layout.values() for pair in layers if pair[0]]
    rank = Counter(rank for rank, _ in adapted).most_common(1)[0][0]
    alpha = Counter(alpha for _, alpha in adapted).most_common(1)[0][0]
    infos = {name: spec.info for name, spec in specs.items()}
    record = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _plain(alpha),
        "use_rslora": own_rule and config.alpha_rule == "sqrt_rank",
        "lora_dropout": config.dropout,
        "init_lora_weights": "gaussian" if config.init == "gaussian" else True,
        "target_modules": sorted(_patterns(layout, infos, lambda pair: True if pair[0] else None)),
        "rank_pattern": _patterns(layout, infos, lambda pair: pair[0] if pair[0] not in (0, rank) else None),
        "alpha_pattern": _patterns(
            layout, infos, lambda pair: _plain(pair[1]) if pair[0] and pair[1] != alpha else None
        ),
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }
    if layout_of(record, infos) != layout:
        raise PeftError(f"the layout {layout} cannot be written as a PEFT config (popax bug)")
    return record


def _no_place(info: SiteInfo) -> str:
    if not info.experts:
        return f"site {info.name!r} has no module name in transformers; leave it out of the targets"
    return (
        f"site {info.name!r}: peft adapts routed experts as stacked parameters (target_parameters), gate and up in "
        "one, with both factors of each expert its own; popax does not write a shared factor out for each of "
        "them. Leave routed experts out of the targets of users who are to be extracted to peft"
    )


def _targets(layout: Layout, sites: Mapping[str, SiteInfo], default: tuple[int, float]) -> tuple[TargetRule, ...]:
    """Rules that do not overlap, so that their order says nothing: sites with the same layers share theirs."""
    groups: dict[tuple[tuple[int, float], ...], list[str]] = {}
    for name, layers in layout.items():
        groups.setdefault(layers if len(set(layers)) > 1 else layers[:1], []).append(name)
    rules = []
    for layers, names in groups.items():
        for pair in dict.fromkeys(pair for pair in layers if pair[0]):
            at = [layer for layer, other in enumerate(layers) if other == pair] if len(layers) > 1 else None
            rank = pair[0] if pair[0] != default[0] else None
            alpha = pair[1] if pair[1] != default[1] else None
            rules.extend(TargetRule(pattern=each, rank=rank, alpha=alpha) for each in _site_regexes(names, at, sites))
    return tuple(rules)


def _site_regexes(names: list[str], at: list[int] | None, sites: Mapping[str, SiteInfo]) -> Iterable[str]:
    """Regexes that match these sites and no other, at these layers or (None) at all."""
    linear = [name for name, info in sites.items() if info.layers and name.endswith("_proj")]
    if at is None and linear and set(linear) <= set(names):
        yield ALL_LINEAR
        names = [name for name in names if name not in linear]
    stacks: dict[tuple[str, int], list[str]] = {}
    for name in names:
        head, rest = name.split(".", 1) if sites[name].layers else ("", name)
        stacks.setdefault((head, sites[name].first_layer), []).append(re.escape(rest))
    for (head, first_layer), rests in stacks.items():
        # A layer's own name has its number in the model, whatever the stack.
        parts = [re.escape(head)] if head else []
        parts = parts if at is None else ["layers", _either([str(first_layer + layer) for layer in at])]
        yield r"\.".join([*parts, _either(rests)])


def _either(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"({'|'.join(words)})"


def _patterns(layout: Layout, infos: Mapping[str, SiteInfo], value_of) -> dict[str, Any]:
    """PEFT names -> values (None: no entry): a name's end where a site is uniform, else one whole name a layer.

    No two names fit one module, so that the order of a JSON object does not matter.
    """
    patterns = {}
    distinct = {name: {value_of(pair) for pair in layers} for name, layers in layout.items()}
    for name, layers in layout.items():
        modules, values = module_names(infos[name]), [value_of(pair) for pair in layers]
        short = short_name(infos[name], distinct) if len(distinct[name]) == 1 else None
        if short is not None:
            modules, values = [short], values[:1]
        patterns |= {module: value for module, value in zip(modules, values, strict=True) if value is not None}
    return patterns


def _lora_alpha(config: AdapterConfig | None, rank: int, scale: float) -> float:
    """The alpha from which peft computes this scale: alpha/r, or alpha/sqrt(r) with use_rslora.

    config: whose rule gave the scale, None where none did.
    """
    if config is None or config.alpha_rule == "constant":
        near = scale * rank
        candidates = (near, math.nextafter(near, -math.inf), math.nextafter(near, math.inf))
        return min(candidates, key=lambda alpha: abs(alpha / rank - scale))
    for alpha in (config.alpha, *(rule.alpha for rule in config.targets if rule.alpha is not None)):
        if config.scale(rank, alpha) == scale:
            return alpha
    raise PeftError(f"scale {scale} at rank {rank} is not this config's: resolve the config on the model's sites again")


def _plain(number: float) -> int | float:
    return int(number) if float(number).is_integer() else number
