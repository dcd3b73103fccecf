"""Named shapes that tests, tuning and benchmarks share."""

from typing import NamedTuple

import jax

from popax.kernels.sites import RANKS, SITE, SITES, WIDE

MATRIX, DIAGONAL = "matrix", "diagonal"


class StackedSpec(NamedTuple):
    """One call: N users, T tokens each, D in, F out, R rank; core: "matrix" or "diagonal"."""

    name: str
    population: int
    tokens: int
    d_in: int
    d_out: int
    rank: int
    core: str


class IndexedSpec(NamedTuple):
    """M tokens in at most `runs` stretches of one slot each, of S slots."""

    name: str
    tokens: int
    slots: int
    runs: int
    d_in: int
    d_out: int
    rank: int
    core: str


def variant(core: jax.Array) -> str:
    """Of stacked or pooled cores: [N, R, R] is a matrix, [N, R] a diagonal."""
    return MATRIX if core.ndim == 3 else DIAGONAL


def _training(label: str, rank: int, core: str = MATRIX) -> StackedSpec:
    """512 tokens a user, fewer users where the base is larger."""
    site = SITE[label]
    users = 64 if site.model.startswith("qwen3") else 16
    return StackedSpec(f"{label}_{core}_r{rank}", users, 512, site.d_in, site.d_out, rank, core)


def _rows(label: str, tokens: int, slots: int, rank: int, core: str = MATRIX) -> IndexedSpec:
    """A token a run, as in decode, or 16 sequences."""
    site, runs = SITE[label], 256 if tokens == 256 else 16
    name = f"{label}_{tokens}_over_{slots}_{core}_r{rank}"
    return IndexedSpec(name, tokens, slots, runs, site.d_in, site.d_out, rank, core)


_WIDE = tuple(site.label for site in WIDE.values())
_OTHERS = (*(site.label for site in SITES if site.model == "qwen3_8b" and not site.wide), "kimi_k2_kv_a_proj")
_Q = "qwen3_8b_q_proj"

STACKED_SPECS = (
    StackedSpec("toy_q_matrix_r8", 64, 256, 64, 64, 8, MATRIX),
    StackedSpec("toy_q_diagonal_r8", 64, 256, 64, 64, 8, DIAGONAL),
    *(_training(label, rank) for label in _WIDE for rank in RANKS),
    *(_training(label, 16, DIAGONAL) for label in _WIDE),
    *(_training(WIDE["qwen3_8b"].label, rank, DIAGONAL) for rank in (1, 8, 64)),
    *(_training(label, 16) for label in _OTHERS),
)
DECODE_SPECS = (
    *(_rows(_Q, 256, slots, 16) for slots in (8, 256, 4096)),
    *(_rows(_Q, 256, 256, rank) for rank in (1, 8, 64)),
    _rows(_Q, 256, 4096, 16, DIAGONAL),
    *(_rows(label, 256, 256, 16) for label in _WIDE),
)
PREFILL_SPECS = (
    *(_rows(_Q, 8192, slots, 16) for slots in (8, 4096)),
    *(_rows(_Q, 8192, 64, rank) for rank in (1, 8, 64)),
    _rows(_Q, 8192, 64, 16, DIAGONAL),
    *(_rows(label, 8192, 64, 16) for label in _WIDE),
)
INDEXED_SPECS = (*DECODE_SPECS, *PREFILL_SPECS)
