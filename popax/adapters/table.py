"""The table of methods. A new one is its own small file and one row here; every test that loops over it follows."""

from popax.adapters import lora, lora_xs
from popax.adapters.base import AdapterConfig, AdapterMethod
from popax.errors import ConfigError

METHODS: dict[str, AdapterMethod] = {method.name: method for method in (lora.METHOD, lora_xs.METHOD)}


def method_of(config: AdapterConfig) -> AdapterMethod:
    """The row for this config. Raises ConfigError on an unknown method, or a start the method does not have."""
    if config.method not in METHODS:
        raise ConfigError(f"method={config.method!r} is unknown; the table has {', '.join(METHODS)}")
    method = METHODS[config.method]
    if config.init not in method.inits:
        raise ConfigError(f"init={config.init!r}: {method.name} has {', '.join(method.inits)}")
    return method
