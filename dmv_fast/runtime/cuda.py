"""A frame on an NVIDIA GPU: one upload, one CUDA graph, one small copy back, which is what is waited for."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dmv_fast.model.dmv import Prediction
from dmv_fast.model.pick import PickConfig
from dmv_fast.runtime import hardware
from dmv_fast.runtime.convolution import cudnn_search
from dmv_fast.runtime.frame import FrameStep, Seen
from dmv_fast.runtime.network import FastNetwork
from dmv_fast.runtime.pixels import GPU_CHANNELS
from dmv_fast.runtime.surroundings import inference
from dmv_fast.vision.crop import CROP_SIZE, MEAN, Window, cut, mean_colour

if TYPE_CHECKING:
    from torch.cuda import _POOL_HANDLE

_LARGEST = 1024  # side of a window that goes up whole, 3 MB; of a larger one, what is left at 256 x 256
_MOST = 24 << 20  # bytes of all windows of a frame; those that do not fit go up at 256 x 256, too
_CROP_BYTES = 3 * CROP_SIZE**2
_FIELDS = 9  # int32 a place: the 7 that kernels/crop.py wants of a window, then the target's size as float32
_WARM_UP = 3  # runs before a capture: kernels are compiled and convolutions chosen in them

# A process captures one graph at a time: torch.cuda.graph waits for the whole device as it begins, which must
# not meet another thread's capture.
_capturing = threading.RLock()


class CudaFrameStep(FrameStep):
    """FrameStep whose device work is recorded once, for a number of places, and replayed.

    What a replay reads and writes lies in buffers that never move: `_inbox` (windows, sizes, pixels), the
    ring, `_order` (which place is remembered in which slot), `_maps`, `_scores` and `_deltas` (what was seen)
    and `_answer`. It runs on the caller's current stream. The first `start` compiles and records.
    """

    network: FastNetwork
    _pool: _POOL_HANDLE | None  # of the graphs: they never run at the same time and leave nothing in it

    def __init__(self, network: FastNetwork, *, k: int, capacity: int, pick: PickConfig, targets: int = 1):
        self._fused = hardware.triton_runs(network.device)
        with torch.inference_mode():
            super().__init__(network, k=k, capacity=capacity, pick=pick, targets=targets)
            self._allocate(targets)

    def _allocate(self, targets: int) -> None:
        device, c = self.network.device, self.network.model.config
        anchors = len(c.anchor_ratios)
        self._pixels_at = -(-targets * _FIELDS * 4 // 256) * 256  # of the inbox: behind the header, aligned
        room = max(targets * _CROP_BYTES, min(targets * 3 * _LARGEST**2, _MOST))
        self._outbox = _host(self._pixels_at + room, torch.uint8, device)
        self._inbox = torch.zeros(self._pixels_at + room, dtype=torch.uint8, device=device)
        self._header = self._inbox[: targets * _FIELDS * 4].view(torch.int32).view(targets, _FIELDS)
        crop = (targets, CROP_SIZE, CROP_SIZE, GPU_CHANNELS)
        self._crops = torch.zeros(crop, dtype=self.network.dtype, device=device)
        self._mean = 255 * torch.tensor(MEAN[::-1], dtype=torch.float32, device=device)
        self._maps = self.network.new_maps(targets).zero_()
        self._scores = torch.zeros(targets, anchors, c.grid, c.grid, dtype=torch.float32, device=device)
        self._deltas = torch.zeros(targets, anchors, 4, c.grid, c.grid, dtype=torch.float32, device=device)
        self._answer = torch.zeros(targets, 5, dtype=torch.float32, device=device)
        self._answer_in = _host(targets * 5, torch.float32, device).view(targets, 5)
        self._order = torch.zeros(3, dtype=torch.int64, device=device)
        self._steps: dict[int, Callable[[], None]] = {}
        self._write: Callable[[], None] | None = None
        self._written: torch.cuda.Event | None = None  # behind the last write
        self._pool = None

    def crops(self, image: np.ndarray, windows: Sequence[Window]) -> Tensor:
        """The windows' pixels on the device, as the network takes them; good until the next crops or step."""
        with torch.inference_mode():
            self._upload(image, windows, np.ones((len(windows), 2)))
            crops = self._cut(len(windows))
            self._wait()  # the outbox may be written again
            return crops

    def start(self, target: int, image: np.ndarray, window: Window, box: Sequence[float]) -> None:
        with _capturing, inference(self.network.device):
            self._recorded_write()  # before anything else, so that convolutions are chosen here ...
            self._recorded_step(target + 1)  # ... and not in the middle of a video
            self._behind(self._written)
            super().start(target, image, window, box)
            self._wait()  # the next frame may come on another stream, which is not ordered behind this one
            self.seen = None

    def step(self, image: np.ndarray, windows: Sequence[Window], sizes: np.ndarray) -> np.ndarray:
        with inference(self.network.device):
            run = self._recorded_step(len(windows))
            self._behind(self._written)
            self._upload(image, windows, sizes)
            run()
            self.seen = Seen(self._maps, self._scores, self._deltas)
            self._answer_in.copy_(self._answer, non_blocking=True)
            self._wait()
            return self._answer_in[: len(windows)].double().numpy()

    def write(self, target: int, frame: int) -> bool:
        assert self.seen is not None, "write before step"
        with inference(self.network.device):
            run = self._recorded_write()
            self._behind(self._written)
            slot = self.memory.claim(target, frame)
            if slot is None:
                return False
            for place, number in enumerate((target, slot, self.memory.slots[target].valid)):
                self._order[place].fill_(number)
            run()
            self._written = self._mark()
            return True

    def move(self, source: int, target: int) -> None:
        self._behind(self._written)
        super().move(source, target)
        self._written = self._mark()

    def clone(self) -> CudaFrameStep:
        other = copy.copy(self)
        with torch.inference_mode():
            self._behind(self._written)
            other.memory = self.memory.clone()
            other._allocate(len(self.memory.slots))
            for name in ("_maps", "_scores", "_deltas"):
                getattr(other, name).copy_(getattr(self, name))
            self._wait()
        if self.seen is not None:
            other.seen = Seen(other._maps, other._scores, other._deltas)
        return other

    def choose(self, maps: Tensor, prediction: Prediction, sizes: Tensor) -> Tensor:
        n, seen = len(sizes), Seen(self._maps, self._scores, self._deltas)
        if self._fused:
            from dmv_fast.kernels.choose import choose

            anchors = self.network.model.anchors
            out = self._answer[:n], self._scores[:n], self._deltas[:n]
            choose(*prediction, anchors, self._window, sizes, self.pick, *out)
        else:
            self._answer[:n] = super().choose(maps, prediction, sizes)
            assert self.seen is not None, "the choice has just set it"
            self._scores[:n], self._deltas[:n] = self.seen.scores, self.seen.deltas
        if maps.data_ptr() != self._maps.data_ptr():
            self._maps[:n] = maps
        self.seen = seen
        return self._answer[:n]

    # ---- to the device and back ----------------------------------------------------------------------

    def _upload(self, image: np.ndarray, windows: Sequence[Window], sizes: np.ndarray) -> None:
        """Windows, sizes and the pixels that the windows hold, in one copy. The outbox must be free."""
        outbox, end = self._outbox.numpy(), self._pixels_at
        header = outbox[: self._header.nbytes].view(np.int32).reshape(self._header.shape)
        header[:] = 0
        header[: len(windows), 7:] = np.asarray(sizes, np.float32).view(np.int32)
        fill = functools.cache(lambda: _colour(image))
        for place, window in enumerate(windows):
            others = (len(windows) - 1 - place) * _CROP_BYTES
            room = len(outbox) - end - others if self._fused else 0
            pixels, fields = _patch(image, window, room, fill)
            outbox[end : end + pixels.size].reshape(pixels.shape)[:] = pixels
            header[place, :7] = (end - self._pixels_at, *fields)
            end += pixels.size
        self._inbox[:end].copy_(self._outbox[:end], non_blocking=True)

    def _wait(self) -> None:
        """Until what this object was asked for is done; other work on the stream is not waited for."""
        if (done := self._mark()) is not None:
            done.synchronize()

    def _mark(self) -> torch.cuda.Event | None:
        """An event behind what this object was asked for."""
        if self.network.device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.network.device))
        return event

    def _behind(self, event: torch.cuda.Event | None) -> None:
        """What comes now waits for it on the device, also on another stream than it was recorded on."""
        if event is not None:
            torch.cuda.current_stream(self.network.device).wait_event(event)

    # ---- on the device -------------------------------------------------------------------------------

    def _cut(self, n: int) -> Tensor:
        if not self._fused:  # they came at their final size
            crops = self._inbox[self._pixels_at : self._pixels_at + n * _CROP_BYTES]
            return crops.view(n, CROP_SIZE, CROP_SIZE, 3)
        from dmv_fast.kernels.crop import crop

        crop(self._inbox[self._pixels_at :], self._header[:n], self._mean, self._crops[:n])
        return self._crops[:n]

    def _look(self, n: int) -> None:
        network, memory = self.network, self.memory
        maps = network.look(self._cut(n), self._maps[:n])
        keys, values, valid = memory.keys[:n], memory.values[:n], memory.valid[:n]
        prediction = network.predict(maps, keys, values, self.k, valid)
        self.choose(maps, prediction, self._header.view(torch.float32)[:n, 7:])

    def _remember(self) -> None:
        target, slot, valid = self._order.split(1)
        seen = self._maps, self._scores, self._deltas
        keys, values = self.network.remember(*(part.index_select(0, target) for part in seen))
        memory = self.memory
        for storage, new in ((memory.keys, keys), (memory.values, values)):
            slots = storage.unflatten(1, (-1, memory.locations))  # (targets, T, M, width)
            slots.index_put_((target, slot), new)
        memory.valid.index_copy_(0, target, valid.int())

    # ---- recorded ------------------------------------------------------------------------------------

    def _recorded_step(self, n: int) -> Callable[[], None]:
        """What does n places, and maybe some more whose answers nobody reads."""
        n = min(_served(n), len(self.memory.slots))
        if n not in self._steps:
            self._steps[n] = self._record(lambda: self._look(n))
        return self._steps[n]

    def _recorded_write(self) -> Callable[[], None]:
        if self._write is None:
            memory = self.memory
            rows = slice(memory.locations)  # place 0, slot 0: where runs before the capture write
            touched = memory.keys[0, rows], memory.values[0, rows], memory.valid
            kept = [part.clone() for part in touched]
            self._order.zero_()
            self._write = self._record(self._remember)
            for part, content in zip(touched, kept, strict=True):
                part.copy_(content)
        return self._write

    def _record(self, work: Callable[[], None]) -> Callable[[], None]:
        with _capturing:
            if self._pool is None:
                self._pool = _new_pool()
            return record(work, self.network.device, self._pool)


