"""A basis that a cluster shares: as good as the best there is, and what is written in it says what it cost."""

import numpy as np
import pytest

from popax.adapters.base import AdapterConfig, TargetRule, resolve
from popax.cli.main import main
from popax.errors import CatalogError, CorruptRevisionError, PopulationError
from popax.store import Catalog, Commit, RowLayout
from popax.store.basis import BasisCodec
from popax.store.basis_fit import fit_bases, nearest_bases
from popax.store.codec import CODECS
from popax.store.cohort import StoredCohort
from popax.store.compress import Shared, compress
from popax.store.database import Database
from popax.store.records import basis_array, row_key
from popax.types import SiteInfo

D, F, RANK, LAYERS = 24, 20, 4, 2
SITES = {
    name: SiteInfo(name=name, d_in=D, d_out=F, layers=layers, axes=("embed", "heads"))
    for name, layers in (("layers.q", LAYERS), ("head", 0))
}


def cohort_of(*targets, alpha=8.0):
    config = AdapterConfig(rank=RANK, alpha=alpha, targets=targets or (r".*",))
    specs = resolve(config, SITES)
    shape = {name: (LAYERS,) if spec.info.layers else () for name, spec in specs.items()}
    layout = RowLayout.of(
        {
            name: {"a": _zeros(*lead, specs[name].rank, D), "b": _zeros(*lead, specs[name].rank, F)}
            for name, lead in shape.items()
        }
    )
    return StoredCohort.of(config, specs, "base", layout, None)


def _zeros(*shape):
    return np.zeros(shape, np.float32)


def users_of(cohort, count, *, planted=None, seed=0):
    """Packed rows of random adapters; planted: so many dimensions hold all of them, the same for all, at each layer."""
    rng, rows = np.random.default_rng(seed), []
    own = cohort.layout.unpack(np.zeros(cohort.layout.row_bytes, np.uint8))
    hold = {
        (name, leaf): np.linalg.qr(rng.normal(size=(*x.shape[:-2], x.shape[-1], planted or x.shape[-1])))[0].swapaxes(
            -1, -2
        )
        for name, leaves in own.items()
        for leaf, x in leaves.items()
    }
    for _ in range(count):
        tree = {}
        for name, leaves in own.items():
            ranks = np.array(cohort.specs[name].ranks)
            mask = np.arange(cohort.specs[name].rank)[None] < ranks[:, None]
            mask = mask if cohort.specs[name].info.layers else mask[0]
            tree[name] = {
                leaf: (
                    (rng.normal(size=(*x.shape[:-1], hold[name, leaf].shape[-2])) @ hold[name, leaf]) * mask[..., None]
                ).astype(np.float32)
                for leaf, x in leaves.items()
            }
        rows.append(cohort.layout.pack(tree))
    return rows


def dense(cohort, row):
    """Each layer's weight update, as a matrix: {site: [L, D, F]}."""
    found = {}
    for name, leaves in cohort.layout.unpack(row).items():
        scale = np.asarray(cohort.specs[name].scales)[:, None, None]
        update = np.einsum("...rd,...rf->...df", leaves["a"].astype(np.float64), leaves["b"].astype(np.float64))
        found[name] = scale * (update if update.ndim == 3 else update[None])
    return found


def distance(cohort, row, other):
    one, two = dense(cohort, row), dense(cohort, other)
    norm = sum(float((one[name] ** 2).sum()) for name in one)
    return (sum(float(((one[name] - two[name]) ** 2).sum()) for name in one) / norm) ** 0.5


def there_and_back(codec, cohort, row):
    return codec.decode(cohort.layout, codec.encode(cohort.layout, row))


