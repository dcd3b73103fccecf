"""Methods beside each other: one step of the same population on the same tokens, method after method, in turns."""

import dataclasses
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import jax

from popax.adapters.base import AdapterConfig
from popax.adapters.cohort import Cohort
from popax.bench.train import BenchTrainConfig, program_bytes, seconds_of, set_up
from popax.modeling.config import ModelConfig
from popax.modeling.model import Model

# The method that others are compared with: rank 8, as people train it.
BESIDE = "lora"


def bench_methods(
    model: ModelConfig,
    config: BenchTrainConfig,
    adapters: Mapping[str, AdapterConfig],
    progress: Callable[[str], None] = lambda line: None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(figures, a row a method): medians of rounds in which all methods take a step, and what their programs hold.

    over_lora: the median of the rounds' own ratios to lora's step, or to the first method's where lora is not there.
    """
    for adapter in adapters.values():
        Cohort.of(adapter, Model(model).sites())  # a typing mistake is told before anything is compiled
    beside = BESIDE if BESIDE in adapters else next(iter(adapters))
    setups, seconds, rows = {}, {name: [] for name in adapters}, []
    for name, adapter in adapters.items():
        setups[name] = set_up(model, dataclasses.replace(config, adapter=adapter))
        first = seconds_of(_step(setups, name))
        progress(f"{name}: first step, with compilation, {first:.1f} s")
    for index in range(config.repeats):
        for name in adapters:
            seconds[name].append(seconds_of(_step(setups, name)))
        told = ", ".join(f"{name} {taken[-1]:.2f} s" for name, taken in seconds.items())
        progress(f"round {index + 1}/{config.repeats}: {told}")
    for name, setup in setups.items():
        ratios = [own / other for own, other in zip(seconds[name], seconds[beside], strict=True)]
        state = sum(leaf.nbytes for leaf in jax.tree.leaves(setup.state))
        numbers = sum(leaf.size for leaf in jax.tree.leaves(setup.state.adapters)) // config.users
        rows.append(
            {
                "method": name,
                "parameters_per_user": numbers,
                "step_s": statistics.median(seconds[name]),
                "microseconds_per_user": 1e6 * statistics.median(seconds[name]) / config.users,
                "over_lora": statistics.median(ratios),
                "over_lora_lowest": min(ratios),
                "over_lora_highest": max(ratios),
                "state_bytes": state,
                "shared_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(setup.shared)),
                "program_bytes": program_bytes(
                    setup.programs.step, setup.params, setup.shared, setup.state, setup.batch
                ),
            }
        )
    figures: dict[str, Any] = {"users": config.users}
    figures |= {f"{row['method']}_over_{beside}": row["over_lora"] for row in rows if row["method"] != beside}
    return figures, rows


def _step(setups: dict[str, Any], name: str) -> Callable[[], Any]:
    def run() -> Any:
        setup = setups[name]
        state, metrics = setup.programs.step(setup.params, setup.shared, setup.state, setup.batch)
        setups[name] = dataclasses.replace(setup, state=state)  # the old one was donated
        return state, metrics

    return run