def record(work: Callable[[], None], device: torch.device, pool: _POOL_HANDLE) -> Callable[[], None]:
    """work as one CUDA graph: calling what is returned does it again, on whatever its buffers hold then."""
    stream, outer = _capture_stream(device), torch.cuda.current_stream(device)
    graph = torch.cuda.CUDAGraph()
    stream.wait_stream(outer)
    with torch.cuda.stream(stream):
        with cudnn_search(True):
            for _ in range(_WARM_UP):
                work()
        with (
            _nothing_collected(),
            torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
        ):
            work()
    outer.wait_stream(stream)
    return graph.replay


@contextlib.contextmanager
def _nothing_collected() -> Iterator[None]:
    """A graph that the collector destroys in the capturing thread would invalidate the capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Of high priority, so that it is none of those PyTorch hands out: work of others would be captured."""
    return torch.cuda.Stream(device, priority=-1)


def _new_pool() -> _POOL_HANDLE:
    return torch.cuda.graph_pool_handle()


def _served(n: int) -> int:
    """1, 2, 3, 4, 6, 8, 12, 16, 24 ..: recording takes a moment, so one graph serves several numbers."""
    power = 1 << (n - 1).bit_length()
    return 3 * power // 4 if power >= 4 and 4 * n <= 3 * power else power


