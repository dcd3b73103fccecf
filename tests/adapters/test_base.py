"""AdapterConfig and the resolution of targets."""

import dataclasses
import json
import math

import pytest

from popax.adapters.base import ALL_LINEAR, AdapterConfig, TargetRule, resolve
from popax.adapters.cohort import Cohort
from popax.errors import ConfigError, SiteError

EVERY_LINEAR = ("layers.attn.q_proj", "layers.attn.o_proj", "layers.mlp.up_proj", "layers.mlp.down_proj")


def _ranks(toy, *targets, rank=4):
    return {name: spec.ranks for name, spec in resolve(AdapterConfig(rank=rank, targets=targets), toy.sites).items()}


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ([TargetRule(pattern=ALL_LINEAR)], dict.fromkeys(EVERY_LINEAR, (4, 4, 4))),
        ([TargetRule(pattern=".*")], dict.fromkeys(EVERY_LINEAR, (4, 4, 4)) | {"lm_head": (4,)}),
        ([TargetRule(pattern="lm_head", rank=2)], {"lm_head": (2,)}),
        (  # the first rule that matches wins
            [TargetRule(pattern=r"layers\.attn\.q_proj", rank=1), TargetRule(pattern=r"layers\.attn\..*")],
            {"layers.attn.q_proj": (1, 1, 1), "layers.attn.o_proj": (4, 4, 4)},
        ),
        (  # a rule for one layer
            [TargetRule(pattern=r"layers\.1\.attn\.q_proj", rank=2), TargetRule(pattern=r"layers\.attn\.q_proj")],
            {"layers.attn.q_proj": (4, 2, 4)},
        ),
        ([TargetRule(pattern=r"layers\.[02]\.attn\.q_proj")], {"layers.attn.q_proj": (4, 0, 4)}),
        (  # rank 0 is an exception to a later rule, for a layer or for a whole site
            [
                TargetRule(pattern=r"layers\.0\..*", rank=0),
                TargetRule(pattern=r"layers\.mlp\..*", rank=0),
                TargetRule(pattern=ALL_LINEAR),
            ],
            {"layers.attn.q_proj": (0, 4, 4), "layers.attn.o_proj": (0, 4, 4)},
        ),
    ],
)
def test_resolves(toy, targets, expected):
    assert _ranks(toy, *targets) == expected


def test_sites_come_in_the_models_order(toy):
    assert list(_ranks(toy, TargetRule(pattern="lm_head"), TargetRule(pattern=ALL_LINEAR))) == [
        name for name, info in toy.sites.items() if info.kind == "linear"
    ]


@pytest.mark.parametrize(
    ("targets", "error", "words"),
    [
        ([TargetRule(pattern="layers.attn.qq_proj")], SiteError, ["qq_proj", "lm_head"]),
        ([TargetRule(pattern="q_proj")], SiteError, ["'q_proj'"]),  # the whole name has to match
        ([TargetRule(pattern=r"layers\.3\..*")], SiteError, [r"layers\\.3"]),  # there are layers 0 to 2
        ([TargetRule(pattern=".*"), TargetRule(pattern="lm_head")], SiteError, ["'lm_head'", "earlier"]),
        ([TargetRule(pattern=".*", rank=0)], SiteError, ["rank 0"]),
        ([TargetRule(pattern="lay(")], SiteError, ["lay(", "regular expression"]),
        ([TargetRule(pattern="lm_head", rank=13)], ConfigError, ["13", "lm_head", "12 x 17"]),
        ([TargetRule(pattern=r"layers\.2\.attn\.q_proj", rank=9)], ConfigError, ["layers.2.attn.q_proj", "12 x 8"]),
    ],
)
def test_refuses_targets(toy, targets, error, words):
    with pytest.raises(error) as caught:
        _ranks(toy, *targets)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    ("rule", "expected"), [("rank", 6.0 / 4), ("sqrt_rank", 6.0 / math.sqrt(4)), ("constant", 6.0)]
)
def test_alpha_rules(toy, rule, expected):
    config = AdapterConfig(rank=4, alpha=6.0, alpha_rule=rule, targets=[TargetRule(pattern="lm_head")])
    assert resolve(config, toy.sites)["lm_head"].scales == (expected,)


def test_a_rules_alpha_and_rank_make_the_scale(toy):
    targets = [TargetRule(pattern=r"layers\.1\.attn\.q_proj", rank=2, alpha=3.0), TargetRule(pattern=ALL_LINEAR)]
    spec = resolve(AdapterConfig(rank=4, alpha=8.0, targets=targets), toy.sites)["layers.attn.q_proj"]
    assert (spec.ranks, spec.scales, spec.rank) == ((4, 2, 4), (2.0, 1.5, 2.0), 4)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"rank": 0}, "rank=0"),
        ({"alpha": math.nan}, "alpha=nan"),
        ({"alpha_rule": "root"}, "'root'"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"dropout": -0.1}, "dropout=-0.1"),
        ({"targets": ()}, "targets"),
        ({"targets": ({"regex": ".*"},)}, "regex"),
        ({"dtype": "float31"}, "float31"),
        ({"dtype": "int8"}, "int8"),
        ({"method": "no_such"}, "no_such"),
        ({"init": "no_such"}, "no_such"),
    ],
)
def test_refuses_settings(toy, settings, word):
    with pytest.raises(ConfigError, match=word):
        Cohort.of(AdapterConfig(**settings), toy.sites)


@pytest.mark.parametrize("settings", [{"rank": -1}, {"alpha": math.inf}])
def test_refuses_a_rules_settings(settings):
    with pytest.raises(ConfigError, match=r"lm_head"):
        TargetRule(pattern="lm_head", **settings)


def test_json_round_trip(toy):
    config = AdapterConfig(method="lora_xs", rank=3, alpha=0.1, dropout=0.05, targets=toy.mixed, dtype="bfloat16")
    assert AdapterConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert hash(AdapterConfig.from_dict(config.to_dict())) == hash(config)
    with pytest.raises(ConfigError, match="colour"):
        AdapterConfig.from_dict(config.to_dict() | {"colour": "red"})


def test_targets_may_be_strings():
    assert AdapterConfig(targets=("lm_head",)).targets == (TargetRule(pattern="lm_head"),)
    assert AdapterConfig(targets="lm_head") == AdapterConfig(targets=("lm_head",))


def test_equal_configs_are_one_cohort(toy):
    one, other = (Cohort.of(AdapterConfig(rank=4, targets=toy.mixed), toy.sites) for _ in range(2))
    assert one == other
    assert hash(one) == hash(other)
    assert one != Cohort(dataclasses.replace(one.config, rank=2), one.sites)
