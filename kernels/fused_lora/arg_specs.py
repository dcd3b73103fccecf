"""Named shapes that tests, tuning and benchmarks share."""

from typing import NamedTuple

from popax.kernels.sites import RANKS, SITE, SITES, WIDE, Site

WEIGHTS = ("bfloat16", "int8", "float8_e4m3fn")


class ArgSpec(NamedTuple):
    """One call: N users, T tokens each, D in, F out, R rank; weight: the dtype in which W is stored."""

    name: str
    population: int
    tokens: int
    d_in: int
    d_out: int
    rank: int
    weight: str


def _training(site: Site, rank: int, weight: str = "bfloat16") -> ArgSpec:
    """512 tokens a user; fewer users where the base is larger."""
    users = 64 if site.model.startswith("qwen3") else 16
    return ArgSpec(f"{site.label}_r{rank}_{weight}", users, 512, site.d_in, site.d_out, rank, weight)


TOYS = (
    ArgSpec("toy_q_r8_float32", 64, 256, 128, 128, 8, "float32"),
    ArgSpec("bench_25m_up_r8_int8", 8, 512, 512, 1536, 8, "int8"),
)
_QWEN3_8B_Q = SITE["qwen3_8b_q_proj"]
ARG_SPECS = (
    *TOYS,
    *(_training(site, 16) for site in SITES if site.model == "qwen3_0_6b"),
    *(_training(site, 16, weight) for site in SITES if site.model == "qwen3_8b" for weight in WEIGHTS),
    *(_training(_QWEN3_8B_Q, rank) for rank in RANKS if rank != 16),
    *(_training(WIDE[model], rank) for model in ("llama3_1_70b", "kimi_k2") for rank in RANKS),
    *(_training(WIDE[model], 16, weight) for model in ("llama3_1_70b", "kimi_k2") for weight in WEIGHTS[1:]),
)
