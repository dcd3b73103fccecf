"""Promotion through the gate: only a revision that was scored, as it is, and did well enough is served."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from popax.errors import GateError
from popax.evaluation.gate import GateConfig, Verdict, judge
from popax.store.catalog import Catalog
from popax.store.manifest import Manifest, UserRecord, now
from popax.store.pointers import Which
from popax.store.scores import Scores


class Outcome(NamedTuple):
    """What became of one candidate. scores: None where it was never scored."""

    manifest: Manifest
    scores: Scores | None
    verdict: Verdict


def promote(catalog: Catalog, user: str, revision: Which = None, gate: GateConfig | None = None) -> UserRecord:
    """Make serving follow this revision (default: the latest), if its own scores pass.

    Raises GateError with each value that falls short, and RevisionNotFoundError.
    """
    [outcome] = promote_all(catalog, [(user, revision)], gate)
    if not outcome.verdict.passed:
        raise GateError(f"{outcome.manifest.shown} stays a candidate: {'; '.join(outcome.verdict.reasons)}")
    [record] = catalog.records([user])
    assert record is not None
    return record


def promote_all(
    catalog: Catalog, requests: Sequence[tuple[str, Which]], gate: GateConfig | None = None
) -> list[Outcome]:
    """Promote those of these revisions that pass; what kept the others from it is in their outcomes."""
    gate = gate or GateConfig()
    manifests = catalog.resolve(requests)
    outcomes = []
    for manifest, scores in zip(manifests, catalog.scores(manifests), strict=True):
        if scores is None:
            unscored = "these bytes have not been scored: run popax eval --record"
            outcomes.append(Outcome(manifest, None, Verdict(False, (unscored,))))
            continue
        verdict = judge(scores, gate)
        outcomes.append(Outcome(manifest, scores, verdict))
        if verdict.passed:
            asked = {"gate": dataclasses.asdict(gate), "time": now()}
            # Scores that say what they were let pass for, then the pointer: killed between, it is a candidate still.
            catalog.record_scores([(manifest, dataclasses.replace(scores, promoted=asked))])
            catalog.promote(manifest.user, manifest.revision)
    return outcomes
