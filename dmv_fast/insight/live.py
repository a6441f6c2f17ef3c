"""A window in which a person follows the tracker, stops it, puts it on another target and looks inside."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import cv2
import numpy as np
from tqdm import tqdm

from dmv_fast.insight.curve import ScoreCurve
from dmv_fast.insight.overlay import draw_chosen, draw_window, lay_map
from dmv_fast.insight.panel import FIRST_FRAME, candidate_panel, memory_panel
from dmv_fast.insight.watch import Candidate, Insight, Watch
from dmv_fast.insight.x11 import leave_events_to_qt
from dmv_fast.vision.draw import draw_box, draw_square, text_bar
from dmv_fast.vision.frames import as_bgr

Box = tuple[float, float, float, float]
TITLE = "dmv-fast"
_LARGEST, _SMALLEST = 1280, 480  # pixels; the longer side of the picture shown
_HELP = "space: pause   n: one frame   m: inside   r: another box   q: quit   click: who voted there"
_QUIT = (ord("q"), 27)


class _Shot(NamedTuple):
    """A frame as it is shown, and what was found in it."""

    picture: np.ndarray  # (h, w, 3) uint8 BGR
    box: list[float]  # xywh in pixels of the picture
    score: float
    found: bool
    words: str
    look: Callable[[], Insight | None]  # `Watch.look`, which is made once however often it is asked


class LiveWindow:
    """Shows one frame after another; keys and clicks as its help line says.

    stopped: asked while paused, whether to go on waiting (Ctrl-C, for instance, ends it).
    """

    def __init__(self, watch: Watch, stopped: Callable[[], bool]):
        self._watch, self._stopped = watch, stopped
        self.closed = False
        """The person is done: q, Esc, or the window was closed."""
        self._paused = False
        self._inside = False  # at the start: it repeats the match for every frame
        self._curve = ScoreCurve()
        self._clicked: tuple[float, float] | None = None  # pixels of the frame
        self._to_print = False
        self._scale = 1.0
        self._shape = (0, 0)
        leave_events_to_qt()
        # Without Qt's own toolbar, whose zooming would shift where a click lands.
        cv2.namedWindow(TITLE, cv2.WINDOW_AUTOSIZE | cv2.WINDOW_GUI_NORMAL)
        cv2.setMouseCallback(TITLE, self._on_mouse)

    def show(
        self, number: int, frame: np.ndarray, box: Box, score: float, found: bool, fps: float
    ) -> Box | None:
        """Show a frame and wait as long as it is paused. Returns a newly drawn box xywh, if there is one."""
        shot = self._taken(number, as_bgr(frame), box, score, found, fps)
        self._curve.add(score, found)
        drawn_for: object = ()
        while True:
            state = (self._clicked, self._paused, self._inside)
            if state != drawn_for or self._to_print:
                cv2.imshow(TITLE, self._picture(shot))
                drawn_for = state
            code = cv2.waitKey(30 if self._paused else 1)
            key = code & 0xFF if code >= 0 else None
            self.closed = key in _QUIT or cv2.getWindowProperty(TITLE, cv2.WND_PROP_VISIBLE) < 1
            if key == ord("r") and not self.closed:
                return self._draw_another(shot.picture)
            self._inside ^= key == ord("m")
            if key in (ord(" "), ord("n")):
                stepping = key == ord("n")
                self._paused = stepping or not self._paused
                if stepping or not self._paused:
                    return None
            if self.closed or self._stopped() or not self._paused:
                return None

    def close(self) -> None:
        """Take the window away; once is enough, more does no harm."""
        cv2.destroyAllWindows()

    def __enter__(self) -> LiveWindow:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- what is drawn -------------------------------------------------------------------------------

    def _taken(
        self, number: int, frame: np.ndarray, box: Box, score: float, found: bool, fps: float
    ) -> _Shot:
        """The frame at the size at which it is shown, with what belongs to it."""
        self._shape = frame.shape[:2]
        longest = max(self._shape)
        self._scale = min(_LARGEST / longest, max(1.0, _SMALLEST / longest))
        words = f"frame {number}   score {score:.2f}{'' if found else ' (lost)'}   {fps:.0f} FPS"
        at = [v * self._scale for v in box]
        return _Shot(self._shrunk(frame), at, score, found, words, cache(self._watch.look))

    def _shrunk(self, frame: np.ndarray) -> np.ndarray:
        if self._scale == 1:
            return frame
        method = cv2.INTER_AREA if self._scale < 1 else cv2.INTER_LINEAR
        return cv2.resize(frame, None, fx=self._scale, fy=self._scale, interpolation=method)

    def _picture(self, shot: _Shot) -> np.ndarray:
        """The frame, what is known of it, the scores so far, and what the person asked for besides."""
        width = shot.picture.shape[1]
        insight = shot.look() if self._clicked or self._inside else None
        clicked = insight.location_at(*self._clicked) if insight and self._clicked else None
        words = [shot.words + ("   paused" if self._paused else ""), _HELP]
        parts = [self._canvas(shot, insight, clicked), text_bar(words, width)]
        parts.append(self._curve.picture(width, self._watch.found_score))
        if self._inside:
            parts.append(memory_panel(insight, clicked, width))
        if insight and clicked is not None:
            parts.append(candidate_panel(insight.candidates(clicked), width))
        if self._to_print:
            _print_click(insight, clicked)
        self._to_print = False
        return np.vstack(parts)

    def _canvas(self, shot: _Shot, insight: Insight | None, clicked: int | None) -> np.ndarray:
        """The frame with its box, the score map where it is switched on, and the place that was clicked."""
        scale = self._scale
        picture = lay_map(shot.picture, insight, scale) if insight and self._inside else shot.picture
        canvas = draw_box(picture, shot.box, shot.score, found=shot.found)
        if insight is None:
            return canvas
        if self._inside:
            draw_chosen(canvas, insight, scale)
        if self._inside or clicked is not None:
            draw_window(canvas, insight.window, scale)
        if clicked is not None:
            x, y = insight.centre(clicked)
            cell = insight.window.side / len(insight.score_map)
            draw_square(canvas, (x * scale, y * scale), cell * scale)
        return canvas

    # ---- what the person does ------------------------------------------------------------------------

    def _on_mouse(self, event: int, x: int, y: int, flags: int, _: object) -> None:
        if event == cv2.EVENT_RBUTTONDOWN:
            self._clicked = None
        if event != cv2.EVENT_LBUTTONDOWN:
            return
        place = (x + 0.5) / self._scale, (y + 0.5) / self._scale
        if place[0] < self._shape[1] and place[1] < self._shape[0]:
            self._clicked, self._to_print = place, True

    def _draw_another(self, shown: np.ndarray) -> Box | None:
        """A box drawn by mouse: Enter takes it, c leaves everything as it was."""
        _say("draw the box, then Enter (c: as before)")
        drawn = cv2.selectROI(TITLE, shown, showCrosshair=False, printNotice=False)
        cv2.setMouseCallback(TITLE, self._on_mouse)  # selectROI has taken it
        x, y, w, h = (v / self._scale for v in drawn)
        self._clicked = None
        if w <= 0 or h <= 0:
            return None
        self._curve.clear()
        return x, y, w, h


def _print_click(insight: Insight | None, clicked: int | None) -> None:
    if insight is None or clicked is None:
        _say("outside the search window" if insight else FIRST_FRAME)
        return
    x, y = insight.centre(clicked)
    named = ", ".join(_describe(candidate) for candidate in insight.candidates(clicked))
    _say(f"at {x:.0f},{y:.0f} voted: {named}")


def _describe(candidate: Candidate) -> str:
    if candidate.memory is None or candidate.place is None:
        return f"null {candidate.score:.3f}"
    x, y = candidate.place
    return f"frame {candidate.memory.frame} at {x:.0f},{y:.0f} {candidate.score:.3f}"


def _say(words: str) -> None:
    tqdm.write(words, file=sys.stderr)
