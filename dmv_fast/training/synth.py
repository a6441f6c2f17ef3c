"""A picture of a made frame: layers laid over a base, drawn only where the search window looks.

Every layer goes through one resampling from its own pixels to the crop's, from the level of a small
pyramid that is nearest in size, so that nothing aliases and nothing is blurred twice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import cv2
import numpy as np

from dmv_fast.training import geometry as geo
from dmv_fast.vision.crop import CROP_SIZE, Window, mean_colour

_CELL = 8  # pixels between the points at which a distorted map is worked out
_FINE = 4  # outlines are filled on a grid this much finer than the photograph's

Region = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels of a crop


class Picture:
    """Pixels with, where they belong to an object, its outline.

    pixels: (H, W, 3) uint8 BGR, or (H, W, 4) with colours already multiplied by the alpha.
    parts: the object's closed polygons, each (P, 2), continuous pixel coordinates.
    """

    def __init__(self, pixels: np.ndarray, parts: list[np.ndarray] | None = None) -> None:
        self.pixels = pixels
        self.parts = parts or []
        self._levels = {0: pixels}

    @cached_property
    def mean(self) -> np.ndarray:
        return mean_colour(self.pixels).round().astype(np.uint8)

    @cached_property
    def area(self) -> float:
        """Area of the object in the picture's pixels."""
        if self.pixels.shape[2] == 4:
            return float(self.pixels[..., 3].sum(dtype=np.float64)) / 255
        return polygon_area(self.parts)

    def level(self, magnification: float) -> tuple[np.ndarray, np.ndarray]:
        """The picture shrunk by half octaves to about `magnification`, and the map from it to full pixels."""
        step = max(0, round(-2 * math.log2(max(magnification, 1e-3))))
        h, w = self.pixels.shape[:2]
        if step not in self._levels:
            size = (max(1, round(w * 2 ** (-step / 2))), max(1, round(h * 2 ** (-step / 2))))
            self._levels[step] = cv2.resize(self.pixels, size, interpolation=cv2.INTER_AREA)
        level = self._levels[step]
        return level, geo.stretch(w / level.shape[1], h / level.shape[0])


def polygon_area(parts: list[np.ndarray]) -> float:
    return sum(cv2.contourArea(p.astype(np.float32)) for p in parts)


def cut_out(image: np.ndarray, parts: list[np.ndarray]) -> Picture:
    """The object inside the closed polygons `parts` as a picture of its own, with a soft edge.

    The edge is drawn in by a fraction of a pixel: outlines carry a seam of background.
    """
    box = geo.bounds(np.concatenate(parts))
    x0, y0 = np.maximum(np.floor(box[:2]).astype(int) - 2, 0)
    x1, y1 = np.ceil(box[:2] + box[2:]).astype(int) + 2
    patch = image[y0:y1, x0:x1]
    h, w = patch.shape[:2]
    fine = np.zeros((h * _FINE, w * _FINE), np.uint8)
    local = [p - (x0, y0) for p in parts]
    for part in local:
        cv2.fillPoly(fine, [np.round(part * _FINE - 0.5).astype(np.int32)], 255)
    # around the photograph's own border the object is cut off, not soft
    alpha = cv2.resize(fine, (w, h), interpolation=cv2.INTER_AREA)
    alpha = cv2.GaussianBlur(alpha, (3, 3), 0.7, borderType=cv2.BORDER_REPLICATE)
    alpha = np.clip((alpha.astype(np.float32) - 64) * (255 / 160), 0, 255)
    pixels = np.zeros((h + 2, w + 2, 4), np.uint8)
    pixels[1:-1, 1:-1, :3] = patch * (alpha[..., None] / 255) + 0.5
    pixels[1:-1, 1:-1, 3] = alpha
    return Picture(pixels, [p + 1 for p in local])


@dataclass
class Layer:
    """A picture placed in a frame: `to_frame` maps its pixels, after `ripple`, to frame pixels."""

    picture: Picture
    to_frame: np.ndarray
    ripple: geo.Ripple | None = None
    light: np.ndarray | None = None  # (3,) gains on its colours
    streak: np.ndarray | None = None  # (2,) its own motion during the exposure, frame pixels

    def place(self, points: np.ndarray) -> np.ndarray:
        """Points (P, 2) of the picture -> frame pixels."""
        if self.ripple is not None:
            points = self.ripple.forward(points)
        return geo.apply(self.to_frame, points)

    def outline(self) -> list[np.ndarray]:
        """The object's polygons in frame pixels."""
        return [self.place(part) for part in self.picture.parts]


