"""The words of an adapter: its configuration, and the sites it resolves to."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

from popax.errors import ConfigError, SiteError
from popax.types import SiteInfo, SiteKind

AlphaRule = Literal["rank", "sqrt_rank", "constant"]
ALPHA_RULES: tuple[AlphaRule, ...] = ("rank", "sqrt_rank", "constant")
DTYPES = ("float32", "bfloat16", "float16")
ALL_LINEAR = r"layers\.(?!.*\bexperts\.).*_proj"  # routed experts only where a rule asks for them


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetRule:
    """Sites whose name fully matches `pattern` get an adapter, with this rank and alpha where given.

    The pattern is tried on the site (`layers.attn.q_proj`) and on each layer's own name (`layers.3.attn.q_proj`),
    numbered in the model: layer 0 of a stack `dense_layers` is `layers.0.attn.q_proj`.
    rank 0 leaves the site alone, so that a rule can make an exception to a later one.
    """

    pattern: str
    rank: int | None = None
    alpha: float | None = None

    def __post_init__(self):
        if self.rank is not None and self.rank < 0:
            raise ConfigError(f"target {self.pattern!r}: rank={self.rank}; a rank is at least 1, or 0 for no adapter")
        if self.alpha is not None and not math.isfinite(self.alpha):
            raise ConfigError(f"target {self.pattern!r}: alpha={self.alpha} is not a finite number")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What a cohort shares: users whose configs are equal have adapters of equal shapes, which stack.

    rank, alpha, alpha_rule: the delta's scale is alpha/rank ("rank"), alpha/sqrt(rank) ("sqrt_rank",
    arXiv 2312.03732) or alpha ("constant"). init: "default" is the method's own start. dropout: the probability
    that a feature entering the adapter (never the base) is dropped in training. targets: the first rule that matches
    wins. options: what only this method has, {name: value}, kept as sorted pairs; the method checks them.
    """

    method: str = "lora"
    rank: int = 8
    alpha: float = 16.0
    alpha_rule: AlphaRule = "rank"
    init: str = "default"
    dropout: float = 0.0
    targets: tuple[TargetRule, ...] = (TargetRule(pattern=ALL_LINEAR),)
    dtype: str = "float32"
    options: Any = ()

    def __post_init__(self):
        try:
            pairs = tuple(sorted((str(name), value) for name, value in dict(self.options).items()))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"options={self.options!r}: {{name: value}} of what the method has") from error
        object.__setattr__(self, "options", pairs)
        targets = (self.targets,) if isinstance(self.targets, str) else self.targets
        object.__setattr__(self, "targets", tuple(_as_rule(rule) for rule in targets))
        if self.rank < 1:
            raise ConfigError(f"rank={self.rank}: a rank is at least 1")
        if not math.isfinite(self.alpha):
            raise ConfigError(f"alpha={self.alpha} is not a finite number")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype={self.dtype!r}: one of {', '.join(DTYPES)}")
        if self.alpha_rule not in ALPHA_RULES:
            raise ConfigError(f"alpha_rule={self.alpha_rule!r}: one of {', '.join(ALPHA_RULES)}")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"dropout={self.dropout}: a probability in [0, 1)")
        if not self.targets:
            raise ConfigError("targets is empty: name at least one site, for instance " + repr(ALL_LINEAR))

    def scale(self, rank: int, alpha: float) -> float:
        """The factor on the delta at a site of this rank and alpha."""
        return {"rank": alpha / rank, "sqrt_rank": alpha / math.sqrt(rank), "constant": alpha}[self.alpha_rule]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` reads them back. Without options there is no entry for them."""
        record = dataclasses.asdict(self) | {"targets": [dataclasses.asdict(rule) for rule in self.targets]}
        del record["options"]
        return record | ({"options": dict(self.options)} if self.options else {})

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "AdapterConfig":
        """Raises ConfigError on a key that no AdapterConfig has."""
        unknown = sorted(set(record) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ConfigError(f"unknown adapter config keys {unknown}; was it written by a newer popax?")
        return cls(**record)


def _as_rule(rule: "TargetRule | str | Mapping[str, Any]") -> TargetRule:
    if isinstance(rule, str):
        return TargetRule(pattern=rule)
    if isinstance(rule, TargetRule):
        return rule
    try:
        return TargetRule(**rule)
    except TypeError as error:
        raise ConfigError(f"target {dict(rule)}: its keys are pattern, rank and alpha ({error})") from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiteSpec:
    """A site with the cohort's rank and scale at each of its layers (one entry where the site is not layered).

    Arrays are as wide as the largest rank; columns beyond a layer's own rank are zero and stay zero.
    """

    info: SiteInfo
    ranks: tuple[int, ...]
    scales: tuple[float, ...]

    @property
    def rank(self) -> int:
        return max(self.ranks)


def resolve(
    config: AdapterConfig,
    sites: Mapping[str, SiteInfo],
    *,
    width: Callable[[int, int, int], int] = lambda rank, d_in, d_out: rank,
    scaled: bool = True,
    kind: SiteKind = "linear",
) -> dict[str, SiteSpec]:
    """The sites this config adapts, in the model's order.

    width(rank, d_in, d_out): the rank of the method's arrays, where it is not the config's. scaled: whether alpha is
    the method's to use; its scale is 1 where not. kind: of the sites that it acts on, the only ones that count; the
    default targets are then all of them.

    Raises SiteError where a rule matches no site, or only sites that an earlier rule takes, or where every rule is an
    exception; ConfigError where the rank exceeds a site's dimensions.
    """
    if kind != "linear" and config.targets == (TargetRule(pattern=ALL_LINEAR),):
        config = dataclasses.replace(config, targets=(TargetRule(pattern=".*"),))
    sites = {name: info for name, info in sites.items() if info.kind == kind}
    used = [False] * len(config.targets)
    specs = {}
    for name, info in sites.items():
        ranks, scales = [], []
        for concrete in _layer_names(info):
            rank, alpha = _first_match(config, (name, concrete), used)
            rank = width(rank, info.d_in, info.d_out) if rank else 0
            if rank > min(info.d_in, info.d_out):
                raise ConfigError(f"rank {rank} at {concrete} exceeds its {info.d_in} x {info.d_out} matrix")
            ranks.append(rank)
            scales.append((config.scale(rank, alpha) if scaled else 1.0) if rank else 0.0)
        if any(ranks):
            specs[name] = SiteSpec(info=info, ranks=tuple(ranks), scales=tuple(scales))
    for rule, was_used in zip(config.targets, used, strict=True):
        if not was_used:
            raise SiteError(
                f"target {rule.pattern!r} matches no site that an earlier target leaves; the sites are: "
                + ", ".join(sites)
            )
    if not specs:
        raise SiteError(f"every target has rank 0: no site is adapted; the sites are: {', '.join(sites)}")
    return specs


def _layer_names(info: SiteInfo) -> list[str]:
    if not info.layers:
        return [info.name]
    rest = info.name.split(".", 1)[1]
    return [f"layers.{info.first_layer + layer}.{rest}" for layer in range(info.layers)]


def _first_match(config: AdapterConfig, names: tuple[str, ...], used: list[bool]) -> tuple[int, float]:
    for index, rule in enumerate(config.targets):
        if any(_fullmatch(rule.pattern, name) for name in names):
            used[index] = True
            rank = config.rank if rule.rank is None else rule.rank
            return rank, config.alpha if rule.alpha is None else rule.alpha
    return 0, 0.0


def _fullmatch(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise SiteError(f"target {pattern!r} is not a regular expression: {error}") from error
