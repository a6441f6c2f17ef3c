"""The choice of the k best columns from what ``scan.py`` kept (paper section 3.2).

The k best keys lie in the k tiles, and there in the k groups, with the highest maxima: a key anywhere else
has at least k keys no lower than itself. So: k tiles by t, k groups of these by g, the k * group logits of
those once more, k of them. Logits within rounding of each other count as tied (the two kernels sum in
different orders).

    score = e^x / (1 + sum over tiles of s 2^h);   the null column takes part with logit 0 and index -1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .scan import LOG2E
from .tiles import Tiles, padded

NOTHING = tl.constexpr(-2139095041)  # what _ordered makes of -inf
LAST = tl.constexpr(2147483647)


@triton.jit
def _ordered(x):
    """float32 -> int32 in the same order, and back: integers reduce over a warp in one instruction."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _highest(order, ids, K: tl.constexpr, SLOTS: tl.constexpr):
    """Each row's K highest of order (rows, X), with their ids (distinct, >= 0).

    NOTHING and -1 where there are fewer.
    """
    slot = tl.arange(0, SLOTS)[None, :]
    best = tl.full([order.shape[0], SLOTS], NOTHING, tl.int32)
    best_id = tl.full([order.shape[0], SLOTS], -1, tl.int32)
    for i in range(K):
        top = tl.max(order, 1)[:, None]
        hit = tl.min(tl.where(order == top, ids, LAST), 1)[:, None]
        take = (slot == i) & (top > NOTHING)
        best = tl.where(take, top, best)
        best_id = tl.where(take, hit, best_id)
        order = tl.where(ids == hit, NOTHING, order)
    return best, best_id


