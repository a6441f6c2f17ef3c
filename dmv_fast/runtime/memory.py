"""The memory bank: those of all targets of a stream in one piece, so that one call reads them all."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from dmv_fast.model.memory import FrameSlots
from dmv_fast.runtime.network import Network


class MemoryBank:
    """keys (targets, T * M, key_width) and values (targets, T * M, value_width), allocated once.

    valid (targets,) int32 on the device: how many leading rows of each exist. slots: which frame is where, a
    target each.
    """

    def __init__(self, network: Network, targets: int, capacity: int):
        self.locations, device = network.model.locations, network.device
        rows = capacity * self.locations
        self.keys = torch.zeros(targets, rows, network.key_width, dtype=network.key_dtype, device=device)
        self.values = torch.zeros(targets, rows, network.value_width, dtype=network.dtype, device=device)
        self.valid = torch.zeros(targets, dtype=torch.int32, device=device)
        self.slots = [FrameSlots(capacity, self.locations) for _ in range(targets)]

    def clear(self, target: int) -> None:
        """Forget what is remembered of a target."""
        self.slots[target].clear()
        self.valid[target] = 0

    def claim(self, target: int, frame: int) -> int | None:
        """The slot that a frame is now to be written to; None where the memory refuses it."""
        return self.slots[target].claim(frame)

    def write(self, target: int, keys: Tensor, values: Tensor, frame: int) -> bool:
        """Store one frame, keys (1, M, ...) and values (1, M, ...); False where the memory refuses it."""
        slot = self.claim(target, frame)
        if slot is None:
            return False
        rows = slice(slot * self.locations, (slot + 1) * self.locations)
        self.keys[target, rows] = keys[0]
        self.values[target, rows] = values[0]
        self.valid[target] = self.slots[target].valid
        return True

    def move(self, source: int, target: int) -> None:
        """Put one target's memory in another's place; the source's stays as it is."""
        for storage in (self.keys, self.values, self.valid):
            storage[target] = storage[source]
        self.slots[target] = self.slots[source].clone()

    def clone(self) -> MemoryBank:
        """An independent copy."""
        other = copy.copy(self)
        other.keys, other.values, other.valid = self.keys.clone(), self.values.clone(), self.valid.clone()
        other.slots = [slots.clone() for slots in self.slots]
        return other
