"""Where a user's training starts, and where it ends up: the catalog on both sides, each on threads of its own."""

import concurrent.futures
import dataclasses
import hashlib
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from popax.adapters.base import AdapterConfig
from popax.adapters.cohort import Cohort
from popax.errors import PopaxError, PopulationError
from popax.memo import built_once
from popax.population.optimizer import Optimizer
from popax.population.resume import resumed
from popax.population.state import PopulationState, init_member
from popax.residency.loader import Row, RowLoader
from popax.store.catalog import Catalog
from popax.store.manifest import Manifest
from popax.training.aside import OF_ONE_USER, SetAside
from popax.training.config import TrainConfig
from popax.training.news import latest_manifests
from popax.types import AdapterState, HParams

# A revision with the promise of its row, or why a user's cannot be continued.
Asked = tuple[Manifest, Row] | PopaxError


def user_key(seed: int, user: str) -> jax.Array:
    """A key that depends on the seed and the user's id alone, not on the slot or on who sits beside."""
    word = int.from_bytes(hashlib.sha256(user.encode()).digest()[:4], "little")
    return jax.random.fold_in(jax.random.key(seed), np.uint32(word))


@built_once
def _starts(
    cohort: Cohort, optimizer: Optimizer, track_best: bool, save_optimizer_state: bool
) -> tuple[Callable[..., PopulationState], Callable[..., PopulationState]]:
    """start(key, settings) of a fresh adapter, and start(key, settings, adapter) of one that is there."""

    def make(key: jax.Array, settings: HParams, adapter: AdapterState | None) -> PopulationState:
        tracked = {"track_best": track_best, "save_optimizer_state": save_optimizer_state}
        return init_member(cohort, optimizer, key, settings, adapter=adapter, **tracked)

    return jax.jit(lambda key, settings: make(key, settings, None)), jax.jit(make)


class MemberSource:
    """Prepares members ahead of time: fresh ones, or ones that continue the user's latest revision.

    steps_of(user): the user's number of steps; it reads the user's text, which is thereby ready when they are seated.
    A user whose text or revision cannot be used, or who has nothing to learn from, is set aside: nobody else's load
    fails for it.
    With config.save_optimizer_state the state that was kept beside a revision is continued, a fresh one where none was.
    Revisions of the run itself are never continued: a resumed run then repeats what it did before it was stopped.
    Rows come through residency's loader, those of users who are prefetched together in one batch.
    """

    def __init__(
        self,
        cohort: Cohort,
        config: TrainConfig,
        *,
        steps_of: Callable[[str], int],
        catalog: Catalog | None = None,
        base_digest: str = "",
        run: str = "",
        threads: int = 2,
    ):
        self._config, self._steps_of = config, steps_of
        self._catalog, self._base_digest, self._run = catalog, base_digest, run
        self._pool = concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="popax-load")
        self._pending: dict[str, concurrent.futures.Future[PopulationState | SetAside]] = {}
        self._rows = None if catalog is None else RowLoader(catalog.read_rows, lambda rows: None)
        tracked = (config.early_stop is not None, config.save_optimizer_state)
        self._fresh, self._from_adapter = _starts(cohort, config.optimizer, *tracked)

    def prefetch(self, users: Sequence[str]) -> None:
        """Start loading these users, those who continue in one batched read; `start` then finds them ready."""
        fresh = [user for user in dict.fromkeys(users) if user not in self._pending]
        if fresh:
            asked = self._pool.submit(self._ask, fresh)
            self._pending |= {user: self._pool.submit(self._load, user, asked) for user in fresh}

    def start(self, user: str) -> PopulationState | SetAside:
        """This user's member, or why they cannot be trained; waits for its load."""
        self.prefetch([user])
        return self._pending.pop(user).result()

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self._rows is not None:
            self._rows.close()

    def _ask(self, users: Sequence[str]) -> dict[str, Asked]:
        """The revision that each of those users continues who have one, and the promise of its row."""
        if self._catalog is None or self._rows is None:
            return {}
        parents = {
            user: self._parent(user, latest)
            for user, latest in zip(users, latest_manifests(self._catalog, users), strict=True)
        }
        found = {user: parent for user, parent in parents.items() if isinstance(parent, Manifest)}
        rows = dict(zip(found, self._rows.ask(list(found.values())), strict=True))
        errors = {user: parent for user, parent in parents.items() if isinstance(parent, PopaxError)}
        return errors | {user: (parent, rows[user]) for user, parent in found.items()}

    def _load(self, user: str, asked: concurrent.futures.Future[dict[str, Asked]]) -> PopulationState | SetAside:
        try:
            # Of the host until it has a seat: many are loaded ahead.
            return jax.device_get(self._member(user, asked))
        except OF_ONE_USER as error:
            return SetAside.of(user, error)

    def _member(self, user: str, asked: concurrent.futures.Future[dict[str, Asked]]) -> PopulationState | SetAside:
        steps = self._steps_of(user)
        if not steps:
            return SetAside.idle(user)
        settings = self._config.member_settings(steps)
        key = user_key(self._config.seed, user)
        found = asked.result().get(user)
        if found is None:
            return self._fresh(key, settings)
        if isinstance(found, PopaxError):
            raise found
        assert self._catalog is not None
        manifest, row = found
        # Here, not in the batch: a revision of another base, or one that nobody trusted signed, is this user's error.
        self._catalog.resolve([(user, manifest.revision)], base_digest=self._base_digest)
        if AdapterConfig.from_dict(manifest.config) != self._config.adapter:
            raise PopulationError(
                f"{manifest.shown} is {AdapterConfig.from_dict(manifest.config)}, this run trains "
                f"{self._config.adapter}: a user continues with the configuration they have; commit to another "
                "catalog to begin anew with another one"
            )
        adapter = self._catalog.cohort_of(manifest).layout.unpack(row.result())
        fresh = self._from_adapter(key, settings, adapter)
        if not self._config.save_optimizer_state or manifest.optimizer is None:
            return fresh
        try:
            return resumed(fresh, self._catalog.load_optimizer(manifest))
        except PopulationError as error:
            raise PopulationError(f"{manifest.shown}: {error}") from error

    def _parent(self, user: str, latest: Manifest | PopaxError | None) -> Manifest | PopaxError | None:
        """The newest of the user's revisions that is not this run's; histories may be long, so from the end."""
        assert self._catalog is not None
        found = latest
        try:
            while isinstance(found, Manifest) and found.run == self._run:
                found = None if found.parent is None else self._catalog.resolve([(user, found.parent)])[0]
        except OF_ONE_USER as error:
            return error
        return found


