"""What fewer bytes cost: a population's latest rows in each form, the error of each and the bits per byte it loses."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from popax.adapters.cohort import Cohort
from popax.errors import ConfigError, PopulationError
from popax.evaluation.columns import EvalConfig, HeldOut, Scorer, bits_per_byte
from popax.modeling.base import Base
from popax.objectives.sft import sft
from popax.store.basis import BasisCodec, paired_sites, update_error
from popax.store.basis_fit import fit_bases, nearest_bases
from popax.store.catalog import Catalog
from popax.store.codec import CODECS, RowCodec, codec_of
from popax.store.cohort import StoredCohort
from popax.types import AdapterState

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchCompressionConfig:
    """ranks, clusters: of the bases, each with each. inners: how a basis's coefficients are stored ("" as float32).

    Bases are fitted on every other user; those who were not looked at are told apart.
    """

    ranks: tuple[int, ...] = (8, 32)
    clusters: tuple[int, ...] = (1, 4)
    inners: tuple[str, ...] = ("", "int8")
    seed: int = 0

    def __post_init__(self):
        for name in ("ranks", "clusters"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: one or more numbers, at least 1 each")
        for inner in filter(None, self.inners):
            codec_of(inner)


class Form(NamedTuple):
    """A way to store all rows: the codec of each user, and the bytes of what they share."""

    name: str
    rank: int | None
    clusters: int | None
    codecs: Sequence[RowCodec]
    shared_bytes: int


def bench_compression(
    base: Base,
    data: HeldOut,
    catalog: Catalog,
    users: Sequence[str],
    evaluation: EvalConfig,
    config: BenchCompressionConfig,
    *,
    say: Say = lambda line: None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(figures, a row for each form) for these users' latest revisions; the catalog is not changed.

    bytes_a_user: of the row. shared_bytes: of all bases. update_error: relative, of the weight updates. loss: bits per
    byte of held-out text above the rows as they are; gain_kept: the gain over the base, of the gain that they have.
    Where there are bases, of the users that they were fitted on, and (`_unseen`) of the others. Raises PopulationError
    where the users are of several cohorts, CatalogError where their method has no pair of factors.
    """
    manifests = catalog.resolve([(user, None) for user in users], base_digest=base.digest)
    if len({manifest.cohort for manifest in manifests}) != 1:
        raise PopulationError(f"{len(users)} users do not share one cohort: name users of one adapter configuration")
    cohort, rows = catalog.cohort_of(manifests[0]), catalog.read_rows(manifests)
    scorer = Scorer(sft(base.model), Cohort(cohort.config, tuple(cohort.specs.values())), base.params, {}, evaluation)

    def scored(decoded: Sequence[np.ndarray]) -> np.ndarray:
        by_user = dict(zip(users, decoded, strict=True))

        def own(asked: Sequence[str]) -> AdapterState:
            return cohort.layout.unpack(np.stack([by_user[user] for user in asked]))

        return bits_per_byte(scorer.adapter_sums(data, users, own))

    plain_N, own_N = bits_per_byte(scorer.base_sums(data, users)), scored(rows)
    say(f"{len(users)} users: base {np.nanmean(plain_N):.4f}, own {np.nanmean(own_N):.4f} bits per byte")
    seen_N, sites, table = np.arange(len(users)) % 2 == 0, paired_sites(cohort), []
    for form in _forms(cohort, rows, seen_N, config, say):
        encoded = [codec.encode(cohort.layout, row) for codec, row in zip(form.codecs, rows, strict=True)]
        decoded = [codec.decode(cohort.layout, one) for codec, one in zip(form.codecs, encoded, strict=True)]
        error_N = np.array([update_error(cohort, row, back, sites) for row, back in zip(rows, decoded, strict=True)])
        table.append(
            _row(form, cohort.layout.row_bytes, encoded[0].nbytes, error_N, (plain_N, own_N, scored(decoded)), seen_N)
        )
        say(f"{form.name}, rank {form.rank}, {form.clusters} clusters: {table[-1]['loss']:+.5f} bits per byte")
    figures = {
        "users": len(users),
        "row_bytes": cohort.layout.row_bytes,
        "base_bits_per_byte": float(np.nanmean(plain_N)),
        "own_bits_per_byte": float(np.nanmean(own_N)),
        "gain": float(np.nanmean(plain_N - own_N)),
    }
    return figures, table


def _forms(
    cohort: StoredCohort, rows: Sequence[np.ndarray], seen_N: np.ndarray, config: BenchCompressionConfig, say: Say
):
    for codec in CODECS.values():
        yield Form(codec.name, None, None, [codec] * len(rows), 0)
    fit_on = [row for row, seen in zip(rows, seen_N, strict=True) if seen]
    for rank in config.ranks:
        for clusters in config.clusters:
            say(f"fitting {clusters} bases of rank {rank} on {len(fit_on)} users")
            bases, _ = fit_bases(cohort, fit_on, rank=rank, clusters=clusters, seed=config.seed)
            nearest_N = nearest_bases(cohort, bases, rows)
            shared = sum(basis.layout.row_bytes for basis in bases)
            for inner in config.inners:
                codecs = [BasisCodec(cohort, basis, codec_of(inner) if inner else None) for basis in bases]
                name = f"basis-{inner}" if inner else "basis"
                yield Form(name, rank, clusters, [codecs[index] for index in nearest_N], shared)


def _row(
    form: Form,
    row_bytes: int,
    stored_bytes: int,
    error_N: np.ndarray,
    bits: tuple[np.ndarray, np.ndarray, np.ndarray],
    seen_N: np.ndarray,
) -> dict[str, Any]:
    """bits: per byte of each user's text, of the base, of the row as it is and in the form."""
    plain_N, own_N, form_N = bits
    fitted = form.rank is not None
    return {
        "form": form.name,
        "rank": form.rank,
        "clusters": form.clusters,
        "bytes_a_user": stored_bytes,
        "shared_bytes": form.shared_bytes,
        "times_smaller": row_bytes / stored_bytes,
        "update_error": float(error_N[seen_N].mean()),
        "update_error_unseen": float(error_N[~seen_N].mean()) if fitted else None,
        "loss": float(np.nanmean((form_N - own_N)[seen_N])),
        "loss_unseen": float(np.nanmean((form_N - own_N)[~seen_N])) if fitted else None,
        "gain_kept": float(np.nanmean((plain_N - form_N)[seen_N]) / np.nanmean((plain_N - own_N)[seen_N])),
        "gain_kept_unseen": (
            float(np.nanmean((plain_N - form_N)[~seen_N]) / np.nanmean((plain_N - own_N)[~seen_N])) if fitted else None
        ),
    }
