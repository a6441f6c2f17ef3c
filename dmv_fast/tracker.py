"""One target in one stream: crop -> network -> box -> memory (paper section 3.5)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import cv2
import numpy as np
import torch

from dmv_fast import ops
from dmv_fast.model.memory import MemoryPolicy
from dmv_fast.model.pick import PickConfig
from dmv_fast.runtime.frame import FrameStep
from dmv_fast.runtime.load import load_network, make_frame_step
from dmv_fast.vision.crop import Window, search_window

_SMALLEST = 2.0  # pixels; a box never shrinks below


@dataclass(frozen=True)
class TrackerConfig:
    """How a tracker uses its network; the defaults are the paper's where it says (section 3.5)."""

    capacity: int = 32
    """T: frames the memory holds, the first among them."""
    policy: MemoryPolicy = field(default_factory=MemoryPolicy)
    """When a frame is written to it."""
    pick: PickConfig = field(default_factory=PickConfig)
    """How the box is chosen."""
    found_score: float = 0.3
    """Below this centre score the target is lost: the box stays where it was and nothing is remembered."""
    refound_score: float = 0.5
    """The centre score at which a lost target is found again. More than staying found takes: while a target
    is out of sight its like is seen at many places, and one that is believed is not left again."""
    search_home: int = 3
    """Every so many frames of a loss one looks at the last place, as most come back where they were hidden;
    the others look at the places around (`search_width`). At 1 all look at the last place."""
    search_width: float = 1.25
    """How much wider than usual the windows at those places are: the wider, the fewer it takes, and the
    smaller and less often found is the target in them."""
    search_patience: int = 60
    """Frames of a loss in which the search keeps to the side of the frame on which the target left, or to
    about a window's width around where it was hidden; after these it goes over the whole frame."""


class TrackResult(NamedTuple):
    """What `FastDMVTracker.track` says of a frame."""

    box: tuple[float, float, float, float]
    """xywh in pixels of the frame, 0-based."""
    score: float
    """Centre probability of the chosen box, 0 to 1."""
    found: bool
    """False: the target is lost, `box` is the last one found, and the search goes on around it."""
    memory_written: bool


class FastDMVTracker:
    """Tracks one object, chosen by its box in the first frame. A drop-in for `cv2.Tracker`.

    Trackers in one process share their weights. One tracker belongs to one thread at a time; different
    trackers run in different threads.

    Args:
        weights: a shipped name ("dmv18") or a .safetensors file.
        k: candidates K that vote at each location, 1 to 32; None: the checkpoint's own.
        device: "auto" (a CUDA GPU if there is one), "cpu", "cuda", "cuda:1" ...
        dtype: "auto", "float32", "bfloat16", "float16"; or, on a CPU with AMX, "bfloat16x3": float32 within
            some 1e-5, large products made of two or three in bfloat16. "auto": bfloat16x3 where it runs,
            float16 on a GPU, else float32, unless bfloat16 is the quicker one there.
        backend: of the retrieval: "auto", "reference", "cpu", "triton" or "cuda". "reference" in float32 is
            the plain PyTorch network, all else the folded one.
        config: how the network is used; None: `TrackerConfig()`.

    Raises:
        ValueError: unknown weights, device, dtype or backend, or K out of range.
    """

    def __init__(
        self, weights: str = "dmv18", k: int | None = None, device: str = "auto", dtype: str = "auto",
        backend: str = "auto", config: TrackerConfig | None = None,
    ):  # fmt: skip
        self.config = TrackerConfig() if config is None else config
        self._frames = frame_step_for(weights, k, device, dtype, backend, self.config)
        self._target: Target | None = None

    # ---- the OpenCV interface ----------------------------------------------------------------------

    def init(self, image: np.ndarray, boundingBox: Sequence[float]) -> None:  # noqa: N803 (cv2's name)
        """Start on a target; a second call starts anew.

        Args:
            image: (H, W, 3) uint8 BGR; grey (H, W) or (H, W, 1) and BGRA (H, W, 4) are converted.
            boundingBox: x, y, w, h in pixels, 0-based; ints or floats. It may reach outside the frame.

        Raises:
            TypeError, ValueError: an image or box that cannot be used; the state is then as before.
        """
        image = as_bgr(image)
        box = check_box(boundingBox, image.shape[1], image.shape[0])
        self._frames.start(0, image, search_window(box), box)
        self._target = Target(box, image)

    def update(self, image: np.ndarray) -> tuple[bool, tuple[int, int, int, int]]:
        """Next frame, as `cv2.Tracker.update`: (found, box rounded to int). Not found: the last box."""
        result = self.track(image)
        x, y, w, h = (round(v) for v in result.box)
        return result.found, (x, y, w, h)

    def getTrackingScore(self) -> float:  # noqa: N802 (cv2's name)
        """Score of the last frame, 0 to 1."""
        return 0.0 if self._target is None else self._target.score

    # ---- the same, unrounded -----------------------------------------------------------------------

    def track(self, image: np.ndarray) -> TrackResult:
        """Next frame (as in `init`, of the same size) -> TrackResult.

        Raises:
            RuntimeError: `init` was not called.
            TypeError, ValueError: an image that cannot be used; the state is then as before.
        """
        if self._target is None:
            raise RuntimeError("track before init: call init(image, box) on the first frame")
        image = as_bgr(image)
        self._target.check_size(image)
        window, size = self._target.look(self.config)
        (answer,) = self._frames.step(image, [window], np.array([size]))
        return self._target.settle(window, answer, self.config, lambda frame: self._frames.write(0, frame))

    def clone(self) -> FastDMVTracker:
        """An independent tracker in the same state; the weights are shared."""
        other = copy.copy(self)
        other._frames = self._frames.clone()
        other._target = copy.copy(self._target)
        return other

    def __deepcopy__(self, memo: dict) -> FastDMVTracker:
        return self.clone()


