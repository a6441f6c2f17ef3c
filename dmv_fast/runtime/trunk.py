"""The folded backbone (paper section 3.1): pixels to features."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dmv_fast.model.backbone import Backbone, BasicBlock
from dmv_fast.runtime import hardware
from dmv_fast.runtime.convolution import Convolution, run_chain
from dmv_fast.runtime.fold import fold_pixels, norm_line, scaled
from dmv_fast.runtime.pixels import pixels_to_map
from dmv_fast.runtime.rows import join
from dmv_fast.vision.crop import MEAN, STD

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
        scale, bias = norm_line(last_norm)
        self._shortcut = None
        if isinstance(block.downsample, nn.Sequential):
            conv, norm = block.downsample
            across, shift = norm_line(norm)
            # One of the two adds both biases: on a GPU the last, on a CPU the one that adds in float32.
            total = bias + shift
            bias, shift = (total, None) if hardware.on_gpu(where["device"]) else (None, total)
            self._shortcut = Convolution(
                conv.weight, shift, scale=across, relu=False, stride=conv.stride[0], **where
            )
        geometry = {"padding": last.padding[0], "dilation": last.dilation[0]}
        self._last = Convolution(last.weight, bias, scale=scale, relu=True, **geometry, **where)

    def __call__(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, h, w); may write over x."""
        shortcut = x if self._shortcut is None else self._shortcut(x)
        return self._last(run_chain(self._chain, x), shortcut)


class Trunk:
    """The reference's Backbone, channels-last. Batch norm is folded, of `normalise` all but the mean."""

    def __init__(self, backbone: Backbone, *, dtype: torch.dtype, device: torch.device, split: bool = False):
        where = {"dtype": dtype, "device": device, "split": split}
        self._gpu = hardware.on_gpu(device)
        scale, bias = norm_line(backbone.bn1)
        weight, mean = fold_pixels(scaled(backbone.conv1.weight, scale), STD), 255 * torch.tensor(MEAN[::-1])
        self._conv1 = pixels_to_map(weight, bias, mean, **where)
        stages = (backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4)
        *self._stem, self._layer4 = ([Block(b, **where) for b in stage] for stage in stages)
        necks = backbone.neck3, backbone.neck4
        self._necks = [_neck(neck, biased=not self._gpu, **where) for neck in necks]
        self._neck_bias = torch.cat([neck[-1].bias for neck in necks]).to(device) if self._gpu else None
        self._unit_scale = backbone.unit_scale

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
        x = self._conv1(crops)
        for stage in self._stem:
            for block in stage:
                x = block(x)
        return x


def _neck(neck: nn.Sequential, *, biased: bool, **where) -> list[Convolution]:
    last = neck[6]
    return [
        Convolution.of(neck[0], neck[1], relu=True, **where),
        Convolution.of(neck[3], neck[4], relu=True, **where),
        Convolution(last.weight, last.bias if biased else None, relu=False, **where),
    ]
