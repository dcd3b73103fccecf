"""Named shapes that tests, tuning and benchmarks share."""

from typing import NamedTuple


class ArgSpec(NamedTuple):
    """One call: N users, T tokens each, D in, F out, R rank."""

    name: str
    population: int
    tokens: int
    d_in: int
    d_out: int
    rank: int


ARG_SPECS = (
    ArgSpec("toy_q_r8", 64, 256, 64, 64, 8),
    ArgSpec("bench_25m_up_r8", 8, 256, 512, 1536, 8),
    ArgSpec("qwen3_0_6b_up_r16", 64, 512, 1024, 3072, 16),
    ArgSpec("qwen3_8b_q_r16", 64, 512, 4096, 4096, 16),
    ArgSpec("qwen3_8b_down_r16", 64, 512, 12288, 4096, 16),
)
