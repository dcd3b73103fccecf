"""Invariant 11 at the store: no adapter with an entry that is not a finite number gets in, whoever writes it."""

import ml_dtypes
import numpy as np
import pytest

from popax.adapters.base import AdapterConfig
from popax.cli.main import main
from popax.errors import CatalogError
from popax.store import Catalog, Commit, RowLayout, writer
from popax.store.compress import compress
from popax.store.optimizer import pack_optimizer

WHERE = ("layers.attn.v_proj", "b")


def broken(adapter, value=np.nan):
    site, leaf = WHERE
    adapter[site][leaf][1, 2, 3] = value
    return adapter


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float8_e5m2", "float8_e4m3fn"])
def test_a_row_that_is_not_finite_is_refused_in_every_dtype(catalog, specs, make_adapter, dtype, value):
    kind = getattr(ml_dtypes, dtype, None) or np.dtype(dtype)
    narrow = lambda adapter: {s: {n: leaf.astype(kind) for n, leaf in each.items()} for s, each in adapter.items()}  # noqa: E731
    adapter = broken(narrow(make_adapter()), value)
    cohort = catalog.cohort(AdapterConfig(rank=4), specs, "base-a", RowLayout.of(adapter))
    with pytest.raises(CatalogError, match=r"user 'ada': leaf 'layers.attn.v_proj/b': entries that are not finite"):
        catalog.commit(cohort, "ada", adapter)
    assert not catalog.exists("ada")
    catalog.commit(cohort, "ada", narrow(make_adapter()))


def test_all_of_a_batch_are_named_and_nothing_of_it_is_written(catalog, cohort, make_adapter):
    commits = [Commit(f"user-{seed}", make_adapter(seed)) for seed in range(7)]
    for seed in (1, 2, 4, 6):
        broken(commits[seed].adapter)
    for write in (
        lambda: catalog.commit_batch(cohort, commits),
        lambda: catalog.stage_batch(cohort, commits, shard=0),
    ):
        with pytest.raises(CatalogError, match=r"'user-1'.*'user-2'.*'user-4'.* and 1 more users") as refused:
            write()
        assert refused.value.users == ("user-1", "user-2", "user-4", "user-6")
        assert refused.value.user == "user-1"
    assert not catalog.list()
    assert catalog.verify().orphan_rows == 0


def test_leaves_of_several_dtypes_and_padding_are_told_apart(catalog, specs):
    """Integers whose bits would be a NaN, beside floats: the row is no one array."""
    adapter = {"layers.attn.q_proj": {"a": np.ones((2, 3), np.float32), "n": np.full(3, -1, np.int32)}}
    cohort = catalog.cohort(AdapterConfig(rank=3), specs, "base-a", RowLayout.of(adapter))
    catalog.commit(cohort, "ada", adapter)
    adapter["layers.attn.q_proj"]["a"][1, 2] = np.inf
    with pytest.raises(CatalogError, match=r"'layers.attn.q_proj/a'"):
        catalog.commit(cohort, "bob", adapter)


@pytest.mark.parametrize("form", ["int8", "basis", "basis-int4"])
def test_a_revision_of_before_is_not_compressed(catalog, cohort, make_adapter, monkeypatch, form):
    with monkeypatch.context() as earlier:
        earlier.setattr(writer, "refuse_non_finite", lambda *_, **__: None, raising=False)
        catalog.commit_batch(cohort, [Commit("ada", make_adapter(0)), Commit("bob", broken(make_adapter(1)))])
    with pytest.raises(CatalogError, match=r"user 'bob': leaf 'layers.attn.v_proj/b'"):
        compress(catalog, ["ada", "bob"], form=form, max_error=1.0)
    assert [record.latest for record in catalog.records(["ada", "bob"])] == [1, 1]


def test_a_form_that_cannot_hold_a_row_is_refused(catalog, cohort, make_adapter):
    """Finite as it is, and not once it is stored: what is checked is what will be loaded."""

    class Overflowing:
        label, record = "int8", {"name": "int8"}

        def stored_bytes(self, layout):
            return layout.row_bytes

        def encode(self, layout, row):
            return row

        def decode(self, layout, stored):
            return layout.pack(broken(layout.unpack(stored.copy()), np.inf))

        def error(self, layout, row, decoded):
            return 0.0

    with pytest.raises(CatalogError, match=r"user 'ada'.* once stored as int8"):
        catalog.commit(cohort, "ada", make_adapter(), codec=Overflowing())
    assert not catalog.exists("ada")


def test_a_sum_that_overflows_is_refused(catalog, cohort, make_adapter, place, capsys):
    catalog.commit(cohort, "ada", make_adapter())
    assert main(["compose", str(place), "blend", "3e38*ada"]) == 2
    assert "user 'blend': leaf " in capsys.readouterr().err
    assert not Catalog.open(place).exists("blend")


def test_an_optimizers_state_of_nan_is_refused(catalog, cohort, make_adapter):
    """An infinity is not: some optimizers begin with one."""
    state = {"optimizer": {"mu": np.float32([1.0, np.nan])}, "step": np.int32(3)}
    assert pack_optimizer(state).row.size
    with pytest.raises(CatalogError, match=r"user 'ada': the optimizer's state 'optimizer/mu' holds NaN"):
        catalog.commit(cohort, "ada", make_adapter(), optimizer=state)
    catalog.commit(cohort, "ada", make_adapter(), optimizer={"best": np.float32(np.inf)})
