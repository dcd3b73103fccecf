"""From the catalog to slots: who is asked for, whether they fit, where they stand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popax.adapters.apply import bind_slots
from popax.adapters.table import METHODS
from popax.errors import BaseMismatchError, PopulationError, RevisionNotFoundError
from popax.residency import Request
from popax.serving.generate import generate
from popax.serving.pool import leased, parse_request, residency_for, stack_slots
from popax.store.catalog import Catalog
from popax.store.layout import RowLayout
from popax.types import NO_ADAPT

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
    assert parse_request("u0@latest", catalog) == Request("u0", "latest")
    assert parse_request("u0@promoted", catalog) == Request("u0", "promoted")
    assert parse_request("u0@good", catalog) == Request("u0@good")  # no tag of theirs
    catalog.tag("u0", "good", 1)
    assert parse_request("u0@good", catalog) == Request("u0", "good")
    assert parse_request("u0", catalog, "promoted") == Request("u0", "promoted")


@pytest.mark.parametrize("method", METHODS)
def test_from_the_catalog_they_write_as_from_memory(catalog, model, params, users_of, method):
    """Invariant 5: a batch of mixed users is each user alone, token for token."""
    users = users_of(method)
    names = ["u0@1", "u1"] if method == "lora" else [f"{method}-0", f"{method}-1"]
    requests = [parse_request(name, catalog) for name in (*names, "base", names[0])]
    residency = residency_for(catalog, requests, DIGEST)
    with residency, leased(residency, requests) as (adapt, manifests):
        assert [one and one.user for one in manifests] == [name.partition("@")[0] for name in names] + [
            None,
            names[0].partition("@")[0],
        ]
        jax.tree.map(np.testing.assert_array_equal, residency.adapters, stack_slots(users.cohort, users.adapters[:2]))
        rows = generate(model, params, [[4, 5]] * 4, adapt=adapt, max_new_tokens=8)
    assert rows[0].tokens.tolist() == rows[3].tokens.tolist()
    for row, adapters in ((0, users.adapters[:1]), (1, users.adapters[1:2])):
        alone = bind_slots(users.cohort, stack_slots(users.cohort, adapters), users.shared, jnp.zeros(1, jnp.int32))
        assert (
            rows[row].tokens.tolist()
            == generate(model, params, [[4, 5]], adapt=alone, max_new_tokens=8)[0].tokens.tolist()
        )
    assert rows[2].tokens.tolist() == generate(model, params, [[4, 5]], max_new_tokens=8)[0].tokens.tolist()


def test_only_base_rows_need_no_slots(catalog):
    requests = [Request(None), Request(None)]
    assert residency_for(catalog, requests, DIGEST) is None
    with leased(None, requests) as (adapt, manifests):
        assert (adapt, manifests) == (NO_ADAPT, (None, None))


def test_who_does_not_fit_is_named(catalog, users_of):
    with pytest.raises(PopulationError, match=r"'u0'@2 \(lora rank 3\) and 'lora_xs-0'@1 \(lora_xs rank 3\)"):
        residency_for(catalog, [Request("u0"), Request("lora_xs-0")], DIGEST)
    with pytest.raises(BaseMismatchError, match="other-base"):
        residency_for(catalog, [Request("u0")], "other-base")
    with pytest.raises(RevisionNotFoundError, match="no revision 9"):
        residency_for(catalog, [Request("u0", 9)], DIGEST)
    users = users_of("lora")
    with pytest.raises(PopulationError, match="no adapter"):
        stack_slots(users.cohort, [])
    with pytest.raises(PopulationError, match="adapter 1 has leaves"):
        stack_slots(users.cohort, [users.adapters[0], users_of("lora_xs").adapters[0]])


def test_after_a_deletion_the_base_is_back_bitwise(catalog, model, params, users_of, tmp_path):
    """Invariant 8, while the adapter still lies in its slot: nobody gets it, and the base's logits are the base's."""
    users = users_of("lora")
    own = Catalog.open(tmp_path / "catalog", create=True)
    stored = own.cohort(users.cohort.config, users.cohort.specs, DIGEST, RowLayout.of(users.cohort.abstract()))
    own.commit(stored, "ada", users.adapters[0])
    tokens_BxT = jnp.asarray([[4, 5, 6], [7, 8, 9]], jnp.int32)
    plain = model(params, tokens_BxT)
    with residency_for(own, [Request("ada")], DIGEST) as residency:
        with leased(residency, [Request("ada"), Request("ada")]) as (adapt, _):
            adapted = model(params, tokens_BxT, adapt=adapt)
        assert (np.asarray(adapted) != np.asarray(plain)).any()
        own.delete("ada")
        with pytest.raises(RevisionNotFoundError, match="'ada'"), residency.lease([Request("ada")]):
            pass
        with leased(residency, [Request(None), Request(None)]) as (adapt, _):
            assert np.asarray(model(params, tokens_BxT, adapt=adapt)).tobytes() == np.asarray(plain).tobytes()
