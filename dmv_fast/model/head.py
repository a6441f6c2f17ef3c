"""Box prediction (paper section 3.1): two branches as SiamRPN, deltas as Faster R-CNN."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class BoxHead(nn.Module):
    """Query and retrieved value, concatenated, to a centre logit and four box deltas an anchor.

    Parameters at D = V = 256, width 128, A = 5: 1.5 M.
    """

    prior = 0.02  # share of positive anchors at the start, so that the first steps are not all negatives

    def __init__(self, key_dim: int, value_dim: int, anchors: int, width: int = 128):
        super().__init__()
        self.anchors = anchors
        start = math.log(self.prior / (1 - self.prior))
        self.centre = _branch(key_dim + value_dim, width, anchors, start=start)
        self.box = _branch(key_dim + value_dim, width, 4 * anchors)

    def forward(self, features: Tensor, retrieved: Tensor) -> tuple[Tensor, Tensor]:
        """features (B, D, H, W), retrieved (B, M, V) -> logits (B, A, H, W), deltas (B, A, 4, H, W)."""
        value_map = retrieved.transpose(1, 2).unflatten(2, features.shape[-2:])
        x = torch.cat([features, value_map], 1)
        return self.centre(x), self.box(x).unflatten(1, (self.anchors, 4))


def _branch(c_in: int, width: int, c_out: int, *, start: float = 0.0) -> nn.Sequential:
    last = nn.Conv2d(width, c_out, 1)
    assert last.bias is not None, "a convolution has one unless told otherwise"
    nn.init.normal_(last.weight, std=0.01)
    nn.init.constant_(last.bias, start)
    return nn.Sequential(
        nn.Conv2d(c_in, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(),
        last,
    )
