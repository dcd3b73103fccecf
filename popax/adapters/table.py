"""The table of methods. A new one is its own small file and one row here; every test that loops over it follows."""

from typing import Any

from popax.adapters import bias, conditioned, delta_mem, dora, ia3, lora, lora_xs, prompt, reft, svf, tiny_lora, vera
from popax.adapters.base import AdapterConfig
from popax.adapters.method import AdapterMethod
from popax.errors import ConfigError
from popax.named import is_reference, load_named

METHODS: dict[str, AdapterMethod] = {
    method.name: method
    for method in (
        lora.METHOD,
        dora.METHOD,
        lora_xs.METHOD,
        tiny_lora.METHOD,
        vera.METHOD,
        svf.METHOD,
        ia3.METHOD,
        bias.METHOD,
        reft.METHOD,
        prompt.METHOD,
        delta_mem.METHOD,
        conditioned.METHOD,
    )
}
# Every row that a config can come to, by a name for it: starts and options with arrays of their own are rows too.
ROWS: dict[str, AdapterConfig] = {
    **{name: AdapterConfig(method=name) for name in METHODS},
    **{f"lora/{start}": AdapterConfig(method="lora", init=start) for start in lora.STARTS},
    "svf/renormalise": AdapterConfig(method="svf", options={"renormalise": True}),
    "delta_mem/segments": AdapterConfig(method="delta_mem", options={"segment": 2, "states": 2, "keep": True}),
}


def method_of(config: AdapterConfig) -> AdapterMethod:
    """The row for this config. Raises ConfigError on an unknown method, and on a start or option it does not have."""
    method = row_of(config.method)
    if config.init not in method.inits:
        raise ConfigError(f"init={config.init!r}: {method.name} has {', '.join(method.inits)}")
    if config.dropout and not method.drops:
        raise ConfigError(f"dropout={config.dropout}: no feature enters a {method.name} adapter; set dropout to 0")
    options_of(config)
    return method if method.variant is None else method.variant(config)


def row_of(name: str) -> AdapterMethod:
    """The table's row of this name, or the AdapterMethod that a "module:name" of one's own names. Raises ConfigError.

    A revision keeps the name: whoever reads it needs the module too.
    """
    if name in METHODS:
        return METHODS[name]
    if not is_reference(name):
        raise ConfigError(
            f"method={name!r} is unknown; the table has {', '.join(METHODS)}, and your own is 'module:name'"
        )
    method = load_named(name, "AdapterConfig.method")
    if not isinstance(method, AdapterMethod):
        raise ConfigError(f"method={name!r} is {method!r}: an AdapterMethod (popax.adapters.method), as in lora.py")
    return method


def options_of(config: AdapterConfig) -> Any:
    """The method's own options. Raises ConfigError on one that it does not have, or with a value it cannot take."""
    options = row_of(config.method).options
    fields = options.__dataclass_fields__
    for name, value in config.options:
        if name not in fields:
            known = ", ".join(f"{field.name}={field.default!r}" for field in fields.values()) or "none"
            raise ConfigError(f"option {name!r}: {config.method} has {known}")
        wanted = type(fields[name].default)
        if isinstance(value, bool) != (wanted is bool) or not isinstance(value, (wanted, int)):
            raise ConfigError(f"option {name}={value!r}: of {config.method} it is of type {wanted.__name__}")
    return options(**dict(config.options))
