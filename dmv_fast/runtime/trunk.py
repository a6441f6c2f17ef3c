"""The folded backbone (paper section 3.1): pixels to features."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dmv_fast.model.backbone import Backbone, BasicBlock
from dmv_fast.runtime import hardware
from dmv_fast.runtime.convolution import Convolution, amx_runs, bfloat16_parts, run_chain
from dmv_fast.runtime.fold import fold_norm, fold_pixels
from dmv_fast.runtime.rows import join
from dmv_fast.vision.crop import CROP_SIZE, MEAN, STD

# Channels of a pixel on a GPU, the last of them zero: with 3, cuDNN would copy them into 8 by itself.
GPU_CHANNELS = 8
# Crops that go to layer3 together on a CPU. More would push the large early maps out of the caches; what
# follows has small maps and large weights and takes all crops at once (16 crops, one core with AMX: 162 ms,
# not 188).
_TOGETHER = 4


class Block:
    """A residual block of either kind: a chain of convolutions and a shortcut."""

    def __init__(self, block: nn.Module, **where):
        pairs = [(block.conv1, block.bn1), (block.conv2, block.bn2)]
        if not isinstance(block, BasicBlock):
            pairs.append((block.conv3, block.bn3))
        *first, (last, last_norm) = pairs
        self._chain = [Convolution.of(*pair, relu=True, **where) for pair in first]
        weight, bias = fold_norm(last, last_norm)
        self._shortcut = None
        if isinstance(block.downsample, nn.Sequential):
            conv, norm = block.downsample
            across, shift = fold_norm(conv, norm)
            # One of the two adds both biases: on a GPU the last, on a CPU the one that adds in float32.
            total = bias + shift
            bias, shift = (total, None) if hardware.on_gpu(where["device"]) else (None, total)
            self._shortcut = Convolution(across, shift, relu=False, stride=conv.stride[0], **where)
        geometry = {"padding": last.padding[0], "dilation": last.dilation[0]}
        self._last = Convolution(weight, bias, relu=True, **geometry, **where)

    def __call__(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, h, w); may write over x."""
        shortcut = x if self._shortcut is None else self._shortcut(x)
        return self._last(run_chain(self._chain, x), shortcut)


class Trunk:
    """The reference's Backbone, channels-last.

    Batch norm is folded, and of `normalise` only the mean is left to be done: in bfloat16 on a CPU the
    nearest whole numbers, since whole numbers of 8 bits are exact there, and the rest is in conv1's bias.
    """

    def __init__(self, backbone: Backbone, *, dtype: torch.dtype, device: torch.device, split: bool = False):
        where = {"dtype": dtype, "device": device, "split": split}
        weight, bias = fold_norm(backbone.conv1, backbone.bn1)
        weight, mean = fold_pixels(weight, STD), 255 * torch.tensor(MEAN[::-1])
        self._gpu = hardware.on_gpu(device)
        by_amx = not self._gpu and device.type == "cpu" and (split or dtype == torch.bfloat16) and amx_runs()
        self._pixels_amx = PixelsAmx(weight, bias, mean, dtype) if by_amx else None
        self._mean = mean.repeat(CROP_SIZE).to(device)
        if device.type == "cpu" and dtype == torch.bfloat16:
            self._mean = self._mean.round().to(dtype)
            bias = bias + (weight.sum((2, 3)) * (mean.round() - mean)).sum(1)
        if self._gpu:
            weight = F.pad(weight, (0, 0, 0, 0, 0, GPU_CHANNELS - weight.shape[1]))
        self._conv1 = Convolution(weight, bias, relu=True, stride=2, padding=3, **where)
        stages = (backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4)
        *self._stem, self._layer4 = ([Block(b, **where) for b in stage] for stage in stages)
        necks = backbone.neck3, backbone.neck4
        self._necks = [_neck(neck, biased=not self._gpu, **where) for neck in necks]
        self._neck_bias = torch.cat([neck[-1].bias for neck in necks]).to(device) if self._gpu else None
        self._unit_scale = backbone.unit_scale
        self._dtype = dtype

    def __call__(self, crops: Tensor, out: Tensor) -> None:
        """Features of crops (B, 256, 256, 3) uint8 BGR into out (B, H, W, D), rows of any stride."""
        parts = [self._layer3(part) for part in crops.split(len(crops) if self._gpu else _TOGETHER)]
        x = parts[0] if len(parts) == 1 else torch.cat(parts)
        left = run_chain(self._necks[0], x).permute(0, 2, 3, 1)
        for block in self._layer4:
            x = block(x)
        right = run_chain(self._necks[1], x).permute(0, 2, 3, 1)
        join(left, right, self._neck_bias, out, unit_scale=self._unit_scale)

    def _layer3(self, crops: Tensor) -> Tensor:
        """conv1 to layer3: (B, C3, 32, 32)."""
        if self._pixels_amx is not None:
            x = self._pixels_amx(crops)
        else:
            x = max_pool(self._conv1(self.pixels(crops)))
        for stage in self._stem:
            for block in stage:
                x = block(x)
        return x

    def pixels(self, crops: Tensor) -> Tensor:
        """uint8 BGR (B, S, S, 3) -> pixel - mean (B, 3, S, S), channels-last; the rest is in conv1.

        On a GPU it has GPU_CHANNELS. Crops of the network's dtype are all that already (kernels/crop.py).
        """
        if crops.dtype == self._dtype:
            return crops.permute(0, 3, 1, 2)
        rows = crops.flatten(2).to(self._mean.dtype).sub_(self._mean)  # whole rows: one long loop each
        pixels = rows.to(self._dtype).view(crops.shape)
        if self._gpu:
            pixels = F.pad(pixels, (0, GPU_CHANNELS - crops.shape[-1]))
        return pixels.permute(0, 3, 1, 2)


