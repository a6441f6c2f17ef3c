"""What a user hands in, checked: frames and boxes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np

_LARGEST = 4  # times the frame: the window around a first box is cut whole, and grows with its square

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
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"box is {box!r}; it must be four numbers x, y, w, h") from None
    if not all(math.isfinite(v) for v in (x, y, w, h)):
        raise ValueError(f"box is {(x, y, w, h)}; all four numbers must be finite")
    if w <= 0 or h <= 0:
        raise ValueError(f"box is {(x, y, w, h)}; width and height must be positive")
    if x >= width or y >= height or x + w <= 0 or y + h <= 0:
        raise ValueError(f"box is {(x, y, w, h)}; it lies wholly outside the {width} x {height} frame")
    if max(w, h) > _LARGEST * max(width, height):
        raise ValueError(f"box is {(x, y, w, h)}; it is over {_LARGEST} times the {width} x {height} frame")
    return x, y, w, h
