"""What a setting names in a researcher's own module: "module:name"."""

import importlib
from typing import Any

from popax.errors import ConfigError


def is_reference(value: object) -> bool:
    """Whether it reads "module:name"."""
    return isinstance(value, str) and ":" in value


def load_named(reference: str, setting: str) -> Any:
    """The object of that name in that module, which is imported. setting: what was given it, for the message.

    Raises ConfigError where there is no such module or name, or the module itself fails.
    """
    module, _, name = reference.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{setting}={reference!r}: there is no module {error.name!r}; install it, or put its folder on PYTHONPATH"
        ) from error
    except AttributeError as error:
        raise ConfigError(f"{setting}={reference!r}: {error}") from error
    except Exception as error:  # whatever a module raises while it is imported
        raise ConfigError(
            f"{setting}={reference!r}: importing {module!r} failed: {type(error).__name__}: {error}"
        ) from error
