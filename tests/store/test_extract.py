"""Acceptance 9 of issue 2: one user out of 1,000, reading <= 1.2x that user's bytes, without accelerator or base."""

import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from popax.adapters.base import AdapterConfig, resolve
from popax.errors import CheckpointError, RevisionNotFoundError
from popax.store import Catalog, Commit, RowLayout
from popax.store.checkpoint import CheckpointStore
from popax.store.cohort import StoredCohort
from popax.store.extract import extract_to_peft, extract_user
from popax.types import SiteInfo

USERS = 1000
NAMES = ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")

# A platform that does not exist: any use of a device would fail.
CHILD = """
import hashlib, json, sys
from popax.store.extract import extract_user
import tensorstore as ts

found = extract_user(sys.argv[1], sys.argv[2])
read = sum(
    metric["values"][0]["value"]
    for metric in ts.experimental_collect_matching_metrics("/tensorstore/kvstore/")
    if metric["name"].endswith("/bytes_read")
)
leaves = {f"{site}/{name}": leaf for site, leaves in found.adapter.items() for name, leaf in leaves.items()}
digest = {name: hashlib.sha256(leaf.tobytes()).hexdigest() for name, leaf in leaves.items()}
print(json.dumps({"read": read, "bytes": sum(leaf.nbytes for leaf in leaves.values()), "digest": digest,
                  "sites": list(found.specs), "rank": found.config.rank, "provenance": found.provenance}))
"""


def _sites(layers, width):
    return {
        f"layers.{name}": SiteInfo(name=f"layers.{name}", d_in=width, d_out=width, layers=layers, axes=("embed", "ffw"))
        for name in NAMES
    }


def _population(rng, users, layers, width, rank=8):
    leaf = lambda: rng.standard_normal((users, layers, rank, width), np.float32)  # noqa: E731
    return {site: {"a": leaf(), "b": leaf()} for site in _sites(layers, width)}


def _in_a_child(source, user):
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(source), user],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "no_such_platform"},
        timeout=120,
    )
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


def test_one_of_a_thousand_users_is_read_alone(tmp_path):
    """A small adapter (14 leaves of 8 KB, no bit of it compressible), where what is read beside it weighs most."""
    layers, width = 1, 256
    config, sites = AdapterConfig(rank=8), _sites(layers, width)
    adapters = _population(np.random.default_rng(0), USERS, layers, width)
    cohort = StoredCohort.of(
        config,
        resolve(config, sites),
        "base",
        RowLayout.of({s: {k: v[0] for k, v in x.items()} for s, x in adapters.items()}),
    )
    users = [f"user-{index:04d}" for index in range(USERS)]
    store = CheckpointStore(tmp_path / "run", cohort=cohort)
    store.save(7, adapters=adapters, train_state={}, record={"run": "r"}, users=users)
    store.close()
    report = _in_a_child(tmp_path / "run", "user-0777")
    assert report["read"] <= 1.2 * report["bytes"]
    assert report["bytes"] == sum(leaf[0].nbytes for leaves in adapters.values() for leaf in leaves.values())
    # The description of 1,000 slots is read beside TensorStore; it does not grow with the adapter.
    assert (tmp_path / "run" / "7" / "record" / "metadata").stat().st_size < 32 << 10
    for site, leaves in adapters.items():
        for name, leaf in leaves.items():
            expected = leaf[777].tobytes()
            assert report["digest"][f"{site}/{name}"] == hashlib.sha256(expected).hexdigest()
    assert report["sites"] == list(sites)
    assert report["rank"] == 8
    assert report["provenance"] | {"version": ""} == {
        "user": "user-0777", "step": 7, "slot": 777, "base_digest": "base", "version": "", "run": "r"
    }  # fmt: skip


