"""The memory: what a past frame leaves behind (section 3.1), in which slot, and when (section 3.5)."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dmv_fast.checks import check_number, check_whole


class ValueEncoder(nn.Module):
    """Key map, centre scores and box deltas to values (section 3.1).

    Two 3 x 3 convolutions with a ReLU, and a layer norm (ours). Parameters at D = V = 256, A = 5: 1.2 M.
    """

    score_floor = 0.5  # lower scores are set to zero before encoding, "to minimize false positives"

    def __init__(self, key_dim: int, value_dim: int, anchors: int):
        super().__init__()
        self.conv1 = nn.Conv2d(key_dim + 5 * anchors, value_dim, 3, padding=1)
        self.conv2 = nn.Conv2d(value_dim, value_dim, 3, padding=1)
        # Ours: the vote ends in a layer norm, so nothing else stops the values from growing without bound,
        # and with them the gradient of the scores they are weighted by (seen: norm 7000 after 900 steps).
        self.norm = nn.LayerNorm(value_dim)

    def forward(self, features: Tensor, scores: Tensor, deltas: Tensor) -> Tensor:
        """features (B, D, H, W), scores (B, A, H, W), deltas (B, A, 4, H, W) -> values (B, M, V)."""
        scores = torch.where(scores < self.score_floor, 0.0, scores)
        x = torch.cat([features, scores, deltas.flatten(1, 2)], 1)
        return self.norm(self.conv2(torch.relu(self.conv1(x))).flatten(2).transpose(1, 2))


class FrameSlots:
    """Which of the T slots of a memory each remembered frame is in (section 3.5); the numbers lie elsewhere.

    Slot 0 holds the first frame and is never dropped; the others are overwritten oldest first. A memory is
    rows (T * M, ...), slot after slot; the first `valid` rows exist.
    """

    def __init__(self, capacity: int, locations: int):
        if capacity < 1:
            raise ValueError(f"capacity is {capacity}; a memory holds at least 1 frame")
        self.capacity, self.locations = capacity, locations
        self.frames: list[int | None] = [None] * capacity  # slot -> number of the frame it holds
        self._writes = 0

    @property
    def valid(self) -> int:
        """How many leading rows exist."""
        return min(self._writes, self.capacity) * self.locations

    def claim(self, frame: int) -> int | None:
        """The slot that a frame is to be written to, from now on its own.

        A memory of capacity 1 keeps its first frame: later ones are refused (None).
        """
        if self._writes < self.capacity:
            slot = self._writes
        elif self.capacity == 1:
            return None
        else:
            slot = 1 + (self._writes - self.capacity) % (self.capacity - 1)
        self.frames[slot] = frame
        self._writes += 1
        return slot

    def clear(self) -> None:
        """Forget every frame."""
        self.frames = [None] * self.capacity
        self._writes = 0

    def clone(self) -> FrameSlots:
        """An independent copy."""
        other = copy.copy(self)
        other.frames = list(self.frames)
        return other


@dataclass(frozen=True)
class MemoryPolicy:
    """When a tracked frame is written (section 3.5)."""

    interval: int = 30
    """At least this many frames between two writes."""
    threshold: float = 0.7
    """The centre score must reach this; above 1, nothing is ever written."""

    def __post_init__(self) -> None:
        check_whole("interval", self.interval, 1)
        check_number("threshold", self.threshold, 0)

    def wants(self, frame: int, last_written: int, score: float) -> bool:
        return frame - last_written >= self.interval and score >= self.threshold
