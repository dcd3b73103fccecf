"""Named shapes that tests, tuning and benchmarks share."""

from typing import NamedTuple


class ArgSpec(NamedTuple):
    """One call: R rows in E groups of different sizes, A features in and B out (`back`: B in and A out)."""

    name: str
    rows: int
    groups: int
    d_in: int
    d_out: int


# A chunk of 4,096 tokens (popax.modeling.experts), each in as many experts as its model's router takes.
ARG_SPECS = (
    ArgSpec("toy_moe", 512, 16, 64, 128),
    ArgSpec("bench_moe_up", 8192, 16, 512, 512),
    ArgSpec("qwen3_30b_a3b_up", 32768, 128, 2048, 768),
    ArgSpec("qwen3_30b_a3b_down", 32768, 128, 768, 2048),
    ArgSpec("qwen3_30b_a3b_up_decode", 512, 128, 2048, 768),
    ArgSpec("kimi_k2_up_of_48", 32768, 48, 7168, 2048),
    ArgSpec("kimi_k2_down_of_48", 32768, 48, 2048, 7168),
)
