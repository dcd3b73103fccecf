"""The catalog in a bucket: a real S3-compatible server on loopback, the real client."""

import json
import os
import threading

import numpy as np
import pytest

boto3 = pytest.importorskip("boto3", reason="the S3 server of the development tools (moto) is not installed")
from moto.server import ThreadedMotoServer  # noqa: E402

from popax.errors import CatalogError, ConflictError  # noqa: E402
from popax.store import Catalog, Commit  # noqa: E402

BUCKET = "adapters"


@pytest.fixture(scope="module")
def server():
    """(endpoint, a client of its own)."""
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    before = {name: os.environ.get(name) for name in keys}
    os.environ.update(keys)
    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    running.start()
    host, port = running.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    client = boto3.client("s3", endpoint_url=endpoint)
    client.create_bucket(Bucket=BUCKET)
    yield endpoint, client
    running.stop()
    for name, value in before.items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})


@pytest.fixture
def bucket_place(server, request):
    store = {"driver": "s3", "bucket": BUCKET, "endpoint": server[0], "aws_region": "us-east-1"}
    return json.dumps({**store, "path": f"{request.node.name}/catalog"})


@pytest.fixture
def s3_catalog(bucket_place):
    return Catalog.open(bucket_place, create=True)


def _everything(client, prefix):
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
    keys = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
    return {key: client.get_object(Bucket=BUCKET, Key=key)["Body"].read() for key in keys}


def test_what_is_committed_is_there_for_others(s3_catalog, bucket_place, config, specs, layout, make_adapter, same):
    cohort = s3_catalog.cohort(config, specs, "base", layout)
    users = [f"user-{index}" for index in range(8)]
    s3_catalog.commit_batch(cohort, [Commit(user, make_adapter(at)) for at, user in enumerate(users)])
    s3_catalog.commit(cohort, "user-3", make_adapter(30), metrics={"loss": 1.5})
    s3_catalog.promote("user-3", 1)
    other = Catalog.open(bucket_place, read_only=True)
    for at, (adapter, _) in enumerate(other.load_batch(users, 1)):
        same(adapter, make_adapter(at))
    same(other.load("user-3")[0], make_adapter(30))
    assert other.load("user-3", "promoted")[1].revision == 1
    audit = other.verify()
    assert audit.clean
    assert audit.revisions == 9
    with pytest.raises(ConflictError):
        Catalog.open(bucket_place).commit(cohort, "user-3", make_adapter(31), parent=1)


def test_writers_of_other_users_do_not_lose_each_others_commits(
    s3_catalog, bucket_place, config, specs, layout, make_adapter, same
):
    s3_catalog.cohort(config, specs, "base", layout)
    failures = []

    def write(writer):
        try:
            catalog = Catalog.open(bucket_place)
            cohort = catalog.cohort(config, specs, "base", layout)
            for turn in range(4):
                catalog.commit(cohort, f"writer-{writer}", make_adapter(10 * writer + turn))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    found = Catalog.open(bucket_place)
    for writer in range(3):
        assert len(found.history(f"writer-{writer}")) == 4
        for turn in range(4):
            same(found.load(f"writer-{writer}", turn + 1)[0], make_adapter(10 * writer + turn))
    assert found.verify().clean


def test_of_two_writers_of_one_user_one_wins(s3_catalog, bucket_place, config, specs, layout, make_adapter):
    cohort = s3_catalog.cohort(config, specs, "base", layout)
    s3_catalog.commit(cohort, "ada", make_adapter(0))
    catalogs = [Catalog.open(bucket_place) for _ in range(2)]
    for turn in range(1, 6):
        won, lost, together = [], [], threading.Barrier(2)

        def write(writer, turn=turn, won=won, lost=lost, together=together):
            together.wait()
            try:
                won.append(catalogs[writer].commit(cohort, "ada", make_adapter(10 * turn + writer), parent=turn))
            except ConflictError:
                lost.append(writer)

        threads = [threading.Thread(target=write, args=(writer,)) for writer in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(won), len(lost)) == (1, 1)
        assert Catalog.open(bucket_place).history("ada")[-1] == won[0]


def test_a_deleted_user_leaves_the_bucket(
    s3_catalog, server, request, config, specs, layout, make_adapter, same, monkeypatch
):
    """Invariant 8 in a bucket, where gc without locks waits out its grace period, or is told that nobody writes."""
    cohort = s3_catalog.cohort(config, specs, "base", layout)
    for user, seed in (("ada", 1), ("bob", 2)):
        s3_catalog.commit(cohort, user, make_adapter(seed), optimizer={"mu": np.full(40, seed, np.float32)})
    row = layout.pack(make_adapter(1)).tobytes()
    contents = lambda: b"".join(_everything(server[1], request.node.name).values())  # noqa: E731
    assert row in contents()
    s3_catalog.delete("ada")
    assert s3_catalog.gc(grace_s=1000).files_removed == 0
    assert row in contents()
    assert s3_catalog.gc(grace_s=0).files_removed > 0
    assert row not in contents()
    same(s3_catalog.load("bob")[0], make_adapter(2))
    assert s3_catalog.verify().clean


def test_a_bucket_that_is_not_there_is_named(server):
    place = json.dumps({"driver": "s3", "bucket": "no-such-bucket", "endpoint": server[0], "aws_region": "us-east-1"})
    with pytest.raises(CatalogError, match="no-such-bucket"):
        Catalog.open(place, create=True)
