"""A look inside a frame: the score map, and which memory frames voted, where and how strongly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dmv_fast.vision.crop import Window, cut

if TYPE_CHECKING:
    from dmv_fast.runtime.frame import FrameStep, Seen
    from dmv_fast.tracker import FastDMVTracker


class Remembered(NamedTuple):
    """A frame that the memory holds, as the network saw it."""

    frame: int
    """Its number, counted from `Watch.first_frame`."""
    window: Window
    """Where in that frame its search window was."""
    crop: np.ndarray
    """The window's pixels, (256, 256, 3) uint8 BGR."""


class Candidate(NamedTuple):
    """One of the K that voted at a location (paper section 3.2)."""

    score: float
    """Its share among the K, as it votes with: the softmax of their similarities, 0 to 1."""
    memory: Remembered | None
    """Where it comes from; None is the null column, or no candidate at all (score 0)."""
    place: tuple[float, float] | None
    """x, y of its location in pixels of that frame; None where `memory` is."""


@dataclass(frozen=True, eq=False)
class Insight:
    """What the network read from the memory in one frame, and what it made of it.

    Locations are numbered 0 .. M - 1, row by row over the H x W grid of the search window.
    """

    window: Window
    """The search window, in pixels of the frame."""
    score_map: np.ndarray
    """(H, W) float32: the centre score of each location's best anchor, 0 to 1."""
    chosen: int
    """The location whose box was taken."""
    scores: np.ndarray
    """(M, K) float32, highest first: each candidate's share among the K; a location's sum to 1."""
    memory_index: np.ndarray
    """(M, K) int: the candidate's place in `memory`; -1 for the null column or none."""
    locations: np.ndarray
    """(M, K) int: the candidate's location in its memory frame; -1 likewise."""
    memory: tuple[Remembered, ...]
    """The frames that it was matched with, slot by slot: that of `init` first."""
    capacity: int
    """T: how many frames the memory can hold."""

    def location_at(self, x: float, y: float) -> int | None:
        """The location nearest to a pixel of the frame; None outside the search window."""
        inside = [(v - start) / self.window.side for v, start in ((x, self.window.x0), (y, self.window.y0))]
        if not all(0 <= v < 1 for v in inside):
            return None
        grid = len(self.score_map)
        column, row = (min(grid - 1, round(v * grid)) for v in inside)
        return row * grid + column

    def centre(self, location: int) -> tuple[float, float]:
        """x, y of a location in pixels of the frame."""
        return self._centre(location, self.window)

    def candidates(self, location: int) -> list[Candidate]:
        """The K candidates of a location, the strongest first."""
        rows = zip(self.scores[location], self.memory_index[location], self.locations[location], strict=True)
        return [self._candidate(float(score), int(index), int(at)) for score, index, at in rows]

    def votes(self, location: int) -> np.ndarray:
        """(T,) float32: the weight that the candidates of a location give to each frame of `memory`."""
        index = self.memory_index[location]
        real = index >= 0
        weights = self.scores[location][real]
        return np.bincount(index[real], weights, minlength=len(self.memory)).astype(np.float32)

    def _candidate(self, score: float, index: int, location: int) -> Candidate:
        if index < 0:
            return Candidate(score, None, None)
        memory = self.memory[index]
        return Candidate(score, memory, self._centre(location, memory.window))

    def _centre(self, location: int, window: Window) -> tuple[float, float]:
        grid = len(self.score_map)
        row, column = divmod(location, grid)
        # The anchors of column i are centred on i / grid of the crop: boxes.anchor_grid.
        return window.x0 + column / grid * window.side, window.y0 + row / grid * window.side


