"""What the adapters' tests share: a made clip, the tracker's own answer, the blocks of docs/adapters.md."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from dmv_fast import FastDMVTracker

ROOT = Path(__file__).resolve().parent.parent
SIZE, SIDE = (320, 240), 48
BLUE, RED = (1.0, 0.5, 0.1), (0.1, 0.5, 1.0)


def clip(count: int = 10, seed: int = 0) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """A blue square and a red one of the same texture move over a textured background.

    Whoever swaps red and blue looks for the wrong one's colour, and sees other features everywhere.

    Returns:
        frames (240, 320, 3) uint8 BGR; the blue square's boxes and the red one's, (count, 4) xywh, whole.
    """
    rng = np.random.default_rng(seed)
    background = _texture(rng, SIZE, 20)
    pattern = _texture(rng, (SIDE, SIDE), 5)
    frames, blue, red = [], [], []
    for i in range(count):
        frame = background.copy()
        red.append((200 - 4 * i, 120 + 2 * i, SIDE, SIDE))
        blue.append((60 + 5 * i, 40 + 3 * i, SIDE, SIDE))
        for (x, y, w, h), tint in ((red[-1], RED), (blue[-1], BLUE)):
            frame[y : y + h, x : x + w] = (pattern * np.array(tint)).astype(np.uint8)
        frames.append(frame)
    return frames, np.array(blue, float), np.array(red, float)


def native(frames: Sequence[np.ndarray], box: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (n, 4) and scores (n,) of FastDMVTracker itself; the first row is what was given, and 1."""
    tracker = FastDMVTracker()
    tracker.init(frames[0], box)
    results = [tracker.track(frame) for frame in frames[1:]]
    return np.array([tuple(box), *(r.box for r in results)]), np.array([1.0, *(r.score for r in results)])


def swapped(frames: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The frames with red and blue exchanged."""
    return [np.ascontiguousarray(frame[:, :, ::-1]) for frame in frames]


def write_video(path: Path, frames: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Writes the frames as a video; returns them as they are read back."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 25, SIZE)
    for frame in frames:
        writer.write(frame)
    writer.release()
    capture = cv2.VideoCapture(str(path))
    read = [capture.read()[1] for _ in frames]
    assert all(frame is not None for frame in read), "this OpenCV cannot write a video"
    return read


def blocks(section: str, language: str) -> list[str]:
    """The fenced blocks of one section of docs/adapters.md, in order."""
    page = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8")
    (text,) = (part for part in page.split("\n## ") if part.startswith(section + "\n"))
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def _texture(rng: np.random.Generator, size: tuple[int, int], cell: int) -> np.ndarray:
    small = rng.integers(40, 255, (size[1] // cell + 1, size[0] // cell + 1, 3), dtype=np.uint8)
    return cv2.resize(small, size, interpolation=cv2.INTER_CUBIC)
