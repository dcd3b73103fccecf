"""The demo's users and the base's text: the standard library of the Python that runs it."""

import hashlib

from popax.data.stdlib import Corpus, Documents, num_bytes, split_corpus, standard_library
from popax.data.users import UserDataset
from popax.errors import DataError

# Tables in the shape of code (character maps, help texts, build variables): a base learns little from them.
TABLES = ("encodings", "pydoc_data")


def demo_corpus(users: int, max_user_bytes: int) -> Corpus:
    """`users` packages with the most text among those of at most max_user_bytes; the base has all the others.

    Raises DataError where this Python's library has fewer packages than that.
    """
    groups = {
        name: documents
        for name, documents in standard_library().items()
        if name not in TABLES and not name.startswith("_sysconfigdata")
    }
    corpus = split_corpus(groups, users, max_user_bytes)
    if len(corpus.users) < users or not corpus.base:
        raise DataError(
            f"this Python's standard library has {len(corpus.users)} usable packages, not {users}: "
            "ask for fewer users, or run a Python with the full library"
        )
    return corpus


def as_dataset(groups: dict[str, Documents]) -> UserDataset:
    """Each package a user, each document an example, in the corpus's own order."""
    return UserDataset.from_examples({name: [text for _, text in documents] for name, documents in groups.items()})


def corpus_digest(groups: dict[str, Documents]) -> str:
    """A digest of every name and text: another Python has another one, and with it another base."""
    digest = hashlib.sha256()
    for name, documents in sorted(groups.items()):
        for document, text in documents:
            digest.update(f"{name}\0{document}\0{text}\0".encode())
    return digest.hexdigest()


def megabytes(groups: dict[str, Documents]) -> float:
    """UTF-8 megabytes of all texts."""
    return sum(num_bytes(documents) for documents in groups.values()) / 1e6
