"""The gate: what passes and what does not, value by value, and that nothing leads around it."""

import dataclasses
import math

import numpy as np
import pytest

from popax.adapters.base import AdapterConfig
from popax.adapters.cohort import Cohort
from popax.errors import ConfigError, ConflictError, GateError
from popax.evaluation.gate import GateConfig, judge
from popax.evaluation.promotion import promote, promote_all
from popax.store import Catalog, RowLayout
from popax.store.scores import Scores
from popax.types import SiteInfo

GOOD = Scores(
    digest="d",
    base_digest="b",
    own=1.8,
    base=2.0,
    target_bytes=1000,
    norm=0.1,
    created="2026-01-01T00:00:00.000+00:00",
    version="0",
    retention=1.51,
    base_retention=1.5,
)
GATE = GateConfig(min_gain=0.125, min_bytes=500, max_retention_loss=0.05, max_norm=0.2)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, []),
        ({"own": 1.95}, ["gain 0.0500"]),
        ({"own": 1.875, "base": 2.0}, ["gain 0.1250"]),  # at the threshold is not above it
        ({"own": math.nan}, ["gain nan"]),
        ({"own": -math.inf}, ["gain inf"]),
        ({"base": math.nan}, ["gain nan"]),
        ({"target_bytes": 499}, ["499 bytes of text are fewer than 500"]),
        ({"norm": 0.21}, ["norm 0.2100"]),
        ({"norm": math.nan}, ["norm nan"]),
        ({"norm": math.inf}, ["norm inf"]),
        ({"retention": 1.56}, ["retention loss 0.0600"]),
        ({"retention": math.nan}, ["retention loss nan"]),
        ({"retention": -math.inf}, ["retention loss -inf"]),
        ({"retention": None}, ["without a retention text"]),
        ({"own": 3.0, "norm": 9.0, "target_bytes": 1}, ["gain -1.0", "1 bytes", "norm 9.0"]),
    ],
)
def test_each_value_is_held_against_its_threshold(changed, words):
    verdict = judge(dataclasses.replace(GOOD, **changed), GATE)
    assert verdict.passed == (not words)
    assert len(verdict.reasons) == len(words)
    for reason, word in zip(verdict.reasons, words, strict=True):
        assert word in reason


def test_a_reason_says_the_value_and_its_threshold():
    bad = dataclasses.replace(GOOD, own=3.0, norm=9.0, target_bytes=1, retention=2.0)
    assert judge(bad, GATE).reasons == (
        "gain -1.0000 bits per byte is not above 0.125",
        "1 bytes of text are fewer than 500",
        "norm 9.0000 of the weights' own exceeds 0.2",
        "retention loss 0.5000 bits per byte exceeds 0.05",
    )


def test_a_text_a_norm_and_a_loss_at_their_thresholds_pass():
    gate = GateConfig(min_bytes=500, max_norm=0.25, max_retention_loss=0.0625)
    at = dataclasses.replace(GOOD, target_bytes=500, norm=0.25, retention=1.5625)
    assert judge(at, gate) == (True, ())


def test_without_a_retention_threshold_no_text_is_asked_for():
    gate = dataclasses.replace(GATE, max_retention_loss=None)
    assert judge(dataclasses.replace(GOOD, retention=None, base_retention=None), gate).passed
    assert judge(dataclasses.replace(GOOD, retention=9.0), gate).passed, "what nobody asked for is not judged"


def test_no_threshold_lets_an_infinite_norm_pass():
    assert not judge(dataclasses.replace(GOOD, norm=math.inf), dataclasses.replace(GATE, max_norm=math.inf)).passed


def test_an_adapter_that_does_nothing_is_not_promoted_by_the_default():
    nothing = dataclasses.replace(GOOD, own=2.0, norm=0.0, retention=1.5)
    assert not judge(nothing, GateConfig()).passed


@pytest.mark.parametrize("wrong", [{"min_bytes": 0}, {"max_norm": 0.0}, {"min_gain": math.nan}])
def test_a_gate_that_is_none_is_refused(wrong):
    with pytest.raises(ConfigError, match="GateConfig"):
        GateConfig(**wrong)


def test_the_least_gate_there_is():
    assert GateConfig(min_bytes=1, max_norm=1e-9, min_gain=-math.inf).min_bytes == 1


@pytest.fixture
def catalog(tmp_path):
    """ada with two revisions, bob with one."""
    site = SiteInfo(name="layers.attn.q_proj", d_in=8, d_out=8, layers=2, axes=("embed", "heads"))
    cohort = Cohort.of(AdapterConfig(rank=2, targets=(site.name,)), {site.name: site})
    catalog = Catalog.open(tmp_path / "catalog", create=True)
    stored = catalog.cohort(cohort.config, cohort.specs, "b", RowLayout.of(cohort.abstract()))
    rng = np.random.default_rng(0)
    for user in ("ada", "bob", "ada"):
        leaf = lambda: rng.normal(size=(2, 2, 8)).astype(np.float32)  # noqa: E731
        catalog.commit(stored, user, {site.name: {"a": leaf(), "b": leaf()}})
    return catalog