@pytest.mark.parametrize("rank", [3, 4, 7])
def test_the_error_and_what_comes_back_are_those_of_the_projection(rank):
    """Closed form with whole matrices: p p^T W q q^T. Below the cohort's rank as a core, above it as two factors."""
    cohort = cohort_of()
    rows = users_of(cohort, 5)
    [basis], _ = fit_bases(cohort, rows, rank=rank)
    codec = BasisCodec(cohort, basis)
    for row in rows:
        back = there_and_back(codec, cohort, row)
        for name, w in dense(cohort, row).items():
            p, q = (np.asarray(basis.arrays[name][leaf], np.float64) for leaf in "ab")
            np.testing.assert_allclose(
                p @ np.swapaxes(p, -1, -2), np.broadcast_to(np.eye(rank), (*p.shape[:-2], rank, rank)), atol=1e-5
            )
            projected = np.swapaxes(p, -1, -2) @ p @ w @ np.swapaxes(q, -1, -2) @ q
            np.testing.assert_allclose(dense(cohort, back)[name], projected, atol=1e-4)
        assert codec.error(cohort.layout, row, back) == pytest.approx(distance(cohort, row, back), abs=1e-6)
    numbers = (LAYERS + 1) * (rank**2 if rank <= RANK else 2 * RANK * rank)
    assert 4 * numbers <= codec.stored_bytes(cohort.layout) < 4 * numbers + 4 * 64


def test_of_one_user_it_is_the_truncated_singular_value_decomposition():
    """Eckart and Young: nothing of rank S is nearer."""
    cohort = cohort_of()
    [row] = users_of(cohort, 1)
    for rank in (1, 2, 3, 4):
        [basis], _ = fit_bases(cohort, [row], rank=rank)
        lost = kept = 0.0
        for w in dense(cohort, row).values():
            values = np.linalg.svd(w, compute_uv=False)
            lost, kept = lost + float((values[:, rank:] ** 2).sum()), kept + float((values**2).sum())
        found = distance(cohort, row, there_and_back(BasisCodec(cohort, basis), cohort, row))
        assert found == pytest.approx((lost / kept) ** 0.5, abs=2e-3)


def test_of_many_users_it_is_within_three_percent_of_whole_eigenvectors_from_many_starts():
    """An oracle that forms every matrix, and takes all eigenvectors by turns from ten random starts. These users have
    nothing in common, which leaves many local optima; those who have are found exactly (the test of clusters)."""
    cohort, rank = cohort_of(), 6
    rows = users_of(cohort, 8)
    [basis], _ = fit_bases(cohort, rows, rank=rank)
    updates = [dense(cohort, row) for row in rows]
    norms = [sum(float((w**2).sum()) for w in one.values()) for one in updates]
    rng = np.random.default_rng(1)

    def best(ws):
        def held(p, q):
            return sum(float(((p.T @ w @ q) ** 2).sum()) for w in ws)

        found = 0.0
        for _ in range(10):
            q = np.linalg.qr(rng.normal(size=(F, rank)))[0]
            for _ in range(200):
                p = np.linalg.eigh(sum(w @ q @ q.T @ w.T for w in ws))[1][:, -rank:]
                q = np.linalg.eigh(sum(w.T @ p @ p.T @ w for w in ws))[1][:, -rank:]
            found = max(found, held(p, q))
        return found

    for name in SITES:
        p, q = (
            np.asarray(basis.arrays[name][leaf], np.float64).reshape(-1, rank, size)
            for leaf, size in (("a", D), ("b", F))
        )
        for layer in range(len(p)):
            ws = [one[name][layer] / norm**0.5 for one, norm in zip(updates, norms, strict=True)]
            mine = sum(float(((p[layer] @ w @ q[layer].T) ** 2).sum()) for w in ws)
            assert mine > 0.97 * best(ws)


