"""Signatures of revisions: who made an adapter, checked before it is used (Ed25519, RFC 8032)."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from popax.errors import SignatureError
from popax.store.cohort import StoredCohort
from popax.store.manifest import Manifest
from popax.store.records import canonical

# A row copied to another user, revision, cohort or base is not what was signed. Nor is one whose cohort's record says
# something else: config, scales and shared arrays decide what the same bytes do.
SIGNED = ("user", "revision", "cohort", "base_digest", "digest", "codec")


class Signer:
    """Signs new revisions with one private key."""

    def __init__(self, key: Ed25519PrivateKey):
        self._key = key
        self.fingerprint = fingerprint(key.public_key())

    @classmethod
    def from_pem(cls, path: str | os.PathLike[str]) -> "Signer":
        """The private key in a PEM file, without a password (`openssl genpkey -algorithm ed25519 -out key.pem`)."""
        key = _read(path, lambda data: load_pem_private_key(data, password=None))
        if not isinstance(key, Ed25519PrivateKey):
            raise SignatureError(f"{os.fspath(path)!r} holds a {type(key).__name__}, not an Ed25519 private key")
        return cls(key)

    def sign(self, manifest: Manifest, cohort: StoredCohort) -> dict[str, str]:
        """What a manifest keeps as its signature. cohort: the manifest's own, as the catalog has it."""
        return {"key": self.fingerprint, "value": self._key.sign(_payload(manifest, cohort)).hex()}


class Trust:
    """Accepts revisions that one of these public keys has signed, and no others."""

    def __init__(self, keys: Sequence[Ed25519PublicKey]):
        if not keys:
            raise SignatureError("no key to trust: every revision would be refused; give at least one")
        self._keys = {fingerprint(key): key for key in keys}

    @classmethod
    def from_pem(cls, *paths: str | os.PathLike[str]) -> "Trust":
        """The public keys in PEM files (`openssl pkey -in key.pem -pubout -out public.pem`)."""
        keys = []
        for path in paths:
            key = _read(path, load_pem_public_key)
            if not isinstance(key, Ed25519PublicKey):
                raise SignatureError(f"{os.fspath(path)!r} holds a {type(key).__name__}, not an Ed25519 public key")
            keys.append(key)
        return cls(keys)

    def check(self, manifest: Manifest, cohort: StoredCohort) -> None:
        """Raises SignatureError where the manifest is unsigned, signed by another key, or not what was signed."""
        signature: Mapping[str, Any] | None = manifest.signature
        if not signature:
            raise SignatureError(f"{manifest.shown} is not signed; sign it, or load it without keys to trust")
        key = self._keys.get(str(signature.get("key")))
        if key is None:
            raise SignatureError(
                f"{manifest.shown} is signed by the key {signature.get('key')}, the trusted ones are "
                f"{', '.join(sorted(self._keys))}: trust that key too, or refuse its adapters"
            )
        try:
            key.verify(bytes.fromhex(str(signature.get("value"))), _payload(manifest, cohort))
        except (InvalidSignature, ValueError) as error:
            raise SignatureError(
                f"{manifest.shown} is not what the key {signature['key']} has signed; do not use it, and find out who "
                "changed it"
            ) from error


def fingerprint(key: Ed25519PublicKey) -> str:
    """64 bits of the sha256 of the raw public key, hex."""
    return hashlib.sha256(key.public_bytes(Encoding.Raw, PublicFormat.Raw)).hexdigest()[:16]


def _payload(manifest: Manifest, cohort: StoredCohort) -> bytes:
    signed = {name: getattr(manifest, name) for name in SIGNED}
    return canonical({**signed, "form": cohort.record_digest}).encode()


def _read(path: str | os.PathLike[str], load: Any) -> Any:
    try:
        return load(Path(path).read_bytes())
    except (OSError, ValueError, TypeError) as error:
        raise SignatureError(f"{os.fspath(path)!r} is no PEM file with a key that can be read: {error}") from error
