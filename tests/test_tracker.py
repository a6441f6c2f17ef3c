"""FastDMVTracker: the interface of cv2.Tracker, its state, and what it says to bad input."""

from __future__ import annotations

import copy
import threading

import cv2
import numpy as np
import pytest

from dmv_fast import FastDMVTracker
from dmv_fast.model.memory import MemoryPolicy
from dmv_fast.tracker import TrackerConfig

BOX = (60, 50, 40, 30)


@pytest.fixture
def tracker(weights) -> FastDMVTracker:
    return FastDMVTracker(weights, device="cpu", dtype="float32", config=TrackerConfig(found_score=0.0))


def frames(count: int = 4, size: tuple[int, int] = (120, 160)) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    scene = cv2.resize(rng.integers(0, 255, (30, 40, 3), np.uint8), (size[1] + 50, size[0]))
    return [np.ascontiguousarray(scene[:, 3 * i : 3 * i + size[1]]) for i in range(count)]


def run(tracker: FastDMVTracker, images: list[np.ndarray]) -> list:
    tracker.init(images[0], BOX)
    return [tracker.track(image) for image in images[1:]]


def test_speaks_as_cv2_tracker(tracker):
    images = frames()
    assert tracker.init(images[0], BOX) is None
    ok, box = tracker.update(images[1])
    assert ok is True and isinstance(box, tuple) and len(box) == 4
    assert all(type(v) is int for v in box)
    assert 0 <= tracker.getTrackingScore() <= 1


def test_update_rounds_what_track_says(tracker):
    images = frames()
    expected = run(tracker, images)
    tracker.init(images[0], BOX)
    for image, result in zip(images[1:], expected, strict=True):
        assert tracker.update(image)[1] == tuple(round(v) for v in result.box)


@pytest.mark.parametrize(
    "box",
    [
        (60.5, 50.2, 40.7, 30.1),
        np.array([60, 50, 40, 30]),
        [60, 50, 40, 30],
        np.float32([60, 50, 40, 30]),
        (-10, -10, 60, 60),
        (-50, -50, 400, 400),
    ],
)
def test_boxes_a_person_would_give(tracker, box):
    tracker.init(frames()[0], box)
    assert np.isfinite(tracker.track(frames()[1]).box).all()


@pytest.mark.parametrize(
    "box",
    [
        (60, 50, 0, 30),
        (60, 50, -4, 30),
        (60, np.nan, 40, 30),
        (60, 50, np.inf, 3),
        (160, 50, 40, 30),
        (-41, 50, 40, 30),
        (1, 2, 3),
        "abcd",
        None,
        (1, 2, 3, "x"),
    ],
)
def test_bad_boxes_are_named_and_change_nothing(tracker, box):
    images = frames()
    tracker.init(images[0], BOX)
    before = tracker.clone()
    with pytest.raises(ValueError, match="box is"):
        tracker.init(images[0], box)
    assert tracker.track(images[1]) == before.track(images[1])


@pytest.mark.parametrize(
    "make",
    [
        lambda f: f[:, :, 0],
        lambda f: f[:, :, :1],
        lambda f: np.dstack([f, f[:, :, 0]]),
        lambda f: f[::-1][::-1],
        lambda f: np.asfortranarray(f),
    ],
)
def test_images_that_are_handled(tracker, make):
    for image in frames(2):
        image = make(image)
        tracker.init(image, BOX)
        assert np.isfinite(tracker.track(image).box).all()


def test_read_only_image_and_no_write_to_it(tracker):
    image = frames(1)[0]
    image.flags.writeable = False
    before = image.copy()
    tracker.init(image, BOX)
    tracker.track(image)
    assert (image == before).all()


def test_tiny_and_huge_frames(tracker):
    for size, box in (((1, 1), (0, 0, 1, 1)), ((4320, 7680), (3000, 2000, 300, 200))):
        image = np.zeros((*size, 3), np.uint8)
        tracker.init(image, box)
        assert np.isfinite(tracker.track(image).box).all()


