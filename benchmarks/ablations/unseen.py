"""The training folder's held-out part as sequences on disk, in OTB's layout: a second set to measure on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np

from dmv_fast.training.catalog import load_catalog, read_clip_frame
from dmv_fast.training.clips import make_clip

SHORTEST = 10  # frames: a track of five measures nothing
MADE = 4
MADE_FRAMES = 120


def write_unseen(data: Path, out: Path, *, made: int = MADE, frames: int = MADE_FRAMES) -> Path:
    """Real tracks, NAME.K, and made clips, made-SEED (odd: the target leaves and returns); returns `out`.

    What is there already stays.
    """
    for clip in load_catalog(data, held_out=True).clips:
        for number, track in enumerate(clip.tracks):
            known = np.flatnonzero(np.isfinite(track[:, 0]))
            first, last = int(known[0]), int(known[-1])
            if last - first + 1 >= SHORTEST:
                images = (read_clip_frame(clip, i) for i in range(first, last + 1))
                _write(out / f"{clip.path.stem}.{number}", zip(images, track[first : last + 1], strict=True))
    for seed in range(made):
        folder = out / f"made-{seed}"
        if not folder.is_dir():
            _write(folder, make_clip(data, seed=seed, frames=frames, leaves=seed % 2 == 1))
    return out


def _write(folder: Path, frames: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
    if folder.is_dir():
        return
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    (part / "img").mkdir(parents=True)
    lines = []
    for number, (image, box) in enumerate(frames, start=1):
        cv2.imwrite(str(part / "img" / f"{number:06d}.jpg"), image, (cv2.IMWRITE_JPEG_QUALITY, 95))
        lines.append(",".join(f"{v:.2f}" for v in box) + "\n")
    (part / "groundtruth_rect.txt").write_text("".join(lines))
    os.replace(part, folder)
