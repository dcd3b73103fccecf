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

_REPLACED = "it was deleted, or replaced by other bytes, while it was judged: score what is there"


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
    """Promote those of these revisions that pass; what kept the others from it is in their outcomes.

    In one transaction, together with the thresholds that they passed: no other bytes than those judged are promoted.
    """
    gate = gate or GateConfig()
    manifests = catalog.resolve(requests)
    outcomes = []
    for manifest, scores in zip(manifests, catalog.scores(manifests), strict=True):
        if scores is None:
            unscored = "these bytes have not been scored: run popax eval --record"
            outcomes.append(Outcome(manifest, None, Verdict(False, (unscored,))))
            continue
        outcomes.append(Outcome(manifest, scores, judge(scores, gate)))
    asked = {"gate": dataclasses.asdict(gate), "time": now()}
    passed = [
        (at, one.manifest, dataclasses.replace(one.scores, promoted=asked))
        for at, one in enumerate(outcomes)
        if one.scores is not None and one.verdict.passed
    ]
    moved = catalog.promote_scored([(manifest, scores) for _, manifest, scores in passed])
    for (at, manifest, scores), there in zip(passed, moved, strict=True):
        outcomes[at] = Outcome(manifest, scores, outcomes[at].verdict if there else Verdict(False, (_REPLACED,)))
    return outcomes
