"""The folded backbone (paper section 3.1): pixels to features."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dmv_fast.model.backbone import Backbone, BasicBlock, BottleneckBlock, blocks_of, conv_and_norm
from dmv_fast.runtime import hardware
from dmv_fast.runtime.convolution import Convolution, Where, amx_runs, padding_of, run_chain
from dmv_fast.runtime.fold import fold_pixels, norm_line, scaled
from dmv_fast.runtime.pixels import pixels_to_map
from dmv_fast.runtime.rows import join
from dmv_fast.vision.crop import MEAN, STD

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Crops that go to layer3 together on a CPU with AMX. More would push the large early maps out of the caches;
# what follows has small maps and large weights and takes all crops at once (16 crops, one core: 162 ms, not
# 188). Without AMX it is one crop: the weights so far stay in the caches anyway, and then so do its maps (two
# cores of an EPYC: 13.4 ms a crop, 14.5 in fours).
_TOGETHER_BY_TILES = 4


class Block:
    """A residual block of either kind: a chain of convolutions and a shortcut."""

    def __init__(self, block: BasicBlock | BottleneckBlock, **where: Unpack[Where]):
        pairs = [(block.conv1, block.bn1), (block.conv2, block.bn2)]
        if not isinstance(block, BasicBlock):
            pairs.append((block.conv3, block.bn3))
        *first, (last, last_norm) = pairs
        self._chain = [Convolution.of(*pair, relu=True, **where) for pair in first]
        scale, shift = norm_line(last_norm)
        here: Tensor | None = shift
        self._shortcut = None
        if isinstance(block.downsample, nn.Sequential):
            conv, norm = conv_and_norm(block.downsample, 0)
            across, beside = norm_line(norm)
            # One of the two adds both biases: on a GPU the last, on a CPU the one that adds in float32.
            total = shift + beside
            here, there = (total, None) if hardware.on_gpu(where["device"]) else (None, total)
            self._shortcut = Convolution(
                conv.weight, there, scale=across, relu=False, stride=conv.stride[0], **where
            )
        self._last = Convolution(
            last.weight, here, scale=scale, relu=True, padding=padding_of(last), dilation=last.dilation[0],
            **where,
        )  # fmt: skip

    def __call__(self, x: Tensor) -> Tensor:
        """(B, H, W, C_in) -> (B, h, w, C_out); may write over x."""
        shortcut = x if self._shortcut is None else self._shortcut(x)
        return self._last(run_chain(self._chain, x), shortcut)


class Trunk:
    """The reference's Backbone on (B, H, W, C). Batch norm is folded, of `normalise` all but the mean."""

    def __init__(self, backbone: Backbone, **where: Unpack[Where]):
        self._gpu = hardware.on_gpu(where["device"])
        self._together = 0 if self._gpu else _TOGETHER_BY_TILES if amx_runs() else 1
        scale, bias = norm_line(backbone.bn1)
        weight, mean = fold_pixels(scaled(backbone.conv1.weight, scale), STD), 255 * torch.tensor(MEAN[::-1])
        self._conv1 = pixels_to_map(weight, bias, mean, **where)
        stages = (backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4)
        *self._stem, self._layer4 = ([Block(b, **where) for b in blocks_of(stage)] for stage in stages)
        necks = backbone.neck3, backbone.neck4
        self._necks = [_neck(neck, biased=not self._gpu, **where) for neck in necks]
        biases = [_last(neck)[1] for neck in necks]
        self._neck_bias = torch.cat(biases).to(where["device"]) if self._gpu else None
        self._unit_scale = backbone.unit_scale

    def __call__(self, crops: Tensor, out: Tensor) -> None:
        """Features of crops (B, 256, 256, 3) uint8 BGR into out (B, H, W, D), rows evenly spaced."""
        parts = [self._layer3(part) for part in crops.split(self._together or len(crops))]
        x = parts[0] if len(parts) == 1 else torch.cat(parts)
        left = run_chain(self._necks[0], x)
        for block in self._layer4:
            x = block(x)
        right = run_chain(self._necks[1], x)
        join(left, right, self._neck_bias, out, unit_scale=self._unit_scale)

    def _layer3(self, crops: Tensor) -> Tensor:
        """conv1 to layer3: (B, 32, 32, C3)."""
        x = self._conv1(crops)
        for stage in self._stem:
            for block in stage:
                x = block(x)
        return x


def _neck(neck: nn.Sequential, *, biased: bool, **where: Unpack[Where]) -> list[Convolution]:
    weight, bias = _last(neck)
    return [
        Convolution.of(*conv_and_norm(neck, 0), relu=True, **where),
        Convolution.of(*conv_and_norm(neck, 3), relu=True, **where),
        Convolution(weight, bias if biased else None, relu=False, **where),
    ]


def _last(neck: nn.Sequential) -> tuple[Tensor, Tensor]:
    """Weight and bias of a bottleneck's last convolution, the one without a batch norm."""
    last = neck[-1]
    assert isinstance(last, nn.Conv2d) and last.bias is not None
    return last.weight, last.bias
