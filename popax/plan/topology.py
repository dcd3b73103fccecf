"""Slices by name, and the vendor's figures of their chips."""

import dataclasses
import math
import re

from popax.errors import ConfigError

GB, GIB, TERA = 10**9, 1 << 30, 10**12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One chip: bytes of HBM, bytes/s of HBM and of its links to other chips together, bfloat16 FLOP/s.

    dims: of its torus. devices: how many jax shows for one chip, each with its equal part of everything.
    usable_bytes: what the compiler lets the programs of one chip hold, by its own message where one does not fit.
    """

    hbm_bytes: int
    usable_bytes: int
    hbm_bandwidth: float
    ici_bandwidth: float
    peak_flops: float
    dims: int
    devices: int = 1


# HBM, bandwidths, peak: "Key specifications" of cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}; ICI there is the
# bidirectional figure of a chip, of which one direction, half, is what a ring's step can use.
CHIPS = {
    "v4": Chip(
        hbm_bytes=32 * GIB,
        usable_bytes=2 * int(15.25 * GIB),
        hbm_bandwidth=1228 * GB,
        ici_bandwidth=300 * GB,
        peak_flops=275 * TERA,
        dims=3,
        devices=2,
    ),
    "v5e": Chip(
        hbm_bytes=16 * GIB,
        usable_bytes=int(15.75 * GIB),
        hbm_bandwidth=819 * GB,
        ici_bandwidth=200 * GB,
        peak_flops=197 * TERA,
        dims=2,
    ),
    "v5p": Chip(
        hbm_bytes=95 * GIB,
        usable_bytes=int(95.74 * GIB),
        hbm_bandwidth=2765 * GB,
        ici_bandwidth=600 * GB,
        peak_flops=459 * TERA,
        dims=3,
    ),
    "v6e": Chip(
        hbm_bytes=32 * GIB,
        usable_bytes=int(31.25 * GIB),
        hbm_bandwidth=1638 * GB,
        ici_bandwidth=400 * GB,
        peak_flops=918 * TERA,
        dims=2,
    ),
    "tpu7x": Chip(
        hbm_bytes=192 * GIB,
        usable_bytes=2 * int(94.75 * GIB),
        hbm_bandwidth=7380 * GB,
        ici_bandwidth=600 * GB,
        peak_flops=2307 * TERA,
        dims=3,
        devices=2,
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
    """`slices` equal slices such as v5e:4x4, which reach each other over the data-centre network (DCN)."""

    name: str
    kind: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]

    @property
    def chips(self) -> int:
        return math.prod(self.shape) * self.slices

    @property
    def devices(self) -> int:
        return self.chips * self.chip.devices

    def larger(self, times: int) -> "Topology":
        """Slices of `times` as many chips, a power of two: the last of the shortest sides is doubled first."""
        if times < 1 or times & (times - 1):
            raise ConfigError(f"a slice {times} times as large: sides double, so take a power of two")
        shape = list(self.shape)
        for _ in range(times.bit_length() - 1):
            shape[min(range(len(shape)), key=lambda side: (shape[side], -side))] *= 2
        return dataclasses.replace(self, name=f"{self.kind}:{'x'.join(map(str, shape))}", shape=tuple(shape))


def parse_topology(name: str, slices: int = 1) -> Topology:
    """Raises ConfigError for a kind that is not in CHIPS, and for a shape that is not one of its slices."""
    kind, _, shape = name.partition(":")
    if kind not in CHIPS:
        known = "GPUs need a GPU to compile for; " if kind.lower() in ("gpu", "cuda", "h100", "h200", "a100") else ""
        raise ConfigError(f"topology {name!r}: {known}the kinds are {', '.join(CHIPS)}, as in v5e:4x4 or v5p:4x4x8")
    dims = CHIPS[kind].dims
    example = "4x4" if dims == 2 else "4x4x8"
    if not re.fullmatch(r"\d+(x\d+)*", shape) or shape.count("x") + 1 != dims:
        raise ConfigError(f"topology {name!r}: {kind} has {dims} dimensions, as in {kind}:{example}")
    sizes = tuple(int(size) for size in shape.split("x"))
    if sizes[0] % 2 or sizes[1] % 2 or min(sizes) < 1:
        raise ConfigError(
            f"topology {name!r}: a host has 2 x 2 chips, so the first two sizes are even, as in {kind}:{example}"
        )
    if not isinstance(slices, int) or slices < 1:
        raise ConfigError(f"{slices!r} slices of {name}: a whole number of at least 1")
    return Topology(name=name, kind=kind, shape=sizes, slices=slices)
