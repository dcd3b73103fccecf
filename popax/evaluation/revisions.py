"""Scoring revisions for the gate: each on its user's held-out text, on a text that the base knew, and by its norm."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from popax.adapters.cohort import Cohort
from popax.errors import DataError
from popax.evaluation.columns import EvalConfig, HeldOut, Scorer, bits_per_byte
from popax.modeling.base import Base
from popax.objectives.sft import sft
from popax.population.bounds import total_norm
from popax.serving.pool import one_cohort
from popax.store.catalog import Catalog
from popax.store.manifest import Manifest, now
from popax.store.scores import Scores
from popax.types import AdapterState, Batch
from popax.version import code_version


class OneText:
    """The same rows for everybody: a retention text, as an evaluation asks for text."""

    def __init__(self, rows: Batch):
        """rows: [M, T], at least one."""
        if not len(rows.tokens_BxT):
            raise DataError("the retention text has no rows: give files with text in the evaluated split")
        self._rows = rows

    @classmethod
    def of(cls, data: HeldOut, users: Sequence[str], config: EvalConfig, max_rows: int) -> "OneText":
        """The first rows of these users' text, so many in all."""
        parts: list[Batch] = []
        for user in users:  # no further than the rows reach: a retention text may be of very many
            parts.append(data.evaluation([user], config.split, max_rows))
            if sum(part.tokens_BxT.shape[1] for part in parts) >= max_rows:
                break
        rows = jax.tree.map(lambda *leaves: np.concatenate([leaf[0] for leaf in leaves])[:max_rows], *parts)
        return cls(rows)

    @property
    def record(self) -> dict[str, Any]:
        """{"rows", "digest"} of the tokens and their weights."""
        digest = hashlib.sha256()
        for leaf in jax.tree.leaves(self._rows):
            digest.update(np.ascontiguousarray(leaf).tobytes())
        return {"rows": len(self._rows.tokens_BxT), "digest": digest.hexdigest()}

    def evaluation(self, users: Sequence[str | None], split: str, max_rows: int | None = None) -> Batch:
        return jax.tree.map(lambda leaf: np.broadcast_to(leaf, (len(users), *leaf.shape)), self._rows)


def score_revisions(
    base: Base,
    data: HeldOut,
    catalog: Catalog,
    manifests: Sequence[Manifest],
    config: EvalConfig,
    *,
    retention: OneText | None = None,
    data_of: Callable[[str], Mapping[str, Any]] = lambda user: {},
) -> Iterator[list[tuple[Manifest, Scores]]]:
    """The scores of these revisions, a group (`config.group`) at a time, each of exactly the bytes that the manifest
    names. data_of(user): what is kept of where the user's text comes from.

    Raises PopulationError where they are of several cohorts, DataError without any.
    """
    if not manifests:
        raise DataError("no revisions to score: none of the catalog's users is in the data")
    cohort, shared = one_cohort(catalog, manifests)
    layout = catalog.cohort_of(manifests[0]).layout
    scorer = Scorer(sft(base.model), cohort, base.params, shared, config)
    norms = jax.jit(jax.vmap(lambda adapter: _norm(cohort, adapter, shared)))
    adapted = [spec.info for spec in cohort.sites if spec.info.kind == "linear"]
    # What acts on hidden states has no weights of its own to be compared with: all of the base's stand for them.
    adapted = adapted or [info for info in base.model.sites().values() if info.kind == "linear"]
    squares = [_squared(base.model.site_weight(base.params, info.name)) for info in adapted]
    weights = float(np.sqrt(sum(squares)))
    known = None
    if retention is not None:
        known = float(bits_per_byte(scorer.base_sums(retention, [manifests[0].user]))[0])
    for start in range(0, len(manifests), config.group):
        group = manifests[start : start + config.group]
        users = [manifest.user for manifest in group]
        rows = catalog.read_rows(group)

        # By place, not by name: a group may hold two revisions of one user. A short group is filled up with its first.
        def own(asked: Sequence[str], rows=rows) -> AdapterState:
            return layout.unpack(np.stack(rows + rows[:1] * (len(asked) - len(rows))))

        plain = bits_per_byte(scorer.base_sums(data, users))
        sums = scorer.adapter_sums(data, users, own)
        kept = None if retention is None else bits_per_byte(scorer.adapter_sums(retention, users, own))
        norm = np.asarray(norms(own(users))) / weights
        yield [
            (
                manifest,
                Scores(
                    digest=manifest.digest,
                    base_digest=base.digest,
                    own=float(bits_per_byte(sums)[at]),
                    base=float(plain[at]),
                    target_bytes=int(sums.target_bytes[at]),
                    norm=float(norm[at]),
                    created=now(),
                    version=code_version(),
                    retention=None if kept is None else float(kept[at]),
                    base_retention=known,
                    data=dict(data_of(manifest.user)),
                    retention_data=retention.record if retention else {},
                ),
            )
            for at, manifest in enumerate(group)
        ]


def _norm(cohort: Cohort, adapter: AdapterState, shared: AdapterState) -> jax.Array:
    """||all weight updates|| (Frobenius)."""
    return total_norm(cohort, adapter, shared, "frobenius")


def _squared(weight: jax.Array) -> float:
    return float(jnp.sum(jnp.square(weight.astype(jnp.float32))))
