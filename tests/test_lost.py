"""A target that is lost and comes back, under a network that says what the test tells it to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from dmv_fast import tracker as tracking
from dmv_fast.model.memory import MemoryPolicy
from dmv_fast.multi import MultiTracker
from dmv_fast.tracker import FastDMVTracker, TrackerConfig
from dmv_fast.vision.crop import Window, search_window

BOX = (300.0, 200.0, 40.0, 40.0)
STEP = search_window(BOX).side / 2
FRAME = np.zeros((480, 640, 3), np.uint8)
PLAIN = TrackerConfig(
    found_score=0.3, refound_score=0.6, search_growth=1.1, search_most=1.3, search_rings=0,
    policy=MemoryPolicy(interval=1, threshold=0.0),
)  # fmt: skip


class Scripted:
    """A FrameStep that says what the test tells it to, boxes in frame pixels, and keeps what it is asked."""

    def __init__(self, script: list[list[tuple[Sequence[float], float]]]):
        self._script = iter(script)
        self.windows: list[list[Window]] = []
        self.sizes: list[np.ndarray] = []
        self.writes: list[tuple[int, int]] = []

    def start(self, target: int, image: np.ndarray, window: Window, box: Sequence[float]) -> None:
        pass

    def step(self, image: np.ndarray, windows: Sequence[Window], sizes: np.ndarray) -> np.ndarray:
        self.windows.append(list(windows))
        self.sizes.append(sizes)
        pairs = zip(windows, next(self._script), strict=True)
        return np.array([[*window.to_crop(box), score] for window, (box, score) in pairs])

    def write(self, target: int, frame: int) -> bool:
        self.writes.append((target, frame))
        return True


@pytest.fixture
def follow(monkeypatch):
    """follow(config, scores, boxes) -> results of a tracker that is told these, and its Scripted."""

    def run(config: TrackerConfig, scores: list[float], boxes: list | None = None):
        frames = Scripted([[pair] for pair in zip(boxes or [BOX] * len(scores), scores, strict=True)])
        monkeypatch.setattr(tracking, "frame_step_for", lambda *_, **__: frames)
        tracker = FastDMVTracker(config=config)
        tracker.init(FRAME, BOX)
        return [tracker.track(FRAME) for _ in scores], frames

    return run


def sides(frames: Scripted) -> list[float]:
    """Window sides, in sides of the first; windows are rounded, so these are not exact."""
    return [windows[0].side / frames.windows[0][0].side for windows in frames.windows]


def steps_aside(frames: Scripted) -> list[tuple[int, int]]:
    """How many half windows each look is off the first one's centre, to the right and down."""
    middles = np.array([(w.x0 + w.side / 2, w.y0 + w.side / 2) for (w,) in frames.windows])
    return [tuple(at) for at in np.round((middles - middles[0]) / STEP).astype(int).tolist()]


def test_the_search_widens_while_lost_and_is_as_before_once_found(follow):
    _, frames = follow(PLAIN, [0.9, 0.1, 0.1, 0.1, 0.1, 0.9, 0.9])
    assert sides(frames)[:2] == [1.0, 1.0] and sides(frames)[-1] == 1.0
    assert sides(frames)[2:6] == pytest.approx([1.1, 1.21, 1.3, 1.3], abs=0.07)
    assert set(steps_aside(frames)) == {(0, 0)}


def test_finding_again_takes_more_than_staying_found(follow):
    results, _ = follow(PLAIN, [0.3, 0.29, 0.3, 0.59, 0.6, 0.3])
    assert [result.found for result in results] == [True, False, False, False, True, True]
    assert [result.score for result in results] == pytest.approx([0.3, 0.29, 0.3, 0.59, 0.6, 0.3])


def test_the_box_stays_while_lost_and_goes_to_where_it_is_found(follow):
    far = (380.0, 160.0, 44.0, 36.0)
    results, _ = follow(PLAIN, [0.1, 0.5, 0.9], [far, far, far])
    assert [result.box for result in results[:2]] == [BOX, BOX]
    assert results[2].box == pytest.approx(far, abs=1e-6)


def test_sizes_are_in_pixels_of_the_widened_crop(follow):
    _, frames = follow(PLAIN, [0.1] * 5)
    for (window,), (size,) in zip(frames.windows, frames.sizes, strict=True):
        assert size == pytest.approx([40 * 256 / window.side] * 2)
    assert frames.sizes[-1][0, 0] < 0.8 * frames.sizes[0][0, 0]


