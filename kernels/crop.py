"""Search crops on the GPU: cut, resize, and subtract the mean colour, from the window's pixels alone.

    pixel(oy, ox) = round(sum over source rows and columns of weight * colour) - mean

As ``dmv_fast.vision.crop.cut``: a window larger than 256 is averaged over areas, a smaller one interpolated
between pixel centres; where the window leaves the frame, the fill colour stands.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256


@triton.jit
def _weight(position, start, scale, SHRINK: tl.constexpr):
    """Of source pixel `position` for the output that begins at `start`: its share of the area, or a tent."""
    if SHRINK:
        return tl.minimum(start + scale, position + 1.0) - tl.maximum(start, position)
    return 1.0 - tl.abs(position - start)


@triton.jit
def _resized(
    patch_ptr, oy, ox, width, height, left, top, side, fill, SIZE: tl.constexpr, SHRINK: tl.constexpr
):
    """Blue, green and red of a block of output pixels, float32; their loads are in flight together."""
    scale = side.to(tl.float32) / SIZE
    if SHRINK:
        y, x = oy * scale, ox * scale
        taps = tl.ceil(scale).to(tl.int32) + 1
        total = scale * scale
    else:
        y, x = (oy + 0.5) * scale - 0.5, (ox + 0.5) * scale - 0.5
        taps = 2
        total = 1.0
    first_y, first_x = tl.floor(y).to(tl.int32), tl.floor(x).to(tl.int32)
    blue, green, red = tl.zeros_like(y), tl.zeros_like(y), tl.zeros_like(y)
    fill_blue = (fill & 255).to(tl.float32)
    fill_green = ((fill >> 8) & 255).to(tl.float32)
    fill_red = ((fill >> 16) & 255).to(tl.float32)
    for j in range(taps):
        share_y = tl.maximum(_weight((first_y + j).to(tl.float32), y, scale, SHRINK), 0.0)
        row = tl.minimum(tl.maximum(first_y + j, 0), side - 1) - top
        for i in range(taps):
            share = share_y * tl.maximum(_weight((first_x + i).to(tl.float32), x, scale, SHRINK), 0.0)
            column = tl.minimum(tl.maximum(first_x + i, 0), side - 1) - left
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            place = patch_ptr + (row * width + column) * 3
            b = tl.load(place, mask=inside, other=0).to(tl.float32)
            g = tl.load(place + 1, mask=inside, other=0).to(tl.float32)
            r = tl.load(place + 2, mask=inside, other=0).to(tl.float32)
            blue += share * tl.where(inside, b, fill_blue)
            green += share * tl.where(inside, g, fill_green)
            red += share * tl.where(inside, r, fill_red)
    return tl.floor(blue / total + 0.5), tl.floor(green / total + 0.5), tl.floor(red / total + 0.5)


@triton.jit
def crop_kernel(
    bytes_ptr,  # the patches, each (height, width, 3) uint8 BGR
    windows_ptr,  # (n, 7) int32
    mean_ptr,  # (3,) float32 BGR
    out_ptr,  # (n, SIZE, SIZE, CHANNELS)
    window_stride,
    SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK pixels of one crop."""
    crop = tl.program_id(1)
    windows_ptr += crop * window_stride
    patch_ptr = bytes_ptr + tl.load(windows_ptr)
    width, height = tl.load(windows_ptr + 1), tl.load(windows_ptr + 2)
    left, top = tl.load(windows_ptr + 3), tl.load(windows_ptr + 4)
    side, fill = tl.load(windows_ptr + 5), tl.load(windows_ptr + 6)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    oy, ox = (pixel // SIZE).to(tl.float32), (pixel % SIZE).to(tl.float32)
    to_ptrs = out_ptr + (crop.to(tl.int64) * SIZE * SIZE + pixel) * CHANNELS
    if side > SIZE:
        b, g, r = _resized(patch_ptr, oy, ox, width, height, left, top, side, fill, SIZE, True)
    else:
        b, g, r = _resized(patch_ptr, oy, ox, width, height, left, top, side, fill, SIZE, False)
    ok = pixel < SIZE * SIZE
    tl.store(to_ptrs, (b - tl.load(mean_ptr)).to(out_ptr.dtype.element_ty), mask=ok)
    tl.store(to_ptrs + 1, (g - tl.load(mean_ptr + 1)).to(out_ptr.dtype.element_ty), mask=ok)
    tl.store(to_ptrs + 2, (r - tl.load(mean_ptr + 2)).to(out_ptr.dtype.element_ty), mask=ok)


def crop(patches: Tensor, windows: Tensor, mean: Tensor, out: Tensor) -> None:
    """Windows of a frame into crops.

    Args:
        patches: uint8, one dimension: what of each window lies in the frame, (height, width, 3) BGR.
        windows: (n, 7 or more) int32: where in `patches` it begins; its width and height; its left and top
            corner, counted from the window's; the window's side; the fill colour, B + 256 G + 65536 R.
        mean: (3,) float32 BGR, subtracted.
        out: (n, size, size, 3 or more) of any floating dtype, contiguous: the first 3 channels are written.
    """
    n, size, _, channels = out.shape
    with torch.cuda.device(out.device) if out.is_cuda else contextlib.nullcontext():
        grid = (triton.cdiv(size * size, BLOCK), n)
        crop_kernel[grid](
            patches, windows, mean, out, windows.stride(0),
            SIZE=size, CHANNELS=channels, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
