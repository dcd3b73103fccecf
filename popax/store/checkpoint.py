"""Training checkpoints: Orbax, each member of the population in chunks of its own."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from etils import epath

from popax.atomic import new_file
from popax.distributed.group import ProcessGroup
from popax.errors import CheckpointError, StorageError
from popax.store.cohort import StoredCohort
from popax.store.database import is_local, is_refused
from popax.store.layout import RowLayout, row_digest
from popax.store.leaves import (
    as_key,
    describe,
    key_data,
    named_leaves,
    one_member,
    population_size,
    refuse_other,
    restore_request,
    save_request,
)
from popax.trees import flatten_named, unflatten_named
from popax.types import AdapterState
from popax.version import code_version

ADAPTERS, TRAIN_STATE, RECORD = "adapters", "train_state", "record"
RECORD_FILE = "metadata"  # the name Orbax's JSON handler gives its file
SHARED = "shared"


class Restored(NamedTuple):
    """What a checkpoint held."""

    step: int
    adapters: AdapterState
    train_state: Any
    record: dict[str, Any]


class CheckpointStore:
    """The checkpoints of one run, the last `keep` of them. A save that is cut off leaves the one before it latest.

    cohort, shared: what extraction needs to know beside the arrays; without a cohort it refuses. asynchronous:
    `save` returns once the arrays are off the device, and a failure is raised by the next call.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        keep: int = 2,
        cohort: StoredCohort | None = None,
        shared: AdapterState | None = None,
        asynchronous: bool = False,
        read_only: bool = False,
    ):
        self._directory = absolute(directory)
        self._cohort, self._shared = cohort, shared or {}
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep,
            create=not read_only,
            enable_async_checkpointing=asynchronous,
            read_only=read_only,
        )
        handlers = {
            # One file per member and leaf, no OCDBT: Orbax writes an OCDBT database with a single B-tree node, so that
            # finding one of 1,000 members reads every member's keys (about 0.3 MB at 14 leaves).
            ADAPTERS: ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=True),
            TRAIN_STATE: ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True),
            RECORD: ocp.JsonCheckpointHandler(RECORD_FILE),
        }
        with _named_errors(self._directory):
            # Not a reader's business: the unfinished save may be another process's, still under way.
            if not read_only:
                _remove_unfinished(self._directory)
                # Before another process looks for steps, or begins one.
                ProcessGroup.current().barrier()
            self._manager = ocp.CheckpointManager(self._directory, options=options, item_handlers=handlers)

    def save(
        self,
        step: int,
        *,
        adapters: AdapterState,
        train_state: Any,
        record: Mapping[str, Any],
        users: Sequence[str | None] | None = None,
    ) -> None:
        """Save a population: every leaf of both trees [N, ...], any pytree as train_state, typed PRNG keys included.

        record: JSON values, returned by `restore`. users: who sits in each of the N slots (None or "": nobody), for
        extraction. Raises CheckpointError where the step exists or a leaf lacks the population axis, StorageError
        where the disk is full; the previous checkpoint is then still the latest.
        """
        state, members = named_leaves(train_state), flatten_named(adapters)
        size = population_size(members | state)
        if users is not None and len(users) != size:
            raise CheckpointError(f"{len(users)} users for a population of {size}; name every slot, None if unused")
        if step in self._manager.all_steps():
            raise CheckpointError(f"{self._directory} already holds step {step}; save a later step, or delete it")
        description = {
            "version": code_version(),
            "layout": RowLayout.of(one_member(adapters)).to_dict(),
            ADAPTERS: {name: describe(leaf) for name, leaf in members.items()},
            TRAIN_STATE: {name: describe(leaf) for name, leaf in state.items()},
            "cohort": self._cohort and self._cohort.to_dict(),
            "users": users and [user or None for user in users],
            "record": record,
        }
        try:
            json.dumps(description)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"the record of step {step} is not JSON: {error}") from error
        raw = {name: key_data(leaf) for name, leaf in state.items()}
        items = {ADAPTERS: save_request(adapters, chunk_numbers=True), RECORD: ocp.args.JsonSave(description)}
        if raw:
            items[TRAIN_STATE] = save_request(raw, chunk_numbers=False)
        with _named_errors(self._directory):
            self._save_shared()
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def restore(self, step: int | None = None, *, adapters: Any = None, train_state: Any = None) -> Restored:
        """The checkpoint of a step, the latest by default, bitwise as saved, placed as the templates say.

        adapters, train_state: trees of arrays or ShapeDtypeStructs, whose shardings say where each leaf goes: any
        mesh, not only the one that saved. Without a template the leaves come as NumPy, the train state's in a flat
        dict by name. Raises CheckpointError where there is no such step or a template does not fit.
        """
        step = self.latest() if step is None else step
        if step is None or step not in self._manager.all_steps():
            raise CheckpointError(f"{self._directory} has no checkpoint of step {step}; it has steps {self.steps()}")
        with _named_errors(self._directory):
            description = self._manager.restore(step, args=ocp.args.Composite(**{RECORD: ocp.args.JsonRestore()}))[
                RECORD
            ]
        wanted: dict[str, dict[str, Any]] = {
            ADAPTERS: dict.fromkeys(description[ADAPTERS]) if adapters is None else flatten_named(adapters),
            TRAIN_STATE: dict.fromkeys(description[TRAIN_STATE]) if train_state is None else named_leaves(train_state),
        }
        for item, template in ((ADAPTERS, adapters), (TRAIN_STATE, train_state)):
            if template is not None:
                refuse_other(item, wanted[item], description[item])
        found = self._restore_arrays(step, wanted)
        flat = {name: as_key(leaf, description[TRAIN_STATE][name]) for name, leaf in found[TRAIN_STATE].items()}
        state = flat if train_state is None else jax.tree.unflatten(jax.tree.structure(train_state), flat.values())
        return Restored(step, unflatten_named(found[ADAPTERS]), state, description["record"])

    def latest(self) -> int | None:
        """The newest finished step, None where there is none."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """The finished steps that are kept, ascending."""
        return sorted(self._manager.all_steps())

    def wait(self) -> None:
        """Return when asynchronous saves are durable. Raises StorageError where one failed."""
        with _named_errors(self._directory):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, and release Orbax's threads."""
        with _named_errors(self._directory):
            self._manager.close()

    def _restore_arrays(self, step: int, wanted: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Leaves by item and name, in the order of `wanted`; None stands for a NumPy array."""
        arguments = {
            item: restore_request(unflatten_named(leaves) if item == ADAPTERS else leaves)
            for item, leaves in wanted.items()
            if leaves
        }
        with _named_errors(self._directory):
            found = self._manager.restore(step, args=ocp.args.Composite(**arguments))
        flat = {item: flatten_named(found[item]) if item == ADAPTERS else found[item] for item in arguments}
        return {item: {name: flat[item][name] for name in leaves} for item, leaves in wanted.items()}

    def _save_shared(self) -> None:
        """The shared arrays are the same at every step: they are kept once, beside the steps, under their digest."""
        cohort = self._cohort
        if cohort is None or cohort.shared_layout is None or jax.process_index() != 0:
            return
        path = self._directory / SHARED / str(cohort.shared_digest)
        if path.exists():
            return
        row = cohort.shared_layout.pack(self._shared)
        if row_digest(row) != cohort.shared_digest:
            raise CheckpointError(f"the shared arrays given are not the cohort's {cohort.shared_digest}; use those")
        with new_file(path) as partial:
            partial.write_bytes(row.tobytes())


def latest_record(directory: str | os.PathLike) -> tuple[int, dict[str, Any]] | None:
    """(step, record) of the newest finished step, None where there is none.

    By this process alone: Orbax's own manager waits for all processes of a program whenever it is opened. Raises
    CheckpointError where the record cannot be read.
    """
    place = absolute(directory)
    if not place.exists():
        return None
    steps = [
        int(path.name) for path in place.iterdir() if path.name.isdigit() and not ocp.utils.is_tmp_checkpoint(path)
    ]
    if not steps:
        return None
    with _named_errors(place):
        file = place / str(max(steps)) / RECORD / RECORD_FILE
        return max(steps), json.loads(file.read_text())["record"]


def absolute(directory: str | os.PathLike) -> epath.Path:
    """The directory as Orbax wants it: absolute where it is local."""
    name = os.fspath(directory)
    return epath.Path(name).expanduser().absolute() if is_local(name) else epath.Path(name)


def _remove_unfinished(directory: epath.Path) -> None:
    """Remove the steps that a killed save left.

    Orbax's own clean-up runs on behind a manager that is already closed, and then collides with the next manager's;
    where steps are finished by a file rather than by a rename it also takes `shared` for unfinished.
    """
    if jax.process_index() != 0 or not directory.exists():
        return
    for path in directory.iterdir():
        if path.name.split(".")[0].isdigit() and path.is_dir() and ocp.utils.is_tmp_checkpoint(path):
            path.rmtree(missing_ok=True)


@contextlib.contextmanager
def _named_errors(directory: epath.Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError) as error:
        if is_refused(error):
            raise StorageError(
                f"{str(directory)!r} refused: {error}; the checkpoint before it is still the latest. Free space or fix "
                "the permissions, then resume"
            ) from error
        raise CheckpointError(f"{str(directory)!r} cannot be used as a checkpoint directory: {error}") from error
