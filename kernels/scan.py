"""The scan of the memory: x = q k^T on the tensor cores, a tile of keys at a time (paper section 3.2).

Of a tile only three things are kept for each query:
    g_c = max of x over group c of its keys,    t = max of x,    s = sum of 2^(x log2 e - h),
where h is t log2 e rounded to float32. ``select.py`` turns them into the top k and the softmax's denominator
1 + sum over tiles of s 2^h.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import Tiles

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _fold_tile(x, tile, row_ok, group_max_ptrs, tile_max_ptrs, tile_sum_ptrs, GROUP: tl.constexpr):
    """Store what select needs of one tile of logits x (rows, columns)."""
    GROUPS: tl.constexpr = x.shape[1] // GROUP
    # Group c holds columns c, c + GROUPS, c + 2 GROUPS ..: they share a thread in every matrix unit's layout.
    group_max = tl.max(tl.reshape(x, [x.shape[0], GROUP, GROUPS]), 1)
    top = tl.max(group_max, 1)
    # One multiply-add and one exp2 a score; what h's rounding took is put right in select, not in this loop.
    total = tl.sum(tl.exp2(tl.fma(x, LOG2E, -(top * LOG2E)[:, None])), 1)
    tl.store(group_max_ptrs + tile * GROUPS, group_max, mask=row_ok[:, None])
    tl.store(tile_max_ptrs + tile, top, mask=row_ok)
    tl.store(tile_sum_ptrs + tile, total, mask=row_ok)


@triton.jit(do_not_specialize=["M", "N", "tiles", "splits"])
def scan_kernel(
    query_ptr,
    keys_ptr,
    valid_ptr,
    group_max_ptr,  # (B, M, tiles * COLUMNS / GROUP)
    tile_max_ptr,  # (B, M, tiles)
    tile_sum_ptr,  # (B, M, tiles)
    M,
    N,
    tiles,
    splits,
    query_batch_stride,
    query_row_stride,
    keys_batch_stride,
    keys_row_stride,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_VALID: tl.constexpr,
):
    split = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    n = N
    if HAS_VALID:
        n = tl.minimum(tl.load(valid_ptr + batch), N)
    if split * COLUMNS >= n:
        return
    STEPS: tl.constexpr = (D + DEPTH - 1) // DEPTH
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_ok = rows < M
    columns = tl.arange(0, COLUMNS)
    d = tl.arange(0, DEPTH)
    query_ptrs = query_ptr + batch * query_batch_stride + d[None, :]
    query_ptrs += tl.minimum(rows, M - 1)[:, None].to(tl.int64) * query_row_stride
    keys_ptr += batch * keys_batch_stride
    key_offsets = columns[None, :] * keys_row_stride + d[:, None]
    tile_stride = tl.cast(COLUMNS, tl.int64) * keys_row_stride
    row_tiles = (batch * M + rows) * tiles
    GROUPS: tl.constexpr = COLUMNS // GROUP
    group_max_ptrs = group_max_ptr + row_tiles[:, None] * GROUPS + tl.arange(0, GROUPS)[None, :]
    tile_max_ptrs = tile_max_ptr + row_tiles
    tile_sum_ptrs = tile_sum_ptr + row_tiles

    # Full tiles need no mask on their columns; strided over the splits, they load them evenly at any fill.
    full = n // COLUMNS
    if STEPS == 1:
        q = tl.load(query_ptrs, mask=(d < D)[None, :], other=0.0)
        for tile in tl.range(split, full, splits, num_stages=STAGES):
            k = tl.load(keys_ptr + tile * tile_stride + key_offsets, mask=(d < D)[:, None], other=0.0)
            x = tl.dot(q, k, input_precision="ieee")
            _fold_tile(x, tile, row_ok, group_max_ptrs, tile_max_ptrs, tile_sum_ptrs, GROUP)
    else:
        # Tiles and slices in one loop: the pipeline runs on into the next tile while this one is folded.
        x = tl.zeros([ROWS, COLUMNS], tl.float32)
        for i in tl.range(0, tl.cdiv(full - split, splits) * STEPS, num_stages=STAGES):
            tile = split + i // STEPS * splits
            step = i % STEPS
            in_depth = step * DEPTH + d < D
            q = tl.load(query_ptrs + step * DEPTH, mask=in_depth[None, :], other=0.0)
            key_ptrs = keys_ptr + (tile * tile_stride + step * DEPTH) + key_offsets
            k = tl.load(key_ptrs, mask=in_depth[:, None], other=0.0)
            x = tl.dot(q, k, x, input_precision="ieee")
            if step == STEPS - 1:
                _fold_tile(x, tile, row_ok, group_max_ptrs, tile_max_ptrs, tile_sum_ptrs, GROUP)
                x = tl.zeros([ROWS, COLUMNS], tl.float32)

    if (full * COLUMNS < n) & (full % splits == split):
        live = full * COLUMNS + columns < n
        x = tl.zeros([ROWS, COLUMNS], tl.float32)
        for step in tl.range(0, STEPS, num_stages=1):
            in_depth = step * DEPTH + d < D
            q = tl.load(query_ptrs + step * DEPTH, mask=in_depth[None, :], other=0.0)
            key_ptrs = keys_ptr + (full * tile_stride + step * DEPTH) + key_offsets
            k = tl.load(key_ptrs, mask=in_depth[:, None] & live[None, :], other=0.0)
            x = tl.dot(q, k, x, input_precision="ieee")
        x = tl.where(live[None, :], x, float("-inf"))
        _fold_tile(x, full, row_ok, group_max_ptrs, tile_max_ptrs, tile_sum_ptrs, GROUP)


def scan_constants(d: int, tiles: Tiles, has_valid: bool) -> dict[str, int | bool]:
    """What ``scan_kernel`` is compiled for."""
    return {
        "D": d,
        "ROWS": tiles.rows,
        "COLUMNS": tiles.columns,
        "DEPTH": tiles.depth,
        "GROUP": tiles.group,
        "STAGES": tiles.stages,
        "HAS_VALID": has_valid,
    }
