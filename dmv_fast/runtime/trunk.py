"""The folded backbone (paper section 3.1): pixels to features."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dmv_fast.model.backbone import Backbone, BasicBlock
from dmv_fast.runtime.convolution import Convolution, run_chain
from dmv_fast.runtime.fold import fold_norm, fold_pixels
from dmv_fast.vision.crop import MEAN, STD

# Crops that go to layer3 together. More would push the large early maps out of the caches; what follows has
# small maps and large weights and takes all crops at once (16 crops, one core with AMX: 162 ms, not 188).
_TOGETHER = 4


class Block:
    """A residual block of either kind: a chain of convolutions and a shortcut."""

    def __init__(self, block: nn.Module, **where):
        pairs = [(block.conv1, block.bn1), (block.conv2, block.bn2)]
        if not isinstance(block, BasicBlock):
            pairs.append((block.conv3, block.bn3))
        self._chain = [Convolution.of(conv, norm, relu=True, **where) for conv, norm in pairs]
        self._shortcut = None
        if isinstance(block.downsample, nn.Sequential):
            self._shortcut = Convolution.of(*block.downsample, relu=False, **where)

    def __call__(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, h, w); may write over x."""
        y = x
        for conv in self._chain[:-1]:
            y = conv(y)
        return self._chain[-1](y, x if self._shortcut is None else self._shortcut(x))


class Trunk:
    """The reference's Backbone, channels-last.

    Batch norm is folded, and of `normalise` only the mean is left to be done.
    """

    def __init__(self, backbone: Backbone, *, dtype: torch.dtype, device: torch.device):
        where = {"dtype": dtype, "device": device}
        weight, bias = fold_norm(backbone.conv1, backbone.bn1)
        self._mean = 255 * torch.tensor(MEAN[::-1], device=device)
        self._conv1 = Convolution(fold_pixels(weight, STD), bias, relu=True, stride=2, padding=3, **where)
        stages = (backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4)
        *self._stem, self._layer4 = ([Block(b, **where) for b in stage] for stage in stages)
        self._necks = [_neck(neck, **where) for neck in (backbone.neck3, backbone.neck4)]
        self._unit_scale = backbone.unit_scale
        self._dtype = dtype

    def __call__(self, crops: Tensor, out: Tensor) -> None:
        """Features of crops (B, 256, 256, 3) uint8 BGR into out (B, H, W, D), rows of any stride."""
        parts = [self._layer3(part) for part in crops.split(_TOGETHER)]
        x = parts[0] if len(parts) == 1 else torch.cat(parts)
        half = out.shape[-1] // 2
        out[..., :half] = run_chain(self._necks[0], x).permute(0, 2, 3, 1)
        for block in self._layer4:
            x = block(x)
        out[..., half:] = run_chain(self._necks[1], x).permute(0, 2, 3, 1)
        if self._unit_scale:
            mean_square = torch.linalg.vector_norm(out, dim=-1, keepdim=True, dtype=torch.float32).square_()
            out *= torch.rsqrt_(mean_square.div_(out.shape[-1]).add_(1e-6))

    def _layer3(self, crops: Tensor) -> Tensor:
        """conv1 to layer3: (B, C3, 32, 32)."""
        x = max_pool(self._conv1(self.pixels(crops)))
        for stage in self._stem:
            for block in stage:
                x = block(x)
        return x

    def pixels(self, crops: Tensor) -> Tensor:
        """uint8 BGR (B, S, S, 3) -> pixel - mean (B, 3, S, S), channels-last; the rest is in conv1.

        Crops of the network's dtype are pixel - mean already (kernels/crop.py).
        """
        if crops.dtype == self._dtype:
            return crops.permute(0, 3, 1, 2)
        return (crops - self._mean).to(self._dtype).permute(0, 3, 1, 2)


def _neck(neck: nn.Sequential, **where) -> list[Convolution]:
    return [
        Convolution.of(neck[0], neck[1], relu=True, **where),
        Convolution.of(neck[3], neck[4], relu=True, **where),
        Convolution.of(neck[6], relu=False, **where),
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
