"""Invariants 12 and 13: a run knows its data, a finished one trains who has news, one bad user stops nobody."""

import dataclasses
import json

import numpy as np
import pytest

from popax.adapters.base import AdapterConfig
from popax.adapters.cohort import Cohort
from popax.data.pipeline import UserPipeline
from popax.data.records import Example
from popax.data.tfds import build_dataset
from popax.data.tokenize import Tokenizer, load_tokenizer
from popax.data.users import UserDataset
from popax.errors import ConfigError, PopulationError
from popax.store.catalog import Catalog
from popax.store.layout import RowLayout
from popax.training.run import train_population

CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content.strip() }}\n{% endfor %}"


@pytest.fixture
def texts(pipeline_of):
    """Three users' texts, as a dictionary that a test may change."""
    dataset = pipeline_of(3).dataset
    return {user: [example.text for example in dataset.examples(user)] for user in dataset.users()}


@pytest.fixture
def train(base, pipeline_of, train_config, tmp_path):
    """train(texts) into one directory and catalog, as a job does night after night."""
    config, settings = train_config(slots=2), pipeline_of(3).config

    def call(texts, *, tokenizer=None, place="run", into="catalog", changes=None, **options):
        dataset = texts if isinstance(texts, UserDataset) else UserDataset.from_examples(texts)
        pipeline = UserPipeline(dataset, tokenizer or load_tokenizer("byte"), settings)
        chosen = dataclasses.replace(config, **(changes or {}))
        catalog = Catalog.open(tmp_path / into, create=True)
        return train_population(base, pipeline, chosen, directory=tmp_path / place, catalog=catalog, **options)

    call.catalog = lambda into="catalog": Catalog.open(tmp_path / into, create=True)
    call.directory = tmp_path / "run"
    return call


def revisions(catalog):
    return {record.user: [one.parent for one in catalog.history(record.user)] for record in catalog.list()}


def once():
    """stop_requested of a run that is stopped after its first round."""
    return lambda: True


def test_a_finished_run_trains_exactly_who_has_something_new(train, texts):
    assert set(train(texts).trained) == set(texts)
    texts["user-001"].append("something new " * 3)
    texts["user-007"] = ["a new one writes "] * 6
    report = train(texts)
    assert sorted(report.trained) == ["user-001", "user-007"]
    assert (report.round, report.up_to_date, report.finished) == (2, 2, True)
    assert revisions(train.catalog()) == {
        "user-000": [None],
        "user-001": [None, 1],
        "user-002": [None],
        "user-007": [None],
    }
    before = (train.directory / "run.json").read_text()
    again = train(texts)
    assert (again.trained, again.up_to_date, again.iterations) == ((), 4, 0)
    assert (train.directory / "run.json").read_text() == before


def test_a_stopped_run_is_not_continued_with_other_text(train, texts):
    report = train(texts, stop_requested=once())
    assert not report.finished
    other = {user: [line.upper() for line in lines] for user, lines in texts.items()}
    with pytest.raises(ConfigError, match="stopped while it trained on other data"):
        train(other)
    assert train(texts).finished


def test_a_stopped_run_is_not_continued_with_another_tokenizer(train, texts):
    train(texts, stop_requested=once())
    plain = load_tokenizer("byte")
    backend = plain._special  # the same vocabulary, but no <bos> in front of a document
    other = Tokenizer(
        backend, {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "add_bos_token": False}
    )
    with pytest.raises(ConfigError, match="another tokenizer"):
        train(texts, tokenizer=other)
    train(texts)
    with pytest.raises(ConfigError, match="another tokenizer"):
        train({**texts, "user-009": ["more "] * 6}, tokenizer=other)


def test_a_schedule_with_other_arguments_is_another_setting(train, texts):
    from popax.population.optimizer import warmup_cosine

    train(texts, stop_requested=once(), changes={"schedule": warmup_cosine(warmup_fraction=0.1)})
    with pytest.raises(ConfigError, match="schedule"):
        train(texts, changes={"schedule": warmup_cosine(warmup_fraction=0.5)})


