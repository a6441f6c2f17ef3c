"""Where things are: 3 x 3 maps of continuous pixel coordinates, smooth paths in time, smooth distortions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


def shift(x: float, y: float) -> np.ndarray:
    return np.array([[1, 0, x], [0, 1, y], [0, 0, 1]], dtype=np.float64)


def stretch(x: float, y: float) -> np.ndarray:
    return np.diag([x, y, 1.0])


def linear(angle: float, aspect: float, shear: float) -> np.ndarray:
    """Rotation (radians) after a shear and a stretch of equal area: x by sqrt(aspect), y by its inverse."""
    c, s = math.cos(angle), math.sin(angle)
    rotation = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]], dtype=np.float64)
    root = math.sqrt(aspect)
    return rotation @ np.array([[root, shear, 0], [0, 1 / root, 0], [0, 0, 1]], dtype=np.float64)


def about(matrix: np.ndarray, source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The linear map `matrix`, moved so that point `source` lands on `target`."""
    return shift(*target) @ matrix @ shift(-source[0], -source[1])


def apply(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Affine map of points (..., 2)."""
    return points @ matrix[:2, :2].T + matrix[:2, 2]


def magnification(matrix: np.ndarray) -> float:
    """Square root of the area factor of an affine map."""
    return math.sqrt(abs(float(np.linalg.det(matrix[:2, :2]))))


def bounds(points: np.ndarray) -> np.ndarray:
    """Smallest box xywh around points (P, 2)."""
    low, high = points.min(0), points.max(0)
    return np.concatenate([low, high - low])


def corners(box: np.ndarray) -> np.ndarray:
    """Corner points (4, 2) of a box xywh, in turning order."""
    x, y, w, h = box
    return np.array([[x, y], [x + w, y], [x + w, y + h], [x, y + h]], dtype=np.float64)


def centre(box: np.ndarray) -> np.ndarray:
    return np.array([box[0] + box[2] / 2, box[1] + box[3] / 2])


def clip_box(box: np.ndarray, width: float, height: float) -> np.ndarray:
    """The part of a box xywh inside [0, width] x [0, height]; sizes are 0 when there is none."""
    low = np.clip(box[:2], 0, (width, height))
    high = np.clip(box[:2] + box[2:], 0, (width, height))
    return np.concatenate([low, high - low])


def random_times(rng: np.random.Generator, count: int, max_skip: int) -> np.ndarray:
    """Frame numbers (count,) from 0 on, each 1 to `max_skip` after the one before (paper 3.4)."""
    skips = rng.integers(1, max_skip + 1, size=count - 1)
    return np.concatenate([[0], np.cumsum(skips)])


def smooth_path(rng: np.random.Generator, times: np.ndarray, dims: int) -> np.ndarray:
    """A smooth random drift (len(times), dims): zero at time 0, of about unit deviation in the long run.

    Half of it comes and goes within a hundred frames, half over several hundred, so that what was seen
    first says less and less while what was seen lately says more.
    """
    return 0.55 * _wander(rng, times / 60.0, dims) + 0.45 * _wander(rng, times / 350.0, dims)


def _wander(rng: np.random.Generator, position: np.ndarray, dims: int) -> np.ndarray:
    """A first-order autoregressive sequence at whole positions, joined by Catmull-Rom cubics."""
    count = int(position[-1]) + 4
    knots = np.empty((count, dims))
    knots[0] = rng.standard_normal(dims)
    for i in range(1, count):
        knots[i] = 0.7 * knots[i - 1] + 0.714 * rng.standard_normal(dims)
    index = position.astype(int) + 1
    t = (position + 1 - index)[:, None]
    a, b, c, d = (knots[index + i] for i in (-1, 0, 1, 2))
    path = b + 0.5 * t * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))
    return path - path[0]


@dataclass(frozen=True)
class Ripple:
    """A smooth non-rigid distortion of a picture: a sum of plane waves, in the picture's own pixels.

    waves (K, 2): wave vectors in radians a pixel; phases (K,); pushes (K, 2): amplitudes in pixels.
    The point q of the undistorted plane shows what was at q + offset(q).
    """

    waves: np.ndarray
    phases: np.ndarray
    pushes: np.ndarray

    def offset(self, points: np.ndarray) -> np.ndarray:
        return np.sin(points @ self.waves.T + self.phases) @ self.pushes

    def forward(self, points: np.ndarray) -> np.ndarray:
        """Where the picture's points (P, 2) go: solves q + offset(q) = points."""
        moved = points
        for _ in range(8):
            moved = points - self.offset(moved)
        return moved


def ripple_path(rng: np.random.Generator, times: np.ndarray, size: float, strength: float) -> list[Ripple]:
    """A distortion that grows from none at time 0; `strength` is its share of `size` (pixels), about 0.03."""
    angle = rng.uniform(0, 2 * math.pi, 3)
    wave = 2 * math.pi / (size * rng.uniform(0.7, 1.6, 3))
    waves = np.stack([np.cos(angle), np.sin(angle)], 1) * wave[:, None]
    phases = rng.uniform(0, 2 * math.pi, 3)
    # |gradient| stays under 0.6, so that the map never folds and `forward` converges
    limit = 0.2 / wave[:, None]
    path = smooth_path(rng, times, 6).reshape(-1, 3, 2) * strength * size
    return [Ripple(waves, phases, np.clip(push, -limit, limit)) for push in path]
