"""PySOT: `init(img, bbox)` and `track(img) -> {"bbox", "best_score"}`, in place of `build_tracker(model)`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import numpy as np

from dmv_fast.tracker import FastDMVTracker


class Output(TypedDict):
    """One frame's answer, as SiamRPNTracker gives it."""

    bbox: list[float]
    """x, y, w, h in pixels."""
    best_score: float
    """Centre probability, 0 to 1."""


class DMVTracker:
    """FastDMVTracker for PySOT's tools; the arguments are FastDMVTracker's. Images are BGR on both sides.

    PySOT measures a box that comes in and a box that goes out by two rules. It starts with the centre at
    x + (w - 1) / 2 and writes the corner as cx - w / 2: a target at rest comes out half a pixel to the upper
    left of the box that went in. Its `tools/test.py` adds that half pixel before it calls `init`, so that
    results and annotation agree. `init` therefore takes it off again.
    """

    def __init__(
        self, weights: str = "dmv18", k: int | None = None, device: str = "auto", dtype: str = "auto",
        backend: str = "auto",
    ):  # fmt: skip
        self._tracker = FastDMVTracker(weights, k, device, dtype, backend)

    def init(self, img: np.ndarray, bbox: Sequence[float]) -> None:
        """img: (H, W, 3) uint8 BGR; bbox: x, y, w, h. Errors as FastDMVTracker.init."""
        x, y, w, h = bbox
        self._tracker.init(img, (x - 0.5, y - 0.5, w, h))

    def track(self, img: np.ndarray) -> Output:
        """The next frame; where the target is not found, the last box and its low score."""
        result = self._tracker.track(img)
        return {"bbox": list(result.box), "best_score": result.score}