class PixelsAmx:
    """conv1, its rectifier and the max pool in one go: csrc/conv_pixels_amx.cpp.

    Crops (B, 256, 256, 3) uint8 BGR -> (B, C, 64, 64) in `dtype`; where that is float32, by weights in two
    parts of bfloat16. weight (C, 3, 7, 7) on pixel - mean, mean (3,): whole numbers are subtracted, the rest
    of the mean is in the bias, and beyond the crop it is what is padded.
    """

    def __init__(self, weight: Tensor, bias: Tensor, mean: Tensor, dtype: torch.dtype):
        self._bias = bias + (weight.sum((2, 3)) * (mean.round() - mean)).sum(1)
        self._mean, self._dtype = mean, dtype
        rows = F.pad(weight.permute(0, 2, 3, 1).flatten(2), (0, 11))  # (C, 7, 32): a window's row, and zeros
        halves = bfloat16_parts(rows, 1 if dtype == torch.bfloat16 else 2)
        blocks = halves.view(len(halves), -1, 2, 16, 7, 16, 2)  # parts, blocks, tiles, out, rows, pairs, 2
        self._weight = blocks.permute(1, 4, 0, 2, 5, 3, 6).contiguous()

    def __call__(self, crops: Tensor) -> Tensor:
        size = (len(crops), crops.shape[1] // 4, crops.shape[2] // 4, len(self._bias))
        out = torch.empty(size, dtype=self._dtype)
        torch.ops.dmv_fast.convolve_pixels_cpu.default(
            crops.contiguous(), self._weight, self._bias, self._mean, out
        )
        return out.permute(0, 3, 1, 2)


def _neck(neck: nn.Sequential, *, biased: bool, **where) -> list[Convolution]:
    last = neck[6]
    return [
        Convolution.of(neck[0], neck[1], relu=True, **where),
        Convolution.of(neck[3], neck[4], relu=True, **where),
        Convolution(last.weight, last.bias if biased else None, relu=False, **where),
    ]


def max_pool(x: Tensor) -> Tensor:
    """3 x 3 maximum of stride 2 of x >= 0 (B, C, H, W), channels-last, H and W even.

    Rows first, then columns. bfloat16 that is not negative is ordered as its bits are, and a CPU compares
    32 integers at a time: a third of F.max_pool2d's time.
    """
    if x.device.type != "cpu" or x.dtype != torch.bfloat16:
        return F.max_pool2d(x, 3, 2, 1)
    bits = x.permute(0, 2, 3, 1).view(torch.int16)
    even, odd = bits[:, 0::2], bits[:, 1::2]
    rows = torch.maximum(even, odd)
    torch.maximum(rows[:, 1:], odd[:, :-1], out=rows[:, 1:])
    even, odd = rows[:, :, 0::2], rows[:, :, 1::2]
    both = torch.maximum(even, odd)
    torch.maximum(both[:, :, 1:], odd[:, :, :-1], out=both[:, :, 1:])
    return both.view(torch.bfloat16).permute(0, 3, 1, 2)
