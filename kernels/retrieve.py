"""Retrieval on a GPU: the k highest columns of softmax([0, q.k1 .. q.kN]), exact, in two kernels.

``scan.py`` reads the memory once and keeps a few maxima and sums of every tile of it, ``select.py`` finds the
top k from them (paper section 3.2). No score matrix is stored; nothing of a tile depends on how tiles are
split over programs and no atomics are used: same inputs, same bits. ``tiles.py`` holds the sizes.
"""

from __future__ import annotations

import contextlib
import functools

import torch
from torch import Tensor

from .scan import scan_constants, scan_kernel
from .select import select_constants, select_kernel, select_warps
from .tiles import Tiles, choose_tiles


def retrieve(
    query: Tensor,  # (B, M, D)
    keys: Tensor,  # (B, N, D)
    k: int,
    valid: Tensor | None = None,  # (B,)
    *,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """The k highest columns of softmax([0, query . keys]); contract and checks: ``dmv_fast.ops.retrieve``.

    Args:
        query, keys: float16, bfloat16 or float32 on one CUDA device, rows contiguous, D at most 512.
        k: 1..32.
        valid: None, or int32 (B,), read on the device: nothing waits for it and a CUDA graph may hold it.
        tiles: overrides ``choose_tiles``; no result depends on it but for rounding.

    Returns:
        scores (B, M, k) float32, highest first; indices (B, M, k) int32, -1 for the null column or padding.
    """
    (batch, m, d), n = query.shape, keys.shape[1]
    if d > 1 and query.stride(2) != 1:
        query = query.contiguous()
    if d > 1 and keys.stride(2) != 1:
        raise ValueError(f"keys: has strides {keys.stride()}, its rows must be contiguous")
    if tiles is None:
        capability, processors = _chip(query.device)
        tiles = choose_tiles(capability, query.element_size(), batch, m, n, d, k, processors)
    count = -(-n // tiles.columns)
    scores = torch.empty(batch, m, k, dtype=torch.float32, device=query.device)
    indices = torch.empty(batch, m, k, dtype=torch.int32, device=query.device)
    if scores.numel() == 0:
        return scores, indices
    group_max = scores.new_empty(batch, m, count * tiles.columns // tiles.group)
    tile_max = scores.new_empty(batch, m, count)
    tile_sum = scores.new_empty(batch, m, count)

    inputs = (query, keys, valid, group_max, tile_max, tile_sum)
    strides = (query.stride(0), query.stride(1), keys.stride(0), keys.stride(1))
    scan = scan_constants(d, tiles, valid is not None)
    select = select_constants(d, k, count, tiles, valid is not None)
    with torch.cuda.device(query.device) if query.is_cuda else contextlib.nullcontext():
        if n:
            grid = (-(-m // tiles.rows), tiles.splits, batch)
            options = {"num_warps": tiles.warps, "enable_fp_fusion": True}
            scan_kernel[grid](*inputs, m, n, count, tiles.splits, *strides, **scan, **options)
        grid = (-(-m // tiles.select_rows), batch)
        options = {"num_warps": select_warps(count), "enable_fp_fusion": True}
        select_kernel[grid](*inputs, scores, indices, m, n, count, *strides, **select, **options)
    return scores, indices


@functools.cache
def _chip(device: torch.device) -> tuple[int, int]:
    """(compute capability as 80, 90 .., multiprocessors); the interpreter, on the CPU, is a small 8.0."""
    if device.type != "cuda":
        return 80, 4
    properties = torch.cuda.get_device_properties(device)
    return properties.major * 10 + properties.minor, properties.multi_processor_count
