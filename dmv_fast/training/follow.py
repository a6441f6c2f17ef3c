"""Where a tracker looks: the search window of each frame of a training sample, with a tracker's errors."""

from __future__ import annotations

import math

import numpy as np

from dmv_fast.training import geometry as geo
from dmv_fast.training.synth import Scene
from dmv_fast.vision.crop import Window, search_window

WIDE = 0.06  # of the instance frames: the search is widened, as after a loss
DRIFTED = 0.05  # the target is at the rim of the crop
LOST = 0.05  # the target is not in the crop


def tracked_window(rng: np.random.Generator, box: np.ndarray) -> Window:
    """Around a box with an error: mostly small, at times up to 0.3 of the crop; size off by up to 1.4."""
    sigma = 0.05 if rng.random() < 0.6 else 0.13
    error = np.clip(rng.normal(0, sigma, 2), -0.3, 0.3)
    return _off(box, error, math.exp(np.clip(rng.normal(0, 0.13), -0.34, 0.34)))


def window_for(rng: np.random.Generator, scene: Scene, last: np.ndarray) -> Window:
    """The window of an instance frame; `last` is the box (4,) where the target was last in view."""
    if not scene.in_view:
        return _at_the_exit(rng, scene, last)
    box, draw = scene.box, rng.random()
    if draw < WIDE:
        return _off(box, np.clip(rng.normal(0, 0.4, 2), -0.7, 0.7), rng.uniform(1.4, 2.2))
    if draw < WIDE + DRIFTED:
        return _off(box, _direction(rng) * rng.uniform(0.3, 0.5), 1.0)
    if draw < WIDE + DRIFTED + LOST and (window := _elsewhere(rng, scene)) is not None:
        return window
    return tracked_window(rng, box)


def _at_the_exit(rng: np.random.Generator, scene: Scene, last: np.ndarray) -> Window:
    """The target has left the frame: the tracker waits where it left, or where it was when last looked at."""
    exit_point = np.clip(scene.centre, last[2:] / 2, scene.size - last[2:] / 2)
    where = exit_point if rng.random() < 0.6 else geo.centre(last)
    box = np.concatenate([where - last[2:] / 2, last[2:]])
    return _off(box, rng.normal(0, 0.1, 2), rng.uniform(0.9, 2.0))


def _elsewhere(rng: np.random.Generator, scene: Scene) -> Window | None:
    """A window without the target: on another thing of the scene, or anywhere near; None if neither fits."""
    box = scene.box
    reach = search_window(box).side / 2 + box[2:] / 2
    middle = geo.centre(box)
    places = [p for p in scene.haunts if (np.abs(p - middle) > reach).any()]
    if not places or rng.random() < 0.3:
        around = [middle + _direction(rng) * reach * rng.uniform(1.1, 2.0) for _ in range(8)]
        places = [p for p in around if (np.abs(p - middle) > reach).any()]
    places = [p for p in places if (p > 0).all() and (p < scene.size).all()]
    if not places:
        return None
    place = places[rng.integers(len(places))]
    return search_window(np.concatenate([place - box[2:] / 2, box[2:]]))


def _off(box: np.ndarray, error: np.ndarray, scale: float) -> Window:
    """The window around a box moved by `error` (2,), in sides of its search window, and scaled."""
    moved = np.array(box, dtype=np.float64)
    moved[:2] += error * search_window(box).side
    return search_window(moved, scale=scale)


def _direction(rng: np.random.Generator) -> np.ndarray:
    angle = rng.uniform(0, 2 * math.pi)
    return np.array([math.cos(angle), math.sin(angle)])