def test_closing_a_stopped_run_says_what_its_users_had(train, texts):
    train(texts)
    for user in texts:
        texts[user].append("a second night " * 2)
    assert not train(texts, stop_requested=once()).finished
    texts["user-000"].append("and a third " * 2)
    with pytest.raises(ConfigError, match="--close_stopped"):
        train(texts)
    report = train(texts, close_stopped=True)
    assert dict(report.closed.in_training) == {"user-000": 1, "user-001": 1}
    assert (report.round, sorted(report.trained)) == (3, sorted(texts))
    assert revisions(train.catalog()) == {user: [None, 1] for user in texts}
    assert train(texts, close_stopped=True).closed is None


def test_a_second_round_is_stopped_and_resumed_bitwise(train, texts):
    def two_nights(into, place, stops):
        first = {user: list(lines) for user, lines in texts.items()}
        train(first, into=into, place=place)
        second = {user: [*lines, "the second night "] for user, lines in texts.items()}
        finished = False
        while not finished:
            finished = train(second, into=into, place=place, stop_requested=lambda: stops).finished
        catalog = train.catalog(into)
        return {record.user: [one.digest for one in catalog.history(record.user)] for record in catalog.list()}

    assert two_nights("stopped-catalog", "stopped", True) == two_nights("straight-catalog", "straight", False)


def test_a_revision_of_another_rank_sets_its_user_aside_and_nobody_else(base, train, texts):
    catalog = train.catalog()
    other = AdapterConfig(rank=3)
    cohort = Cohort.of(other, base.model.sites())
    zeros = {
        site: {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in leaves.items()}
        for site, leaves in cohort.abstract().items()
    }
    stored = catalog.cohort(other, cohort.specs, base.digest, RowLayout.of(cohort.abstract()))
    catalog.commit(stored, "user-001", zeros)
    report = train(texts)
    assert sorted(report.trained) == ["user-000", "user-002"]
    (left,) = report.set_aside
    assert left.user == "user-001"
    assert "'user-001'@1" in left.reason
    assert "a user continues with the configuration they have" in left.reason
    assert revisions(catalog)["user-001"] == [None]
    # Nothing has changed for this user: another night does nothing, and says so again.
    assert train(texts).set_aside == report.set_aside
    assert train(texts).trained == ()
    # The operator takes the old adapter away: the next night trains the user.
    train.catalog().delete("user-001")
    assert train(texts).trained == ("user-001",)


@pytest.fixture
def chatting():
    plain = load_tokenizer("byte")
    return Tokenizer(
        plain._special, {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "chat_template": CHAT}
    )


def conversations(user, content):
    turns = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": content})
    return [Example(user=user, index=index, messages=turns) for index in range(6)]


def test_a_conversation_that_the_template_refuses_sets_its_user_aside(train, chatting):
    broken = conversations("bad", "fine")
    broken[3] = dataclasses.replace(broken[3], messages=({"role": "user", "content": None}, *broken[3].messages[1:]))
    people = {"ada": conversations("ada", "yes yes yes"), "bad": broken, "bob": conversations("bob", "no no no")}
    report = train(people, tokenizer=chatting)
    assert sorted(report.trained) == ["ada", "bob"]
    (left,) = report.set_aside
    assert (left.user, left.record) == ("bad", 4)
    assert "the chat template refuses" in left.reason
    people["bad"] = conversations("bad", "better")
    assert train(people, tokenizer=chatting).trained == ("bad",)


def test_a_resumed_run_does_not_meet_the_same_wall(train, texts, chatting):
    people = {"a": conversations("a", "x"), **{name: conversations(name, "y " * 9) for name in "bcdef"}}
    people["a"][0] = dataclasses.replace(people["a"][0], messages=({"role": "user"},))
    report = train(people, tokenizer=chatting, stop_requested=once())
    assert not report.finished
    assert [one.user for one in report.set_aside] == ["a"]
    report = train(people, tokenizer=chatting)
    assert report.finished
    assert sorted(report.trained) == list("bcdef")
    assert [one.user for one in report.set_aside] == ["a"]


