"""Candidate rows for the voting net, straight from the retrieved indices (paper section 3.2).

    rows[b, m, c] = K s[b, m, c] / sum(s[b, m]) * v + query_part[b, m],
    v = values[b, i[b, m, c]], or null_value where i[b, m, c] = -1.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import padded


@triton.jit
def gather_kernel(
    values_ptr,
    null_ptr,
    query_ptr,
    indices_ptr,
    scores_ptr,
    rows_ptr,
    M,
    values_batch_stride,
    values_row_stride,
    query_batch_stride,
    query_row_stride,
    K: tl.constexpr,
    SLOTS: tl.constexpr,  # K, padded to a power of two
    C: tl.constexpr,
    WIDTH: tl.constexpr,  # C, likewise
):
    """The K candidates of one query a program."""
    row = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    slot = tl.arange(0, SLOTS)
    channel = tl.arange(0, WIDTH)
    out = (batch * M + row) * K + slot
    score = tl.load(scores_ptr + out, mask=slot < K, other=0.0)
    index = tl.load(indices_ptr + out, mask=slot < K, other=-1)
    weight = score * (K / tl.sum(score, 0))

    in_width = channel < C
    mask = (slot < K)[:, None] & in_width[None, :]
    null = tl.load(null_ptr + channel, mask=in_width, other=0.0).to(tl.float32)
    query_ptr += batch * query_batch_stride + row.to(tl.int64) * query_row_stride
    query = tl.load(query_ptr + channel, mask=in_width, other=0.0).to(tl.float32)
    value_ptrs = values_ptr + batch * values_batch_stride + index[:, None].to(tl.int64) * values_row_stride
    stored = (index >= 0)[:, None]
    value = tl.load(value_ptrs + channel[None, :], mask=mask & stored, other=0.0).to(tl.float32)
    value = tl.where(stored, value, null[None, :])
    rows = weight[:, None] * value + query[None, :]
    tl.store(rows_ptr + out[:, None] * C + channel[None, :], rows.to(rows_ptr.dtype.element_ty), mask=mask)


def gather_constants(k: int, width: int) -> dict[str, int]:
    """What ``gather_kernel`` is compiled for."""
    return {"K": k, "SLOTS": padded(k), "C": width, "WIDTH": padded(width)}


def gather_warps(k: int, width: int) -> int:
    """32 values a lane, up to 8 warps."""
    return max(1, min(8, padded(k) * padded(width) // 1024))


def gather_candidates(
    values: Tensor,  # (B, N, C)
    null_value: Tensor,  # (C,)
    query_part: Tensor,  # (B, M, C)
    indices: Tensor,  # (B, M, K) int32
    scores: Tensor,  # (B, M, K) float32
) -> Tensor:
    """rows (B, M, K, C) in values' dtype, float32 inside; contract: ``dmv_fast.ops.gather_candidates``."""
    batch, m, k = indices.shape
    width = values.shape[2]
    rows = torch.empty(batch, m, k, width, dtype=values.dtype, device=values.device)
    if rows.numel() == 0:
        return rows
    if values.stride(2) != 1:
        raise ValueError(f"values: has strides {values.stride()}, its rows must be contiguous")
    if query_part.stride(2) != 1:
        query_part = query_part.contiguous()
    strides = (values.stride(0), values.stride(1), query_part.stride(0), query_part.stride(1))
    with torch.cuda.device(values.device) if values.is_cuda else contextlib.nullcontext():
        gather_kernel[(m, batch)](
            values,
            null_value.contiguous(),
            query_part,
            indices.contiguous(),
            scores.contiguous(),
            rows,
            m,
            *strides,
            **gather_constants(k, width),
            num_warps=gather_warps(k, width),
            enable_fp_fusion=True,
        )
    return rows
