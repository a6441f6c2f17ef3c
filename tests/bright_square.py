"""Small videos of a bright square, a tracker that follows it, and a worker that waits to be killed."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from dmv_fast.commands.annotate import Video
from dmv_fast.evaluation.trackers import Step

FRAMES = 8
SIDE = 10
BOX = (10.0, 20.0, 10.0, 10.0)


@dataclass
class BrightTracker:
    """A factory and its tracker: the box follows the bright pixels; the score counts the frames."""

    marker: Path | None = None
    """The first process to reach frame 3 writes its number here, and waits for its end."""
    always: bool = False
    """It ends itself at frame 3, each time."""
    seconds: float = 0.0
    """A frame takes so long."""

    def __call__(self) -> BrightTracker:
        return BrightTracker(self.marker, self.always, self.seconds)

    def settings(self) -> dict[str, object]:
        return {"tracker": "bright"}

    def init(self, image: np.ndarray, bbox: tuple[float, ...]) -> None:
        self.frame = 0

    def track(self, image: np.ndarray) -> Step:
        self.frame += 1
        time.sleep(self.seconds)
        if self.frame == 3 and self.always:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.frame == 3 and self.marker is not None:
            self._wait_for_death()
        y, x = (float(where.mean()) + 0.5 for where in np.nonzero(image[..., 0] > 200))
        return Step((x - SIDE / 2, y - SIDE / 2, SIDE, SIDE), self.frame / 10, True)

    def _wait_for_death(self) -> None:
        try:
            with open(self.marker, "x") as file:
                file.write(f"{os.getpid()}\n")
        except FileExistsError:  # another one was first
            return
        time.sleep(60)


def make_videos(folder: Path, names: list[str]) -> list[Video]:
    """A folder of images each; the square of the nth moves a pixel a frame down and n to the right."""
    listed = []
    for step, name in enumerate(names):
        (folder / name).mkdir()
        for frame in range(FRAMES):
            image = np.zeros((60, 80, 3), np.uint8)
            x, y = int(BOX[0]) + step * frame, int(BOX[1]) + frame
            image[y : y + SIDE, x : x + SIDE] = 255
            cv2.imwrite(str(folder / name / f"{frame}.png"), image)
        listed.append(Video(name, str(folder / name), BOX, name))
    return listed


def tables(out: Path) -> dict[str, str]:
    """Name -> text of the boxes in a folder."""
    return {path.stem: path.read_text() for path in sorted(out.glob("*.csv"))}


def expected_tables(names: list[str]) -> dict[str, str]:
    """What BrightTracker makes of `make_videos`."""
    answer = {}
    for step, name in enumerate(names):
        rows = ["frame,x,y,w,h,score,found"]
        for f in range(FRAMES):
            score = f / 10 if f else 1.0
            rows.append(f"{f},{BOX[0] + step * f:.3f},{BOX[1] + f:.3f},{SIDE:.3f},{SIDE:.3f},{score:.4f},1")
        answer[name] = "\n".join(rows) + "\n"
    return answer


class Killer(threading.Thread):
    """Waits for the marker of a BrightTracker and kills the process that wrote it."""

    def __init__(self, marker: Path):
        super().__init__(daemon=True)
        self.marker, self.killed = marker, 0
        self.start()

    def run(self) -> None:
        deadline = time.monotonic() + 60
        while not self.killed and time.monotonic() < deadline:
            text = self.marker.read_text() if self.marker.exists() else ""
            if text.endswith("\n"):
                os.kill(int(text), signal.SIGKILL)
                self.killed = int(text)
            time.sleep(0.02)