class Watch:
    """Lets a tracker be looked into: made before `init`, asked by `look` after `track`.

    It keeps the crops of the frames in memory (6 MB at 32 frames) and the last frame; what the candidates
    were is worked out only when asked, at the price of one more retrieval.
    """

    def __init__(self, tracker: FastDMVTracker):
        self.first_frame = 0
        """The number of the frame that the next `init` is given; the others are counted from it."""
        self.found_score = tracker.config.found_score
        """The score below which the target is lost (`TrackerConfig`)."""
        self._started_at = 0
        self._step = tracker.frame_step
        self._remembered: dict[int, Remembered] = {}  # by the tracker's own count, which starts at 0
        self._last: tuple[np.ndarray, Window, np.ndarray] | None = None  # frame, search window, answer (5,)
        self._matched: tuple[Tensor, Tensor, list[int]] | None = None  # shares, indices, frame of each slot
        # What a _WatchedStep does not have it takes from the step, so it is one in all but its class.
        tracker.frame_step = _WatchedStep(self._step, self)  # type: ignore[assignment]

    def look(self) -> Insight | None:
        """Inside the last tracked frame; None after `init`, which matches nothing."""
        if self._last is None or 0 not in self._remembered:  # made after `init`: that frame is not known
            return None
        _, window, answer = self._last
        scores, indices, frames = self._matched or self._match()
        locations = self._step.memory.locations
        rows = indices.cpu().numpy()
        none = rows < 0
        score_map, chosen = self._score_map(answer)
        return Insight(
            window, score_map, chosen, scores.cpu().numpy(), np.where(none, -1, rows // locations),
            np.where(none, -1, rows % locations), tuple(self._remembered[frame] for frame in frames),
            self._step.memory.slots[0].capacity,
        )  # fmt: skip

    def _match(self) -> tuple[Tensor, Tensor, list[int]]:
        """Shares and indices (M, K) of the last frame's candidates, and the frames that the slots hold."""
        step = self._step
        slots, maps = step.memory.slots[0], self._seen().maps[:1]
        with torch.inference_mode():
            scores, indices = step.network.match(maps, step.memory.keys[:1], step.k, slots.valid)
        shares = scores[0] / scores[0].sum(-1, keepdim=True)  # what the vote makes of them (weight_scale)
        return shares, indices[0], [frame for frame in slots.frames if frame is not None]

    def _score_map(self, answer: np.ndarray) -> tuple[np.ndarray, int]:
        """The best anchor's score at each location (H, W), and the location that the answer came from."""
        seen = self._seen()
        with torch.inference_mode():
            boxes = self._step.network.model.decode(seen.deltas[:1])[0].flatten(0, 2).double().cpu().numpy()
            scores = seen.scores[0].float().cpu().numpy()  # (A, H, W)
        # Smoothing keeps the chosen box's centre, so score and centre tell which anchor it was.
        away = np.abs(boxes[:, :2] + boxes[:, 2:] / 2 - (answer[:2] + answer[2:4] / 2)).sum(1)
        away = np.where(scores.ravel() == np.float32(answer[4]), away, np.inf)
        score_map = scores.max(0)
        return score_map, int(away.argmin()) % score_map.size

    def _seen(self) -> Seen:
        assert self._step.seen is not None, "nothing is matched before a frame was tracked"
        return self._step.seen

    # ---- what _WatchedStep tells ---------------------------------------------------------------------

    def _started(self, image: np.ndarray, window: Window) -> None:
        self._started_at = self.first_frame
        self._remembered = {0: Remembered(self._started_at, window, cut(image, window))}
        self._last = self._matched = None

    def _stepped(self, image: np.ndarray, window: Window, answer: np.ndarray) -> None:
        self._last, self._matched = (image, window, answer), None

    def _written(self, frame: int) -> None:
        assert self._last is not None, "a frame is written after it was tracked"
        image, window, _ = self._last
        self._remembered[frame] = Remembered(self._started_at + frame, window, cut(image, window))
        held = {*self._step.memory.slots[0].frames, *(self._matched[2] if self._matched else ())}
        self._remembered = {n: memory for n, memory in self._remembered.items() if n in held}


class _WatchedStep:
    """A tracker's FrameStep that tells a Watch what is asked of it."""

    def __init__(self, step: FrameStep, watch: Watch):
        self._step, self._watch = step, watch

    def start(self, target: int, image: np.ndarray, window: Window, box: Sequence[float]) -> None:
        self._step.start(target, image, window, box)
        self._watch._started(image, window)

    def step(self, image: np.ndarray, windows: Sequence[Window], sizes: np.ndarray) -> np.ndarray:
        answers = self._step.step(image, windows, sizes)
        self._watch._stepped(image, windows[0], answers[0])
        return answers

    def write(self, target: int, frame: int) -> bool:
        # What this frame was matched with is about to change, so the match is made now.
        self._watch._matched = self._watch._match()
        written = self._step.write(target, frame)
        if written:
            self._watch._written(frame)
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._step, name)
