"""One target from frame to frame: its box, whether it is lost, where to search, when to remember it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from dmv_fast.checks import check_number, check_whole
from dmv_fast.model.memory import MemoryPolicy
from dmv_fast.model.pick import PickConfig
from dmv_fast.vision.crop import Window, search_window

_SMALLEST = 2.0  # pixels; a box never shrinks below
_WIDEST = 100  # times the usual window; more is a mistake
_MOST = 256  # windows along a side of the frame: for a target of a pixel there would be millions


@dataclass(frozen=True)
class TrackerConfig:
    """How a tracker uses its network; the defaults are the paper's where it says (section 3.5)."""

    capacity: int = 32
    """T: frames the memory holds, the first among them."""
    policy: MemoryPolicy = field(default_factory=MemoryPolicy)
    """When a frame is written to it."""
    pick: PickConfig = field(default_factory=PickConfig)
    """How the box is chosen."""
    found_score: float = 0.3
    """Below this centre score the target is lost: the box stays where it was and nothing is remembered."""
    refound_score: float = 0.5
    """The centre score at which a lost target is found again. More than staying found takes: while a target
    is out of sight its like is seen at many places, and one that is believed is not left again."""
    search_home: int = 3
    """While lost, every so many frames search at the last place, where most targets come back; the others
    search around it (`search_width`). 1: all at the last place."""
    search_width: float = 1.25
    """How much wider than usual the windows of that search are. Wider ones cover the frame sooner, but the
    target is smaller in them and found less often."""
    search_patience: int = 60
    """Frames of a loss in which the search keeps to the side of the frame on which the target left, or to
    about a window's width around where it was hidden; after these it goes over the whole frame."""

    def __post_init__(self) -> None:
        for name, least in (("capacity", 1), ("search_home", 1), ("search_patience", 0)):
            check_whole(name, getattr(self, name), least)
        check_number("found_score", self.found_score, 0)
        check_number("refound_score", self.refound_score, 0)
        check_number("search_width", self.search_width, 1, _WIDEST)
        for name, kind in (("policy", MemoryPolicy), ("pick", PickConfig)):
            if not isinstance(value := getattr(self, name), kind):
                raise TypeError(f"{name} is {type(value).__name__}; it must be a {kind.__name__}")

    @classmethod
    def of(cls, config: TrackerConfig | None) -> TrackerConfig:
        """What a tracker is given, None for the defaults; TypeError for anything else."""
        if config is not None and not isinstance(config, cls):
            raise TypeError(f"config is {type(config).__name__}; it must be a TrackerConfig")
        return cls() if config is None else config


class TrackResult(NamedTuple):
    """What `FastDMVTracker.track` says of a frame."""

    box: tuple[float, float, float, float]
    """xywh in pixels of the frame, 0-based."""
    score: float
    """Centre probability of the chosen box, 0 to 1."""
    found: bool
    """False: the target is lost, `box` is the last one found, and the search for it goes on."""
    memory_written: bool


