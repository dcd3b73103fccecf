"""Block sizes of the TPU kernel: what a choice moves through HBM, what it holds in VMEM, and the least of the first."""

import functools
import itertools
from typing import NamedTuple

from popax.kernels import target
from popax.kernels.tpu import LANES, cdiv, divisor_block, vmem_budget

# Device kinds of which one device is two cores that divide the grid's parallel axis.
TWO_CORES = ("TPU v4", "TPU v5", "TPU v5p")
MOST_ROWS = 2048
COLUMNS = 512  # output columns whose float32 sums are alive at once
REDUCED = 1024  # rows of W that are converted at once


class Blocks(NamedTuple):
    """users x tile: rows a step (more than one user only with all their tokens). d_in: columns that a step sums over;
    d_out: columns that it makes. group: row tiles that share a pass over W's columns."""

    users: int
    tile: int
    d_in: int
    d_out: int
    group: int


class Shape(NamedTuple):
    """One product: rows of [D] to rows of [F]; item sizes of x (and the factors and the result) and of W."""

    population: int
    tokens: int
    d_in: int
    d_out: int
    rank: int
    x_bytes: int
    w_bytes: int
    converted: bool  # W or x passes through a copy of another dtype or scale


def row_tiles(shape: Shape, blocks: Blocks) -> int:
    return shape.population // blocks.users * cdiv(shape.tokens, blocks.tile)


def w_stays(shape: Shape, blocks: Blocks) -> bool:
    """Whether a block of W is all rows of its columns and serves a whole group.

    It then has one buffer and not two: a wait at each of a few passes, for twice the columns in a pass.
    """
    return blocks.d_in == shape.d_in and (blocks.group > 1 or blocks.d_out == shape.d_out)


def moved_bytes(shape: Shape, blocks: Blocks) -> int:
    """HBM traffic of the blocks, repeated fetches included: a block is fetched when its index changes."""
    tiles, passes = row_tiles(shape, blocks), cdiv(shape.d_out, blocks.d_out)
    whole_rows, user_tiles = blocks.d_in == shape.d_in, cdiv(shape.tokens, blocks.tile)
    rows = shape.population * shape.tokens
    x_times = 1 if passes == 1 or (whole_rows and blocks.group == 1) else passes
    sharing = tiles if passes == 1 else blocks.group
    w_times = tiles // sharing if w_stays(shape, blocks) else tiles
    a_times = 1 if whole_rows else user_tiles
    b_times = user_tiles if blocks.group == 1 and passes > 1 else 1
    factors = shape.population * shape.rank * (shape.d_in * a_times + shape.d_out * b_times)
    activations = rows * (shape.d_in * x_times + shape.d_out + shape.rank)
    return (activations + factors) * shape.x_bytes + w_times * shape.d_in * shape.d_out * shape.w_bytes


def held_bytes(shape: Shape, blocks: Blocks) -> int:
    """VMEM of the blocks, their second buffers, the sums between steps and the values of one step."""
    rows, rank = blocks.users * blocks.tile, cdiv(shape.rank, 16) * 16
    columns, reduced = column_chunk(blocks.d_out), reduced_chunk(shape, blocks.d_in)
    sums = rows * blocks.d_out * 4 if blocks.d_in < shape.d_in else 0
    buffered = rows * (blocks.d_in + blocks.d_out) + blocks.users * rank * (blocks.d_in + blocks.d_out + blocks.tile)
    hidden = (blocks.group * rank + cdiv(shape.rank, LANES) * LANES) * rows * 4
    step = 3 * rows * columns * 4 + (reduced * (columns * 8 + rows * 6) if shape.converted else 0)
    w_buffers = 1 if w_stays(shape, blocks) else 2
    w = w_buffers * blocks.d_in * blocks.d_out * shape.w_bytes
    return 2 * buffered * shape.x_bytes + w + sums + hidden + step


def column_chunk(d_out: int) -> int:
    return divisor_block(d_out, COLUMNS)


def reduced_chunk(shape: Shape, d_in: int) -> int:
    """Rows of W that one product takes: all, or a bounded number where they are converted first."""
    return divisor_block(d_in, REDUCED) if shape.converted else d_in


def candidates(shape: Shape) -> tuple[Blocks, ...]:
    """What fits VMEM: blocks that keep the matrix units busy before others, then least traffic, then fewest steps."""
    found = {blocks for blocks in _all_blocks(shape) if held_bytes(shape, blocks) <= vmem_budget()}
    return tuple(sorted(found, key=functools.partial(_order, shape)))


def _order(shape: Shape, blocks: Blocks) -> tuple:
    # A load of weights into a matrix unit must serve enough rows, and a sum enough products for a trip through VMEM.
    extents = ((blocks.users * blocks.tile, 256), (blocks.d_out, 256), (blocks.d_in, 512))
    largest = (shape.population * shape.tokens, shape.d_out, shape.d_in)
    idle = sum(have < min(least, most) for (have, least), most in zip(extents, largest, strict=True))
    steps = row_tiles(shape, blocks) * cdiv(shape.d_out, blocks.d_out) * cdiv(shape.d_in, blocks.d_in)
    return idle, moved_bytes(shape, blocks), steps, blocks


def default_blocks(shape: Shape) -> Blocks:
    """The first of `candidates`. Raises NotImplementedError where there is none."""
    fitting = candidates(shape)
    if not fitting:
        raise NotImplementedError(f"no blocks of {shape} fit {vmem_budget()} bytes of VMEM")
    return fitting[0]


def _all_blocks(shape: Shape):
    widths = (4096, 2048, 1024, 512, 256, 128)
    d_ins = {shape.d_in, *(divisor_block(shape.d_in, most) for most in widths[:4])}
    d_outs = {shape.d_out, *(divisor_block(shape.d_out, most) for most in widths)}
    cores = 2 if target.device_kind() in TWO_CORES else 1
    for (users, tile), d_in, d_out in itertools.product(_rows(shape), d_ins, d_outs):
        tiles = row_tiles(shape, Blocks(users, tile, d_in, d_out, 1))
        for group in {1, tiles // cores if tiles % cores == 0 else tiles}:
            yield Blocks(users, tile, d_in, d_out, group)


def _rows(shape: Shape) -> list[tuple[int, int]]:
    """(users, tile): h leaves as [R, tile] blocks, so a tile is all tokens or a multiple of the lanes."""
    if shape.tokens > 512:
        return [(1, tile) for tile in (1024, 512, 256, 128) if tile <= shape.tokens]
    found = [(1, shape.tokens)] + [(1, tile) for tile in (256, 128) if tile < shape.tokens]
    if shape.tokens % 16 == 0:
        # Whole packed rows: several users' blocks are one matrix without a copy.
        most = MOST_ROWS // shape.tokens
        found += [(users, shape.tokens) for users in range(2, most + 1) if shape.population % users == 0]
    return found