def test_nothing_is_remembered_of_a_frame_without_the_target(follow):
    results, frames = follow(PLAIN, [0.9, 0.2, 0.5, 0.5, 0.7, 0.9])
    assert [frame for _, frame in frames.writes] == [1, 5, 6]
    assert [result.memory_written for result in results] == [True, False, False, False, True, True]


def test_every_second_frame_looks_beside_the_last_place(follow):
    _, frames = follow(TrackerConfig(search_rings=1), [0.1] * 18)
    asides = steps_aside(frames)
    assert set(asides[1::2]) == {(0, 0)}  # the first frame is not lost yet, the second looks again
    assert {abs(x) + abs(y) for x, y in asides[2:10:2]} == {1}
    assert len(set(asides[2::2])) == 8 and {max(map(abs, at)) for at in asides[2::2]} == {1}
    _, frames = follow(TrackerConfig(search_rings=2), [0.1] * 50)
    assert [max(map(abs, at)) for at in steps_aside(frames)[2::2]] == [1] * 8 + [2] * 16


def test_no_look_goes_beyond_the_frame(follow):
    """A target that went out on the left is not sought there."""
    out = (-18.0, 220.0, 40.0, 40.0)
    _, frames = follow(TrackerConfig(search_rings=1), [0.9] + [0.1] * 30, [out] * 31)
    start = round((2 - 320) / STEP)
    assert {at for at in steps_aside(frames)[3::2]} == {
        (start + right, down) for right, down in ((0, -1), (0, 1), (1, -1), (1, 0), (1, 1))
    }


def test_a_loss_may_last(follow):
    results, frames = follow(TrackerConfig(), [0.0] * 20_000 + [0.9])
    assert not results[-2].found and results[-1].found
    assert frames.windows[-1][0].side < 1.5 * search_window(BOX).side


def test_cv2_update_says_false_and_the_last_box(monkeypatch):
    frames = Scripted([[((310.4, 210.6, 40.0, 40.0), 0.9)], [((9.0, 9.0, 9.0, 9.0), 0.0)]])
    monkeypatch.setattr(tracking, "frame_step_for", lambda *_, **__: frames)
    tracker = FastDMVTracker()
    tracker.init(FRAME, BOX)
    assert tracker.update(FRAME) == (True, (310, 211, 40, 40))
    assert tracker.update(FRAME) == (False, (310, 211, 40, 40))


def test_a_new_start_is_not_lost(monkeypatch):
    frames = Scripted([[(BOX, score)] for score in (0.1, 0.1, 0.4)])
    monkeypatch.setattr(tracking, "frame_step_for", lambda *_, **__: frames)
    tracker = FastDMVTracker(config=PLAIN)
    tracker.init(FRAME, BOX)
    tracker.track(FRAME)
    tracker.track(FRAME)
    tracker.init(FRAME, BOX)
    assert tracker.track(FRAME).found
    assert sides(frames)[2] == 1.0 < sides(frames)[1]


def test_many_targets_are_lost_and_found_as_each_alone(monkeypatch):
    boxes = [BOX, (30.0, 40.0, 50.0, 30.0), (500.0, 300.0, 60.0, 80.0)]
    rng = np.random.default_rng(0)
    scores = rng.choice([0.1, 0.45, 0.9], (40, 3), p=[0.4, 0.2, 0.4])
    moves = rng.normal(0, 4, (40, 3, 4)) * (1, 1, 0, 0)
    script = [
        [(box + move, score) for box, move, score in zip(np.array(boxes), *row, strict=True)]
        for row in zip(moves, scores, strict=True)
    ]
    config = TrackerConfig(policy=MemoryPolicy(interval=3, threshold=0.7))
    together = Scripted(script)
    monkeypatch.setattr("dmv_fast.multi.frame_step_for", lambda *_, **__: together)
    many = MultiTracker(config=config)
    for box in boxes:
        many.add(FRAME, box)
    results = [many.track(FRAME) for _ in script]
    for place, box in enumerate(boxes):
        alone = Scripted([[row[place]] for row in script])
        monkeypatch.setattr(tracking, "frame_step_for", lambda *_, alone=alone, **__: alone)
        single = FastDMVTracker(config=config)
        single.init(FRAME, box)
        assert [single.track(FRAME) for _ in script] == [result[place] for result in results]
        assert [windows[0] for windows in alone.windows] == [windows[place] for windows in together.windows]
        assert [frame for _, frame in alone.writes] == [f for at, f in together.writes if at == place]
