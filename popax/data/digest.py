"""What a user wrote, as one digest: equal digests mean nothing new to learn."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence

from popax.data.records import Example


class ExamplesDigest:
    """sha256 over examples in time order, fed one at a time."""

    def __init__(self):
        self._hash = hashlib.sha256()

    def add(self, example: Example) -> None:
        """One example more, later than those before."""
        # Not where it stands in its file: another user's new line must not make this user's text new.
        content = (example.time, example.text, example.prompt, example.completion, example.messages)
        self._hash.update(json.dumps(content, default=repr).encode())

    def hexdigest(self) -> str:
        """Of all that was added."""
        return self._hash.hexdigest()


def digest_of(examples: Iterable[Example]) -> str:
    """The digest of one user's examples, oldest first."""
    digest = ExamplesDigest()
    for example in examples:
        digest.add(example)
    return digest.hexdigest()


def digest_of_users(digests: Mapping[str, str], users: Sequence[str]) -> str:
    """Of these users' texts together, in this order, from each one's digest."""
    return hashlib.sha256(json.dumps([[user, digests[user]] for user in users]).encode()).hexdigest()
