"""From the catalog to slots: who is asked for, whether they fit, where they stand."""

import jax
import numpy as np
import pytest

from popax.adapters.table import METHODS
from popax.errors import BaseMismatchError, PopulationError, RevisionNotFoundError
from popax.serving.generate import generate
from popax.serving.pool import Request, bind_rows, load_rows, parse_request, stack_slots
from popax.store.catalog import Catalog
from popax.store.layout import RowLayout

DIGEST = "the-base"


@pytest.fixture(scope="module")
def catalog(users_of, tmp_path_factory):
    """lora users u0 (twice), u1 and eve@3; x0 of each other method."""
    catalog = Catalog.open(tmp_path_factory.mktemp("pool") / "catalog", create=True)
    for method in METHODS:
        cohort, shared, adapters = users_of(method)
        layout = RowLayout.of(cohort.abstract())
        stored = catalog.cohort(cohort.config, cohort.specs, DIGEST, layout, shared or None)
        names = ["u0", "u1", "eve@3"] if method == "lora" else [f"{method}-0", f"{method}-1", f"{method}-2"]
        for name, adapter in zip(names, adapters, strict=True):
            catalog.commit(stored, name, adapter)
        if method == "lora":
            catalog.commit(stored, "u0", adapters[2])
    return catalog


def test_requests_are_read(catalog):
    assert parse_request("base", catalog) == Request(None)
    assert parse_request("u0", catalog) == Request("u0")
    assert parse_request("u0@1", catalog) == Request("u0", 1)
    assert parse_request("eve@3", catalog) == Request("eve@3")  # that is the user's id
    assert parse_request("eve@3@1", catalog) == Request("eve@3", 1)
    assert parse_request("a@b.org", catalog) == Request("a@b.org")


@pytest.mark.parametrize("method", METHODS)
def test_from_the_catalog_they_write_as_from_memory(catalog, model, params, users_of, method):
    users = users_of(method)
    names = ["u0@1", "u1"] if method == "lora" else [f"{method}-0", f"{method}-1"]
    pool, slots = load_rows(catalog, [parse_request(n, catalog) for n in (*names, "base", names[0])], DIGEST)
    assert slots == [0, 1, -1, 0]
    assert [manifest.user for manifest in pool.manifests] == [name.partition("@")[0] for name in names]
    jax.tree.map(np.testing.assert_array_equal, pool.adapters, stack_slots(users.cohort, users.adapters[:2]))
    rows = generate(model, params, [[4, 5]] * 4, adapt=bind_rows(pool, slots), max_new_tokens=8)
    assert rows[0].tokens.tolist() == rows[3].tokens.tolist()
    assert rows[2].tokens.tolist() == generate(model, params, [[4, 5]], max_new_tokens=8)[0].tokens.tolist()


def test_only_base_rows_need_no_pool(catalog):
    pool, slots = load_rows(catalog, [Request(None), Request(None)], DIGEST)
    assert pool is None
    assert slots == [-1, -1]


def test_who_does_not_fit_is_named(catalog, users_of):
    with pytest.raises(PopulationError, match=r"'u0'@2 \(lora rank 3\) and 'lora_xs-0'@1 \(lora_xs rank 3\)"):
        load_rows(catalog, [Request("u0"), Request("lora_xs-0")], DIGEST)
    with pytest.raises(BaseMismatchError, match="other-base"):
        load_rows(catalog, [Request("u0")], "other-base")
    with pytest.raises(RevisionNotFoundError, match="no revision 9"):
        load_rows(catalog, [Request("u0", 9)], DIGEST)
    users = users_of("lora")
    with pytest.raises(PopulationError, match="no adapter"):
        stack_slots(users.cohort, [])
    with pytest.raises(PopulationError, match="adapter 1 has leaves"):
        stack_slots(users.cohort, [users.adapters[0], users_of("lora_xs").adapters[0]])
