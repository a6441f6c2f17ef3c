"""Training samples: N search crops of one target with its boxes (paper 3.4), an endless stream by index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
from torch.utils.data import Dataset

from dmv_fast.training.augment import develop, random_look
from dmv_fast.training.catalog import Catalog, load_catalog
from dmv_fast.training.follow import tracked_window, window_for
from dmv_fast.training.readers import LISTERS, tracks
from dmv_fast.training.recipe import MIX, Recipe
from dmv_fast.training.scenes import Made, make_scenes, track_scenes
from dmv_fast.training.synth import Scene, Shot, draw
from dmv_fast.vision.crop import CROP_SIZE, Window, search_window

SEEN = 0.35  # share of the target that must be visible in the crop for it to count as present
_HINT = 0.08  # a lesser share than this is as good as absent; what lies between is drawn again
# standard deviation of the colours within the box, grey levels: nothing can be seen of a target with less
_MIN_CONTRAST = 4.0
_MIN_CONTRAST_EXEMPLAR = 10.0
_TRIES = 100


@dataclass(frozen=True)
class Sample:
    """N frames of one target, in time order; frame 0 is the exemplar.

    crops: (N, 256, 256, 3) uint8 BGR. boxes: (N, 4) float32 xywh in crop pixels, continuous, NaN where the
    target is absent; a box may reach over the crop's edge. present: (N,) bool, at least 35 % of the
    target is visible in the crop.
    """

    crops: np.ndarray
    boxes: np.ndarray
    present: np.ndarray


@lru_cache(maxsize=8)
def _catalog(root: Path, held_out: bool) -> Catalog:
    return load_catalog(root, held_out=held_out)


class SampleStream(Dataset[Sample]):
    """Endless training samples: `stream[index]` depends on (seed, index) and the files drawn from alone.

    root: a folder as `dmv_fast.training.catalog` has it. frames: N, the exemplar included. max_skip: most
    frames between two of a sample. mix: weights of the kinds of samples, by default `MIX`; a kind that the
    folder has no material for is left out. sets: folder of each kind that is a training set of real videos
    (`dmv_fast.training.readers`); with nothing but these, root is not read. held_out: draw from the part of
    it all kept for validation, which a stream with held_out=False never touches.

    Raises ValueError for a bad argument or a folder with nothing usable, FileNotFoundError when it is none.
    """

    def __init__(
        self,
        root: Path,
        *,
        seed: int,
        frames: int,
        max_skip: int = 100,
        mix: Mapping[str, float] | None = None,
        sets: Mapping[str, Path] | None = None,
        held_out: bool = False,
    ) -> None:
        if frames < 1:
            raise ValueError(f"frames: {frames}, it must be 1 or more")
        if max_skip < 1:
            raise ValueError(f"max_skip: {max_skip}, it must be 1 or more")
        mix, self.sets = dict(MIX if mix is None else mix), dict(sets or {})
        known = {*MIX, *self.sets}
        if unknown := set(mix) - known:
            raise ValueError(f"mix: no kind of sample is called {sorted(unknown)}; there are {sorted(known)}")
        self.root, self.seed, self.frames = Path(root), seed, frames
        self.max_skip, self.held_out = max_skip, held_out
        self.mix = {kind: weight for kind, weight in mix.items() if weight > 0 and self._stock(kind)}
        if not self.mix:
            part = " in the part kept for validation" if held_out else ""
            raise ValueError(f"root: {self.root} holds no material for any of {sorted(mix)}{part}")

    def __getitem__(self, index: int) -> Sample:
        return self.sample(index, self.frames)

    def sample(self, index: int, frames: int) -> Sample:
        """Sample `index` with another N than the stream's own."""
        rng, kind = self._begin(index)
        for _ in range(_TRIES):
            made = self._make(rng, kind, frames)
            if made is None or not made[0][0].in_view:
                continue
            sample = _shoot(rng, *made)
            if sample is not None:
                return sample
        where = self.sets.get(kind, self.root)
        raise RuntimeError(f"no usable sample of kind {kind!r} in {_TRIES} draws from {where}")

    def kind(self, index: int) -> str:
        """Of which kind sample `index` is."""
        return self._begin(index)[1]

    def _begin(self, index: int) -> tuple[np.random.Generator, str]:
        if index < 0:
            raise IndexError(f"index: {index}, it must be 0 or more")
        rng = np.random.default_rng([self.seed, index, int(self.held_out)])
        weights = np.array(list(self.mix.values()))
        return rng, list(self.mix)[rng.choice(len(weights), p=weights / weights.sum())]

    def _make(self, rng: np.random.Generator, kind: str, frames: int) -> Made | None:
        if kind in self.sets:
            videos = tracks(kind, self.sets[kind], self.held_out)
            return track_scenes(rng, videos, frames, self.max_skip)
        return make_scenes(rng, _catalog(self.root, self.held_out), kind, frames, self.max_skip)

    def _stock(self, kind: str) -> Sequence[object]:
        """What samples of a kind are made from; empty: nothing."""
        if kind in self.sets:
            return tracks(kind, self.sets[kind], self.held_out)
        catalog = _catalog(self.root, self.held_out)
        stock: dict[str, Sequence[object]] = {
            "paste": catalog.cutouts,
            "photo": catalog.objects,
            "clip": catalog.clips,
            "region": catalog.plain,
        }
        return stock[kind]