def test_clusters_find_the_users_who_share_a_basis():
    cohort = cohort_of()
    rows = [row for seed in range(3) for row in users_of(cohort, 6, planted=5, seed=seed)]
    order = np.random.default_rng(0).permutation(len(rows))
    bases, nearest = fit_bases(cohort, [rows[at] for at in order], rank=5, clusters=3)
    groups = {frozenset(int(order[at]) // 6 for at in np.flatnonzero(nearest == index)) for index in range(3)}
    assert groups == {frozenset({0}), frozenset({1}), frozenset({2})}
    for at, index in zip(order, nearest, strict=True):
        assert distance(cohort, rows[at], there_and_back(BasisCodec(cohort, bases[index]), cohort, rows[at])) < 1e-3
    newcomer = users_of(cohort, 7, planted=5, seed=1)[-1]
    assert nearest_bases(cohort, bases, [newcomer])[0] == nearest[list(order).index(6)]


def test_layers_of_other_ranks_keep_theirs():
    """Columns beyond a layer's own rank are zero, and stay zero, whatever the basis."""
    cohort = cohort_of(
        TargetRule(pattern=r"layers\.0\.q", rank=2), TargetRule(pattern=r"layers\..*"), TargetRule(pattern="head")
    )
    rows = users_of(cohort, 4)
    for rank in (2, 3, 6):
        [basis], _ = fit_bases(cohort, rows, rank=rank)
        for row in rows:
            back = cohort.layout.unpack(there_and_back(BasisCodec(cohort, basis), cohort, row))
            assert not back["layers.q"]["a"][0, 2:].any()
            assert not back["layers.q"]["b"][0, 2:].any()
            assert back["layers.q"]["b"][1, 2:].any() == (rank > 2)


def test_a_user_whose_update_is_zero_is_nobodys_trouble():
    cohort = cohort_of()
    rows = [np.zeros(cohort.layout.row_bytes, np.uint8), *users_of(cohort, 3, planted=4)]
    for clusters in (1, 2, 9):
        bases, nearest = fit_bases(cohort, rows, rank=4, clusters=clusters)
        assert 1 <= len(bases) <= min(clusters, 3)
        for row, index in zip(rows, nearest, strict=True):
            codec = BasisCodec(cohort, bases[index])
            assert codec.error(cohort.layout, row, there_and_back(codec, cohort, row)) < 1e-3
    bad = cohort.layout.unpack(rows[1].copy())
    bad["head"]["a"] = np.full_like(bad["head"]["a"], np.nan)
    with pytest.raises(PopulationError, match="'head' holds what is not a finite number"):
        codec.encode(cohort.layout, cohort.layout.pack(bad))


# In a catalog


@pytest.fixture
def stored(place):
    """(catalog, cohort, rows): two clusters of six users and one user who is like nobody."""
    catalog, plain = Catalog.open(place, create=True), cohort_of()
    cohort = catalog.cohort(plain.config, plain.specs, "base", plain.layout)
    rows = {
        f"{name}-{at}": row
        for seed, name in enumerate(("left", "right"))
        for at, row in enumerate(users_of(cohort, 6, planted=5, seed=seed))
    }
    rows["other-0"] = users_of(cohort, 1, seed=9)[0]
    catalog.commit_batch(cohort, [Commit(user, row) for user, row in rows.items()])
    return catalog, cohort, rows


@pytest.mark.parametrize("form", ["basis", *(f"basis-{name}" for name in CODECS)])
def test_who_fits_a_basis_is_written_in_it_and_who_does_not_is_left(stored, place, form):
    catalog, cohort, rows = stored
    bound = {"basis": 2e-3, "basis-int8": 0.02, "basis-int4": 0.3}[form]
    done = {
        one.user: one
        for one in compress(catalog, list(rows), form=form, max_error=bound, shared=Shared(rank=5, clusters=3))
    }
    reader = Catalog.open(place, read_only=True)
    for user, row in rows.items():
        [back], manifest = reader.read_rows(reader.resolve([(user, None)])), reader.load(user)[1]
        assert done[user].revision == manifest.revision == 2
        assert manifest.codec["error"] == pytest.approx(distance(cohort, row, back), rel=1e-3, abs=1e-6)
        assert manifest.codec["error"] <= bound
        assert manifest.derived_from[0][:2] == (user, 1)
        assert reader.records([user])[0].promoted is None
        assert done[user].bytes_after < done[user].bytes_before / 3
    audit = reader.verify()
    assert (audit.clean, audit.orphan_rows, audit.orphan_records) == (True, 0, 0)
    assert len({reader.load(user)[1].codec["basis"] for user in rows}) == 3
    # One basis cannot hold three clusters: who would lose too much is left as they are.
    newer = compress(catalog, list(rows), form=form, max_error=bound, shared=Shared(rank=5))
    assert all(one.revision is None and one.error is None for one in newer), "compressed already"


def test_the_gate_leaves_whom_the_basis_does_not_fit(stored):
    catalog, _cohort, rows = stored
    done = compress(catalog, list(rows), form="basis", max_error=2e-3, shared=Shared(rank=5, clusters=2))
    left = {one.user: one.error for one in done if one.revision is None}
    assert "other-0" in left
    assert left["other-0"] > 0.1
    assert catalog.records(["other-0"])[0].latest == 1
    assert {one.user for one in done if one.revision} <= {user for user in rows if user != "other-0"}
    assert len(done) == len(rows)


def test_a_basis_is_named_to_those_who_are_deleted_and_goes_with_the_last_that_needs_it(stored, place, capsys):
    catalog, _cohort, rows = stored
    compress(catalog, list(rows), form="basis", max_error=1.0, shared=Shared(rank=5, clusters=2))
    record = catalog.load("left-0")[1].codec
    assert [one.digest for one in catalog.bases.fitted_on("left-0")] == [record["basis"]]
    gone = catalog.delete("left-0")
    assert [(one.user, one.revision, one.digest) for one in gone.bases] == [("left-0", 1, record["basis"])]
    users = {one.user for one in catalog.list(basis=record["basis"][:12])}
    assert {f"left-{at}" for at in range(1, 6)} <= users
    assert main(["users", "tainted", str(place), "left-0"]) == 0
    assert f"popax users list --basis {record['basis'][:16]}" in capsys.readouterr().out
    for user in users:
        catalog.delete(user)
    reader = Catalog.open(place)
    assert reader.verify().orphan_rows == 1, "the basis, which nothing names any more"
    assert reader.gc(grace_s=0).rows_removed == 1
    audit = reader.verify()
    assert (audit.orphan_rows, audit.orphan_records, audit.clean) == (0, 0, True)
    assert reader.bases.fitted_on("left-1") == []


def test_a_flipped_bit_in_a_basis_is_found_and_names_the_revision(stored, place):
    catalog, cohort, rows = stored
    compress(catalog, list(rows), form="basis", max_error=1.0, shared=Shared(rank=5))
    record = catalog.load("left-0")[1].codec
    store = Database.open(place, create=False).kvstore
    key = row_key(basis_array(cohort.id, record["layout"]), record["row"])
    good = bytearray(store.read(key).result().value)
    good[7] ^= 1
    store.write(key, bytes(good)).result()
    with pytest.raises(CorruptRevisionError, match="the basis of 'left-0'@2"):
        Catalog.open(place).load("left-0")
    assert Catalog.open(place).verify().problem_count == len(rows)
    assert Catalog.open(place).load("left-0", 1)[1].codec is None


def test_a_method_that_has_no_pair_of_factors_is_refused_by_name(catalog, make_adapter, specs):
    config = AdapterConfig(method="lora_xs", rank=4, targets=("layers\\.attn\\..*",))
    adapter = {site: {"core": np.zeros((2, 4, 4), np.float32)} for site in make_adapter()}
    cohort = catalog.cohort(config, specs, "base-a", RowLayout.of(adapter))
    catalog.commit(cohort, "ada", adapter)
    with pytest.raises(CatalogError, match="method='lora_xs' has no pair of factors"):
        compress(catalog, ["ada"], form="basis", max_error=1.0)
    with pytest.raises(CatalogError, match="form 'int3': one of int8, int4, basis"):
        compress(catalog, ["ada"], form="int3", max_error=1.0)
