"""One call, several implementations: the platform's default first, the next where one cannot, XLA last.

On CPU the plain XLA form is traced and nothing else. On TPU and GPU a kernel runs where a tuned row names it; it is
bound to its platform at lowering, so that the same trace also lowers for the host's CPU.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
from jax.sharding import PartitionSpec

from popax.kernels import target, tuning

XLA = "xla"
POPULATION = "population"  # the mesh axis over which users are spread; design.md section 1
BACKENDS = {"tpu": ("pallas_tpu",), "cuda": ("pallas_triton", "pallas_mosaic_gpu")}

Implementation = Callable[..., Any]


def run(
    op: str,
    implementations: Mapping[str, Implementation],
    spec: Any,
    *operands: Any,
    dtype: str,
    implementation: str | None = None,
    population: tuple[bool, ...] | None = None,
    block_types: Mapping[str, Any] = MappingProxyType({}),
    untuned: Mapping[str, str] = MappingProxyType({}),
) -> Any:
    """implementations[best](*operands).

    op: "folder.pass". spec: the call's shape, as in the op's arg_specs. implementation: this one and no other, for
    benchmarks and tests; it raises NotImplementedError, with the reason, where it cannot. population: which operands
    have the population axis first (every result has it); a mesh that spreads users over devices then gets one kernel
    call a device. block_types: the NamedTuple of block sizes that each kernel takes as `blocks=`. untuned: what runs on
    a platform's devices for which no row is near, where that is not XLA's form.
    """
    if implementation is not None:
        return _call(implementations[implementation], None, operands, population, implementation)
    platform = target.platform()
    choice = tuning.choose(op, target.device_kind(), spec, dtype) if platform in BACKENDS else None
    if choice is None and platform in untuned:
        choice = tuning.Choice(untuned[platform], None)
    if choice is None or choice.implementation not in BACKENDS[platform]:
        return implementations[XLA](*operands)
    if choice.implementation not in implementations:
        return implementations[XLA](*operands)
    blocks = None if choice.blocks is None else block_types[choice.implementation](**choice.blocks)
    try:
        return _bound(implementations, choice.implementation, blocks, operands, population, platform)
    except NotImplementedError:
        return implementations[XLA](*operands)


def _bound(implementations, name, blocks, operands, population, platform):
    def on_device(*arrays):
        return _call(implementations[name], blocks, arrays, population, name)

    branches = {platform: on_device, "default": implementations[XLA]}
    return jax.lax.platform_dependent(*operands, **branches)


def _call(kernel, blocks, operands, population, name):
    options = {} if blocks is None else {"blocks": blocks}
    if name == XLA:
        return kernel(*operands, **options)
    return over_population(lambda *arrays: kernel(*arrays, **options), operands, population)


def replicas() -> int:
    """Into how many parts the ambient mesh spreads the population; 1 without one, and where it is cut already."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return 1 if kinds.get(POPULATION) in (None, jax.sharding.AxisType.Manual) else mesh.shape[POPULATION]


def over_population(kernel: Implementation, operands: Sequence[Any], population: tuple[bool, ...] | None) -> Any:
    """kernel(*operands), once for each shard of the population where the ambient mesh spreads it over devices.

    A kernel is opaque to the compiler's partitioner, so its shards are cut here: users are independent, and no value
    crosses. Raises NotImplementedError on a mesh whose other axes are larger than one (XLA then partitions its own
    form), and where the users do not divide.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or all(kind == jax.sharding.AxisType.Manual for kind in mesh.axis_types):
        return kernel(*operands)
    wide = {axis: size for axis, size in mesh.shape.items() if size > 1}
    if set(wide) != {POPULATION}:
        raise NotImplementedError(f"mesh {dict(mesh.shape)}: kernels are cut over the axis {POPULATION!r} only")
    if population is None:
        raise NotImplementedError(f"mesh {dict(mesh.shape)}: this op has no population axis to cut")
    users = {
        jax.tree.leaves(operand)[0].shape[0]
        for operand, has in zip(operands, population)
        if has and operand is not None
    }
    if any(count % wide[POPULATION] for count in users):
        raise NotImplementedError(f"{sorted(users)} users do not divide over {wide[POPULATION]} devices")
    specs = tuple(PartitionSpec(POPULATION) if has else PartitionSpec() for has in population)
    return jax.shard_map(kernel, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(POPULATION), check_vma=False)(
        *operands
    )
