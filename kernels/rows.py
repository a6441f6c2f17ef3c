"""Rows of features between the convolutions of a frame.

    join:         out = ([left, right] + bias) / sqrt(mean of its squares + eps)      (paper section 3.1)
    with_length:  out = x * length / |x|                                              (cosine similarity)
    project:      out = (x / sqrt(mean(x^2) + eps)) W^T + b                           (layer norm and map)
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import padded

_ROWS = 4  # of a program of join and with_length: 256 rows are 64 programs
_PROJECTED = 16  # of project: the least that tl.dot takes


@triton.jit
def join_kernel(
    left_ptr,  # (rows, HALF)
    right_ptr,  # (rows, HALF)
    bias_ptr,  # (2 * HALF,) float32
    out_ptr,
    rows,
    out_stride,
    epsilon,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,  # HALF, padded to a power of two
    ROWS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SCALE: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, WIDTH)
    mask = (row < rows)[:, None] & (channel < HALF)[None, :]
    place = row[:, None] * HALF + channel[None, :]
    left = tl.load(left_ptr + place, mask=mask, other=0.0).to(tl.float32)
    right = tl.load(right_ptr + place, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        left += tl.load(bias_ptr + channel, mask=channel < HALF, other=0.0)[None, :]
        right += tl.load(bias_ptr + HALF + channel, mask=channel < HALF, other=0.0)[None, :]
    if SCALE:
        mean_square = (tl.sum(left * left, 1) + tl.sum(right * right, 1)) / (2 * HALF)
        scale = tl.rsqrt(mean_square + epsilon)[:, None]
        left *= scale
        right *= scale
    out_ptrs = out_ptr + row[:, None].to(tl.int64) * out_stride + channel[None, :]
    tl.store(out_ptrs, left.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out_ptrs + HALF, right.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def with_length_kernel(
    rows_ptr,
    out_ptr,  # (rows, D)
    rows,
    row_stride,
    length,
    D: tl.constexpr,
    WIDTH: tl.constexpr,  # D, padded to a power of two
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, WIDTH)
    mask = (row < rows)[:, None] & (channel < D)[None, :]
    row_ptrs = rows_ptr + row[:, None].to(tl.int64) * row_stride + channel[None, :]
    x = tl.load(row_ptrs, mask=mask, other=0.0).to(tl.float32)
    x *= (length * tl.rsqrt(tl.sum(x * x, 1) + 1e-24))[:, None]
    tl.store(out_ptr + row[:, None] * D + channel[None, :], x.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def project_kernel(
    rows_ptr,
    weight_ptr,  # (C, D)
    bias_ptr,  # (C,) float32
    out_ptr,  # (rows, C)
    rows,
    row_stride,
    epsilon,
    D: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    SCALE: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    depth, channel = tl.arange(0, D), tl.arange(0, C)
    row_ptrs = rows_ptr + row[:, None].to(tl.int64) * row_stride + depth[None, :]
    x = tl.load(row_ptrs, mask=(row < rows)[:, None], other=0.0)
    if SCALE:
        wide = x.to(tl.float32)
        x = (wide * tl.rsqrt(tl.sum(wide * wide, 1) / D + epsilon)[:, None]).to(x.dtype)
    y = tl.dot(x, tl.load(weight_ptr + channel[None, :] * D + depth[:, None]))
    y += tl.load(bias_ptr + channel)[None, :]
    out_ptrs = out_ptr + row[:, None] * C + channel[None, :]
    tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=(row < rows)[:, None])


def join(left: Tensor, right: Tensor, bias: Tensor | None, out: Tensor, epsilon: float | None) -> None:
    """left, right (B, H, W, D / 2), bias (D,) or None, into out (B, H, W, D); epsilon None: not scaled."""
    half = left.shape[-1]
    rows = left.numel() // half
    with _on(out):
        join_kernel[(triton.cdiv(rows, _ROWS),)](
            left.contiguous(), right.contiguous(), bias, out, rows, _row_stride(out), epsilon or 0.0,
            HALF=half, WIDTH=padded(half), ROWS=_ROWS, HAS_BIAS=bias is not None, SCALE=epsilon is not None,
            num_warps=4,
        )  # fmt: skip


def with_length(rows: Tensor, length: float) -> Tensor:
    """rows (..., D) -> contiguous, of that length; zeros stay zeros."""
    out, d = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device), rows.shape[-1]
    count = rows.numel() // d
    with _on(rows):
        with_length_kernel[(triton.cdiv(count, _ROWS),)](
            rows, out, count, _row_stride(rows), length, D=d, WIDTH=padded(d), ROWS=_ROWS, num_warps=4
        )  # fmt: skip
    return out


def project(rows: Tensor, weight: Tensor, bias: Tensor, epsilon: float | None) -> Tensor:
    """rows (..., D) -> (..., C); weight (C, D) in their dtype, both powers of two from 16; bias float32."""
    c, d = weight.shape
    out = torch.empty(*rows.shape[:-1], c, dtype=rows.dtype, device=rows.device)
    count = rows.numel() // d
    with _on(rows):
        project_kernel[(triton.cdiv(count, _PROJECTED),)](
            rows, weight, bias, out, count, _row_stride(rows), epsilon or 0.0,
            D=d, C=c, ROWS=_PROJECTED, SCALE=epsilon is not None, num_warps=4,
        )  # fmt: skip
    return out


def _row_stride(rows: Tensor) -> int:
    """Of rows (..., D) that lie evenly spaced."""
    stride = rows.stride(-2)
    for axis in range(rows.dim() - 2):
        if rows.shape[axis] > 1 and rows.stride(axis) != rows.stride(axis + 1) * rows.shape[axis + 1]:
            raise ValueError(f"rows: have strides {rows.stride()}, they must be evenly spaced")
    if rows.stride(-1) != 1:
        raise ValueError(f"rows: have strides {rows.stride()}, the last must be 1")
    return stride


def _on(tensor: Tensor) -> contextlib.AbstractContextManager:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