class Target:
    """Where one target is and when it was remembered; says where to look next and judges what was found."""

    def __init__(self, box: tuple[float, float, float, float], image: np.ndarray):
        self.box = box
        self.score = 1.0
        self._size = (image.shape[1], image.shape[0])
        self._frame = self._last_written = 0
        self._lost = 0  # frames since it was last found
        self._whole = box[2:]  # its size when last found clear of the frame's sides, which cut it
        self._places: list[tuple[float, float]] = []  # centres to search at when lost
        self._near = 0  # how many of these, the first, are near where it was lost

    def look(self, config: TrackerConfig) -> tuple[Window, np.ndarray]:
        """The search window, and the width and height to expect in it (2,), in crop pixels."""
        if not self._lost:
            window = search_window(self.box)
            return window, window.to_crop(self.box)[2:]
        box = self._whole_box()
        rounds, turn = divmod(self._lost - 1, config.search_home)
        if turn:
            count = self._near if self._lost <= config.search_patience else len(self._places)
            cx, cy = self._places[(rounds * (config.search_home - 1) + turn - 1) % count]
            w, h = box[2:]
            window = search_window((cx - w / 2, cy - h / 2, w, h), scale=config.search_width)
        else:
            window = search_window(box)
        return window, window.to_crop(box)[2:]

    def settle(
        self, window: Window, answer: np.ndarray, config: TrackerConfig, write: Callable[[int], bool]
    ) -> TrackResult:
        """Take a frame's answer (5,): box xywh in crop pixels, score. write: remembers it by its number."""
        self._frame += 1
        self.score = float(answer[4])
        found = self.score >= (config.refound_score if self._lost else config.found_score)
        self._lost = 0 if found else self._lost + 1
        if self._lost == 1:
            self._places, self._near = self._sweep(config.search_width)
        written = False
        if found:
            self.box = self._keep_in_frame(window.to_frame(answer[:4]))
            if self._is_clear():
                self._whole = self.box[2:]
            if config.policy.wants(self._frame, self._last_written, self.score):
                written = write(self._frame)
                self._last_written = self._frame
        return TrackResult(self.box, self.score, found, written)

    def _is_clear(self) -> bool:
        """Whether the box keeps a twentieth of its size from every side of the frame."""
        return all(
            start > 0.05 * size and start + size < length - 0.05 * size
            for start, size, length in zip(self.box[:2], self.box[2:], self._size, strict=True)
        )

    def _whole_box(self) -> tuple[float, float, float, float]:
        """The last box at the target's full size: as it left the frame, its box was but a part of it."""
        x, y, w, h = self.box
        whole_w, whole_h = max(w, self._whole[0]), max(h, self._whole[1])
        return x + (w - whole_w) / 2, y + (h - whole_h) / 2, whole_w, whole_h

    def _sweep(self, scale: float) -> tuple[list[tuple[float, float]], int]:
        """Centres of windows that cover the frame, and how many of them, the first, are near.

        Near: in the outermost row or column at a side by which the target left, that is, from which its
        centre was less than its size away; without such a side, within a window's width. Nearest first.
        """
        x, y, w, h = self._whole_box()
        cx, cy = x + w / 2, y + h / 2
        side = search_window((x, y, w, h)).side * scale
        pitch = max(side - math.sqrt(w * h), 1.0)
        width, height = self._size
        columns, rows = _spread(width, w, side, pitch), _spread(height, h, side, pitch)
        left_by_x = {x for x, gap in ((columns[0], cx), (columns[-1], width - cx)) if gap < w}
        left_by_y = {y for y, gap in ((rows[0], cy), (rows[-1], height - cy)) if gap < h}

        def is_near(px: float, py: float) -> bool:
            if left_by_x or left_by_y:
                return px in left_by_x or py in left_by_y
            return max(abs(px - cx), abs(py - cy)) < side

        places = [(px, py) for py in rows for px in columns]
        places.sort(key=lambda at: (not is_near(*at), abs(at[0] - cx) + abs(at[1] - cy)))
        return places, sum(is_near(*at) for at in places)

    def check_size(self, image: np.ndarray) -> None:
        """ValueError unless the image has the size of the frame in which the target was chosen."""
        size = (image.shape[1], image.shape[0])
        if size != self._size:
            raise ValueError(
                f"image is {size[0]} x {size[1]}; the target was chosen in a frame of "
                f"{self._size[0]} x {self._size[1]}: resize the frame, or call init again"
            )

    def _keep_in_frame(self, box: np.ndarray) -> tuple[float, float, float, float]:
        """The centre stays in the frame and the size between 2 pixels and the frame's."""
        width, height = self._size
        cx = min(max(box[0] + box[2] / 2, 0.0), width)
        cy = min(max(box[1] + box[3] / 2, 0.0), height)
        w = min(max(box[2], _SMALLEST), max(width, _SMALLEST))
        h = min(max(box[3], _SMALLEST), max(height, _SMALLEST))
        return float(cx - w / 2), float(cy - h / 2), float(w), float(h)


