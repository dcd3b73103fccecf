"""The population step against what it must be compared with, on the same tokens and in one run."""

import dataclasses
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from popax.adapters.base import AdapterConfig
from popax.adapters.cohort import Cohort
from popax.errors import ConfigError
from popax.modeling.config import ModelConfig
from popax.modeling.loss import cross_entropy
from popax.modeling.model import Model
from popax.modeling.remat import Remat, check_remat
from popax.population.optimizer import adamw
from popax.population.state import PopulationState, hparams, init_population
from popax.training.compiled import Programs, compile_programs
from popax.training.config import TrainConfig
from popax.trees import member
from popax.types import Batch, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchTrainConfig:
    """users x batch_size x seq_len tokens a step. repeats: measured rounds, the three programs taking turns in each."""

    users: int = 8
    batch_size: int = 2
    seq_len: int = 256
    repeats: int = 5
    adapter: AdapterConfig = AdapterConfig()  # noqa: RUF009 - frozen
    remat: Remat = "none"
    seed: int = 0

    def __post_init__(self):
        if min(self.users, self.batch_size, self.seq_len, self.repeats) < 1:
            raise ConfigError(f"{self}: users, batch_size, seq_len and repeats are at least 1")
        check_remat(self.remat, "BenchTrainConfig")


class CompileCounter:
    """Counts the programs that XLA compiles while it is open, whoever asks for them."""

    EVENT = "/jax/core/compile/backend_compile_duration"

    def __init__(self):
        self.count = 0

    def __enter__(self) -> "CompileCounter":
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *exc: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **kwargs: str | int | float) -> None:
        del duration_secs, kwargs
        self.count += event == self.EVENT


def random_batch(config: BenchTrainConfig, vocab_size: int, users: int) -> Batch:
    """Full rows of random tokens, one segment each: [users, batch, tokens]."""
    shape = (users, config.batch_size, config.seq_len)
    draws = np.random.default_rng(config.seed).integers(0, vocab_size, (*shape[:2], shape[2] + 1), dtype=np.int32)
    leaves = (
        draws[..., :-1],
        draws[..., 1:],
        np.ones(shape, np.float32),
        np.broadcast_to(np.arange(config.seq_len, dtype=np.int32), shape),
        np.ones(shape, np.int32),
        np.ones(shape, np.int32),
    )
    return Batch(*jax.device_put(leaves))


def base_only(model: Model, *, remat: Remat = "none") -> Callable[[Params, jax.Array, Batch], jax.Array]:
    """The gradient of the base's loss with respect to its input embeddings: what any adapter training pays at least."""

    def gradient(params: Params, x_NxBxTxD: jax.Array, batch: Batch) -> jax.Array:
        def one(x_BxTxD: jax.Array, own: Batch) -> jax.Array:
            hidden_BxTxD = model.batch_hidden(params, own, embedded_BxTxD=x_BxTxD, remat=remat)
            nll_BxT = cross_entropy(model.logits(params, hidden_BxTxD), own.targets_BxT) * own.weights_BxT
            return jnp.sum(nll_BxT) / jnp.maximum(jnp.sum(own.weights_BxT), 1.0)

        return jax.grad(lambda x: jnp.sum(jax.vmap(one)(x, batch)))(x_NxBxTxD)

    return gradient


@dataclasses.dataclass(frozen=True)
class Setup:
    """A population of fresh users, their tokens, and the programs of a run."""

    config: BenchTrainConfig
    model: Model
    programs: Programs
    params: Params
    shared: Any
    state: PopulationState
    batch: Batch


def set_up(model_config: ModelConfig, config: BenchTrainConfig) -> Setup:
    """Random weights, users and tokens; nothing is compiled that a run would not compile."""
    model = Model(model_config)
    cohort = Cohort.of(config.adapter, model.sites())
    train = TrainConfig(
        adapter=config.adapter, slots=config.users, optimizer=adamw(), early_stop=None, remat=config.remat
    )
    params = model.init(jax.random.key(config.seed))
    shared = cohort.shared(*model.site_arrays(params))
    settings = hparams(learning_rate=1e-3, max_steps=1 << 30, clip_norm=1.0)
    keys = jax.random.split(jax.random.key(config.seed + 1), config.users)
    state = jax.jit(lambda keys: init_population(cohort, train.optimizer, keys, settings))(keys)
    batch = random_batch(config, model_config.vocab_size, config.users)
    return Setup(config, model, compile_programs(model, cohort, train), params, shared, state, batch)


