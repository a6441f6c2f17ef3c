"""Ways to make N scenes of one target: a photograph that moves, a cut-out that moves over another picture,
a region of a photograph without annotations, a real clip, a video of a training set."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from dmv_fast.evaluation.datasets import read_image
from dmv_fast.training import geometry as geo
from dmv_fast.training.catalog import (
    MIN_SIDE_CLIP,
    Catalog,
    Clip,
    PhotoObject,
    read_clip_frame,
    read_photo,
    usable,
)
from dmv_fast.training.clutter import add_distractors, add_occluder, ellipse, outline_of
from dmv_fast.training.readers import Track
from dmv_fast.training.synth import Layer, Picture, Scene, cut_out

# shares of the samples of a kind
OCCLUDED = {"photo": 0.2, "paste": 0.35, "clip": 0.15, "region": 0.15}
DISTRACTED = {"photo": 0.3, "paste": 0.65}
RIPPLED = {"photo": 0.3, "paste": 0.5, "region": 0.3}
LEAVES = 0.15  # of cut-outs, with three frames or more
LEAVING_SPEED = 0.12  # of its size a frame
STREAKED = 0.08  # of the frames of a cut-out: it moves during the exposure
CLIP_BEHIND = 0.2  # of cut-outs: over a real clip; else over a photograph
MEANINGLESS = "seg"  # label of segments that are often a part of something: taken less often

Made = tuple[list[Scene], np.ndarray]


def make_scenes(
    rng: np.random.Generator, catalog: Catalog, kind: str, frames: int, max_skip: int
) -> Made | None:
    """N = `frames` scenes of one target and their times (N,); None when the draw was no good (draw again).

    kind: "photo", "paste", "clip" or "region".
    """
    if kind == "clip":
        return clip_scenes(rng, catalog, frames, max_skip)
    times = geo.random_times(rng, frames, max_skip)
    maker = {"photo": photo_scenes, "paste": paste_scenes, "region": region_scenes}[kind]
    scenes = maker(rng, catalog, times)
    return None if scenes is None else (scenes, times)


# --- a photograph that moves ---


def photo_scenes(rng: np.random.Generator, catalog: Catalog, times: np.ndarray) -> list[Scene] | None:
    """An object in its own photograph, under a moving camera."""
    number = int(rng.integers(len(catalog.objects)))
    target = catalog.objects[number]
    photo = catalog.photos[target.photo]
    box = np.array(target.box)
    # a target too large for its photograph leaves a crop that is mostly beyond the frame
    reach = 2 * math.sqrt(box[2] * box[3])
    around = np.concatenate([geo.centre(box) - reach, [2 * reach, 2 * reach]])
    covered = np.prod(geo.clip_box(around, photo.width, photo.height)[2:] / around[2:])
    if rng.random() > max(covered**2, 0.1) * (0.4 if target.label == MEANINGLESS else 1.0):
        return None
    image = read_photo(photo)
    parts = outline_of(target)
    neighbours = [n for n in catalog.together[target.photo] if n != number]
    others = [geo.centre(np.array(catalog.objects[n].box)) for n in neighbours]
    turn = 0.2 if target.polygons else 0.04
    scenes = _moving_photo(rng, image, parts, times, turn=turn, rippled=RIPPLED["photo"], others=others)
    if target.polygons and rng.random() < DISTRACTED["photo"]:
        add_distractors(rng, catalog, scenes, times, target, cut_out(image, parts))
    if rng.random() < OCCLUDED["photo"]:
        add_occluder(rng, catalog, scenes, times)
    return scenes


def region_scenes(rng: np.random.Generator, catalog: Catalog, times: np.ndarray) -> list[Scene] | None:
    """A salient rectangle of a photograph without annotations, under a moving camera."""
    image = read_photo(catalog.photos[catalog.plain[rng.integers(len(catalog.plain))]])
    box = _salient_box(rng, image)
    if box is None:
        return None
    scenes = _moving_photo(rng, image, [ellipse(box)], times, turn=0.05, rippled=RIPPLED["region"], others=[])
    if rng.random() < OCCLUDED["region"]:
        add_occluder(rng, catalog, scenes, times)
    return scenes


def _salient_box(rng: np.random.Generator, image: np.ndarray) -> np.ndarray | None:
    """Of forty random boxes the one that differs most from what is on each side of it, if one does."""
    height, width = image.shape[:2]
    sums = cv2.integral(image, sdepth=cv2.CV_64F)
    size = np.exp(rng.uniform(math.log(28), math.log(max(0.4 * min(width, height), 29)), 40))
    root = np.exp(np.clip(rng.normal(0, 0.18, 40), -0.5, 0.5))
    w, h = size * root, size / root
    x, y = rng.uniform(0, np.maximum(width - w, 1)), rng.uniform(0, np.maximum(height - h, 1))

    def colour(x0: np.ndarray, y0: np.ndarray, x1: np.ndarray, y1: np.ndarray) -> np.ndarray:
        x0, x1 = (np.clip(v, 0, width).astype(int) for v in (x0, x1))
        y0, y1 = (np.clip(v, 0, height).astype(int) for v in (y0, y1))
        total = sums[y1, x1] - sums[y0, x1] - sums[y1, x0] + sums[y0, x0]
        return total / np.maximum((x1 - x0) * (y1 - y0), 1)[:, None]

    inner, dx, dy = colour(x, y, x + w, y + h), w / 3, h / 3
    sides = [
        colour(x - dx, y, x, y + h),
        colour(x + w, y, x + w + dx, y + h),
        colour(x, y - dy, x + w, y),
        colour(x, y + h, x + w, y + h + dy),
    ]
    contrast = np.min([np.abs(inner - side).sum(1) for side in sides], axis=0)
    contrast[(x + w > width) | (y + h > height)] = 0
    best = int(contrast.argmax())
    return np.array([x[best], y[best], w[best], h[best]]) if contrast[best] > 25 else None


def _moving_photo(
    rng: np.random.Generator,
    image: np.ndarray,
    parts: list[np.ndarray],
    times: np.ndarray,
    *,
    turn: float,
    rippled: float,
    others: list[np.ndarray],
) -> list[Scene]:
    """Scenes of a photograph under a moving camera: zoom, turn (radians), stretch, shear, distortion.

    The frame is the photograph's extent, on some sides more: there the photograph goes on mirrored,
    if the target is far enough from that side for its mirror image to be a thing of its own.
    """
    picture = Picture(image, parts)
    box = geo.bounds(np.concatenate(parts))
    size = math.sqrt(box[2] * box[3])
    zoom = math.exp(rng.uniform(math.log(min(max(20 / size, 0.4), 1.0)), 0))
    extent = np.array([image.shape[1], image.shape[0]], dtype=np.float64)
    room = np.concatenate([box[:2], extent - box[:2] - box[2:]]) > 0.35 * size
    margin = room * rng.uniform(0, 2.0 * size, 4) * (rng.random() < 0.7)
    frame = tuple(np.round((extent + margin[:2] + margin[2:]) * zoom).tolist())
    middle = (geo.centre(box) + margin[:2]) * zoom
    path = geo.smooth_path(rng, times, 6) * (0.15, turn, 0.14, 0.07, 0.3 * size * zoom, 0.3 * size * zoom)
    first_aspect = math.exp(rng.normal(0, 0.1))
    ripples = _ripples(rng, times, size * 1.5, rippled)
    scenes = []
    for ripple, (grow, angle, aspect, shear, x, y) in zip(ripples, path, strict=True):
        scale = zoom * math.exp(grow)
        matrix = geo.linear(angle, first_aspect * math.exp(aspect), shear) @ geo.stretch(scale, scale)
        base = Layer(picture, geo.about(matrix, geo.centre(box), middle + (x, y)), ripple)
        scenes.append(Scene(base, frame, haunts=[geo.apply(base.to_frame, p) for p in others]))
    return scenes


def _ripples(
    rng: np.random.Generator, times: np.ndarray, size: float, share: float
) -> list[geo.Ripple | None]:
    if rng.random() >= share:
        return [None] * len(times)
    return list(geo.ripple_path(rng, times, size, rng.uniform(0.01, 0.05)))


# --- a cut-out that moves over another picture ---


def paste_scenes(
    rng: np.random.Generator, catalog: Catalog, times: np.ndarray, *, leaves: float = LEAVES
) -> list[Scene] | None:
    """A cut-out that moves on its own; with probability `leaves` it goes out of view, and maybe returns."""
    target = catalog.objects[catalog.cutouts[rng.integers(len(catalog.cutouts))]]
    if target.label == MEANINGLESS and rng.random() < 0.5:
        return None
    sprite = cut_out(read_photo(catalog.photos[target.photo]), outline_of(target))
    if sprite.area < 0.2 * target.box[2] * target.box[3]:  # scattered bits
        return None
    own = math.sqrt(target.box[2] * target.box[3])
    size = min(math.exp(rng.uniform(math.log(20), math.log(110))), 1.3 * own)
    width = size * math.exp(rng.uniform(math.log(7), math.log(18)))
    frame = np.round(width * np.array([1, rng.uniform(0.55, 0.8)]))
    backs = _backdrop(rng, catalog, times, target, frame, size)
    places = _places(rng, times, frame, size, leaves)
    layers = _moving_cutout(rng, sprite, times, places, size / own)
    scenes = [Scene(b, tuple(frame.tolist()), [layer], 0) for b, layer in zip(backs, layers, strict=True)]
    if not scenes[0].in_view:
        return None
    if rng.random() < DISTRACTED["paste"]:
        add_distractors(rng, catalog, scenes, times, target, sprite)
    if rng.random() < OCCLUDED["paste"]:
        add_occluder(rng, catalog, scenes, times)
    return scenes


def _moving_cutout(
    rng: np.random.Generator, sprite: Picture, times: np.ndarray, places: np.ndarray, scale: float
) -> list[Layer]:
    """The target at `places` (N, 2), growing, turning, stretching, bending and relit as time goes."""
    turn = rng.choice([0.08, 0.35, 1.0], p=[0.6, 0.3, 0.1])
    path = geo.smooth_path(rng, times, 5) * (0.25, turn, 0.16, 0.08, rng.uniform(0, 0.2))
    tint = rng.normal(0, 0.1, 3)
    whole = geo.bounds(np.concatenate(sprite.parts))
    size = math.sqrt(whole[2] * whole[3])
    ripples = _ripples(rng, times, size, RIPPLED["paste"])
    first = geo.linear(rng.normal(0, 0.08), math.exp(rng.normal(0, 0.1)), 0)
    layers = []
    for place, ripple, (grow, angle, aspect, shear, light) in zip(places, ripples, path, strict=True):
        zoom = scale * math.exp(grow)
        matrix = geo.linear(angle, math.exp(aspect), shear) @ first @ geo.stretch(zoom, zoom)
        to_frame = geo.about(matrix, geo.centre(whole), place)
        streak = rng.normal(0, 0.1, 2) * size * zoom if rng.random() < STREAKED else None
        layers.append(Layer(sprite, to_frame, ripple, np.exp(tint + light), streak))
    return layers


def _backdrop(
    rng: np.random.Generator,
    catalog: Catalog,
    times: np.ndarray,
    target: PhotoObject,
    frame: np.ndarray,
    size: float,
) -> list[Layer]:
    """N layers that lie behind: a photograph that the camera pans, turns and zooms over, or a real clip."""
    camera = geo.smooth_path(rng, times, 4) * (0.6 * size, 0.6 * size, 0.05, 0.1)
    if catalog.clips and rng.random() < CLIP_BEHIND:
        clip = catalog.clips[rng.integers(len(catalog.clips))]
        room = len(clip.tracks[0]) - 1
        start = rng.integers(0, room + 1)
        numbers = np.minimum(start + times, room) if rng.random() < 0.5 else np.maximum(start - times, 0)
        pictures = [Picture(read_clip_frame(clip, int(n))) for n in numbers]
    else:
        pictures = [Picture(read_photo(catalog.photos[_other_photo(rng, catalog, target)]))] * len(times)
    extent = np.array(pictures[0].pixels.shape[1::-1], dtype=np.float64)
    zoom = math.exp(rng.uniform(math.log(0.7), math.log(1.6)))
    if (extent * zoom < frame / 2).any():  # no hall of mirrors
        zoom = float((frame / 2 / extent).max())
    layers = []
    for picture, (x, y, angle, grow) in zip(pictures, camera, strict=True):
        matrix = geo.linear(angle, 1.0, 0.0) @ geo.stretch(zoom * math.exp(grow), zoom * math.exp(grow))
        layers.append(Layer(picture, geo.about(matrix, extent / 2, frame / 2 + (x, y))))
    return layers


def _other_photo(rng: np.random.Generator, catalog: Catalog, target: PhotoObject) -> int:
    if catalog.plain and rng.random() < 0.5:
        return catalog.plain[rng.integers(len(catalog.plain))]
    index = int(rng.integers(len(catalog.photos)))
    return (index + 1) % len(catalog.photos) if index == target.photo else index


def _places(
    rng: np.random.Generator, times: np.ndarray, frame: np.ndarray, size: float, leaves: float
) -> np.ndarray:
    """Centres (N, 2) of the target in the frame, smooth in time; some leave the frame and come back."""
    rim = np.minimum(0.45 * size, frame / 2)
    start = frame * (0.5 + np.clip(rng.normal(0, 0.2, 2), -0.5, 0.5))
    drift = geo.smooth_path(rng, times, 2) * np.minimum(1.5 * size, 0.25 * frame)
    path = np.clip(np.clip(start, rim, frame - rim) + drift, rim, frame - rim)
    count = len(times)
    if count >= 3 and rng.random() < leaves:
        axis, end = int(rng.integers(2)), int(rng.integers(2))
        outside = end * frame[axis] + (2 * end - 1) * size * rng.uniform(0.6, 2.0)
        crossing = abs(outside - path[0, axis]) / (LEAVING_SPEED * size)
        first, last = np.sort(times[rng.integers(1, count, 2)])
        first = max(first, crossing)  # at the exemplar it is still where it was
        away = 1 - np.clip(np.maximum(first - times, times - max(first, last)) / crossing, 0, 1)
        path[:, axis] += away * away * (3 - 2 * away) * (outside - path[:, axis])
    return path


# --- a real video ---


def clip_scenes(rng: np.random.Generator, catalog: Catalog, frames: int, max_skip: int) -> Made:
    """Frames of one track of a real clip; only such where its box is known."""
    weights = np.array([_clip_weight(c) for c in catalog.clips])
    clip = catalog.clips[rng.choice(len(weights), p=weights / weights.sum())]
    track = clip.tracks[rng.integers(len(clip.tracks))]
    others = [other for other in clip.tracks if other is not track]
    numbers = _numbers(rng, track, frames, max_skip)
    scenes = _filmed(rng, lambda number: read_clip_frame(clip, number), track, others, numbers)
    times = np.abs(numbers - numbers[0])
    if scenes[0].in_view and rng.random() < OCCLUDED["clip"]:
        add_occluder(rng, catalog, scenes, times)
    return scenes, times


def track_scenes(
    rng: np.random.Generator, videos: tuple[Track, ...], frames: int, max_skip: int
) -> Made | None:
    """Frames of one video of a training set, each video as often; None where too few boxes are of use."""
    video = videos[rng.integers(len(videos))]
    sequence = video.read(video.path)
    files = sequence.frames
    assert not isinstance(files, Path), "the sets of readers.py come as images"
    boxes = np.where(usable(sequence.boxes, MIN_SIDE_CLIP, np.inf)[:, None], sequence.boxes, np.nan)
    if np.isfinite(boxes[:, 0]).sum() < 2:
        return None
    numbers = _numbers(rng, boxes, frames, max_skip)
    scenes = _filmed(rng, lambda number: read_image(files[number]), boxes, [], numbers)
    return scenes, np.abs(numbers - numbers[0])


def _filmed(
    rng: np.random.Generator,
    read: Callable[[int], np.ndarray],
    track: np.ndarray,
    others: list[np.ndarray],
    numbers: np.ndarray,
) -> list[Scene]:
    """Frames `numbers` of a video, all stretched alike (paper 3.4); `others`: tracks beside the target's."""
    stretched = geo.linear(0, math.exp(rng.normal(0, 0.1)), 0)
    scenes = []
    for number in numbers.tolist():
        image = read(number)
        size = geo.apply(stretched, np.array([image.shape[1], image.shape[0]], dtype=np.float64))
        known = [other[number] for other in others if np.isfinite(other[number]).all()]
        haunts = [geo.apply(stretched, geo.centre(box)) for box in known]
        picture = Picture(image, [geo.corners(track[number])])
        scenes.append(Scene(Layer(picture, stretched), tuple(size.tolist()), haunts=haunts))
    return scenes


def _numbers(rng: np.random.Generator, track: np.ndarray, frames: int, max_skip: int) -> np.ndarray:
    known = np.flatnonzero(np.isfinite(track[:, 0]))
    return known[_steps(rng, len(known), frames, max_skip)]


def _steps(rng: np.random.Generator, known: int, frames: int, max_skip: int) -> np.ndarray:
    """Which of `known` frames to take, (frames,) in time order or wholly reversed, with random skips."""
    limit = min(max_skip, max(1, int(1.5 * known / frames)))
    chosen = np.concatenate([[0], np.cumsum(rng.integers(1, limit + 1, frames - 1))])
    if chosen[-1] >= known:  # too few frames for these skips: spread over all of them, repeating if need be
        chosen = np.round(chosen * ((known - 1) / chosen[-1])).astype(int)
    chosen = chosen + rng.integers(0, known - chosen[-1])
    return chosen[::-1] if rng.random() < 0.5 else chosen


def _clip_weight(clip: Clip) -> float:
    """Longer clips give more; a street full of people counts once, not once a person."""
    return min(float(max(np.isfinite(t[:, 0]).sum() for t in clip.tracks)), 60.0)
