"""The backbone's first stage: pixels to conv1, its rectifier and the max pool (paper section 3.1).

In bfloat16 on a CPU, and in products of bfloat16 parts, the nearest whole numbers are subtracted from the
pixels instead of the mean, since whole numbers of 8 bits are exact there; the rest is in conv1's bias.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from dmv_fast.ops.backends import cpu_kernel_runs
from dmv_fast.runtime import hardware
from dmv_fast.runtime.convolution import Convolution, amx_runs
from dmv_fast.runtime.fold import FOUR_TAP_POINTS, THREE_TAP_POINTS, panels, weights_at_points
from dmv_fast.runtime.parts import Products, bfloat16_parts
from dmv_fast.vision.crop import CROP_SIZE

# Channels of a pixel on a GPU, the last of them zero: with 3, cuDNN would copy them into 8 by itself.
GPU_CHANNELS = 8


def pixels_to_map(
    weight: Tensor, bias: Tensor, mean: Tensor, *, dtype: torch.dtype, device: torch.device,
    products: Products = "own",
) -> Callable[[Tensor], Tensor]:  # fmt: skip
    """Crops (B, 256, 256, 3) uint8 BGR -> (B, 64, 64, C) of `dtype`.

    weight (C, 3, 7, 7) on pixel - mean, bias (C,), mean (3,).
    """
    cpu = device.type == "cpu" and not hardware.on_gpu(device)
    if cpu and (products == "bfloat16x3" or dtype == torch.bfloat16) and amx_runs():
        return PixelsAmx(weight, bias, mean, dtype)
    if cpu and dtype == torch.float32 and cpu_kernel_runs("convolve_pixels_float32_cpu"):
        return PixelsFloat32(weight, bias, mean)
    return Pixels(weight, bias, mean, dtype=dtype, device=device)


def _bias_of_whole_mean(weight: Tensor, bias: Tensor, mean: Tensor) -> Tensor:
    """conv1's bias where mean.round() is subtracted instead of the mean."""
    return bias + (weight.sum((2, 3)) * (mean.round() - mean)).sum(1)


class Pixels:
    """`pixels_to_map` by PyTorch's routines, on any device."""

    def __init__(
        self, weight: Tensor, bias: Tensor, mean: Tensor, *, dtype: torch.dtype, device: torch.device
    ):
        self._gpu, self._dtype = hardware.on_gpu(device), dtype
        self._mean = mean.repeat(CROP_SIZE).to(device)
        if device.type == "cpu" and dtype == torch.bfloat16:
            self._mean, bias = self._mean.round().to(dtype), _bias_of_whole_mean(weight, bias, mean)
        if self._gpu:
            weight = F.pad(weight, (0, 0, 0, 0, 0, GPU_CHANNELS - weight.shape[1]))
        self.convolution = Convolution(
            weight, bias, relu=True, dtype=dtype, device=device, stride=2, padding=3
        )

    def __call__(self, crops: Tensor) -> Tensor:
        return max_pool(self.convolution(self.pixels(crops)))

    def pixels(self, crops: Tensor) -> Tensor:
        """uint8 BGR (B, S, S, 3) -> pixel - mean (B, S, S, 3).

        On a GPU it has GPU_CHANNELS. Crops of the network's dtype are all that already (kernels/crop.py).
        """
        if crops.dtype == self._dtype:
            return crops
        rows = crops.flatten(2).to(self._mean.dtype).sub_(self._mean)  # whole rows: one long loop each
        pixels = rows.to(self._dtype).view(crops.shape)
        if self._gpu:
            pixels = F.pad(pixels, (0, GPU_CHANNELS - crops.shape[-1]))
        return pixels


class PixelsAmx:
    """`pixels_to_map` in one go: csrc/conv_pixels_amx.cpp.

    In float32 by weights in two parts of bfloat16. Beyond the crop the mean is what is padded.
    """

    def __init__(self, weight: Tensor, bias: Tensor, mean: Tensor, dtype: torch.dtype):
        self._bias = _bias_of_whole_mean(weight, bias, mean)
        self._mean, self._dtype = mean, dtype
        rows = F.pad(weight.permute(0, 2, 3, 1).flatten(2), (0, 11))  # (C, 7, 32): a window's row, and zeros
        halves = bfloat16_parts(rows)[: 1 if dtype == torch.bfloat16 else 2]
        blocks = halves.view(len(halves), -1, 2, 16, 7, 16, 2)  # parts, blocks, tiles, out, rows, pairs, 2
        self._weight = blocks.permute(1, 4, 0, 2, 5, 3, 6).contiguous()

    def __call__(self, crops: Tensor) -> Tensor:
        size = (len(crops), crops.shape[1] // 4, crops.shape[2] // 4, len(self._bias))
        out = torch.empty(size, dtype=self._dtype)
        torch.ops.dmv_fast.convolve_pixels_cpu.default(
            crops.contiguous(), self._weight, self._bias, self._mean, out
        )
        return out


class PixelsFloat32:
    """`pixels_to_map` in one go and in float32: csrc/conv_pixels_float32.h."""

    def __init__(self, weight: Tensor, bias: Tensor, mean: Tensor):
        rows = weight.detach().double().permute(0, 2, 3, 1).flatten(2)  # (C, 7, 21): a window's rows
        even, odd = weights_at_points(FOUR_TAP_POINTS, 4), weights_at_points(THREE_TAP_POINTS, 3)
        points = torch.cat([even @ rows[:, ::2], odd @ rows[:, 1::2]], 1)  # (C, 7 + 6, 21)
        self._weight = panels(points.flatten(1).float())
        self._bias, self._mean = bias, mean

    def __call__(self, crops: Tensor) -> Tensor:
        size = (len(crops), crops.shape[1] // 4, crops.shape[2] // 4, len(self._bias))
        out = self._bias.new_empty(size)
        torch.ops.dmv_fast.convolve_pixels_float32_cpu.default(
            crops.contiguous(), self._weight, self._bias, self._mean, out
        )
        return out


def max_pool(x: Tensor) -> Tensor:
    """3 x 3 maximum of stride 2 of x >= 0 (B, H, W, C), H and W even.

    Rows first, then columns. bfloat16 that is not negative is ordered as its bits are, and a CPU compares
    32 integers at a time: a third of F.max_pool2d's time.
    """
    if x.device.type != "cpu" or x.dtype != torch.bfloat16:
        return F.max_pool2d(x.permute(0, 3, 1, 2), 3, 2, 1).permute(0, 2, 3, 1)
    bits = x.view(torch.int16)
    even, odd = bits[:, 0::2], bits[:, 1::2]
    rows = torch.maximum(even, odd)
    torch.maximum(rows[:, 1:], odd[:, :-1], out=rows[:, 1:])
    even, odd = rows[:, :, 0::2], rows[:, :, 1::2]
    both = torch.maximum(even, odd)
    torch.maximum(both[:, :, 1:], odd[:, :, :-1], out=both[:, :, 1:])
    return both.view(torch.bfloat16)
