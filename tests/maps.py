"""Maps as the runtime has them, (B, H, W, C), and PyTorch's convolution of such."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# Convolutions: (batch, C_in, C_out, height, width, stride, padding, dilation, groups)
THREE_BY_THREE = [
    (1, 64, 64, 64, 64, 1, 1, 1, 1),
    (1, 128, 256, 32, 32, 1, 1, 1, 1),  # weights that are read once, by all threads together
    (1, 256, 256, 32, 32, 1, 2, 2, 1),
    (1, 512, 256, 16, 16, 1, 1, 1, 2),
    (3, 64, 96, 15, 18, 1, 2, 2, 1),  # tiles over the map's end, and no whole step of them
    (2, 16, 32, 5, 9, 1, 0, 1, 1),
    (1, 32, 32, 3, 3, 1, 0, 1, 1),
    (1, 32, 32, 1, 1, 1, 1, 1, 1),
    (2, 48, 64, 7, 21, 1, 3, 3, 1),
    (1, 32, 32, 9, 9, 1, 2, 1, 1),
    (1, 64, 128, 64, 64, 2, 1, 1, 1),
    (1, 256, 512, 32, 32, 2, 1, 1, 1),
    (2, 64, 64, 15, 18, 2, 1, 1, 2),
    (1, 16, 32, 8, 5, 2, 0, 1, 1),
    (1, 32, 32, 1, 1, 2, 1, 1, 1),
]


def random_map(batch: int, channels: int, height: int, width: int) -> Tensor:
    return torch.randn(batch, height, width, channels)


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None = None, **geometry: int) -> Tensor:
    """F.conv2d of x (B, H, W, C)."""
    return F.conv2d(x.permute(0, 3, 1, 2), weight, bias, **geometry).permute(0, 2, 3, 1)


ENDS = ((True, False), (False, False), (True, True))  # of a convolution: does it rectify, and add to a map


def expected_end(
    x: Tensor, weight: Tensor, bias: Tensor, *, relu: bool, residual: bool, **geometry: int
) -> tuple[Tensor | None, Tensor]:
    """The map to add to, at random, or None; and in float64 what should come out."""
    expected = convolved(x.double(), weight.double(), bias.double(), **geometry)
    onto = torch.randn(expected.shape).to(x.dtype) if residual else None
    if onto is not None:
        expected += onto
    return onto, expected.relu() if relu else expected