def _scored(catalog, user, revision, **changed):
    manifest = catalog.load(user, revision)[1]
    catalog.record_scores([(manifest, dataclasses.replace(GOOD, digest=manifest.digest, **changed))])


def test_only_what_was_scored_is_promoted_and_the_scores_say_so(catalog):
    with pytest.raises(GateError, match="'ada'@2 stays a candidate: these bytes have not been scored"):
        promote(catalog, "ada", gate=GATE)
    _scored(catalog, "ada", 1)
    with pytest.raises(GateError, match=r"'ada'@2 .*not been scored"):
        promote(catalog, "ada", gate=GATE)
    assert promote(catalog, "ada", 1, GATE).promoted == 1
    _scored(catalog, "ada", 2, own=1.99)
    with pytest.raises(GateError, match=r"gain 0.0100 bits per byte is not above 0.125"):
        promote(catalog, "ada", gate=GATE)
    assert catalog.load("ada", "promoted")[1].revision == 1
    [kept] = catalog.scores([catalog.load("ada", 1)[1]])
    assert kept.promoted["gate"] == dataclasses.asdict(GATE)
    assert kept.gain == pytest.approx(0.2)


def test_scores_belong_to_bytes_and_go_with_them(catalog):
    _scored(catalog, "ada", 1)
    manifest = catalog.load("ada", 1)[1]
    with pytest.raises(ConflictError, match="is not what was scored"):
        catalog.record_scores([(manifest, dataclasses.replace(GOOD, digest="other"))])
    catalog.delete("ada")
    with pytest.raises(ConflictError, match="was deleted"):
        catalog.record_scores([(manifest, dataclasses.replace(GOOD, digest=manifest.digest))])
    adapter, bobs = catalog.load("bob")
    again = catalog.commit(catalog.cohort_of(bobs), "ada", adapter)
    assert catalog.scores([again]) == [None]
    assert catalog.verify().orphan_records == 0


def test_many_are_promoted_at_once_and_the_others_say_why(catalog):
    _scored(catalog, "ada", 2)
    outcomes = promote_all(catalog, [("ada", None), ("bob", "latest")], GATE)
    assert [(one.manifest.user, one.verdict.passed) for one in outcomes] == [("ada", True), ("bob", False)]
    assert [record.user for record in catalog.list(status="promoted")] == ["ada"]


def test_who_is_replaced_while_being_judged_is_not_promoted(catalog, monkeypatch):
    """Deleted and back between the verdict and the pointer: revision 1 again, of bytes that nobody scored."""
    _scored(catalog, "ada", 2)
    _scored(catalog, "bob", 1)
    adapter, manifest = catalog.load("ada", 1)
    move = catalog.promote_scored

    def replaced_meanwhile(entries):
        catalog.delete("bob")
        catalog.commit(catalog.cohort_of(manifest), "bob", adapter)
        return move(entries)

    monkeypatch.setattr(catalog, "promote_scored", replaced_meanwhile)
    outcomes = promote_all(catalog, [("ada", None), ("bob", None)], GATE)
    assert [one.verdict.passed for one in outcomes] == [True, False]
    assert "replaced by other bytes" in outcomes[1].verdict.reasons[0]
    assert [record.promoted for record in catalog.records(["ada", "bob"])] == [2, None]


def test_a_second_scoring_keeps_what_the_gate_asked_for(catalog):
    _scored(catalog, "ada", 2)
    promote(catalog, "ada", gate=GATE)
    _scored(catalog, "ada", 2, own=1.7)
    [kept] = catalog.scores([catalog.load("ada", 2)[1]])
    assert kept.own == 1.7
    assert kept.promoted["gate"] == dataclasses.asdict(GATE)


def test_scores_on_another_base_are_refused(catalog):
    with pytest.raises(ConflictError, match="is not what was scored"):
        _scored(catalog, "ada", 2, base_digest="another")


def test_two_revisions_of_one_user_in_one_batch(catalog):
    """In their order: the last one is served, and rollback leads to the other."""
    for revision in (1, 2):
        _scored(catalog, "ada", revision)
    assert all(one.verdict.passed for one in promote_all(catalog, [("ada", 1), ("ada", 2)], GATE))
    assert catalog.records(["ada"])[0].promotions == (1, 2)
    assert catalog.rollback("ada").promoted == 1
