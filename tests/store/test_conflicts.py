"""Two writers for one user: one wins, the other is told; writers of different users both get through."""

import threading

import pytest

from popax.errors import ConflictError
from popax.store import Catalog, Commit
from popax.store import writer as writer_module

WRITERS, COMMITS = 4, 10


def _at_once(functions):
    threads = [threading.Thread(target=function) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_writers_of_one_user_never_lose_or_repeat_a_revision(catalog, cohort, place, make_adapter):
    won, lost = [], []

    def work(index):
        own = Catalog.open(place)
        for step in range(COMMITS):
            try:
                won.append(own.commit(cohort, "ada", make_adapter(index * 100 + step), metrics={"by": index}))
            except ConflictError as error:
                assert "'ada'" in str(error)  # noqa: PT017
                lost.append(index)

    _at_once([lambda index=index: work(index) for index in range(WRITERS)])
    history = catalog.history("ada")
    assert [manifest.revision for manifest in history] == list(range(1, len(won) + 1))
    assert sorted(won, key=lambda manifest: manifest.revision) == history
    assert len(won) + len(lost) == WRITERS * COMMITS
    assert len({manifest.row for manifest in history}) == len(history)
    for manifest in history:
        catalog.load("ada", manifest.revision)


def test_writers_of_different_users_all_succeed(catalog, cohort, place, make_adapter):
    failures = []

    def work(index):
        own = Catalog.open(place)
        try:
            for step in range(COMMITS):
                own.commit(cohort, f"user-{index}", make_adapter(index * 100 + step))
        except Exception as error:
            failures.append(error)

    _at_once([lambda index=index: work(index) for index in range(WRITERS)])
    assert not failures
    histories = [catalog.history(f"user-{index}") for index in range(WRITERS)]
    assert [len(history) for history in histories] == [COMMITS] * WRITERS
    assert len({manifest.row for history in histories for manifest in history}) == WRITERS * COMMITS


def test_a_commit_between_reading_and_writing_is_a_conflict(catalog, cohort, place, make_adapter, same, monkeypatch):
    """Deterministic: the other writer commits after this one has staged its revision, under the same row and number.

    The rival's row must stay the rival's: TensorStore commits what it takes for two databases one by one, and then a
    refused transaction overwrote the row that another had just been given.
    """
    catalog.commit(cohort, "ada", make_adapter(0))
    stage, rival = writer_module.put_manifests, Catalog.open(place)

    def interrupted(*arguments):
        staged = stage(*arguments)
        monkeypatch.setattr(writer_module, "put_manifests", stage)
        rival.commit(cohort, "ada", make_adapter(1))
        return staged

    monkeypatch.setattr(writer_module, "put_manifests", interrupted)
    with pytest.raises(ConflictError, match=r"'ada': another writer committed revision 2 .*parent=2"):
        catalog.commit_batch(cohort, [Commit("bob", make_adapter(3)), Commit("ada", make_adapter(2))])
    assert not catalog.exists("bob")
    same(catalog.load("ada")[0], make_adapter(1))


def test_a_collision_of_rows_alone_is_retried(catalog, cohort, place, make_adapter, same, monkeypatch):
    catalog.commit(cohort, "ada", make_adapter(0))
    stage, rival = writer_module.put_manifests, Catalog.open(place)

    def interrupted(*arguments):
        staged = stage(*arguments)
        monkeypatch.setattr(writer_module, "put_manifests", stage)
        rival.commit(cohort, "carol", make_adapter(1))
        return staged

    monkeypatch.setattr(writer_module, "put_manifests", interrupted)
    assert catalog.commit(cohort, "ada", make_adapter(2)).revision == 2
    same(catalog.load("carol")[0], make_adapter(1))
    same(catalog.load("ada")[0], make_adapter(2))
