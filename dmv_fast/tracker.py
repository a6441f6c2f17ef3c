"""One target in one stream: crop -> network -> box -> memory (paper section 3.5)."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np

from dmv_fast.cloning import Cloneable
from dmv_fast.runtime.load import frame_step_for
from dmv_fast.target import Target, TrackerConfig, TrackResult
from dmv_fast.vision.crop import search_window
from dmv_fast.vision.frames import as_bgr, check_box

__all__ = ["FastDMVTracker", "TrackResult", "TrackerConfig"]


class FastDMVTracker(Cloneable):
    """Tracks one object, chosen by its box in the first frame. A drop-in for `cv2.Tracker`.

    Trackers in one process share their weights. One tracker belongs to one thread at a time; different
    trackers run in different threads.

    Args:
        weights: a name ("dmv18", "dmv50": see `dmv_fast.weights.known`) or a .safetensors file.
        k: candidates K that vote at each location, 1 to 32; None: the checkpoint's own.
        device: "auto" (a CUDA GPU if there is one), "cpu", "cuda", "cuda:1" ...
        dtype: "auto", "float32", "bfloat16", "float16"; on a CPU with AMX, "bfloat16x3": float32 within
            some 1e-5, large products made of two or three in bfloat16; on a CPU with AVX512_VNNI, "int16":
            float32, but the backbone's products and those of the vote's last layer are of 16-bit whole
            numbers, which is faster, and features right to 1e-3. "auto": float16 on a GPU; on a CPU
            bfloat16x3 where it runs, else int16 where that does, else float32, unless bfloat16 is quicker.
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
        self.config = TrackerConfig.of(config)
        self.frame_step = frame_step_for(
            weights, k, device, dtype, backend, capacity=self.config.capacity, pick=self.config.pick
        )
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
        self.frame_step.start(0, image, search_window(box), box)
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
        (answer,) = self.frame_step.step(image, [window], np.array([size]))
        return self._target.settle(window, answer, self.config, lambda frame: self.frame_step.write(0, frame))

    def _own_targets(self) -> None:
        self._target = copy.copy(self._target)