def recipe_stream(recipe: Recipe, data: Path, *, held_out: bool = False) -> SampleStream:
    """The samples that a recipe trains on, or the ones kept for validation. data: the folder of `--data`."""
    mix, sets = recipe.mix, None
    if recipe.sources is not None:
        mix = {source.kind: source.weight for source in recipe.sources}
        sets = {source.kind: source.folder(data) for source in recipe.sources if source.kind in LISTERS}
    return SampleStream(
        data, seed=recipe.seed + held_out, frames=max(recipe.frames), max_skip=recipe.max_skip,
        mix=mix, sets=sets, held_out=held_out,
    )  # fmt: skip


def _shoot(rng: np.random.Generator, scenes: list[Scene], times: np.ndarray) -> Sample | None:
    """Crops of the scenes as a tracker sees them; None when the exemplar does not show its target."""
    count = len(scenes)
    look = random_look(rng, times)
    crops = np.empty((count, CROP_SIZE, CROP_SIZE, 3), np.uint8)
    boxes = np.full((count, 4), np.nan, np.float32)
    present = np.zeros(count, bool)
    last = scenes[0].box
    for i, scene in enumerate(scenes):
        if i == 0:
            window, shot = _exemplar(scene)
        else:
            window, shot = _instance(rng, scene, last)
        crops[i] = develop(shot, look, i, rng)
        if scene.in_view:
            last = scene.box
            box = window.to_crop(scene.box)
            needed = _MIN_CONTRAST if i else _MIN_CONTRAST_EXEMPLAR
            if shot.share >= SEEN and _contrast(crops[i], box) > needed:
                boxes[i], present[i] = box, True
        if not present[0]:
            return None
    if look.flip:
        crops = np.ascontiguousarray(crops[:, :, ::-1])
        boxes[:, 0] = CROP_SIZE - boxes[:, 0] - boxes[:, 2]
    return Sample(crops, boxes, present)


def _exemplar(scene: Scene) -> tuple[Window, Shot]:
    """The first frame, exactly around the box; nobody starts a tracker on a covered target."""
    window = search_window(scene.box)
    shot = draw(scene, window)
    if shot.share < 0.9 and len(scene.layers) > scene.target + 1:
        scene.layers = scene.layers[: scene.target + 1]
        shot = draw(scene, window)
    return window, shot


def _instance(rng: np.random.Generator, scene: Scene, last: np.ndarray) -> tuple[Window, Shot]:
    """A later frame, where a tracker looks; not so that it is doubtful whether the target is in it."""
    window = window_for(rng, scene, last)
    shot = draw(scene, window)
    if scene.in_view and _HINT < shot.share < SEEN:
        window = tracked_window(rng, scene.box)
        shot = draw(scene, window)
    return window, shot


def _contrast(crop: np.ndarray, box: np.ndarray) -> float:
    """Standard deviation of the colours in a box: low where it is dark, even, or the target out of sight."""
    x0, y0 = np.maximum(box[:2], 0).astype(int)
    x1, y1 = np.minimum(np.ceil(box[:2] + box[2:]), CROP_SIZE).astype(int)
    return float(cv2.meanStdDev(crop[y0:y1, x0:x1])[1].mean())


def contact_sheet(samples: list[Sample], titles: list[str] | None = None) -> np.ndarray:
    """What the network sees, uint8 BGR: a row a sample, boxes in green, frames without the target in red."""
    rows = []
    for sample in samples:
        cells = []
        for crop, box, present in zip(sample.crops, sample.boxes, sample.present, strict=True):
            cell = crop.copy()
            if present:
                x, y, w, h = box
                low = (round(float(x) * 16 - 8), round(float(y) * 16 - 8))
                high = (round(float(x + w) * 16 - 8), round(float(y + h) * 16 - 8))
                cv2.rectangle(cell, low, high, (0, 255, 0), 1, cv2.LINE_AA, 4)
            else:
                cv2.rectangle(cell, (1, 1), (CROP_SIZE - 2, CROP_SIZE - 2), (0, 0, 255), 3)
            cells.append(cv2.copyMakeBorder(cell, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=(255, 255, 255)))
        rows.append(np.hstack(cells))
    for row, title in zip(rows, titles or [], strict=bool(titles)):
        for colour, width in (((0, 0, 0), 3), ((255, 255, 255), 1)):
            cv2.putText(row, title, (6, 18), cv2.FONT_HERSHEY_SIMPLEX, 0.5, colour, width, cv2.LINE_AA)
    width = max(row.shape[1] for row in rows)
    return np.vstack([cv2.copyMakeBorder(r, 0, 0, 0, width - r.shape[1], cv2.BORDER_CONSTANT) for r in rows])
