"""The memories of all targets of a stream, in one piece, so that one call reads them all."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from dmv_fast.model.memory import MemoryBank
from dmv_fast.runtime.network import Network


class Ring:
    """keys (targets, T * M, key_width) and values (targets, T * M, value_width), allocated once.

    valid (targets,) int32 on the device: how many leading rows of each exist. Which slot is written next is
    MemoryBank's to say: `banks` are such without storage.
    """

    def __init__(self, network: Network, targets: int, capacity: int):
        self.locations, device = network.model.locations, network.device
        shape = (capacity, self.locations, network.key_width, network.value_width)
        rows = capacity * self.locations
        self.keys = torch.zeros(targets, rows, network.key_width, dtype=network.key_dtype, device=device)
        self.values = torch.zeros(targets, rows, network.value_width, dtype=network.dtype, device=device)
        self.valid = torch.zeros(targets, dtype=torch.int32, device=device)
        self.banks = [MemoryBank(1, *shape, device="meta") for _ in range(targets)]

    def clear(self, target: int) -> None:
        """Forget what is remembered of a target."""
        self.banks[target].clear()
        self.valid[target] = 0

    def claim(self, target: int, frame: int) -> int | None:
        """The slot that a frame is now to be written to; None where the memory refuses it."""
        bank = self.banks[target]
        nothing = torch.empty((), device="meta")
        return bank.write(nothing, nothing, frame)

    def write(self, target: int, keys: Tensor, values: Tensor, frame: int) -> bool:
        """Store one frame, keys (1, M, ...) and values (1, M, ...); False where the memory refuses it."""
        slot = self.claim(target, frame)
        if slot is None:
            return False
        rows = slice(slot * self.locations, (slot + 1) * self.locations)
        self.keys[target, rows] = keys[0]
        self.values[target, rows] = values[0]
        self.valid[target] = self.banks[target].valid
        return True

    def move(self, source: int, target: int) -> None:
        """Put one target's memory in another's place; the source's stays as it is."""
        for storage in (self.keys, self.values, self.valid):
            storage[target] = storage[source]
        self.banks[target] = _copied(self.banks[source])

    def clone(self) -> Ring:
        """An independent copy."""
        other = copy.copy(self)
        other.keys, other.values, other.valid = self.keys.clone(), self.values.clone(), self.valid.clone()
        other.banks = [_copied(bank) for bank in self.banks]
        return other


def _copied(bank: MemoryBank) -> MemoryBank:
    other = copy.copy(bank)
    other.frames = list(bank.frames)
    return other
