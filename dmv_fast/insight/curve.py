"""The scores of the last frames as a curve."""

from __future__ import annotations

from collections import deque

import cv2
import numpy as np

from dmv_fast.vision.draw import CAPTION, FONT, FOUND, GROUND, LOST

_FRAMES = 300  # shown at most, the newest on the right
_HEIGHT = 56  # pixels
_RIM = 7  # pixels above a score of 1 and below one of 0, so that neither lies on the edge
_LEFT = 26  # pixels for the figures
_FAINT = (80, 80, 80)  # BGR


class ScoreCurve:
    """Keeps the last scores of one target and draws them."""

    def __init__(self) -> None:
        self._scores: deque[tuple[float, bool]] = deque(maxlen=_FRAMES)  # score, found

    def add(self, score: float, found: bool) -> None:
        """A frame's score, 0 to 1, and whether the target was found in it."""
        # In this order a NaN, which a view must survive, becomes 0.
        self._scores.append((min(max(0.0, score), 1.0), found))

    def clear(self) -> None:
        """Start anew, on another target."""
        self._scores.clear()

    def picture(self, width: int, threshold: float) -> np.ndarray:
        """The curve, green where the target was found, red where not -> (56, width, 3) uint8 BGR.

        Faint lines at 0, at 1 and at the threshold, the score below which a target is lost.
        """
        canvas = np.full((_HEIGHT, width, 3), GROUND, np.uint8)
        for level in {0.0, 1.0, threshold}:
            if 0 <= level <= 1:
                _draw_level(canvas, level)
        # A frame is as wide in a short curve as in a full one: the curve grows to the right, then moves left.
        step = (width - _LEFT) / _FRAMES
        before = None
        for i, (score, found) in enumerate(self._scores):
            at = (round(_LEFT + (i + 1) * step), _row(score))
            # The piece that ends in a frame has that frame's colour.
            cv2.line(canvas, before or (_LEFT, at[1]), at, FOUND if found else LOST, 1, cv2.LINE_AA)
            before = at
        return canvas


def _row(score: float) -> int:
    """Pixels from the picture's top."""
    return round(_RIM + (1 - score) * (_HEIGHT - 1 - 2 * _RIM))


def _draw_level(canvas: np.ndarray, level: float) -> None:
    """A line across, and its figure before it."""
    row = _row(level)
    cv2.line(canvas, (_LEFT, row), (canvas.shape[1], row), _FAINT, 1)
    cv2.putText(canvas, f"{level:.2g}", (6, row + 4), FONT, 0.3, CAPTION, 1, cv2.LINE_AA)
