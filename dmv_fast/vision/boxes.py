"""Boxes and anchors: xywh in pixels, 0-based, continuous coordinates (pixel i covers [i, i + 1))."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of xywh boxes (..., 4), broadcast against each other -> (...)."""
    left_top = torch.maximum(a[..., :2], b[..., :2])
    right_bottom = torch.minimum(a[..., :2] + a[..., 2:], b[..., :2] + b[..., 2:])
    inter = (right_bottom - left_top).clamp(min=0).prod(-1)
    union = a[..., 2:].prod(-1) + b[..., 2:].prod(-1) - inter
    return inter / union.clamp(min=1e-9)


def encode(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Anchor displacements of Faster R-CNN (the paper's [39]): (dx, dy) / anchor size, log size ratio.

    boxes, anchors: (..., 4) xywh, broadcast; boxes of positive size -> deltas (..., 4).
    """
    centre = boxes[..., :2] + boxes[..., 2:] / 2
    anchor_centre = anchors[..., :2] + anchors[..., 2:] / 2
    shift = (centre - anchor_centre) / anchors[..., 2:]
    scale = torch.log(boxes[..., 2:] / anchors[..., 2:])
    return torch.cat([shift, scale], -1)


def decode(deltas: Tensor, anchors: Tensor) -> Tensor:
    """Inverse of `encode`: deltas, anchors (..., 4) -> xywh boxes (..., 4).

    Log sizes are cut at +-4 (a factor of 55), so that a wild prediction stays finite.
    """
    centre = anchors[..., :2] + anchors[..., 2:] / 2 + deltas[..., :2] * anchors[..., 2:]
    size = anchors[..., 2:] * deltas[..., 2:].clamp(-4, 4).exp()
    return torch.cat([centre - size / 2, size], -1)


def anchor_grid(grid: int, size: int, ratios: Sequence[float], side: float) -> Tensor:
    """Anchors of every location of a grid x grid map over a size x size crop -> (A, grid, grid, 4) xywh.

    ratios: height over width; every anchor has the area side^2. The anchor of column i is centred on
    i * size / grid, the centre of that feature's receptive field (each stride-2 convolution of the
    backbone centres output i on input 2i); the middle of the crop is thus the centre of an anchor.
    """
    step = size / grid
    y, x = torch.meshgrid(torch.arange(grid) * step, torch.arange(grid) * step, indexing="ij")
    anchors = []
    for ratio in ratios:
        w, h = side / ratio**0.5, side * ratio**0.5
        anchors.append(torch.stack([x - w / 2, y - h / 2, torch.full_like(x, w), torch.full_like(x, h)], -1))
    return torch.stack(anchors)
