"""A full disk at commit: a named error, nothing half-written, and the catalog still opens."""

import contextlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from popax.errors import StorageError
from popax.store import Catalog, Commit, RowLayout

MEBIBYTE = 1 << 20

# The limit makes the kernel refuse the write itself (EFBIG), as a full disk does, without needing a mount.
CHILD = """
import json, resource, signal, sys
import numpy as np
from popax.errors import StorageError
from popax.store import Catalog, Commit

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
catalog = Catalog.open(sys.argv[1])
cohort = catalog.cohort_of(catalog.history("ada")[0])
big = {"s": {"x": np.ones(1 << 18, np.float32)}}
resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, resource.RLIM_INFINITY))
said = []
for commits in ([Commit("ada", big)], [Commit("bob", big), Commit("carol", big)]):
    try:
        catalog.commit_batch(cohort, commits)
    except StorageError as error:
        said.append(str(error))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
revision = catalog.commit(cohort, "ada", big).revision
print(json.dumps({"said": said, "revision": revision}))
"""


@pytest.fixture
def big():
    return {"s": {"x": np.arange(MEBIBYTE // 4, dtype=np.float32)}}


def _seed(place, config, specs, big):
    catalog = Catalog.open(place, create=True)
    cohort = catalog.cohort(config, specs, "base", RowLayout.of(big))
    catalog.commit(cohort, "ada", big)
    return catalog, cohort


def test_a_write_that_the_kernel_refuses(place, config, specs, big, same):
    _seed(place, config, specs, big)
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(place)], capture_output=True, text=True, env=environment, timeout=60
    )
    assert child.returncode == 0, child.stderr
    report = json.loads(child.stdout)
    assert len(report["said"]) == 2
    for message in report["said"]:
        assert str(place) in message
        assert "nothing was committed" in message
        assert "Free space" in message
    assert report["revision"] == 2  # the refused one took no number, and space makes the same catalog work again
    catalog = Catalog.open(place)
    assert [record.user for record in catalog.list()] == ["ada"]
    same(catalog.load("ada", 1)[0], big)
    assert len(catalog.history("ada")) == 2


@contextlib.contextmanager
def _small_disk(path, size):
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root; the kernel's file size limit is tested above")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_disk_that_is_full(tmp_path, config, specs, big, same):
    with _small_disk(tmp_path / "disk", 5 * MEBIBYTE) as disk:
        catalog, cohort = _seed(disk / "catalog", config, specs, big)
        acknowledged = ["ada"]

        def fill():
            for index in range(20):
                catalog.commit(cohort, f"user-{index}", big)
                acknowledged.append(f"user-{index}")

        with pytest.raises(StorageError, match="No space left"):
            fill()
        assert 1 < len(acknowledged) < 6
        with pytest.raises(StorageError, match="No space left"):
            catalog.commit_batch(cohort, [Commit(f"more-{index}", big) for index in range(3)])
        opened = Catalog.open(disk / "catalog")
        assert [record.user for record in opened.list()] == sorted(acknowledged)
        for adapter, _ in opened.load_batch(acknowledged):
            same(adapter, big)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_directory_one_may_not_write(place, config, specs, big):
    catalog, cohort = _seed(place, config, specs, big)
    for path in [place, *place.rglob("*")]:
        if path.is_dir():
            path.chmod(0o555)
    try:
        with pytest.raises(StorageError, match="permission"):
            catalog.commit(cohort, "bob", big)
    finally:
        for path in [place, *place.rglob("*")]:
            path.chmod(0o755)


def test_a_place_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"refused: .*Not a directory"):
        Catalog.open(tmp_path / "file" / "catalog", create=True)
