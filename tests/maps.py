"""Maps as the runtime has them, (B, H, W, C), and PyTorch's convolution of such."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def random_map(batch: int, channels: int, height: int, width: int) -> Tensor:
    return torch.randn(batch, height, width, channels)


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None = None, **geometry: int) -> Tensor:
    """F.conv2d of x (B, H, W, C)."""
    return F.conv2d(x.permute(0, 3, 1, 2), weight, bias, **geometry).permute(0, 2, 3, 1)
