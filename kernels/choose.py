"""Which box is the target (``dmv_fast.model.pick``), from the head's answer, in one kernel.

    s      = sigmoid(logit),    box = anchor moved and scaled by its deltas
    change = max(r, 1 / r) of the scale r to the last, times the same of the ratio
    rank   = s * exp(-(change - 1) p) (1 - w) + window * w,    p, w: PickConfig.size_penalty, .window

The highest rank is chosen; its size moves from the last one by ``smoothing`` * s * penalty.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import padded

if TYPE_CHECKING:
    from dmv_fast.model.pick import PickConfig


@triton.jit
def _scale(w, h):
    p = (w + h) * 0.5
    return tl.sqrt((w + p) * (h + p))


@triton.jit
def _larger(ratio):
    return tl.maximum(ratio, 1.0 / ratio)


@triton.jit
def _at(values, here):
    return tl.sum(tl.where(here, values, 0.0), 0)


@triton.jit
def choose_kernel(
    logits_ptr,  # (n, A, M)
    deltas_ptr,  # (n, A, 4, M)
    anchors_ptr,  # (A, M, 4)
    window_ptr,  # (M,): the cosine window, the same for all anchors
    sizes_ptr,  # (n, 2): the last width and height
    answer_ptr,  # (n, 5)
    scores_ptr,  # (n, A, M)
    deltas_out_ptr,  # (n, A, 4, M)
    logit_batch_stride,
    logit_anchor_stride,
    logit_stride,
    delta_batch_stride,
    delta_anchor_stride,
    delta_kind_stride,
    delta_stride,
    size_stride,
    size_penalty,
    window_share,
    smoothing,
    A: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,  # A * M, padded to a power of two
):
    """All boxes of one target."""
    place = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    exists = i < A * M
    anchor, m = i // M, i % M
    logit_ptrs = logits_ptr + place * logit_batch_stride + anchor * logit_anchor_stride + m * logit_stride
    score = 1.0 / (1.0 + tl.exp(-tl.load(logit_ptrs, mask=exists, other=0.0).to(tl.float32)))
    tl.store(scores_ptr + place * A * M + i, score, mask=exists)

    delta_ptrs = deltas_ptr + place * delta_batch_stride + anchor * delta_anchor_stride + m * delta_stride
    dx = tl.load(delta_ptrs, mask=exists, other=0.0).to(tl.float32)
    dy = tl.load(delta_ptrs + delta_kind_stride, mask=exists, other=0.0).to(tl.float32)
    dw = tl.load(delta_ptrs + 2 * delta_kind_stride, mask=exists, other=0.0).to(tl.float32)
    dh = tl.load(delta_ptrs + 3 * delta_kind_stride, mask=exists, other=0.0).to(tl.float32)
    out_ptrs = deltas_out_ptr + (place * A + anchor) * 4 * M + m
    tl.store(out_ptrs, dx, mask=exists)
    tl.store(out_ptrs + M, dy, mask=exists)
    tl.store(out_ptrs + 2 * M, dw, mask=exists)
    tl.store(out_ptrs + 3 * M, dh, mask=exists)

    anchor_ptrs = anchors_ptr + i * 4
    anchor_w = tl.load(anchor_ptrs + 2, mask=exists, other=1.0)
    anchor_h = tl.load(anchor_ptrs + 3, mask=exists, other=1.0)
    cx = tl.load(anchor_ptrs, mask=exists, other=0.0) + anchor_w / 2 + dx * anchor_w
    cy = tl.load(anchor_ptrs + 1, mask=exists, other=0.0) + anchor_h / 2 + dy * anchor_h
    w = anchor_w * tl.exp(tl.minimum(tl.maximum(dw, -4.0), 4.0))
    h = anchor_h * tl.exp(tl.minimum(tl.maximum(dh, -4.0), 4.0))

    last_w = tl.load(sizes_ptr + place * size_stride)
    last_h = tl.load(sizes_ptr + place * size_stride + 1)
    change = _larger(_scale(w, h) / _scale(last_w, last_h)) * _larger((w / h) / (last_w / last_h))
    penalty = tl.exp(-(change - 1.0) * size_penalty)
    window = tl.load(window_ptr + m, mask=exists, other=0.0)
    rank = score * penalty * (1.0 - window_share) + window * window_share
    rank = tl.where(rank >= 0, rank, -1.0)  # a NaN, too: some box that exists is chosen, whatever comes
    here = i == tl.argmax(tl.where(exists, rank, -2.0), 0)

    best = _at(score, here)
    rate = _at(penalty, here) * best * smoothing
    w, h = _at(w, here), _at(h, here)
    new_w, new_h = w, h
    if smoothing < 1:
        new_w, new_h = last_w + (w - last_w) * rate, last_h + (h - last_h) * rate
    answer_ptr += place * 5
    tl.store(answer_ptr, _at(cx, here) - new_w / 2)
    tl.store(answer_ptr + 1, _at(cy, here) - new_h / 2)
    tl.store(answer_ptr + 2, new_w)
    tl.store(answer_ptr + 3, new_h)
    tl.store(answer_ptr + 4, best)


def choose_constants(anchors: int, locations: int) -> dict[str, int]:
    """What ``choose_kernel`` is compiled for."""
    return {"A": anchors, "M": locations, "BLOCK": padded(anchors * locations)}


def choose_warps(constants: dict) -> int:
    """8 boxes a thread, up to 16 warps."""
    return max(1, min(16, constants["BLOCK"] // 256))


def choose(
    logits: Tensor, deltas: Tensor, anchors: Tensor, window: Tensor, sizes: Tensor, config: PickConfig,
    answer: Tensor, scores: Tensor, deltas_out: Tensor,
) -> None:  # fmt: skip
    """The head's answer to each target's box.

    Args:
        logits: (n, A, H, W) and deltas: (n, A, 4, H, W), of any floating dtype, NCHW or NHWC.
        anchors: (A, H, W, 4) xywh float32; window: (A, H, W) float32, the same for all anchors.
        sizes: (n, 2) float32, the last width and height in crop pixels.
        answer: (n, 5) float32: box xywh in crop pixels and score. scores: (n, A, H, W) and deltas_out:
            (n, A, 4, H, W) float32: what a write to the memory needs. All contiguous, written.
    """
    n, a, height, width = logits.shape
    assert logits.stride(2) == width * logits.stride(3) and deltas.stride(3) == width * deltas.stride(4)
    strides = (*logits.stride()[:2], logits.stride(3), *deltas.stride()[:3], deltas.stride(4))
    constants = choose_constants(a, height * width)
    with torch.cuda.device(logits.device) if logits.is_cuda else contextlib.nullcontext():
        choose_kernel[(n,)](
            logits, deltas, anchors, window[0].contiguous(), sizes, answer, scores, deltas_out, *strides,
            sizes.stride(0), float(config.size_penalty), float(config.window), float(config.smoothing),
            **constants, num_warps=choose_warps(constants),
        )  # fmt: skip
