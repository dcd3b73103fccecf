"""Scores are of the bytes that the manifest names, whoever else is in the group."""

import jax
import numpy as np
import pytest

from popax.adapters.base import AdapterConfig
from popax.adapters.cohort import Cohort
from popax.data.pipeline import PipelineConfig, UserPipeline
from popax.data.tokenize import load_tokenizer
from popax.data.users import UserDataset
from popax.evaluation.columns import EvalConfig
from popax.evaluation.revisions import score_revisions
from popax.modeling.base import new_base
from popax.modeling.config import ModelConfig
from popax.modeling.model import Model
from popax.store import Catalog, RowLayout

MODEL = Model(
    ModelConfig(
        vocab_size=259,
        embed_dim=16,
        ffw_dim=24,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        max_seq_len=32,
        tied_embeddings=True,
    )
)


@pytest.mark.parametrize("group", [2, 4])
def test_two_revisions_of_one_user_are_scored_each_by_its_own_bytes(tmp_path, group):
    """Against each of them scored alone; group 4 is filled up."""
    base = new_base(MODEL, MODEL.init(jax.random.key(0)), source="test")
    cohort = Cohort.of(AdapterConfig(rank=2), MODEL.sites())
    catalog = Catalog.open(tmp_path / "catalog", create=True)
    stored = catalog.cohort(cohort.config, cohort.specs, base.digest, RowLayout.of(cohort.abstract()))
    rng = np.random.default_rng(0)
    for user in ("ada", "ada", "bob"):
        fill = lambda leaf: rng.normal(size=leaf.shape, scale=0.3).astype(leaf.dtype)  # noqa: E731
        catalog.commit(stored, user, jax.tree.map(fill, cohort.abstract()))
    config = PipelineConfig(seq_len=8, batch_size=2, past_fraction=0.5, validation_fraction=0.0)
    texts = {"ada": ["abc", "de"] * 3, "bob": ["xyz"] * 4}
    data = UserPipeline(UserDataset.from_examples(texts), load_tokenizer("byte"), config)

    def scored(manifests, size):
        groups = score_revisions(base, data, catalog, manifests, EvalConfig(group=size))
        return [scores for some in groups for _, scores in some]

    manifests = catalog.resolve([("ada", 1), ("ada", 2), ("bob", 1)])
    together = scored(manifests, group)
    for manifest, scores in zip(manifests, together, strict=True):
        [alone] = scored([manifest], 1)
        assert (scores.own, scores.norm) == pytest.approx((alone.own, alone.norm), rel=1e-5)
    assert abs(together[0].own - together[1].own) > 1e-3
