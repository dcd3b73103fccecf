"""What a user's adapter of each method is in size on a base, and how many chips hold a million of them beside it."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from popax.adapters.base import AdapterConfig
from popax.adapters.cohort import Cohort
from popax.modeling.config import ModelConfig
from popax.modeling.model import Model
from popax.plan.topology import CHIPS

MILLION = 1_000_000
# The most chips of one slice: cloud.google.com/tpu/docs/{v5e,v5p,v6e,tpu7x}; powers of two, as the plan's meshes are.
LARGEST_SLICE = {"v5e": 256, "v5p": 8192, "v6e": 256, "tpu7x": 8192}


def usual_methods(dtype: str) -> dict[str, AdapterConfig]:
    """A config of each method at the size that its paper advises, and of lora at the sizes people use."""
    sized: dict[str, dict[str, Any]] = {
        "lora r64": {"method": "lora", "rank": 64},
        "lora r16": {"method": "lora", "rank": 16},
        "lora r1": {"method": "lora", "rank": 1},
        "dora r16": {"method": "dora", "rank": 16},
        "lora mica r16": {"method": "lora", "init": "mica", "rank": 16},
        "vera r256": {"method": "vera", "rank": 256},
        "svf": {"method": "svf"},
        "ia3": {"method": "ia3"},
        "reft r4": {"method": "reft", "rank": 4},
        "bias": {"method": "bias"},
        "delta_mem r8": {"method": "delta_mem", "rank": 8},
        "prompt r16": {"method": "prompt", "rank": 16},
        "lora_xs r64": {"method": "lora_xs", "rank": 64},
        "lora_xs r16": {"method": "lora_xs", "rank": 16},
        "conditioned r16": {"method": "conditioned", "rank": 16},
        "tiny_lora 64 groups": {"method": "tiny_lora", "rank": 2, "options": {"groups": 64}},
        "tiny_lora": {"method": "tiny_lora", "rank": 2},
    }
    return {name: AdapterConfig(dtype=dtype, **settings) for name, settings in sized.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodSize:
    """Of one method on one base. bytes_per_user: of the adapter alone. shared_bytes: what all users share, once.

    chips: the smallest power of two of each kind whose HBM holds the base, what is shared, and a million adapters, each
    array counted without the padding of a TPU's tiles; None beyond the largest slice of the kind.
    """

    base: str
    method: str
    parameters: int
    bytes_per_user: int
    bytes_per_million: int
    shared_bytes: int
    base_bytes: int
    chips: dict[str, int | None]

    def to_dict(self) -> dict[str, Any]:
        """One flat row of a report."""
        plain = dataclasses.asdict(self)
        return {**{name: value for name, value in plain.items() if name != "chips"}, **plain["chips"]}


def method_sizes(name: str, config: ModelConfig, adapters: dict[str, AdapterConfig]) -> Iterator[MethodSize]:
    """The sizes of these adapters on a base, from shapes alone: nothing of it is in memory."""
    model = Model(config)
    abstract = model.abstract()
    base_bytes = _bytes(abstract)
    for method, adapter in adapters.items():
        cohort = Cohort.of(adapter, model.sites())
        shared = jax.eval_shape(lambda params, cohort=cohort: cohort.shared(*model.site_arrays(params)), abstract)
        own, common = _bytes(cohort.abstract()), _bytes(shared)
        needed = base_bytes + common + own * MILLION
        yield MethodSize(
            base=name,
            method=method,
            parameters=cohort.num_params,
            bytes_per_user=own,
            bytes_per_million=own * MILLION,
            shared_bytes=common,
            base_bytes=base_bytes,
            chips={kind: _chips(needed, kind) for kind in LARGEST_SLICE},
        )


def markdown(rows: Sequence[MethodSize]) -> str:
    """A table for reading, in the order of the rows."""
    kinds = list(LARGEST_SLICE)
    head = ["base", "method", "numbers a user", "bytes a user", "a million users", "shared", *kinds]
    lines = [head, ["---"] * 2 + ["---:"] * (len(head) - 2)]
    for row in rows:
        chips = [f"{row.chips[kind]:,}" if row.chips[kind] else "-" for kind in kinds]
        sizes = map(_human, (row.bytes_per_user, row.bytes_per_million, row.shared_bytes))
        lines.append([row.base, row.method, f"{row.parameters:,}", *sizes, *chips])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _chips(needed: int, kind: str) -> int | None:
    chips = 1 << max(0, math.ceil(math.log2(max(needed, 1) / CHIPS[kind].usable_bytes)))
    return chips if chips <= LARGEST_SLICE[kind] else None


def _human(size: int) -> str:
    for power, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "KB")):
        if size >= power:
            return f"{size / power:.3g} {unit}"
    return f"{size} B"
