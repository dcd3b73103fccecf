"""What is to be planned: a slice, a mesh over it, a population, and the batch that is served."""

import dataclasses
import math
from typing import Literal

from popax.adapters.base import AdapterConfig
from popax.errors import ConfigError
from popax.modeling.remat import Remat, check_remat
from popax.plan.topology import Topology, parse_topology
from popax.population.optimizer import Optimizer, adamw, as_optimizer
from popax.sharding import DEFAULT_RULES, MeshAxes, ShardingRules

StepName = Literal["train", "prefill", "decode"]
STEPS: tuple[StepName, ...] = ("train", "prefill", "decode")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshShape:
    """Devices along each mesh axis. population: replicas of the base, each with users of its own."""

    population: int = 1
    fsdp: int = 1
    tensor: int = 1
    expert: int = 1
    context: int = 1

    def __post_init__(self):
        for name, size in self.sizes.items():
            if not isinstance(size, int) or size < 1:
                raise ConfigError(f"MeshShape.{name}={size!r}: a whole number of at least 1")

    @property
    def sizes(self) -> dict[str, int]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def devices(self) -> int:
        return math.prod(self.sizes.values())

    def of_one(self, slices: int) -> "MeshShape":
        """The part of the mesh that lies on one of `slices` slices."""
        return dataclasses.replace(self, population=self.population // slices)

    def __str__(self) -> str:
        return " x ".join(f"{name} {size}" for name, size in self.sizes.items() if size > 1) or "one device"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """One plan. users, rows, tokens: a train step has users x rows x tokens tokens. mesh: of one device, the default,
    it becomes the whole slice along fsdp.

    slices: so many slices, joined by the data-centre network (DCN), follow each other along the population axis.
    users_over: the mesh axes that spread the users. With fsdp among them a device gathers each layer's weights and
    computes its own users; without, devices that share users compute parts of each product. rows_over: the same for
    the rows of a served batch. turns: so many times as many users train by turns (TrainConfig.turns); those who wait
    are in host memory. slots: adapters that are resident while serving. serving_mesh: where prefill and decode use the
    devices in another shape. rules: (logical axis, mesh axes) pairs that replace popax.sharding's.
    """

    topology: str = "v5e:2x2"
    slices: int = 1
    mesh: MeshShape = MeshShape()
    serving_mesh: MeshShape | None = None
    steps: tuple[StepName, ...] = STEPS
    users: int = 32
    turns: int = 1
    rows: int = 1
    tokens: int = 512
    users_over: tuple[str, ...] = ("population", "fsdp", "expert")
    adapter: AdapterConfig = AdapterConfig()  # noqa: RUF009 - frozen
    optimizer: Optimizer = dataclasses.field(default_factory=adamw)
    remat: Remat = "full"
    decode_rows: int = 32
    prefill_rows: int = 8
    prefill_tokens: int = 512
    cache_length: int = 2048
    slots: int = 32
    rows_over: tuple[str, ...] = ("population",)
    rules: tuple[tuple[str, MeshAxes], ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "steps", (self.steps,) if isinstance(self.steps, str) else tuple(self.steps))
        for name in ("users_over", "rows_over"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.mesh == MeshShape():
            own = self.slice.devices // self.slices
            object.__setattr__(self, "mesh", MeshShape(population=self.slices, fsdp=own))
        check_remat(self.remat, "PlanConfig")
        object.__setattr__(self, "optimizer", as_optimizer(self.optimizer))
        self._check_numbers()
        self._check_meshes()
        unknown = sorted({name for name, _ in self.rules} - set(dict(DEFAULT_RULES)))
        if unknown:
            raise ConfigError(f"PlanConfig.rules name {unknown}; logical axes are {', '.join(dict(DEFAULT_RULES))}")

    def _check_numbers(self) -> None:
        unknown = sorted(set(self.steps) - set(STEPS))
        if unknown or not self.steps:
            raise ConfigError(f"PlanConfig.steps={self.steps}: one or more of {', '.join(STEPS)}")
        names = (
            "users",
            "turns",
            "rows",
            "tokens",
            "decode_rows",
            "prefill_rows",
            "prefill_tokens",
            "cache_length",
            "slots",
        )
        for name in names:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"PlanConfig.{name}={value!r}: a whole number of at least 1")
        if self.prefill_tokens > self.cache_length:
            raise ConfigError(
                f"prefill_tokens={self.prefill_tokens} do not fit cache_length={self.cache_length}: make it longer"
            )

    def _check_meshes(self) -> None:
        devices = self.slice.devices
        for name, mesh in (("mesh", self.mesh), ("serving_mesh", self.serving)):
            if mesh.devices != devices:
                raise ConfigError(
                    f"{name} ({mesh}) has {mesh.devices} devices, {self.where} has {devices}"
                    f" ({self.slice.chips} chips of {self.slice.chip.devices}): make the product of its axes {devices}"
                )
            if mesh.population % self.slices:
                raise ConfigError(
                    f"{name} ({mesh}): its population axis does not divide over {self.slices} slices; nothing else "
                    f"may cross them, so take a multiple of {self.slices}"
                )
        for name, axes in (("users_over", self.users_over), ("rows_over", self.rows_over)):
            if "population" not in axes or set(axes) - set(self.mesh.sizes):
                known = ", ".join(self.mesh.sizes)
                raise ConfigError(f"PlanConfig.{name}={axes}: 'population', and others of {known}")
        if "train" in self.steps:
            _check_divides("users", self.users, self.users_over, self.mesh)
        if {"prefill", "decode"} & set(self.steps):
            _check_divides("slots", self.slots, ("population",), self.serving)
        for step, name in (("prefill", "prefill_rows"), ("decode", "decode_rows")):
            if step in self.steps:
                _check_divides(name, getattr(self, name), self.rows_over, self.serving)

    @property
    def slice(self) -> Topology:
        return parse_topology(self.topology, self.slices)

    @property
    def where(self) -> str:
        """The slice, or slices, in words."""
        return self.topology if self.slices == 1 else f"{self.slices} slices of {self.topology}"

    @property
    def serving(self) -> MeshShape:
        return self.serving_mesh or self.mesh

    def mesh_of(self, step: StepName) -> MeshShape:
        return self.mesh if step == "train" else self.serving

    def sharding_rules(self, step: StepName) -> ShardingRules:
        """popax.sharding's table with this plan's changes; users, or rows, over the axes that it names."""
        spread = {"population": self.users_over} if step == "train" else {"batch": self.rows_over}
        return ShardingRules(rules=tuple({**dict(DEFAULT_RULES), **dict(self.rules), **spread}.items()))


def _check_divides(name: str, count: int, axes: tuple[str, ...], mesh: MeshShape) -> None:
    parts = math.prod(mesh.sizes[axis] for axis in axes)
    if count % parts:
        raise ConfigError(
            f"PlanConfig.{name}={count} does not divide over {' x '.join(axes)} = {parts} devices: "
            f"take {max(parts, count // parts * parts)}, or another mesh"
        )
