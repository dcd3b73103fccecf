"""Signatures: what a trusted key has signed is loaded, and nothing else."""

import hashlib

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from popax.cli.main import main
from popax.errors import CheckpointError, SignatureError
from popax.store import Catalog, Commit
from popax.store.database import Database
from popax.store.extract import extract_user
from popax.store.packed import seal_user, unseal_user
from popax.store.records import cohort_key, row_key, seal, unseal, user_key
from popax.store.signing import Signer, Trust


def _pems(folder, name, key=None):
    key = key or Ed25519PrivateKey.generate()
    private, public = folder / f"{name}.pem", folder / f"{name}-public.pem"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture
def keys(tmp_path):
    """{"ours": (private, public), "theirs": ...}: paths."""
    return {name: _pems(tmp_path, name) for name in ("ours", "theirs")}


@pytest.fixture
def signed(place, keys, config, specs, layout, make_adapter):
    """ada and bob by our key, eve by theirs, mallory by none; bob twice."""
    for name, users in (("ours", ["ada", "bob", "bob"]), ("theirs", ["eve"]), (None, ["mallory"])):
        signer = Signer.from_pem(keys[name][0]) if name else None
        catalog = Catalog.open(place, create=True, signer=signer)
        cohort = catalog.cohort(config, specs, "base-a", layout)
        for seed, user in enumerate(users):
            catalog.commit(cohort, user, make_adapter(seed))
    return place


def test_only_what_a_trusted_key_signed_is_loaded(signed, keys, make_adapter, same):
    ours = Catalog.open(signed, trusted=Trust.from_pem(keys["ours"][1]))
    same(ours.load("ada")[0], make_adapter(0))
    for revision in (1, 2):
        same(ours.load("bob", revision)[0], make_adapter(revision))
    with pytest.raises(SignatureError, match="'eve'@1 is signed by the key"):
        ours.load("eve")
    with pytest.raises(SignatureError, match="'mallory'@1 is not signed"):
        ours.load_batch(["ada", "mallory"])
    both = Catalog.open(signed, trusted=Trust.from_pem(keys["ours"][1], keys["theirs"][1]))
    assert [manifest.user for _, manifest in both.load_batch(["ada", "eve"])] == ["ada", "eve"]
    same(Catalog.open(signed).load("mallory")[0], make_adapter(0))
    assert Catalog.open(signed).verify().clean


def test_what_was_changed_after_signing_is_refused(signed, keys, make_adapter, layout):
    """The digest in the manifest agrees with the forged row: only the signature tells."""
    database = Database.open(signed, create=False)
    record = unseal_user(database.kvstore.read(user_key("ada")).result().value)
    forged = layout.pack(make_adapter(99))
    for change in ("digest", "user", "base"):
        manifest = dict(record["manifest"])
        if change == "digest":
            database.kvstore.write(row_key(manifest["cohort"], manifest["row"]), forged.tobytes()).result()
            manifest["digest"] = hashlib.sha256(forged.tobytes()).hexdigest()
        elif change == "user":
            other = unseal_user(database.kvstore.read(user_key("bob")).result().value)["manifest"]
            manifest = {**other, "revision": 1}
        else:
            manifest["signature"] = {**manifest["signature"], "value": "00" * 64}
        database.kvstore.write(user_key("ada"), seal_user({**record, "manifest": manifest})).result()
        trusting = Catalog.open(signed, trusted=Trust.from_pem(keys["ours"][1]))
        with pytest.raises(SignatureError, match="'ada'@1 is not what the key"):
            trusting.load("ada")


@pytest.mark.parametrize("part", ["config", "specs", "shared_digest"])
def test_a_cohort_that_makes_the_same_bytes_mean_something_else_is_refused(signed, keys, part):
    database = Database.open(signed, create=False)
    key = cohort_key(Catalog.open(signed).load("ada")[1].cohort)
    record = unseal(database.kvstore.read(key).result().value)
    if part == "config":
        record["config"]["alpha"] = 1e6
    elif part == "specs":
        record["specs"][0]["scales"] = [1e6 for _ in record["specs"][0]["scales"]]
    else:
        record["shared_digest"] = "f" * 64
    database.kvstore.write(key, seal(record)).result()
    with pytest.raises(SignatureError, match="'ada'@1 is not what the key"):
        Catalog.open(signed, trusted=Trust.from_pem(keys["ours"][1])).load("ada")


def test_what_a_signer_derives_is_signed_and_only_from_what_is_trusted(signed, keys, capsys):
    both = ["--sign", str(keys["ours"][0]), "--trust", str(keys["ours"][1])]
    command = ["users", "compress", str(signed), "--max_error", "1", *both, "--prefix"]
    assert main([*command, "ada"]) == 0
    ours = Catalog.open(signed, trusted=Trust.from_pem(keys["ours"][1]))
    assert ours.load("ada")[1].derived_from[0][:2] == ("ada", 1)
    assert main([*command, "mallory"]) == 2
    assert "not signed" in capsys.readouterr().err
    assert ours.records(["mallory"])[0].latest == 1


def test_published_and_extracted_revisions_are_covered(signed, keys, config, specs, layout, make_adapter):
    catalog = Catalog.open(signed, signer=Signer.from_pem(keys["ours"][0]))
    cohort = catalog.cohort(config, specs, "base-a", layout)
    staged = catalog.stage_batch(cohort, [Commit("staged", make_adapter(5))], shard=1)
    catalog.publish(cohort, staged, shards=2)
    trusted = Trust.from_pem(keys["ours"][1])
    np.testing.assert_array_equal(
        extract_user(signed, "staged", trusted=trusted).adapter["layers.attn.q_proj"]["a"],
        make_adapter(5)["layers.attn.q_proj"]["a"],
    )
    with pytest.raises(SignatureError, match="mallory"):
        extract_user(signed, "mallory", trusted=trusted)


def test_keys_that_are_none_are_named(tmp_path, keys):
    (tmp_path / "text").write_text("no key")
    rsa = _pems(tmp_path, "rsa", generate_private_key(65537, 2048))
    for load, path, words in (
        (Signer.from_pem, tmp_path / "missing", "no PEM file"),
        (Signer.from_pem, tmp_path / "text", "no PEM file"),
        (Signer.from_pem, keys["ours"][1], "no PEM file"),
        (Signer.from_pem, rsa[0], "not an Ed25519 private key"),
        (Trust.from_pem, rsa[1], "not an Ed25519 public key"),
    ):
        with pytest.raises(SignatureError, match=words):
            load(path)
    with pytest.raises(SignatureError, match="no key to trust"):
        Trust([])


def test_a_checkpoint_has_no_signatures(tmp_path, keys):
    with pytest.raises(CheckpointError, match="no signatures"):
        extract_user(tmp_path, "ada", trusted=Trust.from_pem(keys["ours"][1]))