@triton.jit(do_not_specialize=["M", "N", "tiles"])
def select_kernel(
    query_ptr,
    keys_ptr,
    valid_ptr,
    group_max_ptr,
    tile_max_ptr,
    tile_sum_ptr,
    scores_ptr,  # (B, M, K)
    indices_ptr,  # (B, M, K)
    M,
    N,
    tiles,
    query_batch_stride,
    query_row_stride,
    keys_batch_stride,
    keys_row_stride,
    D: tl.constexpr,
    K: tl.constexpr,
    SLOTS: tl.constexpr,  # K, padded to a power of two
    TILES: tl.constexpr,  # tiles, padded likewise
    ROWS: tl.constexpr,  # queries a program
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    FOLD: tl.constexpr,
    DEPTH: tl.constexpr,  # slice of D in one step
    SLAB: tl.constexpr,
    HAS_VALID: tl.constexpr,
):
    batch = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_ok = (row < M)[:, None]
    row = tl.minimum(row, M - 1).to(tl.int64)
    n = N
    if HAS_VALID:
        n = tl.minimum(tl.load(valid_ptr + batch), N)
    GROUPS: tl.constexpr = COLUMNS // GROUP
    CANDIDATES: tl.constexpr = SLOTS * GROUP
    row_tiles = ((batch * M + row) * tiles)[:, None]

    tile_ids = tl.arange(0, TILES)[None, :]
    filled = tile_ids * COLUMNS < n
    tile_max = tl.load(tile_max_ptr + row_tiles + tile_ids, mask=filled, other=float("-inf"))
    tile_sum = tl.load(tile_sum_ptr + row_tiles + tile_ids, mask=filled, other=0.0)
    under = (tile_max - tl.max(tile_max, 1)[:, None]) * LOG2E
    under -= tl.fma(tile_max, LOG2E, -(tile_max * LOG2E))  # s is relative to 2^h, not to e^t
    keys_sum = tl.sum(tl.where(filled, tile_sum * tl.exp2(under), 0.0), 1)[:, None]
    _, tile = _highest(_ordered(tile_max), tile_ids, K, SLOTS)

    # Groups c + j WIDTH of a tile, j < FOLD: where there are many, c is chosen first, by the maximum over j.
    WIDTH: tl.constexpr = GROUPS // FOLD
    row_groups = group_max_ptr + row_tiles * GROUPS
    column = tile[:, :, None] * GROUPS + tl.arange(0, WIDTH)[None, None, :]
    if FOLD > 1:
        column = tl.reshape(column, [ROWS, SLOTS * WIDTH])
        column_max = tl.full([ROWS, SLOTS * WIDTH], float("-inf"), tl.float32)
        for fold in tl.static_range(0, GROUPS, WIDTH):
            group_max = tl.load(row_groups + (column + fold), mask=column >= 0, other=float("-inf"))
            column_max = tl.maximum(column_max, group_max)
        _, column = _highest(_ordered(column_max), column, K, SLOTS)
        folds = tl.arange(0, FOLD)[None, None, :] * WIDTH
        column = tl.where((column >= 0)[:, :, None], column[:, :, None] + folds, -1)
    group_ids = tl.reshape(column, [ROWS, SLOTS * (FOLD if FOLD > 1 else WIDTH)])
    group_max = tl.load(row_groups + group_ids, mask=group_ids >= 0, other=float("-inf"))
    _, group = _highest(_ordered(group_max), group_ids, K, SLOTS)

    first = (group // GROUPS) * COLUMNS + group % GROUPS
    first = tl.where(group >= 0, first, n)[:, :, None]
    key_ids = tl.reshape(first + tl.arange(0, GROUP)[None, None, :] * GROUPS, [ROWS, CANDIDATES])
    exists = key_ids < n
    query_ptrs = query_ptr + batch * query_batch_stride + row * query_row_stride
    key_ptrs = keys_ptr + batch * keys_batch_stride + key_ids.to(tl.int64) * keys_row_stride
    product = tl.zeros([ROWS, CANDIDATES, DEPTH], tl.float32)
    for slab in tl.range(0, D, SLAB):  # loads of a slab are in flight together
        for step in tl.static_range(0, SLAB, DEPTH):
            d = slab + step + tl.arange(0, DEPTH)
            q = tl.load(query_ptrs[:, None] + d[None, :], mask=(d < D)[None, :], other=0.0)
            mask = exists[:, :, None] & (d < D)[None, None, :]
            k = tl.load(key_ptrs[:, :, None] + d[None, None, :], mask=mask, other=0.0)
            product += q.to(tl.float32)[:, None, :] * k.to(tl.float32)
    logits = tl.where(exists, tl.sum(product, 2), float("-inf"))
    best, best_id = _highest(_ordered(logits), key_ids, K, SLOTS)

    # exp relative to the highest logit, as rescored; the keys' sum was relative to the highest of the scan:
    # the last-bit difference of the two cancels, also where logits are so large that it is not small.
    x = _ordered(best).to(tl.float32, bitcast=True)
    highest = tl.max(x, 1)[:, None]
    base = tl.maximum(highest, 0.0)
    null = tl.exp2(-base * LOG2E)
    denominator = null + keys_sum * tl.exp2((highest - base) * LOG2E)
    score = tl.exp2((x - base) * LOG2E)

    # The null column takes its place among the keys; those not above it move down by one.
    above = (best > 0).to(tl.int32)
    place = tl.arange(0, SLOTS)[None, :] + 1 - above
    null_place = tl.sum(above, 1)[:, None]
    selected = tl.sum(tl.where(place < K, score, 0.0), 1)[:, None] + tl.where(null_place < K, null, 0.0)
    # Only rounding can lift the selected scores' sum over 1; a NaN passes.
    denominator = tl.where(denominator < selected, selected, denominator)
    out = ((batch * M + row) * K)[:, None]
    tl.store(scores_ptr + out + place, score / denominator, mask=row_ok & (place < K))
    tl.store(indices_ptr + out + place, best_id, mask=row_ok & (place < K))
    tl.store(scores_ptr + out + null_place, null / denominator, mask=row_ok & (null_place < K))
    tl.store(indices_ptr + out + null_place, tl.full([ROWS, 1], -1, tl.int32), mask=row_ok & (null_place < K))


def select_constants(d: int, k: int, count: int, tiles: Tiles, has_valid: bool) -> dict[str, int | bool]:
    """What ``select_kernel`` is compiled for; count: tiles in the memory.

    One warp a query, since every reduction then is one instruction without a barrier: so at most 256 groups
    are compared at a time, 8 a lane, 1024 products held, 32 a lane, and 8192 numbers at most loaded ahead (64
    keys by 64 spill on 10.0 with Triton 3.6).
    """
    slots, groups = padded(k), tiles.columns // tiles.group
    candidates = slots * tiles.group
    depth = max(8, min(padded(d), 1024 // candidates))
    return {
        "D": d,
        "K": k,
        "SLOTS": slots,
        "TILES": padded(max(count, 1)),
        "ROWS": tiles.select_rows,
        "COLUMNS": tiles.columns,
        "GROUP": tiles.group,
        "FOLD": max(1, slots * groups // 256),
        "DEPTH": depth,
        "SLAB": max(depth, min(padded(d), 256 if candidates <= 32 else 32)),
        "HAS_VALID": has_valid,
    }


def select_warps(count: int) -> int:
    """One, until the maxima of a very large memory's tiles fill its registers (32 a lane)."""
    return min(8, max(1, padded(max(count, 1)) // 1024))
