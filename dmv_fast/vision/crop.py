"""The search crop: which square of a frame the network sees, and the way back (scaled as SiamFC does)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor

from dmv_fast.vision.shrink import shrink

CROP_SIZE = 256
MEAN = (0.485, 0.456, 0.406)  # ImageNet, RGB
STD = (0.229, 0.224, 0.225)
_SIDES = 16  # sides of windows from one length to twice that
_PLACES = 64  # places of a corner in a window's side
_MEAN_SAMPLES = 100  # rows and columns looked at for the frame's mean colour: exact enough, free on 8K frames


@dataclass(frozen=True)
class Window:
    """An integer square of a frame, in frame pixels; it may reach outside the frame.

    Integer corners make the crop an exact copy plus one resize, so the map between crop and frame
    coordinates is exact: `to_frame(to_crop(box)) == box`.
    """

    x0: int
    y0: int
    side: int

    def to_crop(self, box: np.ndarray | Sequence[float], size: int = CROP_SIZE) -> np.ndarray:
        """Frame boxes (..., 4) xywh -> boxes in pixels of the resized crop, float64."""
        box = np.asarray(box, dtype=np.float64)
        return (box - (self.x0, self.y0, 0, 0)) * (size / self.side)

    def to_frame(self, box: np.ndarray | Sequence[float], size: int = CROP_SIZE) -> np.ndarray:
        """Inverse of `to_crop`."""
        box = np.asarray(box, dtype=np.float64)
        return box * (self.side / size) + (self.x0, self.y0, 0, 0)


def search_window(box: np.ndarray | Sequence[float], *, scale: float = 1.0) -> Window:
    """The square of side 2 sqrt((w + p)(h + p)), p = (w + h) / 2, around a box xywh, roughly.

    After the resize to 256 the target is about 64 pixels large. `scale` > 1 widens the search.

    Roughly (ours): its side is one of 16 from one length to twice that, its corner lies on a 64th of that
    side, both in whole pixels: about 2 % and a 128th off at most. Boxes nearly alike then have the very same
    window, so what little the rounding of two ways to compute does to a box does nothing to the next frame
    (docs/design.md).
    """
    x, y, w, h = (float(v) for v in box)
    p = (w + h) / 2
    size = math.log2(max(4.0, 2 * scale * math.sqrt((w + p) * (h + p))))
    side = round(2 ** (round(size * _SIDES) / _SIDES))
    step = max(1, round(side / _PLACES))
    x0, y0 = (round((middle - side / 2) / step) * step for middle in (x + w / 2, y + h / 2))
    return Window(x0, y0, side)


def mean_colour(image: np.ndarray) -> np.ndarray:
    """Mean colour (C,) of a frame HWC, from a regular sample of its pixels."""
    step_y = max(1, image.shape[0] // _MEAN_SAMPLES)
    step_x = max(1, image.shape[1] // _MEAN_SAMPLES)
    sample = np.ascontiguousarray(image[::step_y, ::step_x])
    # Exact, as sums of whole numbers are; a third of the time that NumPy takes for a mean over rows.
    return np.array(cv2.sumElems(sample)[: image.shape[2]]) / (sample.shape[0] * sample.shape[1])


def cut(image: np.ndarray, window: Window, size: int = CROP_SIZE) -> np.ndarray:
    """The window's pixels resized: HWC uint8 BGR frame -> (size, size, 3) uint8 BGR.

    Outside the frame: the frame's mean colour. Shrinking averages areas (no aliasing), growing is bilinear.
    """
    patch = _patch(image, window)
    if window.side > size:
        return shrink(patch, size)
    return cv2.resize(patch, (size, size), interpolation=cv2.INTER_LINEAR)


def _patch(image: np.ndarray, window: Window) -> np.ndarray:
    """The window's pixels as they are, of the frame itself where it lies inside: (side, side, 3)."""
    height, width = image.shape[:2]
    left, top = max(window.x0, 0), max(window.y0, 0)
    right, bottom = min(window.x0 + window.side, width), min(window.y0 + window.side, height)
    if right - left == window.side and bottom - top == window.side:
        return image[top:bottom, left:right]
    colour = [int(value) for value in mean_colour(image).round()]
    if right <= left or bottom <= top:
        return np.full((window.side, window.side, 3), colour, np.uint8)
    above, below = top - window.y0, window.y0 + window.side - bottom
    before, behind = left - window.x0, window.x0 + window.side - right
    inside, kind = image[top:bottom, left:right], cv2.BORDER_CONSTANT
    return cv2.copyMakeBorder(inside, above, below, before, behind, kind, value=colour)


def normalise(crops: Tensor) -> Tensor:
    """uint8 BGR crops (B, H, W, 3) -> float32 RGB (B, 3, H, W), ImageNet mean and deviation."""
    rgb = crops.flip(-1).permute(0, 3, 1, 2).float() / 255
    mean = torch.tensor(MEAN, dtype=torch.float32, device=crops.device).view(3, 1, 1)
    std = torch.tensor(STD, dtype=torch.float32, device=crops.device).view(3, 1, 1)
    return (rgb - mean) / std
