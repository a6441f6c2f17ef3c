"""One target in one stream: crop -> network -> box -> memory (paper section 3.5)."""

from __future__ import annotations

import copy
import functools
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from dmv_fast import ops
from dmv_fast.model.dmv import DMV
from dmv_fast.model.memory import MemoryBank, MemoryPolicy
from dmv_fast.model.pick import PickConfig, cosine_window, pick
from dmv_fast.vision.crop import cut, normalise, search_window
from dmv_fast.weights import load_model

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
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
    found_score: float = 0.25
    """Below this centre score the target counts as not found; the box then stays where it was."""


class TrackResult(NamedTuple):
    """What `FastDMVTracker.track` says of a frame."""

    box: tuple[float, float, float, float]
    """xywh in pixels of the frame, 0-based."""
    score: float
    """Centre probability of the chosen box, 0 to 1."""
    found: bool
    """False: the score is under `TrackerConfig.found_score` and `box` is the last one found."""
    memory_written: bool


class FastDMVTracker:
    """Tracks one object, chosen by its box in the first frame. A drop-in for `cv2.Tracker`.

    Trackers in one process share their weights. One tracker belongs to one thread at a time; different
    trackers run in different threads.

    Args:
        weights: a shipped name ("dmv18") or a .safetensors file.
        k: candidates K that vote at each location, 1 to 32; None: the checkpoint's own.
        device: "auto" (a CUDA GPU if there is one), "cpu", "cuda", "cuda:1" ...
        dtype: "auto", "float32", "bfloat16" or "float16".
        backend: of the retrieval: "auto", "reference", "cpu", "triton" or "cuda".
        config: how the network is used; None: `TrackerConfig()`.

    Raises:
        ValueError: unknown weights, device, dtype or backend, or K out of range.
    """

    def __init__(
        self, weights: str = "dmv18", k: int | None = None, device: str = "auto", dtype: str = "auto",
        backend: str = "auto", config: TrackerConfig | None = None,
    ):  # fmt: skip
        self.config = TrackerConfig() if config is None else config
        self._device = _resolve_device(device)
        self._dtype = _resolve_dtype(dtype, self._device)
        self._backend = _resolve_backend(backend, self._device)
        self._model = shared_model(str(weights), self._device, self._dtype)
        self._k = self._model.config.candidates if k is None else k
        if not 1 <= self._k <= 32:
            raise ValueError(f"k is {k}; it must be 1 to 32")
        grid, anchors = self._model.config.grid, len(self._model.config.anchor_ratios)
        self._window = cosine_window(anchors, grid, device=self._device)
        self._memory: MemoryBank = self._model.new_memory(1, self.config.capacity)
        self._box: tuple[float, float, float, float] | None = None
        self._size: tuple[int, int] = (0, 0)
        self._frame = self._last_written = 0
        self._score = 0.0

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
        window = search_window(box)
        with torch.inference_mode():
            features = self._features(image, window)
            target = torch.tensor(window.to_crop(box), dtype=torch.float32, device=self._device)
            maps = self._model.exact_maps(target[None])
            self._memory.clear()
            self._memory.write(*self._remember(features, *maps), frame=0)
        self._box, self._size = box, (image.shape[1], image.shape[0])
        self._frame = self._last_written = 0
        self._score = 1.0

    def update(self, image: np.ndarray) -> tuple[bool, tuple[int, int, int, int]]:
        """Next frame, as `cv2.Tracker.update`: (found, box rounded to int). Not found: the last box."""
        result = self.track(image)
        x, y, w, h = (round(v) for v in result.box)
        return result.found, (x, y, w, h)

    def getTrackingScore(self) -> float:  # noqa: N802 (cv2's name)
        """Score of the last frame, 0 to 1."""
        return self._score

    # ---- the same, unrounded -----------------------------------------------------------------------

    def track(self, image: np.ndarray) -> TrackResult:
        """Next frame (as in `init`, of the same size) -> TrackResult.

        Raises:
            RuntimeError: `init` was not called.
            TypeError, ValueError: an image that cannot be used; the state is then as before.
        """
        if self._box is None:
            raise RuntimeError("track before init: call init(image, box) on the first frame")
        image = as_bgr(image)
        self._check_size(image)
        with torch.inference_mode():
            return self._step(image)

    def _step(self, image: np.ndarray) -> TrackResult:
        model, config = self._model, self.config
        assert self._box is not None
        window = search_window(self._box)
        features = self._features(image, window)
        prediction = model(
            features, self._memory.keys, self._memory.values, k=self._k, valid=self._memory.valid,
            backend=self._backend,
        )  # fmt: skip
        scores, deltas = prediction.logits.float().sigmoid(), prediction.deltas.float()
        size = torch.tensor(window.to_crop(self._box)[None, 2:], dtype=torch.float32, device=self._device)
        choice = pick(scores, model.decode(deltas), size, self._window, config.pick)
        *crop_box, score = torch.cat([choice.box[0], choice.score]).tolist()
        self._frame += 1
        self._score = score
        found = score >= config.found_score
        if found:
            self._box = self._keep_in_frame(window.to_frame(crop_box))
        written = config.policy.wants(self._frame, self._last_written, score)
        if written:
            written = (
                self._memory.write(*self._remember(features, scores, deltas), frame=self._frame) is not None
            )
            self._last_written = self._frame
        return TrackResult(self._box, score, found, written)

    def clone(self) -> FastDMVTracker:
        """An independent tracker in the same state; the weights are shared."""
        other = copy.copy(self)
        other._memory = self._memory.clone()
        return other

    def __deepcopy__(self, memo: dict) -> FastDMVTracker:
        return self.clone()

    # ---- parts -------------------------------------------------------------------------------------

    def _features(self, image: np.ndarray, window) -> Tensor:
        crop = torch.from_numpy(cut(image, window))[None].to(self._device)
        crop = normalise(crop).to(self._dtype, memory_format=torch.channels_last)
        return self._model.backbone(crop)

    def _remember(self, features: Tensor, scores: Tensor, deltas: Tensor) -> tuple[Tensor, Tensor]:
        return self._model.remember(features, scores.to(self._dtype), deltas.to(self._dtype))

    def _check_size(self, image: np.ndarray) -> None:
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


_model_lock = threading.Lock()


def shared_model(weights: str, device: torch.device, dtype: torch.dtype) -> DMV:
    """The network of a checkpoint; one copy for all trackers of a process."""
    with _model_lock:
        return _load(weights, device, dtype)


@functools.lru_cache(maxsize=8)
def _load(weights: str, device: torch.device, dtype: torch.dtype) -> DMV:
    return load_model(weights, device=device, dtype=dtype).to(memory_format=torch.channels_last)


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


def _resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        if device.type == "cuda":
            return torch.float16
        return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32
    if name not in _DTYPES:
        raise ValueError(f"dtype is {name!r}; it must be auto or one of {sorted(_DTYPES)}")
    return _DTYPES[name]


def _resolve_backend(name: str, device: torch.device) -> str:
    if name == "auto":
        return name
    reasons = ops.available_backends(device.type)
    if name not in reasons:
        raise ValueError(f"backend is {name!r}; it must be auto or one of {sorted(reasons)}")
    if reasons[name] is not None:
        raise ValueError(f"backend {name!r} cannot be used on {device.type}: {reasons[name]}")
    return name
