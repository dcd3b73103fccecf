"""Compressing cold users: a derived revision in fewer bits, where that costs little enough, and never silently."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from popax.store.catalog import Catalog
from popax.store.codec import codec_of, decode, encode, encoded_bytes, relative_error
from popax.store.commit import Commit
from popax.store.manifest import Manifest
from popax.store.reader import chunks

_AT_A_TIME = 256


class Compressed(NamedTuple):
    """What became of one user's latest revision. revision: of the compressed one, None where it was left as it is;
    error: relative (Frobenius), None where it is compressed already. bytes_before, bytes_after: of the row."""

    user: str
    source: int
    revision: int | None
    error: float | None
    bytes_before: int
    bytes_after: int


def compress(
    catalog: Catalog,
    users: Sequence[str],
    *,
    codec: str,
    max_error: float,
    progress: Callable[[int], None] = lambda users: None,
) -> list[Compressed]:
    """Commit each user's latest revision again in fewer bits, derived from it, where the relative error is at most
    max_error; the others are left as they are, and say so.

    The original stays until it is pruned, and the compressed one is a candidate: its bytes are others. Raises
    CatalogError on an unknown codec, PopulationError where an adapter holds what is not finite, and as `load`.
    """
    chosen, done = codec_of(codec), []
    for some in chunks(users, _AT_A_TIME):
        manifests = catalog.resolve([(user, None) for user in some])
        rows = catalog.read_rows(manifests)
        wanted: dict[str, list[tuple[Manifest, Commit]]] = {}
        for manifest, row in zip(manifests, rows, strict=True):
            layout = catalog.cohort_of(manifest).layout
            size = encoded_bytes(chosen, layout)
            if manifest.codec is not None:
                done.append(Compressed(manifest.user, manifest.revision, None, None, size, size))
                continue
            error = relative_error(layout, row, decode(chosen, layout, encode(chosen, layout, row)))
            if error > max_error:
                done.append(Compressed(manifest.user, manifest.revision, None, error, row.nbytes, row.nbytes))
                continue
            commit = Commit(
                manifest.user,
                row,
                parent=manifest.revision,
                metrics=manifest.metrics,
                provenance=manifest.provenance,
                hparams=manifest.hparams,
                derived_from=[(manifest.user, manifest.revision)],
                codec=codec,
            )
            wanted.setdefault(manifest.cohort, []).append((manifest, commit))
        for pairs in wanted.values():
            cohort = catalog.cohort_of(pairs[0][0])
            made = catalog.commit_batch(cohort, [commit for _, commit in pairs])
            size = encoded_bytes(chosen, cohort.layout)
            done += [
                Compressed(new.user, old.revision, new.revision, _error(new), cohort.layout.row_bytes, size)
                for (old, _), new in zip(pairs, made, strict=True)
            ]
        progress(len(done))
    return done


def _error(manifest: Manifest) -> float:
    assert manifest.codec is not None
    return manifest.codec["error"]
