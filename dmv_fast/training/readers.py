"""Training sets of real videos, as they lie on disk after unpacking. At first only their lists are read.

    got10k       [train/]list.txt, NAME/%08d.jpg, NAME/groundtruth.txt, cover.label, absence.label
    lasot        [CLASS/]CLASS-1/img/*.jpg, groundtruth.txt, full_occlusion.txt, out_of_view.txt; and
                 training_set.txt or testing_set.txt of the benchmark, a name a line
    trackingnet  TRAIN_0 .. TRAIN_11, each with anno/NAME.txt and frames/NAME/%d.jpg

The three hold 40,000 videos: their annotations are parsed when a sample is drawn from them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from dmv_fast.evaluation.datasets import (
    DatasetError,
    Sequence,
    lasot_folders,
    listed_folders,
    read_got10k_sequence,
    read_lasot_sequence,
    read_lines,
    read_trackingnet_sequence,
)

HELD_OUT = 0.01  # of a set's videos, at least one of them, are kept for validation


@dataclass(frozen=True)
class Track:
    """One target in one video, unread: `read(path)` gives its frames and boxes."""

    name: str
    path: Path
    read: Callable[[Path], Sequence]


def list_got10k(root: Path) -> list[Track]:
    """GOT-10k's training subset: `root` is the folder `train` or the one that holds it."""
    if not (root / "list.txt").is_file():
        root = root / "train"
    folders = listed_folders(root / "list.txt", root)
    return [Track(folder.name, folder, read_got10k_sequence) for folder in folders]


def list_lasot(root: Path) -> list[Track]:
    """LaSOT without its test videos."""
    names = [root / f"{part}_set.txt" for part in ("training", "testing")]
    listing = next((path for path in names if path.is_file()), None)
    if listing is None:
        raise DatasetError(
            f"{root}: holds neither training_set.txt nor testing_set.txt; put one of LaSOT's there, or its "
            "test videos would be trained on"
        )
    listed = {line.strip() for line in read_lines(listing)}
    folders = lasot_folders(root)
    if listing.name == "training_set.txt":
        found = {folder.name for folder in folders}
        if missing := sorted(listed - found - {""}):
            raise DatasetError(f"{listing}: names {missing[0]}, which has no groundtruth.txt in {root}")
        folders = [folder for folder in folders if folder.name in listed]
    else:
        folders = [folder for folder in folders if folder.name not in listed]
    return [Track(folder.name, folder, read_lasot_sequence) for folder in folders]


def list_trackingnet(root: Path) -> list[Track]:
    """TrackingNet's training chunks, as many as there are."""
    chunks = sorted(path for path in root.glob("TRAIN_*") if path.is_dir())
    if not chunks:
        raise DatasetError(f"{root}: has no folders TRAIN_0, TRAIN_1, ...")
    tracks = []
    for chunk in chunks:
        if not (chunk / "anno").is_dir():
            raise DatasetError(f"{chunk / 'anno'}: no such folder of annotations")
        for path in sorted((chunk / "anno").glob("[!.]*.txt")):
            tracks.append(Track(path.stem, path, read_trackingnet_sequence))
    return tracks


LISTERS: dict[str, Callable[[Path], list[Track]]] = {
    "got10k": list_got10k,
    "lasot": list_lasot,
    "trackingnet": list_trackingnet,
}


@lru_cache(maxsize=8)
def tracks(kind: str, root: Path, held_out: bool) -> tuple[Track, ...]:
    """The videos of a training set: those kept for validation, or the others. `kind`: a name of LISTERS.

    The hundredth whose names have the lowest hash is kept, so the same videos everywhere.
    Raises DatasetError where the folder, or anything in its lists, is not as that layout has it.
    """
    if not root.is_dir():
        raise DatasetError(f"source {kind}: {root}: no such folder")
    found = LISTERS[kind](root)
    if len(found) < 2:
        raise DatasetError(f"source {kind}: {root} has {len(found)} videos; it needs two at least")
    ranked = sorted(found, key=lambda track: hashlib.sha1(track.name.encode()).digest())
    kept = max(1, round(HELD_OUT * len(ranked)))
    return tuple(ranked[:kept] if held_out else ranked[kept:])
