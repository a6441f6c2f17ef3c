"""What a person looks at: the box on the frame, and a sheet of frames."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

FOUND = (60, 220, 60)  # BGR
LOST = (60, 60, 240)
CAPTION = (230, 230, 230)
_MARK = (60, 200, 255)
GROUND = (32, 32, 32)  # behind text and pictures
FONT = cv2.FONT_HERSHEY_SIMPLEX


def draw_box(
    frame: np.ndarray, box: Sequence[float], score: float | None = None, *, found: bool = True
) -> np.ndarray:
    """A copy of the frame (HWC uint8 BGR) with a box xywh and its score; green, or red and "lost".

    Lines and letters grow with the frame, so that they read the same at every resolution.
    """
    canvas = frame.copy()
    height, width = frame.shape[:2]
    colour = FOUND if found else LOST
    x, y, w, h = (float(v) for v in box)
    # Far outside the frame any corner draws the same, and OpenCV takes no number beyond 32 bits.
    left, right = (round(float(v)) for v in np.clip((x, x + w), -width, 2 * width))
    top, bottom = (round(float(v)) for v in np.clip((y, y + h), -height, 2 * height))
    thickness = max(1, round(min(height, width) / 200))
    cv2.rectangle(canvas, (left, top), (right, bottom), colour, thickness, cv2.LINE_AA)
    words = ([] if found else ["lost"]) + ([] if score is None else [f"{score:.2f}"])
    if words:
        _draw_label(canvas, " ".join(words), left, top, bottom, colour)
    return canvas


def _draw_label(canvas: np.ndarray, text: str, left: int, top: int, bottom: int, colour: tuple) -> None:
    """Text on a filled ground above the box, else below it, else inside, always within the frame."""
    height, width = canvas.shape[:2]
    scale = max(0.4, min(height, width) / 600)
    thickness = max(1, round(scale * 1.6))
    (text_w, text_h), base = cv2.getTextSize(text, FONT, scale, thickness)
    pad = max(2, text_h // 3)
    full_w, full_h = text_w + 2 * pad, text_h + base + 2 * pad
    y = top - full_h
    if y < 0:
        y = bottom if bottom + full_h <= height else top
    x = max(0, min(left, width - full_w))
    y = max(0, min(y, height - full_h))
    cv2.rectangle(canvas, (x, y), (x + full_w, y + full_h), colour, cv2.FILLED)
    cv2.putText(canvas, text, (x + pad, y + pad + text_h), FONT, scale, (0, 0, 0), thickness, cv2.LINE_AA)


def contact_sheet(
    frames: Sequence[np.ndarray], columns: int, *, tile_width: int = 320, labels: Sequence[str] = ()
) -> np.ndarray:
    """Frames (HWC uint8 BGR, of any sizes) as one picture, `columns` a row, each `tile_width` pixels wide.

    A tile has the shape of the first frame; others are fitted into it. labels: one a frame, for its corner,
    or "". Raises ValueError without frames, for columns < 1 and for labels of another number.
    """
    if not frames or columns < 1:
        raise ValueError(f"a contact sheet needs frames and columns >= 1, not {len(frames)} and {columns}")
    if labels and len(labels) != len(frames):
        raise ValueError(f"labels must be one a frame ({len(frames)}), not {len(labels)}")
    columns = min(columns, len(frames))
    tile_height = max(1, round(tile_width * frames[0].shape[0] / frames[0].shape[1]))
    sheet = np.zeros((-(-len(frames) // columns) * tile_height, columns * tile_width, 3), np.uint8)
    for i, frame in enumerate(frames):
        tile = fit(frame, (tile_width, tile_height))
        if labels and labels[i]:
            _draw_label(tile, labels[i], 0, 0, 0, CAPTION)
        row, column = divmod(i, columns)
        top, left = row * tile_height, column * tile_width
        sheet[top : top + tile_height, left : left + tile_width] = tile
    return sheet


def fit(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The frame (HWC uint8 BGR) scaled into (width, height), its shape kept, black where it does not fill."""
    width, height = size
    scale = min(width / frame.shape[1], height / frame.shape[0])
    inner_w = min(width, max(1, round(frame.shape[1] * scale)))
    inner_h = min(height, max(1, round(frame.shape[0] * scale)))
    left, top = (width - inner_w) // 2, (height - inner_h) // 2
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    inner = cv2.resize(frame, (inner_w, inner_h), interpolation=method)
    canvas = np.zeros((height, width, 3), np.uint8)
    canvas[top : top + inner_h, left : left + inner_w] = inner
    return canvas


def draw_square(canvas: np.ndarray, centre: tuple[float, float], side: float) -> None:
    """Mark a place on the canvas (HWC uint8 BGR) by a square around it."""
    half = max(side / 2, 3.0)
    top_left, bottom_right = ([round(float(v) + away) for v in centre] for away in (-half, half))
    for thickness, colour in ((3, (0, 0, 0)), (1, _MARK)):
        cv2.rectangle(canvas, top_left, bottom_right, colour, thickness)


def text_bar(lines: Sequence[str], width: int) -> np.ndarray:
    """Lines of text on a dark ground: (16 a line + 10, width, 3) uint8 BGR."""
    bar = np.full((16 * len(lines) + 10, width, 3), GROUND, np.uint8)
    for i, line in enumerate(lines):
        cv2.putText(bar, line, (6, 17 + 16 * i), FONT, 0.42, CAPTION, 1, cv2.LINE_AA)
    return bar