def test_a_user_listed_twice_is_trained_once(train, texts):
    report = train(texts, users=["user-000", "user-001", "user-000"])
    assert report.trained == ("user-000", "user-001")
    assert report.listed_twice == ("user-000",)
    assert revisions(train.catalog()) == {"user-000": [None], "user-001": [None]}


def test_users_with_too_few_examples_are_listed(train, texts):
    report = train({**texts, "shy": ["hello"]})
    assert dataclasses.asdict(report).get("too_few") == ("shy",)
    assert sorted(report.trained) == sorted(texts)


def test_a_run_in_which_everybody_is_set_aside_is_wrong_itself(train, chatting):
    people = {"a": conversations("a", None), "b": conversations("b", None)}
    with pytest.raises(PopulationError, match=r"all 2 users were set aside.*the chat template refuses"):
        train(people, tokenizer=chatting)
    assert not (train.directory / "run.json").exists()


def test_a_broken_record_in_the_catalog_is_its_users_own(train, texts, tmp_path):
    train(texts)
    catalog = train.catalog()
    from popax.store.records import user_key

    catalog._database.kvstore.write(user_key("user-002"), b"not a record").result()
    for user in texts:
        texts[user].append("the next night " * 2)
    report = train(texts)
    assert sorted(report.trained) == ["user-000", "user-001"]
    assert [one.user for one in report.set_aside] == ["user-002"]


def test_an_adapter_that_is_not_finite_in_the_stored_dtype_sets_its_user_aside(train, texts, monkeypatch):
    from popax.errors import NonFiniteError

    def refusing(self, cohort, commits, original=Catalog.commit_batch):
        for one in commits:
            if one.user == "user-001":
                raise NonFiniteError("the adapter of user 'user-001' is not finite", ["user-001"])
        return original(self, cohort, commits)

    monkeypatch.setattr(Catalog, "commit_batch", refusing)
    report = train(texts)
    assert sorted(report.trained) == ["user-000", "user-002"]
    assert [(one.user, one.faulty) for one in report.set_aside] == [("user-001", True)]


def test_who_has_no_news_is_found_without_reading_text_or_histories(train, texts, tmp_path, monkeypatch):
    def built(name):
        source = tmp_path / f"{name}.jsonl"
        rows = [{"user": user, "text": line} for user, lines in texts.items() for line in lines]
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return UserDataset.open(build_dataset(source, tmp_path / name, progress=False))

    train(built("first"))
    texts["user-001"].append("only this one " * 2)
    grown, read, histories = built("second"), [], []
    monkeypatch.setattr(
        grown._reader, "examples", lambda user, original=grown._reader.examples: read.append(user) or original(user)
    )
    monkeypatch.setattr(Catalog, "history", lambda self, user: histories.append(user))
    assert train(grown).trained == ("user-001",)
    assert set(read) == {"user-001"}
    assert histories == []


def test_old_revisions_cover_what_a_new_build_digests(train, texts, tmp_path):
    """The digest in a built dataset's index is the one that earlier versions wrote into manifests."""
    from popax.training.news import data_provenance

    rows = [{"user": "u", "time": 5 - at, "text": f"t{at}"} for at in range(5)] + [{"user": "v", "text": "é"}] * 2
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = UserDataset.open(build_dataset(source, tmp_path / "built", progress=False))
    in_memory = UserDataset.from_examples({user: dataset.examples(user) for user in dataset.users()})
    for user in dataset.users():
        assert data_provenance(dataset, user) == data_provenance(in_memory, user)
    assert dataset.place(dataset.examples("u")[0]) == (str(source), 5)