@pytest.mark.parametrize(
    ("image", "error", "says"),
    [
        (None, TypeError, "numpy"),
        (np.zeros((0, 0, 3), np.uint8), ValueError, "no pixel"),
        (np.zeros((20, 20, 3), np.float32), TypeError, "float32"),
        (np.zeros((20, 20, 2), np.uint8), ValueError, "shape"),
        (np.zeros((2, 20, 20, 3), np.uint8), ValueError, "shape"),
        (np.zeros(20, np.uint8), ValueError, "shape"),
    ],
)
def test_bad_images_are_named(tracker, image, error, says):
    with pytest.raises(error, match=says):
        tracker.init(image, BOX)
    tracker.init(frames()[0], BOX)
    with pytest.raises(error, match=says):
        tracker.track(image)


def test_track_before_init_and_changed_frame_size(tracker):
    with pytest.raises(RuntimeError, match="init"):
        tracker.update(frames()[0])
    tracker.init(frames()[0], BOX)
    with pytest.raises(ValueError, match="init again"):
        tracker.track(frames(1, (60, 80))[0])
    tracker.init(frames(1, (60, 80))[0], (10, 10, 20, 20))  # a new start may have a new size


def test_second_init_forgets_everything(tracker):
    images = frames()
    expected = run(tracker, images)
    tracker.init(frames(1, (90, 90))[0], (1, 1, 20, 20))
    tracker.track(frames(1, (90, 90))[0])
    assert run(tracker, images) == expected


def test_same_video_same_boxes(weights):
    images = frames()
    first, second = (run(FastDMVTracker(weights, device="cpu", dtype="float32"), images) for _ in range(2))
    assert first == second


def test_clone_goes_its_own_way(tracker):
    images = frames(6)
    tracker.init(images[0], BOX)
    tracker.track(images[1])
    copies = [tracker.clone(), copy.deepcopy(tracker)]
    for other in copies:
        other.track(images[5])
    fresh = tracker.clone()
    assert fresh.track(images[2]) == tracker.track(images[2])
    assert copies[0].frame_step.network is tracker.frame_step.network


def test_lost_target_keeps_its_last_box(weights):
    tracker = FastDMVTracker(weights, device="cpu", config=TrackerConfig(found_score=1.1))
    image = frames()[0]
    tracker.init(image, BOX)
    result = tracker.track(image)
    assert not result.found and result.box == BOX
    assert tracker.update(image) == (False, BOX)


def test_memory_policy_is_kept(weights):
    config = TrackerConfig(capacity=3, policy=MemoryPolicy(interval=2, threshold=0.0), found_score=0.0)
    tracker = FastDMVTracker(weights, device="cpu", config=config)
    written = [r.memory_written for r in run(tracker, frames(9))]
    assert written == [False, True] * 4
    assert sorted(tracker.frame_step.memory.slots[0].frames) == [0, 6, 8]
    never = TrackerConfig(policy=MemoryPolicy(interval=1, threshold=1.1))
    assert not any(
        r.memory_written for r in run(FastDMVTracker(weights, device="cpu", config=never), frames())
    )


def test_one_tracker_a_thread(weights):
    images = frames()
    alone = run(FastDMVTracker(weights, device="cpu", dtype="float32"), images)
    results: list = [None] * 4

    def work(i: int) -> None:
        results[i] = run(FastDMVTracker(weights, device="cpu", dtype="float32"), images)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert results == [alone] * 4


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"weights": "no_such"}, "no_such"),
        ({"k": 0}, "k is 0"),
        ({"k": 33}, "k is 33"),
        ({"device": "tpu9"}, "device"),
        ({"dtype": "int8"}, "dtype"),
        ({"backend": "magic"}, "backend"),
    ],
)
def test_bad_settings_are_named(weights, kwargs, says):
    with pytest.raises(ValueError, match=says):
        FastDMVTracker(**{"weights": weights, "device": "cpu", **kwargs})


@pytest.mark.parametrize("k", [1, 32])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_settings_that_run(weights, k, dtype):
    result = run(FastDMVTracker(weights, k=k, device="cpu", dtype=dtype), frames(2))[0]
    assert np.isfinite(result.box).all()
