"""Named shapes that tests, tuning and benchmarks share."""

from typing import NamedTuple


class ArgSpec(NamedTuple):
    """One call: G groups of T tokens over S slots, D in, F out, R rank."""

    name: str
    groups: int
    tokens: int
    slots: int
    d_in: int
    d_out: int
    rank: int


ARG_SPECS = (
    ArgSpec("toy_decode_r8", 16, 1, 64, 64, 64, 8),
    ArgSpec("qwen3_8b_q_decode_256_distinct_r16", 256, 1, 256, 4096, 4096, 16),
    ArgSpec("qwen3_8b_q_decode_256_in_16_r16", 256, 1, 16, 4096, 4096, 16),
    ArgSpec("qwen3_8b_down_prefill_r16", 16, 512, 64, 12288, 4096, 16),
)
