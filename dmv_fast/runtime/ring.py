"""The memories of all targets of a stream, in one piece, so that one call reads them all."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from dmv_fast.model.memory import MemoryBank
from dmv_fast.runtime.network import Network


class Ring:
    """`targets` memory banks of `capacity` frames behind each other; each is a MemoryBank over its part.

    keys (targets, T * M, D) and values (targets, T * M, value_width), allocated once.
    """

    def __init__(self, network: Network, targets: int, capacity: int):
        model, where = network.model, {"device": network.device, "dtype": network.dtype}
        shape = (capacity, model.locations, model.config.key_dim, network.value_width)
        rows = capacity * model.locations
        self.keys = torch.zeros(targets, rows, shape[2], **where)
        self.values = torch.zeros(targets, rows, shape[3], **where)
        self.valid = torch.zeros(targets, dtype=torch.int32, device=network.device)
        self.banks = [MemoryBank(1, *shape, device="meta") for _ in range(targets)]
        self._attach()

    def _attach(self) -> None:
        for i, bank in enumerate(self.banks):
            bank.keys, bank.values = self.keys[i : i + 1], self.values[i : i + 1]

    def clear(self, target: int) -> None:
        """Forget what is remembered of a target."""
        self.banks[target].clear()
        self.valid[target] = 0

    def write(self, target: int, keys: Tensor, values: Tensor, frame: int) -> bool:
        """Store one frame, keys (1, M, D), values (1, M, value_width); False where the bank refuses it."""
        slot = self.banks[target].write(keys, values, frame)
        self.valid[target] = self.banks[target].valid
        return slot is not None

    def move(self, source: int, target: int) -> None:
        """Put one target's memory in another's place; the source's stays as it is."""
        for storage in (self.keys, self.values, self.valid):
            storage[target] = storage[source]
        self.banks[target] = copy.copy(self.banks[source])
        self.banks[target].frames = list(self.banks[source].frames)
        self._attach()

    def clone(self) -> Ring:
        """An independent copy."""
        other = copy.copy(self)
        other.keys, other.values, other.valid = self.keys.clone(), self.values.clone(), self.valid.clone()
        other.banks = [copy.copy(bank) for bank in self.banks]
        for bank in other.banks:
            bank.frames = list(bank.frames)
        other._attach()
        return other
