"""A small cohort, and catalogs on disk."""

import numpy as np
import pytest

from popax.adapters.base import AdapterConfig, resolve
from popax.store import Catalog, RowLayout
from popax.types import SiteInfo

LAYERS, RANK, WIDTH = 2, 4, 16
SITES = {
    name: SiteInfo(name=name, d_in=WIDTH, d_out=WIDTH, layers=LAYERS, axes=("embed", "heads"))
    for name in ("layers.attn.q_proj", "layers.attn.v_proj")
}
CONFIG = AdapterConfig(rank=RANK, targets=("layers\\.attn\\.q_proj", "layers\\.attn\\.v_proj"))


@pytest.fixture
def specs():
    return resolve(CONFIG, SITES)


@pytest.fixture
def config():
    return CONFIG


@pytest.fixture
def make_adapter():
    """make_adapter(seed) -> one user's adapter of the small cohort."""

    def make(seed=0):
        rng = np.random.default_rng(seed)
        leaf = lambda: rng.normal(size=(LAYERS, RANK, WIDTH)).astype(np.float32)  # noqa: E731
        return {site: {"a": leaf(), "b": leaf()} for site in SITES}

    return make


@pytest.fixture
def layout(make_adapter):
    return RowLayout.of(make_adapter())


@pytest.fixture
def place(tmp_path):
    return tmp_path / "catalog"


@pytest.fixture
def catalog(place):
    return Catalog.open(place, create=True)


@pytest.fixture
def cohort(catalog, specs, layout):
    return catalog.cohort(CONFIG, specs, "base-a", layout)


@pytest.fixture
def same():
    """same(x, y): equal trees, bit for bit, dtypes included."""

    def compare(left, right):
        assert set(left) == set(right)
        for site, leaves in left.items():
            assert set(leaves) == set(right[site])
            for name, leaf in leaves.items():
                other = np.asarray(right[site][name])
                assert (other.dtype, other.shape) == (np.asarray(leaf).dtype, np.asarray(leaf).shape)
                assert other.tobytes() == np.asarray(leaf).tobytes()

    return compare
