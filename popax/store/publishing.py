"""What makes placed rows revisions: manifests in their users' records, and the index of what was derived from what."""

import dataclasses
from collections.abc import Mapping, Sequence

import tensorstore as ts

from popax.errors import RevisionNotFoundError
from popax.store.cohort import StoredCohort
from popax.store.commit import Revision
from popax.store.database import Database
from popax.store.manifest import Manifest, UserRecord
from popax.store.packed import seal_user, unseal_user
from popax.store.reader import read_users, stored_form
from popax.store.records import derived_key, manifest_key, seal, shown, user_key
from popax.store.signing import Signer
from popax.version import code_version


def new_manifest(
    cohort: StoredCohort,
    revision: Revision,
    record: UserRecord | None,
    created: str,
    parents: Mapping[tuple[str, int], str],
    signer: Signer | None,
) -> Manifest:
    """The manifest of the user's next revision. created: the transaction's time. parents: digests of the revisions that
    some are derived from."""
    latest = record.latest if record else 0
    manifest = Manifest(
        user=revision.user,
        revision=latest + 1,
        cohort=cohort.id,
        row=revision.row,
        shard=revision.shard,
        digest=revision.digest,
        base_digest=cohort.base_digest,
        config=cohort.config_record,
        created=created,
        version=code_version(),
        parent=latest or None,
        run=revision.run,
        derived_from=tuple((user, at, parents[user, at]) for user, at in revision.derived_from),
        optimizer=revision.optimizer,
        codec=revision.codec,
        hparams=revision.hparams,
        provenance=revision.provenance,
        metrics=revision.metrics,
    )
    return manifest if signer is None else dataclasses.replace(manifest, signature=signer.sign(manifest, cohort))


def put_manifests(store: ts.KvStore, entries: Sequence[tuple[Manifest, UserRecord | None]]) -> None:
    """Into the store's transaction: each manifest in its user's record, the one it supersedes under its own key, and
    the index of what it is derived from. Their rows are there, or in the transaction."""
    writes = []
    for manifest, record in entries:
        current = stored_form(manifest)
        if record is None:
            changed = UserRecord(user=manifest.user, latest=1, current=current)
        else:
            changed = dataclasses.replace(record, latest=manifest.revision, current=current)
            superseded = {"user": record.user, "latest": record.latest, "manifest": record.current}
            writes.append(store.write(manifest_key(record.user, record.latest), seal_user(superseded)))
        writes.append(store.write(user_key(manifest.user), seal_user(changed.stored())))
        for parent, at, _ in manifest.derived_from:
            index = {"user": manifest.user, "revision": manifest.revision, "parent": parent, "of": at}
            writes.append(store.write(derived_key(parent, manifest.user, manifest.revision), seal(index)))
    for write_future in writes:
        write_future.result()


def digests_of(
    database: Database, transaction: ts.Transaction, revisions: Sequence[Revision]
) -> dict[tuple[str, int], str]:
    """The content digests of the revisions that these are derived from. Raises RevisionNotFoundError."""
    wanted = list(dict.fromkeys(parent for revision in revisions for parent in revision.derived_from))
    records = read_users(database, transaction, [user for user, _ in wanted])
    found = {}
    for (user, at), record in zip(wanted, records, strict=True):
        if record is None or not record.oldest <= at <= record.latest:
            raise RevisionNotFoundError(f"cannot derive from {shown(user)}@{at}: there is no such revision")
        found[user, at] = digest_at(database, transaction, record, at)
    return found


def digest_at(database: Database, transaction: ts.Transaction, record: UserRecord, at: int) -> str:
    """The content digest of the user's revision `at`, one of `oldest` to `latest`, as the transaction sees it."""
    if at == record.latest:
        return record.current["digest"]
    read = database.kvstore.with_transaction(transaction).read(manifest_key(record.user, at)).result()
    return unseal_user(read.value)["manifest"]["digest"]