@dataclass
class Scene:
    """One instant: what is drawn, and where the target is in it (frame pixels).

    size: the frame's width and height, outside of which there is only the base's mean colour; inside, the
    base goes on mirrored where it ends. target: index into `layers`, or -1 when the target belongs to the
    base; layers after it cover it. haunts: centres (2,) of what a lost tracker might hold on to.
    Worked out: parts, the target's outline; box (4,), the part of it in the frame, NaN when that is little.
    """

    base: Layer
    size: tuple[float, float]
    layers: list[Layer] = field(default_factory=list)
    target: int = -1
    haunts: list[np.ndarray] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.parts = (self.base if self.target < 0 else self.layers[self.target]).outline()
        whole = geo.bounds(np.concatenate(self.parts))
        self.centre = geo.centre(whole)
        inside = geo.clip_box(whole, *self.size)
        self.in_view = bool(inside[2] * inside[3] > 0.35 * whole[2] * whole[3])
        self.box = inside if self.in_view else np.full(4, np.nan)


@dataclass(frozen=True)
class Shot:
    """A drawn crop.

    crop: (H, W, 3) uint8 BGR. share: how much of the target's area can be seen in it, 0 to 1: not outside the
    crop or the frame, not covered. outside: (H, W) bool, beyond the frame, or None; fill: (3,) its colour.
    """

    crop: np.ndarray
    share: float
    outside: np.ndarray | None
    fill: np.ndarray


def crop_resolution(window: Window) -> int:
    """Side of the crop as drawn: a small window at the frame's own pixels, to be enlarged as in tracking."""
    return min(window.side, CROP_SIZE)


def to_crop(window: Window) -> np.ndarray:
    """Frame pixels -> pixels of the crop as drawn."""
    zoom = crop_resolution(window) / window.side
    return geo.stretch(zoom, zoom) @ geo.shift(-window.x0, -window.y0)


def draw(scene: Scene, window: Window) -> Shot:
    """Draw the window's part of a scene, a square of side `crop_resolution(window)`."""
    side = crop_resolution(window)
    return _draw(scene, to_crop(window), (side, side))


def draw_frame(scene: Scene) -> Shot:
    """Draw a whole frame."""
    return _draw(scene, np.eye(3), (round(scene.size[0]), round(scene.size[1])))


def _draw(scene: Scene, frame_to_crop: np.ndarray, size: tuple[int, int]) -> Shot:
    """`size` (width, height) pixels of a scene, seen through the map `frame_to_crop`."""
    crop = _resample(scene.base, frame_to_crop, (0, 0, *size), cv2.BORDER_REFLECT_101)
    if scene.target < 0:
        seen = _fill([geo.apply(frame_to_crop, p) for p in scene.parts], size)
        full = polygon_area(scene.parts) * geo.magnification(frame_to_crop) ** 2
    else:
        target = scene.layers[scene.target]
        seen = np.zeros(crop.shape[:2], np.float32)
        full = target.picture.area * geo.magnification(frame_to_crop @ target.to_frame) ** 2
    for index, layer in enumerate(scene.layers):
        laid = _lay(crop, layer, frame_to_crop)
        if laid is None:
            continue
        (x0, y0, x1, y1), alpha = laid
        if index == scene.target:
            seen[y0:y1, x0:x1] = alpha
        else:
            seen[y0:y1, x0:x1] *= 1 - alpha
    outside = _outside(scene, frame_to_crop, size)
    if outside is not None:
        crop[outside] = scene.base.picture.mean
        seen[outside] = 0
    return Shot(crop, min(1.0, float(seen.sum()) / max(full, 1e-6)), outside, scene.base.picture.mean)


def _outside(scene: Scene, frame_to_crop: np.ndarray, size: tuple[int, int]) -> np.ndarray | None:
    low, high = geo.apply(frame_to_crop, np.array([[0.0, 0.0], scene.size]))
    x0, y0 = np.clip(np.round(low), 0, size).astype(int)
    x1, y1 = np.clip(np.round(high), 0, size).astype(int)
    if (x0, y0, x1, y1) == (0, 0, *size):
        return None
    outside = np.ones(size[::-1], bool)
    outside[y0:y1, x0:x1] = False
    return outside


