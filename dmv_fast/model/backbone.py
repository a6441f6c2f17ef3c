"""Visual features (paper section 3.1): a ResNet without its tail, and two bottlenecks to one grid."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class _Stage(NamedTuple):
    blocks: int
    width: int


class _Plan(NamedTuple):
    block: type[BasicBlock] | type[BottleneckBlock]
    stages: tuple[_Stage, _Stage, _Stage, _Stage]


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut (ResNet18)."""

    expansion = 1

    def __init__(self, c_in: int, width: int, stride: int, first_dilation: int, dilation: int):
        super().__init__()
        self.conv1 = _conv3x3(c_in, width, stride, first_dilation)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv3x3(width, width, 1, dilation)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(c_in, width, stride)
        self.last_norm = "bn2"

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return torch.relu(y + self.downsample(x))


class BottleneckBlock(nn.Module):
    """1 x 1, 3 x 3, 1 x 1 and a shortcut (ResNet50); stride on the first 1 x 1, as the weights want."""

    expansion = 4

    def __init__(self, c_in: int, width: int, stride: int, first_dilation: int, dilation: int):
        super().__init__()
        c_out = width * self.expansion
        self.conv1 = nn.Conv2d(c_in, width, 1, stride, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv3x3(width, width, 1, dilation)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, c_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(c_out)
        self.downsample = _shortcut(c_in, c_out, stride)
        self.last_norm = "bn3"

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return torch.relu(y + self.downsample(x))


def _conv3x3(c_in: int, c_out: int, stride: int, dilation: int) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, stride, padding=dilation, dilation=dilation, bias=False)


def _shortcut(c_in: int, c_out: int, stride: int) -> nn.Identity | nn.Sequential:
    if stride == 1 and c_in == c_out:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))


def _neck(c_in: int, c_out: int, stride: int) -> nn.Sequential:
    """The paper's "bottleneck convolution layer with and without stride"; linear at its end."""
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, 1, bias=False),
        nn.BatchNorm2d(c_out),
        nn.ReLU(),
        nn.Conv2d(c_out, c_out, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(c_out),
        nn.ReLU(),
        nn.Conv2d(c_out, c_out, 1),
    )


RESNETS = {
    "resnet18": _Plan(BasicBlock, (_Stage(2, 64), _Stage(2, 128), _Stage(2, 256), _Stage(2, 512))),
    "resnet50": _Plan(BottleneckBlock, (_Stage(3, 64), _Stage(4, 128), _Stage(6, 256), _Stage(3, 512))),
}


class Backbone(nn.Module):
    """Search crops to the feature map that serves as query and as key (paper section 3.1).

    layer3 is kept at stride 8 by dilation; layer4 is at stride 16 (grid 16) or, dilated too, at stride 8
    (grid 32). Each passes its own bottleneck to D/2 channels, layer3's with stride 2 in grid 16; both are
    concatenated. Parameters at D = 256: 11.6 M (resnet18), 24.2 M (resnet50). Key names of the trunk are
    torchvision's. unit_scale (ours): the features of a location are scaled to unit mean square, so that
    what reads them need not follow their drifting size.

    crops (B, 3, 256, 256) normalised RGB -> features (B, D, H, W), H = W = grid.
    """

    def __init__(self, name: str, *, grid: int = 16, key_dim: int = 256, unit_scale: bool = True):
        super().__init__()
        self.unit_scale = unit_scale
        if name not in RESNETS:
            raise ValueError(f"backbone is {name!r}; it must be one of {sorted(RESNETS)}")
        if grid not in (16, 32):
            raise ValueError(f"grid is {grid}; it must be 16 or 32")
        plan = RESNETS[name]
        dense = grid == 32
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        c = [64] + [s.width * plan.block.expansion for s in plan.stages]
        self.layer1 = _stage(plan, 0, c[0], stride=1)
        self.layer2 = _stage(plan, 1, c[1], stride=2)
        # Where a stride is removed, what follows is dilated instead and sees what it saw before.
        self.layer3 = _stage(plan, 2, c[2], stride=1, dilation=2)
        self.layer4 = _stage(plan, 3, c[3], stride=1 if dense else 2, dilation=2 if dense else 1)
        self.neck3 = _neck(c[3], key_dim // 2, stride=1 if dense else 2)
        self.neck4 = _neck(c[4], key_dim // 2, stride=1)
        self._start_layer4_as_projection()

    def _start_layer4_as_projection(self) -> None:
        """layer4 has no pretrained weights: with its residual branches silent it passes layer3 on."""
        blocks = blocks_of(self.layer4)
        for block in blocks:
            nn.init.zeros_(getattr(block, block.last_norm).weight)
        shortcut = blocks[0].downsample
        assert isinstance(shortcut, nn.Sequential), "layer4 is wider than layer3"
        nn.init.orthogonal_(conv_and_norm(shortcut, 0)[0].weight, gain=2**0.5)

    def stem(self, crops: Tensor) -> Tensor:
        """conv1 to layer3, the part with pretrained weights: (B, 3, 256, 256) -> (B, C3, 32, 32)."""
        x = self.maxpool(torch.relu(self.bn1(self.conv1(crops))))
        return self.layer3(self.layer2(self.layer1(x)))

    def tail(self, layer3: Tensor) -> Tensor:
        """layer4 and the bottlenecks: (B, C3, 32, 32) -> (B, D, H, W), unit mean square at each location."""
        features = torch.cat([self.neck3(layer3), self.neck4(self.layer4(layer3))], 1)
        if not self.unit_scale:
            return features
        mean_square = features.float().square().mean(1, keepdim=True)
        return features * torch.rsqrt(mean_square + 1e-6).to(features.dtype)

    def forward(self, crops: Tensor) -> Tensor:
        return self.tail(self.stem(crops))


def _stage(plan: _Plan, index: int, c_in: int, *, stride: int, dilation: int = 1) -> nn.Sequential:
    """One ResNet stage. dilation > 1: its stride was removed at the first block's first convolution."""
    blocks, width = plan.stages[index]
    layers: list[nn.Module] = [plan.block(c_in, width, stride, 1, dilation)]
    c_out = width * plan.block.expansion
    layers += [plan.block(c_out, width, 1, dilation, dilation) for _ in range(blocks - 1)]
    return nn.Sequential(*layers)


# nn.Sequential knows its parts as modules alone; these two say what they are.


def blocks_of(stage: nn.Sequential) -> list[BasicBlock | BottleneckBlock]:
    """The residual blocks of a stage."""
    blocks = [block for block in stage if isinstance(block, BasicBlock | BottleneckBlock)]
    assert len(blocks) == len(stage)
    return blocks


def conv_and_norm(layers: nn.Sequential, at: int) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """The convolution at a place of a shortcut or a bottleneck, and the batch norm behind it."""
    conv, norm = layers[at], layers[at + 1]
    assert isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
    return conv, norm
