"""What surrounds a target: others that look like it, and things that pass before it."""

from __future__ import annotations

import math

import numpy as np

from dmv_fast.training import geometry as geo
from dmv_fast.training.catalog import Catalog, PhotoObject, read_photo
from dmv_fast.training.synth import Layer, Picture, Scene, cut_out

COPIES = 0.4  # of the distractors: altered copies of the target
ALIKE = 0.35  # of the distractors: other objects of its label
ALONG = 0.4  # of the distractors: they go where the target goes; the others stay about where it began


def outline_of(thing: PhotoObject) -> list[np.ndarray]:
    """The object's polygons (P, 2) each, made to span its box exactly; an ellipse in the box if it has none.

    Sets differ in whether a polygon runs through the centres or along the edges of the outer pixels;
    the boxes agree. The ellipse turns into a box of sensible size when it is rotated.
    """
    box = np.array(thing.box)
    if not thing.polygons:
        return [ellipse(box)]
    parts = [np.array(p).reshape(-1, 2) for p in thing.polygons]
    span = geo.bounds(np.concatenate(parts))
    factor = box[2:] / np.maximum(span[2:], 1e-6)
    return [(p - span[:2]) * factor + box[:2] for p in parts]


def ellipse(box: np.ndarray) -> np.ndarray:
    """Points (64, 2) of the ellipse that touches a box from inside."""
    angle = np.arange(64) * (2 * math.pi / 64)
    return geo.centre(box) + np.stack([np.cos(angle), np.sin(angle)], 1) * box[2:] / 2


def add_distractors(
    rng: np.random.Generator,
    catalog: Catalog,
    scenes: list[Scene],
    times: np.ndarray,
    target: PhotoObject,
    sprite: Picture,
) -> None:
    """One to three others that move about the target, before or behind it.

    They are altered copies of it (`sprite`: mirrored, turned, relit, resized), objects of its label, or any
    objects.
    """
    size = math.sqrt(np.prod(scenes[0].box[2:]))
    alike = catalog.alike.get(target.label, ())
    for _ in range(int(rng.integers(1, 4))):
        draw = rng.random()
        if draw < COPIES:
            other = sprite
        elif draw < COPIES + ALIKE and len(alike) > 1:
            other = read_cutout(catalog, alike[rng.integers(len(alike))])
        else:
            other = read_cutout(catalog, catalog.cutouts[rng.integers(len(catalog.cutouts))])
        _circle(rng, scenes, times, other, size)


def _circle(
    rng: np.random.Generator, scenes: list[Scene], times: np.ndarray, other: Picture, size: float
) -> None:
    """Lay `other`, about `size` large, into every scene, wandering around the target or its first place."""
    own = geo.bounds(np.concatenate(other.parts))
    scale = size * math.exp(np.clip(rng.normal(0, 0.25), -0.6, 0.6)) / math.sqrt(own[2] * own[3])
    mirror = -1.0 if rng.random() < 0.5 else 1.0
    light = np.exp(rng.normal(0, 0.12, 3) + rng.normal(0, 0.12))
    path = geo.smooth_path(rng, times, 4) * (0.8, 0.5, 0.2, 0.15)
    turned = rng.normal(0, 0.15)
    angle, distance = rng.uniform(0, 2 * math.pi), rng.uniform(1.1, 2.6) * size
    below, along = rng.random() < 0.5, rng.random() < ALONG
    for scene, (swing, nearer, turn, grow) in zip(scenes, path, strict=True):
        offset = np.array([math.cos(angle + swing), math.sin(angle + swing)]) * distance * (1 + nearer)
        where = (scene if along else scenes[0]).centre + offset
        zoom = scale * math.exp(grow)
        matrix = geo.linear(turned + turn, 1, 0) @ geo.stretch(mirror * zoom, zoom)
        layer = Layer(other, geo.about(matrix, geo.centre(own), where), None, light)
        scene.haunts.append(where)
        if below and scene.target >= 0:
            scene.layers.insert(0, layer)
            scene.target += 1
        else:
            scene.layers.append(layer)


def add_occluder(rng: np.random.Generator, catalog: Catalog, scenes: list[Scene], times: np.ndarray) -> None:
    """Something that passes over the target and covers it, in part or wholly, in some later frame."""
    if len(scenes) < 2 or not catalog.photos:
        return
    when = int(rng.integers(1, len(scenes)))
    size = math.sqrt(np.prod(scenes[0].box[2:]))
    picture = _occluder(rng, catalog)
    own = geo.bounds(np.concatenate(picture.parts))
    scale = size * rng.uniform(0.6, 1.8) / math.sqrt(own[2] * own[3])
    matrix = geo.linear(rng.normal(0, 0.3), 1, 0) @ geo.stretch(scale, scale)
    # fast enough to be gone at the exemplar
    speed = max(size * rng.uniform(0.5, 5) / 100, 2.4 * size / max(times[when], 1))
    angle = rng.uniform(0, 2 * math.pi)
    velocity = speed * np.array([math.cos(angle), math.sin(angle)])
    missed = rng.normal(0, 0.3, 2) * size
    for scene, time in zip(scenes, times, strict=True):
        where = scene.centre + missed + velocity * (time - times[when])
        scene.layers.append(Layer(picture, geo.about(matrix, geo.centre(own), where)))


def _occluder(rng: np.random.Generator, catalog: Catalog) -> Picture:
    """Some object, or a four-cornered piece of some photograph."""
    if catalog.cutouts and rng.random() < 0.6:
        return read_cutout(catalog, catalog.cutouts[rng.integers(len(catalog.cutouts))])
    image = read_photo(catalog.photos[rng.integers(len(catalog.photos))])
    extent = np.array(image.shape[1::-1])
    size = extent * rng.uniform(0.15, 0.6, 2)
    corner = rng.uniform(0, extent - size)
    polygon = geo.corners(np.concatenate([corner, size])) + rng.normal(0, 0.08, (4, 2)) * size
    return cut_out(image, [np.clip(polygon, 0, extent)])


def read_cutout(catalog: Catalog, index: int) -> Picture:
    thing = catalog.objects[index]
    return cut_out(read_photo(catalog.photos[thing.photo]), outline_of(thing))
