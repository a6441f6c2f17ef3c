"""A target that is lost and comes back, under a network that says what the test tells it to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from dmv_fast import tracker as tracking
from dmv_fast.model.memory import MemoryPolicy
from dmv_fast.multi import MultiTracker
from dmv_fast.target import Target
from dmv_fast.tracker import FastDMVTracker, TrackerConfig
from dmv_fast.vision.crop import Window, search_window

BOX = (300.0, 200.0, 40.0, 40.0)
SIDE = search_window(BOX).side
FRAME = np.zeros((480, 640, 3), np.uint8)
PLAIN = TrackerConfig(
    found_score=0.3, refound_score=0.6, search_home=1, policy=MemoryPolicy(interval=1, threshold=0.0)
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
    """Window sides, in sides of the first; windows are rounded, so these are 2 % off at most."""
    return [windows[0].side / frames.windows[0][0].side for windows in frames.windows]


def centres(frames: Scripted) -> np.ndarray:
    """(n, 2) middles of the windows looked at."""
    return np.array([(w.x0 + w.side / 2, w.y0 + w.side / 2) for (w,) in frames.windows])


def test_the_search_is_as_before_once_found(follow):
    _, frames = follow(TrackerConfig(search_home=2, search_width=1.5), [0.9, 0.1, 0.1, 0.1, 0.1, 0.9, 0.9])
    assert sides(frames) == pytest.approx([1, 1, 1, 1.5, 1, 1.5, 1], rel=0.03)
    assert np.abs(centres(frames)[[0, 1, 2, 4, 6]] - (320, 220)).max() <= SIDE / 128 + 0.5


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
    _, frames = follow(TrackerConfig(search_home=2, search_width=1.5), [0.1] * 5)
    for (window,), (size,) in zip(frames.windows, frames.sizes, strict=True):
        assert size == pytest.approx([40 * 256 / window.side] * 2)
    assert frames.sizes[2][0, 0] < 0.8 * frames.sizes[0][0, 0]


def test_nothing_is_remembered_of_a_frame_without_the_target(follow):
    results, frames = follow(PLAIN, [0.9, 0.2, 0.5, 0.5, 0.7, 0.9])
    assert [frame for _, frame in frames.writes] == [1, 5, 6]
    assert [result.memory_written for result in results] == [True, False, False, False, True, True]


@pytest.mark.parametrize("home", [1, 2, 3])
def test_every_so_many_frames_of_a_loss_one_looks_at_the_last_place(follow, home):
    _, frames = follow(TrackerConfig(search_home=home), [0.1] * 13)
    away = np.abs(centres(frames)[1:] - (320, 220)).max(1)  # the first frame is not lost yet
    at_home = away <= SIDE / 128 + 0.5
    assert at_home.tolist() == [number % home == 0 for number in range(12)]


def test_the_whole_frame_is_searched_in_the_end_and_the_neighbourhood_first(follow):
    """A target of 40 pixels, wherever its centre is, is whole in a window that is looked at."""
    config = TrackerConfig(search_home=2, search_patience=10)
    _, frames = follow(config, [0.1] * 60)
    beside = centres(frames)[2::2]
    assert np.abs(beside[:5] - (320, 220)).max() < config.search_width * SIDE
    distance = np.abs(beside[:3] - (320, 220)).sum(1)
    assert (np.diff(distance) >= -SIDE / 64 - 1).all(), "nearest first"
    reach = np.array([window.side for (window,) in frames.windows[2::2]]) / 2 - 20
    for x in np.arange(20, 621, 5):
        for y in np.arange(20, 461, 5):
            assert (np.abs(beside[5:] - (x, y)).max(1) <= reach[5:] + SIDE / 128 + 1).any(), (x, y)


@pytest.mark.parametrize(
    ("out", "axis", "end"),
    [((-18, 220), 0, 0), ((610, 100), 0, 640), ((300, -15), 1, 0), ((280, 450), 1, 480)],
)
def test_a_target_that_left_the_frame_is_sought_along_that_side(follow, out, axis, end):
    _, frames = follow(TrackerConfig(), [0.9] + [0.1] * 50, [(*out, 40.0, 40.0)] * 51)
    looks = [(window, at) for (window,), at in zip(frames.windows, centres(frames), strict=True)][3:]
    beside = [(window, at) for window, at in looks if window.side > 1.1 * SIDE]
    inside = {round(abs(at[axis] - end)) for _, at in beside}
    assert len(inside) == 1 and inside.pop() == pytest.approx(beside[0][0].side / 2 - 20, abs=SIDE / 32)
    reached = sorted((at[1 - axis], window.side / 2) for window, at in beside)
    length = (640, 480)[1 - axis]
    assert reached[0][0] <= reached[0][1] and reached[-1][0] >= length - reached[-1][1]
    rounded = SIDE / 32  # what two places may be moved apart by
    apart = max(b[0] - a[0] for a, b in zip(reached, reached[1:], strict=False))
    assert apart <= beside[0][0].side - 39 + rounded


def test_a_target_that_was_cut_by_the_frame_is_sought_at_its_full_size(follow):
    half = (-1.0, 200.0, 20.0, 40.0)
    results, frames = follow(TrackerConfig(), [0.9, 0.9, 0.1, 0.1, 0.1], [BOX, half, half, half, half])
    assert results[-1].box == pytest.approx(half), "what is said of it stays"
    assert frames.windows[2][0].side < 0.9 * SIDE
    assert frames.windows[3][0].side == SIDE
    assert frames.sizes[3][0] == pytest.approx([40 * 256 / SIDE] * 2)
    assert centres(frames)[3] == pytest.approx((9, 220), abs=0.5)


def test_a_loss_may_last(follow):
    results, frames = follow(TrackerConfig(), [0.0] * 20_000 + [0.9])
    assert not results[-2].found and results[-1].found
    assert frames.windows[-1][0].side < 1.5 * SIDE


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


def test_a_tiny_target_in_a_large_frame_is_not_sought_at_millions_of_places():
    target = Target((4000.0, 4000.0, 1.0, 1.0), np.empty((8000, 8000, 3), np.uint8))
    places, near = target._sweep(1.25)
    assert len(places) == 256**2 and 0 < near < len(places)
    assert max(abs(at - 4000) for at in places[0]) < 8000 / 256
