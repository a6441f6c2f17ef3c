"""A frame on an NVIDIA GPU: one upload, one CUDA graph, one small copy back, which is what is waited for."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dmv_fast.model.pick import PickConfig
from dmv_fast.runtime.frame import FrameStep
from dmv_fast.runtime.network import FastNetwork
from dmv_fast.vision.crop import CROP_SIZE, MEAN, Window, cut, mean_colour

_LARGEST = (
    1024  # side of a window that is uploaded whole, 3 MB; a larger one is made 256 x 256 on the CPU first
)
_FIELDS = 9  # int32 a place: the 7 that kernels/crop.py wants of a window, then the target's size as float32
_WARM_UP = 3  # runs before a capture: kernels are compiled and convolutions chosen in them


class _Recorded(NamedTuple):
    step: Callable[[], None]
    write: Callable[[], None]
    seen: tuple[Tensor, Tensor, Tensor]


class CudaFrameStep(FrameStep):
    """FrameStep whose device work, for each number of places in use, is recorded once and replayed.

    What a replay reads lies in buffers that never move: `_inbox` (windows, sizes, pixels), `_order` (which
    place is remembered in which slot) and the ring; `_answer` is what it says. The first `start` compiles.
    """

    def __init__(self, network: FastNetwork, *, k: int, capacity: int, pick: PickConfig, targets: int = 1):
        super().__init__(network, k=k, capacity=capacity, pick=pick, targets=targets)
        self._allocate(targets)

    def _allocate(self, targets: int) -> None:
        device = self.network.device
        self._header = targets * _FIELDS * 4
        size = self._header + targets * 3 * _LARGEST**2
        self._outbox = _host(size, torch.uint8, device)
        self._inbox = torch.zeros(size, dtype=torch.uint8, device=device)
        self._order_out = _host(targets * 3, torch.int64, device).view(targets, 3)
        self._order = torch.zeros(3, dtype=torch.int64, device=device)
        self._answer = torch.zeros(targets, 5, device=device)
        self._answer_in = _host(targets * 5, torch.float32, device).view(targets, 5)
        self._mean = 255 * torch.tensor(MEAN[::-1], device=device)
        self._recorded: dict[int, _Recorded] = {}

    def crops(self, image: np.ndarray, windows: Sequence[Window]) -> Tensor:
        """The windows' pixels less the mean colour: (n, 256, 256, 3) in the network's dtype."""
        self._upload(image, windows, np.ones((len(windows), 2)))
        return self._cut(len(windows))

    def start(self, target: int, image: np.ndarray, window: Window, box: Sequence[float]) -> None:
        super().start(target, image, window, box)
        self._record(1)

    def step(self, image: np.ndarray, windows: Sequence[Window], sizes: np.ndarray) -> np.ndarray:
        n = len(windows)
        recorded = self._record(n)
        self._upload(image, windows, sizes)
        recorded.step()
        self._seen = recorded.seen
        self._answer_in.copy_(self._answer, non_blocking=True)
        torch.cuda.current_stream(self.network.device).synchronize()
        return self._answer_in[:n].double().numpy()

    def write(self, target: int, frame: int) -> bool:
        assert self._seen is not None, "write before step"
        slot = self.memory.claim(target, frame)
        if slot is None:
            return False
        order = self._order_out[target]  # each place's own: the copies of others may still be under way
        order[:] = torch.tensor([target, slot, self.memory.banks[target].valid])
        self._order.copy_(order, non_blocking=True)
        self._record(len(self._seen[0])).write()
        return True

    def clone(self) -> CudaFrameStep:
        other = copy.copy(self)
        with torch.inference_mode():
            other.memory = self.memory.clone()
            other._allocate(len(self.memory.banks))
        other._seen = None
        return other

    # ---- to the device -------------------------------------------------------------------------------

    def _upload(self, image: np.ndarray, windows: Sequence[Window], sizes: np.ndarray) -> None:
        """Windows, sizes and the pixels that the windows hold, in one copy."""
        outbox, end = self._outbox.numpy(), self._header
        header = outbox[: self._header].view(np.int32).reshape(-1, _FIELDS)
        for place, window in enumerate(windows):
            pixels, fields = _patch(image, window)
            outbox[end : end + pixels.size].reshape(pixels.shape)[:] = pixels
            header[place, :7] = (end - self._header, *fields)
            end += pixels.size
        header[: len(windows), 7:] = np.asarray(sizes, np.float32).view(np.int32)
        self._inbox[:end].copy_(self._outbox[:end], non_blocking=True)

    # ---- on the device -------------------------------------------------------------------------------

    def _cut(self, n: int) -> Tensor:
        from dmv_fast.kernels.crop import crop

        header = self._inbox[: self._header].view(torch.int32).view(-1, _FIELDS)
        size = (n, CROP_SIZE, CROP_SIZE, 3)
        pixels = torch.empty(size, dtype=self.network.dtype, device=self.network.device)
        crop(self._inbox[self._header :], header[:n], self._mean, pixels)
        return pixels

    def _run(self, n: int) -> None:
        header = self._inbox[: self._header].view(torch.float32).view(-1, _FIELDS)
        network, memory = self.network, self.memory
        maps = network.look(self._cut(n))
        valid = memory.valid[:n]
        prediction = network.predict(maps, memory.keys[:n], memory.values[:n], self.k, valid)
        self._answer[:n] = self.choose(maps, prediction, header[:n, 7:])

    def _remember(self, seen: tuple[Tensor, Tensor, Tensor]) -> None:
        target, slot, valid = self._order.split(1)
        keys, values = self.network.remember(*(part.index_select(0, target) for part in seen))
        memory = self.memory
        for storage, new in ((memory.keys, keys), (memory.values, values)):
            slots = storage.unflatten(1, (-1, memory.locations))  # (targets, T, M, width)
            slots.index_put_((target, slot), new)
        memory.valid.index_copy_(0, target, valid.int())

    def _record(self, n: int) -> _Recorded:
        if n not in self._recorded:
            with torch.inference_mode():
                step = record(lambda: self._run(n), self.network.device)
                seen = self._seen
                assert seen is not None
                memory = self.memory.clone()  # what is run before a capture writes to the ring
                write = record(lambda: self._remember(seen), self.network.device)
                for name in ("keys", "values", "valid"):
                    getattr(self.memory, name).copy_(getattr(memory, name))
            self._recorded[n] = _Recorded(step, write, seen)
        return self._recorded[n]


def record(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """work as one CUDA graph: calling what is returned does it again, on whatever its buffers hold then."""
    stream, outer = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(outer)
    graph = torch.cuda.CUDAGraph()
    # Convolutions are timed against each other before the capture; the user's own setting stays as it is.
    choosing = torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False, allow_tf32=False)
    with torch.cuda.stream(stream), choosing:
        for _ in range(_WARM_UP):
            work()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            work()
    outer.wait_stream(stream)
    return graph.replay


def _host(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Host memory that the device copies from and to by itself."""
    return torch.zeros(size, dtype=dtype, pin_memory=device.type == "cuda")


def _patch(image: np.ndarray, window: Window) -> tuple[np.ndarray, tuple[int, ...]]:
    """What of a window lies in the frame (h, w, 3); its w, h, left, top, its side, the fill colour."""
    if window.side > _LARGEST:
        return cut(image, window), (CROP_SIZE, CROP_SIZE, 0, 0, CROP_SIZE, 0)
    height, width = image.shape[:2]
    left, top = (min(max(at, 0), end) for at, end in ((window.x0, width), (window.y0, height)))
    right = min(max(window.x0 + window.side, left), width)
    bottom = min(max(window.y0 + window.side, top), height)
    fill = 0
    if right - left < window.side or bottom - top < window.side:
        fill = sum(int(colour) << (8 * i) for i, colour in enumerate(mean_colour(image).round()))
    fields = (right - left, bottom - top, left - window.x0, top - window.y0, window.side, fill)
    return image[top:bottom, left:right], fields
