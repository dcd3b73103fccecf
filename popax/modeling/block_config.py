"""What a decoder block may hold instead of grouped-query attention and a dense MLP."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

import numpy as np

from popax.errors import ConfigError
from popax.types import ROUTE_DTYPE

Scoring = Literal["softmax", "sigmoid"]
Config = TypeVar("Config")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """A mixture of experts: every token goes to `experts_per_token` of `num_experts` MLPs of width `expert_ffw_dim`.

    shared_ffw_dim: width of the MLP that every token goes through as well; 0 for none. first_dense_layers: layers
    before the first mixture, which have a dense MLP of ModelConfig.ffw_dim. scoring: of the router's logits, over all
    experts ("softmax") or each by itself ("sigmoid"). normalize_top_k: the chosen experts' scores are divided by their
    sum. routed_scaling: a factor on them. num_groups, top_groups: experts are chosen from the `top_groups` of
    `num_groups` groups whose two best sum highest (DeepSeek-V3, arXiv 2412.19437). correction_bias: the choice, and
    nothing else, is made on scores plus a bias for each expert.
    """

    num_experts: int
    experts_per_token: int
    expert_ffw_dim: int
    shared_ffw_dim: int = 0
    first_dense_layers: int = 0
    scoring: Scoring = "softmax"
    normalize_top_k: bool = True
    routed_scaling: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    correction_bias: bool = False

    def __post_init__(self):
        check_whole(self, 1, "num_experts", "experts_per_token", "expert_ffw_dim", "num_groups", "top_groups")
        check_whole(self, 0, "shared_ffw_dim", "first_dense_layers")
        if self.num_experts > (most := np.iinfo(ROUTE_DTYPE).max):
            raise ConfigError(f"MoEConfig.num_experts={self.num_experts}: at most {most}, so that a route is int16")
        if self.scoring not in ("softmax", "sigmoid"):
            raise ConfigError(f"MoEConfig.scoring={self.scoring!r}: 'softmax' or 'sigmoid'")
        if not math.isfinite(self.routed_scaling):
            raise ConfigError(f"MoEConfig.routed_scaling={self.routed_scaling}: a finite number")
        if self.num_experts % self.num_groups or self.top_groups > self.num_groups:
            raise ConfigError(
                f"num_experts={self.num_experts}, num_groups={self.num_groups}, top_groups={self.top_groups}: groups "
                "are of equal size, and at most all of them are chosen"
            )
        group_size = self.num_experts // self.num_groups
        if self.num_groups > 1 and group_size < 2:
            raise ConfigError(f"num_groups={self.num_groups}: a group is ranked by its two best experts, it has one")
        if self.experts_per_token > group_size * self.top_groups:
            raise ConfigError(
                f"experts_per_token={self.experts_per_token}: the chosen groups have {group_size * self.top_groups}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLAConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values are linear in a small latent.

    q_latent_dim: of the queries' latent; None for queries straight from the input. kv_latent_dim: of the latent that
    keys and values share. A head's query and key have nope_head_dim features without positions and rope_head_dim with,
    the latter of one key for all heads; its value has v_head_dim. latent_norm_eps: of the norms of the latents, which
    the published models keep apart from ModelConfig.norm_eps.
    """

    kv_latent_dim: int
    nope_head_dim: int
    rope_head_dim: int
    v_head_dim: int
    q_latent_dim: int | None = None
    latent_norm_eps: float = 1e-6

    def __post_init__(self):
        check_whole(self, 1, "kv_latent_dim", "nope_head_dim", "rope_head_dim", "v_head_dim")
        if self.q_latent_dim is not None:
            check_whole(self, 1, "q_latent_dim")
        if self.rope_head_dim % 2:
            raise ConfigError(f"rope_head_dim={self.rope_head_dim}: RoPE rotates pairs, so it must be even")
        if not (math.isfinite(self.latent_norm_eps) and self.latent_norm_eps > 0):
            raise ConfigError(f"latent_norm_eps={self.latent_norm_eps}: a finite number above 0")


def check_whole(config: Any, least: int, *names: str) -> None:
    """Raises ConfigError where a field is no whole number of at least `least`."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigError(f"{type(config).__name__}.{name}={value!r}: a whole number of at least {least}")


def from_mapping(cls: type[Config], values: Config | Mapping[str, Any], what: str) -> Config:
    """The config itself, or made of a mapping of its fields, as gin and JSON give it."""
    if isinstance(values, cls):
        return values
    if not isinstance(values, Mapping):
        raise ConfigError(f"{what}={values!r}: {cls.__name__}, or a mapping of its fields")
    check_keys(cls, values, what)
    return cls(**values)


def check_keys(cls: Any, values: Mapping[str, Any], what: str) -> None:
    """Raises ConfigError where a key is not a field of the dataclass, or a field without a default has no key."""
    fields = {field.name: field.default is dataclasses.MISSING for field in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(fields))
    missing = [name for name, required in fields.items() if required and name not in values]
    if unknown or missing:
        raise ConfigError(f"{what}: unknown keys {unknown}, missing keys {missing}; its keys are {', '.join(fields)}")
