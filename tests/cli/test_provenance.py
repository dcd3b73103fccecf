"""Whatever writes a revision says where it comes from: base, config, parent, data, seed, metrics, code."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from popax.cli.main import main
from popax.modeling.base import open_base
from popax.store.catalog import Catalog
from popax.version import code_version


def latest(place, user):
    return Catalog.open(place, read_only=True).load(user)[1]


@pytest.fixture(scope="module")
def written(world, tmp_path_factory):
    """{how: (manifest, the base it must name)} of each command that commits revisions."""
    folder = tmp_path_factory.mktemp("writers")
    catalog, peft = str(folder / "catalog"), str(folder / "peft")
    shutil.copytree(world.catalog, catalog)
    assert main(["users", "compress", catalog, "--prefix", "u00", "--max_error", "1"]) == 0
    assert main(["extract", world.catalog, "u01", peft]) == 0
    assert main(["import", catalog, "newcomer", peft, "--base", world.base]) == 0
    assert main(world.pretrain(folder / "other", "--tokenizer", "bpe:300", "--gin_param", "PretrainConfig.seed=9")) == 0
    other = str(folder / "other" / "base")
    command = ["migrate", "--gin_file", world.users, "--base", world.base, "--to", other, "--catalog", catalog]
    assert main([*command, "--data", world.data, "--user", "u02"]) == 0
    here, there = (open_base(base).digest for base in (world.base, other))
    return {
        "train": (latest(world.catalog, "u01"), here),
        "shared": (latest(world.run / "shared", "everyone"), here),
        "compress": (latest(catalog, "u00"), here),
        "import": (latest(catalog, "newcomer"), here),
        "migrate": (latest(catalog, "u02"), there),
        "peft": peft,
        "before": {user: latest(world.catalog, user) for user in ("u00", "u02")},
    }


@pytest.mark.parametrize("how", ["train", "shared", "compress", "import", "migrate"])
def test_every_writer_names_base_config_time_and_code(written, how):
    manifest, base = written[how]
    assert manifest.base_digest == base
    assert (manifest.config["method"], manifest.config["rank"]) == ("lora", 2)
    assert manifest.created.startswith("20")
    assert manifest.version == code_version()


@pytest.mark.parametrize("how", ["train", "shared", "compress", "migrate"])
def test_what_was_trained_names_data_seed_and_settings(written, how):
    manifest, _ = written[how]
    data = manifest.provenance["data"]
    assert len(data["digest"]) == 64
    assert data["examples"] == (50 if how == "shared" else 10)
    assert how == "shared" or data["range"] == ["0", "9"]
    assert manifest.provenance["seed"] == 0
    assert (manifest.hparams["learning_rate"], manifest.hparams["steps"]) == (3e-2, 6)


@pytest.mark.parametrize(("how", "user"), [("compress", "u00"), ("migrate", "u02")])
def test_what_was_derived_names_the_bytes_it_came_from(written, how, user):
    before, (manifest, _) = written["before"][user], written[how]
    assert manifest.derived_from == ((user, before.revision, before.digest),)
    assert manifest.parent == before.revision


def test_what_was_trained_says_how_it_went(written):
    assert {"steps", "kept_step", "skipped"} <= set(written["train"][0].metrics)


def test_what_was_imported_names_the_files(written):
    """Digests as any tool would make them."""
    imported = written["import"][0].provenance["imported"]
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(written["peft"]).iterdir()}
    assert imported == {"directory": "peft", **files}


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """(private key's file, public key's file)."""
    folder, key = tmp_path_factory.mktemp("keys"), Ed25519PrivateKey.generate()
    private, public = folder / "key.pem", folder / "public.pem"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return str(private), str(public)


def test_who_trusts_a_key_uses_nothing_unsigned(world, keys, tmp_path, capsys):
    """Training on top of it, scoring it, promoting it: refused by name. verify lists it, and only it."""
    catalog, trust = str(tmp_path / "catalog"), ["--trust", keys[1]]
    shutil.copytree(world.catalog, catalog)
    signed = world.train(tmp_path / "signed", "--catalog", catalog, "--no_table", "--everyone", "--sign", keys[0])
    assert main([*signed, *trust]) == 2
    assert "is not signed" in capsys.readouterr().err
    scoring = ["eval", "--gin_file", world.users, "--base", world.base, "--catalog", catalog, "--data", world.data]
    assert main([*scoring, "--record", *trust]) == 2
    assert main(["users", "promote", catalog, "u00", *trust]) == 2
    assert capsys.readouterr().err.count("is not signed") == 2

    again = world.train(tmp_path / "again", "--catalog", catalog, "--no_table", "--everyone", "--sign", keys[0])
    assert main(again) == 0
    assert main([*scoring, "--record", *trust]) == 0
    audit = tmp_path / "audit.json"
    assert main(["users", "verify", catalog, "--json", str(audit), *trust]) == 1
    problems = json.loads(audit.read_text())["problems"]
    assert {(one["user"], one["revision"]) for one in problems} == {(f"u0{at}", 1) for at in range(5)}
    assert all("is not signed" in one["what"] for one in problems)
    assert main(["users", "verify", catalog]) == 0
