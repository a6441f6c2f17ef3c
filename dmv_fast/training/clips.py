"""Whole made videos, to measure a tracker on: out of view and back, occluded, among others like it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dmv_fast.training import geometry as geo
from dmv_fast.training.augment import Look, expose, random_look
from dmv_fast.training.catalog import load_catalog
from dmv_fast.training.data import SEEN
from dmv_fast.training.scenes import paste_scenes
from dmv_fast.training.synth import Scene, draw_frame

_MAX_WIDTH = 800  # pixels of a frame
_TRIES = 200


@dataclass(frozen=True)
class MadeClip:
    """A video of one cut-out over a moving background; iterate over it for (frame, box), frame by frame.

    A frame is (H, W, 3) uint8 BGR, a box (4,) float64 xywh in its pixels, NaN while the target cannot be
    seen (out of the frame or covered by more than 65 %). The same frames every time.
    """

    scenes: list[Scene]
    look: Look
    seed: int

    def __len__(self) -> int:
        return len(self.scenes)

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        rng = np.random.default_rng(self.seed)
        for number, scene in enumerate(self.scenes):
            shot = draw_frame(scene)
            box = scene.box if shot.share >= SEEN else np.full(4, np.nan)
            yield expose(shot, self.look, number, rng), box


def make_clip(
    root: Path, *, seed: int, frames: int = 150, leaves: bool = False, held_out: bool = True
) -> MadeClip:
    """A video of `frames` consecutive frames from a training folder, by default from its held-out part.

    leaves: whether the target goes out of the frame for ten frames or more and is back for the last ten,
    anywhere on the side on which it left.
    Raises ValueError where the folder's part has no cut-outs, or none that makes such a video.
    """
    catalog = load_catalog(Path(root), held_out=held_out)
    if not catalog.cutouts:
        raise ValueError(f"root: {root} has no objects with outlines in the part asked for")
    rng = np.random.default_rng([seed, frames, int(leaves), int(held_out)])
    times = np.arange(frames)
    for _ in range(_TRIES):
        scenes = paste_scenes(rng, catalog, times, leaves=float(leaves))
        if scenes is None or scenes[0].size[0] > _MAX_WIDTH:
            continue
        gone = np.array([not scene.in_view for scene in scenes])
        returns = gone.sum() >= 10 and not gone[-10:].any()
        if returns if leaves else not gone.any():
            if leaves:
                _return_elsewhere(rng, scenes, gone)
            return MadeClip(scenes, random_look(rng, times), seed)
    raise ValueError(f"root: no such video in {_TRIES} draws from {root}")


def _return_elsewhere(rng: np.random.Generator, scenes: list[Scene], gone: np.ndarray) -> None:
    """Shift the target along the side at which it is out of the frame, from the midst of its absence on."""
    last = int(np.flatnonzero(gone)[-1])
    first = last - int(np.argmax(~gone[last::-1])) + 1
    middle = scenes[(first + last) // 2]
    out = np.maximum(-middle.centre, middle.centre - middle.size)  # pixels beyond the frame, by axis
    along = int(out[0] > out[1])
    later = [scene.centre[along] for scene in scenes[(first + last) // 2 :]]
    rim = 0.5 * float(np.ptp(np.concatenate(middle.parts)[:, along]))
    move = np.zeros(2)
    move[along] = rng.uniform(min(rim - min(later), 0), max(middle.size[along] - rim - max(later), 0))
    for number in range((first + last) // 2, len(scenes)):
        scene = scenes[number]
        layers = list(scene.layers)
        target = layers[scene.target]
        layers[scene.target] = replace(target, to_frame=geo.shift(*move) @ target.to_frame)
        scenes[number] = Scene(scene.base, scene.size, layers, scene.target, scene.haunts)
