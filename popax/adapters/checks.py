"""What a method cannot do at the sites that a config names."""

from collections.abc import Mapping

from popax.adapters.base import AdapterConfig, SiteSpec
from popax.adapters.method import AdapterMethod
from popax.adapters.table import METHODS
from popax.errors import ConfigError


def check_experts(config: AdapterConfig, method: AdapterMethod, specs: Mapping[str, SiteSpec]) -> None:
    """Raises ConfigError where sites are routed experts, and the method has no form there, or dropout none."""
    routed = [name for name, spec in specs.items() if spec.info.experts]
    if routed and method.experts is None:
        able = ", ".join(name for name, method in METHODS.items() if method.experts is not None)
        raise ConfigError(
            f"method={config.method!r} has no form at routed experts ({', '.join(routed)}): leave them out of the "
            f"targets, or use a method that has one ({able})"
        )
    after = [name for name in routed if specs[name].info.hidden_side == "out"]
    if after and config.dropout:
        raise ConfigError(
            f"dropout={config.dropout} at {', '.join(after)}: the features inside routed experts cannot be dropped: "
            "set dropout to 0, or give these targets rank 0"
        )
