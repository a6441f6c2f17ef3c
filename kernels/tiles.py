"""Tile sizes and splits of the retrieval kernels, for every chip in one place."""

from __future__ import annotations

import functools
from typing import NamedTuple


class Tiles(NamedTuple):
    """How one call is cut up; N, the memory's capacity, decides, never how much of it is filled."""

    rows: int  # queries of a program
    columns: int  # keys of a tile
    depth: int  # slice of D in one pipeline step
    group: int  # keys that share one stored maximum
    warps: int
    stages: int  # pipeline depth as Triton counts it
    splits: int  # programs that share the keys of one block of queries
    select_rows: int = 1  # queries of a program of the select kernel; one, so that few queries fill the chip


def padded(size: int) -> int:
    """The next power of two."""
    return 1 << (size - 1).bit_length()


@functools.lru_cache(maxsize=256)
def choose_tiles(
    capability: int,  # 80, 86, 89, 90, 100, 120
    element_size: int,  # bytes
    batch: int,
    m: int,
    n: int,
    d: int,
    k: int,
    processors: int,  # multiprocessors of the chip
) -> Tiles:
    """Tiles for a call; the figures behind them are in benchmarks/results (triton_static.csv, notes.md).

    wgmma and tcgen05 (9.x, 10.x): 128 x 256 tiles, query and keys both streamed in slices of 64. At D = 256
    such a tile reads 192 KB for 4096 clocks of matrix work. With the query resident in shared memory only
    128 x 64 leaves room for the third stage, and with two a load is waited for as soon as it is issued.
    128 x 128 where 256 would leave multiprocessors idle.
    mma.sync (8.x, 12.x): the query stays resident, 4 warps side by side along the rows so that no reduction
    crosses warps: 14 instructions a score at D = 256, where streaming both took 20. Above 256 it does not fit
    and both come in slices of 128 (of 256: as many instructions, and spills). 64 columns at D = 128 spill.
    float32 has no tensor cores here (TF32 would not be exact): small tiles, right but slow.
    group: the maxima cost 4 N / group bytes a query to write, rescoring reads 2 K group D bytes; the best
    is near sqrt(2 N / (K D)), 8 for K = 4 and 3 for K = 32 at N = 32768, D = 256.
    """
    group = 8 if k <= 8 else 4
    if element_size == 4:
        rows, columns, depth, warps, stages, resident = 64, 64, 32, 4, 2, 2
    elif capability // 10 in (9, 10, 11):
        rows, depth, warps, stages, resident = 128, 64, 8, 4, 1
        wide = batch * -(-m // rows) * -(-n // 256)
        columns = 256 if wide >= 2 * processors else 128
    else:
        depth, warps, stages = min(max(padded(d), 16), 256) if d <= 256 else 128, 4, 2
        rows, columns = (128, 64 if d <= 64 else 32) if d <= 256 else (64, 64)
        group = min(group, columns // 8)  # its keys share a thread while they are 8 columns apart or more
        shared = (rows + columns) * depth * element_size
        resident = min(2, (160 if capability == 80 else 98) * 1024 // shared)
    blocks = batch * -(-m // rows)
    splits = _splits(blocks, -(-n // columns), resident * processors)
    return Tiles(rows, columns, depth, group, warps, stages, splits)


def _splits(blocks: int, tiles: int, room: int) -> int:
    """Fewest rounds of tiles where ``room`` programs run at once; a program's start counts as half a tile.

    1024 queries x 32768 keys, room for 132: 8 blocks of 128 queries, 128 tiles of 256 keys: 16 splits make
    128 programs of 8 tiles. 256 x 8192: 2 blocks, 64 tiles of 128 keys: 64 splits, 128 programs of one
    tile.
    """

    def rounds(splits: int) -> float:
        return -(-blocks * splits // room) * (-(-tiles // splits) + 0.5)

    return min(range(1, max(1, min(tiles, room)) + 1), key=rounds)