def seconds_of(run: Callable[[], Any]) -> float:
    """Of one call, until what it gives is there."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def _measure(runners: dict[str, Callable[[], Any]]) -> tuple[dict[str, float], dict[str, float]]:
    """(seconds, seconds of this process's processors) of each, one after the other."""
    seconds, processor_seconds = {}, {}
    for name, run in runners.items():
        before = time.process_time()
        seconds[name] = seconds_of(run)
        processor_seconds[name] = time.process_time() - before
    return seconds, processor_seconds


def bench_train(
    model_config: ModelConfig, config: BenchTrainConfig, progress: Callable[[str], None] = lambda line: None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(figures, rows) of design.md section 9: medians over rounds in which the three programs take turns."""
    setup = set_up(model_config, config)
    tokens = config.users * config.batch_size * config.seq_len
    progress(f"{setup.model.num_params / 1e6:.1f}M parameters, {config.users} users, {tokens} tokens a step")
    embedded = jax.jit(setup.model.embed)(setup.params, setup.batch.tokens_BxT)
    plain = jax.jit(base_only(setup.model, remat=config.remat))
    runners = _Runners(setup, embedded, plain)
    first = {}
    for name, run in runners.table().items():
        first[name] = seconds_of(run)
        progress(f"first call, with compilation: {name} {first[name]:.1f} s")
    runners.change_users()  # compiles what seats a user, once
    rounds: list[dict[str, float]] = []
    on_processors: list[dict[str, float]] = []
    with CompileCounter() as compiled:
        for index in range(config.repeats):
            runners.change_users()
            seconds, processor_seconds = _measure(runners.table())
            rounds.append(seconds)
            on_processors.append(processor_seconds)
            progress(
                f"round {index + 1}/{config.repeats}: " + ", ".join(f"{n} {v:.3f} s" for n, v in rounds[-1].items())
            )

    def ratios(other: str, measured: list[dict[str, float]]) -> list[float]:
        return [row["population"] / row[other] for row in measured]

    to_base = ratios("base_only", rounds)
    figures = {
        "population_over_base_only": statistics.median(to_base),
        "population_over_base_only_lowest": min(to_base),
        "population_over_base_only_highest": max(to_base),
        "population_over_sequential": statistics.median(ratios("sequential", rounds)),
        "tokens_per_s": tokens / statistics.median(row["population"] for row in rounds),
        "recompilations": compiled.count,
        "peak_bytes": program_bytes(setup.programs.step, setup.params, setup.shared, runners.state, setup.batch),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "first_step_s": first["population"],
        "parameters": setup.model.num_params,
        "parameters_per_user": Cohort.of(config.adapter, setup.model.sites()).num_params,
    }
    # Where the host is the device: what other work beside it disturbs less than the clock.
    if jax.default_backend() == "cpu":
        figures["population_over_base_only_cpu"] = statistics.median(ratios("base_only", on_processors))
    cpu = [{f"{name}_cpu": value for name, value in row.items()} for row in on_processors]
    return figures, [{"round": index, **row, **cpu[index]} for index, row in enumerate(rounds)]


class _Runners:
    """The three programs on the same tokens; the population's state is donated and replaced at each call."""

    def __init__(self, setup: Setup, embedded: jax.Array, plain: Callable[..., jax.Array]):
        self._setup, self._embedded, self._plain = setup, embedded, plain
        self.state = setup.state
        self._alone = [_one_user(setup.state, user) for user in range(setup.config.users)]
        self._batches = [
            jax.tree.map(lambda leaf, at=user: leaf[at : at + 1], setup.batch) for user in range(setup.config.users)
        ]

    def table(self) -> dict[str, Callable[[], Any]]:
        return {"population": self._population, "base_only": self._base_only, "sequential": self._sequential}

    def change_users(self) -> None:
        """Seat another user in every slot, as a stream does between rounds."""
        shifted = member(self.state, jnp.int32(0))
        self.state = self._setup.programs.insert_member(self.state, jnp.int32(self._setup.config.users - 1), shifted)

    def _population(self) -> Any:
        self.state, metrics = self._setup.programs.step(
            self._setup.params, self._setup.shared, self.state, self._setup.batch
        )
        return self.state, metrics

    def _base_only(self) -> Any:
        return self._plain(self._setup.params, self._embedded, self._setup.batch)

    def _sequential(self) -> Any:
        for user, batch in enumerate(self._batches):
            self._alone[user], _ = self._setup.programs.step(
                self._setup.params, self._setup.shared, self._alone[user], batch
            )
        return self._alone


def _one_user(state: PopulationState, user: int) -> PopulationState:
    return jax.tree.map(lambda leaf: jnp.copy(leaf[user : user + 1]), state)


def program_bytes(step: Any, *arguments: Any) -> int:
    """What the compiler says the program holds: arguments + results + temporaries - results that reuse arguments."""
    analysis = step.lower(*arguments).compile().memory_analysis()
    return int(
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        + analysis.temp_size_in_bytes
        - analysis.alias_size_in_bytes
    )


TOY = ModelConfig(
    vocab_size=512,
    embed_dim=64,
    ffw_dim=192,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    qk_norm=True,
    tied_embeddings=True,
    max_seq_len=128,
)


def bench_toy(seed: int = 0, repeats: int = 5, progress: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """The toy that other JAX servers were timed on: hidden 64, 2 layers, rank 8, 4 x 64 tokens an adapter, float32."""
    measured = {}
    for users in (64, 256):
        setup = set_up(TOY, BenchTrainConfig(users=users, batch_size=4, seq_len=64, seed=seed))
        runners = _Runners(setup, jnp.zeros(()), lambda *_: jnp.zeros(()))
        first = seconds_of(runners._population)
        step = min(seconds_of(runners._population) for _ in range(repeats))
        peak = program_bytes(setup.programs.step, setup.params, setup.shared, runners.state, setup.batch)
        measured[users] = (first, step, peak)
        progress(f"toy, {users} adapters: first step {first:.2f} s, step {step:.3f} s, {peak / 1e6:.0f} MB")
    (first, step, peak), (_, step_256, peak_256) = measured[64], measured[256]
    return {
        "toy64_step_s": step,
        "toy64_first_step_s": first,
        "toy64_peak_bytes": peak,
        "toy256_over_toy64": step_256 / step,
        "toy256_over_toy64_bytes": peak_256 / peak,
    }
