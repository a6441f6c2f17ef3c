"""The memory: what a past frame leaves behind (section 3.1), where it is kept and when (section 3.5)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


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


class MemoryBank:
    """A preallocated ring of T frames of keys and values for B targets (section 3.5).

    Slot 0 holds the first frame and is never dropped; the others are overwritten oldest first. Keys and
    values lie as the retrieval reads them, (B, T * M, D) and (B, T * M, V); the first `valid` rows exist.
    """

    def __init__(
        self, batch: int, capacity: int, locations: int, key_dim: int, value_dim: int, *,
        device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
    ):  # fmt: skip
        if capacity < 1:
            raise ValueError(f"capacity is {capacity}; a memory holds at least 1 frame")
        self.capacity = capacity
        self.locations = locations
        self.keys = torch.zeros(batch, capacity * locations, key_dim, device=device, dtype=dtype)
        self.values = torch.zeros(batch, capacity * locations, value_dim, device=device, dtype=dtype)
        self.frames: list[int | None] = [None] * capacity  # slot -> number of the frame it holds
        self._writes = 0

    @property
    def count(self) -> int:
        """How many slots are in use."""
        return min(self._writes, self.capacity)

    @property
    def valid(self) -> int:
        """How many leading rows of `keys` and `values` exist."""
        return self.count * self.locations

    def write(self, keys: Tensor, values: Tensor, frame: int) -> int | None:
        """Store one frame, keys (B, M, D) and values (B, M, V); returns the slot.

        A bank of capacity 1 keeps its first frame: later writes are refused (None).
        """
        slot = self._next_slot()
        if slot is None:
            return None
        rows = slice(slot * self.locations, (slot + 1) * self.locations)
        self.keys[:, rows] = keys
        self.values[:, rows] = values
        self.frames[slot] = frame
        self._writes += 1
        return slot

    def _next_slot(self) -> int | None:
        if self._writes < self.capacity:
            return self._writes
        if self.capacity == 1:
            return None
        return 1 + (self._writes - self.capacity) % (self.capacity - 1)

    def clear(self) -> None:
        """Forget every frame; the storage stays."""
        self._writes = 0
        self.frames = [None] * self.capacity

    def clone(self) -> MemoryBank:
        """An independent copy."""
        other = MemoryBank.__new__(MemoryBank)
        other.__dict__.update(self.__dict__)
        other.keys, other.values = self.keys.clone(), self.values.clone()
        other.frames = list(self.frames)
        return other


@dataclass(frozen=True)
class MemoryPolicy:
    """When a tracked frame is written (section 3.5)."""

    interval: int = 30
    """At least this many frames between two writes."""
    threshold: float = 0.7
    """The centre score must reach this."""

    def wants(self, frame: int, last_written: int, score: float) -> bool:
        return frame - last_written >= self.interval and score >= self.threshold
