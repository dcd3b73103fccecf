"""What differs between the versions of jax that popax runs on: the code elsewhere is the same for all of them."""

import jax
from jax.sharding import AxisType, PartitionSpec


def look_up(table_VxD: jax.Array, ids: jax.Array, column_axes: tuple[str, ...]) -> jax.Array:
    """table[ids], [..., D]; column_axes: those mesh axes along which the partitioner has the table's columns.

    From jaxlib 0.11.1 on XLA ends the process over a lookup in a table that is cut along rows and along columns, where
    a caller's shard_map has left it just these axes. There the columns are cut by hand, for every jaxlib: the program
    is the one that XLA would make.
    """
    if not column_axes or AxisType.Manual not in jax.sharding.get_abstract_mesh().axis_types:
        return table_VxD[ids]
    return jax.shard_map(
        lambda table, ids: table[ids],
        in_specs=(PartitionSpec(None, column_axes), PartitionSpec()),
        out_specs=PartitionSpec(*(None,) * ids.ndim, column_axes),
        axis_names=set(column_axes),
        check_vma=False,
    )(table_VxD, ids)
