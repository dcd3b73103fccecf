"""What is built once for equal arguments."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax

from popax.adapters.base import AdapterConfig
from popax.adapters.cohort import Cohort
from popax.memo import built_once
from popax.modeling.config import ModelConfig
from popax.modeling.model import Model
from popax.objectives.sft import sft
from popax.population.optimizer import adamw, constant, sgd, warmup_cosine
from popax.training.compiled import compile_programs
from popax.training.config import TrainConfig


def test_equal_arguments_give_the_same_function_and_others_another():
    built = []

    @built_once
    def build(scale, *, shift=0.0):
        built.append((scale, shift))
        return jax.jit(lambda x: x * scale + shift)

    assert build(2.0) is build(2.0)
    assert build(2.0, shift=1.0) is not build(2.0)
    assert (float(build(2.0)(jnp.float32(3))), float(build(2.0, shift=1.0)(jnp.float32(3)))) == (6.0, 7.0)
    assert built == [(2.0, 0.0), (2.0, 1.0)]


def test_what_has_no_hash_is_built_anew_and_few_are_kept():
    built = []

    def build(scales):
        built.append(scales)
        return len(built)

    once = built_once(build, kept=2)
    assert [once([1]), once([1])] == [1, 2]
    assert [once((number,)) for number in (1, 2, 3, 1)] == [3, 4, 5, 6]


def test_configs_of_equal_settings_are_equal_and_share_their_optimizer():
    """As values are: a factory gave another partial each time, and no two configs were equal."""
    assert TrainConfig() == TrainConfig()
    assert adamw(b1=0.8) is adamw(b1=0.8)
    assert adamw(b1=0.8) is not adamw(b1=0.9)
    assert warmup_cosine(floor=0.1) is not warmup_cosine()
    # What users make themselves is compared as it always was.
    assert TrainConfig(optimizer=functools.partial(optax.sgd)) != TrainConfig(optimizer=functools.partial(optax.sgd))


def test_runs_that_differ_in_numbers_alone_share_their_programs():
    """A second run of one process traces nothing again: `Programs` are the same functions."""
    sizes = {"embed_dim": 8, "ffw_dim": 8, "num_layers": 1, "num_heads": 1, "num_kv_heads": 1, "head_dim": 8}
    model, again = (Model(ModelConfig(vocab_size=16, **sizes)) for _ in range(2))
    assert sft(model) is sft(again)
    assert sft(model, remat="full") is not sft(model)
    cohort = Cohort.of(AdapterConfig(rank=2), model.sites())
    config = TrainConfig(adapter=cohort.config, slots=2)
    other = dataclasses.replace(config, steps=7, learning_rate=0.5, seed=3, clip_norm=2.0, validation_rows=1)
    first = compile_programs(model, cohort, config)
    assert compile_programs(again, cohort, other) is first
    for changed in (
        {"slots": 3},
        {"remat": "full"},
        {"kl_weight": 0.5},
        {"norm_budget": 1.0},
        {"early_stop": None},
        {"save_optimizer_state": True},
        {"optimizer": sgd()},
        {"schedule": constant()},
    ):
        assert compile_programs(model, cohort, dataclasses.replace(config, **changed)) is not first


def test_numbers_of_another_type_are_other_settings():
    """1, 1.0 and True are equal, as keys too; a run's record has what was asked for."""
    assert adamw(weight_decay=0) is not adamw(weight_decay=0.0)
    assert isinstance(dict(adamw(weight_decay=0.0).settings)["weight_decay"], float)