class Target:
    """Where one target is and when it was remembered; says where to look next and judges what was found."""

    def __init__(self, box: tuple[float, float, float, float], image: np.ndarray):
        self.box = box
        self.score = 1.0
        self._size = (image.shape[1], image.shape[0])
        self._frame = self._last_written = 0
        self._lost = 0  # frames since it was last found
        self._whole = box[2:]  # its size when last found clear of the frame's sides, which cut it
        self._places: list[tuple[float, float]] = []  # centres to search at when lost
        self._near = 0  # how many of these, the first, are near where it was lost

    def look(self, config: TrackerConfig) -> tuple[Window, np.ndarray]:
        """The search window, and the width and height to expect in it (2,), in crop pixels."""
        if not self._lost:
            window = search_window(self.box)
            return window, window.to_crop(self.box)[2:]
        box = self._whole_box()
        rounds, turn = divmod(self._lost - 1, config.search_home)
        if turn:
            count = self._near if self._lost <= config.search_patience else len(self._places)
            cx, cy = self._places[(rounds * (config.search_home - 1) + turn - 1) % count]
            w, h = box[2:]
            window = search_window((cx - w / 2, cy - h / 2, w, h), scale=config.search_width)
        else:
            window = search_window(box)
        return window, window.to_crop(box)[2:]

    def settle(
        self, window: Window, answer: np.ndarray, config: TrackerConfig, write: Callable[[int], bool]
    ) -> TrackResult:
        """Take a frame's answer (5,): box xywh in crop pixels, score. write: remembers it by its number."""
        self._frame += 1
        self.score = float(answer[4])
        found = self.score >= (config.refound_score if self._lost else config.found_score)
        self._lost = 0 if found else self._lost + 1
        if self._lost == 1:
            self._places, self._near = self._sweep(config.search_width)
        written = False
        if found:
            self.box = self._keep_in_frame(window.to_frame(answer[:4]))
            if self._is_clear():
                self._whole = self.box[2:]
            if config.policy.wants(self._frame, self._last_written, self.score):
                written = write(self._frame)
                self._last_written = self._frame
        return TrackResult(self.box, self.score, found, written)

    def _is_clear(self) -> bool:
        """Whether the box keeps a twentieth of its size from every side of the frame."""
        return all(
            start > 0.05 * size and start + size < length - 0.05 * size
            for start, size, length in zip(self.box[:2], self.box[2:], self._size, strict=True)
        )

    def _whole_box(self) -> tuple[float, float, float, float]:
        """The last box at the target's full size: as it left the frame, its box was but a part of it."""
        x, y, w, h = self.box
        whole_w, whole_h = max(w, self._whole[0]), max(h, self._whole[1])
        return x + (w - whole_w) / 2, y + (h - whole_h) / 2, whole_w, whole_h

    def _sweep(self, scale: float) -> tuple[list[tuple[float, float]], int]:
        """Centres of windows that cover the frame, and how many of them, the first, are near.

        Near: the outermost row or column at a side by which the target left (its centre was less than its
        size from it); if it left by none, windows within one width. Nearest first.
        """
        x, y, w, h = self._whole_box()
        cx, cy = x + w / 2, y + h / 2
        side = search_window((x, y, w, h), scale=scale).side * (1 - 1 / 64)  # as its place is rounded
        pitch = max(side - math.sqrt(w * h), 1.0)
        width, height = self._size
        columns, rows = _spread(width, w, side, pitch), _spread(height, h, side, pitch)
        left_by_x = {x for x, gap in ((columns[0], cx), (columns[-1], width - cx)) if gap < w}
        left_by_y = {y for y, gap in ((rows[0], cy), (rows[-1], height - cy)) if gap < h}

        def is_near(px: float, py: float) -> bool:
            if left_by_x or left_by_y:
                return px in left_by_x or py in left_by_y
            return max(abs(px - cx), abs(py - cy)) < side

        places = [(px, py) for py in rows for px in columns]
        places.sort(key=lambda at: (not is_near(*at), abs(at[0] - cx) + abs(at[1] - cy)))
        return places, max(1, sum(is_near(*at) for at in places))

    def check_size(self, image: np.ndarray) -> None:
        """ValueError unless the image has the size of the frame in which the target was chosen."""
        size = (image.shape[1], image.shape[0])
        if size != self._size:
            raise ValueError(
                f"image is {size[0]} x {size[1]}; the target was chosen in a frame of "
                f"{self._size[0]} x {self._size[1]}: resize the frame, or call init again"
            )

    def _keep_in_frame(self, box: np.ndarray) -> tuple[float, float, float, float]:
        """The centre stays in the frame and the size between 2 pixels and the frame's."""
        width, height = self._size
        cx = min(max(box[0] + box[2] / 2, 0.0), width)
        cy = min(max(box[1] + box[3] / 2, 0.0), height)
        w = min(max(box[2], _SMALLEST), max(width, _SMALLEST))
        h = min(max(box[3], _SMALLEST), max(height, _SMALLEST))
        return float(cx - w / 2), float(cy - h / 2), float(w), float(h)


def _spread(length: float, extent: float, side: float, pitch: float) -> list[float]:
    """Centres of windows of that side, at most a pitch apart, that cover a frame's axis of that length.

    A target of that extent at the frame's edge is whole in the outermost one, as far in as that allows.
    """
    count = min(max(1, math.ceil((length - extent) / pitch)), _MOST)
    rim = min((side - extent) / 2, length / 2)
    return [min(max((i + 0.5) * length / count, rim), length - rim) for i in range(count)]
