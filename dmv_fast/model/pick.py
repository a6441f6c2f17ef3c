"""Which predicted box is the target (ours; the paper does not say): SiamRPN's terms, each optional."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dmv_fast.checks import check_number


@dataclass(frozen=True)
class PickConfig:
    """Strength of each term; 0 (or smoothing 1) switches it off."""

    size_penalty: float = 0.03
    """How strongly a sudden change of size or aspect lowers a score."""
    window: float = 0.1
    """Share of a cosine window over the crop in the ranking."""
    smoothing: float = 0.7
    """How far the size moves to the new one in a frame, times the score; 1 takes the new size whole."""

    def __post_init__(self) -> None:
        check_number("size_penalty", self.size_penalty, 0)
        check_number("window", self.window, 0, 1)
        check_number("smoothing", self.smoothing, 0, 1)


class Pick(NamedTuple):
    """The chosen box of each of B crops."""

    box: Tensor
    """(B, 4) xywh in crop pixels, size smoothed."""
    score: Tensor
    """(B,) its centre probability, as the network gave it."""


def cosine_window(anchors: int, grid: int, *, device: torch.device | str = "cpu") -> Tensor:
    """A raised cosine centred where the crop's middle anchor is (see `anchor_grid`): (A, H, W)."""
    offset = (torch.arange(grid, device=device) - grid / 2) / (grid / 2)
    profile = 0.5 + 0.5 * torch.cos(torch.pi * offset)
    return torch.outer(profile, profile).expand(anchors, grid, grid)


def pick(scores: Tensor, boxes: Tensor, size: Tensor, window: Tensor, config: PickConfig) -> Pick:
    """The best box after SiamRPN's penalty on changes of scale and ratio and a cosine window.

    scores (B, A, H, W), boxes (B, A, H, W, 4) and the last size (B, 2) as (w, h) in crop pixels,
    window (A, H, W) from `cosine_window`. Stays on the device.
    """
    w, h = boxes[..., 2], boxes[..., 3]
    last_w, last_h = (size[:, i, None, None, None] for i in (0, 1))
    change = _larger(_scale(w, h) / _scale(last_w, last_h)) * _larger((w / h) / (last_w / last_h))
    penalty = torch.exp(-(change - 1) * config.size_penalty)  # (B, A, H, W)
    rank = scores * penalty * (1 - config.window) + window * config.window
    best = rank.flatten(1).argmax(1, keepdim=True)  # (B, 1)
    score = scores.flatten(1).gather(1, best)
    box = boxes.flatten(1, 3).gather(1, best[..., None].expand(-1, 1, 4))[:, 0]
    if config.smoothing < 1:
        rate = penalty.flatten(1).gather(1, best) * score * config.smoothing
        new_size = size + (box[:, 2:] - size) * rate
        box = torch.cat([box[:, :2] + (box[:, 2:] - new_size) / 2, new_size], 1)
    return Pick(box, score[:, 0])


def _larger(ratio: Tensor) -> Tensor:
    return torch.maximum(ratio, 1 / ratio)


def _scale(w: Tensor, h: Tensor) -> Tensor:
    """SiamFC's size of a box: the side of the square it is cropped with, halved."""
    p = (w + h) / 2
    return torch.sqrt((w + p) * (h + p))
