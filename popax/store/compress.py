"""Compressing cold users: a derived revision in fewer bytes, where that costs little enough, and never silently."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from popax.errors import CatalogError
from popax.store.basis import BasisCodec
from popax.store.basis_fit import fit_bases, nearest_bases
from popax.store.catalog import Catalog
from popax.store.codec import CODECS, RowCodec, as_codec, codec_of
from popax.store.cohort import StoredCohort
from popax.store.commit import Commit
from popax.store.finite import refuse_non_finite
from popax.store.manifest import Manifest
from popax.store.reader import chunks

_AT_A_TIME = 256
FORMS = (*CODECS, "basis", *(f"basis-{name}" for name in CODECS))


# rows -> the codec of each
_Chooser = Callable[[Sequence[np.ndarray]], list[RowCodec]]


class Compressed(NamedTuple):
    """What became of one user's latest revision. revision: of the compressed one, None where it was left as it is;
    error: relative, None where it is compressed already. bytes_before, bytes_after: of the row."""

    user: str
    source: int
    revision: int | None
    error: float | None
    bytes_before: int
    bytes_after: int


class Shared(NamedTuple):
    """How bases are fitted for the forms that have them. rank: S of `basis.Basis`. fit_users: on so many users at most,
    of each cohort; the others' updates are projected onto the nearest one."""

    rank: int = 16
    clusters: int = 1
    fit_users: int = 256
    seed: int = 0


def compress(
    catalog: Catalog,
    users: Sequence[str],
    *,
    form: str,
    max_error: float,
    shared: Shared = Shared(),  # noqa: B008 - immutable
    progress: Callable[[int], None] = lambda users: None,
) -> list[Compressed]:
    """Commit each user's latest revision again in another form (one of FORMS), derived from it, where the relative
    error is at most max_error; the others are left as they are, and say so.

    The original stays until it is pruned, and the compressed one is a candidate: its bytes are others. Raises
    CatalogError on an unknown form, or on a basis for a method that has no pair of factors; NonFiniteError where an
    adapter holds what is not finite (of a popax that let it in), and as `load`.
    """
    if form not in FORMS:
        raise CatalogError(f"form {form!r}: one of {', '.join(FORMS)}")
    kind, _, inner = form.rpartition("-") if form.startswith("basis-") else (form, "", "")
    choosers: dict[str, _Chooser] = {}
    done: list[Compressed] = []
    if kind == "basis":
        choosers = _fitted(catalog, users, inner, shared)
    for some in chunks(users, _AT_A_TIME):
        manifests = catalog.resolve([(user, None) for user in some])
        done += [_left(catalog, one, None) for one in manifests if one.codec is not None]
        for cohort, members in _by_cohort(catalog, manifests):
            rows = _finite_rows(catalog, cohort, members)
            chosen = choosers[cohort.id](rows) if choosers else [codec_of(form)] * len(rows)
            wanted: list[tuple[Manifest, Commit]] = []
            for manifest, row, codec in zip(members, rows, chosen, strict=True):
                error = codec.error(cohort.layout, row, codec.decode(cohort.layout, codec.encode(cohort.layout, row)))
                if error > max_error:
                    done.append(_left(catalog, manifest, error))
                else:
                    wanted.append((manifest, _commit(manifest, row, codec)))
            made = catalog.commit_batch(cohort, [commit for _, commit in wanted])
            done += [_made(cohort, old, new, commit) for (old, commit), new in zip(wanted, made, strict=True)]
        progress(len(done))
    return done


def _fitted(catalog: Catalog, users: Sequence[str], inner: str, shared: Shared) -> dict[str, _Chooser]:
    """Bases for each cohort among the users, fitted and kept."""
    sample: dict[str, EveryFew] = {}
    for some in chunks(users, _AT_A_TIME):
        for cohort, members in _by_cohort(catalog, catalog.resolve([(user, None) for user in some])):
            few = sample.setdefault(cohort.id, EveryFew(shared.fit_users))
            for member in members:
                few.add(member)
    made: dict[str, _Chooser] = {}
    for few in sample.values():
        fit_on = few.taken
        cohort = catalog.cohort_of(fit_on[0])
        fit = {"rank": shared.rank, "clusters": shared.clusters, "seed": shared.seed}
        bases, nearest_N = fit_bases(cohort, _finite_rows(catalog, cohort, fit_on), **fit)
        codecs: list[RowCodec] = []
        for index, basis in enumerate(bases):
            place = catalog.bases.put(
                cohort, basis, [(one.user, one.revision) for one in _of(fit_on, nearest_N, index)]
            )
            codecs.append(BasisCodec(cohort, basis, codec_of(inner) if inner else None, place))

        def choose(rows: Sequence[np.ndarray], cohort=cohort, bases=bases, codecs=codecs) -> list[RowCodec]:
            return [codecs[index] for index in nearest_bases(cohort, bases, rows)]

        made[cohort.id] = choose
    return made


class EveryFew:
    """At most `most` of what is added, evenly spread. Users are listed by their ids' hashes, and
    so are in no order of their own."""

    def __init__(self, most: int):
        self.taken: list[Manifest] = []
        self._most, self._every, self._seen = most, 1, 0

    def add(self, member: Manifest) -> None:
        if self._seen % self._every == 0:
            self.taken.append(member)
            if len(self.taken) > self._most:
                self.taken, self._every = self.taken[::2], 2 * self._every
        self._seen += 1


def _finite_rows(catalog: Catalog, cohort: StoredCohort, members: Sequence[Manifest]) -> list[np.ndarray]:
    rows = catalog.read_rows(members)
    refuse_non_finite(cohort.layout, [member.user for member in members], rows)
    return list(rows)


def _of(members: Sequence[Manifest], nearest_N: np.ndarray, index: int) -> list[Manifest]:
    return [member for member, nearest in zip(members, nearest_N, strict=True) if nearest == index]


def _by_cohort(catalog: Catalog, manifests: Sequence[Manifest]) -> Iterator[tuple[StoredCohort, list[Manifest]]]:
    """Those that are not compressed, by cohort."""
    found: dict[str, list[Manifest]] = {}
    for manifest in manifests:
        if manifest.codec is None:
            found.setdefault(manifest.cohort, []).append(manifest)
    return ((catalog.cohort_of(members[0]), members) for members in found.values())


def _left(catalog: Catalog, manifest: Manifest, error: float | None) -> Compressed:
    cohort = catalog.cohort_of(manifest)
    codec = catalog.codec_of(manifest)
    size = cohort.layout.row_bytes if codec is None else codec.stored_bytes(cohort.layout)
    return Compressed(manifest.user, manifest.revision, None, error, size, size)


def _made(cohort: StoredCohort, old: Manifest, new: Manifest, commit: Commit) -> Compressed:
    assert new.codec is not None
    assert commit.codec is not None
    size = as_codec(commit.codec).stored_bytes(cohort.layout)
    return Compressed(new.user, old.revision, new.revision, new.codec["error"], cohort.layout.row_bytes, size)


def _commit(manifest: Manifest, row: np.ndarray, codec: RowCodec) -> Commit:
    return Commit(
        manifest.user,
        row,
        parent=manifest.revision,
        metrics=manifest.metrics,
        provenance=manifest.provenance,
        hparams=manifest.hparams,
        derived_from=[(manifest.user, manifest.revision)],
        codec=codec,
    )