def _spread(length: float, extent: float, side: float, pitch: float) -> list[float]:
    """Centres of windows of that side, at most a pitch apart, that cover a frame's axis of that length.

    A target of that extent at the frame's edge is whole in the outermost one, as far in as that allows.
    """
    count = max(1, math.ceil((length - extent) / pitch))
    rim = min((side - extent) / 2, length / 2)
    return [min(max((i + 0.5) * length / count, rim), length - rim) for i in range(count)]


def frame_step_for(
    weights: str, k: int | None, device: str, dtype: str, backend: str, config: TrackerConfig,
    targets: int = 1,
) -> FrameStep:  # fmt: skip
    """FastDMVTracker's arguments, checked, as what runs a frame; the network is shared."""
    where = _resolve_device(device)
    network = load_network(str(weights), where, dtype, _resolve_backend(backend, where))
    k = network.model.config.candidates if k is None else k
    if not 1 <= k <= 32:
        raise ValueError(f"k is {k}; it must be 1 to 32")
    return make_frame_step(network, k=k, capacity=config.capacity, pick=config.pick, targets=targets)


def as_bgr(image: np.ndarray) -> np.ndarray:
    """Any image a person would call a frame -> (H, W, 3) uint8 BGR; else one clear error."""
    if not isinstance(image, np.ndarray):
        raise TypeError(f"image is {type(image).__name__}; it must be a numpy array (H, W, 3) uint8 BGR")
    if image.dtype != np.uint8:
        raise TypeError(f"image is {image.dtype}; it must be uint8 (0 to 255)")
    if image.size == 0:
        raise ValueError(f"image has shape {image.shape}; it holds no pixel (was the frame read at all?)")
    if image.ndim == 2:
        return cv2.cvtColor(image, cv2.COLOR_GRAY2BGR)
    if image.ndim == 3 and image.shape[2] == 1:
        return cv2.cvtColor(image[:, :, 0], cv2.COLOR_GRAY2BGR)
    if image.ndim == 3 and image.shape[2] == 4:
        return image[:, :, :3]
    if image.ndim == 3 and image.shape[2] == 3:
        return image
    raise ValueError(
        f"image has shape {image.shape}; it must be (H, W, 3) BGR, (H, W) grey or (H, W, 4) BGRA"
    )


def check_box(box: Sequence[float], width: int, height: int) -> tuple[float, float, float, float]:
    """A box xywh that touches the frame, as floats; else one clear error."""
    try:
        x, y, w, h = (float(v) for v in box)
    except (TypeError, ValueError):
        raise ValueError(f"box is {box!r}; it must be four numbers x, y, w, h") from None
    if not all(math.isfinite(v) for v in (x, y, w, h)):
        raise ValueError(f"box is {(x, y, w, h)}; all four numbers must be finite")
    if w <= 0 or h <= 0:
        raise ValueError(f"box is {(x, y, w, h)}; width and height must be positive")
    if x >= width or y >= height or x + w <= 0 or y + h <= 0:
        raise ValueError(f"box is {(x, y, w, h)}; it lies wholly outside the {width} x {height} frame")
    return x, y, w, h


def _resolve_device(name: str) -> torch.device:
    if name == "auto":
        return (
            torch.device("cuda", torch.cuda.current_device())
            if torch.cuda.is_available()
            else torch.device("cpu")
        )
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device is {name!r}; try auto, cpu, cuda or cuda:0") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {name!r}; PyTorch sees no CUDA GPU here (see `dmv-fast doctor`)")
    return device


def _resolve_backend(name: str, device: torch.device) -> str:
    if name == "auto":
        return name
    reasons = ops.available_backends(device.type)
    if name not in reasons:
        raise ValueError(f"backend is {name!r}; it must be auto or one of {sorted(reasons)}")
    if reasons[name] is not None:
        raise ValueError(f"backend {name!r} cannot be used on {device.type}: {reasons[name]}")
    return name
