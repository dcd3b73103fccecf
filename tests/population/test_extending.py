"""docs/extending.md: what a researcher writes in a module of their own, as it stands on the page."""

import re
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popax.adapters.base import AdapterConfig, TargetRule
from popax.adapters.cohort import Cohort
from popax.cli.gin_door import GinDoor
from popax.errors import ConfigError
from popax.objectives.table import make_objective
from popax.population.state import init_population
from popax.population.step import member_step, population_step
from popax.training.config import CohortRule, TrainConfig
from popax.trees import member

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
USERS = 3


@pytest.fixture(autouse=True)
def my_lab(monkeypatch):
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S))
    module = types.ModuleType("my_lab")
    exec(compile(code, str(PAGE), "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, "my_lab", module)
    return module


def gin_of_the_page() -> list[str]:
    block = re.findall(r"## Set from gin\n\n```\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)[0]
    return [line for line in block.splitlines() if line]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_invariant_1_holds_for_what_lives_outside_of_popax(bench, random_batch, accumulate):
    config = GinDoor([], gin_of_the_page()).build(TrainConfig, early_stop=None, accumulate=accumulate, steps=3)
    adapter = AdapterConfig(method="my_lab:SHIFT", targets=(TargetRule(pattern=r"layers\..*(q|down)_proj"),))
    cohort, params = Cohort.of(adapter, bench.model.sites()), bench.params
    objective = make_objective(config.objective, bench.model, remat="none", penalised=False)
    arguments = (cohort, objective, config.optimizer, config.schedule)
    together = jax.jit(population_step(*arguments, accumulate=accumulate))
    alone = jax.jit(member_step(*arguments, accumulate=accumulate))
    keys = jax.random.split(jax.random.key(1), USERS)
    state = init_population(cohort, config.optimizer, keys, config.member_settings(3))
    single = [member(state, user) for user in range(USERS)]
    with jax.numpy_dtype_promotion("standard"):  # as commands run: a researcher's own arithmetic
        for step in range(3):
            parts = [random_batch(USERS, seed=10 * step + part) for part in range(accumulate)]
            batch = parts[0] if accumulate == 1 else jax.tree.map(lambda *leaves: jnp.stack(leaves, 1), *parts)
            state, metrics = together(params, {}, state, batch)
            assert set(metrics.sums) == {"nll"}
            single = [alone(params, {}, own, member(batch, user))[0] for user, own in enumerate(single)]
    for user in range(USERS):
        own = member(state, user).adapters
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), own, single[user].adapters)
        assert all(float(jnp.max(jnp.abs(leaf))) > 0 for leaf in jax.tree.leaves(own))


def test_a_cohort_rule_is_a_function_of_the_user():
    rule = GinDoor([], gin_of_the_page()).build(CohortRule)
    assert rule.has("ada")
    assert not rule.has("bob")
    assert not CohortRule(users="b.*", when="my_lab:writes_much").has("ada")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"objective": "focal"}, "one of sft, sft_with_kl, entropy, or your own as 'module:name'"),
        ({"objective": "my_lap:focal"}, "there is no module 'my_lap'; install it, or put its folder on PYTHONPATH"),
        ({"objective": "my_lab:fokal"}, "has no attribute 'fokal'"),
        ({"optimizer": "my_lab:focal"}, "optimizer=.*focal"),
        ({"optimizer": lambda step: __import__("optax").sgd(2.0 * step)}, "does not take a user's settings"),
        ({"schedule": "my_lab:SHIFT"}, "schedule="),
        ({"objective": 3}, "a function .model, remat=...."),
    ],
)
def test_what_cannot_be_used_is_named(settings, said):
    with pytest.raises(ConfigError, match=said):
        TrainConfig(**settings)


def test_a_method_that_is_none_is_named():
    with pytest.raises(ConfigError, match="an AdapterMethod"):
        Cohort.of(AdapterConfig(method="my_lab:focal"), {})
    with pytest.raises(ConfigError, match="your own is 'module:name'"):
        Cohort.of(AdapterConfig(method="shift"), {})
