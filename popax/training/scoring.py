"""Scoring a catalog's users for the gate, with a bar; what has been recorded when it is interrupted stays."""

from collections.abc import Sequence

from popax.data.pipeline import UserPipeline
from popax.evaluation.columns import EvalConfig
from popax.evaluation.gate import GateConfig, Verdict
from popax.evaluation.promotion import Outcome, promote_all
from popax.evaluation.revisions import OneText, score_revisions
from popax.modeling.base import Base
from popax.store.catalog import Catalog
from popax.store.pointers import Which
from popax.training.console import step_bar
from popax.training.news import data_provenance


def record_scores(
    base: Base,
    pipeline: UserPipeline,
    catalog: Catalog,
    requests: Sequence[tuple[str, Which]],
    config: EvalConfig,
    *,
    retention: OneText | None = None,
    gate: GateConfig | None = None,
) -> list[Outcome]:
    """Score these revisions and keep the scores, group by group; with a gate, promote those that pass.

    Raises BaseMismatchError where one was made for another base, and as `score_revisions`.
    """
    manifests = catalog.resolve(requests, base_digest=base.digest)
    outcomes: list[Outcome] = []
    with step_bar("score", unit="user") as tell:
        for group in score_revisions(
            base,
            pipeline,
            catalog,
            manifests,
            config,
            retention=retention,
            data_of=lambda user: data_provenance(pipeline.dataset, user),
        ):
            catalog.record_scores(group)
            if gate is None:
                outcomes += [Outcome(manifest, scores, Verdict(False, ())) for manifest, scores in group]
            else:
                outcomes += promote_all(catalog, [(one.user, one.revision) for one, _ in group], gate)
            tell(len(outcomes), len(manifests))
    return outcomes
