"""API keys: whose requests these are. A key is kept as its SHA-256 only."""

import dataclasses
import hashlib
import json
import secrets
from pathlib import Path

from popax.atomic import write_text
from popax.errors import ConfigError

PREFIX = "popax-"


@dataclasses.dataclass(frozen=True)
class Caller:
    """tenant: whose users it may name, "" for all ids as they are. admin: may move pointers, pin and load."""

    tenant: str
    admin: bool = False


EVERYBODY = Caller("", admin=True)


class ApiKeys:
    """The callers of a key file: {sha256 of the key: {"tenant": ..., "admin": ...}}."""

    def __init__(self, callers: dict[str, Caller]):
        self._callers = callers

    @classmethod
    def read(cls, path: str | Path) -> "ApiKeys":
        """Raises ConfigError for a file that is none."""
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            callers = {str(digest): Caller(str(one["tenant"]), bool(one["admin"])) for digest, one in found.items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(f"{path} is no key file ({error}): make one with popax api-key") from error
        for caller in callers.values():
            if not caller.tenant and not caller.admin:
                raise ConfigError(f"{path} has a key without a tenant that is no admin's: it could read everybody")
        return cls(callers)

    def caller(self, key: str | None) -> Caller | None:
        """Whose key it is; None for nobody's. Looked up by digest: how long it takes says nothing of its letters."""
        return None if key is None else self._callers.get(digest_of(key))


def digest_of(key: str) -> str:
    """What a key file has of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def new_key(path: str | Path, tenant: str, *, admin: bool = False) -> str:
    """A key that is added to the file (which is made where there is none); nowhere else is it kept."""
    place = Path(path)
    if not tenant and not admin:
        raise ConfigError("a key needs a tenant, or admin rights: without either it could read everybody's adapters")
    if "/" in tenant:
        raise ConfigError(f"tenant {tenant!r}: the part of a user's id before its first slash, so without one")
    if place.exists():
        ApiKeys.read(place)
    found = json.loads(place.read_text(encoding="utf-8")) if place.exists() else {}
    key = PREFIX + secrets.token_urlsafe(32)
    found[digest_of(key)] = {"tenant": tenant, "admin": admin}
    write_text(place, json.dumps(found, indent=2) + "\n", private=True)
    return key