@dataclasses.dataclass(frozen=True)
class Finished:
    """One user's result, in the host's memory; counters: the member's own scalars (steps, skipped, kept_step, ...).

    optimizer: what `resumed` takes, None where it is not kept.
    """

    user: str
    adapter: AdapterState
    counters: dict[str, Any]
    optimizer: dict[str, Any] | None = None


class RevisionWriter:
    """Writes finished users behind the training step, several in one transaction.

    `flush` returns when everything handed over is durable and visible; a failed write is raised by the next call.
    publish(failure): called by `flush` in all processes of a run, with what failed in this one; it makes visible what
    `commit` wrote. The default is for a commit that does so itself.
    """

    def __init__(
        self,
        commit: Callable[[Sequence[Finished]], None],
        *,
        publish: Callable[[BaseException | None], None] = lambda failure: None,
        capacity: int = 256,
    ):
        self._commit, self._publish = commit, publish
        self._queue: queue.Queue[Finished | None] = queue.Queue(capacity)
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="popax-write", daemon=True)
        self._thread.start()

    def put(self, finished: Finished) -> None:
        """Hand over one user; waits while `capacity` users are in flight."""
        self._raise_failure()
        self._queue.put(finished)

    def flush(self) -> None:
        """Wait until all that was handed over is committed, in every process."""
        self._queue.join()
        self._publish(self._failure)
        self._raise_failure()

    def close(self) -> None:
        """Flush and stop the thread."""
        self._queue.put(None)
        self._thread.join()
        self._raise_failure()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _work(self) -> None:
        while True:
            batch = [self._queue.get()]
            while not self._queue.empty():
                batch.append(self._queue.get_nowait())
            finished = [entry for entry in batch if entry is not None]
            try:
                # After a failure nothing more is written: the run stops at its next call, and resumes from there.
                if finished and self._failure is None:
                    self._commit(finished)
            except BaseException as error:
                self._failure = error
            finally:
                for _ in batch:
                    self._queue.task_done()
            if None in batch:
                return
