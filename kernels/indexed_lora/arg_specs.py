"""Named shapes of decode and of grouped rows that tests, tuning and benchmarks share."""

from typing import NamedTuple

from popax.kernels.sites import SITE, WIDE


class DecodeSpec(NamedTuple):
    """A decode step: `tokens` in `distinct` of `slots` slots; sites with outputs d_outs share x."""

    name: str
    tokens: int
    slots: int
    distinct: int
    d_in: int
    d_outs: tuple[int, ...]
    rank: int


class GroupedSpec(NamedTuple):
    """Prefill or packed training: `tokens` in `runs` sequences of one user each."""

    name: str
    tokens: int
    slots: int
    runs: int
    d_in: int
    d_out: int
    rank: int


SLOTS = (8, 64, 256, 4096)
RANKS = (8, 16, 64)


def _decode(label: str, slots: int, distinct: int, d_in: int, d_outs: tuple[int, ...], rank: int) -> DecodeSpec:
    return DecodeSpec(f"{label}_256_in_{distinct}_of_{slots}_r{rank}", 256, slots, distinct, d_in, d_outs, rank)


DECODE_SPECS = (
    *(_decode("qwen3_8b_q", slots, min(slots, 256), 4096, (4096,), 16) for slots in SLOTS),
    _decode("qwen3_8b_q", 256, 16, 4096, (4096,), 16),
    *(_decode("qwen3_8b_q", 256, 256, 4096, (4096,), rank) for rank in (1, 8, 64)),
    _decode("qwen3_8b_qkv", 256, 256, 4096, (4096, 1024, 1024), 16),
    _decode("qwen3_8b_gate_up", 256, 256, 4096, (12288, 12288), 16),
    _decode("qwen3_8b_down", 256, 256, 12288, (4096,), 16),
    *(
        _decode(site.label, 256, 256, site.d_in, (site.d_out,), rank)
        for site in WIDE.values()
        if site.model != "qwen3_8b"
        for rank in (1, *RANKS)
    ),
    _decode("kimi_k2_kv_a_proj", 4096, 256, 7168, (576,), 16),
)


def _grouped(label: str, slots: int, rank: int) -> GroupedSpec:
    site = SITE[label]
    return GroupedSpec(f"{label}_8192_over_{slots}_r{rank}", 8192, slots, 16, site.d_in, site.d_out, rank)


GROUPED_SPECS = (
    *(_grouped("qwen3_8b_q_proj", slots, 16) for slots in SLOTS),
    *(_grouped("qwen3_8b_q_proj", 64, rank) for rank in (1, 8, 64)),
    _grouped("qwen3_8b_gate_proj", 64, 16),
    _grouped("qwen3_8b_down_proj", 64, 16),
    *(_grouped(site.label, 64, rank) for site in WIDE.values() if site.model != "qwen3_8b" for rank in (1, *RANKS)),
    _grouped("kimi_k2_kv_a_proj", 64, 16),
)
