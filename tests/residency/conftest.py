"""A catalog of many small users of one cohort, each row of which says whose it is."""

import numpy as np
import pytest

from popax.adapters.base import AdapterConfig
from popax.adapters.cohort import Cohort
from popax.store import Catalog, Commit, RowLayout
from popax.types import SiteInfo

SITES = {
    "layers.attn.q_proj": SiteInfo(name="layers.attn.q_proj", d_in=8, d_out=8, layers=2, axes=("embed", "heads")),
    "lm_head": SiteInfo(name="lm_head", d_in=8, d_out=16, layers=0, axes=("embed", "vocab")),
}
COHORT = Cohort.of(AdapterConfig(rank=2, targets=tuple(SITES)), SITES)
USERS = [f"user-{index}" for index in range(300)]


def adapter(value):
    return {
        site: {name: np.full(leaf.shape, value, leaf.dtype) for name, leaf in leaves.items()}
        for site, leaves in COHORT.abstract().items()
    }


@pytest.fixture(scope="session")
def filled(tmp_path_factory):
    """The place of a catalog whose user i has the adapter(i)."""
    place = tmp_path_factory.mktemp("residency") / "catalog"
    catalog = Catalog.open(place, create=True)
    cohort = catalog.cohort(COHORT.config, COHORT.specs, "base", RowLayout.of(COHORT.abstract()))
    catalog.commit_batch(cohort, [Commit(user, adapter(at)) for at, user in enumerate(USERS)])
    return place


@pytest.fixture
def catalog(filled):
    return Catalog.open(filled)


@pytest.fixture
def stored(catalog):
    return catalog.cohort_of(catalog.load("user-0")[1])
