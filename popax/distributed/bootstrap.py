"""How processes find each other: told by flags or the environment, or detected by jax where it knows the cluster."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping

import jax
from jax.errors import JaxRuntimeError

from popax.distributed.group import ProcessGroup
from popax.distributed.liveness import Liveness
from popax.distributed.messages import lost_message
from popax.errors import ConfigError, ProcessLostError

COORDINATOR, NUM_PROCESSES, PROCESS_ID = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
# jax ends a process without a word of popax's when its own heartbeats are missed: ours have to come first.
HEARTBEAT_FACTOR = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessConfig:
    """coordinator: HOST:PORT of process 0, the same for all. None of the three: jax detects them (TPU, Slurm, GKE).

    lost_after: seconds without a sign of life after which a process counts as lost. start_within: seconds in which all
    processes must have come.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    lost_after: float = 60.0
    start_within: float = 300.0

    def __post_init__(self):
        known = [self.coordinator is not None, self.num_processes is not None, self.process_id is not None]
        if any(known) and not all(known):
            raise ConfigError(
                f"coordinator={self.coordinator}, num_processes={self.num_processes}, process_id={self.process_id}: "
                f"give all three (or {COORDINATOR}, {NUM_PROCESSES}, {PROCESS_ID}), or none where jax detects them"
            )
        if self.coordinator is not None and not self.coordinator.rpartition(":")[2].isdigit():
            raise ConfigError(f"coordinator={self.coordinator!r}: HOST:PORT, such as 10.0.0.1:8476")
        if self.num_processes is not None and not 0 <= (self.process_id or 0) < self.num_processes:
            raise ConfigError(f"process_id={self.process_id} of num_processes={self.num_processes}: 0 to one below it")
        if self.lost_after < 1 or self.start_within < 1:
            raise ConfigError(f"lost_after={self.lost_after}, start_within={self.start_within}: at least 1 second")

    def with_environment(self, environment: Mapping[str, str]) -> "ProcessConfig":
        """What was not given, from the environment. Raises ConfigError where a number is none."""
        try:
            count, index = (
                int(environment[name]) if name in environment else None for name in (NUM_PROCESSES, PROCESS_ID)
            )
        except ValueError as error:
            raise ConfigError(f"{NUM_PROCESSES} and {PROCESS_ID} are whole numbers: {error}") from error
        return dataclasses.replace(
            self,
            coordinator=self.coordinator or environment.get(COORDINATOR),
            num_processes=count if self.num_processes is None else self.num_processes,
            process_id=index if self.process_id is None else self.process_id,
        )


@contextlib.contextmanager
def several_processes(config: ProcessConfig) -> Iterator[ProcessGroup]:
    """Inside, this is one of several processes, and a lost one is noticed; before any other use of jax.

    Raises ConfigError where they do not come together, ProcessLostError where a collective fails inside.
    """
    try:
        jax.distributed.initialize(
            config.coordinator,
            config.num_processes,
            config.process_id,
            initialization_timeout=int(config.start_within),
            heartbeat_timeout_seconds=int(HEARTBEAT_FACTOR * config.lost_after),
            shutdown_timeout_seconds=int(config.lost_after),
        )
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"process {config.process_id} of {config.num_processes} did not meet the others at {config.coordinator}: "
            f"{str(error).partition(chr(10))[0]}; start all with the same address within {config.start_within:g} s"
        ) from error
    group = ProcessGroup.current()
    with Liveness(group, config.lost_after):
        try:
            yield group
        except JaxRuntimeError as error:
            if not _is_lost_peer(error):
                raise
            raise ProcessLostError(lost_message("another process", str(error).partition("\n")[0])) from error
    jax.distributed.shutdown()


def _is_lost_peer(error: Exception) -> bool:
    words = ("gloo", "nccl", "connection", "socket closed", "coordination", "heartbeat", "unavailable:")
    return any(word in str(error).lower() for word in words)
