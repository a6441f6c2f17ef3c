"""What a training folder holds: photographs with boxes and outlines, clips with boxed tracks.

    ROOT/annotations.jsonl   a photograph a line: {image, dataset, width, height, objects [{bbox, label,
                             polygons}]}; without objects it is a background; polygons may be missing
    ROOT/images/...          the photographs
    ROOT/clips/NAME.mp4      a clip; NAME.K.txt holds track K, a line x,y,w,h a frame (NaN: box unknown)

Boxes are xywh in pixels, continuous; polygons are flat lists x0, y0, x1, y1, ...; several make one object.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np

from dmv_fast.evaluation.datasets import DatasetError, read_rows

HELD_OUT_SHARE = 0.08
_MIN_SIDE = 12  # pixels of a photograph: a smaller object has no texture left to enlarge
MIN_SIDE_CLIP = 7  # real small targets exist and look like this
_MAX_SHARE = 0.7  # of the photograph: nothing left to be told apart from
_MAX_ASPECT = 5.0
_SALT = "c"
# Sets that show one subject throughout (some photographs twice): a held-out part would not be unseen.
_ONE_SUBJECT = ("raccoon", "kangaroo", "playing_cards")


@dataclass(frozen=True)
class PhotoObject:
    """One annotated object of photograph `photo` (an index into `Catalog.photos`)."""

    photo: int
    box: tuple[float, float, float, float]
    label: str
    polygons: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Photo:
    path: Path
    width: int
    height: int
    dataset: str


@dataclass(frozen=True)
class Clip:
    """A clip and its tracks, each (frames, 4) float64 xywh, NaN where unknown or unusable."""

    path: Path
    tracks: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Catalog:
    photos: list[Photo]
    objects: list[PhotoObject]  # usable as targets
    cutouts: list[int]  # objects that have an outline
    plain: list[int]  # photographs without objects
    clips: list[Clip]
    alike: dict[str, list[int]] = field(default_factory=dict)  # label -> cut-outs of that label
    together: dict[int, list[int]] = field(default_factory=dict)  # photograph -> its objects


def scene_of(name: str) -> str:
    """The scene a photograph or clip shows, from its file's stem: what must not be split by a hold-out.

    Photographs of one drive, takes _a, _b, _2 of one clip and one photograph in two sets share a scene.
    """
    name = re.sub(r"^(tiny_)?coco\d*_", "coco_", name)
    name = re.sub(r"^(CamVid_[^_]+)_.*", r"\1", name)
    return re.sub(r"_[a-z0-9]$", "", name)


def is_held_out(name: str) -> bool:
    """Whether the photograph or clip of this file stem is kept for validation; fixed, from its name alone."""
    if name.startswith(_ONE_SUBJECT):
        return False
    digest = hashlib.sha1(f"{_SALT}/{scene_of(name)}".encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32


def usable(box: np.ndarray, min_side: float, max_area: float) -> np.ndarray:
    """Which boxes (..., 4) are large enough, not most of the picture and not extremely thin -> (...) bool."""
    w, h = box[..., 2], box[..., 3]
    small, large = np.minimum(w, h), np.maximum(w, h)
    return (small >= min_side) & (w * h <= max_area) & (large <= _MAX_ASPECT * small)


def load_catalog(root: Path, *, held_out: bool = False) -> Catalog:
    """Read the folder's annotations: the held-out part, or everything else.

    Raises FileNotFoundError when there is neither `annotations.jsonl` nor a `clips` folder, DatasetError (a
    ValueError) at a line of an annotation that is none.
    """
    annotations, clips = root / "annotations.jsonl", root / "clips"
    if not annotations.exists() and not clips.exists():
        raise FileNotFoundError(f"root: {root} holds neither annotations.jsonl nor clips/")
    catalog = Catalog([], [], [], [], [])
    if annotations.exists():
        with annotations.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                    if is_held_out(Path(record["image"]).stem) == held_out:
                        _add_photo(catalog, root, record)
                except (ValueError, TypeError, KeyError, AttributeError) as error:
                    what = f"has no {error}" if isinstance(error, KeyError) else error
                    raise DatasetError(f"{annotations}, line {number}: {what}") from None
    for path in sorted(clips.glob("[!.]*.mp4")):
        if is_held_out(path.stem) == held_out:
            tracks = tuple(_read_track(p) for p in sorted(clips.glob(f"{path.stem}.*.txt")))
            tracks = tuple(t for t in tracks if np.isfinite(t[:, 0]).sum() >= 2)
            if tracks:
                catalog.clips.append(Clip(path, tracks))
    return catalog


def _add_photo(catalog: Catalog, root: Path, record: dict) -> None:
    index = len(catalog.photos)
    width, height = record["width"], record["height"]
    catalog.photos.append(Photo(root / record["image"], width, height, record["dataset"]))
    if not record["objects"]:
        catalog.plain.append(index)
    for entry in record["objects"]:
        box = np.asarray(entry["bbox"], dtype=np.float64)
        if box.shape != (4,):
            raise ValueError(f"bbox is {entry['bbox']!r}; it must be four numbers x, y, w, h")
        if not usable(box, _MIN_SIDE, _MAX_SHARE * width * height):
            continue
        outlines = entry.get("polygons") or ()
        if any(np.ndim(p) != 1 or len(p) % 2 for p in outlines):
            raise ValueError("polygons must be flat lists x0, y0, x1, y1, ...")
        polygons = tuple(tuple(p) for p in outlines if len(p) >= 6)
        number = len(catalog.objects)
        catalog.objects.append(PhotoObject(index, tuple(box), entry["label"], polygons))
        catalog.together.setdefault(index, []).append(number)
        if polygons:
            catalog.cutouts.append(number)
            catalog.alike.setdefault(entry["label"], []).append(number)


def _read_track(path: Path) -> np.ndarray:
    boxes = read_rows(path)
    boxes[~usable(boxes, MIN_SIDE_CLIP, np.inf)] = np.nan
    return boxes


def read_photo(photo: Photo) -> np.ndarray:
    """The photograph, (height, width, 3) uint8 BGR. Raises OSError when it cannot be read."""
    image = cv2.imread(str(photo.path), cv2.IMREAD_COLOR)
    if image is None:
        raise OSError(f"cannot read the photograph {photo.path}")
    return image


@lru_cache(maxsize=64)
def _clip_frames(path: Path) -> tuple[np.ndarray, ...]:
    """Every frame of a clip as near-lossless JPEG bytes: seeking in video is slow, raw frames are large."""
    reader = cv2.VideoCapture(str(path))
    frames = []
    while True:
        ok, frame = reader.read()
        if not ok:
            break
        frames.append(cv2.imencode(".jpg", frame, (cv2.IMWRITE_JPEG_QUALITY, 97))[1])
    reader.release()
    if not frames:
        raise OSError(f"cannot read the clip {path}")
    return tuple(frames)


def read_clip_frame(clip: Clip, frame: int) -> np.ndarray:
    """Frame `frame` of a clip, (height, width, 3) uint8 BGR; the clip stays in memory, compressed."""
    frames = _clip_frames(clip.path)
    if frame >= len(frames):
        raise OSError(f"the clip {clip.path} has {len(frames)} frames, a track of it names frame {frame}")
    image = cv2.imdecode(frames[frame], cv2.IMREAD_COLOR)
    assert image is not None, "_clip_frames has encoded it"
    return image
