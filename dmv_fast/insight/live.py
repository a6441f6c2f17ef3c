"""A window in which a person follows the tracker, stops it, puts it on another target and looks inside."""

from __future__ import annotations

import sys
from collections.abc import Callable

import cv2
import numpy as np
from tqdm import tqdm

from dmv_fast.insight.panel import candidate_panel
from dmv_fast.insight.watch import Candidate, Watch
from dmv_fast.insight.x11 import leave_events_to_qt
from dmv_fast.vision.draw import draw_box, draw_square, text_bar

Box = tuple[float, float, float, float]
TITLE = "dmv-fast"
_LARGEST, _SMALLEST = 1280, 480  # pixels; the longer side of the picture shown
_HELP = "space: pause   n: one frame   r: another box   q: quit   click: who voted there"
_QUIT = (ord("q"), 27)


class LiveWindow:
    """Shows one frame after another; keys and clicks as its help line says.

    stopped: asked while paused, whether to go on waiting (Ctrl-C, for instance, ends it).
    """

    def __init__(self, watch: Watch, stopped: Callable[[], bool]):
        self._watch, self._stopped = watch, stopped
        self.closed = False
        """The person is done: q, Esc, or the window was closed."""
        self._paused = False
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
        self._shape = frame.shape[:2]
        longest = max(self._shape)
        self._scale = min(_LARGEST / longest, max(1.0, _SMALLEST / longest))
        words = f"frame {number}   score {score:.2f}{'' if found else ' (lost)'}   {fps:.0f} FPS"
        shown = self._shrunk(frame)
        boxed = draw_box(shown, [v * self._scale for v in box], score, found=found)
        drawn_for: object = ()
        while True:
            state = (self._clicked, self._paused)
            if state != drawn_for or self._to_print:
                cv2.imshow(TITLE, self._picture(boxed, words))
                drawn_for = state
            key = cv2.waitKey(30 if self._paused else 1)
            key = key & 0xFF if key >= 0 else None
            self.closed = key in _QUIT or cv2.getWindowProperty(TITLE, cv2.WND_PROP_VISIBLE) < 1
            if key == ord("r") and not self.closed:
                return self._draw_another(shown)
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

    def _shrunk(self, frame: np.ndarray) -> np.ndarray:
        if self._scale == 1:
            return frame
        method = cv2.INTER_AREA if self._scale < 1 else cv2.INTER_LINEAR
        return cv2.resize(frame, None, fx=self._scale, fy=self._scale, interpolation=method)

    def _picture(self, boxed: np.ndarray, words: str) -> np.ndarray:
        """The frame, what is known of it, and the candidates of the place that was clicked."""
        width = boxed.shape[1]
        parts = [boxed, text_bar([words + ("   paused" if self._paused else ""), _HELP], width)]
        insight = self._watch.look() if self._clicked else None
        location = insight.location_at(*self._clicked) if insight else None
        if location is not None:
            place, candidates = insight.centre(location), insight.candidates(location)
            canvas = boxed.copy()
            corner = [round(v * self._scale) for v in (insight.window.x0, insight.window.y0)]
            side = round(insight.window.side * self._scale)
            cv2.rectangle(canvas, corner, [v + side for v in corner], (200, 200, 200), 1)
            cell = insight.window.side / len(insight.score_map)
            draw_square(canvas, (place[0] * self._scale, place[1] * self._scale), cell * self._scale)
            parts[0] = canvas
            parts.append(candidate_panel(candidates, width))
            if self._to_print:
                _print_candidates(place, candidates)
        elif self._to_print:
            _say("outside the search window" if insight else "nothing is matched in a target's first frame")
        self._to_print = False
        return np.vstack(parts)

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
        return (x, y, w, h) if w > 0 and h > 0 else None


def _print_candidates(place: tuple[float, float], candidates: list[Candidate]) -> None:
    named = ", ".join(_describe(candidate) for candidate in candidates)
    _say(f"at {place[0]:.0f},{place[1]:.0f} voted: {named}")


def _describe(candidate: Candidate) -> str:
    if candidate.memory is None:
        return f"null {candidate.score:.3f}"
    x, y = candidate.place
    return f"frame {candidate.memory.frame} at {x:.0f},{y:.0f} {candidate.score:.3f}"


def _say(words: str) -> None:
    tqdm.write(words, file=sys.stderr)
