"""One frame of one stream: crops, network, box choice and memory, for one target or several at once."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dmv_fast.model.dmv import Prediction
from dmv_fast.model.pick import PickConfig, cosine_window
from dmv_fast.runtime.choice import choose, choose_reference
from dmv_fast.runtime.memory import MemoryBank
from dmv_fast.runtime.network import Network, PlainNetwork
from dmv_fast.runtime.surroundings import inference
from dmv_fast.vision.crop import CROP_SIZE, Window, cut


@functools.cache
def _cutters(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads that cut crops. Keyed by process: after a fork the parent's pool has no threads."""
    return ThreadPoolExecutor(threads, thread_name_prefix="crop")


class Seen(NamedTuple):
    """What a step saw of n targets, for the memory."""

    maps: Tensor
    """(n, H, W, D or more), as Network.look gives them."""
    scores: Tensor
    """(n, A, H, W) in [0, 1]."""
    deltas: Tensor
    """(n, A, 4, H, W)."""


class FrameStep:
    """Runs a network over the first n of `targets` places, each a target with a memory of its own.

    Args:
        k: candidates K that vote at each location.
        capacity: T, frames a memory holds.
        targets: places to allocate memory for.
    """

    def __init__(self, network: Network, *, k: int, capacity: int, pick: PickConfig, targets: int = 1):
        self.network, self.k, self.pick = network, k, pick
        self.memory = MemoryBank(network, targets, capacity)
        config = network.model.config
        window = cosine_window(len(config.anchor_ratios), config.grid, device=network.device)
        self._window = window.contiguous()  # (A, H, W)
        self._anchors = network.model.anchors.contiguous()  # (A, H, W, 4)
        self._choose = choose_reference if isinstance(network, PlainNetwork) else choose
        self.seen: Seen | None = None  # by the last step

    def start(self, target: int, image: np.ndarray, window: Window, box: Sequence[float]) -> None:
        """Make the target at box (xywh, frame pixels) what the place remembers, as its frame 0.

        image: (H, W, 3) uint8 BGR; window: the search window around the box.
        """
        network = self.network
        where = torch.tensor(window.to_crop(box)[None], dtype=torch.float32, device=network.device)
        with inference(self.network.device):
            maps = network.look(self.crops(image, [window]))
            keys, values = network.remember(maps, *network.model.exact_maps(where))
            self.memory.clear(target)
            self.memory.write(target, keys, values, 0)

    def step(self, image: np.ndarray, windows: Sequence[Window], sizes: np.ndarray) -> np.ndarray:
        """The next frame for the first n places.

        windows: n search windows; sizes: (n, 2) last width and height in crop pixels
        -> (n, 5) float64: the chosen box xywh in crop pixels, and its score.
        """
        with inference(self.network.device):
            expected = torch.tensor(sizes, dtype=torch.float32, device=self.network.device)
            return self._forward(self.crops(image, windows), expected).double().cpu().numpy()

    def write(self, target: int, frame: int) -> bool:
        """Remember the last step's frame, as it was seen and predicted; False where the memory refuses it."""
        assert self.seen is not None, "write before step"
        with inference(self.network.device):
            seen = (part[target : target + 1] for part in self.seen)
            return self.memory.write(target, *self.network.remember(*seen), frame)

    def move(self, source: int, target: int) -> None:
        """Put one place's target in another's place, the memory with it."""
        with torch.inference_mode():
            self.memory.move(source, target)

    def clone(self) -> FrameStep:
        """An independent copy; the network is shared."""
        other = copy.copy(self)
        with torch.inference_mode():
            other.memory = self.memory.clone()
        return other

    # ---- a step's first and last stage ---------------------------------------------------------------

    def crops(self, image: np.ndarray, windows: Sequence[Window]) -> Tensor:
        """The windows' pixels, resized: (n, 256, 256, 3) uint8 BGR on the network's device."""
        crops = np.empty((len(windows), CROP_SIZE, CROP_SIZE, 3), np.uint8)

        def fill(place: int) -> None:
            crops[place] = cut(image, windows[place])

        if len(windows) == 1:
            fill(0)
        else:  # OpenCV works outside of Python's lock: a millisecond a crop, shared by the cores
            list(_cutters(os.getpid(), torch.get_num_threads()).map(fill, range(len(windows))))
        return torch.from_numpy(crops).to(self.network.device)

    def choose(self, maps: Tensor, prediction: Prediction, sizes: Tensor) -> Tensor:
        """Each place's best box and its score, (n, 5) on the device; what was seen is kept for `write`."""
        chosen, scores = self._choose(prediction, self._anchors, self._window, sizes, self.pick)
        self.seen = Seen(maps, scores, prediction.deltas)
        return chosen

    def _forward(self, crops: Tensor, sizes: Tensor) -> Tensor:
        """crops (n, 256, 256, 3) uint8, sizes (n, 2) -> (n, 5) float32 on the device."""
        n, memory, network = len(crops), self.memory, self.network
        valid = memory.slots[0].valid if len(memory.slots) == 1 else memory.valid[:n]
        maps = network.look(crops)
        prediction = network.predict(maps, memory.keys[:n], memory.values[:n], self.k, valid)
        return self.choose(maps, prediction, sizes)
