"""What the network saw, laid over the picture that it saw it in."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from dmv_fast.insight.watch import Insight
from dmv_fast.vision.crop import Window
from dmv_fast.vision.draw import FOUND

_SOUGHT = (200, 200, 200)  # BGR


def heat(
    picture: np.ndarray, score_map: np.ndarray, corner: Sequence[float] = (0, 0), side: float | None = None
) -> np.ndarray:
    """A copy of the picture (HWC uint8 BGR) with the score map (H, W), 0 to 1, in colour over it.

    It lies over a square, given by its upper left corner x, y and its side in pixels, which may reach outside
    the picture; None: as wide as the picture.
    """
    height, width = picture.shape[:2]
    side = width if side is None else side
    left, top = (max(0, round(v)) for v in corner)
    right, bottom = (min(round(v + side), end) for v, end in zip(corner, (width, height), strict=True))
    canvas = picture.copy()
    if right <= left or bottom <= top:
        return canvas
    step = side / len(score_map)
    # Column i of the map is centred on i * step of the square; a plain resize has it on (i + 1/2) * step.
    first = [(start + 0.5 - v) / step for start, v in zip((left, top), corner, strict=True)]
    shift = np.array([[1 / step, 0, first[0]], [0, 1 / step, first[1]]], np.float32)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    size = (right - left, bottom - top)
    fine = cv2.warpAffine(score_map, shift, size, flags=flags, borderMode=cv2.BORDER_REPLICATE)
    colours = cv2.applyColorMap((fine.clip(0, 1) * 255).astype(np.uint8), cv2.COLORMAP_VIRIDIS)
    under = canvas[top:bottom, left:right]
    canvas[top:bottom, left:right] = cv2.addWeighted(under, 0.6, colours, 0.4, 0)
    return canvas


def lay_map(shown: np.ndarray, insight: Insight, scale: float) -> np.ndarray:
    """A copy of a frame that is shown `scale` times as large, the score map over its search window."""
    window = insight.window
    return heat(shown, insight.score_map, (window.x0 * scale, window.y0 * scale), window.side * scale)


def draw_window(canvas: np.ndarray, window: Window, scale: float) -> None:
    """The search window's outline on such a frame."""
    corner = [round(v * scale) for v in (window.x0, window.y0)]
    side = round(window.side * scale)
    cv2.rectangle(canvas, corner, [v + side for v in corner], _SOUGHT, 1)


def draw_chosen(canvas: np.ndarray, insight: Insight, scale: float) -> None:
    """A dot at the location whose box was taken, on such a frame."""
    place = [round(v * scale) for v in insight.centre(insight.chosen)]
    for radius, colour in ((5, (0, 0, 0)), (3, FOUND)):
        cv2.circle(canvas, place, radius, colour, cv2.FILLED, cv2.LINE_AA)
