"""One user taken out of a catalog or of a population checkpoint, reading that user's bytes and no other's."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from popax.adapters.base import AdapterConfig, SiteSpec
from popax.adapters.peft import save_peft
from popax.errors import CheckpointError, RevisionNotFoundError
from popax.store.catalog import Catalog
from popax.store.checkpoint import ADAPTERS, RECORD, RECORD_FILE, SHARED, absolute
from popax.store.cohort import StoredCohort
from popax.store.database import MARKER, place_spec, storage_errors
from popax.store.layout import RowLayout, row_digest
from popax.store.pointers import Which
from popax.store.records import shown
from popax.store.signing import Trust
from popax.trees import unflatten_named
from popax.types import AdapterState


class Extracted(NamedTuple):
    """One user's adapter (NumPy leaves [L, ...]) with all that is needed to use it: no base, no catalog.

    shared: the frozen arrays of the method, {} where it has none. provenance: where the adapter came from.
    """

    adapter: AdapterState
    shared: AdapterState
    config: AdapterConfig
    specs: Mapping[str, SiteSpec]
    provenance: dict[str, Any]


def extract_user(
    source: str | os.PathLike, user: str, *, revision: Which = None, trusted: Trust | None = None
) -> Extracted:
    """A user's adapter from a catalog, a run's checkpoint directory (its latest step) or one step's directory.

    Touches no device. revision: of a catalog only, the latest by default. Raises RevisionNotFoundError where the user
    is not there; CheckpointError or CatalogError where the source is neither, or lacks what extraction needs.
    """
    place = absolute(source)
    if (place / MARKER).exists():
        return _from_catalog(Catalog.open(str(place), read_only=True, trusted=trusted), user, revision)
    if revision is not None or trusted is not None:
        asked = f"revision {revision}" if revision is not None else "signatures"
        raise CheckpointError(f"{str(place)!r} is no catalog, so it has no {asked}; name a step's directory")
    return _from_checkpoint(place, user)


def extract_to_peft(
    source: str | os.PathLike,
    user: str,
    directory: str | os.PathLike,
    *,
    revision: Which = None,
    trusted: Trust | None = None,
    base_name: str = "",
    overwrite: bool = False,
) -> Path:
    """`extract_user`, written as a Hugging Face PEFT directory; see `save_peft` for its arguments and errors."""
    found = extract_user(source, user, revision=revision, trusted=trusted)
    return save_peft(
        directory,
        found.adapter,
        config=found.config,
        specs=found.specs,
        shared=found.shared,
        base_name=base_name,
        overwrite=overwrite,
    )


def _from_catalog(catalog: Catalog, user: str, revision: Which) -> Extracted:
    adapter, manifest = catalog.load(user, revision)
    cohort = catalog.cohort_of(manifest)
    provenance = {name: value for name, value in manifest.to_dict().items() if name not in ("config", "row")}
    return Extracted(adapter, catalog.shared(cohort), cohort.config, cohort.specs, provenance)


def _from_checkpoint(place: epath.Path, user: str) -> Extracted:
    step = _step_directory(place)
    description = json.loads((step / RECORD / RECORD_FILE).read_text())
    users, record = description["users"], description["cohort"]
    if users is None or record is None:
        raise CheckpointError(
            f"{str(step)!r} was saved without its users or its cohort, which extraction needs; save it by "
            "CheckpointStore(directory, cohort=...).save(..., users=...), or extract from the catalog"
        )
    if user not in users:
        raise RevisionNotFoundError(
            f"user {shown(user)} sits in none of the {len(users)} slots of {str(step)!r}; extract from the catalog"
        )
    slot, cohort = users.index(user), StoredCohort.from_dict(record)
    adapter = _read_member(step / ADAPTERS, RowLayout.from_dict(description["layout"]), slot)
    provenance = {
        "user": user,
        "step": int(step.name),
        "slot": slot,
        "base_digest": cohort.base_digest,
        "version": description["version"],
        "run": description["record"].get("run"),
    }
    return Extracted(adapter, _read_shared(step.parent / SHARED, cohort), cohort.config, cohort.specs, provenance)


def _step_directory(place: epath.Path) -> epath.Path:
    if (place / RECORD / RECORD_FILE).exists():
        return place
    # Orbax's own list: a step that is still being written, or was left by a killed save, is not in it.
    steps = ocp.utils.checkpoint_steps(place)
    if not steps:
        raise CheckpointError(f"{str(place)!r} is neither a catalog nor a directory of population checkpoints")
    return place / str(max(steps))


def _read_member(place: epath.Path, layout: RowLayout, slot: int) -> AdapterState:
    """The leaves of one member: each is one chunk of its array."""
    root = place_spec(str(place))
    with storage_errors(str(place)):
        opened = [
            ts.open(
                {"driver": "zarr3", "kvstore": (root / f"{_orbax_name(leaf.name)}/").to_json()}, open=True, read=True
            )
            for leaf in layout.leaves
        ]
        reads = [store.result()[slot].read() for store in opened]
        return unflatten_named({leaf.name: read.result() for leaf, read in zip(layout.leaves, reads, strict=True)})


def _orbax_name(name: str) -> str:
    return name.replace("/", ".")


def _read_shared(place: epath.Path, cohort: StoredCohort) -> AdapterState:
    if cohort.shared_layout is None:
        return {}
    path = place / str(cohort.shared_digest)
    row = np.frombuffer(path.read_bytes() if path.exists() else b"", np.uint8)
    if row_digest(row) != cohort.shared_digest:
        raise CheckpointError(
            f"the shared arrays {str(path)!r} are missing or not those of their digest; extract from the catalog"
        )
    return cohort.shared_layout.unpack(row)