def test_one_user_of_a_catalog_is_read_alone(tmp_path):
    rng, config, sites = np.random.default_rng(0), AdapterConfig(rank=8), _sites(2, 256)
    catalog = Catalog.open(tmp_path / "catalog", create=True)
    adapters = [
        {site: {name: leaf[0] for name, leaf in leaves.items()} for site, leaves in _population(rng, 1, 2, 256).items()}
        for _ in range(4)
    ]
    cohort = catalog.cohort(config, resolve(config, sites), "base", RowLayout.of(adapters[0]))
    for start in range(0, USERS, 250):
        catalog.commit_batch(cohort, [Commit(f"user-{start + i:04d}", adapters[i % 4]) for i in range(250)])
    report = _in_a_child(tmp_path / "catalog", "user-0777")
    assert report["read"] <= 1.2 * report["bytes"]
    assert report["provenance"]["revision"] == 1


def test_extraction_carries_all_that_use_needs(tmp_path, catalog, place, config, specs, layout, make_adapter, same):
    shared = {"layers.attn.q_proj": {"u": np.arange(6, dtype=np.float32)}}
    cohort = catalog.cohort(config, specs, "base-a", layout, shared)
    for seed in (1, 2):
        catalog.commit(cohort, "ada", make_adapter(seed), run="r", provenance={"data": "d"})
    run = tmp_path / "run"
    stacked = {site: {k: np.stack([v, v + 1]) for k, v in leaves.items()} for site, leaves in make_adapter(1).items()}
    store = CheckpointStore(run, cohort=cohort, shared=shared)
    store.save(3, adapters=stacked, train_state={}, record={"run": "r"}, users=["ada", None])
    store.close()
    (run / "9.orbax-checkpoint-tmp").mkdir()  # what a killed save leaves
    for found in (
        extract_user(place, "ada", revision=1),
        extract_user(run, "ada"),
        extract_user(run / "3", "ada"),
    ):
        same(found.adapter, make_adapter(1))
        same(found.shared, shared)
        assert found.config == config
        assert found.specs == specs
        assert found.provenance["user"] == "ada"
        assert found.provenance["run"] == "r"
    (run / "shared" / cohort.shared_digest).unlink()
    with pytest.raises(CheckpointError, match="missing"):
        extract_user(run, "ada")
    same(extract_user(place, "ada").adapter, make_adapter(2))
    assert extract_user(place, "ada").provenance["provenance"] == {"data": "d"}


def test_what_cannot_be_extracted_is_named(tmp_path, cohort, place, make_adapter):
    stacked = {site: {k: v[None] for k, v in leaves.items()} for site, leaves in make_adapter(1).items()}
    for source in (tmp_path / "nothing", tmp_path):
        with pytest.raises(CheckpointError, match="neither a catalog nor"):
            extract_user(source, "ada")
    store = CheckpointStore(tmp_path / "run", cohort=cohort)
    store.save(1, adapters=stacked, train_state={}, record={}, users=[None])
    store.save(2, adapters=stacked, train_state={}, record={})
    with pytest.raises(RevisionNotFoundError, match="'ada' sits in none of the 1 slots"):
        extract_user(tmp_path / "run" / "1", "ada")
    with pytest.raises(CheckpointError, match="without its users"):
        extract_user(tmp_path / "run", "ada")
    with pytest.raises(CheckpointError, match="no revision 4"):
        extract_user(tmp_path / "run", "ada", revision=4)
    with pytest.raises(RevisionNotFoundError, match="'bob'"):
        extract_user(place, "bob")
    store.close()


def test_a_peft_directory_comes_out(tmp_path, catalog, cohort, place, make_adapter):
    safetensors = pytest.importorskip("safetensors.numpy")
    catalog.commit(cohort, "ada", make_adapter(3))
    written = extract_to_peft(place, "ada", tmp_path / "peft", base_name="some/base")
    record = json.loads((written / "adapter_config.json").read_text())
    assert (record["r"], record["base_model_name_or_path"]) == (4, "some/base")
    tensors = safetensors.load_file(written / "adapter_model.safetensors")
    a_TxD = next(leaf for name, leaf in sorted(tensors.items()) if "q_proj.lora_A" in name)
    np.testing.assert_array_equal(a_TxD, make_adapter(3)["layers.attn.q_proj"]["a"][0])
