"""Pretraining of a small base: every parameter trained on a mixed stream. Resumable, bitwise."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

from popax.errors import ConfigError
from popax.modeling.model import Model
from popax.modeling.remat import Remat, check_remat
from popax.objectives.sft import sft
from popax.types import NO_ADAPT, Batch, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """AdamW with warm-up and cosine decay to a tenth; weight decay on matrices only."""

    steps: int = 400
    learning_rate: float = 3e-3
    warmup_steps: int = 40
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    b2: float = 0.98
    checkpoint_every: int = 100
    seed: int = 0
    remat: Remat = "none"

    def __post_init__(self):
        if self.steps < 1 or not 0 <= self.warmup_steps < self.steps:
            raise ConfigError(f"steps={self.steps}, warmup_steps={self.warmup_steps}: 0 <= warmup_steps < steps")
        check_remat(self.remat, "PretrainConfig")
        if self.checkpoint_every < 1:
            raise ConfigError(f"checkpoint_every={self.checkpoint_every}: at least 1")


class PretrainState(NamedTuple):
    """What a checkpoint holds."""

    step: jax.Array
    params: Params
    opt_state: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainHooks:
    """on_start(step): called once, with the step of the checkpoint that is continued, 0 for a new run.

    on_step(step, loss in nats per target): called for each step, one step late so that the device never waits.
    """

    on_start: Callable[[int], None] = lambda step: None
    on_step: Callable[[int, float], None] = lambda step, loss: None
    stop_requested: Callable[[], bool] = lambda: False


def optimizer(config: PretrainConfig) -> optax.GradientTransformation:
    """The transformation of this config."""
    rate = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, config.warmup_steps, config.steps, 0.1 * config.learning_rate
    )

    def matrices(params: Params) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, leaf: path[-1].key in ("kernel", "embedding"), params)

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(rate, b2=config.b2, weight_decay=config.weight_decay, mask=matrices),
    )


def pretrain(
    model: Model,
    batch_at: Callable[[int], Batch],
    config: PretrainConfig,
    *,
    directory: Path | None = None,
    hooks: PretrainHooks | None = None,
) -> tuple[Params, int]:
    """Train from scratch; batch_at(step) is a pure function. Returns the parameters and the number of steps done.

    directory: where checkpoints go, and where a stopped run is found again; None keeps none.
    """
    hooks = hooks or PretrainHooks()
    if model.config.quantise is not None:
        raise ConfigError(
            "ModelConfig.quantise: a quantised base is frozen; train it in full, and quantise it when it is read"
        )
    transform = optimizer(config)
    state = _start(model, transform, config)
    saved = _Checkpoints(directory) if directory is not None else None
    if saved is not None:
        state = saved.restore(state)
    step_fn = jax.jit(
        functools.partial(_step, sft(model, remat=config.remat, frozen_base=False), transform), donate_argnums=0
    )
    done = int(state.step)
    hooks.on_start(done)
    previous: tuple[int, jax.Array] | None = None
    while done < config.steps and not hooks.stop_requested():
        state, loss = step_fn(state, batch_at(done))
        done += 1
        if previous is not None:
            hooks.on_step(previous[0], float(previous[1]))
        previous = (done, loss)
        if saved is not None and done % config.checkpoint_every == 0:
            saved.save(state)
    if previous is not None:
        hooks.on_step(previous[0], float(previous[1]))
    if saved is not None:
        saved.save(state)
        saved.close()
    return state.params, done


def _start(model: Model, transform: optax.GradientTransformation, config: PretrainConfig) -> PretrainState:
    params = model.init(jax.random.key(config.seed))
    return PretrainState(jnp.zeros((), jnp.int32), params, transform.init(params))


def _step(objective, transform, state: PretrainState, batch: Batch) -> tuple[PretrainState, jax.Array]:
    (loss, _), grads = jax.value_and_grad(lambda params: objective(params, NO_ADAPT, batch), has_aux=True)(state.params)
    with jax.numpy_dtype_promotion("standard"):  # optax's own arithmetic
        updates, opt_state = transform.update(grads, state.opt_state, state.params)
        params = cast(Params, optax.apply_updates(state.params, updates))
    return PretrainState(state.step + 1, params, opt_state), loss


class _Checkpoints:
    """The newest two states, each visible only when whole."""

    def __init__(self, directory: Path):
        self._manager = ocp.CheckpointManager(
            directory.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
        )

    def restore(self, like: PretrainState) -> PretrainState:
        latest = self._manager.latest_step()
        if latest is None:
            return like
        return cast(PretrainState, self._manager.restore(latest, args=ocp.args.StandardRestore(like)))  # pyright: ignore

    def save(self, state: PretrainState) -> None:
        step = int(np.asarray(state.step))
        if step != self._manager.latest_step():
            # Waiting keeps the donated buffers of the next step out of the write.
            self._manager.save(step, args=ocp.args.StandardSave(state))
            self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()
