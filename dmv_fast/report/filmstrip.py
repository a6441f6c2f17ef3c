"""The worst sequences of an evaluation as strips of frames, with the true and the predicted box."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from html import escape

import cv2
import numpy as np

from dmv_fast.evaluation import datasets
from dmv_fast.evaluation.metrics import overlap
from dmv_fast.report.plots import strip_chart

_FRAMES = 8
_WIDTH, _HEIGHT = 320, 240  # pixels of a picture
_QUALITY = 75  # of the JPEG: 10 to 20 KB a picture
_MISS = 0.1  # IoU below which the target is not followed
_CONTEXT = 2.2  # sizes of what is boxed that a picture shows
_LEAST = 5.0  # and at least so many sizes of the target

KEY = (
    '<p><span class="key"><svg viewBox="0 0 26 14"><rect class="truth" x="2" y="2" width="22" height="10"/>'
    '</svg>truth</span><span class="key"><svg viewBox="0 0 26 14"><rect class="predicted" x="2" y="2" '
    'width="22" height="10"/></svg>predicted (dashed)</span></p>'
)


def filmstrip(sequence: datasets.Sequence, boxes: np.ndarray, words: str) -> str:
    """One sequence: its IoU over time, and frames of it. boxes: (n, 4) predicted; words: what to say of it.

    Raises DatasetError where a frame cannot be read.
    """
    truth = sequence.boxes
    known = ~np.isnan(truth[:, 0])
    iou = np.where(known, overlap(np.nan_to_num(boxes), np.nan_to_num(truth)), np.nan)
    chosen = choose_frames(iou, sequence.start)
    name = escape(sequence.name)
    chart = strip_chart(iou.tolist(), chosen, f"IoU of {sequence.name} over its frames, 0 to 1")
    pictures = "".join(
        f"<li>{_picture(image, truth[i], boxes[i], _caption(i, iou[i], boxes[i]))}</li>"
        for i, image in _frames(sequence, chosen)
    )
    return (
        f'<article class="case"><header><h3>{name}</h3><p class="note">{escape(words)}</p></header>'
        f'{chart}<ul class="film">{pictures}</ul></article>'
    )


def choose_frames(iou: np.ndarray, start: int) -> list[int]:
    """Frames worth a look: spread evenly, and the two around the start of the longest miss."""
    last = len(iou) - 1
    wanted = set(np.linspace(start, last, _FRAMES - 2).round().astype(int).tolist())
    missed = _longest_run(np.nan_to_num(iou, nan=1.0) < _MISS)
    if missed is not None:
        wanted |= {max(start, missed - 1), missed}
    spare = iter(np.linspace(start, last, 4 * _FRAMES).round().astype(int).tolist())
    while len(wanted) < min(_FRAMES, last - start + 1):
        frame = next(spare, None)
        if frame is None:
            break
        wanted.add(frame)
    return sorted(wanted)


def _longest_run(flags: np.ndarray) -> int | None:
    """Where the longest run of True begins; None without any."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(int), [0]])))
    begins, ends = edges[::2], edges[1::2]
    return int(begins[np.argmax(ends - begins)]) if len(begins) else None


def _frames(sequence: datasets.Sequence, chosen: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
    """(number, image) of the chosen frames; of a folder of images no other is read."""
    if isinstance(sequence.frames, tuple):
        for i in chosen:
            yield i, datasets.read_image(sequence.frames[i])
        return
    wanted = set(chosen)
    for i, image in enumerate(sequence.images(chosen[0]), start=chosen[0]):
        if i in wanted:
            yield i, image
        if i == chosen[-1]:
            return


def _caption(number: int, iou: float, box: np.ndarray) -> str:
    told = "no truth here" if np.isnan(iou) else f"IoU {iou:.2f}"
    return f"frame {number}, " + ("nothing predicted" if np.isnan(box).any() else told)


def _picture(image: np.ndarray, truth: np.ndarray, box: np.ndarray, caption: str) -> str:
    """The part of a frame that matters as a JPEG inside an SVG, the boxes drawn over it."""
    left, top, width, height = look_at(image.shape[1], image.shape[0], truth, box)
    part = image[top : top + height, left : left + width]
    method = cv2.INTER_AREA if width > _WIDTH else cv2.INTER_LINEAR
    small = cv2.resize(part, (_WIDTH, _HEIGHT), interpolation=method)
    ok, data = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])
    assert ok, "OpenCV cannot encode a JPEG"
    scale = _WIDTH / width
    drawn = "".join(
        f'<rect class="{kind}" x="{(x - left) * scale:.1f}" y="{(y - top) * scale:.1f}" '
        f'width="{w * scale:.1f}" height="{h * scale:.1f}"/>'
        for kind, (x, y, w, h) in (("truth", truth), ("predicted", box))
        if np.isfinite((x, y, w, h)).all() and w > 0 and h > 0
    )
    source = f"data:image/jpeg;base64,{base64.b64encode(data.tobytes()).decode()}"
    return (
        f'<figure><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(caption)}">'
        f'<image href="{source}" width="{_WIDTH}" height="{_HEIGHT}"/>{drawn}</svg>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def look_at(width: int, height: int, *boxes: np.ndarray) -> tuple[int, int, int, int]:
    """A 4 : 3 part (left, top, width, height) of a frame, with the boxes (xywh, NaN: none) and some around.

    It lies within the frame where the frame is large enough; a frame of another shape may be cut or, where
    it is too small, shown stretched.
    """
    known = np.array([box for box in boxes if np.isfinite(box).all()])
    if not len(known):
        return 0, 0, width, height
    low = known[:, :2].min(0).clip(0, (width, height))
    high = (known[:, :2] + known[:, 2:]).max(0).clip(0, (width, height))
    target = float(np.sqrt(np.prod(known[0, 2:])))
    wide, tall = np.maximum((high - low) * _CONTEXT, _LEAST * target)
    wide = min(max(wide, tall * _WIDTH / _HEIGHT), width, height * _WIDTH / _HEIGHT)
    tall = wide * _HEIGHT / _WIDTH
    centre = (low + high) / 2
    left = min(max(centre[0] - wide / 2, 0), width - wide)
    top = min(max(centre[1] - tall / 2, 0), height - tall)
    return int(left), int(top), max(1, int(wide)), max(1, int(tall))
