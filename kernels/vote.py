"""The folded voting net on the chip (paper section 3.2, supplement section 6): candidates in, one value out.

    a_h    = softmax2(q_h k_h^T, nobody listening to himself),  q_h = x Q_h^T + b_h,  k_h = x K_h^T
    y      = sum_h (a_h x) U_h^T + x S^T + m                          ("mix": U_1 .. U_H, S)
    out[v] = max over candidates of (y / sqrt(mean(y^2) + eps)) O^T + o

A program takes several whole locations side by side; in its products they are kept apart by a mask. What was
multiplied into these matrices: ``dmv_fast.runtime.fold.VoteWeights``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import padded

if TYPE_CHECKING:
    from dmv_fast.runtime.fold import VoteWeights


@triton.jit
def vote_kernel(
    rows_ptr,  # (locations, K, C)
    to_q_ptr,  # (H, HEAD, C)
    q_bias_ptr,  # (H, HEAD) float32
    to_k_ptr,  # (H, HEAD, C)
    mix_ptr,  # (C, H * C + C)
    mix_bias_ptr,  # (C,) float32
    out_ptr,  # (V, C)
    out_bias_ptr,  # (V,) float32
    retrieved_ptr,  # (locations, V), rows of any stride
    retrieved_stride,
    locations,
    epsilon,
    K: tl.constexpr,
    SLOTS: tl.constexpr,  # K, padded to a power of two
    GROUP: tl.constexpr,  # locations of a program; GROUP * SLOTS >= 16, the least that tl.dot takes
    H: tl.constexpr,
    HEAD: tl.constexpr,
    C: tl.constexpr,
    V: tl.constexpr,
    COLUMNS: tl.constexpr,  # of V at a time
    PRECISION: tl.constexpr,  # of float32 products: "ieee", not TF32
):
    """GROUP locations, all their candidates."""
    place = tl.arange(0, GROUP * SLOTS)
    slot = place % SLOTS
    location = tl.program_id(0).to(tl.int64) * GROUP + place // SLOTS
    present = (slot < K) & (location < locations)
    channel = tl.arange(0, C)
    x_ptrs = rows_ptr + (location * K + slot)[:, None] * C + channel[None, :]
    x = tl.load(x_ptrs, mask=present[:, None], other=0.0)

    mix_ptrs = mix_ptr + channel[None, :] * (H * C + C) + channel[:, None]  # one block of it, transposed
    y = tl.dot(x, tl.load(mix_ptrs + H * C), input_precision=PRECISION)
    if K > 1:
        together = (place // SLOTS)[:, None] == (place // SLOTS)[None, :]
        heard = together & (place[:, None] != place[None, :]) & (slot < K)[None, :]
        head = tl.arange(0, HEAD)
        head_ptrs = head[None, :] * C + channel[:, None]
        for h in range(H):
            q = tl.dot(x, tl.load(to_q_ptr + h * HEAD * C + head_ptrs), input_precision=PRECISION)
            q += tl.load(q_bias_ptr + h * HEAD + head)[None, :]
            k = tl.dot(x, tl.load(to_k_ptr + h * HEAD * C + head_ptrs), input_precision=PRECISION)
            logits = tl.dot(q.to(x.dtype), tl.trans(k.to(x.dtype)), input_precision=PRECISION)
            logits = tl.where(heard, logits, -1e30)
            weights = tl.exp2(logits - tl.max(logits, 1)[:, None])
            message = tl.dot(weights.to(x.dtype), x, input_precision=PRECISION)
            message = message / tl.sum(weights, 1)[:, None]
            y += tl.dot(message.to(x.dtype), tl.load(mix_ptrs + h * C), input_precision=PRECISION)
    y += tl.load(mix_bias_ptr + channel)[None, :]
    y = y * tl.rsqrt(tl.sum(y * y, 1) / C + epsilon)[:, None]

    column = tl.arange(0, COLUMNS)
    member = tl.program_id(0).to(tl.int64) * GROUP + tl.arange(0, GROUP)
    for first in range(0, V, COLUMNS):
        weight = tl.load(out_ptr + (first + column)[None, :] * C + channel[:, None])
        voted = tl.dot(y.to(x.dtype), weight, input_precision=PRECISION)
        voted = tl.where((slot < K)[:, None], voted, -float("inf"))
        best = tl.max(tl.reshape(voted, (GROUP, SLOTS, COLUMNS)), 1)
        best += tl.load(out_bias_ptr + first + column)[None, :]
        to_ptrs = retrieved_ptr + member[:, None] * retrieved_stride + (first + column)[None, :]
        tl.store(to_ptrs, best.to(retrieved_ptr.dtype.element_ty), mask=(member < locations)[:, None])


def vote_constants(k: int, heads: int, width: int, value_width: int, locations: int) -> dict[str, int | str]:
    """What ``vote_kernel`` is compiled for.

    A program is one long chain of products, so small calls are cut small, 16 candidates a program, the least
    that a product takes; 64 where that still leaves 128 programs, about one a multiprocessor.
    """
    slots = padded(k)
    wide = 64 if locations * slots >= 64 * 128 else 16
    return {
        "K": k,
        "SLOTS": slots,
        "GROUP": max(1, wide // slots),
        "H": heads,
        "HEAD": width // 4,
        "C": width,
        "V": value_width,
        "COLUMNS": min(64, value_width & -value_width),
        "PRECISION": "ieee",
    }


def vote_warps(constants: dict) -> int:
    """A warp a 16 candidates."""
    return max(1, constants["GROUP"] * constants["SLOTS"] // 16)


def make_vote(
    weights: VoteWeights, dtype: torch.dtype, device: torch.device
) -> Callable[[Tensor, Tensor], None]:
    """rows (B, M, K, C) contiguous -> retrieved values into (B, M, V); V a multiple of 16."""

    def bring(tensor: Tensor, to: torch.dtype) -> Tensor:
        return tensor.to(device, to).contiguous()

    arguments = (
        bring(weights.to_q, dtype), bring(weights.q_bias, torch.float32), bring(weights.to_k, dtype),
        bring(weights.mix, dtype), bring(weights.mix_bias, torch.float32),
        bring(weights.out, dtype), bring(weights.out_bias, torch.float32),
    )  # fmt: skip
    width, value_width = weights.mix.shape[0], weights.out.shape[0]

    def vote(rows: Tensor, retrieved: Tensor) -> None:
        batch, m, k, _ = rows.shape
        if retrieved.stride(2) != 1 or batch > 1 and retrieved.stride(0) != m * retrieved.stride(1):
            raise ValueError(f"retrieved: has strides {retrieved.stride()}, its rows must be evenly spaced")
        locations = batch * m
        constants = vote_constants(k, weights.heads, width, value_width, locations)
        with torch.cuda.device(rows.device) if rows.is_cuda else contextlib.nullcontext():
            vote_kernel[(triton.cdiv(locations, constants["GROUP"]),)](
                rows, *arguments, retrieved, retrieved.stride(1), locations, weights.epsilon,
                **constants, num_warps=vote_warps(constants), enable_fp_fusion=True,
            )  # fmt: skip

    return vote
