"""Named shapes that tests, tuning and benchmarks share."""

from typing import NamedTuple

from popax.kernels.sites import RANKS, SITES


class ArgSpec(NamedTuple):
    """One call: N users, T tokens each, D in, F out, R rank."""

    name: str
    population: int
    tokens: int
    d_in: int
    d_out: int
    rank: int


def _training(site, rank: int) -> ArgSpec:
    """A training step on one host's worth of users: 512 tokens each, fewer users where the base is larger."""
    users = 64 if site.model.startswith("qwen3") else 16
    return ArgSpec(f"{site.label}_r{rank}", users, 512, site.d_in, site.d_out, rank)


TOYS = (
    ArgSpec("toy_q_r8", 64, 256, 64, 64, 8),
    ArgSpec("bench_25m_up_r8", 8, 512, 512, 1536, 8),
)
ARG_SPECS = (*TOYS, *(_training(site, rank) for site in SITES for rank in RANKS))
