"""Batches of users' tokens: fair over users, packed, split in time, deterministic by (user, seed, step)."""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from typing import Literal, NamedTuple, cast

import grain
import numpy as np

from popax.data.packing import Document, encode_example, pack_documents, zero_batch
from popax.data.records import Example
from popax.data.tokenize import Tokenizer
from popax.data.users import UserDataset, split_past_future
from popax.errors import ConfigError, DataError, PopaxError, UserTextError
from popax.types import Batch

SPLITS = ("past", "validation", "future")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """seq_len targets a row, batch_size rows a user and step.

    past_fraction of a user's examples, oldest first, may be learnt from; validation_fraction of that past (its end)
    only stops training early; the rest is held out. pack: short documents share rows. cached_users: how many users'
    tokens stay in memory.
    """

    seq_len: int
    batch_size: int
    past_fraction: float = 0.8
    validation_fraction: float = 0.1
    seed: int = 0
    pack: bool = True
    cached_users: int = 4096

    def __post_init__(self):
        for name in ("seq_len", "batch_size", "cached_users"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: at least 1")
        if not 0.0 < self.past_fraction <= 1.0:
            raise ConfigError(f"past_fraction={self.past_fraction}: above 0, at most 1")
        if not 0.0 <= self.validation_fraction < 1.0:
            raise ConfigError(f"validation_fraction={self.validation_fraction}: at least 0, below 1")


class _User(NamedTuple):
    past: Batch
    validation: Batch
    future: Batch
    batches: grain.MapDataset  # step -> Batch [B, T] of the past


class UserPipeline:
    """Rows of token ids for one user or many; every method is a pure function of its arguments, from any thread."""

    def __init__(self, dataset: UserDataset, tokenizer: Tokenizer, config: PipelineConfig, *, at_once: int = 0):
        """at_once: users who are read again and again; that many stay in memory, whatever `cached_users` is."""
        self.dataset, self.tokenizer, self.config = dataset, tokenizer, config
        self._user = functools.lru_cache(max(config.cached_users, at_once))(self._read_user)

    def for_users(self, at_once: int) -> "UserPipeline":
        """The same rows, with room for so many users; this one where it has it."""
        if at_once <= self._user.cache_parameters()["maxsize"]:
            return self
        return UserPipeline(self.dataset, self.tokenizer, self.config, at_once=at_once)

    def rows(self, user: str, split: str) -> Batch:
        """All rows [M, T] of one part of the user's time; M may be 0."""
        if split not in SPLITS:
            raise ConfigError(f"split={split!r}: one of {', '.join(SPLITS)}")
        return getattr(self._user(user), split)

    def batch(self, user: str, step: int) -> Batch:
        """The user's training batch [B, T] at a step: depends on the user's data and id, the seed and the step only.

        Every row of the past is seen once before any is seen twice. Raises DataError where the past is empty.
        """
        user_data = self._user(user)
        if not len(user_data.past.tokens_BxT):
            raise DataError(
                f"user {user!r} has nothing to learn from: none of their {self.dataset.num_examples(user)} examples "
                "gives a target with loss in the past; leave the user out, or raise past_fraction"
            )
        return cast(Batch, user_data.batches[step])

    def population(self, users: Sequence[str | None], steps: Sequence[int], accumulate: int = 1) -> Batch:
        """[N, B, T]: `batch(users[i], steps[i])` in slot i; padding where users[i] is None.

        accumulate: above 1 a step has so many batches, [N, A, B, T]; step s of a user has their batches s * A and on.
        """
        empty = zero_batch(self.config.batch_size, self.config.seq_len)

        def at(part: int) -> Batch:
            rows = [
                empty if user is None else self.batch(user, step * accumulate + part)
                for user, step in zip(users, steps, strict=True)
            ]
            return _stack(rows)

        return at(0) if accumulate == 1 else _stack([at(part) for part in range(accumulate)], axis=1)

    def evaluation(self, users: Sequence[str | None], split: str, max_rows: int | None = None) -> Batch:
        """[N, M, T]: each user's first max_rows rows of the split, padded to the longest; M is at least 1."""
        empty = zero_batch(0, self.config.seq_len)
        parts = [empty if user is None else _take(self.rows(user, split), slice(max_rows)) for user in users]
        longest = max([1, *(len(part.tokens_BxT) for part in parts)])
        return _stack([_pad(part, longest) for part in parts])

    def mixed(self, users: Sequence[str], by: Literal["user", "row"] = "user") -> "MixedUsers":
        """One stream of everybody's past, to train a base or a shared adapter; see MixedUsers."""
        return MixedUsers(self, users, by)

    def _read_user(self, user: str) -> _User:
        examples = self.dataset.examples(user)
        ranges = split_past_future(len(examples), self.config.past_fraction, self.config.validation_fraction)
        past, validation, future = (
            pack_documents((self._encode(examples[i]) for i in part), self.config.seq_len, pack=self.config.pack)
            for part in ranges
        )
        order = _shuffled(len(past.tokens_BxT), user_seed(user, self.config.seed))
        batches = order.batch(self.config.batch_size).map(lambda rows: _take(past, rows))
        return _User(past, validation, future, batches)

    def _encode(self, example: Example) -> Document:
        """Raises UserTextError, with the record's place, where the template or the tokenizer refuses it."""
        try:
            return encode_example(example, self.tokenizer)
        except Exception as error:  # a template, and the `tokenizers` library, raise whatever they like
            file, number = self.dataset.place(example)
            where = f"{file}, record {number}" if file else f"example {number}"
            why = str(error) if isinstance(error, PopaxError) else f"{type(error).__name__}: {error}"
            raise UserTextError(
                f"user {example.user!r}: {where} cannot be tokenised: {why}; correct or remove it",
                record=number,
                file=file,
            ) from error


class MixedUsers:
    """Batches over many users' pasts; random access by step, like one user's.

    by="user": every N rows of the stream are one row of each of the N users, in a new order each round, so that every
    user comes equally often, whatever their size. by="row": every row equally often, whoever wrote it. Users whose
    past is empty are left out.
    """

    def __init__(self, pipeline: UserPipeline, users: Sequence[str], by: Literal["user", "row"] = "user"):
        sizes = {user: len(pipeline.rows(user, "past").tokens_BxT) for user in users}
        self.users = [user for user in users if sizes[user]]
        if not self.users:
            raise DataError(f"none of the {len(users)} users has anything to learn from")
        config, seed = pipeline.config, user_seed("", pipeline.config.seed)
        lengths = [sizes[user] for user in self.users]
        seeds = [user_seed(user, config.seed) for user in self.users]
        orders = [_shuffled(length, seed) for length, seed in zip(lengths, seeds, strict=True)]
        if by == "user":
            turns = _shuffled(len(orders), seed)
            places = turns.map_with_index(lambda index, user: (user, orders[user][index // len(orders)]))
        elif by == "row":
            pairs = [(user, row) for user, length in enumerate(lengths) for row in range(length)]
            places = _shuffled(len(pairs), seed).map(lambda index: pairs[index])
        else:
            raise ConfigError(f'by={by!r}: "user" or "row"')
        # The tokens themselves stay in the pipeline's cache, which is bounded.
        rows = places.map(lambda place: _take(pipeline.rows(self.users[place[0]], "past"), place[1]))
        self._batches = rows.batch(config.batch_size, batch_fn=_stack)

    def batch(self, step: int) -> Batch:
        """[B, T] at a step."""
        return cast(Batch, self._batches[step])


def _shuffled(length: int, seed: int) -> grain.MapDataset:
    """0 .. length-1 without end, in a new order each epoch.

    In place of MapDataset.shuffle, whose random access walks through a 16-bit range: 0.4 ms for every index of a short
    one, which over 64 users would take longer than the step.
    """

    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        return np.random.RandomState([seed, epoch]).permutation(length)  # this generator's stream is frozen by NumPy

    return (
        grain.MapDataset.range(length).repeat().map_with_index(lambda index, _: order(index // length)[index % length])
    )


def user_seed(user: str, seed: int) -> int:
    """A 32-bit seed of the user's own, so that a user's batches are the same whoever trains beside them."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{user}".encode(), digest_size=4).digest(), "little")


def _take(batch: Batch, rows: np.ndarray | int | slice) -> Batch:
    return Batch._make(leaf[rows] for leaf in batch)


def _stack(batches: Sequence[Batch], axis: int = 0) -> Batch:
    return Batch._make(np.stack(leaves, axis) for leaves in zip(*batches, strict=True))


def _pad(batch: Batch, rows: int) -> Batch:
    missing = rows - len(batch.tokens_BxT)
    return Batch._make(np.pad(leaf, ((0, missing), (0, 0))) for leaf in batch)
