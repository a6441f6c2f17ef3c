"""Made photographs to train on."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np


def write_photographs(root: Path) -> None:
    """A training folder's photographs, of one square each, with their outlines."""
    (root / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    lines = []
    for i in range(24):  # enough for the held-out share to get some
        image = cv2.resize(rng.integers(0, 120, (12, 16, 3), np.uint8), (320, 240))
        x, y = (int(v) for v in rng.integers(60, 130, 2))
        image[y : y + 50, x : x + 60] = rng.integers(150, 255, 3)
        cv2.imwrite(str(root / "images" / f"{i}.jpg"), image)
        outline = [x, y, x + 60, y, x + 60, y + 50, x, y + 50]
        box = {"bbox": [x, y, 60, 50], "label": str(i), "polygons": [outline]}
        row = {"image": f"images/{i}.jpg", "dataset": "made", "width": 320, "height": 240, "objects": [box]}
        lines.append(json.dumps(row) + "\n")
    (root / "annotations.jsonl").write_text("".join(lines))