def _fill(parts: list[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """Mask (height, width) float32 of closed polygons in crop pixels."""
    mask = np.zeros(size[::-1], np.uint8)
    for part in parts:
        cv2.fillPoly(mask, [np.round(part * 16 - 8).astype(np.int32)], 1, shift=4)
    return mask.astype(np.float32)


def _lay(crop: np.ndarray, layer: Layer, frame_to_crop: np.ndarray) -> tuple[Region, np.ndarray] | None:
    """Blend a cut-out over the crop in place -> its region and alpha there, None when it is all outside."""
    box = geo.bounds(geo.apply(frame_to_crop, np.concatenate(layer.outline())))
    pad = 2.0
    if layer.streak is not None:
        streak = layer.streak * geo.magnification(frame_to_crop)
        pad += float(np.abs(streak).max())
    low = np.maximum(np.floor(box[:2] - pad), 0).astype(int)
    high = np.minimum(np.ceil(box[:2] + box[2:] + pad), crop.shape[1::-1]).astype(int)
    if (high <= low).any():
        return None
    region = (int(low[0]), int(low[1]), int(high[0]), int(high[1]))
    drawn = _resample(layer, frame_to_crop, region, cv2.BORDER_CONSTANT)
    if layer.streak is not None:
        drawn = smear(drawn, streak, cv2.BORDER_CONSTANT)
    alpha = drawn[..., 3:].astype(np.float32) * (1 / 255)
    under = crop[region[1] : region[3], region[0] : region[2]]
    colour = drawn[..., :3].astype(np.float32)
    if layer.light is not None:
        colour = np.minimum(colour * layer.light.astype(np.float32), 255 * alpha)
    under[:] = np.minimum(under * (1 - alpha) + colour + 0.5, 255)
    return region, alpha[..., 0]


def smear(image: np.ndarray, motion: np.ndarray, border: int = cv2.BORDER_REPLICATE) -> np.ndarray:
    """Motion blur along `motion` (2,), in pixels, centred: nothing shifts on the whole."""
    length = float(np.hypot(*motion))
    if length < 1:
        return image
    reach = math.ceil(length / 2) + 1
    kernel = np.zeros((2 * reach + 1, 2 * reach + 1), np.float32)
    a, b = (tuple(round((reach + s * e / 2) * 16) for e in motion.tolist()) for s in (-1, 1))
    cv2.line(kernel, a, b, 1.0, 1, cv2.LINE_AA, 4)
    kernel += kernel[::-1, ::-1].copy()
    return cv2.filter2D(image, -1, kernel / kernel.sum(), borderType=border)


def _resample(layer: Layer, frame_to_crop: np.ndarray, region: Region, border: int) -> np.ndarray:
    """The layer's pixels in `region` of the crop, by one interpolation from the nearest pyramid level."""
    x0, y0, x1, y1 = region
    placed = geo.shift(-x0, -y0) @ frame_to_crop @ layer.to_frame
    level, level_to_full = layer.picture.level(geo.magnification(placed))
    size = (x1 - x0, y1 - y0)
    if layer.ripple is None:
        index = geo.shift(-0.5, -0.5) @ placed @ level_to_full @ geo.shift(0.5, 0.5)
        return cv2.warpAffine(level, index[:2], size, flags=cv2.INTER_LINEAR, borderMode=border)
    columns, rows = -(-size[0] // _CELL), -(-size[1] // _CELL)
    x = (np.arange(-1, columns + 1) + 0.5) * _CELL
    y = (np.arange(-1, rows + 1) + 0.5) * _CELL
    source = geo.apply(np.linalg.inv(placed), np.stack(np.meshgrid(x, y), -1))
    source = source + layer.ripple.offset(source)
    source = (geo.apply(np.linalg.inv(level_to_full), source) - 0.5).astype(np.float32)
    dense = cv2.resize(source, None, fx=_CELL, fy=_CELL, interpolation=cv2.INTER_LINEAR)
    dense = np.ascontiguousarray(dense[_CELL : _CELL + size[1], _CELL : _CELL + size[0]])
    # OpenCV's annotations do not know that a map of x and y together needs no second one.
    return cv2.remap(level, dense, None, cv2.INTER_LINEAR, borderMode=border)  # type: ignore[call-overload]