def _host(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Host memory that the device copies from and to by itself."""
    return torch.zeros(size, dtype=dtype, device="cpu", pin_memory=device.type == "cuda")


def _patch(
    image: np.ndarray, window: Window, room: int, fill: Callable[[], int]
) -> tuple[np.ndarray, tuple[int, ...]]:
    """What of a window lies in the frame (h, w, 3); its w, h, left, top, its side, the fill colour.

    Made 256 x 256 here already where it is very large or takes more than `room` bytes.
    """
    height, width = image.shape[:2]
    left, top = (min(max(at, 0), end) for at, end in ((window.x0, width), (window.y0, height)))
    right = min(max(window.x0 + window.side, left), width)
    bottom = min(max(window.y0 + window.side, top), height)
    if window.side > _LARGEST or 3 * (right - left) * (bottom - top) > room:
        return cut(image, window), (CROP_SIZE, CROP_SIZE, 0, 0, CROP_SIZE, 0)
    inside = right - left == window.side and bottom - top == window.side
    fields = (right - left, bottom - top, left - window.x0, top - window.y0, window.side)
    return image[top:bottom, left:right], (*fields, 0 if inside else fill())


def _colour(image: np.ndarray) -> int:
    """The frame's mean colour as B + 256 G + 65536 R."""
    return sum(int(colour) << (8 * i) for i, colour in enumerate(mean_colour(image).round()))
